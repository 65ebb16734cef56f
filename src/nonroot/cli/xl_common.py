"""What the toolstack's verbs share: a domain's description, JSON, tables."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from nonroot.errors import NotRunningError, UnsupportedError

__all__ = ["act", "ask", "find", "print_json", "print_table"]


def print_json(record: object, indent: int | None = None) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(record, ensure_ascii=True, indent=indent) + "\n")


def print_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Rows of equal length; the first has the titles, and the columns in ``right`` are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        sys.stdout.write(" ".join(cells).rstrip() + "\n")


def find(domain: str) -> dict[str, Any]:
    """A domain's description, by name, number or UUID. NotRunningError."""
    from nonroot.toolstack.client import Toolstack

    nothing(domain)
    with Toolstack() as toolstack:
        return toolstack.request("find", domain=domain)


def nothing(domain: str) -> None:
    """NotRunningError if no domain runs at all, UnsupportedError if it is the control process that is named: it need
    not be started to see that.
    """
    from nonroot.domain.registry import ZERO_NAME
    from nonroot.toolstack.client import Toolstack

    if domain in ("0", ZERO_NAME):
        raise UnsupportedError(f"{ZERO_NAME} is nonroot's control process; name a domain")
    if Toolstack.nothing_runs():
        raise NotRunningError(f"there is no domain {domain[:60]!r}; none is running")


def act(method: str, domain: str, as_json: bool, **params: Any) -> int:
    """One request about one domain; the exit status."""
    from nonroot.toolstack.client import Toolstack

    nothing(domain)
    with Toolstack() as toolstack:
        result = toolstack.request(method, domain=domain, **params)
    if as_json:
        print_json({"domain": domain, "done": method} | result)
    return 0


def ask(domain: str, method: str, **params: Any) -> dict[str, Any]:
    """One request to a domain's own process; its answer. NotRunningError, and what the process says."""
    from nonroot.domain.client import DomainClient

    found, client = find(domain), DomainClient()
    try:
        client.connect(found["socket"])
        return client.request(method, 60, **params)
    finally:
        client.close()


def name_or_number() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument DOMAIN of every verb."""
    from nonroot.cli.display import complete_name

    return click.argument("domain", metavar="DOMAIN", shell_complete=complete_name)
