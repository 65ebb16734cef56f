"""One virtual machine: its memory, vCPU, devices and their wiring, and the loop that runs it.

The thread that calls :meth:`Machine.run` is the vCPU's thread: devices are touched by it alone. Other threads use the
methods that say so; those hand over a callable and kick the vCPU. There is one vCPU for now; with more, the devices
will be behind one lock, taken around the dispatch of an exit.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Condition, get_ident
from typing import TYPE_CHECKING, Final
from weakref import finalize

from nonroot._engine import Memory, XenPath
from nonroot.engines.policy import CpuidLeaf, CpuPolicy
from nonroot.engines.protocol import Engine, EngineOptions, Vcpu
from nonroot.errors import BadOptionError
from nonroot.hvm import board
from nonroot.hvm.acpi import AcpiTables, build_tables
from nonroot.hvm.acpi_pm import GPE_GENERATION, AcpiPm
from nonroot.hvm.acpi_pm import LENGTH as ACPI_PM_LENGTH
from nonroot.hvm.agent_port import CAPACITY as AGENT_CAPACITY
from nonroot.hvm.agent_port import LENGTH as AGENT_LENGTH
from nonroot.hvm.agent_port import AgentPort
from nonroot.hvm.bus import Bus
from nonroot.hvm.clock import MachineClock
from nonroot.hvm.config import MachineConfig, Outputs
from nonroot.hvm.debug_port import CONSOLE as DEBUG_CONSOLE
from nonroot.hvm.debug_port import DebugPort
from nonroot.hvm.decode import WindowDecoder
from nonroot.hvm.device import Device, TimedDevice
from nonroot.hvm.dispatch import HANDLERS, VIRTUAL_TIME_HANDLERS
from nonroot.hvm.dma import GuestDma
from nonroot.hvm.guest_ram import GuestRam
from nonroot.hvm.i8042 import COMMAND as I8042_COMMAND
from nonroot.hvm.i8042 import DATA as I8042_DATA
from nonroot.hvm.i8042 import I8042
from nonroot.hvm.ioapic import IoApic
from nonroot.hvm.irq import SCI, InterruptDelivery, InterruptRouter, create_pit
from nonroot.hvm.memory_map import FIRMWARE_END, FIRMWARE_START, IOAPIC_BASE, MemoryMap
from nonroot.hvm.outcome import Outcome, Reason
from nonroot.hvm.pc import POWER_SLOT, Board, MachineParts, TimedPart
from nonroot.hvm.pci import PciHost
from nonroot.hvm.pic import MASTER_ELCR, SLAVE_COMMAND, SLAVE_ELCR, PicPair
from nonroot.hvm.pirq import FIRMWARE_ROUTES, PciInterrupts
from nonroot.hvm.pit import PORT_B
from nonroot.hvm.ram import BoardRam, DirtyLog, close_files, create_ram, create_rom
from nonroot.hvm.records import restore_records, take_records
from nonroot.hvm.reset import PORT_A, RESET_CONTROL, ResetControl
from nonroot.hvm.rtc import Rtc, memory_registers
from nonroot.hvm.shadow import SMRAM_SIZE, ShadowRam, SystemManagementRam
from nonroot.hvm.streams import InputQueue, OutputBuffer
from nonroot.hvm.uart import FIFO_SIZE, RX_TIMEOUT_NS, Uart
from nonroot.xen.abi import Shutdown, cpuid_leaves
from nonroot.xen.config import XenConfig
from nonroot.xen.host import RESERVED, Surroundings, XenHost
from nonroot.xen.platform_pci import attach_platform

if TYPE_CHECKING:
    from nonroot.boot.plan import BootPlan
    from nonroot.hvm.firmware import Firmware

__all__ = ["Machine", "MachineConfig", "Outcome", "Outputs", "Reason"]

DOORBELL_UART: Final = 1
DOORBELL_TIMEOUT_NS: Final = 1000
"""The doorbell's receiver does not wait for further characters: one byte is all that comes."""
DOORBELL: Final = b"\x07"
LONGEST_SLEEP_NS: Final = 10_000_000
"""How long a vCPU that waits in a hypercall is not asked whether it would rather go on."""
GENERATION_ID: Final = FIRMWARE_END - 0x1000
"""Where the VM generation ID is, in memory that the guest's system keeps away from."""
EVENTS_KEPT: Final = 1024
"""Different (device, event) pairs that are counted."""


class Machine:
    """A machine that has been powered on and is about to enter its kernel."""

    def __init__(
        self, config: MachineConfig, engine: Engine, outputs: Outputs | None = None, policy: CpuPolicy | None = None
    ) -> None:
        """
        Build the machine and load its kernel.

        ``policy`` is the guest's CPU (default: all that ``engine`` has). BootError and MemorySizeError for what cannot
        be booted, BadOptionError and CapabilityError for what the engine cannot do, OutOfMemoryError.
        """
        if not 1 <= config.uarts <= len(board.UARTS):
            raise BadOptionError(f"a machine has 1 to {len(board.UARTS)} serial ports, not {config.uarts}")
        outputs = outputs or Outputs()
        self.memory_map = MemoryMap(config.memory_bytes, () if config.xen is None else (RESERVED,))
        self.plan: BootPlan | None = None
        """How the kernel is started; None with firmware, and for a machine that is resumed."""
        self.protocol = "bios" if config.firmware is not None else config.protocol
        """How its guest is started: ``bios``, ``pvh``, ``linux64``, ``linux32`` or ``multiboot``."""
        if config.firmware is not None:
            config.firmware.check()
        elif not config.resumed:
            from nonroot.boot.plan import plan_boot

            self.plan = plan_boot(
                config.kernel, self.memory_map, config.cmdline, config.initrd, FIRMWARE_START, config.protocol
            )
            self.protocol = self.plan.protocol
        self._reboots = config.reboot if config.reboot is not None else config.firmware is not None
        self.resets = 0
        """How often the guest has been started again."""
        self.memory_files: list[int] = []
        """A read-only descriptor of each backing of the memory."""
        self.memory: Memory = create_ram(self.memory_map, config.scramble_seed, self.memory_files, config.ram_base)
        self.ram = GuestRam(self.memory, self.memory_files, self.memory_map.memory_bytes, config.ram_base)
        finalize(self, close_files, self.memory_files)
        if policy is None:
            policy = CpuPolicy.of_engine(engine)
        if config.xen is not None:
            leaves = [CpuidLeaf(*leaf) for leaf in cpuid_leaves(config.xen.domid, policy.tsc_khz)]
            policy = replace(policy, hypervisor=tuple(leaves))
        self.policy = policy
        """The guest's CPU."""
        self._tsc_khz = policy.tsc_khz
        options = EngineOptions(
            virtual_time=config.virtual_time,
            random_seed=config.random_seed,
            off=config.engine_off,
            msr_exits=config.xen is not None,
        )
        self.vcpu: Vcpu = engine.create_vcpu(self.memory, policy, 0, options)
        self.vcpus: tuple[Vcpu, ...] = (self.vcpu,)
        self.clock = MachineClock(self.vcpu.now_ns)
        self.events: Counter[tuple[str, str]] = Counter()
        self._handlers = HANDLERS if config.virtual_time is None else VIRTUAL_TIME_HANDLERS
        self.exit_counts: dict[type, int] = dict.fromkeys(HANDLERS, 0)
        self.outcome: Outcome | None = None
        self._posted: deque[Callable[[], object]] = deque()
        self._stop_requested = False
        self._paused = 0
        self._pause = Condition()
        self._on_progress: Callable[[], object] | None = None
        self._progress_mark = 0
        self._deadline: int | None = None
        self._thread: int | None = None
        self._virtual = config.virtual_time is not None
        self._wire(config, outputs)
        self._power_on_state = self.vcpu.state()
        if self.plan is not None:
            for address, data in self.plan.pieces:
                self.memory.write(address, data)
            self.vcpu.set_state(self.plan.entry.apply(self._power_on_state))

    def _wire(self, config: MachineConfig, outputs: Outputs) -> None:
        """Create the devices and connect them as :mod:`nonroot.hvm.board` says."""
        event, clock = self._count_event, self.clock
        self.pic = PicPair(self.vcpu.set_pic_line, event)
        self.ioapic = IoApic(InterruptDelivery(self.vcpus), event, identity=1)
        lines = InterruptRouter(self.pic.set_line, self.ioapic.set_line)
        self.pit = create_pit(clock, lines, self.pic, self.ioapic, event)
        nvram = memory_registers(self.memory_map.low_end, self.memory_map.high_bytes)
        self.rtc = Rtc(clock, lines.isa(board.RTC_IRQ), config.base_wall_ns, nvram, event)
        self.acpi_pm = AcpiPm(clock, lines.gsi(SCI), self._power_off, event)
        interrupts = PciInterrupts(lines)
        self.shadow: ShadowRam | None = None
        if config.firmware is not None:
            image = config.firmware.image
            self.shadow = ShadowRam(self.memory, create_rom(self.memory, image, self.memory_files), len(image))
            self.pci = PciHost(event, self.shadow.apply, interrupts.route, self._show_smram)
        else:
            self.pci = PciHost(event, route=interrupts.route)
        self._smram: SystemManagementRam | None = None
        self.reset_control = ResetControl(self.request_reset, event)
        self._debug_buffer = OutputBuffer(clock, outputs.debug)
        self.debug_port = DebugPort(self._debug_buffer.put, event)
        self._buffers = [self._debug_buffer]
        self.uarts: list[Uart] = []
        self._uart_input: list[InputQueue] = []
        for index, (_, line) in enumerate(board.UARTS[: config.uarts]):
            self._add_uart(index, lines.isa(line), outputs, config.agent)
        self.agent_port = AgentPort(outputs.agent, self._agent_drained, event)
        self._agent_input = InputQueue(self.agent_port.receive, AGENT_CAPACITY)
        self._agent_wants_input = outputs.agent_wants_input
        self.ports = Bus("port", 16, event)
        self.mmio = Bus("mmio", 52, event)
        self.dirty_log = DirtyLog(self.memory)
        self._map_devices(config)
        self.board = Board(
            clock=clock,
            events=event,
            ports=self.ports,
            mmio=self.mmio,
            lines=lines,
            pci=self.pci,
            interrupts=interrupts,
            windows=WindowDecoder(self.ports, self.mmio, self.memory_map.low_end, event),
            dma=GuestDma(self.memory, self.memory_map.low_end, event),
            make_ram=lambda name, size: BoardRam(self.memory, self.dirty_log, name, size, self.memory_files),
            post=self.post,
            request_reset=self.request_reset,
            machine=MachineParts(
                memory=self.memory,
                files=self.memory_files,
                memory_bytes=self.memory_map.memory_bytes,
                low_end=self.memory_map.low_end,
                share_ram=self.ram.share,
                inject_msi=InterruptDelivery(self.vcpus).message,
                power_off=self._power_off,
                fail=self._fail,
            ),
        )
        self.xen: XenHost | None = None
        """The Xen of this machine; None without."""
        if config.xen is not None:
            self.xen = self._make_xen(config, config.xen, lines, outputs)
            self.ram.on_change = self.xen.physmap.forget_ram
            if not self._is_pvh:
                attach_platform(self.board)
        for attach in config.attach:
            attach(self.board)
        if not self.board.has_8042:
            self._add_bare_8042()
        if config.firmware is not None:
            self._add_firmware(config, config.firmware)
        elif not config.resumed:
            self._place_tables(config)
        self.devices: tuple[Device, ...] = (
            self.pit,
            self.rtc,
            self.acpi_pm,
            self.pci,
            self.reset_control,
            self.debug_port,
            *self.uarts,
            self.agent_port,
            *self.board.devices,
            self.pic,
            self.ioapic,
        )
        """In the order in which states are restored: interrupt controllers last, they know their lines' levels."""
        self._timed: tuple[TimedPart, ...] = (
            self.pit,
            self.rtc,
            self.acpi_pm,
            *self.uarts,
            *(device for device in self.board.devices if isinstance(device, TimedDevice)),
            *self.board.timed,
            *self._buffers,
            *([] if self.xen is None else [self.xen]),
        )

    def _make_xen(self, config: MachineConfig, xen: XenConfig, lines: InterruptRouter, outputs: Outputs) -> XenHost:
        surroundings = Surroundings(
            memory=self.memory,
            files=self.memory_files,
            share_ram=self.ram.share,
            memory_map=self.memory_map,
            vcpus=self.vcpus,
            clock=self.clock,
            tsc_khz=self._tsc_khz,
            wall_ns=config.base_wall_ns,
            events=self._count_event,
            gsi=lines.gsi,
            intx=self.board.intx,
            in_thread=self._in_thread,
            sleep=self._sleep,
            shutdown=self._xen_shutdown,
            console=lambda data: outputs.console(0, data),
            debug=outputs.debug,
            make_path=self._make_xen_path,
        )
        return XenHost(xen, surroundings)

    def _make_xen_path(self, shared: tuple[int, int]) -> XenPath | None:
        maker = getattr(self.vcpu, "xen_path", None)
        path = None if maker is None else maker(self.memory, shared)
        return path if isinstance(path, XenPath) else None

    def _add_bare_8042(self) -> None:
        """Nothing is plugged in, but systems switch A20 and reset the machine by it."""
        i8042 = I8042(self.request_reset, self._count_event)
        self.ports.add(board.I8042_DATA, 1, i8042, I8042_DATA)
        self.ports.add(board.I8042_COMMAND, 1, i8042, I8042_COMMAND)
        self.board.add(i8042)

    def _acpi(self, config: MachineConfig) -> AcpiTables:
        parts = self.board
        # A kernel that another one starts (GRUB's) sees by the tables alone that this is a PVH domain of Xen's.
        has_rtc = not self._is_pvh
        generation = GENERATION_ID if config.firmware is None else None
        return build_tables([0], config.uarts, 1, parts.isa_devices, parts.has_vga, parts.has_8042, has_rtc, generation)

    def power_on_was(self, wall_ns: int) -> None:
        """UTC when machine time was 0, of a machine that is about to go on as a saved one."""
        if self.xen is not None:
            self.xen.shared.wall_ns = wall_ns

    def renew_generation(self, identity: bytes) -> None:
        """Tell the guest that it goes on from a copy of its state: another VM generation ID, of 16 bytes. Any thread.

        Nothing happens if the guest was started by firmware: it knows no place for it.
        """
        if self.protocol != "bios":
            self.post(lambda: self._set_generation(identity))

    def _set_generation(self, identity: bytes) -> None:
        self.memory.write(GENERATION_ID, identity)
        self.acpi_pm.raise_event(GPE_GENERATION)

    @property
    def _is_pvh(self) -> bool:
        """Whether this is a Xen domain without the platform device."""
        return self.xen is not None and self.protocol == "pvh"

    def _place_tables(self, config: MachineConfig) -> None:
        """Without firmware, its work is ours: tables in memory, what drives there are, routes of the PCI interrupts."""
        for address, data in self._acpi(config).image():
            self.memory.write(address, data)
        self.memory.write(GENERATION_ID, config.generation_id)
        self.rtc.preset(self.board.cmos)
        self.pci.set_routes(FIRMWARE_ROUTES)
        self.pic.write(SLAVE_ELCR, 1, sum(1 << irq - 8 for irq in set(FIRMWARE_ROUTES)))

    def _add_firmware(self, config: MachineConfig, firmware: "Firmware") -> None:
        from nonroot.devices.fw_cfg import FW_CFG_PORTS, FwCfg
        from nonroot.devices.fw_cfg import LENGTH as FW_CFG_LENGTH
        from nonroot.devices.piix4_pm import APM, APM_LENGTH, Piix4Pm
        from nonroot.hvm.acpi_loader import loader_files
        from nonroot.hvm.firmware import boot_files, boot_registers, firmware_items
        from nonroot.hvm.smbios import smbios_files

        parts = self.board
        self.rtc.preset(boot_registers(firmware) | parts.cmos)
        files = loader_files(self._acpi(config)) | smbios_files(self.memory_map) | parts.files
        files |= boot_files(firmware, self.memory_map)
        items = firmware_items(firmware, self.memory_map, len(self.vcpus))
        if parts.make_fw_cfg is not None:
            parts.add(parts.make_fw_cfg(items, files))
        else:
            fw_cfg = FwCfg(items, files, parts.dma, self._count_event)
            self.ports.add(FW_CFG_PORTS, FW_CFG_LENGTH, fw_cfg, sizes=(1, 2, 4))
            parts.add(fw_cfg)
        self.ports.add(board.FIRMWARE_DEBUG, 1, self.debug_port, DEBUG_CONSOLE)
        slot, function = POWER_SLOT
        power = Piix4Pm(parts.connect(slot, function), self._count_event)
        parts.add_pci(slot, function, power)
        self.ports.add(APM, APM_LENGTH, power)
        self._smram = SystemManagementRam(parts.make_ram("smram", SMRAM_SIZE), parts.hide_window)
        self.pci.reset()

    def _show_smram(self, is_open: bool) -> None:
        if self._smram is not None:
            self._smram.apply(is_open)

    def _add_uart(self, index: int, irq: Callable[[bool], None], outputs: Outputs, agent: bool) -> None:
        buffer = OutputBuffer(self.clock, lambda data: outputs.console(index, data))
        uart = Uart(
            f"uart{index}",
            self.clock,
            irq,
            buffer.put,
            self._count_event,
            lambda: self._uart_input[index].feed(),
            DOORBELL_TIMEOUT_NS if agent and index == DOORBELL_UART else RX_TIMEOUT_NS,
        )
        self._buffers.append(buffer)
        self.uarts.append(uart)
        self._uart_input.append(InputQueue(uart.receive, FIFO_SIZE))

    def _map_devices(self, config: MachineConfig) -> None:
        ports = self.ports
        ports.add(board.PIC_MASTER, 2, self.pic)
        ports.add(board.PIC_SLAVE, 2, self.pic, SLAVE_COMMAND)
        ports.add(board.ELCR, 2, self.pic, MASTER_ELCR)
        ports.add(board.PIT, 4, self.pit)
        ports.add(board.PORT_B, 1, self.pit, PORT_B)
        ports.add(board.RTC, 2, self.rtc)
        ports.add(board.POST, 1, self.debug_port)
        ports.add(board.DEBUG_CONSOLE, 1, self.debug_port, DEBUG_CONSOLE)
        ports.add(board.PORT_A, 1, self.reset_control, PORT_A)
        ports.add(board.RESET_CONTROL, 1, self.reset_control, RESET_CONTROL)
        ports.add(board.PCI_CONFIG, 4, self.pci, sizes=(4,))
        ports.add(board.PCI_CONFIG + 4, 4, self.pci, 4, sizes=(1, 2, 4))
        ports.add(board.PM1A_EVENT, ACPI_PM_LENGTH, self.acpi_pm, sizes=(1, 2, 4))
        for (base, _), uart in zip(board.UARTS, self.uarts, strict=False):
            ports.add(base, 8, uart)
        if config.agent:
            ports.add(board.AGENT, AGENT_LENGTH, self.agent_port, sizes=(1, 2, 4))
        self.mmio.add(IOAPIC_BASE, 0x100, self.ioapic, sizes=(4,))

    # ── for any thread ──

    def post(self, action: Callable[[], object]) -> None:
        """Have ``action`` called in the vCPU's thread soon, paused or not. It must not raise. Any thread."""
        self._posted.append(action)
        with self._pause:
            self._pause.notify_all()
        self.vcpu.kick()

    def stop(self) -> None:
        """Make :meth:`run` return STOPPED soon (or at once, if it is called next). Any thread."""
        self.post(self._request_stop)

    def pause(self) -> None:
        """Stop the guest's time and execution until :meth:`resume`; pauses nest. Any thread but the vCPU's."""
        with self._pause:
            self._paused += 1
        self.vcpu.kick()

    def resume(self) -> None:
        """Undo one :meth:`pause`. Any thread. RuntimeError if there is none."""
        with self._pause:
            if self._paused == 0:
                raise RuntimeError("the machine is not paused")
            self._paused -= 1
            self._pause.notify_all()

    def console_input(self, data: bytes, uart: int = 0) -> None:
        """Bytes for a serial port, or for hvc0 once the guest uses it; they wait until it reads. Any thread."""
        if uart == 0 and self.xen is not None and self.xen.console is not None:
            self.post(lambda: self._console_input(data))
            return
        queue = self._uart_input[uart]
        self.post(lambda: queue.add(data))

    def agent_input(self, data: bytes) -> None:
        """Bytes for the agent; its doorbell rings. Any thread."""
        self.post(lambda: self._take_agent_input(data))

    def agent_backlog(self) -> int:
        """Bytes that the agent has not read yet, those still posted excepted. Any thread."""
        return len(self._agent_input) + self.agent_port.waiting

    def console_backlog(self, uart: int = 0) -> int:
        """Bytes that the guest has not taken from a serial port's queue yet. Any thread."""
        hvc = self.xen.console if uart == 0 and self.xen is not None else None
        return len(self._uart_input[uart]) + (len(hvc) if hvc is not None else 0)

    def press_power_button(self) -> None:
        """Ask the guest to shut down. Any thread."""
        self.post(self.acpi_pm.press_power_button)

    # ── the vCPU's thread ──

    def run(self, limit: int | None = None) -> Outcome:
        """
        Run until there is an outcome; after STOPPED it can be called again.

        ``limit``: total of retired instructions at which to return STOPPED, exactly.
        """
        vcpu, clock, counts, handlers = self.vcpu, self.clock, self.exit_counts, self._handlers
        run = vcpu.run
        self.outcome = None
        self._thread = get_ident()
        self._attend()
        while self.outcome is None:
            if clock.dirty:
                self._plan_deadline()
            exit_ = run(self._deadline, limit)
            kind = type(exit_)
            handler = handlers.get(kind)
            if handler is None:
                self.outcome = Outcome(Reason.FAILURE, f"the engine made an unknown exit: {exit_!r}")
                break
            counts[kind] += 1
            if self._on_progress is not None and vcpu.retired() != self._progress_mark:
                tell, self._on_progress = self._on_progress, None
                tell()
            outcome = handler(exit_, self, vcpu)
            if outcome is not None:
                self.outcome = outcome
                if self._reboots and outcome.reason in (Reason.RESET, Reason.TRIPLE_FAULT):
                    self._restart()
            elif limit is not None and vcpu.retired() >= limit:
                self.outcome = Outcome(Reason.STOPPED, "the limit of instructions was reached")
        outcome = self.outcome
        assert outcome is not None
        for buffer in self._buffers:
            buffer.flush()
        return outcome

    def watch_progress(self, tell: Callable[[], object]) -> None:
        """Call ``tell`` once, at the first exit after the guest has gone on. In the vCPU's thread, as ``tell`` is."""
        self._progress_mark = self.vcpu.retired()
        self._on_progress = tell

    def idle(self, vcpu: Vcpu) -> None:
        """The vCPU has halted: sleep until it has something to do. In virtual time nothing sleeps, time moves on."""
        for buffer in self._buffers:
            buffer.flush()
        since = self.vcpu.now_ns()
        while True:
            if self.clock.dirty:
                self._plan_deadline()
            if vcpu.wait(self._deadline):
                break
            self._advance()
            if self._posted or self._paused or self.outcome is not None:
                break
        if self.xen is not None:
            self.xen.slept(since)

    def interrupted(self, vcpu: Vcpu) -> None:
        """A deadline was reached, or there is something from another thread."""
        self._advance()
        self._attend()

    def _attend(self) -> None:
        """Do what other threads have asked for."""
        posted = self._posted
        while posted:
            posted.popleft()()
        if self._paused:
            self._stay_paused()
        if self._stop_requested:
            self._stop_requested = False
            self.outcome = Outcome(Reason.STOPPED)

    def _stay_paused(self) -> None:
        """Until the last resume, or a stop: the guest's time stands still."""
        now = self.vcpu.now_ns()
        for buffer in self._buffers:
            buffer.flush()
        while not self._stop_requested:
            with self._pause:
                if not self._posted and self._paused:
                    self._pause.wait()
                if not self._posted and not self._paused:
                    break
            while self._posted:
                self._posted.popleft()()
        self.vcpu.set_now_ns(now)
        self.clock.rearm()

    def _advance(self) -> None:
        """Let due events of the devices happen."""
        now = self.vcpu.now_ns()
        deadline = self._deadline
        if deadline is not None and deadline <= now:
            for device in self._timed:
                device.advance(now)
            self.clock.dirty = True

    def _plan_deadline(self) -> None:
        self.clock.dirty = False
        deadline: int | None = None
        for device in self._timed:
            candidate = device.deadline()
            if candidate is not None and (deadline is None or candidate < deadline):
                deadline = candidate
        self._deadline = deadline

    def _sleep(self, until_ns: int | None) -> None:
        """The vCPU waits inside of a hypercall, for something from another thread, a deadline, or some time."""
        for buffer in self._buffers:
            buffer.flush()
        if self.clock.dirty:
            self._plan_deadline()
        since = self.vcpu.now_ns()
        end = min(t for t in (since + LONGEST_SLEEP_NS, until_ns, self._deadline) if t is not None)
        if self._virtual:
            self.vcpu.set_now_ns(max(end, since))
        else:
            with self._pause:
                if not self._posted and not self._paused and end > since:
                    self._pause.wait((end - since) / 1e9)
        self._advance()
        if self.xen is not None:
            self.xen.slept(since)

    def _in_thread(self, action: Callable[[], object]) -> None:
        if self._thread == get_ident():
            action()
        else:
            self.post(action)

    def _console_input(self, data: bytes) -> None:
        hvc = self.xen.console if self.xen is not None else None
        if hvc is not None and hvc.connected:
            hvc.input(data)
        else:
            self._uart_input[0].add(data)

    def _xen_shutdown(self, reason: int) -> None:
        """The guest has ended its domain by hypercall."""
        if reason == Shutdown.POWEROFF:
            self.outcome = Outcome(Reason.POWER_OFF)
        elif reason in (Shutdown.REBOOT, Shutdown.SOFT_RESET):
            self.outcome = Outcome(Reason.RESET)
        else:
            self.outcome = Outcome(Reason.CRASH, "the guest said that it has crashed")

    def _request_stop(self) -> None:
        self._stop_requested = True

    def _power_off(self) -> None:
        self.outcome = Outcome(Reason.POWER_OFF)

    def _fail(self, reason: str) -> None:
        self.outcome = Outcome(Reason.FAILURE, reason)

    def request_reset(self) -> None:
        """The reset button, for devices and for :meth:`post`: the machine starts again, or the run ends."""
        self.outcome = Outcome(Reason.RESET)

    def _restart(self) -> None:
        """The RESET line: every device and the vCPU as after power-on; memory, CMOS and time go on."""
        self.outcome = None
        self.resets += 1
        for device in self.devices:
            device.reset()
        if self.xen is not None:
            self.xen.reset()
        vcpu = self.vcpu
        vcpu.set_state(replace(self._power_on_state, now_ns=vcpu.now_ns(), retired=vcpu.retired()))
        self.clock.rearm()

    def _take_agent_input(self, data: bytes) -> None:
        self._agent_input.add(data)
        self._ring()

    def _agent_drained(self) -> None:
        if len(self._agent_input):
            self._agent_input.feed()
            self._ring()
        else:
            self._agent_wants_input()

    def _ring(self) -> None:
        """One byte on the doorbell, unless one is waiting there already."""
        if len(self.uarts) > DOORBELL_UART and not len(self._uart_input[DOORBELL_UART]):
            self._uart_input[DOORBELL_UART].add(DOORBELL)

    def _count_event(self, device: str, event: str, detail: int) -> None:
        key = (device, event)
        if key in self.events or len(self.events) < EVENTS_KEPT:
            self.events[key] += 1

    # ── records ──

    def device_states(self) -> dict[str, bytes]:
        """The record of every device, by name, and of its memory (``memory.vga``); between runs."""
        return take_records(self.devices, self.board.memories)

    def restore_device_states(self, records: Mapping[str, bytes]) -> None:
        """Check all records, then apply them. StateError (nothing changed) for a hostile, missing or unknown one."""
        restore_records(self.devices, self.board.memories, records)
        self.vcpu.flush()

    def flush_output(self) -> None:
        """Pass on what the guest has written."""
        for buffer in self._buffers:
            buffer.flush()

    def waiting_input(self) -> list[bytes]:
        """What no device has taken yet: for the agent, and for each serial port."""
        return [queue.take() for queue in (self._agent_input, *self._uart_input)]

    def put_waiting_input(self, data: Sequence[bytes]) -> None:
        """As :meth:`waiting_input` found it. ValueError if it is of another machine."""
        for queue, waiting in zip((self._agent_input, *self._uart_input), data, strict=True):
            queue.put(waiting)

    def statistics(self) -> dict[str, int]:
        """Exits by kind (``exit.PortIo`` …), device events (``event.uart0.unknown-register`` …), and what of Xen was
        done without an exit (``xen.notifications`` …).
        """
        result = {f"exit.{kind.__name__}": count for kind, count in self.exit_counts.items() if count}
        result |= {f"event.{device}.{event}": count for (device, event), count in self.events.items()}
        if self.xen is not None and self.xen.path is not None:
            result |= {f"xen.{name}": count for name, count in self.xen.path.statistics().items()}
        return result
