"""``nonroot xenstore-path``: where Debian's ``xenstore-utils`` find our XenStore."""

import click

from nonroot.xenstore import place

__all__ = ["xenstore_path"]


@click.command("xenstore-path", short_help="Print the path of XenStore's socket.")
@click.option("--no-start", is_flag=True, help="Do not start XenStore's process if it is not running.")
def xenstore_path(no_start: bool) -> int:
    """Print the path of XenStore's socket, and start its process if it is not running.

    XENSTORED_PATH=$(nonroot xenstore-path) xenstore-ls
    """
    click.echo(str(place.socket_path() if no_start else place.ensure()))
    return 0
