//! Which resets are logged: a guest may do nothing else, a thousand times a second.

use std::time::{Duration, Instant};

/// So many lines in so long a time.
const LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// What has been logged of a VM's resets.
#[derive(Default)]
pub(super) struct ResetLog {
    /// When the present window began, and the lines in it.
    window: Option<Instant>,
    lines: u32,
    unsaid: u64,
}

impl ResetLog {
    /// The line for a reset at `now`, if there is to be one.
    pub fn line(&mut self, why: &str, now: Instant) -> Option<String> {
        let over = |began| now.saturating_duration_since(began) >= WINDOW;
        if self.window.is_none_or(over) {
            (self.window, self.lines) = (Some(now), 0);
        }
        if self.lines == LINES {
            self.unsaid += 1;
            return None;
        }
        self.lines += 1;
        let unsaid = std::mem::take(&mut self.unsaid);
        Some(match (unsaid, self.lines) {
            (0, LINES) => format!("{why}; the next ones may be counted only"),
            (0, _) => why.to_owned(),
            (count, _) => format!("{why}, after {count} resets that were not logged"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rush_of_resets_is_counted_instead() {
        let mut log = ResetLog::default();
        let start = Instant::now();
        for _ in 1..LINES {
            assert_eq!(log.line("reset", start).as_deref(), Some("reset"));
        }
        let last = log.line("reset", start).unwrap();
        assert_eq!(last, "reset; the next ones may be counted only");
        for _ in 0..1000 {
            assert_eq!(log.line("reset", start + WINDOW / 2), None);
        }
        let next = log.line("reset", start + WINDOW).unwrap();
        assert_eq!(next, "reset, after 1000 resets that were not logged");
        assert_eq!(log.line("reset", start + WINDOW).as_deref(), Some("reset"));
    }
}
