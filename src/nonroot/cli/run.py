"""``nonroot run``: boot a guest; run a command in it, or use its console."""

import contextlib
import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import click

from nonroot.api import SEABIOS, Domain, Statistics, Stopped
from nonroot.cli.output import OWN_FAILURE, TIMED_OUT, FetchBar, Reporter
from nonroot.cli.signals import InterruptedBySignal, SignalRelay
from nonroot.cli.terminal import is_terminal, pump_keys, raw_terminal, window_size, write_all
from nonroot.domain.command import Completed, shell_status
from nonroot.domain.console import printable
from nonroot.domain.files import parse_copy
from nonroot.domain.registry import check_name
from nonroot.domain.viewers import parse_address
from nonroot.domain.wire import Kind
from nonroot.errors import (
    BadOptionError,
    BootTimeoutError,
    CommandTimeoutError,
    DomainStoppedError,
    NonrootError,
    WaitTimeoutError,
)
from nonroot.guests import DEFAULT_FLAVOUR

__all__ = ["run"]

BOOT_TIMEOUT = 600.0
"""Seconds for the boot without --timeout; a loaded machine may be slow, but something else is wrong then."""
MAX_JSON_OUTPUT = 64 << 20
PRIVATE = "private"
"""--vnc without an address."""

EPILOG = """\b
Examples:
  nonroot run -- uname -a
  nonroot run -- sh -c 'exit 7'; echo $?
  tar c . | nonroot run -- tar tv
  nonroot run --copy-in .:/src --workdir /src -- ./test.sh
  nonroot run --copy-out /proc/cpuinfo:cpuinfo.txt -- true
  nonroot run --json --timeout 60 -- dmesg
  nonroot run --disk data.img -- mount /dev/xvda /mnt
  nonroot run --share .:/src:ro --workdir /src -- ls -l
  nonroot run --net user -- wget -O - http://example.org/
  nonroot run --memory 1G --append nokaslr       the console; Ctrl-] leaves
"""


@dataclass
class RunOptions:
    """The command line, checked."""

    command: list[str]
    env: dict[str, str]
    workdir: str | None
    copy_in: list[tuple[str, str]]
    copy_out: list[tuple[str, str]]
    timeout: float | None
    as_json: bool
    tty: bool
    domain: dict[str, Any] = field(default_factory=dict)
    vnc: str | None = None
    stats: bool = False


def parse_env(values: tuple[str, ...]) -> dict[str, str]:
    """``K=V``, or ``K`` for our own value of K (left out if we have none)."""
    env = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name:
            raise BadOptionError(f"--env needs NAME=VALUE, not {text!r}")
        if equals:
            env[name] = value
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=EPILOG,
    short_help="Boot a guest and run a command in it, or use its console.",
)
@click.option(
    "--kernel", metavar="FILE", help="A bzImage, or an ELF with a PVH note.  [default: Debian's cloud kernel]"
)
@click.option("--initrd", metavar="FILE", help="The kernel's initramfs.  [default: busybox]")
@click.option("--append", metavar="TEXT", default="", help="Add to the kernel's command line.")
@click.option("--flavour", metavar="NAME", help="Debian's kernel to fetch: cloud-amd64, amd64, 686-pae, 686.")
@click.option("-m", "--memory", metavar="SIZE", default="256M", show_default=True, help="The guest's memory.")
@click.option(
    "--engine",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="What executes the guest (see doctor).",
)
@click.option("--protocol", metavar="NAME", default="auto", help="Enter the kernel by pvh, linux64 or linux32.")
@click.option(
    "--firmware",
    metavar="NAME|FILE",
    help="Start in firmware (seabios, ovmf, or an image) that boots from disk, CD or floppy.",
)
@click.option(
    "--disk", metavar="IMG[,OPTION]...", multiple=True, help="A disk; options: ro, overlay, format=NAME, backing, ide."
)
@click.option("--cdrom", metavar="ISO", multiple=True, help="A CD; none is an empty drive.")
@click.option("--floppy", metavar="IMG[,OPTION]...", multiple=True, help="A floppy; none is an empty drive.")
@click.option("--boot", metavar="LETTERS", help="What the BIOS boots from: a floppy, c disk, d CD.  [default: cd]")
@click.option("--boot-menu", is_flag=True, help="Have the BIOS offer its boot menu.")
@click.option(
    "--device-model",
    metavar="NAME",
    default="internal",
    show_default=True,
    help="Where emulated devices are: internal (the domain's process), stub (a confined one) or dom0.",
)
@click.option(
    "--xen/--no-xen",
    default=None,
    help="Be a Xen for the guest: clock, console, disks, network.  [default: if a kernel that knows Xen is started]",
)
@click.option(
    "--net",
    metavar="NETWORK[,OPTION]...",
    multiple=True,
    help="A network card: user is your view of the network, another name is a network between domains; "
    "options: mac=MAC, ip=ADDRESS/BITS, isolated.",
)
@click.option(
    "-p",
    "--publish",
    metavar="[ADDRESS:]PORT:GUEST-PORT[/udp]",
    multiple=True,
    help="Lead a port of this machine into the guest; implies --net user.",
)
@click.option(
    "--share", metavar="HOST:GUEST[:ro]", multiple=True, help="Give the guest a folder of this machine, at GUEST."
)
@click.option("--name", metavar="NAME", help="Be found under this name (see list).  [default: a free one]")
@click.option("--display", is_flag=True, help="Have a screen, keyboard and mouse; with a BIOS they are there anyway.")
@click.option(
    "--vnc",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value=PRIVATE,
    help="Serve the screen by VNC: unix:PATH, or 127.0.0.1:PORT with a password.  [default: a private Unix socket]",
)
@click.option("--timeout", metavar="SECONDS", type=float, help="End everything after this long; status 124.")
@click.option(
    "-e", "--env", metavar="NAME=VALUE", multiple=True, help="Set a variable for CMD; NAME alone passes ours on."
)
@click.option("-w", "--workdir", metavar="DIR", help="Run CMD in this directory of the guest.")
@click.option("--copy-in", metavar="HOST:GUEST", multiple=True, help="Copy a file or directory before CMD.")
@click.option("--copy-out", metavar="GUEST:HOST", multiple=True, help="Copy a file or directory after CMD.")
@click.option("-t", "--tty", is_flag=True, help="Run CMD on a terminal of the guest.")
@click.option("--virtual-time", is_flag=True, help="Time follows the instructions: runs repeat exactly.")
@click.option("--seed", type=int, metavar="N", default=0, help="Seed of the randomness in virtual time.")
@click.option("--off", metavar="NAME", multiple=True, help="Switch an optimisation of the engine off (see doctor).")
@click.option("--stats", is_flag=True, help="Print the engine's counters at the end, on stderr.")
@click.option("--fresh", is_flag=True, help="Boot, even if a boot of just this guest has been kept (see cache).")
@click.option("--no-fetch", is_flag=True, help="Do not fetch guest software.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with everything, CMD's output included.")
@click.option("-v", "--verbose", count=True, help="Show the guest's console and what is done, on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@click.argument("command", metavar="[-- CMD [ARG]...]", nargs=-1, type=click.UNPROCESSED)
def run(
    kernel: str | None,
    initrd: str | None,
    append: str,
    flavour: str | None,
    memory: str,
    engine: str,
    protocol: str,
    firmware: str | None,
    disk: tuple[str, ...],
    cdrom: tuple[str, ...],
    floppy: tuple[str, ...],
    boot: str | None,
    boot_menu: bool,
    device_model: str,
    xen: bool | None,
    net: tuple[str, ...],
    publish: tuple[str, ...],
    share: tuple[str, ...],
    name: str | None,
    display: bool,
    vnc: str | None,
    timeout: float | None,
    env: tuple[str, ...],
    workdir: str | None,
    copy_in: tuple[str, ...],
    copy_out: tuple[str, ...],
    tty: bool,
    virtual_time: bool,
    seed: int,
    off: tuple[str, ...],
    stats: bool,
    fresh: bool,
    no_fetch: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    command: tuple[str, ...],
) -> int:
    """Boot a guest. With CMD, run it there with our stdin, stdout and stderr, and end with its status.

    Without CMD, use the guest's console: Ctrl-] leaves, and ends the guest.

    Status: CMD's own; 124 after --timeout; 125 if nonroot or the guest failed; 126 and 127 if CMD could not be executed
    or found; 128+n if signal n killed it. The first Ctrl-C (or SIGTERM) goes to CMD, the second ends the guest.
    """
    if verbose and quiet:
        raise BadOptionError("--verbose and --quiet exclude each other")
    if timeout is not None and not 0 < timeout < 1e9:
        raise BadOptionError(f"--timeout needs a positive number of seconds, not {timeout:g}")
    if not command and (copy_in or copy_out or env or workdir or tty):
        raise BadOptionError("--env, --workdir, --copy-in, --copy-out and --tty need a command: add -- CMD")
    if tty and as_json:
        raise BadOptionError("--tty and --json exclude each other")
    drives = bool(disk or cdrom or floppy)
    from_drives = drives and not command and kernel is None and flavour is None
    if firmware is None and (boot is not None or boot_menu or from_drives):
        firmware = SEABIOS
    if drives and command and kernel is None and flavour is None:
        flavour = DEFAULT_FLAVOUR
    if command and firmware is not None:
        raise BadOptionError("a command needs a kernel that nonroot starts itself: leave out CMD, or the firmware")
    if name is not None:
        check_name(name)
    if vnc not in (None, PRIVATE):
        parse_address(vnc)
    reporter = Reporter(verbose, quiet)
    options = RunOptions(
        list(command),
        parse_env(env),
        workdir,
        [parse_copy(text, "--copy-in") for text in copy_in],
        [parse_copy(text, "--copy-out") for text in copy_out],
        timeout,
        as_json,
        tty,
        {
            "kernel": kernel,
            "initrd": initrd,
            "append": append,
            "memory": memory,
            "engine": engine,
            "protocol": protocol,
            "firmware": firmware,
            "disks": disk,
            "cdrom": cdrom,
            "floppy": floppy,
            "boot": boot or "cd",
            "boot_menu": boot_menu,
            "device_model": device_model,
            "xen": xen,
            "networks": net,
            "publish": publish,
            "shares": share,
            "name": name,
            "display": display or vnc is not None,
            "flavour": flavour,
            "virtual_time": virtual_time,
            "seed": seed,
            "off": off,
            "kept": bool(command) and not fresh,
            "fetch": not no_fetch,
            "timeout": timeout or BOOT_TIMEOUT,
            "quiet": bool(command) and not verbose,
            # Without CMD, the user's own initramfs runs its own init.
            "agent": firmware is None and (bool(command) or kernel is None),
        },
        vnc,
        stats,
    )
    return Session(options, reporter).run()


class Session:
    """One run, from the start of the domain to the exit status."""

    def __init__(self, options: RunOptions, reporter: Reporter) -> None:
        self.options = options
        self.reporter = reporter
        self.result: dict[str, Any] = {"status": OWN_FAILURE, "outcome": "failed"}
        self._closed: set[Kind] = set()
        self._output = {Kind.STDOUT: bytearray(), Kind.STDERR: bytearray()}
        self._console = bytearray()
        self._command: Any = None
        self._deadline = 0.0

    def run(self) -> int:
        """The exit status; everything has been said and nothing is left behind."""
        began = time.monotonic()
        reporter = self.reporter
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(FetchBar(reporter))
            # Somebody else may want to change a domain that has a name.
            sealed = bool(self.options.command) and not self.options.domain.get("name")
            domain = Domain(**self.options.domain, sealed=sealed, progress=bar.step, fetch_progress=bar.show)
            relay = stack.enter_context(SignalRelay(domain.kill))
            stack.callback(domain.destroy)
            try:
                status = self._run(domain, relay)
            except InterruptedBySignal as interruption:
                status = self._ended_by(interruption.number)
            except (BootTimeoutError, WaitTimeoutError, CommandTimeoutError) as error:
                status = self._timed_out(error)
            except NonrootError as error:
                if relay.killed_by:
                    status = self._ended_by(relay.killed_by)
                else:
                    status = self._failed(error)
            self._describe(domain, began, status)
        if self.options.as_json:
            write_all(1, json.dumps(self.result, ensure_ascii=True).encode() + b"\n")
        return status

    def _run(self, domain: Domain, relay: SignalRelay) -> int:
        domain.on_event = self._event
        if self.reporter.verbose and self.options.command:
            domain.console.listener = self._show_console
        domain.start()
        self._deadline = time.monotonic() + (self.options.timeout or 1e9)
        if domain.note and not self.reporter.quiet and (domain.can_run_commands or not self.options.command):
            self.reporter.line(domain.note)
        if self.options.vnc is not None:
            self._serve_screen(domain, self.options.vnc)
        if domain.origin == "kept":
            self.reporter.progress(f"going on from a kept boot with the {domain.engine} engine")
        else:
            self.reporter.progress(f"booting with the {domain.engine} engine: {domain.reason}")
        if self.options.command:
            return self._run_command(domain, relay)
        return self._use_console(domain, relay)

    def _serve_screen(self, domain: Domain, address: str) -> None:
        """Start the VNC server, and say where it is."""
        password = None
        wanted = None if address == PRIVATE else parse_address(address)
        if wanted is not None and not wanted.is_unix:
            password = os.environ.get("NONROOT_VNC_PASSWORD")
            if not password:
                import secrets

                password = secrets.token_urlsafe(6)
                self.reporter.line(f"the VNC password is {password}")
        served = domain.vnc(None if wanted is None else str(wanted), password)
        self.result |= {"name": domain.name, "vnc": served}
        if not self.reporter.quiet:
            self.reporter.line(f"domain {domain.name}: VNC at {served}")

    # ── with CMD ──

    def _run_command(self, domain: Domain, relay: SignalRelay) -> int:
        options = self.options
        note = domain.note
        ready = domain.wait_ready()
        if domain.note and domain.note != note and not self.reporter.quiet:
            self.reporter.line(domain.note)
        self.reporter.progress(f"{ready['system']} {ready['release']} is up")
        for source, destination in options.copy_in:
            domain.copy_in(source, destination)
        self.reporter.clear()
        size = window_size() if options.tty else None
        env = dict(options.env)
        if options.tty and "TERM" not in env:
            env["TERM"] = os.environ.get("TERM", "vt100")
        raw: contextlib.AbstractContextManager[object] = raw_terminal(0) if options.tty else contextlib.nullcontext()
        with raw:
            # A signal that comes while the command is being started is the command's too: it waits until there is one.
            started = threading.Event()

            def forward(number: int) -> None:
                started.wait()
                if self._command is not None:
                    self._command.send_signal(number)

            relay.forward_to(forward)
            try:
                command = domain.popen(options.command, 0, env, options.workdir, tty=size, on_output=self._take_output)
                self._command = command
            finally:
                started.set()
            if options.tty:
                relay.forward_to(command.send_signal, lambda: command.resize(*window_size()))
            completed = command.wait(max(0.0, self._deadline - time.monotonic()) if options.timeout else None)
        relay.forward_to(None)
        self.result |= {"outcome": completed.how, "returncode": completed.returncode}
        for source, target in options.copy_out:
            for skipped in domain.copy_out(source, target):
                self.reporter.line(f"not copied: {skipped}")
        self._explain(completed)
        if self._has_outside():
            with contextlib.suppress(NonrootError):
                domain.shutdown(10)
        return shell_status(completed.returncode)

    def _has_outside(self) -> bool:
        """Whether there is anything outside of the guest that it could leave in disorder."""
        outside = ("disks", "cdrom", "floppy", "networks", "publish", "shares")
        return any(self.options.domain[name] for name in outside)

    def _explain(self, completed: Completed) -> None:
        name = completed.args[0]
        if completed.how == "not_found":
            self.reporter.error(f"the guest has no command {name!r}")
        elif completed.how == "not_executable":
            self.reporter.error(f"the guest cannot execute {name!r}")

    def _take_output(self, kind: Kind, data: bytes) -> None:
        """In the client's reader thread: while we write, the guest's output waits."""
        if self.options.as_json:
            if sum(map(len, self._output.values())) < MAX_JSON_OUTPUT:
                self._output[kind] += data
            else:
                self.result["truncated"] = True
            return
        if kind in self._closed:
            return
        if not write_all(1 if kind == Kind.STDOUT else 2, data):
            self._closed.add(kind)
            threading.Thread(target=self._nobody_reads, daemon=True).start()

    def _nobody_reads(self) -> None:
        """Our reader has gone: the command learns it as a local one would."""
        while self._command is None:
            time.sleep(0.01)
        with contextlib.suppress(NonrootError, TimeoutError):
            self._command.send_signal(signal.SIGPIPE)

    # ── without CMD ──

    def _use_console(self, domain: Domain, relay: SignalRelay) -> int:
        options, reporter = self.options, self.reporter
        terminal = is_terminal(0) and is_terminal(1) and not options.as_json
        domain.console.listener = self._keep_console if options.as_json else self._pass_console
        if domain.can_run_commands:
            rows, columns = window_size() if terminal else (24, 80)
            domain.start_shell(rows, columns, {"TERM": os.environ.get("TERM", "vt100")} if terminal else None)
        reporter.clear()
        if terminal and not reporter.quiet:
            reporter.line(f"the {domain.engine} engine runs this guest ({domain.reason}); Ctrl-] leaves")
        past = domain.console.read()
        if past:
            (self._keep_console if options.as_json else self._pass_console)(past)
        wake_read, wake_write = os.pipe()
        how: list[str] = []

        def keys(raw: bool) -> None:
            how.append(pump_keys(0, wake_read, domain.console.write, raw))

        with raw_terminal(0) if terminal else contextlib.nullcontext(False) as raw:
            relay.forward_to(None, lambda: domain.resize(*window_size()))
            typist = threading.Thread(target=keys, args=(bool(raw),), name="nonroot-keys", daemon=True)
            typist.start()
            try:
                stopped = self._wait(domain, how)
            finally:
                os.write(wake_write, b"x")
                typist.join(2)
        os.close(wake_read)
        os.close(wake_write)
        if stopped is None:
            if terminal:
                reporter.raw("\r\n")
            if not reporter.quiet:
                reporter.line("left the console; the guest has been ended")
            self.result |= {"outcome": "left"}
            return 0
        return self._console_ended(stopped)

    def _wait(self, domain: Domain, how: list[str]) -> Stopped | None:
        """Until the guest stops, or the user leaves (None)."""
        while True:
            left = self._deadline - time.monotonic()
            try:
                return domain.wait(max(0.0, min(left, 0.1 if is_terminal(0) else 1.0)))
            except WaitTimeoutError:
                if how and how[0] == "left":
                    return None
                if left <= 0:
                    raise WaitTimeoutError(
                        f"the guest was still running after {self.options.timeout:g} seconds"
                    ) from None

    def _console_ended(self, stopped: Stopped) -> int:
        self.result |= {"outcome": stopped.reason, "message": stopped.message}
        if stopped.reason in ("poweroff", "reset"):
            return 0
        self.reporter.error(stopped.message)
        return OWN_FAILURE

    def _pass_console(self, data: bytes) -> None:
        write_all(1, data)

    def _keep_console(self, data: bytes) -> None:
        if len(self._console) < MAX_JSON_OUTPUT:
            self._console += data

    # ── what happens beside ──

    def _show_console(self, data: bytes) -> None:
        self.reporter.raw(printable(data))

    def _event(self, record: dict[str, Any]) -> None:
        if record.get("event") == "agent_log" and not self.reporter.quiet:
            self.reporter.line(printable(str(record.get("text", "")).encode()))

    def _ended_by(self, number: int) -> int:
        self.reporter.clear()
        self.result |= {"outcome": "interrupted", "signal": number}
        return 128 + number

    def _timed_out(self, error: NonrootError) -> int:
        if self.options.timeout is None:
            return self._failed(error)
        self.reporter.error(error)
        self.result |= {"outcome": "timeout", "error": error.to_wire()}
        return TIMED_OUT

    def _failed(self, error: NonrootError) -> int:
        self.reporter.error(error)
        console = str(error.details.get("console") or "")
        if isinstance(error, (DomainStoppedError, BootTimeoutError)) and console and not self.reporter.quiet:
            self.reporter.raw("".join(f"  | {line}\n" for line in console.splitlines()))
        self.result |= {"outcome": error.code, "error": error.to_wire()}
        return OWN_FAILURE

    def _describe(self, domain: Domain, began: float, status: int) -> None:
        """What --json and -v tell beside the outcome."""
        self.result |= {"status": status, "seconds": round(time.monotonic() - began, 3)}
        if not self.options.as_json and not self.reporter.verbose and not self.options.stats:
            return
        statistics: Statistics | None = None
        with contextlib.suppress(NonrootError, TimeoutError):
            statistics = domain.stats
            self.result |= domain.description | {"boot": domain.origin}
            self.result |= {
                "instructions": statistics.instructions,
                "machine_seconds": round(statistics.machine_seconds, 6),
                "exits": statistics.exits,
                "engine_counters": statistics.engine,
            }
        if self.options.command:
            for kind, name in ((Kind.STDOUT, "stdout"), (Kind.STDERR, "stderr")):
                self.result |= _text(name, bytes(self._output[kind]))
        elif self.options.as_json:
            self.result |= _text("console", bytes(self._console))
        if statistics is not None and (self.reporter.verbose or self.options.stats):
            self.reporter.line(summary(domain, statistics))
        if statistics is not None and self.options.stats:
            for name, count in statistics.engine.items():
                self.reporter.line(f"{name.replace('_', ' '):<28}{count:>16,}")


def summary(domain: Domain, statistics: Statistics) -> str:
    """One line: engine and why, instructions, time, exits by kind."""
    exits = ", ".join(f"{kind} {count}" for kind, count in sorted(statistics.exits.items(), key=lambda e: -e[1]))
    return (
        f"engine {domain.engine} ({domain.reason}); {statistics.instructions:,} guest instructions; "
        f"{statistics.wall_seconds:.1f} s; exits: {exits or 'none'}"
    )


def _text(name: str, data: bytes) -> dict[str, str]:
    """Output for JSON: text, and the bytes in base64 as well if they are not UTF-8."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        import base64

        return {name: data.decode("utf-8", "replace"), f"{name}_base64": base64.b64encode(data).decode()}
