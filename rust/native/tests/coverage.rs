//! Every instruction that iced knows for these extensions has a plan, or is
//! named here as one that has none.

#![cfg(all(target_arch = "x86_64", unix, not(feature = "portable")))]

mod common;

use common::{instruction, operand_size, Operands};
use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpAccess};
use nonroot_native::{classify, Class, HostFeatures, NativeUnit, Plan, Unsupported};

const FEATURES: [CpuidFeature; 24] = [
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MMX,
    CpuidFeature::FXSR,
    CpuidFeature::CMOV,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::AES,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::SHA,
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::FMA,
    CpuidFeature::F16C,
    CpuidFeature::VAES,
    CpuidFeature::VPCLMULQDQ,
    CpuidFeature::XSAVE,
    CpuidFeature::XSAVEOPT,
    CpuidFeature::XSAVEC,
];

/// Not the unit's: no vector or x87 register is involved, or it is a system instruction.
fn for_the_interpreter(code: Code) -> bool {
    use Mnemonic::*;
    code.cpuid_features() == [CpuidFeature::CMOV]
        || matches!(
            code.mnemonic(),
            Movnti
                | Prefetchnta
                | Prefetcht0
                | Prefetcht1
                | Prefetcht2
                | Sfence
                | Lfence
                | Mfence
                | Pause
                | Clflush
                | Crc32
                | Xgetbv
                | Xsetbv
        )
}

/// Codes that only assemblers know: WAIT and another instruction in one.
fn compound(code: Code) -> bool {
    code.op_code().fwait()
}

fn all_codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|code| {
        let info = code.op_code();
        let features = code.cpuid_features();
        info.is_instruction()
            && matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
            && !features.is_empty()
            && features.iter().all(|feature| FEATURES.contains(feature))
    })
}

fn variants() -> Vec<Operands> {
    let mut all = Vec::new();
    for memory in [false, true] {
        for registers in [[1, 2, 3, 4, 5], [9, 14, 8, 15, 12], [3, 9, 2, 1, 0]] {
            all.push(Operands { registers, memory, immediate: 0 });
            all.push(Operands { registers, memory, immediate: 0x1b });
        }
    }
    all
}

#[test]
fn every_code_has_a_plan() {
    let mut unit = NativeUnit::new();
    let mut codes = 0;
    let mut plans = 0;
    for code in all_codes() {
        let mut forms = 0;
        for (bitness, operands) in
            [64, 32].into_iter().flat_map(|b| variants().into_iter().map(move |o| (b, o)))
        {
            let Some(instruction) = instruction_or_none(code, operands, bitness) else { continue };
            forms += 1;
            if for_the_interpreter(code) {
                assert_eq!(classify(&instruction), None, "{code:?}");
                continue;
            }
            let class = classify(&instruction).unwrap_or_else(|| panic!("{code:?} has no class"));
            let host_has = code
                .cpuid_features()
                .iter()
                .all(|&f| HostFeatures::of_host().contains(HostFeatures::of(f).expect("a known feature")));
            match unit.compile(&instruction) {
                Ok(compiled) => {
                    plans += 1;
                    assert_eq!(compiled.class, class);
                    check_memory(&instruction, &compiled);
                }
                Err(Unsupported::Feature) => assert!(!host_has, "{code:?} is on the host"),
                // Gathers with equal registers are #UD; the variants avoid them.
                Err(why) => panic!("{instruction} ({code:?}): {why}"),
            }
        }
        if compound(code) || !code.op_code().mode64() {
            continue;
        }
        assert!(forms > 0 || for_the_interpreter(code), "{code:?} was never encoded");
        codes += 1;
    }
    assert!(codes > 1000, "only {codes} codes");
    assert!(plans > 5 * codes, "only {plans} plans");
}

fn instruction_or_none(code: Code, operands: Operands, bitness: u32) -> Option<iced_x86::Instruction> {
    if compound(code) || for_the_interpreter(code) && code.cpuid_features() == [CpuidFeature::CMOV] {
        return None;
    }
    if for_the_interpreter(code) {
        // Operand kinds of integer instructions are not for the maker; the code alone decides.
        let mut made = iced_x86::Instruction::new();
        made.set_code(code);
        return Some(made);
    }
    let mode = if bitness == 64 { code.op_code().mode64() } else { code.op_code().mode32() };
    if !mode {
        return None;
    }
    instruction(code, operands, bitness)
}

/// The operand has the size and direction that the instruction's definition gives.
fn check_memory(instruction: &iced_x86::Instruction, compiled: &nonroot_native::Compiled) {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let used: Vec<OpAccess> = info.used_memory().iter().map(|m| m.access()).collect();
    let reads =
        used.iter().any(|a| !matches!(a, OpAccess::Write | OpAccess::CondWrite | OpAccess::NoMemAccess));
    let writes =
        used.iter().any(|a| !matches!(a, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess));
    let Some(memory) = compiled.memory else {
        assert!(!reads && !writes, "{instruction}: memory without access");
        return;
    };
    assert!(reads || writes, "{instruction}: an access without memory");
    if !matches!(compiled.plan, Plan::State(_)) {
        assert_eq!((memory.read, memory.write), (reads, writes), "{instruction}");
    }
    if !matches!(compiled.plan, Plan::State(_) | Plan::Masked(_) | Plan::Gather(_)) {
        assert_eq!(memory.size as usize, operand_size(instruction), "{instruction}");
    }
    if compiled.class == Class::Avx {
        let aligned = format!("{:?}", instruction.mnemonic());
        let expected = ["Vmovaps", "Vmovapd", "Vmovdqa", "Vmovntps", "Vmovntpd", "Vmovntdq", "Vmovntdqa"];
        let align = if expected.contains(&aligned.as_str()) { memory.size as u8 } else { 1 };
        assert_eq!(memory.align, align, "{instruction}");
    }
}

#[test]
fn instructions_of_other_cpus_have_no_class() {
    for code in Code::values() {
        let features = code.cpuid_features();
        let foreign = [
            CpuidFeature::SSE4A,
            CpuidFeature::D3NOW,
            CpuidFeature::FMA4,
            CpuidFeature::XOP,
            CpuidFeature::AVX512F,
            CpuidFeature::CYRIX_FPU,
        ];
        if features.iter().any(|feature| foreign.contains(feature)) {
            let mut made = iced_x86::Instruction::new();
            made.set_code(code);
            assert_eq!(classify(&made), None, "{code:?}");
        }
    }
}

#[test]
fn a_feature_that_the_guest_lacks_is_refused() {
    let operands = Operands { registers: [1, 2, 3, 4, 5], memory: false, immediate: 0 };
    let aes = instruction(Code::Aesenc_xmm_xmmm128, operands, 64).expect("encodable");
    let mut unit = NativeUnit::with_features(HostFeatures::ALL.without(HostFeatures::AES));
    assert_eq!(unit.compile(&aes), Err(Unsupported::Feature));
    assert!(NativeUnit::new().compile(&aes).is_ok());
}
