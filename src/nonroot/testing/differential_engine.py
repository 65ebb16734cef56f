"""The engine under test: runs the host runner's cases in a vCPU whose page tables map the same memory.

The vCPU is in long mode at CPL 3, with Linux's selectors for flat user segments, so that selectors and error codes
compare too. Physical frames are handed out in reverse order: nothing works by accident of identity mapping.
"""

import mmap
import os
import struct
from typing import Any

from nonroot import _engine
from nonroot.engines.policy import CRYSTAL_HZ, FEATURES, CpuPolicy
from nonroot.testing.differential_case import (
    CODE_BASE,
    CODE_BYTES,
    DATA_BYTES,
    DATA_REGIONS,
    END,
    PAGE,
    XSAVE_BYTES,
    Case,
    Result,
)  # fmt: skip
from nonroot.testing.generator_codes import host_flags

#: Linux's GDT as user code sees it: entries 4, 5, 6 (32-bit code, data, 64-bit code); 2 and 3 are the kernel's.
GDT = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
GDT_ENTRIES = 16
#: Offset of the TSS in the GDT's page.
_TSS = 0x800

_CODE64 = (0x33, 0, 0xFFFF_FFFF, 0xA0FB)
_CODE32 = (0x23, 0, 0xFFFF_FFFF, 0xC0FB)
_DATA = (0x2B, 0, 0xFFFF_FFFF, 0xC0F3)
_NULL = 0x10000

#: Instructions after which a case is given up: more than any sequence of the generator takes.
LIMIT = 100_000

_P, _W, _U, _NX = 1, 2, 4, 1 << 63


def _features() -> frozenset[str]:
    host = host_flags()
    return frozenset(name for name, feature in FEATURES.items() if not feature.native or name in host)


class EngineCpu:
    """Runs cases in one vCPU. ``off``: optimisations to switch off."""

    def __init__(self, off: tuple[str, ...] = ()) -> None:
        self.off = off
        frames = 64
        self._fd = os.memfd_create("nonroot-differential")
        os.ftruncate(self._fd, frames * PAGE)
        self._ram = mmap.mmap(self._fd, frames * PAGE)
        self._memory = _engine.Memory()
        backing = self._memory.add_backing(self._fd, frames * PAGE)
        self._memory.map(0, frames, backing, 0)
        self._free = list(range(1, frames))
        self._cr3 = self._free.pop() * PAGE
        self._code: list[int] = []
        self._data: list[tuple[int, int]] = []
        for n in range(CODE_BYTES // PAGE):
            self._code.append(self._map(CODE_BASE + n * PAGE, _P | _U))
        offset = 0
        for base, pages in DATA_REGIONS:
            writable = base != DATA_REGIONS[1][0]
            for n in range(pages):
                gpa = self._map(base + n * PAGE, _P | _U | _NX | (_W if writable else 0))
                self._data.append((gpa, offset))
                offset += PAGE
        assert offset == DATA_BYTES
        self._gdt_linear = 0xFFFF_8000_0000_0000
        gdt = self._map(self._gdt_linear, _P | _W | _NX)
        self._ram[gdt : gdt + 8 * len(GDT)] = struct.pack(f"<{len(GDT)}Q", *GDT)
        # A TSS without an I/O permission bitmap: its base (offset 0x66) lies beyond the limit.
        self._ram[gdt + _TSS + 0x66 : gdt + _TSS + 0x68] = b"\xff\xff"
        for gpa in self._code:
            self._ram[gpa : gpa + PAGE] = bytes([END]) * PAGE
        policy = CpuPolicy.build(host_flags(), enable=_features() & {"sha_ni", "vaes", "vpclmulqdq", "gfni"})
        options: dict[str, Any] = {
            "tsc_khz": policy.tsc_khz, "apic_bus_hz": CRYSTAL_HZ, "off": list(off), "exception_exits": 0xFFFF_FFFF,
        }  # fmt: skip
        self.vcpu = _engine.Vcpu(
            self._memory, 0, list[tuple[int, int, int, int, int, int]](policy.cpuid()), policy.msrs(), options
        )
        self._base = self._initial_state()
        self._dirty: list[tuple[int, int]] = []

    def set_gdt_entry(self, number: int, descriptor: int) -> None:
        """Makes a GDT entry what the host has there."""
        gpa = self._memory_address(self._gdt_linear)
        self._ram[gpa + 8 * number : gpa + 8 * number + 8] = struct.pack("<Q", descriptor)

    def close(self) -> None:
        """Releases the memory."""
        self._ram.close()
        os.close(self._fd)

    def _memory_address(self, linear: int) -> int:
        table = self._cr3
        for shift in (39, 30, 21, 12):
            at = table + (linear >> shift & 0x1FF) * 8
            table = struct.unpack_from("<Q", self._ram, at)[0] & 0x000F_FFFF_FFFF_F000
        return int(table)

    def _map(self, linear: int, rights: int) -> int:
        """Maps a fresh frame; returns its guest-physical address."""
        table = self._cr3
        for shift in (39, 30, 21):
            at = table + (linear >> shift & 0x1FF) * 8
            entry = struct.unpack_from("<Q", self._ram, at)[0]
            if not entry & _P:
                entry = self._free.pop() * PAGE | _P | _W | _U
                struct.pack_into("<Q", self._ram, at, entry)
            table = entry & 0x000F_FFFF_FFFF_F000
        gpa = self._free.pop() * PAGE
        struct.pack_into("<Q", self._ram, table + (linear >> 12 & 0x1FF) * 8, gpa | rights)
        return gpa

    def _initial_state(self) -> dict[str, Any]:
        state = self.vcpu.state()
        state.update(
            cr0=0x8005_0033,  # PG AM WP NE ET MP PE
            cr2=0,
            cr3=self._cr3,
            cr4=0x35_06A0,  # PAE PGE OSFXSR OSXMMEXCPT FSGSBASE OSXSAVE SMEP SMAP
            efer=0xD01,  # NXE LMA LME SCE
            xcr0=7,
            gdtr=(self._gdt_linear, GDT_ENTRIES * 8 - 1),
            idtr=(0, 0),
        )
        return state

    def run(self, cases: list[Case], template: bytes) -> list[Result]:
        """Runs ``cases``, each on data pages that start as ``template``."""
        return [self.run_case(case, case.data(template)) for case in cases]

    def _write_code(self, case: Case) -> None:
        write = self._memory.write
        for gpa, length in self._dirty:
            write(gpa, bytes([END]) * length)
        self._dirty.clear()
        offset = case.rip - CODE_BASE
        code = case.code
        while code:
            page, within = divmod(offset, PAGE)
            part = code[: PAGE - within]
            gpa = self._code[page] + within
            write(gpa, part)
            self._dirty.append((gpa, len(part)))
            code = code[len(part) :]
            offset += len(part)

    def run_case(self, case: Case, data: bytes | bytearray) -> Result:
        """Runs one case on the given data pages."""
        self._write_code(case)
        for gpa, offset in self._data:
            self._ram[gpa : gpa + PAGE] = data[offset : offset + PAGE]
        state = self._base
        flat = _DATA if case.compat else (0, 0, 0, _NULL)
        state["segments"] = (
            flat,
            _CODE32 if case.compat else _CODE64,
            _DATA,
            flat,
            (0, case.fs_base, 0, _NULL),
            (0, case.gs_base, 0, _NULL),
            (0, 0, 0, _NULL),
            (0x40, self._gdt_linear + _TSS, 0x67, 0x8B),
        )
        state["gpr"] = tuple(case.gpr)
        state["rip"] = case.rip
        state["rflags"] = case.rflags
        state["fx"] = case.vector[:512]
        state["ymm_high"] = case.vector[576:]
        vcpu = self.vcpu
        vcpu.set_state(state)
        exit_ = vcpu.run(None, state["retired"] + LIMIT)
        after = vcpu.state()
        status, reason, vector, error, cr2 = "fault", "", 0, 0, 0
        if exit_[0] == 10:
            vector, error = exit_[1], exit_[2] or 0
            cr2 = exit_[3] if vector == 14 else 0
        elif exit_[0] == 15:
            status = "timeout"
        else:
            status, reason = "failure", f"exit {exit_}"
        rip = after["rip"]
        segments = after["segments"]
        return Result(
            status=status,
            vector_number=vector,
            error=error,
            cr2=cr2,
            rip=rip,
            rflags=after["rflags"],
            gpr=list(after["gpr"]),
            fs_base=segments[4][1],
            gs_base=segments[5][1],
            selectors=[segments[n][0] for n in (1, 2, 3, 0, 4, 5)],
            vector=after["fx"][:416] + bytes(96) + b"\x07" + bytes(63) + after["ymm_high"],
            data=b"".join(self._ram[gpa : gpa + PAGE] for gpa, _ in self._data),
            reason=reason,
        )


assert XSAVE_BYTES == 512 + 64 + 256
