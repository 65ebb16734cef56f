"""
The ``kvm`` engine: guest code runs in the CPU's own guest mode, by /dev/kvm.

KVM executes instructions and nothing else. Local APIC, plain MSRs, mailbox, clock and sleep are those of a vCPU of the
interpreter, the *companion*, which never executes anything: so interrupts, records and time are the same as under the
other engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from nonroot import _engine
from nonroot.engines.exits import (
    Debug,
    Exit,
    Failure,
    Halt,
    Hypercall,
    InterruptWindow,
    Mmio,
    MsrRead,
    MsrWrite,
    PortIo,
    TripleFault,
    from_raw,
)
from nonroot.engines.kvm import abi, hypercalls, probe, record
from nonroot.engines.kvm.system import System
from nonroot.engines.kvm.vcpu import MSR_TSC
from nonroot.engines.kvm.vm import VirtualMachine
from nonroot.engines.policy import CRYSTAL_HZ, CpuidLeaf, CpuPolicy
from nonroot.engines.protocol import Capability, CapabilityError, EngineOptions
from nonroot.engines.state import StateError, VcpuState
from nonroot.errors import BadOptionError, UnsupportedError

__all__ = ["KvmEngine", "KvmVcpu"]

NAME: Final = "kvm"
_ENTER, _ENTER_FOR_WINDOW, _INJECT, _INJECT_NMI, _RETURN, _REPLACE = range(6)
_KNOWN, _UNKNOWN = 0, 1
_IF: Final = 1 << 9
_RESUME: Final = 1 << 16
_U64: Final = (1 << 64) - 1

_MSR_TSC_ADJUST: Final = 0x3B
_MSR_ARCH_CAPABILITIES: Final = 0x10A
_MSR_APIC_BASE: Final = 0x1B
_APIC_ENABLED: Final = 1 << 11
_X2APIC: Final = range(0x800, 0x900)
_SPEC_CTRL: Final = (0x48, 0x49)
#: MSRs that are the guest's own in guest mode, and in records.
_KVM_MSRS: Final = (0x174, 0x175, 0x176, 0x277, *range(0xC0000081, 0xC0000085), 0xC0000102, 0xC0000103)
#: And those that records have elsewhere: EFER, the bases of FS and GS.
_KVM_REGISTERS: Final = (0xC0000080, 0xC0000100, 0xC0000101)

#: KVM takes a guest's TSC for the host's up to this many millionths.
_TSC_TOLERANCE: Final = 250
#: How often the guest's TSC is compared with machine time, and from which difference on one of them moves, in ns.
_TSC_PERIOD_NS: Final = 1_000_000_000
_TSC_SLACK_NS: Final = 2_000
_TF: Final = 1 << 8
_PUSHF: Final = 0x9C
#: Those that PUSHF may have: operand size, REX.
_PREFIXES: Final = frozenset({0x66, *range(0x40, 0x50)})
_MOST_PREFIXES: Final = 3
_LONG_MODE: Final = 1 << 10


class KvmVcpu:
    """A vCPU in guest mode; see :class:`nonroot.engines.protocol.Vcpu`."""

    def __init__(self, companion: _engine.Vcpu, memory: _engine.Memory, policy: CpuPolicy, msr_exits: bool) -> None:
        """UnsupportedError if KVM cannot, BadOptionError for a TSC frequency that it cannot give."""
        self._companion = companion
        self._beside = _engine.Companion(companion)
        self._attend = self._beside.attend
        self._memory = memory
        self._generation = -1
        self._khz = policy.tsc_khz
        self._msr_exits = msr_exits
        self._system = System()
        self._vm: VirtualMachine | None = None
        try:
            self._vm = VirtualMachine(self._system, msr_exits=True)
            speculation = tuple(m for m in _SPEC_CTRL if "spec_ctrl" in policy.features)
            allowed = sorted({*_KVM_MSRS, *_KVM_REGISTERS, *speculation})
            self._vm.disable_quirks()
            self._vm.filter_msrs([(MSR_TSC, False), *((index, True) for index in allowed)])
            self._raw = self._vm.create_vcpu(0, companion.now_ns)
            self._show_cpu(policy)
        except BaseException:
            self.close()
            raise
        self._own_msrs = (*_KVM_MSRS, *speculation[:1])
        self._hypercalls = hypercalls.Patches(memory) if policy.hypervisor else None
        self._breakpoints = False
        self._stepping = False
        self._pushes_flags = False
        self._resume = False
        self._exits = 0
        self._counts: dict[type, int] = {}
        self._tsc_looked_at = 0
        self._tsc_offset = 0
        self.complete = self._raw.complete
        self.fail = self._raw.fail
        self.now_ns = companion.now_ns
        self.lapic_matches = companion.lapic_matches
        self.interrupt = companion.interrupt
        self.request_interrupt_window = companion.request_interrupt_window
        self.set_pic_vector = companion.set_pic_vector
        self._map()
        self._put(VcpuState.from_raw(companion.state()))

    def _show_cpu(self, policy: CpuPolicy) -> None:
        leaves = []
        for leaf, subleaf, *values in policy.cpuid():
            # The leaves with an APIC ID are the companion's; the others' changing bits KVM knows.
            if leaf == 1 or (leaf == 0xB and subleaf <= 1):
                values = list(self._beside.cpuid(leaf, 0 if leaf == 1 else subleaf))
            leaves.append(CpuidLeaf(leaf, subleaf, *values))
        self._raw.set_cpuid(leaves)
        if not self._raw.set_tsc_khz(policy.tsc_khz):
            host = self._raw.tsc_khz()
            if abs(host - policy.tsc_khz) * 1_000_000 > host * _TSC_TOLERANCE:
                raise BadOptionError(
                    f"this machine's KVM cannot scale time stamps: guests have a TSC of about {host} kHz, "
                    f"not {policy.tsc_khz} kHz"
                )

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give KVM's part back."""
        vm, self._vm = getattr(self, "_vm", None), None
        if vm is not None:
            vm.close()
        system = self.__dict__.pop("_system", None)
        if system is not None:
            system.close()

    # ── running ──

    def run(self, deadline_ns: int | None = None, limit: int | None = None) -> Exit:
        if limit is not None:
            raise CapabilityError(NAME, Capability.INSTRUCTION_LIMIT)
        raw = self._raw
        raw.claim()
        try:
            event = self._run(deadline_ns)
        except (UnsupportedError, OSError) as error:
            event = Failure(str(error))
        finally:
            raw.release()
        kind = type(event)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return event

    def _map(self) -> None:
        """Follow the p2m. UnsupportedError if it is in too many pieces."""
        generation = self._memory.generation()
        if generation != self._generation and self._vm is not None:
            self._vm.map(self._memory.runs(), self._memory.addresses())
            self._generation = generation

    def _before(self) -> None:
        """What may have changed since the last run."""
        self._map()
        if self.now_ns() - self._tsc_looked_at > _TSC_PERIOD_NS:
            self._follow_tsc()
        if self._hypercalls is not None:
            self._hypercalls.apply()
        if self._stepping:
            self._pushes_flags = self._next_is_pushf()
        if self._resume:
            # The breakpoint at this instruction has been seen.
            self._resume = False
            registers = self._raw.registers()
            registers.rflags |= _RESUME
            self._raw.set_registers(registers)

    def _run(self, deadline_ns: int | None) -> Exit:
        raw, attend, now = self._raw, self._attend, self.now_ns
        page, enter = raw.page, raw.enter
        self._before()
        if raw.stashed:
            event = enter()
            if event is not None and (answer := self._take(event)) is not None:
                return answer
        while True:
            action, value, timer = attend(page.ready_for_interrupt_injection != 0, page.cr8)
            if action <= _ENTER_FOR_WINDOW:
                page.request_interrupt_window = action
                until = deadline_ns if timer is None or (deadline_ns is not None and deadline_ns < timer) else timer
                left = None
                if until is not None:
                    left = until - now()
                    if left <= 0:
                        if until == deadline_ns:
                            return from_raw((15,))
                        continue
                self._exits += 1
                event = enter(left)
                if event is not None and (answer := self._take(event)) is not None:
                    return answer
            elif action == _RETURN:
                return from_raw(value)
            elif action == _INJECT:
                raw.interrupt(value)
                page.ready_for_interrupt_injection = 0
            elif action == _INJECT_NMI:
                raw.nmi()
            else:
                self._replace()

    def _take(self, event: Exit) -> Exit | None:
        """Do what needs nobody else; else the exit."""
        kind = type(event)
        page = self._raw.page
        if kind is PortIo:
            if self._hypercalls is not None and event.port == hypercalls.PORT and event.write:  # type: ignore[union-attr]
                return Hypercall(False)
            return event
        if isinstance(event, Mmio):
            if event.write:
                cr8 = self._beside.apic_write(event.gpa, event.data, page.cr8)
                if cr8 is None:
                    return event
                page.cr8 = cr8
                return None
            data = self._beside.apic_read(event.gpa, event.size, page.cr8)
            if data is None:
                return event
            self._raw.complete(data)
            return None
        if isinstance(event, MsrRead):
            return self._msr_read(event)
        if isinstance(event, MsrWrite):
            return self._msr_write(event)
        if kind is Halt:
            self._beside.halt(page.if_flag != 0)
            return None
        if kind is InterruptWindow:
            return None
        if isinstance(event, TripleFault):
            self._beside.shut_down()
        elif isinstance(event, Debug):
            if self._pushes_flags:
                self._hide_step()
            self._resume = self._breakpoints and event.dr6 & 15 != 0
        return event

    def _refused_by_kvm(self) -> bool:
        """KVM knows the register that the exit is about, but not the value."""
        msr = self._raw.page.msr
        return msr.reason == abi.MSR_EXIT_INVALID and msr.index not in _X2APIC

    def _msr_read(self, event: MsrRead) -> Exit | None:
        if self._refused_by_kvm():
            self._raw.fail()
            return None
        status, value = self._beside.msr_read(event.index, self._raw.page.cr8)
        if status == _KNOWN:
            self._raw.complete(value.to_bytes(8, "little"))
        elif status == _UNKNOWN and self._msr_exits:
            return event
        else:
            self._raw.fail()
        return None

    def _msr_write(self, event: MsrWrite) -> Exit | None:
        raw, index = self._raw, event.index
        if self._refused_by_kvm():
            raw.fail()
            return None
        status, cr8 = self._beside.msr_write(index, event.value, raw.page.cr8)
        if status == _KNOWN:
            raw.page.cr8 = cr8
            raw.accept()
            if index in (MSR_TSC, _MSR_TSC_ADJUST):
                self._tsc_offset = self._companion.state()["tsc_offset"]
                self._set_tsc()
            elif index == _MSR_APIC_BASE:
                self._show_apic(event.value)
        elif status == _UNKNOWN and self._msr_exits:
            if self._hypercalls is not None:
                self._hypercalls.page_wanted(index, event.value)
            return event
        else:
            raw.fail()
        return None

    def _show_apic(self, base: int) -> None:
        """Tell KVM, for CPUID's sake, whether there is a local APIC."""
        system = self._raw.system_registers_now()
        if (system.apic_base ^ base) & _APIC_ENABLED:
            system.apic_base = record.apic_base(base)
            self._raw.set_system_registers(system)

    def _replace(self) -> None:
        """An INIT or start-up IPI: the companion does to a copy of the registers what is to be done."""
        self._companion.set_state(self._state().to_raw())
        self._beside.take_messages()
        self._put(VcpuState.from_raw(self._companion.state()))

    def wait(self, deadline_ns: int | None = None) -> bool:
        return self._companion.wait(deadline_ns)

    # ── for any thread ──

    def kick(self) -> None:
        self._companion.kick()
        self._raw.prod()

    def set_pic_line(self, asserted: bool) -> None:
        self._companion.set_pic_line(asserted)
        if asserted:
            self._raw.prod()

    def signal(self, vector: int, mode: int = 0, level: bool = False) -> None:
        self._companion.signal(vector, mode, level)
        self._raw.prod()

    def nmi(self) -> None:
        self._companion.nmi()
        self._raw.prod()

    # ── time ──

    def set_now_ns(self, now: int) -> None:
        self._companion.set_now_ns(now)
        self._set_tsc()

    def _behind(self) -> tuple[int, int]:
        """By how many ticks the guest's TSC is behind what machine time says it is at most, and within how many ns."""
        best: tuple[int, int] | None = None
        for _ in range(3):
            before = self.now_ns()
            seen = self._raw.msrs([MSR_TSC])[MSR_TSC]
            after = self.now_ns()
            if best is None or after - before < best[1]:
                wanted = after * self._khz // 1_000_000 + self._tsc_offset
                behind = (wanted - seen) & _U64
                best = (behind - (1 << 64) if behind >> 63 else behind, after - before)
        assert best is not None
        return best

    def _set_tsc(self) -> None:
        """Set the guest's TSC as machine time says."""
        self._raw.move_tsc(self._behind()[0])
        self._tsc_looked_at = self.now_ns()

    def _follow_tsc(self) -> None:
        """The host's TSC and its clock do not go equally fast: whichever of the guest's is behind moves on."""
        behind, within = self._behind()
        slack = (within + _TSC_SLACK_NS) * self._khz // 1_000_000
        if behind > slack:
            self._raw.move_tsc(behind)
        elif behind < -slack:
            self._companion.set_now_ns(self.now_ns() - behind * 1_000_000 // self._khz)
        self._tsc_looked_at = self.now_ns()

    # ── state ──

    def state(self) -> VcpuState:
        self._raw.settle()
        if self._hypercalls is not None:
            self._hypercalls.undo()
        return self._state()

    def _state(self) -> VcpuState:
        return record.take(self._raw, VcpuState.from_raw(self._companion.state()), self._own_msrs)

    def set_state(self, state: VcpuState) -> None:
        state.check()
        before = self.state()
        try:
            self._companion.set_state(state.to_raw())
        except ValueError as error:
            raise StateError(str(error)) from None
        self._raw.forget_exit()
        try:
            self._put(state)
        except StateError:
            self._companion.set_state(before.to_raw())
            self._put(before)
            raise

    def _put(self, state: VcpuState) -> None:
        """Load what is KVM's of a record that the companion has."""
        raw, page = self._raw, self._raw.page
        base = self._beside.msr_read(_MSR_APIC_BASE, self._cr8())[1]
        page.cr8 = self._cr8()
        record.load(raw, state, base, self._own_msrs)
        page.if_flag = state.rflags >> 9 & 1
        free = state.event is None and not state.pending_db and not state.shadow
        page.ready_for_interrupt_injection = bool(state.rflags & _IF) and free
        self._tsc_offset = state.tsc_offset
        self._resume = False
        self._set_tsc()

    def _cr8(self) -> int:
        """CR8 as the companion's local APIC has it: its task priority, in its record at 12."""
        return int.from_bytes(self._companion.state()["lapic"][12:16], "little") >> 4 & 15

    # ── the rest ──

    def set_guest_debug(self, single_step: bool = False, breakpoints: Sequence[tuple[int, int, int]] = ()) -> None:
        self._companion.set_guest_debug(single_step, list(breakpoints))
        control = abi.GUESTDBG_ENABLE if single_step or breakpoints else 0
        if single_step:
            control |= abi.GUESTDBG_SINGLESTEP
        registers = [0, 0, 0, 0, 0x400]
        for number, (address, length, kind) in enumerate(breakpoints):
            registers[number] = address
            size = {1: 0, 2: 1, 4: 3, 8: 2}[length]
            registers[4] |= 2 << 2 * number | kind << 16 + 4 * number | size << 18 + 4 * number
        if breakpoints:
            control |= abi.GUESTDBG_USE_HW_BP
        self._raw.settle()
        self._stepping, self._pushes_flags = single_step, False
        self._breakpoints = any(kind == 0 for _, _, kind in breakpoints)
        self._raw.set_guest_debug(control, registers)

    def _next_is_pushf(self) -> bool:
        """Whether the next instruction would push the trap flag by which it is stepped, which is not the guest's."""
        registers, system = self._raw.registers(), self._raw.system_registers()
        at = system.cs.base + registers.rip if not system.cs.l else registers.rip
        for _ in range(_MOST_PREFIXES):
            place = self._raw.translate(at & _U64)
            try:
                code = self._memory.read(place, 1)[0] if place is not None else 0
            except ValueError:
                return False
            if code == _PUSHF:
                return bool(registers.rflags & _TF == 0)
            if code not in _PREFIXES:
                return False
            at += 1
        return False

    def _hide_step(self) -> None:
        self._pushes_flags = False
        registers, system = self._raw.registers(), self._raw.system_registers()
        wide = system.ss.db or system.cs.l
        at = system.ss.base + (registers.rsp & (0xFFFFFFFF if wide else 0xFFFF)) if not system.cs.l else registers.rsp
        place = self._raw.translate((at + 1) & _U64)
        if place is not None:
            self._memory.write(place, bytes([self._memory.read(place, 1)[0] & ~(_TF >> 8)]))

    def retired(self) -> int:
        """How often KVM has been entered: guest instructions are not counted."""
        return self._exits

    def statistics(self) -> Mapping[str, int]:
        counts = {"entries": self._exits}
        return counts | {f"exits_{kind.__name__}": count for kind, count in self._counts.items()}

    def hypercall_arguments(self) -> tuple[bool, int, list[int]]:
        raw = self._raw
        raw.check_thread()
        registers, system = raw.registers_now(), raw.system_registers_now()
        values = [getattr(registers, name) for name in record.GPR]
        level = 0 if not system.cr0 & 1 else 3 if registers.rflags >> 17 & 1 else system.ss.dpl
        return bool(system.efer & _LONG_MODE and system.cs.l), level, values

    def set_register(self, index: int, value: int) -> None:
        if not 0 <= index < 16:
            raise ValueError(f"there is no general register {index}")
        registers = self._raw.registers_now()
        setattr(registers, record.GPR[index], value)
        self._raw.set_registers_now(registers)

    def translate(self, linear: int) -> int | None:
        self._raw.check_thread()
        self._map()
        return self._raw.translate(linear)

    def flush(self) -> None:
        """KVM follows the host's page tables; the p2m is looked at before each run."""
        self._raw.check_thread()


class KvmEngine:
    """Guest mode on real hardware."""

    name: str = NAME
    capabilities: frozenset[Capability] = frozenset(
        {Capability.SINGLE_STEP, Capability.BREAKPOINTS, Capability.MSR_EXITS}
    )

    @property
    def cpu_features(self) -> frozenset[str]:
        return probe.facts().features

    @property
    def tsc_khz(self) -> int:
        return probe.facts().tsc_khz

    def optimisations(self) -> Mapping[str, str]:
        return {}

    def create_vcpu(
        self, memory: _engine.Memory, policy: CpuPolicy, apic_id: int = 0, options: EngineOptions | None = None
    ) -> KvmVcpu:
        options = options or EngineOptions()
        for name in sorted(options.off):
            raise BadOptionError(f"the {NAME} engine has no optimisation named {name}, nor any other")
        for capability in sorted(options.needed() - self.capabilities):
            raise CapabilityError(self.name, capability)
        facts = probe.facts()
        for missing in sorted(policy.features - facts.features):
            raise BadOptionError(f"the {NAME} engine has no CPU feature {missing} on this machine")
        if not 0 <= apic_id < policy.vcpus:
            raise BadOptionError(f"APIC ID {apic_id} is not one of the domain's {policy.vcpus} vCPUs")
        msrs = policy.msrs()
        if _MSR_ARCH_CAPABILITIES in msrs:
            # Here the guest's instructions are speculated on as far as the host's CPU does.
            value, writable = msrs[_MSR_ARCH_CAPABILITIES]
            msrs[_MSR_ARCH_CAPABILITIES] = (value & facts.arch_capabilities, writable)
        asked: dict[str, Any] = {"tsc_khz": policy.tsc_khz, "apic_bus_hz": CRYSTAL_HZ, "msr_exits": options.msr_exits}
        leaves = list[tuple[int, int, int, int, int, int]](policy.cpuid())
        try:
            companion = _engine.Vcpu(memory, apic_id, leaves, msrs, asked)
        except ValueError as error:
            raise BadOptionError(str(error)) from None
        return KvmVcpu(companion, memory, policy, options.msr_exits)
