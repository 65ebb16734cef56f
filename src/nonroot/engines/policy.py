"""
Which CPU guests see: CPUID leaves, model-specific registers at reset, clock rates.

The CPU is an Intel-compatible one of family 6 with the features of :data:`FEATURES` that the engine implements. Vector
features that the engine runs natively exist only where the host has them. ``IA32_ARCH_CAPABILITIES`` says that it is
not vulnerable to what mitigations are for, which is true of engines that do not speculate on guest instructions, so
that guests do not slow themselves down. Linux does not rely on ``BHI_NO`` and would clear the branch history at every
system call; with ``bhi_ctrl`` it sets a bit once instead, BHI_DIS_S of IA32_SPEC_CTRL, which has no effect here.

Sources: Intel SDM volume 2A, CPUID; volume 4, model-specific registers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from nonroot.errors import BadOptionError

if TYPE_CHECKING:
    from nonroot.engines.protocol import Engine

__all__ = ["ANY_SUBLEAF", "FEATURES", "CpuPolicy", "CpuidLeaf", "Feature"]

ANY_SUBLEAF: Final = 0xFFFF_FFFF
"""The subleaf of :class:`CpuidLeaf` that answers all of a leaf."""

PHYSICAL_BITS: Final = 40
"""Guest-physical address bits."""

CRYSTAL_HZ: Final = 25_000_000
"""The crystal of CPUID 0x15, which also clocks the local APIC's timer."""


class CpuidLeaf(NamedTuple):
    """One answer of CPUID."""

    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class Feature(NamedTuple):
    """A CPUID bit by the name that /proc/cpuinfo has for it."""

    leaf: int
    subleaf: int
    register: str
    bit: int
    #: Features without which it makes no sense.
    needs: tuple[str, ...] = ()
    #: Executed natively: the host must have it.
    native: bool = False
    #: On unless switched off.
    default: bool = True


def _leaf(leaf: int, register: str, subleaf: int = 0, /, **bits: int) -> dict[str, Feature]:
    return {name: Feature(leaf, subleaf, register, bit) for name, bit in bits.items()}


def _vector(leaf: int, register: str, bit: int, *needs: str, default: bool = True) -> Feature:
    return Feature(leaf, 0, register, bit, needs, native=True, default=default)


FEATURES: Final[Mapping[str, Feature]] = {
    **_leaf(1, "edx", fpu=0, de=2, pse=3, tsc=4, msr=5, pae=6, mce=7, cx8=8, apic=9, sep=11, mtrr=12, pge=13, mca=14),
    **_leaf(1, "edx", cmov=15, pat=16, pse36=17, clflush=19, mmx=23, fxsr=24, sse=25, sse2=26),
    "pni": _vector(1, "ecx", 0),
    "pclmulqdq": _vector(1, "ecx", 1),
    "ssse3": _vector(1, "ecx", 9, "pni"),
    "fma": _vector(1, "ecx", 12, "avx"),
    **_leaf(1, "ecx", cx16=13, pcid=17),
    "sse4_1": _vector(1, "ecx", 19, "ssse3"),
    "sse4_2": _vector(1, "ecx", 20, "sse4_1"),
    **_leaf(1, "ecx", x2apic=21, movbe=22, popcnt=23, tsc_deadline_timer=24),
    "aes": _vector(1, "ecx", 25),
    **_leaf(1, "ecx", xsave=26),
    "avx": _vector(1, "ecx", 28, "xsave", "sse4_2"),
    "f16c": _vector(1, "ecx", 29, "avx"),
    **_leaf(1, "ecx", rdrand=30, hypervisor=31),
    **_leaf(6, "eax", arat=2),
    **_leaf(7, "ebx", fsgsbase=0, tsc_adjust=1, bmi1=3),
    "avx2": _vector(7, "ebx", 5, "avx"),
    **_leaf(7, "ebx", smep=7, bmi2=8, erms=9),
    "invpcid": Feature(7, 0, "ebx", 10, ("pcid",)),
    **_leaf(7, "ebx", zero_fcs_fds=13, rdseed=18, adx=19, smap=20, clflushopt=23),
    **_leaf(7, "ecx", umip=2),
    "gfni": _vector(7, "ecx", 8, default=False),
    "vaes": _vector(7, "ecx", 9, "avx", "aes", default=False),
    "vpclmulqdq": _vector(7, "ecx", 10, "avx", "pclmulqdq", default=False),
    "sha_ni": _vector(7, "ebx", 29, "ssse3"),
    **_leaf(7, "edx", fsrm=4, spec_ctrl=26, arch_capabilities=29),
    "bhi_ctrl": Feature(7, 2, "edx", 4, ("spec_ctrl",)),
    **{name: Feature(0xD, 1, "eax", bit, ("xsave",)) for name, bit in (("xsaveopt", 0), ("xsavec", 1), ("xgetbv1", 2))},
    **_leaf(0x80000001, "ecx", lahf_lm=0, abm=5),
    "3dnowprefetch": Feature(0x80000001, 0, "ecx", 8),
    **_leaf(0x80000001, "edx", syscall=11, nx=20, pdpe1gb=26, rdtscp=27, lm=29),
    **_leaf(0x80000007, "edx", nonstop_tsc=8),
}
"""Every feature that can be switched, by name. ``vaes``, ``vpclmulqdq`` and ``gfni`` are off by default."""

_REQUIRED: Final = frozenset("fpu tsc msr pae cx8 apic cmov mmx fxsr sse sse2 hypervisor".split())

# IA32_ARCH_CAPABILITIES, by bit: RDCL_NO 0, IBRS_ALL 1, SKIP_L1DFL_VMENTRY 3, SSB_NO 4, MDS_NO 5, IF_PSCHANGE_MC_NO 6,
# TAA_NO 8, SBDR_SSDP_NO 13, FBSDP_NO 14, PSDP_NO 15, BHI_NO 20, PBRSB_NO 24, GDS_NO 26, RFDS_NO 27, ITS_NO 62.
_ARCH_CAPABILITIES: Final = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62))

_WB8: Final = 0x0606_0606_0606_0606
_PHYSICAL_MASK: Final = (1 << PHYSICAL_BITS) - 1
_HOLE: Final = 0xC000_0000


@dataclass(frozen=True)
class CpuPolicy:
    """
    The CPU of a domain; make one with :meth:`build`.

    Bits and numbers that change at run time (OSXSAVE, the APIC enable bit, APIC IDs, the current XSAVE size) are the
    engine's business.
    """

    #: Names in :data:`FEATURES`.
    features: frozenset[str]
    #: Number of vCPUs of the domain.
    vcpus: int = 1
    #: Guest TSC frequency.
    tsc_khz: int = 1_000_000
    #: Processor brand string, up to 47 characters.
    brand: str = "nonroot virtual CPU"
    #: Family 6: model and stepping as CPUID 1 gives them.
    model: int = 0x8F
    stepping: int = 8
    #: The leaves of a hypervisor's interface at 0x40000000; nonroot's own leaf comes at 0x40000100 then.
    hypervisor: tuple[CpuidLeaf, ...] = ()
    #: More or other MSRs: index to (value at reset, mask of writable bits).
    extra_msrs: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        host_features: Iterable[str],
        *,
        only: Iterable[str] | None = None,
        enable: Iterable[str] = (),
        disable: Iterable[str] = (),
        vcpus: int = 1,
        tsc_khz: int = 1_000_000,
    ) -> Self:
        """
        The default CPU with features switched by name.

        :param host_features: the host's flags, as in /proc/cpuinfo.
        :param only: what there is at all: an engine that does not make the CPU itself has not everything.
        :param enable: features to switch on; an engine or host that lacks one is an error.
        :param disable: features to switch off; what depends on them goes too.
        :param tsc_khz: guest TSC frequency in kHz.
        :raises BadOptionError: for unknown names, features that every guest needs, or a TSC frequency that CPUID 0x15
            cannot express.
        """
        host, on, off = frozenset(host_features), frozenset(enable), frozenset(disable)
        for name in sorted(on | off):
            if name not in FEATURES:
                import difflib  # only where somebody has mistyped

                near = difflib.get_close_matches(name, FEATURES, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise BadOptionError(f"there is no CPU feature named {name}{hint}")
        if on & off:
            raise BadOptionError(f"the CPU feature {min(on & off)} is switched both on and off")
        if off & _REQUIRED:
            raise BadOptionError(f"the CPU feature {min(off & _REQUIRED)} cannot be switched off")
        present = frozenset(FEATURES if only is None else only)
        for name in sorted(on - present):
            raise BadOptionError(f"guests cannot have the CPU feature {name} under this engine, on this machine")
        for name in sorted(on):
            if FEATURES[name].native and name not in host:
                raise BadOptionError(f"this machine's CPU has no {name}, so guests cannot have it")
        chosen = {n for n, f in FEATURES.items() if (f.default or n in on) and n not in off}
        chosen = {n for n in chosen if n in present and (not FEATURES[n].native or n in host)}
        while broken := {n for n in chosen if not chosen.issuperset(FEATURES[n].needs)}:
            chosen -= broken
        for name in sorted(on - chosen):
            raise BadOptionError(f"the CPU feature {name} needs {' and '.join(FEATURES[name].needs)}")
        if not 1 <= vcpus <= 255:
            raise BadOptionError(f"a domain has 1 to 255 vCPUs, not {vcpus}")
        policy = cls(frozenset(chosen), vcpus, tsc_khz)
        policy.tsc_ratio()
        return policy

    @classmethod
    def of_engine(cls, engine: Engine, *, disable: Iterable[str] = ()) -> Self:
        """All that an engine has, but for ``disable``."""
        features = engine.cpu_features
        return cls.build(features, only=features, disable=disable, tsc_khz=engine.tsc_khz)

    def tsc_ratio(self) -> tuple[int, int]:
        """Numerator and denominator of CPUID 0x15. BadOptionError if Linux could not compute with them."""
        if not 100_000 <= self.tsc_khz <= 10_000_000:
            raise BadOptionError(f"a TSC of {self.tsc_khz} kHz is not between 100,000 and 10,000,000 kHz")
        common = gcd(self.tsc_khz, CRYSTAL_HZ // 1000)
        numerator, denominator = self.tsc_khz // common, CRYSTAL_HZ // 1000 // common
        if numerator * (CRYSTAL_HZ // 1000) >= 1 << 32:
            raise BadOptionError(f"a TSC of {self.tsc_khz} kHz is no simple multiple of the crystal's 25,000 kHz")
        return numerator, denominator

    def cpuid(self) -> list[CpuidLeaf]:
        """All leaves, in order."""
        table: dict[tuple[int, int], list[int]] = {}
        numerator, denominator = self.tsc_ratio()
        vendor = _words("GenuineIntel")
        signature = _words("nonrootHVMM\0")
        version = (self.model >> 4 & 15) << 16 | 6 << 8 | (self.model & 15) << 4 | self.stepping
        shift = (self.vcpus - 1).bit_length()
        brand = self.brand.encode("ascii", "replace")[:47].ljust(48, b"\0")
        xcr0 = 7 if "avx" in self.features else 3
        xsave = "xsave" in self.features
        size = 832 if xcr0 & 4 else 576
        mhz = self.tsc_khz // 1000
        cores = min(self.vcpus - 1, 63) << 26

        table[0, ANY_SUBLEAF] = [0x16, vendor[0], vendor[2], vendor[1]]
        # EBX: CLFLUSH line of 8 quadwords, logical processors; the engine adds the APIC ID.
        table[1, ANY_SUBLEAF] = [version, (1 << shift) << 16 | 8 << 8, 0, (self.vcpus > 1) << 28]
        table[2, ANY_SUBLEAF] = [0x76036301, 0x00F0B5FF, 0, 0x00C30000]
        table[4, 0] = [0x121 | cores, 0x01C0003F, 63, 0]  # L1 data: 32 KiB, 8 ways
        table[4, 1] = [0x122 | cores, 0x01C0003F, 63, 0]  # L1 instructions: 32 KiB, 8 ways
        table[4, 2] = [0x143 | cores, 0x03C0003F, 1023, 0]  # L2: 1 MiB, 16 ways
        table[4, 3] = [0x163 | cores | ((1 << shift) - 1) << 14, 0x03C0003F, 16383, 4]  # L3: 16 MiB, 16 ways
        table[6, ANY_SUBLEAF] = [0, 0, 0, 0]
        table[7, 0] = [2, 0, 0, 0]
        table[7, 1] = [0, 0, 0, 0]
        table[7, 2] = [0, 0, 0, 0]
        table[0xB, 0] = [0, 1, 0x100, 0]
        table[0xB, 1] = [shift, self.vcpus, 0x201, 0]
        table[0xB, ANY_SUBLEAF] = [0, 0, 0, 0]
        table[0xD, 0] = [xcr0, size, size, 0] if xsave else [0, 0, 0, 0]
        table[0xD, 1] = [0, size if xsave else 0, 0, 0]
        table[0xD, 2] = [256, 576, 0, 0] if xsave and xcr0 & 4 else [0, 0, 0, 0]
        table[0x15, ANY_SUBLEAF] = [denominator, numerator, CRYSTAL_HZ, 0]
        table[0x16, ANY_SUBLEAF] = [mhz, mhz, 100, 0]
        own = 0x40000100 if self.hypervisor else 0x40000000
        table[own, ANY_SUBLEAF] = [own, *signature]
        for entry in self.hypervisor:
            table[entry.leaf, entry.subleaf] = list(entry[2:])
        table[0x80000000, ANY_SUBLEAF] = [0x80000008, 0, 0, 0]
        table[0x80000001, ANY_SUBLEAF] = [0, 0, 0, 0]
        for i in range(3):
            table[0x80000002 + i, ANY_SUBLEAF] = list(struct.unpack_from("<4I", brand, 16 * i))
        table[0x80000006, ANY_SUBLEAF] = [0, 0, 1024 << 16 | 8 << 12 | 64, 0]
        table[0x80000007, ANY_SUBLEAF] = [0, 0, 0, 0]
        table[0x80000008, ANY_SUBLEAF] = [48 << 8 | PHYSICAL_BITS, 0, 0, 0]
        for name in self.features:
            feature = FEATURES[name]
            subleaf = feature.subleaf if (feature.leaf, feature.subleaf) in table else ANY_SUBLEAF
            table[feature.leaf, subleaf][("eax", "ebx", "ecx", "edx").index(feature.register)] |= 1 << feature.bit
        return [CpuidLeaf(leaf, subleaf, *table[leaf, subleaf]) for leaf, subleaf in sorted(table)]

    def msrs(self) -> dict[int, tuple[int, int]]:
        """
        Plain storage MSRs: index to (value at reset, mask of writable bits).

        The memory types are set up as firmware leaves them: write-back but for the hole from 3 to 4 GiB and the VGA
        window. IA32_TSC_ADJUST, IA32_PAT, EFER, the APIC's and the SYSCALL and SYSENTER registers are the engine's.
        """
        msrs = {
            0x17: (0, 0),  # IA32_PLATFORM_ID
            0x2A: (0, 0),  # EBL_CR_POWERON
            0x3A: (1, 0),  # IA32_FEATURE_CONTROL: locked
            0x8B: (0x2B00_0603 << 32, 0),  # IA32_BIOS_SIGN_ID: microcode revision
            0xCE: (self.tsc_khz // 100_000 << 8, 0),  # MSR_PLATFORM_INFO: ratio to 100 MHz
            0xFE: (0x508, 0),  # IA32_MTRRCAP: 8 variable, fixed, write-combining
            0x179: (0, 0),  # IA32_MCG_CAP: no banks
            0x17A: (0, 7),  # IA32_MCG_STATUS
            0x1A0: (0x1801, 1),  # IA32_MISC_ENABLE: fast strings; no BTS, no PEBS
            0x1D9: (0, 0),  # IA32_DEBUGCTL
            0x2FF: (0xC06, 0xCFF),  # IA32_MTRR_DEF_TYPE: on, write-back
        }
        if "arch_capabilities" in self.features:
            msrs[0x10A] = (_ARCH_CAPABILITIES, 0)
        if "spec_ctrl" in self.features:
            msrs[0x48] = (0, 0x407 if "bhi_ctrl" in self.features else 7)  # IA32_SPEC_CTRL
            msrs[0x49] = (0, 0)  # IA32_PRED_CMD
        for index in (0x250, 0x258, 0x259, *range(0x268, 0x270)):
            msrs[index] = (0 if index == 0x259 else _WB8, (1 << 64) - 1)
        for i in range(8):
            msrs[0x200 + 2 * i] = (_HOLE if i == 0 else 0, _PHYSICAL_MASK & ~0xF00)
            mask = (_PHYSICAL_MASK & ~(0x4000_0000 - 1)) | 0x800
            msrs[0x201 + 2 * i] = (mask if i == 0 else 0, _PHYSICAL_MASK & ~0x7FF)
        msrs.update(self.extra_msrs)
        return msrs


def _words(text: str) -> tuple[int, int, int]:
    first, second, third = struct.unpack("<3I", text.encode("ascii"))
    return first, second, third
