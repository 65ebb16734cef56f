"""Which instructions the generator makes: a table over iced's instruction codes.

Everything that user code may run is in, except what would leave the test (system calls), what has no
reproducible result (time, randomness, the host's identity) and what the host's CPU or the guest's lacks.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from iced_x86 import Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpCodeInfo, OpCodeOperandKind

#: Never emitted, not even by chance: they enter the kernel, the hypervisor or another mode of the CPU.
FORBIDDEN = frozenset({
    Mnemonic.SYSCALL, Mnemonic.SYSENTER, Mnemonic.SYSEXIT, Mnemonic.SYSRET, Mnemonic.SYSEXITQ, Mnemonic.SYSRETQ,
    Mnemonic.INT, Mnemonic.INT1, Mnemonic.INT3, Mnemonic.VMCALL, Mnemonic.VMMCALL, Mnemonic.VMGEXIT,
    Mnemonic.VMFUNC, Mnemonic.TDCALL, Mnemonic.SEAMCALL, Mnemonic.SEAMRET, Mnemonic.SEAMOPS, Mnemonic.ENCLU,
    Mnemonic.ENCLS, Mnemonic.ENCLV, Mnemonic.GETSEC, Mnemonic.RSM, Mnemonic.SKINIT, Mnemonic.STGI, Mnemonic.CLGI,
    Mnemonic.VMRUN, Mnemonic.VMLOAD, Mnemonic.VMSAVE, Mnemonic.INVLPGA, Mnemonic.INVLPGB, Mnemonic.TLBSYNC,
    Mnemonic.UIRET, Mnemonic.SENDUIPI, Mnemonic.STUI, Mnemonic.CLUI, Mnemonic.TESTUI, Mnemonic.XBEGIN,
    Mnemonic.XEND, Mnemonic.XABORT, Mnemonic.XTEST, Mnemonic.LOADALL, Mnemonic.DMINT, Mnemonic.RDM, Mnemonic.SVDC,
    Mnemonic.ERETU, Mnemonic.ERETS, Mnemonic.LKGS,
})  # fmt: skip

#: No comparable result: time, randomness, identity, state of the host that its kernel decides or emulates.
UNCOMPARABLE = frozenset({
    Mnemonic.CPUID, Mnemonic.RDTSC, Mnemonic.RDTSCP, Mnemonic.RDRAND, Mnemonic.RDSEED, Mnemonic.RDPID,
    Mnemonic.RDPMC, Mnemonic.RDPRU, Mnemonic.XGETBV, Mnemonic.XSETBV, Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT,
    Mnemonic.STR, Mnemonic.SMSW, Mnemonic.MONITOR, Mnemonic.MWAIT, Mnemonic.MONITORX, Mnemonic.MWAITX,
    Mnemonic.UMONITOR, Mnemonic.UMWAIT, Mnemonic.TPAUSE, Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR,
    Mnemonic.FXRSTOR64, Mnemonic.XSAVE, Mnemonic.XSAVE64, Mnemonic.XSAVEOPT, Mnemonic.XSAVEOPT64, Mnemonic.XSAVEC,
    Mnemonic.XSAVEC64, Mnemonic.XSAVES, Mnemonic.XSAVES64, Mnemonic.XRSTOR, Mnemonic.XRSTOR64, Mnemonic.XRSTORS,
    Mnemonic.XRSTORS64, Mnemonic.MCOMMIT, Mnemonic.CLZERO, Mnemonic.WBNOINVD, Mnemonic.PCONFIG, Mnemonic.WRPKRU,
    Mnemonic.RDPKRU, Mnemonic.INCSSPD, Mnemonic.INCSSPQ, Mnemonic.RDSSPD, Mnemonic.RDSSPQ,
    # The x87 environment holds instruction and operand pointers, which AMD's and Intel's CPUs fill differently.
    Mnemonic.FSTENV, Mnemonic.FNSTENV, Mnemonic.FSAVE, Mnemonic.FNSAVE, Mnemonic.FLDENV, Mnemonic.FRSTOR,
})  # fmt: skip

#: Vendors differ, so that a host's answer judges nothing.
#: * far pointers with 64-bit offsets: AMD ignores REX.W there;
#: * UD0: AMD has no ModRM byte after it, which shows where the instruction crosses into a missing page;
#: * 0F 0D with a register: #UD on AMD, a no-operation on Intel;
#: * loads of FS and GS: AMD keeps the base when a null selector is loaded;
#: * 32-bit pushes of segment registers: Intel writes two bytes, AMD four;
#: * BSWAP of 16 bits and MOVSXD to 16 bits: undefined, or of another operand size.
VENDOR_DEPENDENT = frozenset({
    "JMP_M1664", "CALL_M1664", "LSS_R64_M1664", "LFS_R64_M1664", "LGS_R64_M1664", "LFS_R16_M1616", "LFS_R32_M1632",
    "LGS_R16_M1616", "LGS_R32_M1632", "POPW_FS", "POPW_GS", "POPD_FS", "POPD_GS", "POPQ_FS", "POPQ_GS", "BSWAP_R16",
    "MOVSXD_R16_RM16", "PUSHD_ES", "PUSHD_CS", "PUSHD_SS", "PUSHD_DS", "PUSHD_FS", "PUSHD_GS",
    *(name for name in dir(Code) if name.startswith("UD0_") or name.endswith("_0F0D")),
})  # fmt: skip

#: iced's feature -> flag of /proc/cpuinfo ("" for what every x86-64 has).
_FEATURES = {
    "INTEL8086": "", "INTEL186": "", "INTEL286": "", "INTEL386": "", "INTEL486": "", "X64": "", "CMOV": "",
    "CX8": "", "CMPXCHG16B": "cx16", "FPU": "", "FPU287": "", "FPU387": "", "MMX": "", "SSE": "", "SSE2": "",
    "SSE3": "pni", "SSSE3": "ssse3", "SSE4_1": "sse4_1", "SSE4_2": "sse4_2", "AES": "aes", "PCLMULQDQ": "pclmulqdq",
    "AVX": "avx", "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "BMI1": "bmi1", "BMI2": "bmi2", "LZCNT": "abm",
    "ADX": "adx", "MOVBE": "movbe", "POPCNT": "popcnt", "FSGSBASE": "fsgsbase",
    "MULTIBYTENOP": "", "PAUSE": "", "CLFSH": "clflush", "CLFLUSHOPT": "clflushopt", "CLWB": "clwb",
    "PREFETCHW": "3dnowprefetch", "SHA": "sha_ni", "CPUID": "", "MSR": "", "TSC": "", "SMM": "", "INVPCID": "invpcid",
    "VAES": "vaes", "VPCLMULQDQ": "vpclmulqdq", "GFNI": "gfni", "WBNOINVD": "", "SMAP": "",
}  # fmt: skip


@functools.cache
def host_flags() -> frozenset[str]:
    """The host CPU's flags as Linux names them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":")[1].split())
    return frozenset()


@functools.cache
def allowed_features(everywhere: bool = False) -> frozenset[int]:
    """iced's features that both the host and the guests' CPU have; ``everywhere``: whatever this host has."""
    flags = host_flags()
    return frozenset(
        int(getattr(CpuidFeature, name)) for name, flag in _FEATURES.items() if everywhere or not flag or flag in flags
    )


@dataclass(frozen=True, slots=True)
class CodeInfo:
    """What the generator needs to know about one instruction code."""

    code: int
    name: str
    mnemonic: int
    kinds: tuple[int, ...]
    vector: bool
    system: bool
    lockable: bool
    repeatable: bool
    string: bool
    vex: bool


_VECTOR_FEATURES = frozenset(
    int(getattr(CpuidFeature, name))
    for name in (
        "FPU", "FPU287", "FPU387", "MMX", "SSE", "SSE2", "SSE3", "SSSE3", "SSE4_1", "SSE4_2", "AES", "PCLMULQDQ",
        "AVX", "AVX2", "FMA", "F16C", "SHA", "VAES", "VPCLMULQDQ", "GFNI",
    )
)  # fmt: skip
_NOT_VECTOR = frozenset({
    Mnemonic.MOVNTI, Mnemonic.LFENCE, Mnemonic.SFENCE, Mnemonic.MFENCE, Mnemonic.CRC32, Mnemonic.PAUSE,
    Mnemonic.PREFETCHNTA, Mnemonic.PREFETCHT0, Mnemonic.PREFETCHT1, Mnemonic.PREFETCHT2, Mnemonic.POPCNT,
})  # fmt: skip
_STRING_KINDS = frozenset({OpCodeOperandKind.SEG_RSI, OpCodeOperandKind.ES_RDI})


def features_of(code: int) -> frozenset[int]:
    """CPUID features that a code needs."""
    return _features()[code]


@functools.cache
def _features() -> dict[int, frozenset[int]]:
    instruction = Instruction()
    table = {}
    for value in _names():
        instruction.code = value  # type: ignore[assignment]
        table[value] = frozenset(int(feature) for feature in instruction.cpuid_features())
    return table


@functools.cache
def code_name(code: int) -> str:
    """iced's name of a code, such as ADD_RM64_R64."""
    return _names()[code]


@functools.cache
def _numbers() -> dict[str, int]:
    return {name.upper(): code for code, name in _names().items()}


def code_number(name: str) -> int:
    """The code of a name in Rust's or Python's spelling."""
    return _numbers()[name.upper()]


@functools.cache
def _names() -> dict[int, str]:
    return {int(getattr(Code, name)): name for name in dir(Code) if name.isupper() and name[0] != "_"}


@functools.cache
def usable_codes(bits: int, everywhere: bool = False) -> tuple[CodeInfo, ...]:
    """The codes to generate in 64- or 32-bit mode, in iced's order; ``everywhere``: as if the host had everything."""
    allowed = allowed_features(everywhere)
    table = []
    for value, name in sorted(_names().items()):
        info = OpCodeInfo(value)  # type: ignore[arg-type]
        if not info.is_instruction or not info.is_available_in_mode(bits) or info.fwait:
            continue
        if info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
            continue
        features = features_of(value)
        if not features <= allowed or not (info.intel_decoder64 if bits == 64 else info.intel_decoder32):
            continue
        if not (info.amd_decoder64 if bits == 64 else info.amd_decoder32):
            continue
        if info.mnemonic in FORBIDDEN or info.mnemonic in UNCOMPARABLE or name in VENDOR_DEPENDENT:
            continue
        if info.decoder_option:  # needs a special decoder: not of a CPU that we model
            continue
        kinds = tuple(int(kind) for kind in info.op_kinds())
        vector = bool(features & _VECTOR_FEATURES) and info.mnemonic not in _NOT_VECTOR
        table.append(
            CodeInfo(
                code=value,
                name=name,
                mnemonic=int(info.mnemonic),
                kinds=kinds,
                vector=vector,
                system=info.must_be_cpl0 or info.is_privileged or info.is_input_output,
                lockable=info.can_use_lock_prefix,
                repeatable=info.can_use_rep_prefix or info.can_use_repne_prefix,
                string=any(kind in _STRING_KINDS for kind in kinds) and info.op_code_len == 1,
                vex=info.encoding == EncodingKind.VEX,
            )
        )
    return tuple(table)
