//! Guest registers without a host register as operands: taken from memory, or not loaded at all.

use crate::analysis;
use crate::assembler::host;
use crate::frame::{self, HOST_OF};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// The form of an instruction whose second operand may be memory.
fn with_source_in_memory(code: Code) -> Option<Code> {
    Some(match code {
        Code::Add_rm32_r32 => Code::Add_r32_rm32,
        Code::Or_rm32_r32 => Code::Or_r32_rm32,
        Code::Adc_rm32_r32 => Code::Adc_r32_rm32,
        Code::Sbb_rm32_r32 => Code::Sbb_r32_rm32,
        Code::And_rm32_r32 => Code::And_r32_rm32,
        Code::Sub_rm32_r32 => Code::Sub_r32_rm32,
        Code::Xor_rm32_r32 => Code::Xor_r32_rm32,
        Code::Cmp_rm32_r32 => Code::Cmp_r32_rm32,
        Code::Mov_rm32_r32 => Code::Mov_r32_rm32,
        Code::Add_rm64_r64 => Code::Add_r64_rm64,
        Code::Or_rm64_r64 => Code::Or_r64_rm64,
        Code::Adc_rm64_r64 => Code::Adc_r64_rm64,
        Code::Sbb_rm64_r64 => Code::Sbb_r64_rm64,
        Code::And_rm64_r64 => Code::And_r64_rm64,
        Code::Sub_rm64_r64 => Code::Sub_r64_rm64,
        Code::Xor_rm64_r64 => Code::Xor_r64_rm64,
        Code::Cmp_rm64_r64 => Code::Cmp_r64_rm64,
        Code::Mov_rm64_r64 => Code::Mov_r64_rm64,
        Code::Add_r32_rm32
        | Code::Or_r32_rm32
        | Code::And_r32_rm32
        | Code::Sub_r32_rm32
        | Code::Xor_r32_rm32
        | Code::Cmp_r32_rm32
        | Code::Mov_r32_rm32
        | Code::Imul_r32_rm32
        | Code::Movsxd_r64_rm32
        | Code::Add_r64_rm64
        | Code::Or_r64_rm64
        | Code::And_r64_rm64
        | Code::Sub_r64_rm64
        | Code::Xor_r64_rm64
        | Code::Cmp_r64_rm64
        | Code::Mov_r64_rm64
        | Code::Imul_r64_rm64 => code,
        _ => return None,
    })
}

/// Makes the second operand of an instruction on registers its home in memory, if it has no host register.
pub(super) fn source_in_memory(i: &mut Instruction, kept: &[Option<u8>; 2]) {
    if i.op_count() != 2 || i.op0_kind() != OpKind::Register || i.op1_kind() != OpKind::Register {
        return;
    }
    let Some(guest) = analysis::number(i.op1_register()) else { return };
    let same = analysis::number(i.op0_register()) == Some(guest);
    if same || HOST_OF[guest as usize].is_some() || kept.contains(&Some(guest)) {
        return;
    }
    let Some(code) = with_source_in_memory(i.code()) else { return };
    i.set_code(code);
    i.set_op1_kind(OpKind::Memory);
    i.set_memory_base(Register::RSP);
    i.set_memory_index(Register::None);
    i.set_memory_index_scale(1);
    let home = frame::spilled(guest);
    debug_assert!(home.base == Some(host::RSP));
    i.set_memory_displacement64(home.disp as u64);
    i.set_memory_displ_size(u32::from(home.disp != 0));
}

/// Whether the first operand, a register, is overwritten whatever it was, and is no other operand.
pub(super) fn only_writes_first(i: &Instruction) -> bool {
    use Mnemonic::*;
    let mnemonic = matches!(
        i.mnemonic(),
        Mov | Movzx | Movsx | Movsxd | Rorx | Sarx | Shlx | Shrx | Movd | Movq | Vmovd | Vmovq | Pmovmskb
    );
    let first = i.op0_register();
    mnemonic
        && i.op0_kind() == OpKind::Register
        && first.size() >= 4
        && (1..i.op_count()).all(|n| {
            i.op_kind(n) != OpKind::Register || i.op_register(n).full_register() != first.full_register()
        })
}
