"""The vCPU's thread of a domain's process, and the machine in it.

Everything that the guest does reaches the process's loop through the mailbox; everything that the loop wants of the
machine is handed over with :meth:`Runner.call` and done between two instructions of the guest.

In virtual time the guest must not notice how fast this machine is: the thread stands still after each piece that the
agent sent, until the loop has acted on it (:meth:`Runner.release`).
"""

import base64
import os
import resource
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nonroot.boot.cpio import append
from nonroot.domain import host, pc
from nonroot.domain.device_model import INTERNAL, attach_model, make_model
from nonroot.domain.display import Seat
from nonroot.domain.drives import Drives, paravirtual_disks, plan_disks
from nonroot.domain.guest_setup import INIT_PATH, GuestSetup
from nonroot.domain.initramfs import AGENT_PATH, agent_program, kernel_bits, with_agent
from nonroot.domain.mailbox import Mailbox
from nonroot.domain.networks import parse_networks
from nonroot.domain.options import DomainOptions
from nonroot.domain.registry import allocate_domid
from nonroot.domain.saved_devices import Layer, SavedDevices
from nonroot.domain.saving import (
    Saved,
    check_can_be_saved,
    fill,
    image,
    plain_options,
    read_layers,
    read_saved,
    rehearse,
    write_fork,
    write_saved,
)
from nonroot.domain.sealing import can_be_sealed, connector, seal
from nonroot.domain.shares import SHARE_MODULES, Shares, parse_shares, setup_lines
from nonroot.errors import BadFileError, BadOptionError, InternalError, NonrootError, NotRunningError, UnsupportedError
from nonroot.hvm.device import StateError
from nonroot.hvm.ram import BoardRam
from nonroot.hvm.saved import restore, take
from nonroot.saved.fields import Fields
from nonroot.xen.config import XenConfig
from nonroot.xen.platform_pci import XenPlatform

if TYPE_CHECKING:
    from nonroot.confine import Confinement
    from nonroot.domain.guest_devices import GuestDevices
    from nonroot.domain.xen import XenServices
    from nonroot.hvm.config import Outputs
    from nonroot.hvm.guest_ram import RamBase
    from nonroot.hvm.machine import Machine
    from nonroot.hvm.pc import Attach
    from nonroot.stubdom.model import DeviceModel
    from nonroot.xen.host import XenHost

__all__ = ["Runner", "Stop"]

VIRTUAL_TIME = (1, 1)
"""ns per instruction: a guest of 1000 million instructions per second."""
VIRTUAL_BASE_NS = 1_735_689_600 * 1_000_000_000
"""UTC at power-on in virtual time: 2025-01-01."""
MAX_CONSOLE = 1 << 18
"""With more console output than this waiting, the guest waits."""
MAX_KEYS = 1 << 20
"""Console input beyond this that the guest has not read is dropped."""
MAX_FILE = 8 << 30
HELLO = 0x81
INHERITED = "/proc/self/fd/"
_RUN = struct.Struct("<QQIQ")

Answer = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Stop:
    """How a machine stopped for good."""

    reason: str
    """``poweroff``, ``reset``, ``crash``, ``triple_fault``, ``failure`` or ``internal``."""
    message: str
    """One sentence."""
    detail: dict[str, Any] = field(default_factory=dict)


class Runner:
    """One machine and the thread that runs it."""

    def __init__(self, options: DomainOptions, progress: Callable[[str], None], ahead: str | None = None) -> None:
        """
        Build the machine. BadFileError, BadOptionError and their relatives for what cannot be booted.

        ``ahead``: the protocol of a domain of such options that is to go on here, and is not known yet: see
        :meth:`go_on`.
        """
        from nonroot.engines import select

        self.mailbox = Mailbox()
        self._thread: threading.Thread | None = None
        self._options = options
        self._choice = select.choose(options.engine, interpreted=options.interpreted or options.left_to_others)
        self.guest_devices: GuestDevices | None = None
        """Its paravirtual devices, if it is Xen's."""
        self.new_addresses: dict[int, tuple[str, str]] = {}
        """Of cards on networks between domains: addresses that the guest, a copy, does not know yet, and its own IP."""
        self.shares: Shares | None = None
        """Its shared folders, once their processes run."""
        self.model: DeviceModel | None = None
        """Its device model, if that is a process of its own."""
        saved = None if options.saved is None else read_saved(options.saved, options)
        self.greeting = b""
        """What the agent of a saved domain has said already."""
        if saved is not None:
            self._options = options = saved.options
        self._by_serial: bool | None = None
        self._command_line = ""
        self._layers: dict[str, Layer] = {}
        self.xen, self._xen_reason = xen_services(options, saved is not None or ahead is not None)
        """The domain's dealings with XenStore, if it is Xen's."""
        options.xen = self.xen is not None
        try:
            if ahead is not None:
                self._machine = self._resumable(ahead, None, 0, {})
            else:
                self._machine = self._build(progress) if saved is None else self._rebuild(saved)
        except BaseException:
            self.close()
            raise
        self.seat = self._find_seat()
        """The screen and the keyboard; None if there is none."""
        self._eager = options.virtual_time
        self._pieces = 0  # that the agent has sent
        self._released = 0  # that the loop has acted on
        self._changed = threading.Condition()
        self._console = bytearray()
        self._calls: deque[tuple[Callable[[], Any], Answer]] = deque()
        self._to_guest = 0  # bytes handed over to the machine that its queue does not show yet
        self._snapshot: tuple[dict[str, bytes], dict[str, Any] | None, tuple[int, int]] | None = None
        self._state = "created"
        self._paused = False
        self._suspended = False  # whether its devices are
        self._began = time.monotonic()
        self._ended: float | None = None

    def _build(self, progress: Callable[[str], None]) -> "Machine":
        from nonroot.engines import select
        from nonroot.hvm.machine import Machine, MachineConfig
        from nonroot.hvm.memory_map import MemorySizeError

        options = self._options
        engine = select.create(self._choice.engine)
        firmware = pc.firmware(options)
        progress("loading the kernel" if firmware is None else "loading the firmware")
        kernel = b"" if firmware is not None else _read(options.kernel or "", "kernel")
        initrd = None if options.initrd is None else _read(options.initrd, "initrd")
        setup = guest_setup(options)
        if setup is not None:
            initrd = append(initrd or b"", setup.archive())
        if options.agent:
            initrd = with_agent(initrd or b"", agent_program(kernel_bits(options.kernel or "")))
        self._command_line = command_line(options, setup is not None)
        self.drives = Drives(options)
        self.shares = Shares(parse_shares(options.shares))
        self.model = model = make_model(options, self.drives, 0 if self.xen is None else self.xen.domid)
        if model is not None:
            devices: list[Attach] = [partial(attach_model, model, self.drives)]
        else:
            devices = [*pc.attachments(options), *([self.drives.attach] if self.drives.wanted else [])]
        config = MachineConfig(
            memory_bytes=options.memory,
            kernel=kernel,
            firmware=firmware,
            attach=[*devices, *([self.shares.attach] if self.shares.wanted else [])],
            reboot=options.reboot and firmware is not None,
            cmdline=self._command_line,
            initrd=initrd,
            protocol=options.protocol,
            base_wall_ns=VIRTUAL_BASE_NS if options.virtual_time else time.time_ns(),
            agent=options.agent and options.agent_ports,
            scramble_seed=options.scramble_seed,
            virtual_time=VIRTUAL_TIME if options.virtual_time else None,
            random_seed=options.seed,
            generation_id=bytes(16) if options.virtual_time else os.urandom(16),
            engine_off=frozenset(options.off),
            xen=None if self.xen is None else XenConfig(domid=self.xen.domid),
        )
        try:
            machine = Machine(config, engine, self._outputs())
        except MemorySizeError as error:
            raise BadOptionError(str(error)) from None
        self._protocol_reason = "it starts in firmware" if machine.plan is None else machine.plan.reason
        if self.xen is not None and machine.xen is not None:
            self.xen.attach(machine.xen)
            self.guest_devices = self._plug(machine, machine.xen)
            self._join_halves(machine, self.guest_devices)
        return machine

    def _join_halves(self, machine: "Machine", devices: "GuestDevices") -> None:
        """Have Xen's disks take turns with the emulated ones that are the same."""
        self.drives.on_twins = devices.twins_are_off
        platform = next((device for device in machine.board.devices if isinstance(device, XenPlatform)), None)
        if platform is not None:
            platform.unplug = partial(self._unplug, off=platform.unplug)

    def _outputs(self) -> "Outputs":
        from nonroot.hvm.config import Outputs

        return Outputs(self._serial, self._from_agent, lambda: self.mailbox.post("space"))

    def _rebuild(self, saved: Saved) -> "Machine":
        """The machine of a saved domain."""
        check_can_be_saved(self._options, None)
        saved.devices.check_images()
        base, self._layers = image(saved), read_layers(saved)
        try:
            machine = self._resumable(saved.protocol, base, self._power_on_ns(saved), self._layers)
        finally:
            if base is not None:
                base.close()
        self._fill(machine, saved)
        return machine

    def _power_on_ns(self, saved: Saved) -> int:
        """When the domain would have been powered on, had it never stood still: UTC."""
        return VIRTUAL_BASE_NS if self._options.virtual_time else time.time_ns() - saved.machine_ns

    def go_on(self, options: DomainOptions) -> bool:
        """
        For one that was built ``ahead``: have it be the saved domain that ``options`` name.

        False if its machine is another one. BadFileError and its relatives: this one is of no use then.
        """
        saved = read_saved(options.saved or "", options)
        machine = self._machine
        ignored = ("saved", "kept", "layers", "name", "domid")
        ours, theirs = self._options.to_wire(), saved.options.to_wire()
        fits = all(ours[name] == theirs[name] for name in ours if name not in ignored)
        ours_alone = saved.options.layers and not saved.devices.of_xen and not self.drives.wanted
        if not fits or saved.protocol != machine.protocol or not ours_alone:
            return False
        base = image(saved)
        assert base is not None
        try:
            machine.ram.begin(base)
        finally:
            base.close()
        self._options = saved.options
        machine.power_on_was(self._power_on_ns(saved))
        self._fill(machine, saved)
        return True

    def _resumable(
        self, protocol: str, base: "RamBase | None", power_on_ns: int, layers: dict[str, Layer]
    ) -> "Machine":
        """A machine of the same parts as that of a saved domain, to be filled."""
        from nonroot.engines import select
        from nonroot.hvm.machine import Machine, MachineConfig

        options = self._options
        self._protocol_reason = "it was saved"
        self.drives = Drives(options, layers)
        config = MachineConfig(
            memory_bytes=options.memory,
            resumed=True,
            protocol=protocol,
            firmware=pc.firmware(options),
            attach=[*pc.attachments(options), *([self.drives.attach] if self.drives.wanted else [])],
            reboot=options.reboot and options.firmware is not None,
            base_wall_ns=power_on_ns,
            agent=options.agent and options.agent_ports,
            scramble_seed=options.scramble_seed,
            virtual_time=VIRTUAL_TIME if options.virtual_time else None,
            random_seed=options.seed,
            engine_off=frozenset(options.off),
            ram_base=base,
            xen=None if self.xen is None else XenConfig(domid=self.xen.domid),
        )
        machine = Machine(config, select.create(self._choice.engine), self._outputs())
        if self.xen is not None and machine.xen is not None:
            self.xen.attach(machine.xen)
        return machine

    def _fill(self, machine: "Machine", saved: Saved) -> None:
        """Have a machine go on as a saved domain."""
        self._fill_machine(machine, saved)
        self._fill_store(machine, saved)
        _close_inherited(self._options.saved)

    def _fill_machine(self, machine: "Machine", saved: Saved) -> None:
        options = self._options
        self._command_line, self._by_serial, self.greeting = saved.command_line, saved.by_serial, saved.greeting
        if (self.xen is None) != (saved.store is None):
            raise BadFileError(f"{saved.path} cannot be restored: its guest needs Xen, or cannot do with it")
        fill(machine, saved)
        if not options.virtual_time:
            machine.rtc.skip((time.time_ns() - saved.wall_ns) // 1_000_000_000)

    def _fill_store(self, machine: "Machine", saved: Saved) -> None:
        """Nodes, watches, and devices, whose rings have been restored if there are any."""
        from nonroot.domain.guest_devices import GuestDevices

        options = self._options
        if self.xen is not None and machine.xen is not None and saved.store is not None:
            devices = GuestDevices(machine.xen, options.name, lambda: self._in_machine(machine.ram.share))
            self.guest_devices = devices
            try:
                if saved.devices.of_xen:
                    copy, twins = saved.is_fork or options.kept, self.drives.twins()
                    devices.restore(saved.devices, twins, self._layers, copy=copy, fork=saved.is_fork)
                    if copy:
                        found = devices.addresses().items()
                        self.new_addresses = {n: (mac, "" if saved.is_fork else ip) for n, (mac, ip) in found}
                self.xen.resume(saved.store, devices.resume, begun=saved.devices.of_xen)
            except StateError as error:
                raise BadFileError(f"{saved.path} is no saved domain that could be restored: {error}") from None
            self._join_halves(machine, devices)
        elif saved.devices.of_xen:
            raise BadFileError(f"{saved.path} cannot be restored: its devices need Xen")

    def _in_machine(self, action: Callable[[], object]) -> None:
        """Have something done in the vCPU's thread, and wait for it. NonrootError that it raises. Not in the loop."""
        if self._thread is None or self._thread is threading.current_thread():
            action()
            return
        done = threading.Event()
        results: list[Any] = []

        def act() -> None:
            results.append(_ask(action))
            done.set()

        with self._changed:
            self._calls.append((act, lambda nothing: None))
            self._changed.notify_all()
        self._machine.post(self._serve)
        done.wait()
        if isinstance(results[0], NonrootError):
            raise results[0]

    def seal(self, concierge: socket.socket) -> "Confinement | None":
        """Confine this process, whose guest has not begun; None if it needs more of the host. TransientError.

        ``concierge``: see :mod:`nonroot.domain.sealing`; it is ours to close.
        """
        if self._thread is not None or not can_be_sealed(self._options):
            concierge.close()
            return None
        if self.xen is None:
            concierge.close()
        else:
            self.xen.seal(connector(concierge))
        return seal(self._options.memory)

    def save(
        self,
        path: str,
        packed: bool,
        greeting: bytes,
        toolstack: dict[str, Any] | None,
        file: int | None = None,
        stay: bool = False,
        fork: bool = False,
    ) -> dict[str, Any]:
        """
        Write the domain to a file; its vCPU stands, and this is its thread. ``file``: see :func:`write_saved`.

        ``stay``: its devices stay suspended until it goes on: so images are what the guest has left.
        """
        machine, options, line = self._machine, self._options, self._command_line
        devices = self.guest_devices
        suspended = SavedDevices() if devices is None else devices.suspend()
        stays = False
        try:
            suspended = replace(suspended, media=self.drives.suspend())
            overlays = self.drives.overlays() | ({} if devices is None else devices.overlays())
            cdroms, floppies = self.drives.inserted()
            options = replace(options, cdroms=cdroms, floppies=floppies)
            result = write_saved(
                path,
                packed,
                machine,
                options,
                line,
                self._by_serial,
                greeting,
                self.xen,
                toolstack,
                file,
                suspended,
                overlays,
                fork,
            )
            stays = stay
        finally:
            if devices is not None and not stays:
                devices.resume()
        self._suspended = stays and suspended.of_xen
        return result

    def fork(self, greeting: bytes) -> list[int]:
        """Descriptors of what a fork goes on from; the vCPU stands, and this is its thread."""
        if self.has_devices:
            # The backends of both need memory that can be shared, so it is copied.
            file = os.memfd_create("nonroot-fork", os.MFD_CLOEXEC)
            try:
                self.save("the fork", False, greeting, None, file, fork=True)
            except BaseException:
                os.close(file)
                raise
            return [file]
        return write_fork(self._machine, self._options, self._command_line, self._by_serial, greeting, self.xen)

    @property
    def has_devices(self) -> bool:
        """Whether its disks, drives or cards have to be looked after."""
        return self.drives.wanted or (self.guest_devices is not None and self.guest_devices.any)

    def check_can_be_saved(self, forking: bool) -> None:
        """UnsupportedError, one sentence, for devices that cannot go on elsewhere; see :class:`GuestDevices`."""
        if self.model is not None:
            raise UnsupportedError(
                "a domain whose device model has a process of its own cannot be saved or forked yet: "
                "use device model 'internal'"
            )
        if forking:
            self.drives.check_can_be_forked()
        if self.guest_devices is not None:
            self.guest_devices.check_can_be_saved(forking)

    def recipe(self) -> dict[str, Any]:
        """What a process needs to build the machine of this domain's next fork ahead; empty if it cannot."""
        if self.has_devices:
            return {}
        store = None if self.xen is None else self.xen.last_saved
        return {"options": plain_options(self._options), "protocol": self._machine.protocol, "store": store}

    def prepare(self, store: dict[str, Any] | None) -> None:
        """For one that was built ahead: have the nodes that the domain's last fork had, and rehearse. BadFileError."""
        try:
            if self.xen is not None and store is not None:
                self.xen.prepare(Fields("XenStore", store))
            rehearse(self._machine, self._options)
        except StateError as error:
            raise BadFileError(f"the fork cannot be prepared: {error}") from None

    def snapshot(self) -> dict[str, Any]:
        """Remember this state, instead of an earlier one; the vCPU stands, and this is its thread."""
        store = None if self.xen is None else self.xen.saved()
        records = take(self._machine)
        self._machine.ram.remember()
        self._snapshot = (records, store, (0, 0) if self.xen is None else self.xen.changes())
        return {}

    def revert(self) -> dict[str, Any]:
        """Go back to what was remembered, or NotRunningError; the vCPU stands, and this is its thread."""
        if self._snapshot is None:
            raise NotRunningError("there is no snapshot to revert to")
        records, store, seen = self._snapshot
        self._machine.ram.revert()
        restore(self._machine, records)
        if self.xen is not None and store is not None:
            self.xen.revert(Fields("XenStore", store), seen)
            self._snapshot = (records, store, self.xen.changes())
        return {}

    def _plug(self, machine: "Machine", host: "XenHost") -> "GuestDevices":
        """What the domain is born with."""
        from nonroot.domain.guest_devices import GuestDevices

        options = self._options
        devices = GuestDevices(host, options.name, lambda: self._in_machine(machine.ram.share))
        try:
            twins = self.drives.twins()
            for plan in plan_disks(options):
                if plan.name in twins:
                    devices.add_twin(plan.name, twins.pop(plan.name))
                elif plan.name is not None:
                    devices.add_disk(plan.image, plan.name)
            for network in parse_networks(options.networks, options.publish):
                devices.add_network(network)
        except BaseException:
            devices.close()
            raise
        return devices

    def _unplug(self, mask: int, off: Callable[[int], object]) -> None:
        """A Xen guest gives emulated devices up; or, with 0, the machine starts again. In the vCPU's thread."""
        if mask == 0:
            if self.xen is not None:
                self.xen.restart()
            if self.guest_devices is not None:
                self.guest_devices.restart()
        off(mask)

    def _find_seat(self) -> Seat | None:
        if not self._options.has_display:
            return None
        from nonroot.devices.display import Console as Seated
        from nonroot.devices.ps2 import Ps2Controller
        from nonroot.devices.vga import Vga

        machine = self._machine
        if self.model is not None:
            console, vga_ram = self.model.console, self.model.ram("vga")
            if console is None or vga_ram is None:
                return None
            return Seat(console, machine.memory_files[vga_ram.file], machine.vcpu.retired, self._watch_progress)
        devices = machine.board.devices
        vga = next((device for device in devices if isinstance(device, Vga)), None)
        ps2 = next((device for device in devices if isinstance(device, Ps2Controller)), None)
        if vga is None or ps2 is None or not isinstance(vga.ram, BoardRam):
            return None
        return Seat(Seated(vga, ps2), machine.memory_files[vga.ram.file], machine.vcpu.retired, self._watch_progress)

    def _watch_progress(self) -> None:
        self._machine.watch_progress(lambda: self.mailbox.post("progress"))

    # ── for the process's loop ──

    def describe(self) -> dict[str, Any]:
        """What was made."""
        return {
            "engine": self._choice.engine,
            "reason": self._choice.reason,
            "protocol": self._machine.protocol,
            "protocol_reason": self._protocol_reason,
            "kernel": self._options.kernel,
            "initrd": self._options.initrd,
            "command_line": self._command_line,
            "memory": self._options.memory,
            "virtual_time": self._options.virtual_time,
            "xen": self.xen is not None,
            "domid": None if self.xen is None else self.xen.domid,
            "xen_reason": self._xen_reason,
            "device_model": INTERNAL if self.model is None else self._options.device_model,
        }

    @property
    def options(self) -> DomainOptions:
        """What the domain is made of."""
        return self._options

    @property
    def state(self) -> str:
        """``created``, ``running``, ``paused`` or ``stopped``."""
        return "paused" if self._paused and self._state == "running" else self._state

    def start(self) -> None:
        """Power on."""
        if self._thread is not None:
            return
        self._began = time.monotonic()
        self._state = "running"
        self._thread = threading.Thread(target=self._run, name="vcpu0", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The domain is over: nothing of it stays outside of this process."""
        if self.model is not None:
            self.model.close()
        if self.shares is not None:
            self.shares.close()
        if self.guest_devices is not None:
            self.guest_devices.close()
        if self.xen is not None:
            self.xen.close()

    def call(self, question: Callable[[], Any], answer: Answer) -> None:
        """Have ``question`` asked in the vCPU's thread; ``answer`` gets its result, or a NonrootError, in the loop."""
        if self._thread is None:
            answer(_ask(question))
            return
        with self._changed:
            self._calls.append((question, answer))
            self._changed.notify_all()
        self._machine.post(self._serve)

    def work(self, question: Callable[[], Any], answer: Answer) -> None:
        """Have ``question`` asked in a thread of its own, as it may take long; ``answer`` as for :meth:`call`."""
        thread = threading.Thread(
            target=lambda: self.mailbox.post("answer", (answer, _ask(question))), name="nonroot-work", daemon=True
        )
        thread.start()

    def press_power_button(self) -> None:
        """Ask the guest to shut down, as its power button does."""
        self._machine.press_power_button()

    def renew_generation(self) -> None:
        """Tell the guest that it is a copy: another VM generation ID."""
        self._machine.renew_generation(os.urandom(16))

    def reset(self) -> None:
        """Press the reset button."""
        self._machine.post(self._machine.request_reset)

    def pause(self, answer: Answer) -> None:
        """Stop the guest and its time; ``answer`` is called when it stands."""
        if not self._paused:
            self._paused = True
            self._machine.pause()
        self.call(dict, answer)

    def unpause(self) -> None:
        """Let it go on."""
        if self._paused:
            self._paused = False
            if self._suspended and self.guest_devices is not None:
                self._suspended = False
                self.call(self.guest_devices.resume, lambda nothing: self._machine.resume())
            else:
                self._machine.resume()

    def send(self, data: bytes) -> None:
        """Bytes for the agent."""
        with self._changed:
            self._to_guest += len(data)
        self._machine.post(lambda: self._hand_over(data))

    def waiting(self) -> int:
        """Bytes that the agent has not read yet."""
        machine = self._machine
        queued = machine.console_backlog(1) if self._by_serial else machine.agent_backlog()
        return self._to_guest + queued

    @property
    def needs_polling(self) -> bool:
        """The serial line does not tell when it has room: look again soon."""
        return bool(self._by_serial) and self.waiting() > 0

    def release(self, pieces: int) -> None:
        """In virtual time: the guest may go on if it has sent no more than so many pieces."""
        if self._eager and pieces != self._released:
            with self._changed:
                self._released = pieces
                self._changed.notify_all()

    def console_input(self, data: bytes) -> None:
        """Keys for the console."""
        if self._machine.console_backlog(0) < MAX_KEYS:
            self._machine.console_input(data)

    def take_console(self) -> bytes:
        """Console output since the last call."""
        with self._changed:
            data = bytes(self._console)
            self._console.clear()
            self._changed.notify_all()
        return data

    def memory_map(self) -> list[int]:
        """
        Descriptors: first the p2m as records (gfn, count, backing, offset), then the backings, read-only.

        In the vCPU's thread.
        """
        runs = b"".join(
            _RUN.pack(gfn, count, backing, offset) for gfn, count, backing, offset, _ in self._machine.memory.runs()
        )
        self._machine.ram.share()
        fd = os.memfd_create("nonroot-p2m", os.MFD_CLOEXEC)
        os.write(fd, runs)
        return [fd, *self._machine.memory_files]

    # ── questions, asked through call ──

    def statistics(self) -> dict[str, Any]:
        """What the client's Statistics has."""
        machine = self._machine
        used = resource.getrusage(resource.RUSAGE_SELF)
        counters = machine.statistics()
        exits = {k.removeprefix("exit."): v for k, v in counters.items() if k.startswith("exit.")}
        engine = dict(machine.vcpu.statistics())
        engine |= {k: v for k, v in counters.items() if not k.startswith("exit.")}
        if self.model is not None:
            engine |= {"device-model.requests": self.model.requests, "device-model.restarts": self.model.restarted}
        return {
            "state": self.state,
            "instructions": machine.vcpu.retired(),
            "machine_seconds": machine.vcpu.now_ns() / 1e9,
            "wall_seconds": (self._ended or time.monotonic()) - self._began,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "exits": exits,
            "engine": engine,
        }

    def registers(self) -> dict[str, Any]:
        """The vCPU's state record, in base64."""
        return {"record": base64.b64encode(self._machine.vcpu.state().to_bytes()).decode()}

    def write_memory(self, address: int, data: bytes) -> dict[str, Any]:
        """Write like DMA."""
        try:
            self._machine.memory.write(address, data)
        except (ValueError, OverflowError) as error:
            raise BadOptionError(str(error)) from None
        return {}

    # ── the vCPU's thread ──

    def _run(self) -> None:
        host.leave_signals_to_others()
        try:
            stop = self._run_machine()
        except BaseException as unexpected:
            import traceback

            trace = "".join(traceback.format_exception(unexpected))
            stop = Stop("internal", f"nonroot itself failed: {unexpected!r}", {"trace": trace[-8000:]})
        self._state = "stopped"
        self._ended = time.monotonic()
        self.mailbox.post("stopped", stop)
        while True:  # answer questions about what is left
            with self._changed:
                self._changed.wait_for(lambda: bool(self._calls))
            self._serve()

    def _run_machine(self) -> Stop:
        from nonroot.hvm.outcome import Reason

        while True:
            outcome = self._machine.run()
            if outcome.reason == Reason.POWER_OFF:
                return Stop("poweroff", "the guest powered off")
            if outcome.reason == Reason.RESET:
                return Stop("reset", "the guest reset the machine")
            if outcome.reason == Reason.CRASH:
                return Stop("crash", outcome.detail)
            if outcome.reason == Reason.TRIPLE_FAULT:
                return Stop("triple_fault", "the guest crashed with a triple fault", self._where())
            if outcome.reason == Reason.FAILURE:
                return Stop("failure", f"the guest cannot go on: {outcome.detail}", self._where())

    def _where(self) -> dict[str, Any]:
        state = self._machine.vcpu.state()
        return {"rip": state.rip, "cr0": state.cr0, "cr2": state.cr2, "cr3": state.cr3}

    def _serve(self) -> None:
        while self._calls:
            question, answer = self._calls.popleft()
            self.mailbox.post("answer", (answer, _ask(question)))

    def _hand_over(self, data: bytes) -> None:
        if self._by_serial:
            self._machine.console_input(data, 1)
        else:
            self._machine.agent_input(data)
        # Both put the bytes into the machine's queue when the machine next looks at what was posted, which is now.
        self._machine.post(lambda: self._handed_over(len(data)))

    def _handed_over(self, size: int) -> None:
        with self._changed:
            self._to_guest -= size

    def _serial(self, number: int, data: bytes) -> None:
        if number == 0:
            with self._changed:
                if len(self._console) >= MAX_CONSOLE:
                    self._wait(lambda: len(self._console) < MAX_CONSOLE)
                first = not self._console
                self._console += data
            if first:
                self.mailbox.post("console")
        elif number == 1:
            if self._by_serial is None and data[:1] == bytes((HELLO,)):
                self._by_serial = True
            if self._by_serial:
                self._to_loop(data)

    def _from_agent(self, data: bytes) -> None:
        if self._by_serial is None:
            self._by_serial = False
        if not self._by_serial:
            self._to_loop(data)

    def _to_loop(self, data: bytes) -> None:
        self._pieces += 1
        self.mailbox.post("agent", data, len(data))
        if self._eager:
            with self._changed:
                self._wait(lambda: self._released >= self._pieces)

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Stand still (with the lock held) until ``condition``, but answer questions meanwhile."""
        while True:
            self._changed.wait_for(lambda: condition() or bool(self._calls))
            if condition():
                return
            self._changed.release()
            try:
                self._serve()
            finally:
                self._changed.acquire()


def _close_inherited(path: str | None) -> None:
    """A fork's files are descriptors that its process was given; they have been used."""
    number = (path or "").removeprefix(INHERITED)
    if number.isdigit():
        os.close(int(number))


def command_line(options: DomainOptions, setup: bool = False) -> str:
    """The kernel's command line; the user's part comes last, so that it wins. ``setup``: there is a GuestSetup."""
    # With both, each line would come twice.
    hvc = options.xen and "console=ttyS" not in options.append
    words = ["console=hvc0" if hvc else "console=ttyS0", "panic=-1", "cryptomgr.notests"]
    if options.quiet:
        words.append("quiet")
    if options.agent:
        words.append(f"rdinit={AGENT_PATH}")
    elif setup:
        words.append(f"rdinit={INIT_PATH}")
    return " ".join([*words, options.append]).strip()


def guest_setup(options: DomainOptions) -> GuestSetup | None:
    """What guest software of ours needs for the domain's devices; None if that is nothing, or it is not ours."""
    shares = parse_shares(options.shares)
    if not options.setup:
        return None
    disks = [name for name, _ in paravirtual_disks(options)]
    modules = None if options.modules is None else Path(options.modules)
    networks = parse_networks(options.networks, options.publish)
    setup = GuestSetup(
        disks,
        networks,
        modules,
        more_modules=list(SHARE_MODULES) if shares else [],
        more_lines=setup_lines(shares),
        agent=options.agent,
        # A guest that the toolstack made lives long enough for devices to come; any other starts quicker without.
        attachable=options.xen is not False and not options.agent,
    )
    return setup if setup.wanted else None


def xen_services(options: DomainOptions, resumed: bool = False) -> tuple["XenServices | None", str]:
    """None, and why not. ``resumed``: of a domain that was saved."""
    if options.xen is False:
        return None, "it was not asked for"
    from nonroot.domain.xen import XenServices
    from nonroot.xenstore.client import XenStore

    try:
        domid = options.domid or allocate_domid()
        return XenServices(XenStore(), options.memory, options.name or None, domid, resumed=resumed), "it can be had"
    except NonrootError as error:
        if options.xen:
            raise
        return None, str(error)


def _ask(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except NonrootError as error:
        return error
    except Exception as unexpected:
        return InternalError(f"nonroot itself failed: {unexpected!r}")


def _read(path: str, what: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE:
                raise BadFileError(f"the {what} {path} has {size} bytes, which is too much")
            return file.read()
    except OSError as error:
        raise BadFileError(f"the {what} {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
