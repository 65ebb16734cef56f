//! The source of RDRAND and RDSEED.

use crate::state::Clock;

/// Random numbers: the host's while time is the host's. Otherwise they are a function of the seed and of how many
/// instructions the vCPU has retired, so that runs in virtual time repeat, and a saved vCPU goes on alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Random {
    seed: u64,
}

impl Random {
    /// Those that `seed` decides.
    pub fn new(seed: u64) -> Self {
        Random { seed }
    }

    /// 64 bits for the instruction before which `retired` have been.
    pub fn get(&self, clock: &Clock, retired: u64) -> u64 {
        if matches!(clock, Clock::Host { .. }) {
            let mut bytes = [0u8; 8];
            // SAFETY: `bytes` is writable for the length given.
            let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            if n == bytes.len() as isize {
                return u64::from_le_bytes(bytes);
            }
        }
        // The sequence splitmix64, and `retired` the place in it.
        let mut z = self.seed.wrapping_add(retired.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
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
            let r = Random::new(seed);
            [r.get(&clock, 0), r.get(&clock, 1), r.get(&clock, 2)]
        };
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
        // Reference values of splitmix64 from seed 0.
        assert_eq!(take(0)[..2], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    #[test]
    fn host_numbers_differ() {
        let clock = Clock::Host { offset: 0 };
        let (a, b) = (Random::new(1), Random::new(1));
        assert_ne!(a.get(&clock, 0), b.get(&clock, 0));
    }
}
