"""Verbs for the buttons of a running domain: power and reset."""

import click

from nonroot.cli.display import domain_argument

__all__ = ["power_button", "reset"]


@click.command(
    "power-button",
    short_help="Press a domain's power button.",
    epilog="\b\nExample:\n  nonroot power-button web",
)
@domain_argument
def power_button(domain: str) -> int:
    """Press DOMAIN's power button. Whether the guest then shuts down is its own decision."""
    from nonroot.connecting import connect

    with connect(domain) as running:
        running.press_power_button()
    return 0


@click.command(short_help="Press a domain's reset button.", epilog="\b\nExample:\n  nonroot reset web")
@domain_argument
def reset(domain: str) -> int:
    """Reset DOMAIN, unasked: a guest that boots by firmware starts again, any other ends."""
    from nonroot.connecting import connect

    with connect(domain) as running:
        running.reset()
    return 0
