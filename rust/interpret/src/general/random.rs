//! The source of RDRAND and RDSEED.

use crate::state::Clock;

/// Random numbers: the host's while time is the host's, otherwise a sequence
/// that the seed decides, so that runs in virtual time repeat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Random {
    /// State of the seeded sequence (splitmix64).
    pub state: u64,
}

impl Random {
    /// A sequence that starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Random { state: seed }
    }

    /// The next 64 bits.
    pub fn next(&mut self, clock: &Clock) -> u64 {
        if matches!(clock, Clock::Host { .. }) {
            let mut bytes = [0u8; 8];
            // SAFETY: `bytes` is writable for the length given.
            let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            if n == bytes.len() as isize {
                return u64::from_le_bytes(bytes);
            }
        }
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeded_sequences_repeat() {
        let clock = Clock::Virtual { base: 0, num: 1, den: 1 };
        let take = |seed| {
            let mut r = Random::new(seed);
            [r.next(&clock), r.next(&clock), r.next(&clock)]
        };
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
        // Reference values of splitmix64 from seed 0.
        assert_eq!(take(0)[..2], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    #[test]
    fn host_numbers_differ() {
        let clock = Clock::Host { offset: 0 };
        let (mut a, mut b) = (Random::new(1), Random::new(1));
        assert_ne!(a.next(&clock), b.next(&clock));
    }
}
