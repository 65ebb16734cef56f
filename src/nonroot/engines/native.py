"""The Rust engines behind :mod:`nonroot.engines.protocol`: it turns records into plain values and back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nonroot import _engine
from nonroot.engines.exits import Exit, from_raw
from nonroot.engines.policy import CRYSTAL_HZ, FEATURES, CpuPolicy
from nonroot.engines.protocol import Capability, CapabilityError, EngineOptions
from nonroot.engines.select import host_flags
from nonroot.engines.state import StateError, VcpuState
from nonroot.errors import BadOptionError

__all__ = ["AUDIT", "InterpretEngine", "LockstepEngine", "NativeVcpu", "TranslateEngine"]


SWITCHES: Final = "NONROOT_TRANSLATE"
"""Environment variable: ``-chain,-page-groups`` switches these optimisations off, as ``--off`` does."""

XEN_PATH: Final = "xen-path"
"""The optimisation that serves a part of Xen in the engine."""

AUDIT: Final = "NONROOT_AUDIT"
"""
Environment variable: a number N makes the engines compare all that they have cached (translations, decoded code, where
jumps lead) with the guest's page tables, the p2m and the bytes in memory at every Nth exit, time slice and
invalidation. A difference ends the domain with an internal error. For tests: it is slow.
"""


WINDOWS_AFTER: Final = "NONROOT_WINDOWS_AFTER"
"""
Environment variable: instructions after which user code gets windows (60000000 is sensible; 1, for tests, is at once).
Without it there are none: they are new.
"""
WINDOWS: Final = "windows"


def _number(variable: str, what: str, most: int) -> int:
    """An environment variable that is a number; 0 if there is none. BadOptionError."""
    text = os.environ.get(variable, "0")
    if not text.isascii() or not text.isdigit() or int(text) > most:
        raise BadOptionError(f"{variable} is a number of {what}, not {text}")
    return int(text)


class NativeVcpu:
    """A vCPU of a Rust engine; see :class:`nonroot.engines.protocol.Vcpu`."""

    def __init__(self, raw: _engine.Vcpu, has_xen_path: bool = False) -> None:
        self.raw: Final = raw
        self._has_xen_path = has_xen_path
        # The hot and simple calls go straight through.
        self._run = raw.run
        self.complete = raw.complete
        self.fail = raw.fail
        self.set_pic_vector = raw.set_pic_vector
        self.kick = raw.kick
        self.set_pic_line = raw.set_pic_line
        self.lapic_matches = raw.lapic_matches
        self.nmi = raw.nmi
        self.interrupt = raw.interrupt
        self.request_interrupt_window = raw.request_interrupt_window
        self.now_ns = raw.now_ns
        self.set_now_ns = raw.set_now_ns
        self.retired = raw.retired
        self.hypercall_arguments = raw.hypercall_arguments
        self.set_register = raw.set_register
        self.translate = raw.translate
        self.flush = raw.flush

    def run(self, deadline_ns: int | None = None, limit: int | None = None) -> Exit:
        return from_raw(self._run(deadline_ns, limit))

    def wait(self, deadline_ns: int | None = None) -> bool:
        return self.raw.wait(deadline_ns)

    def signal(self, vector: int, mode: int = 0, level: bool = False) -> None:
        self.raw.signal(vector, mode, level)

    def set_guest_debug(self, single_step: bool = False, breakpoints: Sequence[tuple[int, int, int]] = ()) -> None:
        self.raw.set_guest_debug(single_step, list(breakpoints))

    def state(self) -> VcpuState:
        return VcpuState.from_raw(self.raw.state())

    def set_state(self, state: VcpuState) -> None:
        state.check()
        try:
            self.raw.set_state(state.to_raw())
        except ValueError as error:
            raise StateError(str(error)) from None

    def statistics(self) -> Mapping[str, int]:
        return self.raw.statistics()

    def xen_path(self, memory: _engine.Memory, shared: tuple[int, int]) -> _engine.XenPath | None:
        """What does a part of Xen's work in the engine, for a domain with this one vCPU; None: it is switched off.

        ``shared``: (backing, offset) of the domain's shared page.
        """
        return _engine.XenPath(memory, [self.raw], shared) if self._has_xen_path else None


class InterpretEngine:
    """The portable, exact engine: the judge of the others."""

    name: str = "interpret"
    capabilities: frozenset[Capability] = frozenset(Capability)
    tsc_khz: int = 1_000_000
    _translates: bool = False
    _more: Mapping[str, Any] = {}
    _has_xen_path: bool = False

    @property
    def cpu_features(self) -> frozenset[str]:
        host = host_flags()
        return frozenset(name for name, f in FEATURES.items() if not f.native or name in host)

    def optimisations(self) -> Mapping[str, str]:
        return dict(_engine.optimisations(self._translates))

    def _switched_off(self) -> frozenset[str]:
        """Optimisations that the environment switches off."""
        return frozenset()

    def _audit(self) -> int:
        """Moments between audits, as the environment says; 0 for none."""
        return _number(AUDIT, "moments between two audits", (1 << 32) - 1)

    def create_vcpu(
        self, memory: _engine.Memory, policy: CpuPolicy, apic_id: int = 0, options: EngineOptions | None = None
    ) -> NativeVcpu:
        options = options or EngineOptions()
        for capability in sorted(options.needed() - self.capabilities):
            raise CapabilityError(self.name, capability)
        for missing in sorted(policy.features - self.cpu_features):
            raise BadOptionError(f"the {self.name} engine has no CPU feature {missing} on this machine")
        if not 0 <= apic_id < policy.vcpus:
            raise BadOptionError(f"APIC ID {apic_id} is not one of the domain's {policy.vcpus} vCPUs")
        off = options.off | self._switched_off()
        windows_after = _number(WINDOWS_AFTER, "instructions", (1 << 62) - 1) if self._translates else 0
        if self._translates and not windows_after and "windows_after" not in self._more:
            off |= {WINDOWS}
        raw_options: dict[str, Any] = {
            "tsc_khz": policy.tsc_khz,
            "apic_bus_hz": CRYSTAL_HZ,
            "virtual_time": options.virtual_time,
            "random_seed": options.random_seed,
            "off": sorted(off),
            "translate": self._translates,
            **self._more,
            "msr_exits": options.msr_exits,
            "exception_exits": sum(1 << v for v in options.exception_exits if 0 <= v < 32),
            "cr_exits": options.cr_exits,
        }
        if audit := self._audit():
            raw_options["audit"] = audit
        if windows_after:
            raw_options["windows_after"] = windows_after
        leaves = list[tuple[int, int, int, int, int, int]](policy.cpuid())
        try:
            raw = _engine.Vcpu(memory, apic_id, leaves, policy.msrs(), raw_options)
        except ValueError as error:
            raise BadOptionError(str(error)) from None
        has_xen_path = self._has_xen_path and options.virtual_time is None and XEN_PATH not in raw_options["off"]
        return NativeVcpu(raw, has_xen_path)


class TranslateEngine(InterpretEngine):
    """
    The interpreter with a translator before it: code of 64-bit and flat 32-bit mode runs on the host's own CPU.

    In virtual time, and while it is stepped or has code breakpoints, the interpreter alone runs the vCPU.
    """

    name = "translate"
    _translates = True
    _has_xen_path = True

    def _switched_off(self) -> frozenset[str]:
        names = os.environ.get(SWITCHES, "").replace(",", " ").split()
        if wrong := [name for name in names if not name.startswith("-")]:
            raise BadOptionError(f"{SWITCHES} names optimisations to switch off, each after a minus, not {wrong[0]}")
        return frozenset(name[1:] for name in names)


class LockstepEngine(TranslateEngine):
    """The translator, every block of which is compared with the interpreter: for finding its faults, and very slow."""

    name = "lockstep"
    _has_xen_path = False
    _more: Mapping[str, Any] = {"lockstep": True}
