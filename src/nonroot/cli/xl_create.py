"""``nonroot create``: a domain from one of xl's configuration files."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nonroot.cli.output import FetchBar, Reporter
from nonroot.cli.xl_common import print_json
from nonroot.errors import BadOptionError

__all__ = ["create"]

EPILOG = """\b
Examples:
  nonroot create web.cfg                     the domain of this file
  nonroot create -c web.cfg memory=512       its console; Ctrl-] leaves it, and the domain goes on
  nonroot create name=try                    Debian's kernel and a shell, without a file
  nonroot create -n web.cfg                  only look at the file

\b
Exit status: 0, or 125 if the domain could not be made; one sentence on stderr says why.
"""


@click.command(short_help="Make a domain from a configuration file of xl's.", epilog=EPILOG)
@click.option("-c", "--console", "with_console", is_flag=True, help="Use its console; Ctrl-] leaves.")
@click.option("-p", "--paused", is_flag=True, help="Leave it paused; see unpause.")
@click.option("-f", "--defconfig", type=click.Path(dir_okay=False), help="The configuration file.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@click.option("-n", "--dryrun", is_flag=True, help="Read the configuration, print what it means, and make nothing.")
@click.option("-V", "--vncviewer", "view", is_flag=True, help="Look at its screen.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.argument("arguments", nargs=-1, metavar="[CFG] [KEY=VALUE]...")
def create(
    with_console: bool,
    paused: bool,
    defconfig: str | None,
    quiet: bool,
    dryrun: bool,
    view: bool,
    as_json: bool,
    arguments: tuple[str, ...],
) -> int:
    """Make a domain from CFG, a file in the syntax of xl.cfg. KEY=VALUE adds to it, or replaces what is there.

    The domain goes on when this command has ended. Settings that nonroot does not know are named on stderr.
    """
    from nonroot.toolstack.config import fetch_software, read_config

    if with_console and as_json:
        raise BadOptionError("--console and --json exclude each other")
    files = [text for text in arguments if "=" not in text or _is_file(text)]
    assignments = [text for text in arguments if text not in files]
    if defconfig is not None:
        files.insert(0, defconfig)
    if len(files) > 1:
        raise BadOptionError(f"one configuration file at a time, not {files[0]} and {files[1]}")
    if not files and not assignments:
        raise BadOptionError("name a configuration file, or settings such as name=web")
    reporter = Reporter(quiet=quiet)
    config = read_config(Path(files[0]) if files else None, assignments)
    if not quiet:
        for warning in config.warnings:
            reporter.line(f"warning: {warning}")
    if dryrun:
        print_json({"name": config.name, "uuid": config.uuid, "config": config.settings}, None if as_json else 2)
        return 0
    if view and not config.options.display and config.firmware is None:
        raise BadOptionError("this domain has no screen to look at; use type='hvm', or vnc=1")
    with FetchBar(reporter) as bar:
        note = fetch_software(config, bar.show)
    if note and not quiet:
        reporter.line(note)
    config.options.check()
    record: dict[str, Any] = {
        "options": config.options.to_wire(),
        "policy": asdict(config.policy),
        "settings": config.settings,
        "disks": [disk.to_wire() for disk in config.disks],
        "vnc": config.vnc,
    }
    from nonroot.toolstack.client import Toolstack

    reporter.progress(f"making the domain {config.name}")
    with Toolstack() as toolstack:
        made = toolstack.request(
            "create", name=config.name, uuid=config.uuid, record=record, paused=paused or with_console
        )
    reporter.clear()
    if as_json:
        print_json(made)
    if view:
        _start_viewer(made["name"])
    if with_console:
        from nonroot.cli.xl_console import attach

        return attach(made, begin=not paused, reporter=reporter)
    return 0


def _is_file(text: str) -> bool:
    """Whether this is a file's name; no name can be as long as a setting may be."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _start_viewer(name: str) -> None:
    """A viewer beside us, if there is one."""
    import subprocess
    import sys

    subprocess.Popen(
        [sys.executable, "-m", "nonroot", "vncviewer", name], start_new_session=True, stdin=subprocess.DEVNULL
    )
