//! Panics stop here: the dead flag, `catch_unwind`, and the text of what happened.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::Host;

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static CATCHING: Cell<u32> = const { Cell::new(0) };
}

/// Keeps the message and place of each panic that a guard will catch, for the fault report, instead of printing
/// it to stderr. Each plugin has its own copy of std, so this hook is the plugin's alone.
pub(crate) fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // Without unwinding nothing is caught: these are the process's last words.
            if cfg!(panic = "abort") || CATCHING.try_with(Cell::get).unwrap_or(0) == 0 {
                return previous(info);
            }
            let text = info
                .payload_as_str()
                .unwrap_or("a panic that carries no text");
            let place = info.location().map(|l| format!("panicked at {l}: "));
            let _ = LAST_PANIC.try_with(|last| {
                *last.borrow_mut() = Some(format!("{}{text}", place.unwrap_or_default()));
            });
        }));
    });
}

/// Runs `f`; a panic becomes its text.
#[inline]
pub(crate) fn catch<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    // One look-up: in a shared object each costs a call, as much as the rest of the guard.
    let result = CATCHING.with(|depth| {
        depth.set(depth.get() + 1);
        let result = catch_unwind(AssertUnwindSafe(f));
        depth.set(depth.get() - 1);
        result
    });
    result.map_err(text_of)
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
