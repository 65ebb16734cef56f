//! Which instructions belong to this unit, and what must be allowed before they run.

use crate::features::HostFeatures;
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind, OpKind};

/// Kind of an instruction: decides the checks of control registers and of
/// pending x87 exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// x87, waiting or not (the plan knows which wait).
    X87,
    /// WAIT.
    Wait,
    /// MMX registers only (with SSE's and SSE2's additions to MMX), EMMS.
    Mmx,
    /// XMM registers in legacy encoding; LDMXCSR and STMXCSR.
    Sse,
    /// Both XMM and MMX registers.
    SseMmx,
    /// VEX-coded instructions on vector registers; VLDMXCSR and VSTMXCSR.
    Avx,
    /// FXSAVE and FXRSTOR.
    Fxsr,
    /// XSAVE, XSAVEOPT, XSAVEC, XRSTOR.
    Xsave,
}

/// An exception of an instruction of this unit, other than those of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trap {
    /// #UD.
    InvalidOpcode,
    /// #NM.
    DeviceNotAvailable,
    /// #GP(0).
    GeneralProtection,
    /// #MF: an earlier x87 instruction left an unmasked exception.
    MathFault,
    /// #XM. See [`simd_fault`] for CR4.OSXMMEXCPT.
    SimdFault,
}

impl Trap {
    /// Exception vector.
    pub fn vector(self) -> u8 {
        match self {
            Trap::InvalidOpcode => 6,
            Trap::DeviceNotAvailable => 7,
            Trap::GeneralProtection => 13,
            Trap::MathFault => 16,
            Trap::SimdFault => 19,
        }
    }
}

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;

/// Whether the control registers let an instruction of `class` start
/// (SDM 2A 2.4, SDM 3A 2.5 and 14.1). AVX in virtual-8086 mode is #UD as well;
/// the caller knows that mode.
pub fn precheck(class: Class, cr0: u64, cr4: u64, xcr0: u64) -> Result<(), Trap> {
    let invalid = match class {
        Class::X87 => {
            return if cr0 & (CR0_EM | CR0_TS) != 0 { Err(Trap::DeviceNotAvailable) } else { Ok(()) };
        }
        Class::Wait => {
            let both = CR0_MP | CR0_TS;
            return if cr0 & both == both { Err(Trap::DeviceNotAvailable) } else { Ok(()) };
        }
        Class::Fxsr => {
            return if cr0 & (CR0_EM | CR0_TS) != 0 { Err(Trap::DeviceNotAvailable) } else { Ok(()) };
        }
        Class::Mmx => cr0 & CR0_EM != 0,
        Class::Sse | Class::SseMmx => cr0 & CR0_EM != 0 || cr4 & CR4_OSFXSR == 0,
        Class::Avx => cr0 & CR0_PE == 0 || cr4 & CR4_OSXSAVE == 0 || xcr0 & 6 != 6,
        Class::Xsave => cr4 & CR4_OSXSAVE == 0,
    };
    if invalid {
        Err(Trap::InvalidOpcode)
    } else if cr0 & CR0_TS != 0 {
        Err(Trap::DeviceNotAvailable)
    } else {
        Ok(())
    }
}

/// What an unmasked SIMD floating-point exception raises: #XM, or #UD without CR4.OSXMMEXCPT.
pub fn simd_fault(cr4: u64) -> Trap {
    if cr4 & CR4_OSXMMEXCPT != 0 {
        Trap::SimdFault
    } else {
        Trap::InvalidOpcode
    }
}

/// Which class `instruction` belongs to; `None` if it is not for this unit.
///
/// Not for this unit although they come with SSE or AVX, since they touch no
/// vector register: MOVNTI, PREFETCHh, fences, PAUSE, CLFLUSH, CRC32, POPCNT,
/// MONITOR/MWAIT, BMI; and XSAVES, XRSTORS, XGETBV, XSETBV, which are system
/// instructions. AMD's SSE4a, 3DNow!, XOP, FMA4 and everything of AVX-512 is
/// unknown to it (no supported guest CPU has them).
pub fn classify(instruction: &Instruction) -> Option<Class> {
    // From memory, CVTPI2PD touches no MMX register (SDM 2A, CVTPI2PD).
    if instruction.code() == Code::Cvtpi2pd_xmm_mmm64 && instruction.op1_kind() == OpKind::Memory {
        return Some(Class::Sse);
    }
    classify_code(instruction.code())
}

/// As [`classify`]; the operands do not matter.
pub(crate) fn classify_code(code: Code) -> Option<Class> {
    match code.mnemonic() {
        Mnemonic::Wait => return Some(Class::Wait),
        Mnemonic::Emms => return Some(Class::Mmx),
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => return Some(Class::Sse),
        Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr | Mnemonic::Vzeroall | Mnemonic::Vzeroupper => {
            return Some(Class::Avx);
        }
        Mnemonic::Fxsave | Mnemonic::Fxrstor | Mnemonic::Fxsave64 | Mnemonic::Fxrstor64 => {
            return Some(Class::Fxsr);
        }
        Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => {
            return Some(Class::Xsave);
        }
        Mnemonic::Xsavec | Mnemonic::Xsavec64 | Mnemonic::Xrstor | Mnemonic::Xrstor64 => {
            return Some(Class::Xsave);
        }
        // Coprocessor instructions of other makers, which only some decoders give.
        Mnemonic::Ftstp | Mnemonic::Frint2 | Mnemonic::Frichop | Mnemonic::Frinear => return None,
        Mnemonic::Frstpm | Mnemonic::Fstdw | Mnemonic::Fstsg => return None,
        _ => {}
    }
    // Two instructions in one, for assemblers (FINIT, FSTSW...); decoders give WAIT and the other.
    if matches!(
        code,
        Code::Finit
            | Code::Fclex
            | Code::Feni
            | Code::Fdisi
            | Code::Fsetpm
            | Code::Fstcw_m2byte
            | Code::Fstsw_m2byte
            | Code::Fstsw_AX
            | Code::Fstenv_m14byte
            | Code::Fstenv_m28byte
            | Code::Fsave_m94byte
            | Code::Fsave_m108byte
    ) {
        return None;
    }
    let features = code.cpuid_features();
    if features.is_empty() || features.iter().any(|&f| HostFeatures::of(f).is_none()) {
        return None;
    }
    let kinds = code.op_code().op_kinds();
    match code.encoding() {
        EncodingKind::VEX if kinds.iter().any(|&kind| is_vector(kind)) => Some(Class::Avx),
        EncodingKind::Legacy => {
            if features
                .iter()
                .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
            {
                return Some(Class::X87);
            }
            let mmx = kinds.iter().any(|&kind| is_mmx(kind));
            let sse = kinds.iter().any(|&kind| is_vector(kind));
            match (mmx, sse) {
                (true, false) => Some(Class::Mmx),
                (false, true) => Some(Class::Sse),
                (true, true) => Some(Class::SseMmx),
                (false, false) => None,
            }
        }
        _ => None,
    }
}

fn is_mmx(kind: OpCodeOperandKind) -> bool {
    matches!(kind, OpCodeOperandKind::mm_or_mem | OpCodeOperandKind::mm_reg | OpCodeOperandKind::mm_rm)
}

fn is_vector(kind: OpCodeOperandKind) -> bool {
    matches!(
        kind,
        OpCodeOperandKind::xmm_or_mem
            | OpCodeOperandKind::xmm_reg
            | OpCodeOperandKind::xmm_rm
            | OpCodeOperandKind::xmm_vvvv
            | OpCodeOperandKind::xmm_is4
            | OpCodeOperandKind::ymm_or_mem
            | OpCodeOperandKind::ymm_reg
            | OpCodeOperandKind::ymm_rm
            | OpCodeOperandKind::ymm_vvvv
            | OpCodeOperandKind::ymm_is4
    )
}

/// Whether the instruction depends on MXCSR or changes it: all SIMD
/// floating-point arithmetic, comparison and conversion.
pub fn uses_mxcsr(code: Code) -> bool {
    use Mnemonic::*;
    if code.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::FMA | CpuidFeature::F16C)) {
        return true;
    }
    // CMPSD is also the mnemonic of a string instruction, which never comes here.
    matches!(
        code.mnemonic(),
        Addpd
            | Addps
            | Addsd
            | Addss
            | Addsubpd
            | Addsubps
            | Cmppd
            | Cmpps
            | Cmpsd
            | Cmpss
            | Comisd
            | Comiss
            | Cvtdq2pd
            | Cvtdq2ps
            | Cvtpd2dq
            | Cvtpd2pi
            | Cvtpd2ps
            | Cvtpi2pd
            | Cvtpi2ps
            | Cvtps2dq
            | Cvtps2pd
            | Cvtps2pi
            | Cvtsd2si
            | Cvtsd2ss
            | Cvtsi2sd
            | Cvtsi2ss
            | Cvtss2sd
            | Cvtss2si
            | Cvttpd2dq
            | Cvttpd2pi
            | Cvttps2dq
            | Cvttps2pi
            | Cvttsd2si
            | Cvttss2si
            | Divpd
            | Divps
            | Divsd
            | Divss
            | Dppd
            | Dpps
            | Haddpd
            | Haddps
            | Hsubpd
            | Hsubps
            | Maxpd
            | Maxps
            | Maxsd
            | Maxss
            | Minpd
            | Minps
            | Minsd
            | Minss
            | Mulpd
            | Mulps
            | Mulsd
            | Mulss
            | Rcpps
            | Rcpss
            | Roundpd
            | Roundps
            | Roundsd
            | Roundss
            | Rsqrtps
            | Rsqrtss
            | Sqrtpd
            | Sqrtps
            | Sqrtsd
            | Sqrtss
            | Subpd
            | Subps
            | Subsd
            | Subss
            | Ucomisd
            | Ucomiss
            | Vaddpd
            | Vaddps
            | Vaddsd
            | Vaddss
            | Vaddsubpd
            | Vaddsubps
            | Vcmppd
            | Vcmpps
            | Vcmpsd
            | Vcmpss
            | Vcomisd
            | Vcomiss
            | Vcvtdq2pd
            | Vcvtdq2ps
            | Vcvtpd2dq
            | Vcvtpd2ps
            | Vcvtps2dq
            | Vcvtps2pd
            | Vcvtsd2si
            | Vcvtsd2ss
            | Vcvtsi2sd
            | Vcvtsi2ss
            | Vcvtss2sd
            | Vcvtss2si
            | Vcvttpd2dq
            | Vcvttps2dq
            | Vcvttsd2si
            | Vcvttss2si
            | Vdivpd
            | Vdivps
            | Vdivsd
            | Vdivss
            | Vdppd
            | Vdpps
            | Vhaddpd
            | Vhaddps
            | Vhsubpd
            | Vhsubps
            | Vmaxpd
            | Vmaxps
            | Vmaxsd
            | Vmaxss
            | Vminpd
            | Vminps
            | Vminsd
            | Vminss
            | Vmulpd
            | Vmulps
            | Vmulsd
            | Vmulss
            | Vrcpps
            | Vrcpss
            | Vroundpd
            | Vroundps
            | Vroundsd
            | Vroundss
            | Vrsqrtps
            | Vrsqrtss
            | Vsqrtpd
            | Vsqrtps
            | Vsqrtsd
            | Vsqrtss
            | Vsubpd
            | Vsubps
            | Vsubsd
            | Vsubss
            | Vucomisd
            | Vucomiss
    )
}
