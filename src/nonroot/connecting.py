"""Domains of this user that run already, by name, whoever started them.

>>> import nonroot
>>> nonroot.connect("web").screen().save("web.png")          # doctest: +SKIP
"""

from types import TracebackType
from typing import Any, Self

from nonroot.display.screen import HasScreen
from nonroot.domain import registry
from nonroot.domain.client import DomainClient, check_version
from nonroot.domain.device_commands import HasDevices

__all__ = ["RunningDomain", "connect", "running"]


class RunningDomain(HasScreen, HasDevices):
    """A connection to a domain that somebody else started. Closing it leaves the domain alone."""

    def __init__(self, entry: registry.Entry) -> None:
        """DomainLostError if it does not answer."""
        self.name = entry.name
        self.facts: dict[str, Any] = {"pid": entry.pid, "started": entry.started, **entry.facts}
        """``pid``, ``started`` (seconds since 1970), ``memory`` …"""
        self._client = DomainClient()
        self._client.connect(entry.socket)
        try:
            check_version(self._client.request("hello", 60))
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._close_screen()
        self._client.close()

    @property
    def state(self) -> str:
        """``created``, ``running``, ``paused`` or ``stopped``."""
        return str(self._client.request("stats", 60)["state"])

    def press_power_button(self) -> None:
        """Ask the guest to shut down by its power button; whether it does is its own decision."""
        self._client.request("power_button", 60)

    def reset(self) -> None:
        """Press the reset button: a guest of firmware starts again, any other ends."""
        self._client.request("reset", 60)


def connect(name: str) -> RunningDomain:
    """Connect to the running domain of that name. NotRunningError if there is none."""
    return RunningDomain(registry.find(name))


def running() -> list[registry.Entry]:
    """All running domains of this user, by name."""
    return registry.entries()
