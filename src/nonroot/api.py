"""The public face: a domain, its commands, console, memory and registers.

>>> import nonroot
>>> with nonroot.Domain() as d:                      # doctest: +SKIP
...     result = d.run(["uname", "-a"])
...     print(result.stdout)
"""

import base64
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from nonroot.display.screen import HasScreen
from nonroot.domain import boot_cache, registry
from nonroot.domain.child import Template
from nonroot.domain.client import DomainClient, Pending, check_version
from nonroot.domain.concierge import Concierge
from nonroot.domain.device_commands import HasDevices, drive_text
from nonroot.domain.expect import Console
from nonroot.domain.find_guest import SEABIOS, find_firmware, find_guest
from nonroot.domain.guest_commands import RunsCommands
from nonroot.domain.memory import Memory
from nonroot.domain.options import DomainOptions, parse_size
from nonroot.domain.wire import Kind
from nonroot.domain.xen_choice import choose_xen
from nonroot.errors import (
    BadFileError,
    BadOptionError,
    BootTimeoutError,
    DomainLostError,
    NonrootError,
    NotRunningError,
    TransientError,
    UnsupportedError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from nonroot.engines.state import VcpuState

__all__ = ["SEABIOS", "Domain", "Statistics", "Stopped"]


@dataclass(frozen=True, slots=True)
class Stopped:
    """How a domain's guest ended."""

    reason: str
    """``poweroff``, ``reset``, ``panic``, ``crash``, ``triple_fault``, ``halted``, ``failure`` or ``internal``."""
    message: str
    """One sentence."""
    console: str
    """The console's last lines."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a domain has done so far."""

    state: str
    """``created``, ``running``, ``paused`` or ``stopped``."""
    instructions: int
    """Guest instructions retired; a REP iteration counts as one."""
    machine_seconds: float
    """The guest's time since its power-on."""
    wall_seconds: float
    """Ours."""
    cpu_seconds: float
    """CPU time of the domain's process."""
    exits: dict[str, int]
    """VM exits by kind."""
    engine: dict[str, int]
    """The engine's own counters."""


class Domain(RunsCommands, HasScreen, HasDevices):
    """A guest in a process of its own. Use it as a context manager, or :meth:`start` and :meth:`destroy` it.

    Without a kernel it boots Debian's cloud kernel with a busybox userland, fetched at the first use (see
    :mod:`nonroot.guests`). Commands and file copies go through an agent that is added to the initramfs.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str] | None = None,
        initrd: str | os.PathLike[str] | None = None,
        append: str = "",
        memory: str | int = "256M",
        engine: str = "auto",
        virtual_time: bool = False,
        seed: int = 0,
        timeout: float = 120.0,
        *,
        flavour: str | None = None,
        agent: bool = True,
        quiet: bool = True,
        protocol: str = "auto",
        scramble_seed: int | None = None,
        agent_ports: bool = True,
        off: Iterable[str] = (),
        firmware: str | os.PathLike[str] | None = None,
        disks: Iterable[str | os.PathLike[str]] = (),
        cdrom: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
        floppy: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
        boot: str = "cd",
        boot_menu: bool = False,
        serial_firmware: bool = False,
        reboot: bool = True,
        display: bool = False,
        device_model: str = "internal",
        xen: bool | None = None,
        networks: Iterable[str] = (),
        publish: Iterable[str] = (),
        shares: Iterable[str] = (),
        name: str | None = None,
        console: bool = True,
        kept: bool = False,
        sealed: bool = False,
        fetch: bool = True,
        progress: Callable[[str], None] | None = None,
        fetch_progress: Callable[[str, float], None] | None = None,
    ) -> None:
        """
        :param kernel: a bzImage, or an ELF with a PVH note.
        :param initrd: its initramfs; several archives may be joined in one file.
        :param append: added to the kernel's command line.
        :param memory: bytes, or text like ``"256M"``, ``"1G"``.
        :param engine: ``auto`` or an engine's name.
        :param virtual_time: time is a function of retired instructions: runs repeat exactly, on one vCPU.
        :param seed: of the machine's randomness (RDRAND) in virtual time.
        :param timeout: seconds for the boot until commands can run.
        :param flavour: which of Debian's kernels, if none is given (``cloud-amd64``, ``amd64``, ``686-pae``, ``686``).
        :param agent: add our init to the initramfs. Without it, the initramfs's own init runs, and no commands can.
        :param quiet: ask the kernel to print little.
        :param protocol: how the kernel is entered: ``auto``, ``pvh``, ``linux64`` or ``linux32``.
        :param scramble_seed: put every frame of guest memory at a random place of its file; for tests.
        :param agent_ports: let the agent use its I/O ports; without them it uses the second serial port, slowly.
        :param off: names of the engine's optimisations to switch off.
        :param firmware: start in firmware, not a kernel: ``"seabios"`` or ``"ovmf"`` (fetched), or an image's path.
        :param disks: disk images, each a path or text ``IMG[,ro][,overlay][,backing][,format=NAME][,ide]``; xvda … for
            a kernel that is started as Xen's, with ``ide`` and for all others hda …. A domain with drives and without
            ``kernel`` and ``flavour`` starts in the firmware ``"seabios"``.
        :param cdrom: a CD image or several; ``"none"`` is an empty drive.
        :param floppy: a floppy image or two; ``"none"`` is an empty drive.
        :param boot: what the firmware boots from, in order: ``a`` floppy, ``c`` disk, ``d`` CD.
        :param boot_menu: have the firmware offer its boot menu.
        :param serial_firmware: have the firmware show its text on the first serial port too.
        :param reboot: start a guest of firmware again when it resets, rather than end.
        :param device_model: where emulated devices are: ``"internal"``, in the domain's process; ``"stub"``, in a
            confined process of their own (a stub domain); ``"dom0"``, in one that is not confined.
        :param display: have a screen, keyboard and mouse also without firmware, which has them always.
        :param xen: be a Xen for the guest: hypercalls, Xen's clock and timer, its console (hvc0), disks (xvda …) and
            network cards. None: if a kernel is started that knows Xen, and not in virtual time.
        :param networks: of network cards: ``"user"`` is the user's own view of the network, any other name a network
            between domains; text ``NETWORK[,mac=MAC][,ip=ADDRESS/BITS][,isolated][,loopback]``.
        :param publish: ports of this machine that lead into the guest, ``"[ADDRESS:]PORT:GUEST-PORT[/udp]"``; adds
            the network ``"user"`` if there is none.
        :param shares: folders of this machine that the guest has too, ``"HOST:GUEST[:ro]"``. Guest software of ours
            mounts them before commands run; others find them as the virtio file systems ``share0``, ``share1`` ….
        :param name: under which ``nonroot list`` shows it; without one it gets a free name.
        :param console: keep the console's output for :attr:`console`.
        :param kept: go on from a boot that was kept, where there is one for just this domain, and keep this boot where
            there is none (see :attr:`origin`). Domains with disks, drives or folders, in virtual time or without an
            agent boot as ever.
        :param sealed: let the domain's process give up the host before the guest begins. Only a domain without drives,
            cards, shared folders and screen is; disks and cards cannot be added to it, and it cannot be renamed.
        :param fetch: whether guest software may be fetched from the network.
        :param progress: called with the names of the steps of starting.
        :param fetch_progress: called with (what, share done from 0 to 1) while guest software is fetched.
        :raises BadOptionError, BadFileError: at :meth:`start`, for what could not work.
        """
        self.console = Console(self._type)
        self.memory = Memory(self._memory_map, self._memory_write)
        self.note: str | None = None
        """Where what boots is not what was asked for: why."""
        self._memory_size = memory
        self._boot_timeout = timeout
        self._flavour = flavour
        self._fetch = fetch
        self._progress = progress or (lambda phase: None)
        self._fetch_progress = fetch_progress
        self._want_console = console
        self._sealed = sealed
        self._options = DomainOptions(
            kernel=_absolute(kernel),
            initrd=_absolute(initrd),
            append=append,
            engine=engine,
            virtual_time=virtual_time,
            seed=seed,
            agent=agent,
            quiet=quiet,
            protocol=protocol,
            scramble_seed=scramble_seed,
            agent_ports=agent_ports,
            off=list(off),
            disks=[drive_text(disk) for disk in disks],
            cdroms=_media(cdrom),
            floppies=_media(floppy),
            boot=boot,
            boot_menu=boot_menu,
            serial_firmware=serial_firmware,
            reboot=reboot,
            display=display,
            device_model=device_model,
            xen=xen,
            networks=_texts(networks, "networks"),
            publish=_texts(publish, "publish"),
            shares=_shares(shares),
        )
        self._name = name
        self._kept = kept
        self._keep_at: Path | None = None
        self._fork_of: Sequence[int] = ()
        self._ahead: DomainClient | None = None
        self._ahead_lock = threading.Lock()
        self.origin = "fresh"
        """``fresh``; ``kept`` if it goes on from a boot that was kept, ``saved``: from a file; ``fork``."""
        has_drives = bool(self._options.disks or self._options.cdroms or self._options.floppies)
        if firmware is None and kernel is None and flavour is None and has_drives:
            firmware = SEABIOS
        self._firmware = None if firmware is None else os.fspath(firmware)
        self._client = DomainClient.started_early() or DomainClient()
        self._description: dict[str, Any] = {}
        self._started = False
        self._start_time = 0.0
        self._ready: dict[str, Any] | None = None
        self._stopped = threading.Event()
        self._stop: Stopped | None = None
        self._operation = threading.Lock()
        self.on_event: Callable[[dict[str, Any]], None] = lambda record: None
        """Called with the domain's events, in the client's reader thread."""

    # ── life ──

    def start(self) -> Self:
        """Make the domain and power it on. It boots while you go on; :meth:`run` waits for it."""
        if self._started:
            raise NotRunningError("a domain can be started only once; make another one")
        options = self._options
        options.memory = parse_size(self._memory_size, "memory size")
        options.check()
        if options.saved is not None:
            pass
        elif self._firmware is not None:
            find_firmware(options, self._firmware, self._fetch_progress, self._fetch)
        else:
            self.note = find_guest(options, self._flavour, self._fetch_progress, self._fetch)
        if options.saved is None:
            choose_xen(options)
        self._started = True
        client = self._client
        client.on_event = self._event
        client.on_console = self.console.feed
        client.on_lost = self._lost
        try:
            if not client.pid:
                client.spawn()
            if options.saved is not None:
                self.origin = "saved"
            # The process takes one request after the other: none of them need wait for the answer to the one before.
            hello = client.submit("hello")
            create = None if self._kept else client.submit("create", options.to_wire(), fds=self._fork_of)
            check_version(hello.wait(60))
            if create is None and not self._go_on():
                create = client.submit("create", options.to_wire())
            # Before it runs, if its name may be somebody else's, or its process will not reach the list any more.
            register = self._submit_registration() if self._name is not None or self._sealed else None
            waiting = [client.submit("attach_console")] if self._want_console else []
            waiting.append(self._power_on())
            register = register or self._submit_registration()
            if create is not None:
                self._description = create.wait(300)
            self._start_time = time.monotonic()
            self._registered(register)
            for pending in waiting:
                pending.wait(60)
        except BaseException:
            self.destroy()
            raise
        return self

    def _power_on(self) -> Pending:
        if not self._sealed:
            return self._client.submit("start")
        concierge = Concierge()
        try:
            return self._client.submit("start", {"concierge": True}, fds=[concierge.theirs.fileno()])
        finally:
            concierge.given()

    def _go_on(self) -> bool:
        """Whether the domain goes on from a boot that was kept."""
        if not self._kept or self._options.saved is not None:
            return False
        try:
            path = boot_cache.kept_boot(self._options)
        except (NonrootError, OSError):
            return False  # no place for a cache: nothing is kept
        if path is None:
            return False
        if not path.exists():
            self._keep_at = path
            return False
        try:
            self._description = self._client.request(
                "create", 300, **(self._options.to_wire() | {"saved": str(path), "kept": True})
            )
        except (BadFileError, UnsupportedError) as error:
            boot_cache.drop(path)
            self._keep_at = path
            self.note = f"a boot that was kept cannot be used ({error}): it is booted anew"
            return False
        boot_cache.used(path)
        self.origin = "kept"
        return True

    def _keep(self) -> None:
        """The guest is ready for its first command: others need not boot."""
        path, self._keep_at = self._keep_at, None
        if path is None:
            return
        try:
            self._save(path, 120, packed=False)
            boot_cache.prune()
        except UnsupportedError:
            pass  # then it cannot be had at all, and nothing is missed
        except (BadFileError, TransientError, TimeoutError) as error:
            self.note = f"this boot could not be kept for the next time: {error}"

    @classmethod
    def boot(cls, **options: Any) -> Self:
        """
        A started domain that is ready for commands, to be forked; it goes on from a boot that was kept if there is one.

            with Domain.boot(memory="256M") as base:
                children = base.fork(100)

        :param options: the constructor's; ``kept`` is set unless it is among them. Raises what :meth:`start` and
            :meth:`wait_ready` raise.
        """
        domain = cls(**({"kept": True} | options)).start()
        try:
            domain.wait_ready()
        except BaseException:
            domain.destroy()
            raise
        return domain

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: str = "auto",
        off: Iterable[str] = (),
        name: str | None = None,
        timeout: float = 120.0,
        console: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """
        A domain that goes on where :meth:`save` left one. :meth:`start` it, or use it as a context manager.

        Its time goes on from then; its clock is set, and its randomness made its own, if it has our agent. Several
        domains can be restored from one file. The parameters are those of the constructor; all others are the saved
        domain's. :raises BadFileError, UnsupportedError: at :meth:`start`, for a file that cannot be restored here.
        """
        domain = cls(engine=engine, off=off, name=name, timeout=timeout, console=console, progress=progress)
        domain._options.saved = _absolute(path)
        return domain

    @overload
    def fork(self) -> Self: ...

    @overload
    def fork(self, count: int) -> list[Self]: ...

    def fork(self, count: int | None = None) -> Self | list[Self]:
        """
        Another domain that goes on from this one's present state, or ``count`` of them; this one goes on too.

        They are started; destroy them, or use them as context managers. Memory is shared until somebody writes to it.
        Each gets a clock that is right and randomness of its own, before its next command.

        :raises TransientError: a command is under way. :raises UnsupportedError: see :meth:`save`.
        """
        self._need()
        Template.shared()
        pending = self._client.submit("fork")
        new = [self._new_fork() for _ in range(1 if count is None else count)]
        with contextlib.suppress(TransientError):  # starting says so
            for child in new[: os.cpu_count()]:
                if not child._client.pid:
                    child._client.spawn()  # meanwhile
        children: list[Self] = []
        files: list[int] = []
        try:
            pending.wait(120)
            files = pending.fds
            if len(new) == 1:
                children = [new[0]._start_as_fork(files)]
            else:
                children = self._start_forks(new, files)
        except BaseException:
            for child in new:
                child.destroy()
            raise
        finally:
            for file in files:
                os.close(file)
        threading.Thread(
            target=self._prepare_fork, args=(pending.wait(),), name="nonroot-fork-ahead", daemon=True
        ).start()
        return children[0] if count is None else children

    def _start_forks(self, new: "Sequence[Self]", files: Sequence[int]) -> "list[Self]":
        """As many at once as there are processors; raises the first failure, after all."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            starts = [pool.submit(child._start_as_fork, files) for child in new]
        failures = [error for start in starts if (error := start.exception()) is not None]
        if failures:
            raise failures[0]
        return [start.result() for start in starts]

    def _prepare_fork(self, recipe: dict[str, Any]) -> None:
        """Whoever has forked once may do it again: have a process that has built the next one's machine."""
        if not recipe or not self._ahead_lock.acquire(blocking=False):
            return
        try:
            if self._ahead is None and self._client.alive:
                client = DomainClient()
                client.spawn()
                client.submit("prepare", recipe)
                self._ahead = client
            if not self._client.alive:
                self._end_ahead()
        except NonrootError:
            pass  # the next fork starts its own
        finally:
            self._ahead_lock.release()

    def _end_ahead(self) -> None:
        client, self._ahead = self._ahead, None
        if client is not None:
            client.close()

    def _new_fork(self) -> Self:
        options = self._options
        child = self._plain_fork(options)
        client, self._ahead = self._ahead, None
        if client is not None and client.alive:
            child._client = client
        elif client is not None:
            client.close()
        return child

    def _plain_fork(self, options: DomainOptions) -> Self:
        return type(self)(
            engine=options.engine,
            off=options.off,
            timeout=self._boot_timeout,
            console=self._want_console,
            sealed=self._sealed,
        )

    def _start_as_fork(self, files: Sequence[int]) -> Self:
        self._options.saved, self._options.layers = f"/proc/self/fd/{files[0]}", list(files[1:])
        self._options.kept = not self._options.layers  # then its memory lies in the same file
        self._fork_of = files
        self.start()
        self.origin = "fork"
        return self

    def snapshot(self) -> None:
        """Remember this state, instead of an earlier one, for :meth:`revert`. Raises what :meth:`fork` does."""
        self._request("snapshot")

    def revert(self, *, freshen: bool = True) -> None:
        """
        Go back to the last :meth:`snapshot`. A command that is under way fails with NotRunningError.

        ``freshen``: set the guest's clock, and give it new randomness; without, it does the same again, as far as that
        depends on itself. NotRunningError if there is no snapshot.
        """
        self._request("revert", freshen=freshen)

    def save(self, path: str | os.PathLike[str], *, packed: bool = True, stay: bool = False) -> None:
        """
        Save the domain to a file, from which :meth:`restore` goes on. It stands still meanwhile, and goes on itself
        unless it was paused, or ``stay`` is set: then it stays paused.

        :param packed: compress; without, the file is larger, and read in milliseconds.
        :raises BadFileError, TransientError: the file cannot be written, or a command is under way; the domain, and a
            file that was there before, are as they were.
        :raises UnsupportedError: the domain has shared folders.

        Disk images are not in the file: a restored domain wants them as they were, and checks that.
        """
        self._need()
        self._save(Path(os.path.abspath(path)), 600, packed=packed, stay=stay)  # noqa: PTH100 - resolve() would follow links

    def _save(self, path: Path, seconds: float, **how: bool) -> None:
        """The file is made here, by whoever may."""
        from nonroot.saved.container import draft_of

        with draft_of(path, durable=how["packed"]) as file:
            self._client.submit("save", {"path": str(path), "file": True, **how}, fds=[file]).wait(seconds)

    def __enter__(self) -> Self:
        return self if self._started else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def destroy(self) -> None:
        """End the domain at once. Safe to call again."""
        self._client.close()
        self._end_ahead()
        if self._name is not None and self._started:
            registry.sweep(self._name)
        self._close_screen()
        self.memory.close()
        self.console.end(DomainLostError("the domain has been destroyed"))

    def kill(self) -> None:
        """End the domain's process without asking it; safe from a signal handler. :meth:`destroy` tidies up."""
        self._client.kill()

    def eject(self, drive: str = "cd0", *, force: bool = False) -> bool:
        """Take the medium out of a drive: ``cd0``, ``cd1``, ``fd0``, ``fd1``.

        False, and nothing done, if the guest has locked the tray and ``force`` is not set.
        """
        return bool(self._request("eject", drive=drive, force=force)["ejected"])

    def insert(self, image: str | os.PathLike[str], drive: str = "cd0") -> None:
        """Put an image into a drive, instead of what is in there. BadFileError if it cannot be used."""
        self._request("insert", drive=drive, image=drive_text(image))

    def press_power_button(self) -> None:
        """Ask the guest to shut down by its power button; whether it does is its own decision."""
        self._request("power_button")

    def reset(self) -> None:
        """Press the reset button: a guest of firmware starts again, any other ends."""
        self._request("reset")

    def shutdown(self, timeout: float = 30.0) -> Stopped:
        """Ask the guest to power off, and wait for it. WaitTimeoutError if it does not; it is not destroyed then."""
        if self._stop is None and not self._client.request("power_off", 30)["asked"]:
            raise UnsupportedError("there is no agent in this guest that could be asked to power off")
        return self.wait(timeout)

    def wait(self, timeout: float | None = None) -> Stopped:
        """Wait until the guest has powered off, rebooted or crashed. WaitTimeoutError after ``timeout`` seconds."""
        self._need()
        if not self._stopped.wait(timeout):
            raise WaitTimeoutError(f"the guest was still running after {timeout:g} seconds")
        if self._stop is None:
            raise DomainLostError("the domain has ended")
        return self._stop

    @property
    def stopped(self) -> Stopped | None:
        """How the guest ended; None while it runs."""
        return self._stop

    def pause(self) -> None:
        """Stop the guest between two instructions; its time stands still."""
        self._request("pause")

    def unpause(self) -> None:
        """Let it go on."""
        self._request("unpause")

    def wait_ready(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait until commands can run; returns what the guest says of itself (``release``, ``machine``, ``bits`` …).

        BootTimeoutError when the time for the boot is over; GuestPanicError and its relatives if the guest ended first.
        """
        self._need()
        if self._ready is not None:
            return self._ready
        if timeout is None:
            timeout = max(0.0, self._start_time + self._boot_timeout - time.monotonic())
        if not self._options.agent:
            raise UnsupportedError(self.note or "this domain was made without an agent, so it cannot run commands")
        try:
            self._ready = self._client.submit("wait_ready").wait(timeout)
        except TimeoutError:
            lines = self.console.text.splitlines()[-12:]
            raise BootTimeoutError(
                f"the guest was not ready to run commands after {time.monotonic() - self._start_time:.0f} seconds",
                console="\n".join(lines),
            ) from None
        self._keep()
        return self._ready

    def _submit_registration(self) -> Pending:
        """Be found by name; a domain without one does without the registry where there is no place for it."""
        facts = {"kernel": self._options.kernel, "firmware": self._options.firmware, "memory": self._options.memory}
        facts |= {"display": self._options.has_display}
        return self._client.submit("register", {"name": self._name, "facts": facts})

    def _registered(self, pending: Pending) -> None:
        try:
            self._name = str(pending.wait(60)["name"])
        except TransientError:
            if self._name is not None:
                raise

    # ── what it is ──

    @property
    def name(self) -> str | None:
        """Its name in the list of running domains; None if there is no place for such a list."""
        return self._name

    @property
    def engine(self) -> str:
        """The engine that runs it."""
        self._need()
        return str(self._description["engine"])

    @property
    def reason(self) -> str:
        """Why it was chosen; one sentence."""
        self._need()
        return str(self._description["reason"])

    @property
    def description(self) -> dict[str, Any]:
        """What was made: ``engine``, ``reason``, ``protocol``, ``command_line``, ``memory`` …"""
        self._need()
        return dict(self._description)

    @property
    def stats(self) -> Statistics:
        """Counters, now."""
        return Statistics(**self._request("stats"))

    @property
    def registers(self) -> "VcpuState":
        """The vCPU's architectural state, between two instructions."""
        from nonroot.engines.state import VcpuState

        return VcpuState.from_bytes(base64.b64decode(self._request("registers")["record"]))

    @property
    def pid(self) -> int:
        """The process id of the domain's process."""
        self._need()
        return self._client.pid

    @property
    def can_run_commands(self) -> bool:
        """Whether our agent is in the guest; false for the built-in guest."""
        return self._options.agent

    # ── inside ──

    def _need(self) -> None:
        if not self._started:
            raise NotRunningError("the domain has not been started")

    def _request(self, method: str, **params: Any) -> dict[str, Any]:
        self._need()
        return self._client.request(method, 120, **params)

    def _type(self, data: bytes) -> None:
        self._need()
        for at in range(0, len(data), 4096):
            self._client.send(Kind.CONSOLE, data[at : at + 4096])

    def _memory_map(self) -> list[int]:
        self._need()
        pending = self._client.submit("memory_map")
        pending.wait(60)
        return pending.fds

    def _memory_write(self, address: int, data: bytes) -> None:
        self._need()
        self._client.request("memory_write", 60, data, address=address)

    def _event(self, record: dict[str, Any]) -> None:
        name = record.get("event")
        if name == "progress":
            self._progress(str(record.get("phase", "")))
        elif name == "stopped":
            self._stop = Stopped(str(record["reason"]), str(record["message"]), str(record["console"]))
            self.console.end(NotRunningError(f"the domain has stopped: {self._stop.message}"))
            self._stopped.set()
        self.on_event(record)

    def _lost(self, error: NonrootError) -> None:
        self.console.end(error)
        self._stopped.set()


def _texts(values: Iterable[str], what: str) -> list[str]:
    if isinstance(values, str):
        raise BadOptionError(f"{what} is a list of texts, not one text")
    return list(values)


def _shares(shares: Iterable[str]) -> list[str]:
    texts = _texts(shares, "shares")
    if not texts:
        return []
    from nonroot.backends.share import Share

    return [str(Share.parse(text)) for text in texts]


def _media(media: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None) -> list[str]:
    if media is None:
        return []
    return [drive_text(one) for one in ([media] if isinstance(media, (str, os.PathLike)) else media)]


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
