// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Level 1's help against an error of the QEMU that emulates it. Up to version 8, QEMU aborts when a nested guest writes CR8
 * while KVM waits for that guest's interrupt window, as firmware does at the end of each timer interrupt on a busy
 * machine. KVM intercepts such writes while the pending interrupt's class is not above the guest's task priority; this
 * tells it so always.
 */
#include <linux/kprobes.h>
#include <linux/module.h>

/* svm_update_cr8_intercept(vcpu, tpr, irr) */
static int always(struct kprobe *probe, struct pt_regs *regs)
{
	regs->si = 0;
	regs->dx = 0;
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "svm_update_cr8_intercept",
	.pre_handler = always,
};

static int __init start(void)
{
	return register_kprobe(&probe);
}

static void __exit end(void)
{
	unregister_kprobe(&probe);
}

module_init(start);
module_exit(end);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_DESCRIPTION("KVM always intercepts writes to CR8");
