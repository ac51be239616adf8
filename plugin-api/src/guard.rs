//! Panics stop here: the dead flag, `catch_unwind`, and the text of what happened.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::Host;

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps each panic's message and place for the fault report instead of printing it to stderr.
/// Each plugin has its own copy of std, so this hook is the plugin's alone.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let text = info
            .payload_as_str()
            .unwrap_or("a panic that carries no text");
        let place = info
            .location()
            .map(|l| format!("panicked at {}:{}:{}: ", l.file(), l.line(), l.column()));
        let _ = LAST_PANIC.try_with(|last| {
            *last.borrow_mut() = Some(format!("{}{text}", place.unwrap_or_default()));
        });
    }));
}

/// Runs `f`; a panic becomes its text.
pub(crate) fn catch<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        // Dropping the payload could panic again, outside of any guard.
        std::mem::forget(payload);
        LAST_PANIC.take().unwrap_or_else(|| "panicked".to_owned())
    })
}

/// Runs `f` unless the object is dead; a panic kills the object, reports the fault and gives `neutral`.
pub(crate) fn call<R>(host: &Host, method: &str, neutral: R, f: impl FnOnce() -> R) -> R {
    if host.is_dead() {
        return neutral;
    }
    match catch(f) {
        Ok(result) => result,
        Err(text) => {
            host.fault(method, &text);
            neutral
        }
    }
}
