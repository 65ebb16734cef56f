"""Verbs about this installation: doctor, completion."""

import os
import sys

import click

__all__ = ["completion", "doctor"]


@click.command(short_help="Show what this machine has, and what nonroot makes of it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(as_json: bool) -> int:
    """Show what this machine has: CPU, KVM, guest software; which engine `auto` takes, and why.

    Ends with 1 if no domain could run here.
    """
    from nonroot.cli.doctor import doctor as examine

    return examine(as_json=as_json)


@click.command(short_help="Print the shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    r"""Print the completion script of a shell.

    \b
    bash: nonroot completion bash > ~/.local/share/bash-completion/completions/nonroot
    zsh:  nonroot completion zsh > a file _nonroot in a directory of $fpath
    fish: nonroot completion fish > ~/.config/fish/completions/nonroot.fish
    """
    from click.shell_completion import get_completion_class

    from nonroot.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    template = kind(cli, {}, "nonroot", "_NONROOT_COMPLETE")
    # The template alone: click's source() would first run bash to see its version.
    sys.stdout.write(template.source_template % template.source_vars() + os.linesep)
