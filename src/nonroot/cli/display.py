"""Verbs for the screens of running domains: screenshot, type, vncviewer."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from nonroot.cli.output import OWN_FAILURE, FetchBar, Reporter
from nonroot.errors import BadFileError, BadOptionError, NonrootError, UnsupportedError

__all__ = ["screenshot", "type_keys", "vncviewer"]

VIEWERS = ("xtigervncviewer", "vncviewer", "tigervncviewer")
"""Programs that show a VNC server's Unix socket."""


def complete_name(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of running domains, for the shell's completion."""
    from nonroot.domain import registry

    return [CompletionItem(entry.name) for entry in registry.entries() if entry.name.startswith(incomplete)]


domain_argument = click.argument("domain", metavar="DOMAIN", shell_complete=complete_name)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


def _print(record: dict[str, Any] | list[dict[str, Any]]) -> None:
    sys.stdout.write(json.dumps(record, ensure_ascii=True) + "\n")


@click.command(
    short_help="Save a picture of a domain's screen.",
    epilog="\b\nExamples:\n  nonroot screenshot web screen.png\n  nonroot screenshot web - | display\n"
    "  nonroot screenshot --text web          the text of a text mode",
)
@domain_argument
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(dir_okay=False))
@click.option("--text", is_flag=True, help="Print the screen's text instead (text modes only).")
@json_option
def screenshot(domain: str, file: str | None, text: bool, as_json: bool) -> int:
    """Save what DOMAIN's screen shows in FILE: PNG, or what FILE's name says; - is standard output, in PNG."""
    from nonroot.connecting import connect

    if text == (file is not None):
        raise BadOptionError("name the FILE for the picture, or ask for --text")
    if file == "-" and as_json:
        raise BadOptionError("the picture and --json cannot both go to standard output")
    with connect(domain) as running:
        if text:
            shown = running.screen_text()
            _print({"domain": domain, "text": shown}) if as_json else sys.stdout.write(shown + "\n")
            return 0
        picture = running.screen()
    if file == "-":
        picture.save(sys.stdout.buffer, "PNG")
        return 0
    assert file is not None
    try:
        picture.save(file)
    except ValueError:
        raise BadOptionError(f"{file} names no kind of picture: try {Path(file).stem}.png") from None
    except OSError as error:
        raise BadFileError(f"{file} cannot be written: {(error.strerror or str(error)).lower()}") from None
    if as_json:
        _print({"domain": domain, "file": file, "width": picture.width, "height": picture.height})
    return 0


@click.command(
    "type",
    short_help="Type on a domain's keyboard.",
    epilog="\b\nExamples:\n  nonroot type web 'root<ret>'\n  nonroot type web '<ctrl-alt-del>'\n"
    "  nonroot type web '<down><down><ret>'\n\n"
    "\b\nKeys: <ret> <esc> <tab> <spc> <bs> <del> <ins> <home> <end> <pgup> <pgdn> <up> <down>\n"
    "  <left> <right> <f1> … <f12> <ctrl> <shift> <alt> <altgr> <meta> <menu> <print> <pause>\n"
    "  <caps_lock> <num_lock> <kp_0> … <kp_enter>; <lt> is a <; a hyphen joins keys held together.",
)
@domain_argument
@click.argument("text")
@json_option
def type_keys(domain: str, text: str, as_json: bool) -> int:
    """Type TEXT on DOMAIN's keyboard; names in <> are keys. It is a US keyboard."""
    from nonroot.connecting import connect
    from nonroot.display.keys import parse_keys

    chords = parse_keys(text)
    with connect(domain) as running:
        running.keyboard.type(text)
    if as_json:
        _print({"domain": domain, "keys": sum(map(len, chords))})
    return 0


@click.command(
    short_help="Look at a domain's screen and operate it.",
    epilog="\b\nExamples:\n  nonroot vncviewer web\n  nonroot vncviewer web --web            in a browser\n"
    "  nonroot vncviewer web --address        only say where the VNC server listens",
)
@domain_argument
@click.option("--web", is_flag=True, help="Print a link that opens the screen in a browser of this machine, once.")
@click.option("--open/--no-open", "open_it", default=None, help="Open the link too.  [default: on a terminal]")
@click.option("--address", "only_address", is_flag=True, help="Say where the VNC server listens, and start no viewer.")
@json_option
def vncviewer(domain: str, web: bool, open_it: bool | None, only_address: bool, as_json: bool) -> int:
    """Show DOMAIN's screen in a VNC viewer of this machine, or in a browser. Starts its VNC server if need be."""
    from nonroot.connecting import connect

    if web and only_address:
        raise BadOptionError("--web and --address exclude each other")
    reporter = Reporter()
    with FetchBar(reporter) as bar, connect(domain) as running:
        if web:
            url = running.web(bar.show)
            _print({"domain": domain, "url": url}) if as_json else sys.stdout.write(url + "\n")
            if open_it if open_it is not None else (sys.stdout.isatty() and not as_json):
                import webbrowser

                webbrowser.open(url)
            return 0
        address = running.vnc()
    if only_address or as_json:
        _print({"domain": domain, "address": address}) if as_json else sys.stdout.write(address + "\n")
        return 0
    return _start_viewer(address, reporter)


def _start_viewer(address: str, reporter: Reporter) -> int:
    """Become a viewer. UnsupportedError if there is none."""
    program = next((found for name in VIEWERS if (found := shutil.which(name))), None)
    if program is None:
        raise UnsupportedError(
            f"there is no VNC viewer here (tigervnc-viewer has one); use --web, or let one connect to {address}"
        )
    target = address.removeprefix("unix:") if address.startswith("unix:") else address.replace(":", "::", 1)
    try:
        os.execv(program, [program, target])
    except OSError as error:
        reporter.error(NonrootError(f"{program} cannot be started: {error.strerror}"))
        return OWN_FAILURE
