# Boots the boot bench's guest under each named host: twice for the figures, for a first run finds level 1 cold, then once
# more with KVM's events counted, which costs instructions of its own.
cd /lab/boot || exit 1
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
echo never >/sys/kernel/mm/transparent_hugepage/shmem_enabled
echo always >/sys/kernel/mm/transparent_hugepage/enabled
line="console=ttyS0 reboot=t panic=-1 quiet i8042.noaux i8042.nomux i8042.dumbkbd"
qemu="qemu-system-x86_64 -L /lab/boot/firmware -accel kvm -cpu host -m 256 -smp 1 -nodefaults -no-user-config
    -no-reboot -display none -serial stdio -initrd initrd"
boot() {
    case $1 in
    vmm-host-elf) sed s/KERNEL/vmlinux/ vm.toml >vmm.toml && set -- vmm-host --log-level "${2:-error}" vmm.toml ;;
    vmm-host-disk)
        truncate -s 16M disk.img
        sed s/KERNEL/vmlinux/ vm.toml | cat - disk.toml >vmm.toml
        set -- vmm-host --log-level "${2:-error}" vmm.toml
        ;;
    vmm-host-bz) sed s/KERNEL/vmlinuz/ vm.toml >vmm.toml && set -- vmm-host --log-level "${2:-error}" vmm.toml ;;
    # shellcheck disable=SC2086
    microvm) set -- $qemu -machine microvm,rtc=on -bios qboot.rom -kernel /lab/vmlinux -append "$line" ;;
    # shellcheck disable=SC2086
    pc) set -- $qemu -machine pc -vga none -kernel /lab/vmlinux -append "$line" ;;
    esac
    timeout -s KILL 20 boot-sampler "$@" </dev/null
}
# Counts by the named field of KVM's event, largest first.
events="kvm_exit:exit_reason kvm_userspace_exit:reason kvm_pio:port kvm_mmio:gpa kvm_msr:ecx kvm_fast_mmio:gpa"
kvm=/sys/kernel/tracing/events/kvm
names=$(sed -n 's/.*bench\.hosts=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' ')
for name in $names; do
    echo "BOOT-START $name"
    boot "$name"
    boot "$name"
    case $name in
    vmm-host*) boot "$name" debug 2>&1 >/dev/null | sed -n 's/^  *\([0-9.]*  *[0-9.]*  [A-Za-z]\)/STEP \1/p' ;;
    esac
    for event in $events; do
        echo "hist:keys=${event#*:}.hex:sort=hitcount.descending:size=4096" >"$kvm/${event%:*}/trigger"
    done
    echo "COUNT-START $name"
    boot "$name" >/dev/null
    for event in $events; do
        sed -n "s/{ *[a-z_]*: *\([0-9a-f]*\) *} *hitcount: *\([0-9]*\).*/COUNT ${event%:*} \1 \2/p" "$kvm/${event%:*}/hist" | head -n 24
        echo "!hist:keys=${event#*:}.hex:sort=hitcount.descending:size=4096" >"$kvm/${event%:*}/trigger"
    done
    echo "COUNT-END $name"
done
