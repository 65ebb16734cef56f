"""The state in which a vCPU enters a kernel."""

from dataclasses import dataclass, field, replace
from typing import Final

from nonroot.engines.state import Segment, TableRegister, VcpuState

__all__ = ["EntryState"]

GPR_NAMES: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")

CR0_PE: Final = 1 << 0
CR0_ET: Final = 1 << 4
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
RFLAGS_FIXED: Final = 1 << 1

FLAT_LIMIT: Final = 0xFFFF_FFFF
CODE_32: Final = 0xC09B
CODE_64: Final = 0xA09B
DATA: Final = 0xC093
TSS_BUSY: Final = 0x8B
TSS_LIMIT: Final = 0x67
UNUSABLE: Final = 0x1_0000

# The local APIC's record: offsets of SVR, LINT0 and LINT1 (the table is in rust/lapic/src/record.rs).
LAPIC_MAGIC: Final = b"LAPC\x01\0\0\0"
VIRTUAL_WIRE: Final = ((32, 0x1FF), (72, 0x700), (76, 0x400))
"""Enabled by software, LINT0 ExtINT, LINT1 NMI: the PIC's interrupts reach a kernel that does not know the APIC."""


def virtual_wire(lapic: bytes) -> bytes:
    """The local APIC's record as firmware leaves the bootstrap processor. ValueError if it is of another version."""
    if not lapic.startswith(LAPIC_MAGIC):
        raise ValueError("the local APIC's record is of an unknown version")
    record = bytearray(lapic)
    for offset, value in VIRTUAL_WIRE:
        record[offset : offset + 4] = value.to_bytes(4, "little")
    return bytes(record)


@dataclass(frozen=True, slots=True)
class EntryState:
    """Flat 32-bit protected mode without paging, or 64-bit mode; interrupts off."""

    rip: int
    registers: dict[str, int] = field(default_factory=dict)
    """Values of rax … rdi; the others are zero."""
    long_mode: bool = False
    cr3: int = 0
    """Page tables, for 64-bit mode."""
    gdt: tuple[int, int] = (0, 0)
    """Base and limit of the GDT, if the protocol asks for one."""
    code_selector: int = 0
    data_selector: int = 0

    def apply(self, state: VcpuState) -> VcpuState:
        """``state`` (of a bootstrap processor after reset) as firmware and loader leave it for the kernel."""
        code = Segment(self.code_selector, 0, FLAT_LIMIT, CODE_64 if self.long_mode else CODE_32)
        data = Segment(self.data_selector, 0, FLAT_LIMIT, DATA)
        no_ldt = Segment(0, 0, 0, UNUSABLE)
        task = Segment(0, 0, TSS_LIMIT, TSS_BUSY)
        gpr = tuple(self.registers.get(name, 0) for name in GPR_NAMES) + (0,) * 8
        return replace(
            state,
            gpr=gpr,
            rip=self.rip,
            rflags=RFLAGS_FIXED,
            segments=(data, code, data, data, data, data, no_ldt, task),
            gdtr=TableRegister(*self.gdt),
            idtr=TableRegister(0, 0),
            cr0=CR0_PE | CR0_ET | (CR0_PG if self.long_mode else 0),
            cr2=0,
            cr3=self.cr3,
            cr4=CR4_PAE if self.long_mode else 0,
            efer=EFER_LME | EFER_LMA if self.long_mode else 0,
            lapic=virtual_wire(state.lapic),
            activity=0,
            shadow=0,
        ).check()
