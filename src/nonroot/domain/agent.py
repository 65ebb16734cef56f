"""The host's side of the agent: commands and files, one operation at a time.

:class:`AgentSession` is a pure state machine: frames from the guest and requests go in, frames to the guest
and messages to the client come out; it does no I/O and knows no time. Everything from the guest is bounded: output by
the credit that was granted, everything else by what an honest agent would send. A guest that breaks the rules loses the
channel (:class:`~nonroot.domain.frames.FrameError`), not more.
"""

import errno
import os
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from nonroot.domain import frames
from nonroot.domain.frames import Entry, ExitReport, FrameError, FromGuest, Hello, StartFlag, ToGuest
from nonroot.domain.wire import Kind
from nonroot.errors import BadOptionError, GuestFileError, NonrootError, NotRunningError, UnsupportedError

__all__ = ["CLIENT_BACKLOG", "WINDOW", "AgentSession", "Client", "Guest", "Operation"]

WINDOW = 256 * 1024
"""Bytes of output that the agent may have under way."""
CLIENT_BACKLOG = 512 * 1024
"""With more than this waiting for the client, the agent gets no new credit."""
GUEST_BACKLOG = 256 * 1024
"""With more than this waiting for the guest, nothing is added to its queue."""
INFLOW = 512 * 1024
"""Bytes of stdin or files that a client may send ahead."""
AHEAD = 256 << 20
"""Bytes of input that an eager session keeps for one operation."""
MAX_LOGS = 100
"""Lines of the agent's own log that are passed on."""


class Client(Protocol):
    """Who asked for an operation."""

    def emit(self, kind: Kind, body: bytes) -> None:
        """Send a stream message."""

    def reply(self, request: int, result: dict[str, Any]) -> None:
        """Answer a request."""

    def fail(self, request: int, error: NonrootError) -> None:
        """Answer a request with an error."""

    def event(self, name: str, **fields: Any) -> None:
        """Tell what happened."""

    def backlog(self) -> int:
        """Bytes that wait for the client to take them."""


class Guest(Protocol):
    """The channel to the guest."""

    def send(self, data: bytes) -> None:
        """Add bytes to the guest's queue and ring."""

    def waiting(self) -> int:
        """Bytes in the guest's queue."""


@dataclass(slots=True)
class Operation:
    """What one request wants of the agent."""

    client: Client
    request: int
    kind: str
    """``run``, ``copy_in`` or ``copy_out``."""
    first: bytes
    """The frame that starts it."""
    inflow: deque[tuple[bytes, int]] = field(default_factory=deque)
    """Frames for the guest and the client's credit that each gives back; held until there is room."""
    complete: bool = False
    """The client has sent all of its stdin or files."""
    started: bool = False
    granted: int = 0
    """Output credit that the agent still has."""
    unreturned: int = 0
    """Output received since the last grant."""
    ahead: int = 0
    """Bytes of input taken ahead of the start."""
    stdin_credit: int = 0
    """Bytes of stdin that the agent is willing to take."""


class AgentSession:
    """Frames and requests in, frames and messages out.

    ``eager``: decisions depend on nothing but the guest's bytes and what the client sent beforehand, so that runs in
    virtual time repeat exactly; the caller holds the vCPU while :meth:`parked` or :meth:`congested`.
    """

    def __init__(self, guest: Guest, eager: bool = False) -> None:
        self.hello: Hello | None = None
        self._greeting = b""
        self.gone: NonrootError | None = None
        self.said_goodbye = False
        self._guest = guest
        self._eager = eager
        self._queue: deque[Operation] = deque()
        self._current: Operation | None = None
        self._waiters: list[tuple[Client, int]] = []
        self._logs = 0
        self._early: list[str] = []
        self._shell_asked = False
        self._shell: bytes | None = None
        self._shell_client: Client | None = None

    # ── saved domains ──

    @property
    def idle(self) -> bool:
        """Whether the agent has greeted, and nothing is under way."""
        return self.hello is not None and self.gone is None and self._current is None and not self._queue

    @property
    def greeting(self) -> bytes:
        """The payload of the agent's greeting."""
        return self._greeting

    def resume(self, greeting: bytes) -> None:
        """The guest's agent has greeted before it was saved. FrameError."""
        self.frame(FromGuest.HELLO, greeting)

    def freshen(self, utc_ns: int, entropy: bytes) -> None:
        """Tell a guest that was saved what time it is, and give it 64 bytes of randomness."""
        self._guest.send(frames.encode_freshen(utc_ns, entropy))

    # ── requests ──

    def wait_ready(self, client: Client, request: int) -> None:
        """Answer once the agent has greeted."""
        if self.gone is not None:
            client.fail(request, self.gone)
        elif self.hello is not None:
            client.reply(request, self._hello_record(self.hello))
        else:
            self._waiters.append((client, request))

    def run(self, client: Client, request: int, params: dict[str, Any]) -> None:
        """Start a command: ``argv``, ``env``, ``cwd``, ``tty``, ``stdin`` (bool), ``rows``, ``cols``."""
        flags = StartFlag.PIPES
        if params.get("tty"):
            flags |= StartFlag.PTY
        elif not params.get("stdin"):
            flags |= StartFlag.NO_STDIN
        try:
            argv = [os.fsencode(a) for a in params["argv"]]
            env = {os.fsencode(k): os.fsencode(v) for k, v in params.get("env", {}).items()}
            cwd = os.fsencode(params.get("cwd") or "")
            rows, cols = int(params.get("rows", 0)), int(params.get("cols", 0))
            start = frames.encode_start(argv, env, cwd, flags, rows, cols, WINDOW)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadOptionError(f"the command is malformed: {error!r}") from None
        except ValueError as error:
            raise BadOptionError(str(error)) from None
        operation = Operation(client, request, "run", start, granted=WINDOW)
        operation.complete = bool(flags & StartFlag.NO_STDIN)
        self._enqueue(operation)
        if not operation.complete:
            client.emit(Kind.CREDIT, struct.pack("<I", INFLOW))

    def copy_in(self, client: Client, request: int, params: dict[str, Any]) -> None:
        """Take ENTRY and DATA messages for ``destination``; ``name`` is the source's own name."""
        destination, name = os.fsencode(str(params.get("destination", ""))), os.fsencode(str(params.get("name", "")))
        if not destination or not name or b"\0" in destination + name or b"/" in name:
            raise BadOptionError("copying into the guest needs a destination and a name")
        first = frames.encode(ToGuest.COPY_IN, bytes(4) + destination + b"\0" + name + b"\0")
        self._enqueue(Operation(client, request, "copy_in", first))
        client.emit(Kind.CREDIT, struct.pack("<I", INFLOW))

    def copy_out(self, client: Client, request: int, params: dict[str, Any]) -> None:
        """Send ENTRY and DATA messages of ``path`` and all below."""
        path = os.fsencode(str(params.get("path", "")))
        if not path or b"\0" in path:
            raise BadOptionError("copying out of the guest needs a path")
        first = frames.encode(ToGuest.COPY_OUT, struct.pack("<I", WINDOW) + path + b"\0")
        self._enqueue(Operation(client, request, "copy_out", first, complete=True, granted=WINDOW))

    def start_shell(
        self, client: Client | None, argv: list[bytes], env: dict[bytes, bytes], rows: int, cols: int
    ) -> None:
        """Run an interactive command on the guest's console as soon as it can be; its end powers the guest off."""
        self._shell_client = client
        self._tell_logs()
        self._shell = frames.encode_start(argv, env, b"/root", StartFlag.CONSOLE, rows, cols, WINDOW)
        self._pump()

    def signal(self, number: int) -> bool:
        """Pass a signal on to the running command; false if there is none."""
        if self._current is None or self._current.kind != "run" or not self._current.started:
            return False
        self._guest.send(frames.encode(ToGuest.SIGNAL, struct.pack("<I", number & 0x7F)))
        return True

    def window_size(self, rows: int, cols: int) -> None:
        """Tell the command's (or the console's) terminal its size."""
        if self.hello is not None and 0 < rows < 65536 and 0 < cols < 65536:
            self._guest.send(frames.encode(ToGuest.WINDOW_SIZE, struct.pack("<HH", rows, cols)))

    def cancel(self, client: Client) -> None:
        """Stop the client's copy; it ends with ECANCELED."""
        current = self._current
        if current is not None and current.client is client and current.kind == "copy_out" and current.started:
            self._guest.send(frames.encode(ToGuest.CANCEL))

    def power_off(self) -> bool:
        """Ask the guest to power off; false if there is no agent to ask."""
        if self.hello is None or self.gone is not None:
            return False
        self._guest.send(frames.encode(ToGuest.POWER_OFF))
        return True

    # ── streams from the client ──

    def take(self, client: Client, kind: Kind, body: bytes) -> None:
        """STDIN, ENTRY or DATA from a client; what nobody waits for is dropped."""
        operation = self._receiving(client)
        if operation is None:
            return
        wanted = {"run": (Kind.STDIN,), "copy_in": (Kind.ENTRY, Kind.DATA)}.get(operation.kind, ())
        if kind not in wanted:
            return
        frame = {Kind.STDIN: ToGuest.STDIN, Kind.ENTRY: ToGuest.ENTRY, Kind.DATA: ToGuest.DATA}[kind]
        step = 16384 if kind == Kind.STDIN else frames.MAX_PAYLOAD
        for at in range(0, max(len(body), 1), step):
            part = body[at : at + step]
            operation.inflow.append((frames.encode(frame, part), len(part)))
        if self._eager:
            self._take_ahead(operation, len(body))
        self._pump()

    def _take_ahead(self, operation: Operation, size: int) -> None:
        """In virtual time all input is taken before the operation starts, up to a limit."""
        operation.ahead += size
        if operation.ahead > AHEAD:
            self._queue = deque(o for o in self._queue if o is not operation)
            error = UnsupportedError(f"in virtual time, stdin and files are read ahead; {AHEAD >> 20} MiB are the most")
            operation.client.fail(operation.request, error)
        else:
            operation.client.emit(Kind.CREDIT, struct.pack("<I", size))

    def end_of_input(self, client: Client) -> None:
        """The client's stdin has ended, or all files have been sent."""
        operation = self._receiving(client)
        if operation is None:
            return
        operation.complete = True
        end = ToGuest.STDIN_EOF if operation.kind == "run" else ToGuest.COPY_IN_END
        operation.inflow.append((frames.encode(end), 0))
        self._pump()

    def drained(self) -> None:
        """The guest's queue or the client's backlog has become shorter: continue."""
        self._pump()
        self._grant()

    # ── the guest ──

    def frame(self, kind: FromGuest, payload: bytes) -> None:
        """One frame from the guest. FrameError if no honest agent would send it now."""
        current = self._current
        if kind == FromGuest.HELLO:
            if self.hello is not None:
                raise FrameError("the agent greets twice")
            self.hello = Hello.parse(payload)
            self._greeting = payload
            for client, request in self._waiters:
                client.reply(request, self._hello_record(self.hello))
            self._waiters.clear()
            self._pump()
        elif self.hello is None:
            raise FrameError("the agent speaks before it greets")
        elif kind in (FromGuest.STDOUT, FromGuest.STDERR, FromGuest.ENTRY, FromGuest.DATA):
            self._output(kind, payload)
        elif kind == FromGuest.STARTED:
            if current is not None and current.kind == "run":
                current.client.event("started", request=current.request)
        elif kind == FromGuest.STDIN_CREDIT:
            if len(payload) != 4:
                raise FrameError("a credit has 4 bytes")
            if current is not None and current.kind == "run":
                current.stdin_credit = min(current.stdin_credit + struct.unpack("<I", payload)[0], 1 << 24)
                self._pump()
        elif kind == FromGuest.EXIT:
            self._exit(ExitReport.parse(payload))
        elif kind == FromGuest.RESULT:
            self._result(payload)
        elif kind == FromGuest.BYE:
            self.said_goodbye = True
        elif kind == FromGuest.LOG:
            self._logs += 1
            if self._logs <= MAX_LOGS:
                self._early.append(payload[:500].decode("utf-8", "replace"))
                self._tell_logs()

    def _tell_logs(self) -> None:
        """What was logged before anybody used the guest is told to the first who does."""
        client = self._current.client if self._current is not None else self._shell_client
        if client is not None:
            for text in self._early:
                client.event("agent_log", text=text)
            self._early.clear()

    def _output(self, kind: FromGuest, payload: bytes) -> None:
        current = self._current
        wanted = (
            (FromGuest.STDOUT, FromGuest.STDERR)
            if current and current.kind == "run"
            else (FromGuest.ENTRY, FromGuest.DATA)
        )
        if current is None or current.kind == "copy_in" or kind not in wanted:
            raise FrameError(f"{kind.name} that nobody asked for")
        if len(payload) > current.granted:
            raise FrameError("more output than was granted")
        current.granted -= len(payload)
        current.unreturned += len(payload)
        if kind == FromGuest.ENTRY:
            Entry.parse(payload)
        message = {
            FromGuest.STDOUT: Kind.STDOUT,
            FromGuest.STDERR: Kind.STDERR,
            FromGuest.ENTRY: Kind.ENTRY,
            FromGuest.DATA: Kind.DATA,
        }[kind]
        current.client.emit(message, payload)
        self._grant()

    def _grant(self) -> None:
        current = self._current
        if current is None or current.unreturned < WINDOW // 4:
            return
        if self._eager or current.client.backlog() < CLIENT_BACKLOG:
            self._guest.send(frames.encode(ToGuest.CREDIT, struct.pack("<I", current.unreturned)))
            current.granted += current.unreturned
            current.unreturned = 0

    def _exit(self, report: ExitReport) -> None:
        current = self._current
        if self._shell_asked and (current is None or current.kind != "run" or not current.started):
            self._shell_asked = False
            if self._shell_client is not None:
                self._shell_client.event("shell_ended", kind=report.kind.name.lower(), value=report.value)
            self.power_off()
            return
        if current is None or current.kind != "run":
            raise FrameError("a command ended that was never started")
        self._finish(current)
        current.client.reply(current.request, {"kind": report.kind.name.lower(), "value": report.value})
        self._pump()

    def _result(self, payload: bytes) -> None:
        current = self._current
        if current is None or current.kind == "run" or len(payload) < 4:
            raise FrameError("a result that nobody asked for")
        (code,) = struct.unpack_from("<I", payload)
        path = os.fsdecode(payload[4 : 4 + 4096])
        self._finish(current)
        if code:
            reason = os.strerror(code).lower() if code in errno.errorcode else f"error {code}"
            what = "into" if current.kind == "copy_in" else "out of"
            error = GuestFileError(
                f"cannot copy {what} the guest: {path or 'the guest'}: {reason}", errno=code, path=path
            )
            current.client.fail(current.request, error)
        else:
            current.client.reply(current.request, {})
        self._pump()

    def lost(self, error: NonrootError) -> None:
        """The guest has stopped or broken the rules: fail all that is under way or waiting."""
        if self.gone is None:
            self.gone = error
        operations = ([self._current] if self._current else []) + list(self._queue)
        self._current = None
        self._queue.clear()
        for operation in operations:
            operation.client.fail(operation.request, error)
        for client, request in self._waiters:
            client.fail(request, error)
        self._waiters.clear()

    def forget(self, client: Client) -> None:
        """The client has gone: kill its command, drop its requests."""
        self._waiters = [(c, r) for c, r in self._waiters if c is not client]
        self._queue = deque(o for o in self._queue if o.client is not client)
        if self._current is not None and self._current.client is client and self._current.kind == "run":
            self.signal(9)
            self._current.complete = True

    # ── what the caller of an eager session asks ──

    def parked(self) -> bool:
        """The agent idles and nothing complete is there to do: in virtual time the vCPU stands still meanwhile."""
        if self.hello is None or self.gone is not None or self.said_goodbye or self._shell_asked:
            return False
        return self._current is None and self._guest.waiting() == 0

    def congested(self) -> bool:
        """The client has much to take still: in virtual time the vCPU stands still meanwhile."""
        return self._current is not None and self._current.client.backlog() >= CLIENT_BACKLOG

    @property
    def busy(self) -> bool:
        """An operation is under way or waiting."""
        return self._current is not None or bool(self._queue)

    # ── inside ──

    def _hello_record(self, hello: Hello) -> dict[str, Any]:
        return {
            "bits": hello.bits,
            "transport": hello.transport,
            "system": hello.system,
            "release": hello.release,
            "machine": hello.machine,
        }

    def _enqueue(self, operation: Operation) -> None:
        if self.gone is not None:
            raise self.gone
        if self._shell is not None or self._shell_asked:
            raise NotRunningError("the guest runs a shell on its console, not commands")
        if len(self._queue) >= 64:
            raise NotRunningError("too many commands are waiting for this domain")
        self._queue.append(operation)
        self._pump()

    def _receiving(self, client: Client) -> Operation | None:
        """The client's first operation that still takes input."""
        for operation in ([self._current] if self._current else []) + list(self._queue):
            if operation.client is client and not operation.complete:
                return operation
        return None

    def _finish(self, operation: Operation) -> None:
        assert operation is self._current
        self._current = None

    def _pump(self) -> None:
        """Start the next operation, and move input on as far as there is room."""
        if self.hello is None or self.gone is not None:
            return
        if self._shell is not None:
            self._guest.send(self._shell)
            self._shell = None
            self._shell_asked = True
        if self._current is None and self._queue and (not self._eager or self._queue[0].complete):
            self._current = self._queue.popleft()
        current = self._current
        if current is None:
            return
        self._tell_logs()
        if not current.started:
            current.started = True
            self._guest.send(current.first)
        returned = 0
        while current.inflow and (self._eager or self._guest.waiting() < GUEST_BACKLOG):
            frame, credit = current.inflow[0]
            if current.kind == "run" and credit:
                if credit > current.stdin_credit:
                    break
                current.stdin_credit -= credit
            current.inflow.popleft()
            self._guest.send(frame)
            returned += credit
        if returned and not current.complete and not self._eager:
            current.client.emit(Kind.CREDIT, struct.pack("<I", returned))
