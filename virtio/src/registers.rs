//! The registers behind both register layouts: device status, features, and each queue's set-up (sections 2.1, 2.2, 3.1).

use vmm_plugin_api::QueueConfig;

use crate::interrupt::NO_VECTOR;
use crate::{F_ANY_LAYOUT, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};

pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 0x40;

/// What the transport has to do after a register write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// Back to power-on state.
    Reset,
    /// The driver is ready: serve every queue that is enabled.
    StartAll,
    /// Serve this queue.
    Start(u16),
    /// Leave this queue alone.
    Stop(u16),
    /// This queue interrupts by another vector.
    Vector(u16),
}

#[derive(Clone, Debug)]
pub(crate) struct QueueRegisters {
    max: u16,
    pub(crate) size: u16,
    pub(crate) vector: u16,
    pub(crate) enabled: bool,
    /// Its thread has been given the ring.
    pub(crate) served: bool,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            vector: NO_VECTOR,
            enabled: false,
            served: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

pub(crate) struct Registers {
    /// Feature bits offered through the modern layout.
    offered: u64,
    pub(crate) accepted: u64,
    pub(crate) device_select: u32,
    pub(crate) driver_select: u32,
    pub(crate) status: u8,
    pub(crate) queue_select: u16,
    pub(crate) queues: Vec<QueueRegisters>,
    /// MSI-X vectors that there are.
    vectors: u16,
    /// The status that is read while queue threads still finish what a reset interrupts.
    pub(crate) resetting: Option<u8>,
    /// The device configuration, and a number that changes with it (section 2.5).
    pub(crate) config: Vec<u8>,
    pub(crate) generation: u8,
}

impl Registers {
    pub(crate) fn new(features: u64, queue_sizes: &[u16], vectors: u16, config: Vec<u8>) -> Self {
        Self {
            offered: features | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .copied()
                .map(QueueRegisters::new)
                .collect(),
            vectors,
            resetting: None,
            config,
            generation: 0,
        }
    }

    /// Replaces the device configuration. Whether it has changed, and a driver is there that has to be told.
    pub(crate) fn set_config(&mut self, config: Vec<u8>) -> bool {
        if config == self.config {
            return false;
        }
        self.config = config;
        self.generation = self.generation.wrapping_add(1);
        self.status & DRIVER_OK != 0
    }

    /// Power-on values. The status stays visible until the queues are at rest.
    pub(crate) fn reset(&mut self) {
        let before = self.status;
        self.accepted = 0;
        (self.device_select, self.driver_select, self.queue_select) = (0, 0, 0);
        self.status = 0;
        // A second reset does not end the wait for the first.
        self.resetting = self.resetting.or((before != 0).then_some(before));
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }

    pub(crate) fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// Half `select` of the offered feature bits, as the modern layout shows them.
    pub(crate) fn offered_half(&self, select: u32) -> u32 {
        match select {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        }
    }

    /// The driver accepts feature bits through the modern layout.
    pub(crate) fn accept_half(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let (shift, keep) = match self.driver_select {
            0 => (0, 0xffff_ffff_0000_0000),
            1 => (32, 0x0000_0000_ffff_ffff),
            _ => return,
        };
        self.accepted = self.accepted & keep | u64::from(value) << shift;
    }

    /// Feature bits offered through the legacy layout.
    pub(crate) fn offered_legacy(&self) -> u32 {
        (self.offered | F_ANY_LAYOUT) as u32
    }

    pub(crate) fn accept_legacy(&mut self, value: u32) {
        self.accepted = u64::from(value & self.offered_legacy());
    }

    /// A write to the device status through the modern layout.
    pub(crate) fn write_status(&mut self, value: u8) -> Effect {
        let mut value = value | self.status & NEEDS_RESET;
        let rises = value & !self.status;
        if rises & FEATURES_OK != 0 {
            // Section 2.2.2: the bit stays clear when the driver takes what was not offered; 6.2: when it does not take
            // VERSION_1.
            let known = self.accepted & !self.offered == 0;
            if !known || self.accepted & F_VERSION_1 == 0 {
                value &= !FEATURES_OK;
            }
        }
        if value & FEATURES_OK == 0 {
            // Without negotiated features there is no telling what the driver's queues mean (section 3.1.1).
            value &= !DRIVER_OK;
        }
        self.apply_status(value)
    }

    /// A write to the device status through the legacy layout, which has no FEATURES_OK.
    pub(crate) fn write_legacy_status(&mut self, value: u8) -> Effect {
        self.apply_status(value | self.status & NEEDS_RESET)
    }

    fn apply_status(&mut self, value: u8) -> Effect {
        self.resetting = None;
        let rises = value & !self.status;
        self.status = value;
        if rises & DRIVER_OK != 0 {
            Effect::StartAll
        } else {
            Effect::None
        }
    }

    /// Chooses the selected queue's MSI-X vector; one that does not exist reads back as none (section 4.1.5.1.2).
    pub(crate) fn set_queue_vector(&mut self, vector: u16) -> Effect {
        let vector = self.checked_vector(vector);
        let index = self.queue_select;
        let Some(queue) = self.selected() else {
            return Effect::None;
        };
        queue.vector = vector;
        Effect::Vector(index)
    }

    pub(crate) fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// The driver enables the selected queue, whose addresses are set.
    pub(crate) fn enable_queue(&mut self) -> Effect {
        let (index, running) = (self.queue_select, self.status & DRIVER_OK != 0);
        match self.selected() {
            Some(queue) if !queue.enabled => queue.enabled = true,
            _ => return Effect::None,
        }
        if running {
            Effect::Start(index)
        } else {
            Effect::None
        }
    }

    /// What to serve queue `index` with, if the driver has enabled it.
    pub(crate) fn queue_config(&self, index: u16) -> Option<QueueConfig> {
        let queue = self.queues.get(usize::from(index)).filter(|q| q.enabled)?;
        Some(QueueConfig {
            // A size above what the device has offered is refused by the queue as 0 would be.
            size: if queue.size <= queue.max {
                queue.size
            } else {
                0
            },
            descriptors: queue.descriptors,
            available: queue.available,
            used: queue.used,
            max_chain: queue.max,
            event_index: self.accepted & F_EVENT_IDX != 0,
            indirect: self.accepted & F_INDIRECT_DESC != 0,
        })
    }

    /// Largest size of the selected queue, 0 when there is no such queue.
    pub(crate) fn selected_max(&mut self) -> u16 {
        self.selected().map_or(0, |q| q.max)
    }
}
