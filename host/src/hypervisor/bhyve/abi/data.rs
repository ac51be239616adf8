//! What `VM_DATA_READ` and `VM_DATA_WRITE` carry: the state of in-kernel devices and vCPUs (vmm_data.h).

use super::layout;

// `vm_data_xfer.class`.
pub const VDC_VERSION: u16 = 1;
pub const VDC_REGISTER: u16 = 2;
pub const VDC_MSR: u16 = 3;
pub const VDC_FPU: u16 = 4;
pub const VDC_LAPIC: u16 = 5;
pub const VDC_VMM_ARCH: u16 = 6;
pub const VDC_IOAPIC: u16 = 7;
pub const VDC_ATPIT: u16 = 8;
pub const VDC_ATPIC: u16 = 9;
pub const VDC_HPET: u16 = 10;
pub const VDC_PM_TIMER: u16 = 11;
pub const VDC_RTC: u16 = 12;
pub const VDC_VMM_TIME: u16 = 13;
pub const VDC_PMU_AMD: u16 = 14;

// `vm_data_xfer.flags`.
pub const VDX_FLAG_READ_COPYIN: u32 = 1;
pub const VDX_FLAG_WRITE_COPYOUT: u32 = 2;
/// The most that one transfer can carry.
pub const VM_DATA_XFER_LIMIT: usize = 8192;

// Idents of `VDC_VMM_ARCH`: of the VM, and of a vCPU.
pub const VAI_VM_IS_PAUSED: u32 = 4;
pub const VAI_PEND_NMI: u32 = 10;
pub const VAI_PEND_EXTINT: u32 = 11;
pub const VAI_PEND_EXCP: u32 = 12;
pub const VAI_PEND_INTINFO: u32 = 13;

layout! {
    /// `struct vdi_version_entry`.
    VdiVersionEntry: 8 {
        class: u16 = 0,
        version: u16 = 2,
        len_expect: u16 = 4,
        len_per_item: u16 = 6,
    }
    /// `struct vdi_field_entry`.
    VdiFieldEntry: 16 {
        ident: u32 = 0,
        pad: u32 = 4,
        value: u64 = 8,
    }
    /// `struct vdi_lapic_page`.
    VdiLapicPage: 176 {
        id: u32 = 0,
        version: u32 = 4,
        tpr: u32 = 8,
        apr: u32 = 12,
        ldr: u32 = 16,
        dfr: u32 = 20,
        svr: u32 = 24,
        isr: [u32; 8] = 28,
        tmr: [u32; 8] = 60,
        irr: [u32; 8] = 92,
        esr: u32 = 124,
        lvt_cmci: u32 = 128,
        icr: u64 = 136,
        lvt_timer: u32 = 144,
        lvt_thermal: u32 = 148,
        lvt_pcint: u32 = 152,
        lvt_lint0: u32 = 156,
        lvt_lint1: u32 = 160,
        lvt_error: u32 = 164,
        icr_timer: u32 = 168,
        dcr_timer: u32 = 172,
    }
    /// `struct vdi_lapic`.
    VdiLapic: 200 {
        page: VdiLapicPage = 0,
        apicbase: u64 = 176,
        timer_target: i64 = 184,
        esr_pending: u32 = 192,
    }
    /// `struct vdi_ioapic`.
    VdiIoapic: 392 {
        pin_reg: [u64; 32] = 0,
        pin_level: [u32; 32] = 256,
        id: u32 = 384,
        reg_sel: u32 = 388,
    }
    /// `struct vdi_atpit_channel`.
    VdiAtpitChannel: 24 {
        initial: u16 = 0,
        reg_cr: u16 = 2,
        reg_ol: u16 = 4,
        reg_status: u8 = 6,
        mode: u8 = 7,
        status: u8 = 8,
        time_target: i64 = 16,
    }
    /// `struct vdi_atpit`.
    VdiAtpit: 72 {
        channel: [VdiAtpitChannel; 3] = 0,
    }
    /// `struct vdi_atpic_chip`.
    VdiAtpicChip: 40 {
        icw_state: u8 = 0,
        status: u8 = 1,
        irr: u8 = 2,
        isr: u8 = 3,
        imr: u8 = 4,
        irq_base: u8 = 5,
        lowprio: u8 = 6,
        elc: u8 = 7,
        level: [u32; 8] = 8,
    }
    /// `struct vdi_atpic`.
    VdiAtpic: 80 {
        chip: [VdiAtpicChip; 2] = 0,
    }
    /// `struct vdi_hpet_timer`.
    VdiHpetTimer: 32 {
        config: u64 = 0,
        msi: u64 = 8,
        comp_val: u32 = 16,
        comp_rate: u32 = 20,
        time_target: i64 = 24,
    }
    /// `struct vdi_hpet`.
    VdiHpet: 288 {
        config: u64 = 0,
        isr: u64 = 8,
        count_base: u32 = 16,
        time_base: i64 = 24,
        timers: [VdiHpetTimer; 8] = 32,
    }
    /// `struct vdi_pm_timer`.
    VdiPmTimer: 16 {
        time_base: i64 = 0,
        ioport: u16 = 8,
    }
    /// `struct vdi_rtc`.
    VdiRtc: 152 {
        base_clock: i64 = 0,
        last_period: i64 = 8,
        content: [u8; 128] = 16,
        addr: u8 = 144,
    }
    /// `struct vdi_rtc_v1`.
    VdiRtcV1: 160 {
        content: [u8; 128] = 0,
        addr: u8 = 128,
        time_base: i64 = 136,
        rtc_sec: u64 = 144,
        rtc_nsec: u64 = 152,
    }
    /// `struct vdi_time_info`.
    VdiTimeInfo: 48 {
        guest_freq: u64 = 0,
        guest_tsc: u64 = 8,
        boot_hrtime: i64 = 16,
        hrtime: i64 = 24,
        hres_sec: u64 = 32,
        hres_ns: u64 = 40,
    }
    /// `struct vdi_pmu_amd`.
    VdiPmuAmd: 96 {
        evtsel: [u64; 6] = 0,
        ctr: [u64; 6] = 48,
    }
}
