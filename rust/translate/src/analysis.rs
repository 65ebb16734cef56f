//! What each guest instruction is to the translator, and which it carries over.

use crate::frame::HOST_OF;
use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};
use nonroot_interpret::state::Mode;
use nonroot_interpret::window::Part;
use nonroot_native::Class;

/// The six status flags in iced's bits.
pub const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Guest register numbers.
pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RSP: u8 = 4;
pub const RBP: u8 = 5;
pub const RSI: u8 = 6;
pub const RDI: u8 = 7;

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Guest base register.
    pub base: Option<u8>,
    /// Guest index register and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement; from the start of the page if `rip`.
    pub disp: i32,
    /// RIP-relative.
    pub rip: bool,
    /// 0: no segment base; 1: FS; 2: GS.
    pub segment: u8,
    /// The address has 32 bits.
    pub short: bool,
    /// Bytes.
    pub size: u16,
    /// Required alignment in bytes, or 1.
    pub align: u8,
    /// Whether it is written.
    pub write: bool,
}

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The same instruction, with registers and memory operand replaced.
    Same,
    /// Nothing.
    Nop,
    /// PUSH of a register, an immediate or memory.
    Push,
    /// POP of a register.
    Pop,
    /// LEAVE.
    Leave,
    /// LEA.
    Lea,
    /// BT, BTS, BTR, BTC of memory with the bit in a register, which may lie far from the operand.
    BitString,
    /// FLDCW.
    LoadControl,
    /// FNINIT.
    InitX87,
    /// DIV, IDIV: what would fault goes to the interpreter.
    Divide {
        /// IDIV.
        signed: bool,
    },
    /// MOVZX from, MOV to a byte register from, or an operation with a constant on AH, CH, DH, BH.
    HighByte,
    /// CLI.
    Cli,
    /// STI.
    Sti,
    /// SWAPGS.
    Swapgs,
    /// STAC (`open`) and CLAC.
    Access {
        /// STAC.
        open: bool,
    },
    /// CLD.
    Cld,
    /// PUSHFQ.
    Pushf,
    /// Jcc.
    Branch,
    /// JRCXZ and JECXZ by address size, LOOP.
    CountBranch,
    /// JMP.
    Jump,
    /// JMP through a register or memory.
    JumpIndirect,
    /// CALL.
    Call,
    /// CALL through a register or memory.
    CallIndirect,
    /// RET.
    Return,
    /// MOVS and STOS.
    String,
    /// RDTSC and RDTSCP.
    TimeStamp {
        /// RDTSCP.
        processor: bool,
    },
    /// SYSCALL.
    Syscall,
    /// SYSRETQ.
    Sysret,
}

/// A guest instruction and what matters about it.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The instruction, decoded at its offset in the page.
    pub i: Instruction,
    /// How it is translated.
    pub kind: Kind,
    /// Its memory operand; for PUSH, POP, CALL and RET not their stack access.
    pub memory: Option<Operand>,
    /// Guest registers that it writes, one bit each.
    pub writes: u16,
    /// It reads or writes RAX without naming it.
    pub implicit_rax: bool,
    /// It needs the status flags, or leaves some of them as they were.
    pub flags_needed: bool,
    /// It reads status flags.
    pub flags_read: bool,
    /// It changes status flags.
    pub flags_changed: bool,
    /// 0: no vector registers; 1: SSE; 2: AVX.
    pub vectors: u8,
    /// It works on the x87 or MMX registers.
    pub x87: bool,
    /// It sets the x87 instruction pointer, and if it has a memory operand the data pointer.
    pub pointers: bool,
    /// How it changes RSP, if by a constant.
    pub stack_delta: Option<i32>,
    /// Bytes of its stack access at RSP (POP, RET) or below it (PUSH, CALL).
    pub stack: Stack,
    /// It reaches memory without a lookup, which leaves the host's flags alone.
    pub windowed: bool,
    /// The windows of its memory operand and of its stack access then.
    pub parts: [Option<Part>; 2],
}

/// The implicit stack access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stack {
    /// None.
    None,
    /// Reads at RSP.
    Read(u8),
    /// Writes below RSP.
    Write(u8),
}

impl Guest {
    /// It overwrites all status flags whatever they were.
    pub fn kills_flags(&self) -> bool {
        self.flags_changed && !self.flags_needed
    }

    /// The host's flags are needed for something else before it, or during it.
    pub fn spoils(&self) -> bool {
        let memory = self.memory.is_some() && !matches!(self.kind, Kind::Lea | Kind::Nop);
        let other = matches!(
            self.kind,
            Kind::Divide { .. }
                | Kind::Cli
                | Kind::Cld
                | Kind::Pushf
                | Kind::JumpIndirect
                | Kind::CallIndirect
                | Kind::String
                | Kind::TimeStamp { .. }
                | Kind::Syscall
                | Kind::Sysret
        );
        (memory || self.stack != Stack::None) && !self.windowed || other
    }
}

/// What the host can do and what is switched off.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// AVX and AVX2 are there.
    pub avx: bool,
    /// Vector instructions are carried over.
    pub vectors: bool,
    /// x87 and MMX instructions are carried over.
    pub x87: bool,
    /// CLI, CLD and PUSHF are carried over.
    pub interrupt_flag: bool,
    /// MOVS and STOS are carried over.
    pub strings: bool,
    /// SYSCALL and SYSRETQ are carried over.
    pub syscalls: bool,
    /// RDTSC and RDTSCP are carried over.
    pub time_stamps: bool,
}

/// Guest register number of a register with 16 to 64 bits or a low byte.
pub fn number(r: Register) -> Option<u8> {
    if matches!(r, Register::AH | Register::CH | Register::DH | Register::BH) || !r.is_gpr() {
        return None;
    }
    Some(r.full_register().number() as u8)
}

fn high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

fn is_memory(kind: OpKind) -> bool {
    kind == OpKind::Memory
}

/// Instructions that name RAX implicitly.
fn implicit_rax(i: &Instruction) -> bool {
    use Mnemonic::*;
    match i.mnemonic() {
        Mul | Div | Idiv | Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo | Cmpxchg | Cmpxchg8b | Cmpxchg16b | Lahf
        | Sahf | Pcmpestri | Pcmpestrm | Vpcmpestri | Vpcmpestrm => true,
        Imul => i.op_count() == 1,
        Fnstsw => i.op0_kind() == OpKind::Register,
        _ => false,
    }
}

/// General instructions that are carried over as they are.
fn general(i: &Instruction) -> bool {
    use Mnemonic::*;
    match i.mnemonic() {
        Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Inc | Dec | Neg | Not | Mov | Movzx | Movsx
        | Movsxd | Xchg | Xadd | Cmpxchg | Cmpxchg8b | Cmpxchg16b | Bswap | Movbe | Movnti | Shl | Sal
        | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd | Imul | Mul | Cbw | Cwde | Cdqe | Cwd | Cdq
        | Cqo | Bsf | Bsr | Tzcnt | Lzcnt | Popcnt | Andn | Bextr | Blsi | Blsmsk | Blsr | Bzhi | Mulx
        | Pdep | Pext | Rorx | Sarx | Shlx | Shrx | Adcx | Adox | Crc32 | Clc | Stc | Cmc | Lahf | Sahf
        | Lfence | Mfence | Sfence | Pause => true,
        // With a register for the bit and memory, the bit may lie far from the operand.
        Bt | Bts | Btr | Btc => !is_memory(i.op0_kind()) || i.op1_kind() == OpKind::Immediate8,
        m => conditional(m),
    }
}

fn conditional(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Seta | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
            | Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    )
}

/// Whether the features that a general instruction belongs to are the host's.
fn host_has(i: &Instruction) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        i.cpuid_features().iter().all(|feature| match feature {
            CpuidFeature::BMI1 => has!("bmi1"),
            CpuidFeature::BMI2 => has!("bmi2"),
            CpuidFeature::ADX => has!("adx"),
            CpuidFeature::LZCNT => has!("lzcnt"),
            CpuidFeature::POPCNT => has!("popcnt"),
            CpuidFeature::MOVBE => has!("movbe"),
            CpuidFeature::SSE4_1 => has!("sse4.1"),
            CpuidFeature::SSE4_2 => has!("sse4.2"),
            CpuidFeature::SSE3 => has!("sse3"),
            CpuidFeature::SSSE3 => has!("ssse3"),
            CpuidFeature::AES => has!("aes"),
            CpuidFeature::PCLMULQDQ => has!("pclmulqdq"),
            CpuidFeature::SHA => has!("sha"),
            CpuidFeature::AVX => has!("avx"),
            CpuidFeature::AVX2 => has!("avx2"),
            CpuidFeature::FMA => has!("fma"),
            CpuidFeature::F16C => has!("f16c"),
            CpuidFeature::CMPXCHG16B => has!("cmpxchg16b"),
            CpuidFeature::FPU
            | CpuidFeature::FPU287
            | CpuidFeature::FPU387
            | CpuidFeature::MMX
            | CpuidFeature::INTEL8086
            | CpuidFeature::INTEL8086_ONLY
            | CpuidFeature::INTEL186
            | CpuidFeature::INTEL286
            | CpuidFeature::INTEL386
            | CpuidFeature::INTEL386_ONLY
            | CpuidFeature::INTEL486
            | CpuidFeature::X64
            | CpuidFeature::CMOV
            | CpuidFeature::CX8
            | CpuidFeature::MULTIBYTENOP
            | CpuidFeature::PAUSE
            | CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::CET_IBT
            | CpuidFeature::PREFETCHW => true,
            _ => false,
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = i;
        false
    }
}

/// 1 for an SSE instruction that is carried over, 2 for AVX, 0 for neither.
fn vector(i: &Instruction, abilities: Abilities) -> u8 {
    use CpuidFeature as F;
    if !abilities.vectors {
        return 0;
    }
    let wanted = |feature: &F| {
        matches!(
            feature,
            F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
                | F::X64
        )
    };
    if !i.cpuid_features().iter().all(wanted) || !host_has(i) || i.is_vsib() {
        return 0;
    }
    use Mnemonic::*;
    let excluded = matches!(
        i.mnemonic(),
        Ldmxcsr
            | Vldmxcsr
            | Stmxcsr
            | Vstmxcsr
            | Maskmovdqu
            | Vmaskmovdqu
            | Maskmovq
            | Vmaskmovps
            | Vmaskmovpd
            | Vpmaskmovd
            | Vpmaskmovq
    );
    let register = |n: u32| i.op_kind(n) == OpKind::Register;
    let vectors = (0..i.op_count())
        .any(|n| register(n) && (i.op_register(n).is_xmm() || i.op_register(n).is_ymm()))
        || matches!(i.mnemonic(), Vzeroupper | Vzeroall);
    let others = (0..i.op_count()).any(|n| {
        let r = i.op_register(n);
        register(n) && !(r.is_xmm() || r.is_ymm() || number(r).is_some())
    });
    if excluded || !vectors || others {
        return 0;
    }
    match i.code().encoding() {
        EncodingKind::Legacy => 1,
        EncodingKind::VEX if abilities.avx => 2,
        _ => 0,
    }
}

/// Whether an instruction on x87 or MMX registers is carried over; those that show or load the
/// environment are not.
fn x87(i: &Instruction, abilities: Abilities) -> Option<Class> {
    use Mnemonic::*;
    let class = nonroot_native::classify(i).filter(|_| abilities.x87 && host_has(i))?;
    let carried = match class {
        Class::X87 => !matches!(i.mnemonic(), Fneni | Fndisi | Fnsetpm | Fnstenv | Fldenv | Fnsave | Frstor),
        Class::Wait | Class::Mmx => true,
        Class::SseMmx => abilities.vectors,
        _ => false,
    };
    carried.then_some(class)
}

fn alignment(i: &Instruction, size: usize) -> u8 {
    use Mnemonic::*;
    match i.code().encoding() {
        EncodingKind::Legacy if i.mnemonic() == Cmpxchg16b => 16,
        EncodingKind::Legacy if size == 16 => match i.mnemonic() {
            Movups | Movupd | Movdqu | Lddqu | Pcmpistri | Pcmpistrm | Pcmpestri | Pcmpestrm => 1,
            _ => 16,
        },
        EncodingKind::VEX => match i.mnemonic() {
            Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => size as u8,
            _ => 1,
        },
        _ => 1,
    }
}

/// The memory operand, if the translator can address it.
/// Whether an instruction is MOVS or STOS with the mode's own address size and the usual segments.
fn string(i: &Instruction, mode: Mode) -> bool {
    use Mnemonic::*;
    let long = mode == Mode::Long64;
    let at = |n: u32, wide: OpKind, narrow: OpKind| i.op_kind(n) == if long { wide } else { narrow };
    let to = at(0, OpKind::MemoryESRDI, OpKind::MemoryESEDI);
    let usual = !matches!(i.segment_prefix(), Register::FS | Register::GS);
    match i.mnemonic() {
        Movsb | Movsw | Movsd | Movsq => to && usual && at(1, OpKind::MemorySegRSI, OpKind::MemorySegESI),
        Stosb | Stosw | Stosd | Stosq => to,
        _ => false,
    }
}

fn operand(i: &Instruction, mode: Mode) -> Result<Option<Operand>, ()> {
    let memory: Vec<u32> = (0..i.op_count()).filter(|&n| is_memory(i.op_kind(n))).collect();
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Memory | OpKind::Register => {}
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
            | OpKind::NearBranch32
            | OpKind::NearBranch64 => {}
            _ => return Err(()),
        }
    }
    match memory.len() {
        0 => return Ok(None),
        1 => {}
        _ => return Err(()),
    }
    let long = mode == Mode::Long64;
    let segment = match i.memory_segment() {
        Register::FS => 1,
        Register::GS => 2,
        Register::CS if !long => return Err(()),
        _ => 0,
    };
    let (mut rip, mut short) = (false, !long);
    let mut number_of = |r: Register| -> Result<Option<u8>, ()> {
        match r {
            Register::None => Ok(None),
            Register::RIP => {
                rip = true;
                Ok(None)
            }
            r if r.is_gpr64() => Ok(Some(r.number() as u8)),
            r if r.is_gpr32() => {
                short = true;
                Ok(Some(r.number() as u8))
            }
            _ => Err(()),
        }
    };
    let base = number_of(i.memory_base())?;
    let index = number_of(i.memory_index())?;
    let index = index.map(|index| (index, i.memory_index_scale().trailing_zeros() as u8));
    if base.is_none() && index.is_none() && !rip && long && i.memory_displ_size() == 4 {
        // [disp32] under an address-size prefix is not told apart; both are below 4 GiB or sign-extended.
        short = (i.memory_displacement64() >> 31) == 1;
    }
    let disp = i.memory_displacement64();
    let disp = if short { disp as u32 as i32 } else { i32::try_from(disp as i64).map_err(|_| ())? };
    let size = i.memory_size().size();
    if size == 0 && i.mnemonic() != Mnemonic::Lea && i.mnemonic() != Mnemonic::Nop || size > 32 {
        return Err(());
    }
    Ok(Some(Operand {
        base,
        index,
        disp,
        rip,
        segment,
        short,
        size: size as u16,
        align: alignment(i, size),
        write: false,
    }))
}

/// 32-bit forms that have no encoding in 64-bit code, in the form that has.
fn modern(i: &Instruction) -> Instruction {
    let mut m = *i;
    let code = match i.code() {
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        // Short forms that name the accumulator: it lives elsewhere.
        Code::Add_AL_imm8 => Code::Add_rm8_imm8,
        Code::Or_AL_imm8 => Code::Or_rm8_imm8,
        Code::Adc_AL_imm8 => Code::Adc_rm8_imm8,
        Code::Sbb_AL_imm8 => Code::Sbb_rm8_imm8,
        Code::And_AL_imm8 => Code::And_rm8_imm8,
        Code::Sub_AL_imm8 => Code::Sub_rm8_imm8,
        Code::Xor_AL_imm8 => Code::Xor_rm8_imm8,
        Code::Cmp_AL_imm8 => Code::Cmp_rm8_imm8,
        Code::Test_AL_imm8 => Code::Test_rm8_imm8,
        Code::Add_AX_imm16 => Code::Add_rm16_imm16,
        Code::Or_AX_imm16 => Code::Or_rm16_imm16,
        Code::Adc_AX_imm16 => Code::Adc_rm16_imm16,
        Code::Sbb_AX_imm16 => Code::Sbb_rm16_imm16,
        Code::And_AX_imm16 => Code::And_rm16_imm16,
        Code::Sub_AX_imm16 => Code::Sub_rm16_imm16,
        Code::Xor_AX_imm16 => Code::Xor_rm16_imm16,
        Code::Cmp_AX_imm16 => Code::Cmp_rm16_imm16,
        Code::Test_AX_imm16 => Code::Test_rm16_imm16,
        Code::Add_EAX_imm32 => Code::Add_rm32_imm32,
        Code::Or_EAX_imm32 => Code::Or_rm32_imm32,
        Code::Adc_EAX_imm32 => Code::Adc_rm32_imm32,
        Code::Sbb_EAX_imm32 => Code::Sbb_rm32_imm32,
        Code::And_EAX_imm32 => Code::And_rm32_imm32,
        Code::Sub_EAX_imm32 => Code::Sub_rm32_imm32,
        Code::Xor_EAX_imm32 => Code::Xor_rm32_imm32,
        Code::Cmp_EAX_imm32 => Code::Cmp_rm32_imm32,
        Code::Test_EAX_imm32 => Code::Test_rm32_imm32,
        Code::Add_RAX_imm32 => Code::Add_rm64_imm32,
        Code::Or_RAX_imm32 => Code::Or_rm64_imm32,
        Code::Adc_RAX_imm32 => Code::Adc_rm64_imm32,
        Code::Sbb_RAX_imm32 => Code::Sbb_rm64_imm32,
        Code::And_RAX_imm32 => Code::And_rm64_imm32,
        Code::Sub_RAX_imm32 => Code::Sub_rm64_imm32,
        Code::Xor_RAX_imm32 => Code::Xor_rm64_imm32,
        Code::Cmp_RAX_imm32 => Code::Cmp_rm64_imm32,
        Code::Test_RAX_imm32 => Code::Test_rm64_imm32,
        Code::Xchg_r16_AX => Code::Xchg_rm16_r16,
        Code::Xchg_r32_EAX => Code::Xchg_rm32_r32,
        Code::Xchg_r64_RAX => Code::Xchg_rm64_r64,
        _ => return m,
    };
    m.set_code(code);
    m
}

/// What the translator makes of an instruction; `None`: the interpreter executes it.
pub fn guest(
    i: &Instruction,
    mode: Mode,
    abilities: Abilities,
    info: &mut InstructionInfoFactory,
) -> Option<Guest> {
    use Mnemonic::*;
    let string = abilities.strings && string(i, mode);
    if i.is_invalid()
        || i.has_rep_prefix() && !string && !matches!(i.mnemonic(), Ret | Pause)
        || i.has_repne_prefix() && !is_flow(i)
    {
        return None;
    }
    let long = mode == Mode::Long64;
    let width = if long { 8 } else { 4 };
    let i = &modern(i);
    let memory = if string { None } else { operand(i, mode).ok()? };
    let registers =
        || (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
    let x87 = x87(i, abilities);
    let vectors = vector(i, abilities).max(u8::from(x87 == Some(Class::SseMmx)));
    let stack_width = |expected: i32| i.stack_pointer_increment() == expected;
    let kind = match i.mnemonic() {
        Nop | Endbr64 | Endbr32 | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchnta | Prefetchw => Kind::Nop,
        Push if stack_width(-width) && !registers().any(|r| r.is_segment_register()) => Kind::Push,
        Pop if stack_width(width) && registers().any(|r| number(r).is_some()) => Kind::Pop,
        Leave if matches!(i.code(), Code::Leaveq if long) || matches!(i.code(), Code::Leaved if !long) => {
            Kind::Leave
        }
        Lea if i.op0_register().size() >= 4 => Kind::Lea,
        Div | Idiv if !registers().any(high_byte) && i.op0_size() >= 4 => {
            Kind::Divide { signed: i.mnemonic() == Idiv }
        }
        _ if string => Kind::String,
        Cli if abilities.interrupt_flag => Kind::Cli,
        Sti if abilities.interrupt_flag => Kind::Sti,
        Swapgs if abilities.interrupt_flag && long => Kind::Swapgs,
        Stac if abilities.interrupt_flag => Kind::Access { open: true },
        Clac if abilities.interrupt_flag => Kind::Access { open: false },
        Cld if abilities.interrupt_flag => Kind::Cld,
        Pushfq if abilities.interrupt_flag => Kind::Pushf,
        Movzx if high_byte(i.op1_register()) && i.op0_register().size() >= 4 => Kind::HighByte,
        Test | Cmp | And | Or | Xor | Add | Sub | Mov
            if i.op0_kind() == OpKind::Register
                && high_byte(i.op0_register())
                && i.op1_kind() == OpKind::Immediate8 =>
        {
            Kind::HighByte
        }
        Mov if i.op1_kind() == OpKind::Register
            && high_byte(i.op1_register())
            && i.op0_kind() == OpKind::Register
            && number(i.op0_register()).is_some() =>
        {
            Kind::HighByte
        }
        Rdtsc if abilities.time_stamps => Kind::TimeStamp { processor: false },
        Rdtscp if abilities.time_stamps => Kind::TimeStamp { processor: true },
        Syscall if abilities.syscalls && long => Kind::Syscall,
        Sysretq if abilities.syscalls && long => Kind::Sysret,
        _ if i.is_jcc_short_or_near() => Kind::Branch,
        Jrcxz if long => Kind::CountBranch,
        Jmp if i.is_jmp_short_or_near() => Kind::Jump,
        Jmp if i.is_jmp_near_indirect() && i.op0_size() == width as usize => Kind::JumpIndirect,
        Call if i.is_call_near() && stack_width(-width) => Kind::Call,
        Call if i.is_call_near_indirect() && stack_width(-width) => Kind::CallIndirect,
        Ret if matches!(i.code(), Code::Retnq | Code::Retnq_imm16 if long)
            || matches!(i.code(), Code::Retnd | Code::Retnd_imm16 if !long) =>
        {
            Kind::Return
        }
        Bt | Bts | Btr | Btc
            if i.op0_kind() == OpKind::Memory
                && i.op1_kind() == OpKind::Register
                && memory.is_some_and(|m| !(long && m.short)) =>
        {
            Kind::BitString
        }
        Fldcw if x87.is_some() => Kind::LoadControl,
        Fninit if x87.is_some() => Kind::InitX87,
        Wait if x87.is_some() => Kind::Nop,
        _ if vectors != 0 || x87.is_some() => Kind::Same,
        _ if general(i) && host_has(i) => Kind::Same,
        _ => return None,
    };
    if matches!(kind, Kind::Branch | Kind::Jump | Kind::Call | Kind::CountBranch)
        && (!matches!(i.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32)
            || long && i32::try_from(i.near_branch_target() as i64).is_err())
    {
        return None;
    }
    if kind == Kind::Same {
        // Segment, control and debug registers, high bytes.
        let plain = |r: Register| {
            number(r).is_some() || r.is_xmm() || r.is_ymm() || x87.is_some() && (r.is_st() || r.is_mm())
        };
        if !registers().all(plain) {
            return None;
        }
    }
    let mut g = Guest {
        i: *i,
        kind,
        memory,
        writes: 0,
        implicit_rax: implicit_rax(i),
        flags_needed: false,
        flags_read: false,
        flags_changed: false,
        vectors,
        x87: x87.is_some(),
        pointers: x87 == Some(Class::X87)
            && !matches!(i.mnemonic(), Fninit | Fnclex | Fnstsw | Fnstcw | Fldcw),
        stack_delta: None,
        stack: Stack::None,
        windowed: false,
        parts: [None; 2],
    };
    let used = info.info_options(i, InstructionInfoOptions::NONE);
    for u in used.used_registers() {
        let writes = !matches!(
            u.access(),
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
        );
        if u.register().is_gpr() && writes {
            g.writes |= 1 << (u.register().full_register().number() & 15);
        }
    }
    // PUSH and CALL only read their operand; what they write is on the stack.
    let pushes = matches!(kind, Kind::Push | Kind::CallIndirect);
    if let Some(m) = &mut g.memory {
        m.write = !pushes
            && used.used_memory().iter().any(|u| {
                !matches!(
                    u.access(),
                    OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
                )
            });
    }
    let changed = i.rflags_modified() & STATUS;
    g.flags_changed = changed != 0;
    g.flags_read = i.rflags_read() & STATUS != 0;
    g.flags_needed = i.rflags_read() & STATUS != 0 || changed != 0 && changed != STATUS;
    // A shift by zero leaves all flags.
    if matches!(i.mnemonic(), Shl | Sal | Shr | Sar | Shld | Shrd | Rol | Ror | Rcl | Rcr) {
        let count = i.op_kind(i.op_count() - 1);
        let by_one = count == OpKind::Immediate8 && i.immediate8() & 0x1f != 0;
        g.flags_changed = true;
        g.flags_needed |= !by_one;
    }
    match kind {
        Kind::Push | Kind::Pushf => {
            g.stack_delta = Some(-width);
            g.stack = Stack::Write(width as u8);
        }
        Kind::Call | Kind::CallIndirect => {
            g.stack_delta = Some(-width);
            g.stack = Stack::Write(width as u8);
        }
        Kind::Pop => {
            g.stack_delta = (number(i.op0_register()) != Some(RSP)).then_some(width);
            g.stack = Stack::Read(width as u8);
        }
        Kind::Return => g.stack = Stack::Read(width as u8),
        Kind::Same | Kind::Lea if g.writes & 1 << RSP != 0 => g.stack_delta = constant_stack(i, width),
        Kind::Leave => {}
        _ => g.stack_delta = Some(0),
    }
    if matches!(kind, Kind::Pushf | Kind::Syscall | Kind::Sysret) {
        (g.flags_needed, g.flags_read) = (true, true);
    }
    // Registers without a host register need a scratch register each; see `emit`.
    let mut spilled = Vec::new();
    for r in registers() {
        if let Some(n) = number(r) {
            if HOST_OF[n as usize].is_none() && !spilled.contains(&n) {
                spilled.push(n);
            }
        }
    }
    let free = match (g.memory.is_some() && !matches!(kind, Kind::Lea | Kind::Nop), g.implicit_rax) {
        (true, true) => 0,
        (true, false) | (false, true) => 1,
        (false, false) => 2,
    };
    if matches!(kind, Kind::Same | Kind::Divide { .. }) && spilled.len() > free {
        return None;
    }
    if matches!(kind, Kind::Divide { .. }) && !spilled.is_empty() {
        return None;
    }
    Some(g)
}

fn is_flow(i: &Instruction) -> bool {
    i.flow_control() != iced_x86::FlowControl::Next
}

/// ADD, SUB and LEA that move RSP by a constant.
fn constant_stack(i: &Instruction, width: i32) -> Option<i32> {
    if i.op0_kind() != OpKind::Register || i.op0_register().size() != width as usize {
        return None;
    }
    match i.mnemonic() {
        Mnemonic::Add if i.op1_kind() != OpKind::Register && i.op1_kind() != OpKind::Memory => {
            i32::try_from(i.immediate(1) as i64).ok()
        }
        Mnemonic::Sub if i.op1_kind() != OpKind::Register && i.op1_kind() != OpKind::Memory => {
            i32::try_from((i.immediate(1) as i64).checked_neg()?).ok()
        }
        Mnemonic::Lea
            if i.memory_index() == Register::None
                && number(i.memory_base()) == Some(RSP)
                && i.memory_base().size() == width as usize =>
        {
            i32::try_from(i.memory_displacement64() as i64).ok()
        }
        _ => None,
    }
}

trait OperandSize {
    /// Bytes of the first operand.
    fn op0_size(&self) -> usize;
}

impl OperandSize for Instruction {
    fn op0_size(&self) -> usize {
        match self.op0_kind() {
            OpKind::Register => self.op0_register().size(),
            OpKind::Memory => self.memory_size().size(),
            _ => 0,
        }
    }
}
