//! What the host's CPU can execute for a guest.

use iced_x86::CpuidFeature;

/// A set of instruction-set extensions that thunks may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFeatures(u32);

impl HostFeatures {
    /// The empty set.
    pub const NONE: HostFeatures = HostFeatures(0);
    /// x87 with FCMOV and FCOMI, MMX, FXSAVE, SSE and SSE2: every x86-64 CPU.
    pub const BASE: HostFeatures = HostFeatures(1);
    /// SSE3 (with FISTTP).
    pub const SSE3: HostFeatures = HostFeatures(1 << 1);
    /// SSSE3.
    pub const SSSE3: HostFeatures = HostFeatures(1 << 2);
    /// SSE4.1.
    pub const SSE4_1: HostFeatures = HostFeatures(1 << 3);
    /// SSE4.2.
    pub const SSE4_2: HostFeatures = HostFeatures(1 << 4);
    /// AES.
    pub const AES: HostFeatures = HostFeatures(1 << 5);
    /// PCLMULQDQ.
    pub const PCLMULQDQ: HostFeatures = HostFeatures(1 << 6);
    /// SHA-1 and SHA-256.
    pub const SHA: HostFeatures = HostFeatures(1 << 7);
    /// AVX.
    pub const AVX: HostFeatures = HostFeatures(1 << 8);
    /// AVX2.
    pub const AVX2: HostFeatures = HostFeatures(1 << 9);
    /// FMA3.
    pub const FMA: HostFeatures = HostFeatures(1 << 10);
    /// F16C.
    pub const F16C: HostFeatures = HostFeatures(1 << 11);
    /// VAES on YMM registers.
    pub const VAES: HostFeatures = HostFeatures(1 << 12);
    /// VPCLMULQDQ on YMM registers.
    pub const VPCLMULQDQ: HostFeatures = HostFeatures(1 << 13);
    /// GFNI.
    pub const GFNI: HostFeatures = HostFeatures(1 << 14);
    /// XSAVE and XRSTOR: done portably, so every host has it.
    pub const XSAVE: HostFeatures = HostFeatures(1 << 15);
    /// XSAVEOPT: done portably.
    pub const XSAVEOPT: HostFeatures = HostFeatures(1 << 16);
    /// XSAVEC and the compacted XRSTOR: done portably.
    pub const XSAVEC: HostFeatures = HostFeatures(1 << 17);
    /// What needs no host CPU at all.
    pub const PORTABLE: HostFeatures =
        HostFeatures(HostFeatures::XSAVE.0 | HostFeatures::XSAVEOPT.0 | HostFeatures::XSAVEC.0);
    /// Everything this unit knows.
    pub const ALL: HostFeatures = HostFeatures((1 << 18) - 1);

    /// What the CPU under us has (and its operating system enabled).
    #[cfg(all(target_arch = "x86_64", not(feature = "portable")))]
    pub fn of_host() -> HostFeatures {
        let mut set = HostFeatures::BASE.union(HostFeatures::PORTABLE);
        let mut add = |present: bool, feature: HostFeatures| {
            if present {
                set = set.union(feature);
            }
        };
        add(is_x86_feature_detected!("sse3"), HostFeatures::SSE3);
        add(is_x86_feature_detected!("ssse3"), HostFeatures::SSSE3);
        add(is_x86_feature_detected!("sse4.1"), HostFeatures::SSE4_1);
        add(is_x86_feature_detected!("sse4.2"), HostFeatures::SSE4_2);
        add(is_x86_feature_detected!("aes"), HostFeatures::AES);
        add(is_x86_feature_detected!("pclmulqdq"), HostFeatures::PCLMULQDQ);
        add(is_x86_feature_detected!("sha"), HostFeatures::SHA);
        add(is_x86_feature_detected!("gfni"), HostFeatures::GFNI);
        if is_x86_feature_detected!("avx") {
            add(true, HostFeatures::AVX);
            add(is_x86_feature_detected!("avx2"), HostFeatures::AVX2);
            add(is_x86_feature_detected!("fma"), HostFeatures::FMA);
            add(is_x86_feature_detected!("f16c"), HostFeatures::F16C);
            add(is_x86_feature_detected!("vaes"), HostFeatures::VAES);
            add(is_x86_feature_detected!("vpclmulqdq"), HostFeatures::VPCLMULQDQ);
        }
        set
    }

    /// Only what is portable: this build generates no code.
    #[cfg(not(all(target_arch = "x86_64", not(feature = "portable"))))]
    pub fn of_host() -> HostFeatures {
        HostFeatures::PORTABLE
    }

    /// Both sets together.
    pub const fn union(self, other: HostFeatures) -> HostFeatures {
        HostFeatures(self.0 | other.0)
    }

    /// What both sets have.
    pub const fn intersection(self, other: HostFeatures) -> HostFeatures {
        HostFeatures(self.0 & other.0)
    }

    /// The set without `other`.
    pub const fn without(self, other: HostFeatures) -> HostFeatures {
        HostFeatures(self.0 & !other.0)
    }

    /// Whether all of `other` is in the set.
    pub const fn contains(self, other: HostFeatures) -> bool {
        self.0 & other.0 == other.0
    }

    /// The feature that stands for iced's `feature`; `None` if this unit knows none.
    pub fn of(feature: CpuidFeature) -> Option<HostFeatures> {
        Some(match feature {
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => HostFeatures::BASE,
            CpuidFeature::CMOV | CpuidFeature::MMX | CpuidFeature::SSE => HostFeatures::BASE,
            CpuidFeature::SSE2 | CpuidFeature::FXSR => HostFeatures::BASE,
            CpuidFeature::SSE3 => HostFeatures::SSE3,
            CpuidFeature::SSSE3 => HostFeatures::SSSE3,
            CpuidFeature::SSE4_1 => HostFeatures::SSE4_1,
            CpuidFeature::SSE4_2 => HostFeatures::SSE4_2,
            CpuidFeature::AES => HostFeatures::AES,
            CpuidFeature::PCLMULQDQ => HostFeatures::PCLMULQDQ,
            CpuidFeature::SHA => HostFeatures::SHA,
            CpuidFeature::AVX => HostFeatures::AVX,
            CpuidFeature::AVX2 => HostFeatures::AVX2,
            CpuidFeature::FMA => HostFeatures::FMA,
            CpuidFeature::F16C => HostFeatures::F16C,
            CpuidFeature::VAES => HostFeatures::VAES,
            CpuidFeature::VPCLMULQDQ => HostFeatures::VPCLMULQDQ,
            CpuidFeature::GFNI => HostFeatures::GFNI,
            CpuidFeature::XSAVE => HostFeatures::XSAVE,
            CpuidFeature::XSAVEOPT => HostFeatures::XSAVEOPT,
            CpuidFeature::XSAVEC => HostFeatures::XSAVEC,
            _ => return None,
        })
    }
}
