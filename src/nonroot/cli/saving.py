"""Verbs about saved domains: save, restore, cache."""

import itertools
import json
import time
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from nonroot.cli.display import domain_argument, json_option
from nonroot.cli.output import Reporter
from nonroot.cli.xl_common import nothing, print_json, print_table
from nonroot.errors import BadFileError, BadOptionError

__all__ = ["cache", "fork", "restore", "save"]

SAVE_SECONDS = 900.0


@click.command(
    short_help="Save a domain to a file, and end it.",
    epilog="\b\nExamples:\n  nonroot save web web.saved\n  nonroot save -c web web.saved       it goes on\n"
    "  nonroot restore web.saved\n\n"
    "\b\nExit status: 0, or 125: the domain, and a file that was there, are as they were.",
)
@click.option("-c", "--checkpoint", "goes_on", is_flag=True, help="Let it go on afterwards.")
@click.option("-p", "--paused", "stays", is_flag=True, help="Leave it paused afterwards.")
@json_option
@domain_argument
@click.argument("file", type=click.Path(dir_okay=False))
def save(goes_on: bool, stays: bool, as_json: bool, domain: str, file: str) -> int:
    """Save DOMAIN to FILE, from which `restore` goes on, and end it.

    Disk images are not in the file: restore wants them as they were. A domain with shared folders cannot be saved.
    """
    from nonroot.toolstack.client import Toolstack

    if goes_on and stays:
        raise BadOptionError("--checkpoint and --paused exclude each other")
    nothing(domain)
    began = time.monotonic()
    reporter = Reporter(quiet=as_json)
    reporter.progress(f"saving {domain} to {file}")
    with Toolstack() as toolstack:
        then = "go on" if goes_on else "stay" if stays else "end"
        result = toolstack.request("save", SAVE_SECONDS, domain=domain, path=str(Path(file).absolute()), then=then)
    reporter.clear()
    if as_json:
        seconds = round(time.monotonic() - began, 3)
        print_json({"domain": domain, "file": file, "bytes": result["bytes"], "seconds": seconds})
    return 0


@click.command(
    short_help="Go on with a saved domain.",
    epilog="\b\nExamples:\n  nonroot restore web.saved\n"
    "  nonroot restore -p --name copy web.saved   a second one, paused\n"
    "  nonroot restore -c web.saved               its console; Ctrl-] leaves it",
)
@click.option("-p", "--paused", is_flag=True, help="Leave it paused; see unpause.")
@click.option("-c", "--console", "with_console", is_flag=True, help="Use its console; Ctrl-] leaves.")
@click.option("--name", metavar="NAME", help="Its name.  [default: the one that it had]")
@click.option("--engine", metavar="NAME", help="What executes it.  [default: as it was asked for]")
@json_option
@click.argument("file", type=click.Path(dir_okay=False))
def restore(paused: bool, with_console: bool, name: str | None, engine: str | None, as_json: bool, file: str) -> int:
    """Go on with the domain in FILE, where `save` left it. The file stays, and can be restored again."""
    from nonroot.domain.registry import check_name
    from nonroot.toolstack.client import Toolstack

    if with_console and as_json:
        raise BadOptionError("--console and --json exclude each other")
    path = Path(file).absolute()
    saved = _read(path)
    name = check_name(name or saved["name"])
    record = saved["record"]
    record["options"]["saved"] = str(path)
    if engine is not None:
        record["options"]["engine"] = engine
    reporter = Reporter(quiet=as_json)
    reporter.progress(f"restoring {name} from {file}")
    with Toolstack() as toolstack:
        running = {one["uuid"] for one in toolstack.request("list")["domains"]}
        uuid = saved["uuid"] if saved["uuid"] not in running else str(uuids.uuid4())
        made = toolstack.request("create", name=name, uuid=uuid, record=record, paused=paused or with_console)
    reporter.clear()
    if as_json:
        print_json(made)
    if with_console:
        from nonroot.cli.xl_console import attach

        return attach(made, begin=not paused, reporter=reporter)
    return 0


@click.command(
    short_help="Make domains that go on from a running one's state.",
    epilog="\b\nExamples:\n  nonroot fork web                    web-1\n"
    "  nonroot fork -n 4 web               web-1 to web-4\n"
    "  nonroot fork -p --name trial web    one, paused, of that name",
)
@click.option(
    "-n", "--count", metavar="N", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many."
)
@click.option("-p", "--paused", is_flag=True, help="Leave them paused; see unpause.")
@click.option("--name", metavar="NAME", help="The name of a single one.")
@json_option
@domain_argument
def fork(count: int, paused: bool, name: str | None, as_json: bool, domain: str) -> int:
    """Make domains that go on where DOMAIN is now; it goes on too. They share its memory until they write to it.

    The same domains can be forked that can be saved, but for those that write to disk images: use ,overlay or ,ro.
    """
    from nonroot.domain.boot_cache import drop, folder
    from nonroot.domain.registry import check_name
    from nonroot.toolstack.client import Toolstack

    if name is not None and count != 1:
        raise BadOptionError("--name is for a single fork")
    if name is not None:
        check_name(name)
    nothing(domain)
    path = folder() / f".fork-{uuids.uuid4().hex}"
    made: list[dict[str, Any]] = []
    reporter = Reporter(quiet=as_json)
    try:
        with Toolstack() as toolstack:
            reporter.progress(f"forking {domain}")
            toolstack.request(
                "save", SAVE_SECONDS, domain=domain, path=str(path), then="go on", packed=False, fork=True
            )
            saved = _read(path)
            taken = {one["name"] for one in toolstack.request("list")["domains"]}
            names = iter([name] if name is not None else _free_names(saved["name"], taken))
            for _ in range(count):
                record = json.loads(json.dumps(saved["record"]))
                record["options"] |= {"saved": str(path), "kept": True}
                uuid = str(uuids.uuid4())
                made.append(toolstack.request("create", name=next(names), uuid=uuid, record=record, paused=paused))
    finally:
        reporter.clear()
        drop(path)  # whoever goes on from it has it open
    if as_json:
        print_json(made)
    else:
        for one in made:
            reporter.line(f"{one['name']} ({one['domid']})")
    return 0


def _free_names(name: str, taken: set[str]) -> Iterator[str]:
    """``web-1``, ``web-2`` …, but for those that are taken."""
    return (free for n in itertools.count(1) if (free := f"{name[:34]}-{n}") not in taken)


@click.command(
    short_help="Show or remove the boots that are kept.",
    epilog="\b\nExamples:\n  nonroot cache list\n  nonroot cache prune            what was not used for longest\n"
    "  nonroot cache prune --all",
)
@click.argument("action", type=click.Choice(["list", "prune"]))
@click.option("--all", "everything", is_flag=True, help="With prune: keep none.")
@json_option
def cache(action: str, everything: bool, as_json: bool) -> int:
    """`nonroot run -- CMD` keeps the state of a guest that is ready for its first command, and goes on from it the next
    time. `list` shows what is kept, `prune` removes what is beyond 32 boots or 1 GiB.
    """
    from nonroot.domain import boot_cache

    if everything and action != "prune":
        raise BadOptionError("--all goes with prune")
    shown = boot_cache.boots()
    if action == "prune":
        shown = boot_cache.prune(0, 0) if everything else boot_cache.prune()
    records = [
        {"file": str(boot.path), "bytes": boot.bytes, "used": round(boot.used), **_guest(boot.path)} for boot in shown
    ]
    if as_json:
        print_json(records)
    elif records:
        rows = [["File", "MiB", "Last used", "Kernel", "Memory"]]
        for one in records:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["used"]))
            kernel, memory = Path(str(one.get("kernel", "?"))).name, one.get("memory", 0)
            rows.append([Path(one["file"]).name, str(one["bytes"] >> 20), used, kernel, f"{memory >> 20}M"])
        print_table(rows, right=(1, 4))
    return 0


def _guest(path: Path) -> dict[str, Any]:
    """What is kept in a file, if it can be read."""
    from nonroot.saved.container import Reader

    try:
        with Reader(path) as reader:
            options = json.loads(reader.record("domain"))["options"]
        return {"kernel": str(options["kernel"]), "memory": int(options["memory"]), "engine": str(options["engine"])}
    except (BadFileError, ValueError, KeyError, TypeError):
        return {}


def _read(path: Path) -> dict[str, Any]:
    """What the toolstack knows of the domain in a file. BadFileError."""
    from nonroot.domain.options import DomainOptions
    from nonroot.saved.container import Reader
    from nonroot.toolstack.config import Policy

    with Reader(path) as reader:
        raw = reader.record("toolstack") if "toolstack" in reader.names else b""
        domain = reader.record("domain")
    try:
        facts: dict[str, Any] = {"name": f"restored-{uuids.uuid4().hex[:8]}", "uuid": str(uuids.uuid4())}
        if raw:
            facts = dict(json.loads(raw))
        record = facts.setdefault("record", {"policy": {}, "settings": {}, "disks": [], "vnc": None})
        record["options"] = DomainOptions.from_wire(json.loads(domain)["options"]).to_wire()
        Policy(**record["policy"])
        uuids.UUID(facts["uuid"])
        if not isinstance(facts["name"], str):
            raise TypeError("its name is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(f"{path} is no saved domain that could be restored: {error}") from None
    return facts
