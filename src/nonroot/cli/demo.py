"""``nonroot demo``: Linux boots before your eyes."""

import time

import click

from nonroot.api import Domain
from nonroot.cli.output import OWN_FAILURE, FetchBar, Reporter
from nonroot.cli.run import summary
from nonroot.cli.signals import InterruptedBySignal, SignalRelay
from nonroot.cli.terminal import write_all
from nonroot.domain.console import printable

__all__ = ["demo"]


@click.command(short_help="Boot Linux before your eyes, and run `uname -a` in it.")
@click.option("--engine", metavar="NAME", default="auto", show_default=True, help="What executes the guest.")
@click.option("-m", "--memory", metavar="SIZE", default="256M", show_default=True, help="The guest's memory.")
def demo(engine: str, memory: str) -> int:
    """Boot Linux with its console on stdout, run `uname -a` in it, power it off, and say in one line what that took.

    Where there is no Linux, the built-in guest boots instead, and a sentence says how to get Linux.
    """
    reporter = Reporter()
    with FetchBar(reporter) as bar:
        domain = Domain(engine=engine, memory=memory, quiet=False, progress=bar.step, fetch_progress=bar.show)
        domain.console.listener = _show
        with SignalRelay(domain.kill):
            try:
                domain.start()
                return _show_boot(domain, reporter)
            except InterruptedBySignal as interruption:
                return 128 + interruption.number
            finally:
                domain.destroy()


def _show_boot(domain: Domain, reporter: Reporter) -> int:
    status = 0
    if domain.can_run_commands:
        result = domain.run(["uname", "-a"], timeout=120)
        time.sleep(0.05)  # let the console's last line out before the command's
        write_all(1, b"$ uname -a\n" + result.stdout_bytes)
        status = result.returncode
        stopped = domain.shutdown(60)
    else:
        stopped = domain.wait(120)
        reporter.line(domain.note or "")
    if stopped.reason != "poweroff":
        reporter.error(stopped.message)
        status = OWN_FAILURE
    write_all(1, (summary(domain, domain.stats) + "\n").encode())
    return status


def _show(data: bytes) -> None:
    write_all(1, printable(data).encode())
