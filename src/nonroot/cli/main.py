"""The ``nonroot`` command. Subcommands are imported when they are used, so that it starts quickly."""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from nonroot.cli.output import OWN_FAILURE, Reporter
from nonroot.cli.start import ensure_standard_streams
from nonroot.errors import NonrootError

__all__ = ["cli", "main"]

COMMANDS = {
    "run": ("nonroot.cli.run", "run", "Boot a guest and run a command in it, or use its console."),
    "demo": ("nonroot.cli.demo", "demo", "Boot Linux before your eyes, and run `uname -a` in it."),
    "save": ("nonroot.cli.saving", "save", "Save a domain to a file, and end it."),
    "restore": ("nonroot.cli.saving", "restore", "Go on with a saved domain."),
    "fork": ("nonroot.cli.saving", "fork", "Make domains that go on from a running one's state."),
    "cache": ("nonroot.cli.saving", "cache", "Show or remove the boots that are kept."),
    "create": ("nonroot.cli.xl_create", "create", "Make a domain from a configuration file of xl's."),
    "list": ("nonroot.cli.xl_show", "list_domains", "List the domains."),
    "console": ("nonroot.cli.xl_console", "console", "Use a domain's console."),
    "pause": ("nonroot.cli.xl_control", "pause", "Stop a domain's time."),
    "unpause": ("nonroot.cli.xl_control", "unpause", "Let a paused domain go on."),
    "shutdown": ("nonroot.cli.xl_control", "shutdown", "Ask a domain to shut down."),
    "reboot": ("nonroot.cli.xl_control", "reboot", "Ask a domain to reboot."),
    "destroy": ("nonroot.cli.xl_control", "destroy", "End a domain at once."),
    "rename": ("nonroot.cli.xl_control", "rename", "Give a domain another name."),
    "domid": ("nonroot.cli.xl_show", "domid", "Print a domain's number."),
    "domname": ("nonroot.cli.xl_show", "domname", "Print a domain's name."),
    "vcpu-list": ("nonroot.cli.xl_show", "vcpu_list", "List the domains' virtual CPUs."),
    "uptime": ("nonroot.cli.xl_show", "uptime", "Say how long domains have run."),
    "top": ("nonroot.cli.xl_show", "top", "Watch the domains."),
    "info": ("nonroot.cli.xl_show", "info", "Describe this host."),
    "dmesg": ("nonroot.cli.xl_show", "dmesg", "Print the hypervisor's messages of domains."),
    "sysrq": ("nonroot.cli.xl_control", "sysrq", "Press a magic SysRq key in a domain."),
    "mem-set": ("nonroot.cli.xl_control", "mem_set", "Change a domain's memory."),
    "mem-max": ("nonroot.cli.xl_control", "mem_max", "Limit a domain's memory."),
    "block-list": ("nonroot.cli.xl_devices", "block_list", "List a domain's disks."),
    "block-attach": ("nonroot.cli.xl_devices", "block_attach", "Add a disk to a domain."),
    "block-detach": ("nonroot.cli.xl_devices", "block_detach", "Take a disk from a domain."),
    "cd-insert": ("nonroot.cli.xl_devices", "cd_insert", "Put a CD into a domain's drive."),
    "cd-eject": ("nonroot.cli.xl_devices", "cd_eject", "Take the CD out of a domain's drive."),
    "network-list": ("nonroot.cli.xl_devices", "network_list", "List a domain's network interfaces."),
    "network-attach": ("nonroot.cli.xl_devices", "network_attach", "Add a network interface to a domain."),
    "network-detach": ("nonroot.cli.xl_devices", "network_detach", "Take a network interface away."),
    "screenshot": ("nonroot.cli.display", "screenshot", "Save a picture of a domain's screen."),
    "type": ("nonroot.cli.display", "type_keys", "Type on a domain's keyboard."),
    "vncviewer": ("nonroot.cli.display", "vncviewer", "Look at a domain's screen and operate it."),
    "power-button": ("nonroot.cli.power", "power_button", "Press a domain's power button."),
    "reset": ("nonroot.cli.power", "reset", "Press a domain's reset button."),
    "doctor": ("nonroot.cli.tools", "doctor", "Show what this machine has, and what nonroot makes of it."),
    "xenstore-path": ("nonroot.cli.xenstore", "xenstore_path", "Print the path of XenStore's socket."),
    "completion": ("nonroot.cli.tools", "completion", "Print the shell's completion script."),
}
"""Verb: (module, name in it, one line of help)."""

EPILOG = """\b
Examples:
  nonroot run -- uname -a                    run a command in a fresh guest
  nonroot run                                use the guest's console; Ctrl-] leaves
  nonroot run --copy-in .:/src --workdir /src -- make test
  nonroot run --kernel bzImage --initrd initrd.img -- sh -c 'dmesg | tail'
  nonroot doctor                             what this machine can do

\b
Exit status of `nonroot run -- CMD`: CMD's own; 124 after a time-out; 125 if nonroot itself or
the guest failed; 126 and 127 if CMD could not be executed or found; 128+n if signal n killed it.
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module."""
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help, without importing them all."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """An unknown verb is answered with the nearest known one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from nonroot import __version__

        click.echo(f"nonroot {__version__}")
        ctx.exit(0)


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
def cli() -> None:
    """Boot unmodified operating systems: without root, without a kernel module, without VT-x."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors are one sentence on stderr, and status 125."""
    ensure_standard_streams()
    reporter = Reporter()
    try:
        status = cli.main(
            args=list(sys.argv[1:] if arguments is None else arguments), prog_name="nonroot", standalone_mode=False
        )
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return OWN_FAILURE
    except click.ClickException as error:
        message = error.format_message()
        reporter.error(message[:1].lower() + message[1:] if not message.startswith(("-", "'")) else message)
        return OWN_FAILURE
    except NonrootError as error:
        reporter.error(error)
        return OWN_FAILURE
    except (KeyboardInterrupt, click.Abort):
        reporter.clear()
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as unexpected:
        reporter.error(f"nonroot itself failed: {type(unexpected).__name__}: {unexpected}")
        if os.environ.get("NONROOT_DEBUG"):
            traceback.print_exc()
        else:
            reporter.line("this is a defect of nonroot; please report it with the output of NONROOT_DEBUG=1")
        return OWN_FAILURE
    return status if isinstance(status, int) else 0
