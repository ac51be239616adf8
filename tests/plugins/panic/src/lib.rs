//! Panics in the method that the option `where` names: the host has to report it as that method's fault and live on.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use vmm_plugin_api::{
    BlockBackend, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest, Description, Device,
    Host, Options, Region, Result,
};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: { "test-panic" => PanickingDevice },
    blocks: { "test-panic" => PanickingDisk },
    chars: {},
}

/// Where to panic.
#[derive(Clone)]
struct Place(String);

impl Place {
    fn from(options: &Options<'_>) -> Result<Self> {
        Ok(Self(options.str("where")?.to_owned()))
    }

    /// Panics if this is the place.
    fn reach(&self, method: &str) {
        assert!(self.0 != method, "the test wants a panic in {method}");
    }
}

/// A port that reads 0x5a.
pub struct PanickingDevice {
    place: Place,
    port: u64,
    host: Host,
}

impl Device for PanickingDevice {
    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let place = Place::from(options)?;
        place.reach("create");
        Ok(Self {
            place,
            port: options.u64("port")?,
            host: host.clone(),
        })
    }

    fn describe(&self) -> Description {
        self.place.reach("describe");
        Description {
            regions: vec![Region::pio(0, self.port, 1)],
            ..Description::default()
        }
    }

    fn read(&self, _region: u32, _offset: u64, _width: u32) -> u64 {
        self.place.reach("read");
        0x5a
    }

    fn write(&self, _region: u32, _offset: u64, _width: u32, _value: u64) {
        self.place.reach("write");
        let place = self.place.clone();
        // A device must not wait in a register access. This one does, so that its fault comes before the guest's next act.
        match self.host.spawn("test", move || place.reach("thread")) {
            Ok(thread) => drop(thread.join()),
            Err(error) => self.host.fault("write", &error.to_string()),
        }
    }

    fn start(&self) -> Result<()> {
        self.place.reach("start");
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        self.place.reach("pause");
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }

    fn stop(&self) {
        self.place.reach("stop");
    }
}

impl Drop for PanickingDevice {
    fn drop(&mut self) {
        self.place.reach("drop");
    }
}

/// A mebibyte of zeroes.
pub struct PanickingDisk(Place);

impl BlockBackend for PanickingDisk {
    type Queue = PanickingQueue;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let place = Place::from(options)?;
        place.reach("create");
        Ok(Self(place))
    }

    fn info(&self) -> BlockInfo {
        self.0.reach("info");
        INFO
    }

    fn open_queue(&self, depth: u32) -> Result<PanickingQueue> {
        self.0.reach("open_queue");
        Ok(PanickingQueue {
            place: self.0.clone(),
            done: VecDeque::with_capacity(depth as usize),
        })
    }
}

impl Drop for PanickingDisk {
    fn drop(&mut self) {
        self.0.reach("drop");
    }
}

const INFO: BlockInfo = BlockInfo {
    bytes: 1 << 20,
    logical: 512,
    physical: 512,
    features: 0,
    max_segments: 32,
    alignment: 1,
    max_discard: 0,
};

/// Its queue.
pub struct PanickingQueue {
    place: Place,
    done: VecDeque<BlockDone>,
}

impl BlockQueue for PanickingQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        self.place.reach("submit");
        for request in batch {
            let code = request.check(&INFO);
            if code == 0 && request.op() == Some(BlockOp::Read) {
                request.segments().iter().for_each(|s| s.fill(0));
            }
            self.done.push_back(request.done(code));
        }
        batch.len()
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        self.place.reach("reap");
        let count = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..count)) {
            *slot = completion;
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Drop for PanickingQueue {
    fn drop(&mut self) {
        self.place.reach("close_queue");
    }
}
