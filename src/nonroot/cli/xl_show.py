"""Verbs that look: list, vcpu-list, domid, domname, uptime, info, dmesg, top."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from nonroot.cli.display import complete_name, domain_argument, json_option
from nonroot.cli.output import Reporter
from nonroot.cli.xl_common import find, print_json, print_table
from nonroot.domain.registry import ZERO_NAME as ZERO
from nonroot.errors import BadOptionError, NonrootError, NotRunningError

__all__ = ["dmesg", "domid", "domname", "info", "list_domains", "top", "uptime", "vcpu_list"]


def _all(wanted: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Descriptions of all domains (or of those that are named), and of domain zero if it runs. NotRunningError."""
    from nonroot.toolstack.client import Toolstack

    others = [one for one in wanted if one not in ("0", ZERO)]
    if Toolstack.nothing_runs():
        if others:
            raise NotRunningError(f"there is no domain {others[0][:60]!r}; none is running")
        return [], None
    with Toolstack() as toolstack:
        answer = toolstack.request("list") if not wanted or len(others) < len(wanted) else None
        found = [toolstack.request("find", domain=one) for one in others]
    zero = None if answer is None else dict(answer["dom0"])
    return list(answer["domains"]) if answer is not None and not wanted else found, zero


def _mib(domain: dict[str, Any]) -> str:
    memory = domain.get("memory")
    return str(memory >> 20) if isinstance(memory, int) else "?"


def _row(domain: dict[str, Any]) -> tuple[str, ...]:
    seconds = f"{domain['cpu_seconds']:.1f}"
    return (domain["name"], str(domain["domid"]), _mib(domain), "1", domain["state_letters"], seconds)


def _zero_row(zero: dict[str, Any]) -> tuple[str, ...]:
    return (ZERO, "0", str(_resident(zero["pid"]) >> 20), "1", "r-----", f"{zero['cpu_seconds']:.1f}")


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


@click.command(
    "list",
    short_help="List the domains.",
    epilog="\b\nExamples:\n  nonroot list\n  nonroot list web\n  nonroot list -l          everything, as JSON\n\n"
    "\b\nState: r running, b blocked (it waits), p paused, s shut down, c crashed, d dying.",
)
@click.option(
    "-l",
    "--long",
    "long_",
    is_flag=True,
    help="Everything that is known, with what confines its processes, as indented JSON.",
)
@click.option("-v", "--verbose", is_flag=True, help="UUIDs and why domains have stopped, too.")
@json_option
@click.argument("domains", nargs=-1, metavar="[DOMAIN]...", shell_complete=complete_name)
def list_domains(long_: bool, verbose: bool, as_json: bool, domains: tuple[str, ...]) -> int:
    """List this user's domains: name, number, memory in MiB, virtual CPUs, state, CPU time in seconds.

    Domain-0 is the control process. Domains of `nonroot run` are there as well.
    """
    found, zero = _all(domains)
    if long_:
        from nonroot.confine import host

        for one in found:
            processes = host.descendants(one["pid"]) if isinstance(one.get("pid"), int) else []
            one["processes"] = [{"pid": pid, "name": name, "confined_by": host.observe(pid)} for pid, name in processes]
    if as_json or long_:
        print_json(found, 2 if long_ and not as_json else None)
        return 0
    if not found and not (domains and zero):
        Reporter().line("no domain is running")
        return 0
    rows: list[tuple[str, ...]] = [("Name", "ID", "Mem", "VCPUs", "State", "Time(s)")]
    if verbose:
        rows[0] = (*rows[0], "UUID", "Reason")
    if zero is not None:
        rows.append((*_zero_row(zero), *(("-", "-") if verbose else ())))
    rows += [(*_row(one), *((one["uuid"], one["reason"] or "-") if verbose else ())) for one in found]
    print_table(rows, right=(1, 2, 3, 5))
    return 0


@click.command(
    "vcpu-list", short_help="List the domains' virtual CPUs.", epilog="\b\nExample:\n  nonroot vcpu-list web"
)
@json_option
@click.argument("domains", nargs=-1, metavar="[DOMAIN]...", shell_complete=complete_name)
def vcpu_list(as_json: bool, domains: tuple[str, ...]) -> int:
    """List virtual CPUs: each domain has one. They are not pinned, so the affinity is all."""
    found, _ = _all(domains)
    if as_json:
        keys = ("name", "domid", "state", "cpu_seconds")
        print_json([{**{key: one[key] for key in keys}, "vcpu": 0, "affinity": "all"} for one in found])
        return 0
    rows = [("Name", "ID", "VCPU", "CPU", "State", "Time(s)", "Affinity (Hard / Soft)")]
    for one in found:
        letters = one["state_letters"][:2] + ("p" if one["state"] == "paused" else "-")
        rows.append((one["name"], str(one["domid"]), "0", "-", letters, f"{one['cpu_seconds']:.1f}", "all / all"))
    print_table(rows, right=(1, 2, 3, 5))
    return 0


@click.command("domid", short_help="Print a domain's number.", epilog="\b\nExample:\n  nonroot domid web")
@domain_argument
def domid(domain: str) -> int:
    """Print DOMAIN's number."""
    sys.stdout.write("0\n" if domain == ZERO else f"{find(domain)['domid']}\n")
    return 0


@click.command("domname", short_help="Print a domain's name.", epilog="\b\nExample:\n  nonroot domname 3")
@domain_argument
def domname(domain: str) -> int:
    """Print the name of the domain of that number."""
    sys.stdout.write(f"{ZERO}\n" if domain == "0" else f"{find(domain)['name']}\n")
    return 0


@click.command("uptime", short_help="Say how long domains have run.", epilog="\b\nExample:\n  nonroot uptime")
@json_option
@click.argument("domains", nargs=-1, metavar="[DOMAIN]...", shell_complete=complete_name)
def uptime(as_json: bool, domains: tuple[str, ...]) -> int:
    """Say for how long domains have run."""
    found, _ = _all(domains)
    if as_json:
        print_json([{"name": one["name"], "domid": one["domid"], "uptime": one["uptime"]} for one in found])
        return 0
    rows = [("Name", "ID", "Uptime")]
    rows += [(one["name"], str(one["domid"]), _clock(one["uptime"])) for one in found]
    print_table(rows, right=(1,))
    return 0


def _clock(seconds: float) -> str:
    """``90061`` -> ``1 day, 1:01:01``."""
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return text if not days else f"{days} day{'s' if days > 1 else ''}, {text}"


@click.command(short_help="Describe this host.", epilog="\b\nExample:\n  nonroot info --json")
@json_option
def info(as_json: bool) -> int:
    """Describe this host as domains see it: CPUs, memory, engine, what can be run. See also `doctor`."""
    from nonroot import __version__
    from nonroot.engines import select
    from nonroot.toolstack import place

    host = os.uname()
    choice = select.choose("auto")
    memory = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        memory[name] = int(value.split()[0]) >> 10
    facts: dict[str, Any] = {
        "host": host.nodename,
        "release": host.release,
        "version": host.version,
        "machine": host.machine,
        "nr_cpus": os.cpu_count(),
        "total_memory": memory.get("MemTotal", 0),
        "free_memory": memory.get("MemAvailable", memory.get("MemFree", 0)),
        "nonroot_version": __version__,
        "engine": choice.engine,
        "engine_reason": choice.reason,
        "guest_caps": "hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 pvh-x86_32p pvh-x86_64",
        "runtime_folder": os.fspath(place.folder()),
    }
    if as_json:
        print_json(facts)
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        sys.stdout.write(f"{name.ljust(width)} : {value}\n")
    return 0


@click.command(
    short_help="Print the hypervisor's messages of domains.",
    epilog="\b\nExamples:\n  nonroot dmesg web\n  nonroot dmesg --json web",
)
@json_option
@click.argument("domain", required=False, metavar="[DOMAIN]", shell_complete=complete_name)
def dmesg(as_json: bool, domain: str | None) -> int:
    """Print what the hypervisor said of DOMAIN, or of all: engine, boot, pauses, how it stopped, odd accesses.

    The guest's own messages are on its console.
    """
    from nonroot.domain.client import DomainClient

    found, _ = _all(() if domain is None else (domain,))
    records = []
    for one in found:
        client = DomainClient()
        try:
            client.connect(one["socket"])
            messages = client.request("messages", 20)["messages"]
            counters = client.request("stats", 20)["engine"]
        except (NonrootError, TimeoutError) as error:
            messages, counters = [[0.0, f"it does not answer: {error}"]], {}
        finally:
            client.close()
        events = {name.removeprefix("event."): n for name, n in counters.items() if name.startswith("event.")}
        records.append({"name": one["name"], "domid": one["domid"], "messages": messages, "events": events})
    if as_json:
        print_json(records if domain is None else records[0])
        return 0
    for record in records:
        prefix = f"(d{record['domid']}) "
        for seconds, text in record["messages"]:
            sys.stdout.write(f"{prefix}[{seconds:12.6f}] {text}\n")
        for name, count in sorted(record["events"].items()):
            sys.stdout.write(f"{prefix}[{'':12}] {name}: {count} times\n")
    return 0


@click.command(
    short_help="Watch the domains.",
    epilog="\b\nExamples:\n  nonroot top\n  nonroot top -b -n 1          one table, for scripts",
)
@click.option("-d", "--delay", metavar="SECONDS", type=float, default=2.0, show_default=True, help="Between tables.")
@click.option("-n", "--iterations", metavar="N", type=int, help="End after so many.  [default: with -b 1, else never]")
@click.option("-b", "--batch", is_flag=True, help="Print table after table, as without a terminal.")
@json_option
def top(delay: float, iterations: int | None, batch: bool, as_json: bool) -> int:
    """Show the domains and the CPU that they take, anew every few seconds. Ctrl-C ends it."""
    if not 0.1 <= delay <= 3600:
        raise BadOptionError("--delay is 0.1 to 3600 seconds")
    if iterations is not None and iterations < 1:
        raise BadOptionError("--iterations needs a positive number")
    if batch or as_json or not sys.stdout.isatty():
        _print_top(delay, iterations or 1, as_json)
        return 0
    from rich.console import Console
    from rich.live import Live

    console = Console()
    rows = max(shutil.get_terminal_size().lines - 6, 3)
    samples = _Samples()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        shown = 0
        while iterations is None or shown < iterations:
            live.update(_rich_table(samples.take(), rows), refresh=True)
            shown += 1
            time.sleep(delay)
    return 0


class _Samples:
    """CPU shares between two looks."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[float, float]] = {}

    def take(self) -> list[dict[str, Any]]:
        """The domains, busiest first, with ``cpu_percent`` since the last look."""
        found, _ = _all()
        now = time.monotonic()
        for one in found:
            then, spent = self._before.get(one["domid"], (now, one["cpu_seconds"]))
            share = (one["cpu_seconds"] - spent) / (now - then) if now > then else 0.0
            one["cpu_percent"] = round(100 * max(share, 0.0), 1)
        self._before = {one["domid"]: (now, one["cpu_seconds"]) for one in found}
        return sorted(found, key=lambda one: (-one["cpu_percent"], one["domid"]))


TITLES = ("NAME", "ID", "STATE", "CPU(sec)", "CPU(%)", "MEM(MiB)", "RSS(MiB)", "VCPUS", "UPTIME")


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        one["name"],
        str(one["domid"]),
        one["state_letters"],
        f"{one['cpu_seconds']:.1f}",
        f"{one['cpu_percent']:.1f}",
        _mib(one),
        str(_resident(one["pid"]) >> 20),
        "1",
        _clock(one["uptime"]),
    )


def _print_top(delay: float, iterations: int, as_json: bool) -> None:
    samples = _Samples()
    for number in range(iterations):
        if number:
            time.sleep(delay)
        taken = samples.take()
        if as_json:
            sys.stdout.write(json.dumps(taken) + "\n")
        else:
            print_table([TITLES, *map(_cells, taken)], right=(1, 3, 4, 5, 6, 7))
        sys.stdout.flush()


def _rich_table(taken: list[dict[str, Any]], rows: int) -> Any:
    from rich.table import Table

    hidden = len(taken) - rows
    caption = f"{hidden} more" if hidden > 0 else "Ctrl-C ends"
    table = Table(title=time.strftime(f"nonroot top - %H:%M:%S, {len(taken)} domains"), caption=caption, box=None)
    for number, title in enumerate(TITLES):
        table.add_column(title, justify="right" if number in (1, 3, 4, 5, 6, 7) else "left", no_wrap=True)
    for one in taken[:rows]:
        table.add_row(*_cells(one))
    return table
