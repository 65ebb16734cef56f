//! The few host instructions that glue guest instructions together, encoded
//! into a buffer whose place in memory is known.

/// A host register by its number in encodings.
pub type Host = u8;

/// Host register numbers.
pub mod host {
    #![allow(missing_docs)]
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    /// Base register.
    pub base: Option<Host>,
    /// Index register (not RSP) and log2 of its scale.
    pub index: Option<(Host, u8)>,
    /// Displacement.
    pub disp: i32,
}

/// `[base + disp]`.
pub fn at(base: Host, disp: i32) -> Mem {
    Mem { base: Some(base), index: None, disp }
}

/// A 32-bit displacement that is not known yet: its offset in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole(pub usize);

/// A growing piece of code.
pub struct Assembler {
    /// The code.
    pub code: Vec<u8>,
    /// Offset in the arena of its first byte.
    pub origin: usize,
    /// From this offset in the buffer on the code is elsewhere: at this offset in the arena.
    pub split: Option<(usize, usize)>,
}

impl Assembler {
    /// An empty piece that will be at `origin`.
    pub fn new(origin: usize) -> Self {
        Assembler { code: Vec::with_capacity(1024), origin, split: None }
    }

    /// Offset in the buffer of the next byte.
    pub fn here(&self) -> usize {
        self.code.len()
    }

    /// Offset in the arena of an offset in the buffer.
    pub fn place(&self, offset: usize) -> usize {
        match self.split {
            Some((at, origin)) if offset >= at => origin + (offset - at),
            _ => self.origin + offset,
        }
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement.
    fn modrm(&mut self, reg: Host, m: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = m.base else {
            // No base: SIB with a 32-bit displacement.
            let (index, scale) = m.index.map_or((4, 0), |(index, scale)| (index & 7, scale));
            self.bytes(&[reg | 4, scale << 6 | index << 3 | 5]);
            self.imm32(m.disp);
            return;
        };
        let mode = match m.disp {
            0 if base & 7 != 5 => 0,
            -128..=127 => 1,
            _ => 2,
        };
        match m.index {
            Some((index, scale)) => {
                self.bytes(&[mode << 6 | reg | 4, scale << 6 | (index & 7) << 3 | base & 7]);
            }
            None if base & 7 == 4 => self.bytes(&[mode << 6 | reg | 4, 0x24]),
            None => self.bytes(&[mode << 6 | reg | base & 7]),
        }
        match mode {
            1 => self.bytes(&[m.disp as u8]),
            2 => self.imm32(m.disp),
            _ => {}
        }
    }

    fn rex(&mut self, wide: bool, reg: Host, index: Host, base: Host) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
    }

    /// `opcode reg, [m]` (or the other way round, as the opcode says).
    pub fn mem(&mut self, wide: bool, opcode: &[u8], reg: Host, m: Mem) {
        self.rex(wide, reg, m.index.map_or(0, |(index, _)| index), m.base.unwrap_or(0));
        self.bytes(opcode);
        self.modrm(reg, m);
    }

    /// The same with a GS segment prefix.
    pub fn gs_mem(&mut self, wide: bool, opcode: &[u8], reg: Host, m: Mem) {
        self.bytes(&[0x65]);
        self.mem(wide, opcode, reg, m);
    }

    /// `opcode reg, rm` with a register operand.
    pub fn reg(&mut self, wide: bool, opcode: &[u8], reg: Host, rm: Host) {
        self.rex(wide, reg, 0, rm);
        self.bytes(opcode);
        self.bytes(&[0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    /// `mov dst, src`, 64 bits.
    pub fn mov(&mut self, dst: Host, src: Host) {
        if dst != src {
            self.reg(true, &[0x8b], dst, src);
        }
    }

    /// `mov dst, [m]`.
    pub fn load(&mut self, wide: bool, dst: Host, m: Mem) {
        self.mem(wide, &[0x8b], dst, m);
    }

    /// `mov [m], src`.
    pub fn store(&mut self, wide: bool, m: Mem, src: Host) {
        self.mem(wide, &[0x89], src, m);
    }

    /// `mov dword [m], value`.
    pub fn store_imm(&mut self, m: Mem, value: i32) {
        self.mem(false, &[0xc7], 0, m);
        self.imm32(value);
    }

    /// `mov qword [m], value`, sign-extended.
    pub fn store_imm_wide(&mut self, m: Mem, value: i32) {
        self.mem(true, &[0xc7], 0, m);
        self.imm32(value);
    }

    /// `lea dst, [m]`.
    pub fn lea(&mut self, wide: bool, dst: Host, m: Mem) {
        self.mem(wide, &[0x8d], dst, m);
    }

    /// `op dword [m], value` where op is the /n of opcode 81 (0 ADD, 5 SUB, 7 CMP, 4 AND).
    pub fn mem_imm(&mut self, op: u8, m: Mem, value: i32) {
        if (-128..=127).contains(&value) {
            self.mem(false, &[0x83], op, m);
            self.bytes(&[value as u8]);
        } else {
            self.mem(false, &[0x81], op, m);
            self.imm32(value);
        }
    }

    /// `op reg, value` where op is the /n of opcode 81.
    pub fn reg_imm(&mut self, wide: bool, op: u8, reg: Host, value: i32) {
        if (-128..=127).contains(&value) {
            self.reg(wide, &[0x83], op, reg);
            self.bytes(&[value as u8]);
        } else {
            self.reg(wide, &[0x81], op, reg);
            self.imm32(value);
        }
    }

    /// `jmp` to somewhere that is filled in later.
    pub fn jmp(&mut self) -> Hole {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        Hole(self.here() - 4)
    }

    /// `jcc` to somewhere that is filled in later.
    pub fn jcc(&mut self, condition: u8) -> Hole {
        self.bytes(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Hole(self.here() - 4)
    }

    /// `jmp` to an offset in the arena.
    pub fn jmp_to(&mut self, target: usize) {
        let hole = self.jmp();
        self.fill_outside(hole, target);
    }

    /// `jcc` to an offset in the arena.
    pub fn jcc_to(&mut self, condition: u8, target: usize) {
        let hole = self.jcc(condition);
        self.fill_outside(hole, target);
    }

    /// `call` to an offset in the arena.
    pub fn call_to(&mut self, target: usize) {
        self.bytes(&[0xe8, 0, 0, 0, 0]);
        let hole = Hole(self.here() - 4);
        self.fill_outside(hole, target);
    }

    /// Points a hole at an offset in this buffer.
    pub fn fill(&mut self, hole: Hole, target: usize) {
        self.fill_outside(hole, self.place(target));
    }

    /// Points a hole at an offset in the arena.
    pub fn fill_outside(&mut self, hole: Hole, target: usize) {
        let relative = target as i64 - (self.place(hole.0) + 4) as i64;
        self.code[hole.0..hole.0 + 4].copy_from_slice(&(relative as i32).to_le_bytes());
    }
}

impl Assembler {
    /// Opcode, ModRM and the rest of an instruction whose prefix is already there.
    pub fn mem_without_rex(&mut self, opcode: u8, reg: Host, m: Mem) {
        self.bytes(&[opcode]);
        self.modrm(reg, m);
    }
}
