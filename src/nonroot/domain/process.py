"""The process of one domain: a loop that serves clients, and the vCPU's thread (:mod:`nonroot.domain.runner`).

The loop alone touches the agent's session, the connections and the console; the vCPU thread hands it what the guest did
through a mailbox of limited size, and waits when that is full.
"""

import contextlib
import os
import selectors
import socket
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nonroot.domain.agent import AgentSession
from nonroot.domain.connection import Connection
from nonroot.domain.console import PanicWatch
from nonroot.domain.console_pty import ConsolePty
from nonroot.domain.device_requests import DeviceRequests
from nonroot.domain.display import DisplayService
from nonroot.domain.frames import FrameDecoder, FrameError
from nonroot.domain.options import DomainOptions
from nonroot.domain.requests import DisplayRequests
from nonroot.domain.runner import INHERITED, Runner, Stop
from nonroot.domain.save_requests import SaveRequests
from nonroot.domain.wire import VERSION, Kind, Message
from nonroot.errors import (
    BadOptionError,
    DomainStoppedError,
    GuestCrashError,
    GuestPanicError,
    InternalError,
    NonrootError,
    NotRunningError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from nonroot.domain.xen import XenServices

__all__ = ["Connection", "DomainProcess"]

CONSOLE_DELAY = 0.004
"""Seconds that console output may wait for more of it."""
PANIC_GRACE = 3.0
"""Seconds that a kernel has to reset after its panic, before the domain counts as stopped. It may be told not to."""
MAX_CONSOLE_BACKLOG = 1 << 20
"""With more console output than this waiting for a client, the guest waits."""


class DomainProcess(DisplayRequests, DeviceRequests, SaveRequests):
    """The server side of the control protocol."""

    def __init__(
        self,
        control: socket.socket | None,
        listener: socket.socket | None = None,
        make_runner: Callable[[DomainOptions, Callable[[str], None]], Runner] = Runner,
    ) -> None:
        super().__init__()
        self._make_runner = make_runner
        self._selector = selectors.DefaultSelector()
        self._connections: list[Connection] = []
        self._listener = listener
        self._detached = control is None
        self._ending = False
        self._options: DomainOptions | None = None
        self._runner: Runner | None = None
        self._ahead: Runner | None = None
        self._session: AgentSession | None = None
        self._decoder = FrameDecoder()
        self._agent_pieces = 0
        self._panic = PanicWatch()
        self._console_due: float | None = None
        self._pty: ConsolePty | None = None
        self._panic_due: float | None = None
        self._stopped: dict[str, Any] | None = None
        self._stop_error: NonrootError | None = None
        self._stop_waiters: list[tuple[Connection, int]] = []
        self._began = time.monotonic()
        if control is not None:
            self._accept(control, primary=True)
        if listener is not None:
            self._listen(listener)

    def run(self) -> None:
        """Serve until the domain is destroyed, or its client goes and nobody asked to keep it."""
        try:
            self._serve()
        finally:
            self._close_display()
            if self._pty is not None:
                self._pty.close()
            for runner in (self._runner, self._ahead):
                if isinstance(runner, Runner):
                    runner.close()

    def _serve(self) -> None:
        while not self._ending:
            for key, events in self._selector.select(self._timeout()):
                key.data(events)
                if self.ended():
                    return
            if self._console_due is not None and time.monotonic() >= self._console_due:
                self._flush_console()
            if self._panic_due is not None and time.monotonic() >= self._panic_due:
                self._panic_due = None
                self._give_up_on_panic()
            display = self._display
            if display is not None and display.due is not None and time.monotonic() >= display.due:
                display.look()
            self._continue()

    def _timeout(self) -> float | None:
        look_due = None if self._display is None else self._display.due
        dues = [due for due in (self._console_due, self._panic_due, look_due) if due is not None]
        timeout = max(0.0, min(dues) - time.monotonic()) if dues else None
        if self._runner is not None and self._runner.needs_polling:
            timeout = 0.01 if timeout is None else min(timeout, 0.01)
        return timeout

    def ended(self) -> bool:
        """Whether the domain has been destroyed."""
        return self._ending

    # ── connections ──

    def _accept(self, sock: socket.socket, primary: bool) -> Connection:
        connection = Connection(self, sock, primary)
        self._connections.append(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection.ready)
        return connection

    def _listen(self, listener: socket.socket) -> None:
        if self._listener is not None and self._listener is not listener:
            self._selector.unregister(self._listener)
            self._listener.close()
        listener.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, self._listening)

    def _listening(self, events: int) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            self._accept(sock, primary=False)

    def watch(self, connection: Connection, writing: bool) -> None:
        """Ask the selector whether ``connection`` can be written."""
        if connection.open:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._selector.modify(connection.socket, events, connection.ready)

    def gone(self, connection: Connection) -> None:
        """A client has closed its end."""
        connection.open = False
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._connections.remove(connection)
        self._stop_waiters = [(c, r) for c, r in self._stop_waiters if c is not connection]
        if self._session is not None:
            self._session.forget(connection)
        if self._display is not None:
            self._display.forget(connection)
        self._viewers.forget(connection)
        if connection.primary and not self._detached:
            self._ending = True

    def message(self, connection: Connection, message: Message) -> None:
        """One message from a client."""
        if message.kind == Kind.CONSOLE:
            if self._runner is not None:
                self._runner.console_input(message.body)
        elif message.kind != Kind.JSON:
            if self._session is not None:
                self._session.take(connection, message.kind, message.body)
        else:
            self._request(connection, message.record, message.body)

    def _request(self, connection: Connection, record: dict[str, Any], blob: bytes) -> None:
        request: object = record.get("id")
        method: object = record.get("method")
        params: object = record.get("params", {})
        if not isinstance(request, int) or not isinstance(method, str) or not isinstance(params, dict):
            self.gone(connection)
            return
        name = method.replace("-", "_")
        handler: Callable[..., dict[str, Any] | None] | None = getattr(self, f"_do_{name}", None)
        try:
            if handler is None:
                raise UsageError(f"a domain knows no request {method!r}")
            result = handler(connection, request, params, blob)
            if result is not None:
                connection.reply(request, result)
        except NonrootError as error:
            connection.fail(request, error)
        except Exception as unexpected:
            connection.fail(request, internal(unexpected))

    # ── requests ──

    def _do_hello(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        return {"version": VERSION, "pid": os.getpid()}

    def _do_create(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        if self._runner is not None:
            raise NotRunningError("this process has its domain already")
        options = DomainOptions.from_wire(params)
        if options.layers or (options.saved or "").startswith(INHERITED):
            # Descriptors, as the client numbers them: its own come with the request.
            records, *options.layers = connection.take_fds(len(options.layers) + 1)
            options.saved = f"{INHERITED}{records}"
        options.check()
        runner = self._built_ahead(options)
        if runner is None:
            runner = self._make_runner(options, lambda phase: connection.event("progress", phase=phase))
        self._selector.register(runner.mailbox.fd, selectors.EVENT_READ, lambda events: self._mail())
        options = getattr(runner, "options", options)  # a saved domain's are in its file
        self._options, self._runner = options, runner
        if self._registration is not None:
            self._registration.describe(**self._registration.facts | self._own_facts())
        self._display = DisplayService(runner.seat, runner.call)
        if not options.agent and runner.xen is not None:
            self._open_terminal(runner, runner.xen)
        if options.agent:
            self._session = AgentSession(runner, eager=options.virtual_time)
            self._resume_session(getattr(runner, "greeting", b""))
        description: dict[str, Any] = runner.describe()
        self._messages.say(f"engine {description.get('engine')}: {description.get('reason')}")
        self._messages.say(f"boot protocol {description.get('protocol')}: {description.get('protocol_reason')}")
        self._messages.say(f"{options.memory >> 20} MiB of memory, 1 vCPU")
        return description

    def _do_prepare(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Build the machine of a domain that will go on here, of a fork's answer: see :meth:`Runner.recipe`."""
        if self._runner is not None or self._ahead is not None:
            raise NotRunningError("this process has its domain already")
        options = DomainOptions.from_wire(dict(params["options"]))
        self._ahead = Runner(options, lambda phase: None, str(params["protocol"]))
        self._ahead.prepare(params.get("store"))
        return {}

    def _built_ahead(self, options: DomainOptions) -> Any:
        """The machine that was built ahead, if it is that of the saved domain of ``options``."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        try:
            if ahead.go_on(options):
                return ahead
        except BaseException:
            ahead.close()
            raise
        ahead.close()
        return None

    def _own_facts(self) -> dict[str, Any]:
        xen = getattr(self._runner, "xen", None)
        facts: dict[str, Any] = {} if xen is None else {"domid": xen.domid}
        return facts if self._runner is None else facts | {"engine": self._runner.describe().get("engine")}

    def _do_start(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        self._began = time.monotonic()
        runner = self._need()
        if params.get("concierge"):
            self._seal(runner, socket.socket(fileno=connection.take_fds(1)[0]))
        runner.start()
        if self._options is not None and self._options.saved is not None:
            self._freshen()
            self._rename_cards()
        self._messages.say("powered on")
        self._tell_watchers()
        return {}

    def _seal(self, runner: Any, concierge: socket.socket) -> None:
        if not isinstance(runner, Runner):  # another machine, which is of no use to seal
            concierge.close()
            return
        force = runner.seal(concierge)
        if force is not None:
            self._sealed = True
            self._messages.say(f"its process is confined by {', '.join(force.names)}")
            for missing in force.missing:
                self._messages.say(f"its process is confined less than it could be: {missing}")

    def _do_watch(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Tell this client from now on what state the domain is in, and nothing else."""
        connection.watcher = True
        return self._state()

    def _state(self) -> dict[str, Any]:
        """``created``, ``running``, ``paused`` or ``stopped``, and the reason of the latter."""
        if self._stopped is not None:
            return {"state": "stopped", "reason": self._stopped["reason"]}
        return {"state": "created" if self._runner is None else self._runner.state, "reason": ""}

    def _tell_watchers(self) -> None:
        for connection in self._connections:
            if connection.watcher:
                connection.event("state", **self._state())

    def _do_close_drives(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        """Let go of the images of a domain that has stopped."""
        runner = self._need()
        if self._stopped is None:
            raise UsageError("the domain has not stopped; it needs its drives")
        runner.drives.close()
        if runner.guest_devices is not None:
            runner.guest_devices.close()
        return {}

    def _do_attach_console(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        connection.console = bool(params.get("on", True))
        if connection.console and params.get("replay"):
            past = self._log.everything()
            for at in range(0, len(past), 1 << 16):
                connection.emit(Kind.CONSOLE, past[at : at + (1 << 16)])
        return {}

    def _do_wait_ready(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        self._agent().wait_ready(connection, request)

    def _do_run(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        self._agent().run(connection, request, params)

    def _do_copy_in(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        self._agent().copy_in(connection, request, params)

    def _do_copy_out(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        self._agent().copy_out(connection, request, params)

    def _do_end_of_input(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        if self._session is not None:
            self._session.end_of_input(connection)
        return {}

    def _do_cancel(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        if self._session is not None:
            self._session.cancel(connection)
        return {}

    def _do_signal(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        number = params.get("number")
        if not isinstance(number, int) or not 1 <= number <= 64:
            raise BadOptionError(f"there is no signal {number!r}")
        return {"delivered": self._agent().signal(number)}

    def _do_shell(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        argv = [os.fsencode(a) for a in params.get("argv", ["/bin/sh", "-l"])]
        env = {os.fsencode(k): os.fsencode(v) for k, v in params.get("env", {}).items()}
        self._agent().start_shell(connection, argv, env, int(params.get("rows", 0)), int(params.get("cols", 0)))
        return {}

    def _do_window_size(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        if self._session is not None:
            self._session.window_size(int(params.get("rows", 0)), int(params.get("cols", 0)))
        return {}

    def _do_pause(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        def paused(result: object) -> None:
            connection.reply(request, {})
            self._messages.say("paused")
            self._tell_watchers()

        self._need().pause(paused)

    def _do_unpause(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        self._need().unpause()
        self._messages.say("unpaused")
        self._tell_watchers()
        return {}

    def _do_stats(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        self._ask(connection, request, self._need().statistics)

    def _do_registers(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        self._ask(connection, request, self._need().registers)

    def _do_memory_map(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        runner = self._need()

        def answer(result: list[int] | NonrootError) -> None:
            if isinstance(result, NonrootError):
                connection.fail(request, result)
            else:
                connection.reply(request, {}, result)

        runner.call(runner.memory_map, answer)

    def _do_memory_write(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        runner = self._need()
        address = params.get("address")
        if not isinstance(address, int) or address < 0:
            raise BadOptionError(f"{address!r} is no guest-physical address")
        self._ask(connection, request, lambda: runner.write_memory(address, blob))

    def _do_eject(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        drives = self._need().drives
        take_out = drives.eject(str(params.get("drive", "cd0")), bool(params.get("force", False)))
        self._change_medium(connection, request, take_out)

    def _do_insert(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        drives = self._need().drives
        put_in = drives.insert(str(params.get("drive", "cd0")), str(params.get("image", "")))
        self._change_medium(connection, request, put_in)

    def _change_medium(self, connection: Connection, request: int, change: Callable[[], dict[str, Any]]) -> None:
        """Change a medium between two instructions; then close what is in no drive any more."""
        runner = self._need()

        def answer(result: dict[str, Any] | NonrootError) -> None:
            if isinstance(result, NonrootError):
                connection.fail(request, result)
            else:
                runner.drives.release()
                self._messages.say("a medium was changed")
                connection.reply(request, result)

        runner.call(change, answer)

    def _do_power_button(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        self._need().press_power_button()
        self._messages.say("power button pressed")
        return {}

    def _do_shutdown(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Ask the guest to power off or to reboot: a Xen guest through XenStore, any other by its power button."""
        how = params.get("how", "poweroff")
        if how not in ("poweroff", "reboot"):
            raise BadOptionError(f"a guest cannot be asked for {how!r}")
        services = self._xen_services()
        if services is not None and self._options is not None and self._options.firmware is not None:
            # What a PC boots may know nothing of Xen, or has not come so far.
            services = services if services.listens() else None
        if services is None or params.get("acpi"):
            return self._do_power_button(connection, request, params, blob) | {"by": "power button"}
        services.shutdown(how)
        self._messages.say(f"asked for {how} through XenStore")
        return {"by": "xenstore"}

    def _do_set_memory(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        """Ask the guest's balloon driver to leave it so many bytes."""
        services, size = self._xen_services(), params.get("bytes")
        if not isinstance(size, int) or size < 1 << 20:
            raise BadOptionError("a guest cannot do with less than 1 MiB")
        if services is None:
            raise UnsupportedError(
                "its memory cannot be changed while it runs: only guests with Xen's balloon driver can do that"
            )
        services.set_memory(size)
        self._messages.say(f"asked for a memory of {size >> 20} MiB")
        return {}

    def _do_limit_memory(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        """Let the guest's balloon driver have so many bytes at most."""
        services, size = self._xen_services(), params.get("bytes")
        if not isinstance(size, int) or size < 1 << 20:
            raise BadOptionError("a guest cannot do with less than 1 MiB")
        if services is None:
            raise UnsupportedError(
                "its memory cannot be limited while it runs: only that of a Xen domain can grow and shrink"
            )
        services.limit_memory(size)
        self._messages.say(f"limited to a memory of {size >> 20} MiB")
        return {}

    def _do_sysrq(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Press a magic SysRq key through XenStore."""
        services, key = self._xen_services(), params.get("key")
        if not isinstance(key, str) or len(key) != 1 or not key.isascii() or not key.isalnum():
            raise BadOptionError(f"{str(key)[:20]!r} is no SysRq key: use one letter or digit")
        if services is None:
            raise UnsupportedError("it was not started as a Xen domain, so it hears no SysRq keys through XenStore")
        services.sysrq(key)
        self._messages.say(f"SysRq {key} through XenStore")
        return {}

    def _xen_services(self) -> Any:
        """The domain's dealings with XenStore; None if it is not Xen's."""
        return getattr(self._need(), "xen", None)

    def _do_reset(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        self._need().reset()
        self._messages.say("reset button pressed")
        return {}

    def _do_power_off(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        session = self._session
        return {"asked": session is not None and self._stopped is None and session.power_off()}

    def _do_wait(
        self, connection: Connection, request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        self._need()
        if self._stopped is not None:
            return self._stopped
        self._stop_waiters.append((connection, request))
        return None

    def _do_detach(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        if self._listener is None:
            raise UsageError("a domain without a socket of its own cannot be left alone")
        from nonroot.domain.host import keep_alive_without_parent

        keep_alive_without_parent()
        self._detached = True
        return {}

    def _do_destroy(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        connection.reply(request, {})
        self._ending = True

    def _need(self) -> Runner:
        if self._runner is None:
            raise NotRunningError("the domain has not been created yet")
        return self._runner

    def _restart_session(self, greeting: bytes) -> None:
        runner, options = self._need(), self._options
        if self._session is None or options is None:
            return
        self._session.lost(NotRunningError("the domain has gone back to its snapshot"))
        self._decoder = FrameDecoder()
        self._session = AgentSession(runner, eager=options.virtual_time)
        self._resume_session(greeting)

    def _say(self, text: str) -> None:
        self._messages.say(text)

    def _agent(self) -> AgentSession:
        self._need()
        if self._stop_error is not None:
            raise self._stop_error
        if self._session is None:
            raise UnsupportedError("this domain was made without an agent, so it cannot run commands or copy files")
        return self._session

    def _ask(self, connection: Connection, request: int, question: Callable[[], dict[str, Any]]) -> None:
        """Answer with what ``question`` says in the vCPU's thread, between two instructions of the guest."""

        def answer(result: dict[str, Any] | NonrootError) -> None:
            if isinstance(result, NonrootError):
                connection.fail(request, result)
            else:
                connection.reply(request, result)

        self._need().call(question, answer)

    # ── the vCPU thread's mail ──

    def _mail(self) -> None:
        runner = self._runner
        assert runner is not None
        for kind, content in runner.mailbox.take():
            if kind == "console":
                if self._console_due is None:
                    self._console_due = time.monotonic() + CONSOLE_DELAY
            elif kind == "agent":
                self._agent_pieces += 1
                self._agent_bytes(content)
            elif kind == "space":
                if self._session is not None:
                    self._session.drained()
            elif kind == "answer":
                callback, result = content
                callback(result)
            elif kind == "progress":
                if self._display is not None:
                    self._display.goes_on()
            elif kind == "stopped":
                self._has_stopped(content)

    def _agent_bytes(self, data: bytes) -> None:
        session = self._session
        if session is None or session.gone is not None:
            return
        try:
            for kind, payload in self._decoder.feed(data):
                session.frame(kind, payload)
        except FrameError as error:
            problem = DomainStoppedError(f"the guest's agent broke its protocol: {error}")
            session.lost(problem)
            for connection in self._connections:
                connection.event("agent_lost", message=str(problem))

    def _flush_console(self) -> None:
        runner = self._runner
        self._console_due = None
        if runner is None:
            return
        attached = [c for c in self._connections if c.console]
        if any(c.backlog() > MAX_CONSOLE_BACKLOG for c in attached):
            self._console_due = time.monotonic() + 5 * CONSOLE_DELAY
            return  # the vCPU thread waits once its buffer is full
        data = runner.take_console()
        if not data:
            return
        self._keep(data)
        if self._panic.feed(data):
            for connection in self._connections:
                connection.event("panic", message=self._panic.message)
            if self._session is not None:
                self._panic_due = time.monotonic() + PANIC_GRACE
        for connection in attached:
            connection.emit(Kind.CONSOLE, data)

    def _open_terminal(self, runner: Runner, xen: "XenServices") -> None:
        try:
            self._pty = ConsolePty(self._selector, runner.console_input)
        except UnsupportedError as error:
            self._messages.say(str(error))
        else:
            xen.tell_console(self._pty.path)

    def _keep(self, data: bytes) -> None:
        self._log.add(data)
        if self._pty is not None:
            self._pty.add(data)

    def _continue(self) -> None:
        """After every round: what waited for room goes on."""
        session, runner = self._session, self._runner
        if session is None or runner is None:
            return
        session.drained()
        if not session.parked() and not session.congested():
            runner.release(self._agent_pieces)

    def _give_up_on_panic(self) -> None:
        """The kernel hangs after its panic; a domain for commands is of no more use."""
        if self._stopped is None:
            self._need().pause(lambda result: None)
            self._has_stopped(Stop("reset", "the guest hangs"))

    def _has_stopped(self, stop: Stop) -> None:
        if self._stopped is not None:
            return
        self._flush_console()
        while self._console_due is not None:  # a client is slow; its own queue takes the rest
            self._console_due = None
            data = self._need().take_console()
            self._keep(data)
            self._panic.feed(data)
            for connection in self._connections:
                if connection.console:
                    connection.emit(Kind.CONSOLE, data)
        reason, message, detail = stop.reason, stop.message, dict(stop.detail)
        console = self._log.tail()
        error: NonrootError
        if reason == "internal":
            error = InternalError(message, **detail, console=console)
        elif self._panic.message and reason in ("reset", "crash", "triple_fault", "halted"):
            reason, message = "panic", f"the guest's kernel panicked: {self._panic.message}"
            error = GuestPanicError(message, console=console)
        elif reason in ("crash", "triple_fault", "halted", "failure"):
            error = GuestCrashError(message, **detail, console=console)
        else:
            error = DomainStoppedError(f"{message} before the work was done", reason=reason, console=console)
        self._stop_error = error
        self._stopped = {"reason": reason, "message": message, "console": console, **detail}
        if self._session is not None:
            self._session.lost(error)
        if reason in ("poweroff", "reset"):
            self._stop_error = DomainStoppedError(f"the domain has stopped: {message}", reason=reason, console=console)
        if self._display is not None:
            self._display.over(self._stop_error)
        for connection, request in self._stop_waiters:
            connection.reply(request, self._stopped)
        self._stop_waiters.clear()
        for connection in self._connections:
            connection.event("stopped", **self._stopped)
        self._messages.say(f"stopped: {reason}" + (f" at {detail['rip']:#x}" if "rip" in detail else ""))
        self._tell_watchers()


def internal(unexpected: BaseException) -> InternalError:
    """The error for a defect of ours, with its trace for the report."""
    trace = "".join(traceback.format_exception(unexpected))
    return InternalError(f"nonroot itself failed: {type(unexpected).__name__}: {unexpected}", trace=trace[-8000:])
