//! The thunks behind a character backend's tables.

use std::ffi::c_void;
use std::marker::PhantomData;

use vmm_abi::chardev::{CHAR, CharTable};
use vmm_abi::device::{EVENTS, EventsTable};
use vmm_abi::{Base, Iface, Str};

use super::{object, release, text};
use crate::iface::offer;
use crate::{CharBackend, Events, guard};

/// The tables of character backend type `T`.
pub(super) struct CharTables<T>(PhantomData<T>);

impl<T: CharBackend> CharTables<T> {
    pub(super) const BASE: &'static Base = &Base {
        release: release::<T>,
        interface: Self::interface,
    };
    const CHAR: &'static CharTable = &CharTable {
        read: Self::read,
        write: Self::write,
        fd: Self::fd,
    };
    const EVENTS: &'static EventsTable = &EventsTable { ready: Self::ready };

    unsafe extern "C" fn interface(_this: *mut c_void, name: Str) -> Iface {
        match text(&name) {
            CHAR => offer(Self::CHAR),
            EVENTS => offer(Self::EVENTS),
            _ => Iface::NONE,
        }
    }

    unsafe extern "C" fn read(this: *mut c_void, buf: *mut u8, len: usize) -> isize {
        if len == 0 {
            return 0;
        }
        // SAFETY: the device passes the object that this table came with, and `len` initialised bytes.
        let (object, buf) =
            unsafe { (object::<T>(this), std::slice::from_raw_parts_mut(buf, len)) };
        let none = -(libc::EAGAIN as isize);
        guard::call(&object.host, "read", none, || {
            object.inner.read(buf).map_or(none, |n| n as isize)
        })
    }

    unsafe extern "C" fn write(this: *mut c_void, buf: *const u8, len: usize) -> isize {
        if len == 0 {
            return 0;
        }
        // SAFETY: the device passes the object that this table came with, and `len` bytes.
        let (object, buf) = unsafe { (object::<T>(this), std::slice::from_raw_parts(buf, len)) };
        guard::call(&object.host, "write", len as isize, || {
            object.inner.write(buf) as isize
        })
    }

    unsafe extern "C" fn fd(this: *mut c_void) -> i32 {
        use std::os::fd::AsRawFd;
        // SAFETY: the device passes the object that this table came with.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "fd", -1, || {
            object.inner.fd().map_or(-1, |fd| fd.as_raw_fd())
        })
    }

    unsafe extern "C" fn ready(this: *mut c_void, token: u64, events: u32) {
        // SAFETY: as in `fd`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "ready", (), || {
            object.inner.ready(token, Events(events))
        });
    }
}
