//! The arguments of the driver's requests.

use std::ffi::c_void;

use super::layout;

layout! {
    /// `struct vm_create_req`.
    VmCreateReq: 136 {
        name: [u8; 128] = 0,
        flags: u64 = 128,
    }
    /// `struct vm_destroy_req`.
    VmDestroyReq: 128 {
        name: [u8; 128] = 0,
    }
    /// `struct vm_memseg`.
    VmMemseg: 144 {
        segid: i32 = 0,
        len: usize = 8,
        name: [u8; 128] = 16,
    }
    /// `struct vm_memmap`.
    VmMemmap: 40 {
        gpa: u64 = 0,
        segid: i32 = 8,
        segoff: i64 = 16,
        len: usize = 24,
        prot: i32 = 32,
        flags: i32 = 36,
    }
    /// `struct vm_munmap`.
    VmMunmap: 16 {
        gpa: u64 = 0,
        len: usize = 8,
    }
    /// `struct vm_devmem_offset`.
    VmDevmemOffset: 16 {
        segid: i32 = 0,
        offset: i64 = 8,
    }
    /// `struct vm_register`.
    VmRegister: 16 {
        cpuid: i32 = 0,
        regnum: i32 = 4,
        regval: u64 = 8,
    }
    /// `struct vm_register_set`.
    VmRegisterSet: 24 {
        cpuid: i32 = 0,
        count: u32 = 4,
        regnums: *const i32 = 8,
        regvals: *mut u64 = 16,
    }
    /// `struct seg_desc`.
    SegDesc: 16 {
        base: u64 = 0,
        limit: u32 = 8,
        access: u32 = 12,
    }
    /// `struct vm_seg_desc`.
    VmSegDesc: 24 {
        cpuid: i32 = 0,
        regnum: i32 = 4,
        desc: SegDesc = 8,
    }
    /// `struct vm_inout`.
    VmInout: 12 {
        eax: u32 = 0,
        port: u16 = 4,
        bytes: u8 = 6,
        flags: u8 = 7,
        addrsize: u8 = 8,
        segment: u8 = 9,
    }
    /// `struct vm_mmio`.
    VmMmio: 24 {
        bytes: u8 = 0,
        read: u8 = 1,
        pad: [u16; 3] = 2,
        gpa: u64 = 8,
        data: u64 = 16,
    }
    /// `struct vm_entry`.
    VmEntry: 40 {
        cpuid: i32 = 0,
        cmd: u32 = 4,
        exit_data: *mut VmExit = 8,
        u: EntryPayload = 16,
    }
    /// `struct vm_exit`.
    VmExit: 64 {
        exitcode: i32 = 0,
        inst_length: i32 = 4,
        rip: u64 = 8,
        u: ExitPayload = 16,
    }
    /// `struct vm_exit_vmx`.
    VmExitVmx: 24 {
        status: i32 = 0,
        exit_reason: u32 = 4,
        qualification: u64 = 8,
        inst_type: i32 = 16,
        inst_error: i32 = 20,
    }
    /// `struct vm_exit_svm`.
    VmExitSvm: 24 {
        exitcode: u64 = 0,
        exitinfo1: u64 = 8,
        exitinfo2: u64 = 16,
    }
    /// `struct vm_exit_msr`.
    VmExitMsr: 16 {
        code: u32 = 0,
        wval: u64 = 8,
    }
    /// `struct vm_exit_paging`.
    VmExitPaging: 16 {
        gpa: u64 = 0,
        fault_type: i32 = 8,
    }
    /// `struct vm_exit_inst_emul`.
    VmExitInstEmul: 16 {
        inst: [u8; 15] = 0,
        num_valid: u8 = 15,
    }
    /// `struct vm_exit_suspended`.
    VmExitSuspended: 16 {
        how: i32 = 0,
        source: i32 = 4,
        when: u64 = 8,
    }
    /// `struct vm_guest_paging`.
    VmGuestPaging: 24 {
        cr3: u64 = 0,
        cpl: i32 = 8,
        cpu_mode: i32 = 12,
        paging_mode: i32 = 16,
    }
    /// `struct vm_task_switch`.
    VmTaskSwitch: 48 {
        tsssel: u16 = 0,
        ext: i32 = 4,
        errcode: u32 = 8,
        errcode_valid: i32 = 12,
        reason: i32 = 16,
        paging: VmGuestPaging = 24,
    }
    /// `struct vm_exception`.
    VmException: 20 {
        cpuid: i32 = 0,
        vector: i32 = 4,
        error_code: u32 = 8,
        error_code_valid: i32 = 12,
        restart_instruction: i32 = 16,
    }
    /// `struct vm_intinfo`.
    VmIntinfo: 24 {
        vcpuid: i32 = 0,
        info1: u64 = 8,
        info2: u64 = 16,
    }
    /// `struct vm_capability`.
    VmCapability: 16 {
        cpuid: i32 = 0,
        captype: i32 = 4,
        capval: i32 = 8,
        allcpus: i32 = 12,
    }
    /// `struct vm_lapic_msi`.
    VmLapicMsi: 16 {
        msg: u64 = 0,
        addr: u64 = 8,
    }
    /// `struct vm_lapic_irq`.
    VmLapicIrq: 8 {
        cpuid: i32 = 0,
        vector: i32 = 4,
    }
    /// `struct vm_ioapic_irq`.
    VmIoapicIrq: 4 {
        irq: i32 = 0,
    }
    /// `struct vm_isa_irq`.
    VmIsaIrq: 8 {
        atpic_irq: i32 = 0,
        ioapic_irq: i32 = 4,
    }
    /// `struct vm_isa_irq_trigger`.
    VmIsaIrqTrigger: 8 {
        atpic_irq: i32 = 0,
        trigger: i32 = 4,
    }
    /// `struct vm_nmi`.
    VmNmi: 4 {
        cpuid: i32 = 0,
    }
    /// `struct vm_x2apic`.
    VmX2apic: 8 {
        cpuid: i32 = 0,
        state: i32 = 4,
    }
    /// `struct vm_suspend`.
    VmSuspend: 8 {
        how: i32 = 0,
        source: i32 = 4,
    }
    /// `struct vm_reinit`.
    VmReinit: 8 {
        flags: u64 = 0,
    }
    /// `struct vm_gla2gpa`.
    VmGla2gpa: 56 {
        vcpuid: i32 = 0,
        prot: i32 = 4,
        gla: u64 = 8,
        paging: VmGuestPaging = 16,
        fault: i32 = 40,
        gpa: u64 = 48,
    }
    /// `struct vm_cpuset`.
    VmCpuset: 16 {
        which: i32 = 0,
        cpusetsize: i32 = 4,
        cpus: *mut c_void = 8,
    }
    /// `struct vm_rtc_data`.
    VmRtcData: 8 {
        offset: i32 = 0,
        value: u8 = 4,
    }
    /// `struct vm_cpu_topology`.
    VmCpuTopology: 8 {
        sockets: u16 = 0,
        cores: u16 = 2,
        threads: u16 = 4,
        maxcpus: u16 = 6,
    }
    /// `struct vm_readwrite_kernemu_device`.
    VmReadwriteKernemuDevice: 24 {
        vcpuid: i32 = 0,
        access: u32 = 4,
        gpa: u64 = 8,
        value: u64 = 16,
    }
    /// `struct vm_vcpu_reset`.
    VmVcpuReset: 8 {
        vcpuid: i32 = 0,
        kind: u32 = 4,
    }
    /// `struct vm_run_state`.
    VmRunState: 12 {
        vcpuid: i32 = 0,
        state: u32 = 4,
        sipi_vector: u8 = 8,
        pad: [u8; 3] = 9,
    }
    /// `struct vm_fpu_state`.
    VmFpuState: 24 {
        vcpuid: i32 = 0,
        buf: *mut c_void = 8,
        len: usize = 16,
    }
    /// `struct vm_fpu_desc`.
    VmFpuDesc: 24 {
        entries: *mut VmFpuDescEntry = 0,
        req_size: usize = 8,
        num_entries: u32 = 16,
    }
    /// `struct vm_fpu_desc_entry`.
    VmFpuDescEntry: 16 {
        feature: u64 = 0,
        size: u32 = 8,
        off: u32 = 12,
    }
    /// `struct vmm_resv_query`.
    VmmResvQuery: 32 {
        free: usize = 0,
        alloc: usize = 8,
        alloc_transient: usize = 16,
        limit: usize = 24,
    }
    /// `struct vmm_resv_target`.
    VmmResvTarget: 24 {
        target_sz: usize = 0,
        chunk_sz: usize = 8,
        result_sz: usize = 16,
    }
    /// `struct vmm_dirty_tracker`.
    VmmDirtyTracker: 24 {
        start_gpa: u64 = 0,
        len: usize = 8,
        pfns: *mut c_void = 16,
    }
    /// `struct vm_npt_operation`.
    VmNptOperation: 32 {
        gpa: u64 = 0,
        len: u64 = 8,
        bitmap: *mut u8 = 16,
        operation: u32 = 24,
    }
    /// `struct vm_data_xfer`.
    VmDataXfer: 32 {
        vcpuid: i32 = 0,
        class: u16 = 4,
        version: u16 = 6,
        flags: u32 = 8,
        len: u32 = 12,
        result_len: u32 = 16,
        data: *mut c_void = 24,
    }
    /// `struct vm_vcpu_cpuid_config`.
    VmVcpuCpuidConfig: 24 {
        vcpuid: i32 = 0,
        flags: u32 = 4,
        nent: u32 = 8,
        pad: u32 = 12,
        entries: *mut c_void = 16,
    }
    /// `struct vcpu_cpuid_entry`.
    VcpuCpuidEntry: 32 {
        function: u32 = 0,
        index: u32 = 4,
        flags: u32 = 8,
        eax: u32 = 12,
        ebx: u32 = 16,
        ecx: u32 = 20,
        edx: u32 = 24,
        pad: u32 = 28,
    }
    /// `struct vm_legacy_cpuid`.
    VmLegacyCpuid: 20 {
        vcpuid: i32 = 0,
        eax: u32 = 4,
        ebx: u32 = 8,
        ecx: u32 = 12,
        edx: u32 = 16,
    }
    /// `struct vm_hpet_cap`.
    VmHpetCap: 4 {
        capabilities: u32 = 0,
    }
    /// `struct vm_stats`.
    VmStats: 544 {
        cpuid: i32 = 0,
        index: i32 = 4,
        num_entries: i32 = 8,
        time: Timeval = 16,
        statbuf: [u64; 64] = 32,
    }
    /// `struct vm_stat_desc`.
    VmStatDesc: 132 {
        index: i32 = 0,
        desc: [u8; 128] = 4,
    }
    /// `struct vm_pptdev_mmio`.
    VmPptdevMmio: 32 {
        pptfd: i32 = 0,
        gpa: u64 = 8,
        hpa: u64 = 16,
        len: usize = 24,
    }
    /// `struct vm_pptdev_msi`.
    VmPptdevMsi: 32 {
        vcpu: i32 = 0,
        pptfd: i32 = 4,
        numvec: i32 = 8,
        msg: u64 = 16,
        addr: u64 = 24,
    }
    /// `struct vm_pptdev_msix`.
    VmPptdevMsix: 40 {
        vcpu: i32 = 0,
        pptfd: i32 = 4,
        idx: i32 = 8,
        msg: u64 = 16,
        vector_control: u32 = 24,
        addr: u64 = 32,
    }
    /// `struct vm_pptdev_limits`.
    VmPptdevLimits: 12 {
        pptfd: i32 = 0,
        msi_limit: i32 = 4,
        msix_limit: i32 = 8,
    }
    /// `struct timeval`.
    Timeval: 16 {
        sec: i64 = 0,
        usec: i64 = 8,
    }
    /// `struct timespec`.
    Timespec: 16 {
        sec: i64 = 0,
        nsec: i64 = 8,
    }
}

/// `vm_entry.u`: what a register access is completed with.
#[repr(C)]
#[derive(Clone, Copy)]
pub union EntryPayload {
    pub inout: VmInout,
    pub mmio: VmMmio,
}

const _: () = assert!(size_of::<EntryPayload>() == 24);

/// `vm_exit.u`: which member is there, the exit code says.
#[repr(C)]
#[derive(Clone, Copy)]
pub union ExitPayload {
    pub inout: VmInout,
    pub mmio: VmMmio,
    pub msr: VmExitMsr,
    pub vmx: VmExitVmx,
    pub svm: VmExitSvm,
    pub paging: VmExitPaging,
    pub inst_emul: VmExitInstEmul,
    pub suspended: VmExitSuspended,
    pub task_switch: VmTaskSwitch,
}

const _: () = assert!(size_of::<ExitPayload>() == 48);
