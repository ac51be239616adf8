//! A token bucket in one atomic number.

use std::sync::atomic::{AtomicU64, Ordering};

const SECOND: u128 = 1_000_000_000;

/// Tokens that come at a rate and pile up to a burst. Queues take from it without a lock; each gets a time at which its tokens will
/// have come, so that nobody has to ask twice and those who ask first go first.
#[derive(Debug)]
pub struct Bucket {
    /// The moment, in nanoseconds, at which the tokens that were taken have come or will have come.
    taken: AtomicU64,
    /// Tokens per second.
    rate: u64,
    /// Nanoseconds in which a burst comes together.
    burst: u64,
}

impl Bucket {
    /// A full one, of `rate` tokens per second (1 or more) and at most `burst` at once.
    pub fn new(rate: u64, burst: u64) -> Self {
        let mut bucket = Self {
            taken: AtomicU64::new(0),
            rate: rate.max(1),
            burst: 0,
        };
        bucket.burst = bucket.time(burst);
        bucket
    }

    /// How long `tokens` take to come.
    fn time(&self, tokens: u64) -> u64 {
        let time = u128::from(tokens) * SECOND / u128::from(self.rate);
        // Decades; what adds to it saturates.
        u64::try_from(time).unwrap_or(u64::MAX / 4)
    }

    /// Takes `tokens` at the time `now`; returns the time from which on they may be used. Times never go backwards. More tokens than a
    /// burst take as long as they take.
    pub fn take(&self, tokens: u64, now: u64) -> u64 {
        let time = self.time(tokens);
        let oldest = now.saturating_sub(self.burst);
        let next = |taken: u64| taken.max(oldest).saturating_add(time);
        let old = self
            .taken
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| {
                Some(next(taken))
            });
        next(old.unwrap_or_else(|taken| taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_burst_goes_at_once_and_then_the_rate_holds() {
        let (bucket, now) = (Bucket::new(1000, 10), 5000 * MS);
        for _ in 0..10 {
            assert!(bucket.take(1, now) <= now);
        }
        assert_eq!(bucket.take(1, now), now + MS);
        assert_eq!(bucket.take(5, now), now + 6 * MS);
        // Idle time fills it again, but not beyond the burst.
        let later = now + 1000 * MS;
        assert!(bucket.take(10, later) <= later);
        assert_eq!(bucket.take(1, later), later + MS);
    }

    #[test]
    fn more_than_a_burst_takes_its_time() {
        let (bucket, now) = (Bucket::new(1 << 20, 4096), 5000 * MS);
        let start = bucket.take(1 << 20, now);
        assert_eq!(start, now - bucket.time(4096) + 1000 * MS);
        assert!(bucket.take(0, now) >= start, "those who ask later go later");
    }

    #[test]
    fn extremes_overflow_nothing() {
        for (rate, burst) in [(1, u64::MAX), (u64::MAX, 1), (0, 0), (u64::MAX, u64::MAX)] {
            let bucket = Bucket::new(rate, burst);
            for now in [0, MS, u64::MAX] {
                for tokens in [0, 1, u64::MAX] {
                    bucket.take(tokens, now);
                }
            }
        }
    }

    #[test]
    fn threads_together_get_the_rate() {
        let (bucket, now) = (Bucket::new(1000, 1), 5000 * MS);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        bucket.take(1, now);
                    }
                });
            }
        });
        assert_eq!(bucket.take(1, now), now + 4000 * MS, "the first was there");
    }
}
