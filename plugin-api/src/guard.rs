//! Panics stop here: the dead flag, `catch_unwind`, and the text of what happened.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::Host;

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps the message and place of each panic for the fault report, instead of printing it to stderr. Each plugin has
/// its own copy of std, so this hook is the plugin's alone. The guard itself keeps no note of where it is, which would
/// cost each register access a thread-local look-up: so a panic that no guard catches shows in the debug log only.
pub(crate) fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // Tests share this hook with their plugin. Without unwinding nothing is caught: these are the last words.
            if cfg!(feature = "testing") || cfg!(panic = "abort") {
                previous(info);
            }
            let text = info
                .payload_as_str()
                .unwrap_or("a panic that carries no text");
            let place = info.location().map(|l| format!("panicked at {l}: "));
            let text = format!("{}{text}", place.unwrap_or_default());
            log::debug!("{text}");
            let _ = LAST_PANIC.try_with(|last| *last.borrow_mut() = Some(text));
        }));
    });
}

/// Runs `f`; a panic becomes its text.
#[inline]
pub(crate) fn catch<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(text_of)
}

#[cold]
fn text_of(payload: Box<dyn std::any::Any + Send>) -> String {
    // Dropping the payload could panic again, outside of any guard.
    std::mem::forget(payload);
    LAST_PANIC.take().unwrap_or_else(|| "panicked".to_owned())
}

/// Runs `f` unless the object is dead; a panic kills the object, reports the fault and gives `neutral`.
#[inline]
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
