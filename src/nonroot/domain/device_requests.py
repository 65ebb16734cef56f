"""The control requests about paravirtual devices; :class:`DomainProcess` has the others.

Requests, their parameters, and their answers (``?``: may be left out):

``block-attach``    {"drive": "PATH[,ro][,overlay][,format=NAME]", "vdev"?: "xvdb" or null, "cdrom"?: bool}
                    → the disk: {"vdev", "number", "image", "format", "read_only", "overlay", "cdrom", "backend",
                    "state", "bytes"}. PATH is absolute, a comma in it is written twice. ``vdev`` null is the first free
                    of xvda to xvdp; ``bytes`` is null until the guest has connected.
``block-detach``    {"vdev": "xvdb"} → {}. The guest is asked; the disk leaves the list when the guest has let go of it.
``block-resize``    {"vdev": "xvdb"} → {}. The image has another size now: the guest is told.
``block-list``      {} → {"disks": [disk, …]}
``network-attach``  {"network": "user" or a private network's name, with its options, "mac"?: text or null,
                    "publish"?: ["[ADDRESS:]PORT:GUEST-PORT[/udp]", …], "index"?: number or null}
                    → the card: {"index", "network", "mac", "publish", "backend", "state"}
``network-detach``  {"index": 0} → {}, as for disks.
``network-list``    {} → {"networks": [card, …]}

``state`` is the backend's: ``init_wait`` until the guest has found the device, ``connected`` while it is in use,
``closing`` and ``closed``. A domain that is not Xen's answers lists with empty ones, and the others with
UnsupportedError. Devices that are emulated (IDE) are not in these lists.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nonroot.domain.sealing import SEALED
from nonroot.errors import BadOptionError, NonrootError, UnsupportedError

if TYPE_CHECKING:
    from nonroot.domain.connection import Connection
    from nonroot.domain.guest_devices import GuestDevices
    from nonroot.domain.runner import Runner

__all__ = ["DeviceRequests"]

Question = Callable[["GuestDevices"], dict[str, Any]]


class DeviceRequests:
    """A part of :class:`nonroot.domain.process.DomainProcess`."""

    _sealed: bool = False

    def _need(self) -> "Runner":
        raise NotImplementedError

    def _say(self, text: str) -> None:
        raise NotImplementedError

    def _do_block_attach(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        drive, vdev, cdrom = params.get("drive"), params.get("vdev"), bool(params.get("cdrom", False))
        if not isinstance(drive, str) or not (vdev is None or isinstance(vdev, str)):
            raise BadOptionError("a disk is text: its image with its options")
        return self._of_devices(connection, request, lambda all_: all_.add_disk(drive, vdev, cdrom), "a disk was added")

    def _do_block_detach(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        vdev = _disk(params)
        return self._of_devices(
            connection, request, _doing(lambda all_: all_.remove_disk(vdev)), f"asked to let {vdev} go"
        )

    def _do_block_resize(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        vdev = _disk(params)
        return self._of_devices(connection, request, _doing(lambda all_: all_.resize_disk(vdev)), f"{vdev} was resized")

    def _do_block_list(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        return self._of_devices(connection, request, lambda all_: {"disks": all_.disks()}, none={"disks": []})

    def _do_network_attach(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        text, mac, index = params.get("network"), params.get("mac"), params.get("index")
        publish = params.get("publish") or []
        if not isinstance(text, str) or not (mac is None or isinstance(mac, str)):
            raise BadOptionError("a network is text: 'user', or a private network's name")
        if not isinstance(publish, list) or not all(isinstance(one, str) for one in publish):
            raise BadOptionError("published ports are a list of texts")
        if index is not None and (isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 1 << 16):
            raise BadOptionError(f"there is no network card {index!r}")
        from nonroot.domain.networks import Network

        network = Network.parse(text if mac is None else f"{text},mac={mac}", publish)
        return self._of_devices(
            connection, request, lambda all_: all_.add_network(network, index), "a network card was added"
        )

    def _do_network_detach(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        index = params.get("index")
        if isinstance(index, bool) or not isinstance(index, int):
            raise BadOptionError(f"there is no network card {index!r}")
        say = f"asked to let network card {index} go"
        return self._of_devices(connection, request, _doing(lambda all_: all_.remove_network(index)), say)

    def _do_network_list(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any] | None:
        return self._of_devices(connection, request, lambda all_: {"networks": all_.networks()}, none={"networks": []})

    def _of_devices(
        self,
        connection: "Connection",
        request: int,
        question: Question,
        say: str = "",
        none: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Have ``question`` asked in a thread of its own; ``none`` is the answer for a domain that is not Xen's."""
        runner = self._need()
        devices = getattr(runner, "guest_devices", None)
        if devices is None:
            if none is not None:
                return none
            raise UnsupportedError(
                "its disks and network cards cannot be changed while it runs: it was not started as a Xen domain"
            )

        if self._sealed and say:
            raise UnsupportedError(
                f"{SEALED}: disks and cards are given to it when it is made, or later if sealed=False was"
            )

        def answer(result: dict[str, Any] | NonrootError) -> None:
            if isinstance(result, NonrootError):
                connection.fail(request, result)
            else:
                if say:
                    self._say(say)
                connection.reply(request, result)

        runner.work(lambda: question(devices), answer)
        return None


def _disk(params: dict[str, Any]) -> str:
    vdev = params.get("vdev")
    if not isinstance(vdev, str):
        raise BadOptionError(f"{vdev!r} is no name of a disk: use xvda, xvdb, …")
    return vdev


def _doing(call: Callable[["GuestDevices"], None]) -> Question:
    def question(devices: "GuestDevices") -> dict[str, Any]:
        call(devices)
        return {}

    return question
