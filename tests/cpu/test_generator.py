"""What the generator makes: reproducible, safe to run on the host, varied."""

from __future__ import annotations

import pytest
from iced_x86 import Decoder

from nonroot.testing.differential_case import CODE_BASE, CODE_BYTES
from nonroot.testing.differential_compare import undefined_flags
from nonroot.testing.generator import Generator, has_forbidden_bytes
from nonroot.testing.generator_codes import FORBIDDEN, usable_codes


@pytest.mark.parametrize("bits", [64, 32])
def test_a_number_makes_the_same_case_again(bits: int) -> None:
    one, two = Generator(5, bits), Generator(5, bits)
    two.case(3)  # what else was made does not matter
    assert one.template == two.template
    assert one.case(77) == two.case(77)
    assert one.case(77) != Generator(6, bits).case(77)


@pytest.mark.parametrize("bits", [64, 32])
def test_nothing_leaves_user_code(bits: int) -> None:
    generator = Generator(7, bits)
    for index in range(1500):
        case, _ = generator.case(index)
        assert not has_forbidden_bytes(case.code)
        assert case.rip >= CODE_BASE
        assert case.rip + len(case.code) <= CODE_BASE + CODE_BYTES
        for start in case.starts[:-1]:
            instruction = Decoder(bits, case.code[start - case.rip :], ip=start).decode()
            assert instruction.mnemonic not in FORBIDDEN
            assert undefined_flags(case, start) & ~0x8D5 == 0


def test_every_code_and_addressing_form_comes_up() -> None:
    generator = Generator(8)
    codes: set[int] = set()
    forms: set[tuple[bool, bool, int, int]] = set()
    for index in range(6_000):
        case, made = generator.case(index)
        codes.update(made)
        for instruction in Decoder(64, case.code, ip=case.rip):
            if instruction.memory_base or instruction.memory_index:
                base, index_register = bool(instruction.memory_base), bool(instruction.memory_index)
                scale = instruction.memory_index_scale if index_register else 1
                forms.add((base, index_register, scale, instruction.memory_displ_size))
    usable = {info.code for info in usable_codes(64)}
    assert len(codes & usable) > 0.97 * len(usable)
    assert len(usable) > 1900
    for scale in (1, 2, 4, 8):
        for displacement in (0, 1, 8):
            assert (True, True, scale, displacement) in forms
    assert (True, False, 1, 1) in forms
    assert (False, True, 4, 8) in forms
