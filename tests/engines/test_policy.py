import pytest

from nonroot.engines.policy import ANY_SUBLEAF, FEATURES, CpuPolicy
from nonroot.errors import BadOptionError

ALL = frozenset(FEATURES)


def leaf(policy: CpuPolicy, number: int, subleaf: int = ANY_SUBLEAF) -> tuple[int, int, int, int]:
    for entry in policy.cpuid():
        if (entry.leaf, entry.subleaf) == (number, subleaf):
            return entry.eax, entry.ebx, entry.ecx, entry.edx
    raise AssertionError(f"no leaf {number:#x}")


def text(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def test_identity() -> None:
    policy = CpuPolicy.build(ALL)
    top, ebx, ecx, edx = leaf(policy, 0)
    assert top == 0x16
    assert text(ebx, edx, ecx) == b"GenuineIntel"
    assert leaf(policy, 1)[0] >> 8 & 15 == 6, "family"
    assert text(*leaf(policy, 0x40000000)[1:]) == b"nonrootHVMM\0"
    brand = b"".join(text(*leaf(policy, 0x80000002 + i)) for i in range(3))
    assert brand.rstrip(b"\0") == b"nonroot virtual CPU"
    assert leaf(policy, 0x80000008)[0] & 0xFF == 40
    numbers = [(entry.leaf, entry.subleaf) for entry in policy.cpuid()]
    assert numbers == sorted(set(numbers))


def test_frequencies_are_those_linux_computes_with() -> None:
    for khz in (1_000_000, 2_400_000, 2_999_975, 100_000):
        policy = CpuPolicy.build(ALL, tsc_khz=khz)
        denominator, numerator, crystal, _ = leaf(policy, 0x15)
        product = crystal // 1000 * numerator
        assert product < 1 << 32, "Linux multiplies in 32 bits"
        assert product // denominator == khz
        assert leaf(policy, 0x16)[0] == khz // 1000
    for khz in (2_999_999, 0, 10**8):
        with pytest.raises(BadOptionError, match="kHz"):
            CpuPolicy.build(ALL, tsc_khz=khz)


def test_native_features_need_the_host() -> None:
    assert "avx2" in CpuPolicy.build(ALL).features
    poor = CpuPolicy.build(ALL - {"avx"})
    assert not poor.features & {"avx", "avx2", "fma", "f16c"}
    assert "xsave" in poor.features
    assert leaf(poor, 0xD, 0)[0] == 3
    none = CpuPolicy.build(())
    assert {"lm", "sse2", "popcnt", "bmi2", "smap"} <= none.features
    assert "pni" not in none.features


def test_switching_features() -> None:
    assert "vaes" in CpuPolicy.build(ALL, enable=["vaes"]).features
    assert "vaes" not in CpuPolicy.build(ALL).features
    without = CpuPolicy.build(ALL, disable=["pcid", "xsave"])
    assert not without.features & {"pcid", "invpcid", "xsave", "xsaveopt", "avx", "avx2"}
    assert leaf(without, 0xD, 0) == (0, 0, 0, 0)
    for enable, disable, reason in [
        (["avx3"], [], "did you mean avx"),
        ([], ["fpu"], "cannot be switched off"),
        (["vaes"], ["avx"], "needs avx and aes"),
        (["smap"], ["smap"], "both on and off"),
    ]:
        with pytest.raises(BadOptionError, match=reason):
            CpuPolicy.build(ALL, enable=enable, disable=disable)
    with pytest.raises(BadOptionError, match="has no gfni"):
        CpuPolicy.build(ALL - {"gfni"}, enable=["gfni"])
    with pytest.raises(BadOptionError, match="vCPUs"):
        CpuPolicy.build(ALL, vcpus=0)


def test_topology() -> None:
    policy = CpuPolicy.build(ALL, vcpus=6)
    assert leaf(policy, 1)[1] >> 16 & 0xFF == 8
    assert leaf(policy, 1)[3] >> 28 & 1 == 1
    assert leaf(policy, 0xB, 1)[:3] == (3, 6, 0x201)
    assert leaf(CpuPolicy.build(ALL), 1)[3] >> 28 & 1 == 0


def test_no_vulnerabilities() -> None:
    value, writable = CpuPolicy.build(ALL).msrs()[0x10A]
    # RDCL_NO, IBRS_ALL, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, the three of MMIO, BHI, PBRSB, GDS, RFDS, ITS.
    for bit in (0, 1, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62):
        assert value >> bit & 1
    assert writable == 0
    # Linux does without its software mitigation of BHI if it may set BHI_DIS_S.
    assert leaf(CpuPolicy.build(ALL), 7, 0)[0] == 2
    assert leaf(CpuPolicy.build(ALL), 7, 2)[3] >> 4 & 1
    assert CpuPolicy.build(ALL).msrs()[0x48][1] >> 10 & 1
    assert CpuPolicy.build(ALL, disable=["bhi_ctrl"]).msrs()[0x48][1] == 7
    assert 0x10A not in CpuPolicy.build(ALL, disable=["arch_capabilities"]).msrs()


def test_memory_types_leave_a_hole() -> None:
    msrs = CpuPolicy.build(ALL).msrs()
    assert msrs[0x2FF][0] == 0xC06
    assert msrs[0x200][0] == 0xC0000000
    assert msrs[0x201][0] == 0xFF_C000_0800
    assert msrs[0xFE][0] & 0xFF == sum(1 for index in msrs if 0x200 <= index < 0x210 and index % 2 == 0)
    assert all(0 <= value < 1 << 64 and 0 <= mask < 1 << 64 for value, mask in msrs.values())


def test_extra_msrs() -> None:
    policy = CpuPolicy(CpuPolicy.build(ALL).features, extra_msrs={0x8B: (5, 0), 0x999: (1, 2)})
    assert (policy.msrs()[0x8B], policy.msrs()[0x999]) == ((5, 0), (1, 2))
