//! The local APIC's timer. It counts lazily: every value is computed from the
//! time at which it was started, so that nothing drifts and nothing ticks.

const NS: u128 = 1_000_000_000;

/// Timer modes, LVT timer bits 18:17.
pub(crate) const PERIODIC: u32 = 1;
pub(crate) const TSC_DEADLINE: u32 = 2;

#[derive(Clone, Debug)]
pub(crate) struct Timer {
    tsc_khz: u64,
    bus_hz: u64,
    tsc_offset: i64,
    pub(crate) mode: u32,
    pub(crate) divide: u32,
    pub(crate) initial: u32,
    /// Whether the counter counts down (one-shot and periodic).
    pub(crate) running: bool,
    /// When counting started, in ns.
    pub(crate) start_ns: u64,
    /// Ticks from the start to the first expiry; later ones are `initial` apart.
    pub(crate) first: u32,
    /// Expiries since the start that have been seen.
    pub(crate) expired: u64,
    /// IA32_TSC_DEADLINE; 0 if disarmed.
    pub(crate) tsc_deadline: u64,
    /// Next expiry in ns.
    next: Option<u64>,
}

impl Timer {
    pub fn new(tsc_khz: u64, bus_hz: u64) -> Self {
        Timer {
            tsc_khz: tsc_khz.max(1),
            bus_hz: bus_hz.max(1),
            tsc_offset: 0,
            mode: 0,
            divide: 0,
            initial: 0,
            running: false,
            start_ns: 0,
            first: 0,
            expired: 0,
            tsc_deadline: 0,
            next: None,
        }
    }

    pub fn reset(&mut self) {
        *self = Timer { tsc_offset: self.tsc_offset, ..Timer::new(self.tsc_khz, self.bus_hz) };
    }

    pub fn initial(&self) -> u32 {
        self.initial
    }

    pub fn divide_register(&self) -> u32 {
        self.divide
    }

    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    pub fn deadline(&self) -> Option<u64> {
        self.next
    }

    fn divisor(&self) -> u32 {
        // Bits 3, 1, 0: 000 is 2, 110 is 128, 111 is 1.
        let code = (self.divide & 3) | (self.divide >> 1 & 4);
        1 << ((code + 1) & 7)
    }

    fn elapsed(&self, now_ns: u64) -> u128 {
        let ns = now_ns.saturating_sub(self.start_ns) as u128;
        ns * self.bus_hz as u128 / (NS * self.divisor() as u128)
    }

    /// Expiries within `ticks` of the start.
    fn expiries(&self, ticks: u128) -> u64 {
        if ticks < self.first as u128 {
            return 0;
        }
        (1 + (ticks - self.first as u128) / self.initial.max(1) as u128).min(u64::MAX as u128) as u64
    }

    /// The current-count register.
    pub fn current(&self, now_ns: u64) -> u32 {
        if !self.running {
            return 0;
        }
        let ticks = self.elapsed(now_ns);
        if ticks < self.first as u128 {
            return self.first - ticks as u32;
        }
        let initial = self.initial.max(1);
        initial - ((ticks - self.first as u128) % initial as u128) as u32
    }

    pub fn set_initial(&mut self, value: u32, now_ns: u64) {
        if self.mode == TSC_DEADLINE {
            return;
        }
        self.initial = value;
        self.first = value;
        self.start_ns = now_ns;
        self.expired = 0;
        self.running = value != 0;
        self.schedule();
    }

    pub fn set_divide(&mut self, value: u32, now_ns: u64) {
        // Go on from the current count at the new rate.
        let current = self.current(now_ns);
        self.divide = value;
        if self.running {
            self.first = current;
            self.start_ns = now_ns;
            self.expired = 0;
        }
        self.schedule();
    }

    pub fn set_mode(&mut self, mode: u32) {
        if mode == self.mode {
            return;
        }
        if mode == TSC_DEADLINE || self.mode == TSC_DEADLINE {
            self.running = false;
            self.initial = 0;
            self.first = 0;
            self.tsc_deadline = 0;
        }
        self.mode = mode;
        self.schedule();
    }

    pub fn set_tsc_deadline(&mut self, value: u64) {
        if self.mode == TSC_DEADLINE {
            self.tsc_deadline = value;
            self.schedule();
        }
    }

    pub fn set_tsc_offset(&mut self, offset: i64) {
        self.tsc_offset = offset;
        self.schedule();
    }

    /// Lets time pass; whether the timer expired since the last call.
    pub fn advance(&mut self, now_ns: u64) -> bool {
        match self.next {
            Some(next) if next <= now_ns => {}
            _ => return false,
        }
        if self.mode == TSC_DEADLINE {
            self.tsc_deadline = 0;
        } else if self.mode == PERIODIC {
            self.expired = self.expiries(self.elapsed(now_ns));
        } else {
            self.running = false;
        }
        self.schedule();
        true
    }

    /// Computes `next`.
    pub(crate) fn schedule(&mut self) {
        self.next = if self.mode == TSC_DEADLINE {
            let ticks = self.tsc_deadline as i128 - self.tsc_offset as i128;
            (self.tsc_deadline != 0).then(|| {
                let ns = (ticks.max(0) as u128 * 1_000_000).div_ceil(self.tsc_khz as u128);
                ns.min(u64::MAX as u128) as u64
            })
        } else if self.running {
            let ticks = (self.expired as u128).saturating_mul(self.initial as u128) + self.first as u128;
            let scaled = ticks.saturating_mul(self.divisor() as u128 * NS);
            let ns = scaled.div_ceil(self.bus_hz as u128) + self.start_ns as u128;
            Some(ns.min(u64::MAX as u128) as u64)
        } else {
            None
        };
    }
}
