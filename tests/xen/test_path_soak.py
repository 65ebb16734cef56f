"""Long sequences of steps and requests, others in each round: the engine's part of Xen against Python's."""

import os
import random

import pytest

from tests.xen.test_path import PORTS, Side

STEPS = "unbound loopback ipi virq close send send send unmask timer mask take look bind bind unbind notify".split()
ROUNDS = 150


def _soak(seed: int) -> int:
    chooser = random.Random(seed)
    long = bool(seed % 2)
    ours, judge = Side(True, long), Side(False, long)
    try:
        for number in range(200):
            step = chooser.choice(STEPS), chooser.randrange(PORTS + 1), chooser.randrange(4)
            if step[0] == "notify" and judge.backends:
                # A backend that has closed its end raises nothing; the engine is only asked for ports that are bound.
                backend = judge.backends[step[2] % len(judge.backends)][0]
                if judge.host.channels.status(backend.guest_port).backend is not backend:
                    continue
            what = (seed, number, step)
            assert ours.do(*step) == judge.do(*step), what
            assert bytes(ours.page[: 8 + 64]) == bytes(judge.page[: 8 + 64]), what
            assert bytes(ours.page[2048:3072]) == bytes(judge.page[2048:3072]), what
            assert ours.bells() == judge.bells(), what
        return ours.served
    finally:
        ours.close()
        judge.close()


@pytest.mark.soak
def test_other_steps_end_as_in_python() -> None:
    round_ = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
    assert sum(_soak(round_ * ROUNDS + number) for number in range(ROUNDS)) > 0
