import dataclasses

import pytest

from nonroot.engines import exits
from nonroot.engines.exits import ExitCode, from_raw

EXAMPLES: dict[ExitCode, tuple[object, ...]] = {
    ExitCode.PORT_IO: (0x3F8, 1, True, 1, b"x"),
    ExitCode.MMIO: (0xFEC00000, 4, False, b""),
    ExitCode.HALT: (),
    ExitCode.HYPERCALL: (True,),
    ExitCode.MSR_READ: (0x10,),
    ExitCode.MSR_WRITE: (0x10, 5),
    ExitCode.CPUID: (1, 0),
    ExitCode.IOAPIC_EOI: (0x31,),
    ExitCode.PIC_ACKNOWLEDGE: (),
    ExitCode.INTERRUPT_WINDOW: (),
    ExitCode.EXCEPTION: (14, 2, 0x1000),
    ExitCode.CR_WRITE: (3, 0x1000),
    ExitCode.DEBUG: (0x4000,),
    ExitCode.TRIPLE_FAULT: (),
    ExitCode.IPI: (0x31, 0, 3, False, False, True, 1),
    ExitCode.INTERRUPTED: (),
    ExitCode.FAILURE: ("why",),
}


@pytest.mark.parametrize("code", ExitCode)
def test_every_exit(code: ExitCode) -> None:
    record = from_raw((int(code), *EXAMPLES[code]))
    assert record.code is code
    assert dataclasses.astuple(record) == EXAMPLES[code]
    assert record == from_raw((int(code), *EXAMPLES[code]))
    assert type(record).__name__ in exits.__all__
    if code not in (ExitCode.PORT_IO, ExitCode.MMIO):  # these two are not frozen, for speed
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            record.port = 5  # type: ignore[union-attr]


@pytest.mark.parametrize("raw", [(), (17,), (-1,), (2, 5), (0, 1), ("x",)])
def test_what_is_no_exit(raw: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="is no exit"):
        from_raw(raw)
