//! Segment descriptors as they are in memory, and stack frames that are written
//! as a whole to a stack that is not in use yet.

use crate::cpu::Cpu;
use crate::mem::Target;
use crate::operands::mask;
use crate::state::*;
use crate::walk::{Access, Kind};
use std::sync::atomic::{AtomicU8, Ordering};

/// Types of system descriptors (SDM 3A, table 3-2).
pub mod system_type {
    #![allow(missing_docs)]
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INTERRUPT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL_GATE: u32 = 12;
    pub const INTERRUPT_GATE: u32 = 14;
    pub const TRAP_GATE: u32 = 15;
}

/// A descriptor of the GDT or an LDT: its (first) eight bytes and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The eight bytes, little-endian.
    pub raw: u64,
    /// Linear address.
    pub address: u64,
}

impl Descriptor {
    /// Base address (32 bits).
    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let raw = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.ar() & ar::G != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }
    /// Access rights, see [`ar`].
    pub fn ar(&self) -> u32 {
        (self.raw >> 40) as u32 & 0xf0ff
    }
    /// The four type bits.
    pub fn kind(&self) -> u32 {
        self.ar() & ar::TYPE
    }
    /// Code or data, not a system descriptor.
    pub fn is_segment(&self) -> bool {
        self.ar() & ar::S != 0
    }
    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.ar() & (ar::S | ar::CODE) == ar::S | ar::CODE
    }
    /// A conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.ar() & (ar::S | ar::CODE | ar::DC) == ar::S | ar::CODE | ar::DC
    }
    /// A writable data segment.
    pub fn is_writable(&self) -> bool {
        self.ar() & (ar::S | ar::CODE | ar::RW) == ar::S | ar::RW
    }
    /// A data segment or a readable code segment.
    pub fn is_readable(&self) -> bool {
        self.is_segment() && self.ar() & (ar::CODE | ar::RW) != ar::CODE
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.ar() >> ar::DPL_SHIFT) as u8 & 3
    }
    /// Present.
    pub fn is_present(&self) -> bool {
        self.ar() & ar::P != 0
    }
    /// The segment register that holds it (accessed).
    pub fn segment(&self, selector: u16) -> Segment {
        let accessed = if self.is_segment() { ar::ACCESSED } else { 0 };
        Segment { base: self.base(), limit: self.limit(), ar: self.ar() | accessed, selector }
    }
}

/// Requested privilege level of a selector.
pub fn rpl(selector: u16) -> u8 {
    selector as u8 & 3
}

/// Whether a selector is null.
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Error code that names a selector.
pub fn selector_error(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// A segment register that holds a null selector; `cpl` is SS's DPL then.
pub fn null_segment(selector: u16, cpl: u8) -> Segment {
    Segment { base: 0, limit: 0, ar: ar::UNUSABLE | u32::from(cpl) << ar::DPL_SHIFT, selector }
}

impl Cpu {
    /// Linear address of `len` bytes of descriptor; None outside the table's limit.
    pub fn descriptor_address(&self, selector: u16, len: u64) -> Option<u64> {
        let offset = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 != 0 {
            if self.r.ldtr.ar & ar::UNUSABLE != 0 {
                return None;
            }
            (self.r.ldtr.base, u64::from(self.r.ldtr.limit))
        } else {
            (self.r.gdtr.base, u64::from(self.r.gdtr.limit))
        };
        (offset + len - 1 <= limit).then(|| self.wrap_linear(base.wrapping_add(offset)))
    }

    /// Wraps a linear address of a system structure to 32 bits outside long mode.
    pub(crate) fn wrap_linear(&self, lin: u64) -> u64 {
        if self.lma() {
            lin
        } else {
            lin & 0xffff_ffff
        }
    }

    /// A descriptor; None outside the table's limit.
    pub fn find_descriptor(&mut self, selector: u16) -> X<Option<Descriptor>> {
        match self.descriptor_address(selector, 8) {
            None => Ok(None),
            Some(address) => Ok(Some(Descriptor { raw: self.load_sys(address, 8)?, address })),
        }
    }

    /// A descriptor; outside the table's limit `vector` with the selector (and
    /// `ext`) as error code.
    pub fn read_descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> X<Descriptor> {
        match self.find_descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.fault(vector, Some(selector_error(selector) | ext))),
        }
    }

    /// The second half of a 16-byte descriptor; None outside the table's limit.
    pub fn upper_half(&mut self, d: &Descriptor, selector: u16) -> X<Option<u64>> {
        match self.descriptor_address(selector, 16) {
            None => Ok(None),
            Some(_) => Ok(Some(self.load_sys(self.wrap_linear(d.address.wrapping_add(8)), 8)?)),
        }
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    pub fn mark_accessed(&mut self, d: &Descriptor) -> X {
        if d.is_segment() && d.ar() & ar::ACCESSED == 0 {
            self.or_system_byte(d.address.wrapping_add(5), ar::ACCESSED as u8)?;
        }
        Ok(())
    }

    /// Sets bits of a byte atomically, as supervisor.
    pub fn or_system_byte(&mut self, lin: u64, bits: u8) -> X {
        let lin = self.wrap_linear(lin);
        let t = self.translate(lin, Access { kind: Kind::Write, system: true })?;
        match self.target(t.gpa, true) {
            Target::Ram(host, entry) => {
                self.before_ram_write(t.gpa, 1, entry);
                // SAFETY: `host` is a byte of mapped, writable guest RAM.
                unsafe { (*host.cast::<AtomicU8>()).fetch_or(bits, Ordering::SeqCst) };
                Ok(())
            }
            Target::Mmio(_) => {
                let old = self.load_sys(lin, 1)?;
                self.store_sys(lin, 1, old | u64::from(bits))
            }
        }
    }

    /// The stack in use.
    pub fn stack_in_use(&self) -> Stack {
        Stack {
            segment: self.r.seg[seg::SS],
            sp: self.r.gpr[reg::RSP],
            long: self.mode == Mode::Long64,
            cpl: self.cpl,
            error: 0,
        }
    }

    /// Writes a frame to a stack with the privilege of that stack; returns the new
    /// stack pointer (see [`Stack::merge`]). Registers do not change.
    pub fn write_frame(&mut self, stack: &Stack, frame: &Frame) -> X<u64> {
        let old = self.cpl;
        if old == stack.cpl {
            return self.write_frame_here(stack, frame);
        }
        // Pushes to the stack of another privilege level are accesses of that level.
        self.cpl = stack.cpl;
        self.tlb_context_changed();
        let result = self.write_frame_here(stack, frame);
        self.cpl = old;
        self.tlb_context_changed();
        result
    }

    fn write_frame_here(&mut self, stack: &Stack, frame: &Frame) -> X<u64> {
        let width = stack.mask();
        let total = (frame.size * frame.count) as u64;
        let top = stack.sp & width;
        let bottom = top.wrapping_sub(total) & width;
        let mut bytes = [0u8; Frame::MAX * 8];
        for (n, item) in frame.items[..frame.count].iter().rev().enumerate() {
            bytes[n * frame.size..][..frame.size].copy_from_slice(&item.to_le_bytes()[..frame.size]);
        }
        if stack.long || top >= total || top == 0 {
            self.store_to_stack(stack, bottom, &bytes[..total as usize])?;
        } else {
            // The stack pointer wraps inside the frame.
            for n in (0..frame.count).rev() {
                let at = bottom.wrapping_add((n * frame.size) as u64) & width;
                self.store_to_stack(stack, at, &bytes[n * frame.size..][..frame.size])?;
            }
        }
        Ok(bottom)
    }

    fn store_to_stack(&mut self, stack: &Stack, offset: u64, bytes: &[u8]) -> X {
        let last = offset.wrapping_add(bytes.len() as u64 - 1);
        let s = &stack.segment;
        let lin = if stack.long {
            if !Self::canonical(offset) || !Self::canonical(last) {
                return Err(self.fault(vector::SS, Some(stack.error)));
            }
            offset
        } else {
            let limit = u64::from(s.limit);
            let out = if s.ar & (ar::S | ar::CODE | ar::DC) == ar::S | ar::DC {
                let top = if s.ar & ar::DB != 0 { 0xffff_ffff } else { 0xffff };
                offset <= limit || last > top
            } else {
                last > limit
            };
            let unwritable = self.protected() && s.ar & ar::UNUSABLE != 0;
            if out || unwritable {
                return Err(self.fault(vector::SS, Some(stack.error)));
            }
            s.base.wrapping_add(offset) & 0xffff_ffff
        };
        self.store_vector(seg::SS, lin, bytes)
    }
}

/// A stack to push a frame on.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    /// SS.
    pub segment: Segment,
    /// Stack pointer before the pushes.
    pub sp: u64,
    /// In 64-bit mode: no segmentation.
    pub long: bool,
    /// Privilege of the pushes.
    pub cpl: u8,
    /// Error code of #SS.
    pub error: u32,
}

impl Stack {
    /// Mask for the stack pointer.
    pub fn mask(&self) -> u64 {
        if self.long {
            u64::MAX
        } else if self.segment.ar & ar::DB != 0 {
            mask(4)
        } else {
            mask(2)
        }
    }

    /// RSP with the stack pointer `sp`, where it was `old`: a 16-bit stack leaves the upper bits.
    pub fn merge(&self, old: u64, sp: u64) -> u64 {
        let width = self.mask();
        if width == 0xffff {
            old & !width | sp & width
        } else {
            sp & width
        }
    }
}

/// What is pushed at once, first push first.
pub struct Frame {
    size: usize,
    items: [u64; Frame::MAX],
    count: usize,
}

impl Frame {
    /// Most items: 31 parameters of a call gate and the return frame.
    pub const MAX: usize = 36;

    /// A frame of items of `size` bytes.
    pub fn new(size: usize) -> Self {
        Frame { size, items: [0; Frame::MAX], count: 0 }
    }

    /// Pushes an item.
    pub fn push(&mut self, value: u64) {
        self.items[self.count] = value;
        self.count += 1;
    }
}
