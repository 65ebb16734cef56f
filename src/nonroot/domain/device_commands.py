"""A domain's paravirtual disks and network cards, as the public classes offer them."""

import os
from collections.abc import Iterable
from typing import Any

from nonroot.domain.client import DomainClient

__all__ = ["HasDevices", "drive_text"]

SECONDS = 180.0
"""For one request: a program that reads an image's format may have to be fetched."""


def drive_text(image: str | os.PathLike[str]) -> str:
    """What the domain's process parses: text with options, its path absolute; a path is only a path."""
    if not isinstance(image, str):
        return os.path.abspath(image).replace(",", ",,")  # noqa: PTH100 - resolve() would follow links
    if image == "none" or not image or image.startswith(","):
        return image
    return os.path.join(os.getcwd(), image) if not os.path.isabs(image) else image  # noqa: PTH109, PTH117, PTH118


class HasDevices:
    """What a domain's public classes offer of its devices; they have a connected ``_client``.

    Only for Xen's domains (``xen``): UnsupportedError in others, where the lists are empty.
    """

    _client: DomainClient

    def disks(self) -> list[dict[str, Any]]:
        """Xen's disks: ``vdev``, ``image``, ``format``, ``read_only``, ``overlay``, ``state``, ``bytes`` of each."""
        return list(self._client.request("block-list", SECONDS)["disks"])

    def add_disk(self, image: str | os.PathLike[str], vdev: str | None = None) -> str:
        """Add a disk while the guest runs, as ``vdev`` (``xvdb``) or the first that is free; returns its name.

        The guest's driver finds it a moment later. BadOptionError, BadFileError.
        """
        return str(self._client.request("block-attach", SECONDS, drive=drive_text(image), vdev=vdev)["vdev"])

    def remove_disk(self, vdev: str) -> None:
        """Ask the guest to let go of a disk; it is in :meth:`disks` until then. NotRunningError if there is none."""
        self._client.request("block-detach", SECONDS, vdev=vdev)

    def resize_disk(self, vdev: str) -> None:
        """Tell the guest that the disk's image has another size now."""
        self._client.request("block-resize", SECONDS, vdev=vdev)

    def networks(self) -> list[dict[str, Any]]:
        """Xen's network cards: ``index``, ``network``, ``mac``, ``publish``, ``state`` of each."""
        return list(self._client.request("network-list", SECONDS)["networks"])

    def add_network(self, network: str = "user", publish: Iterable[str] = (), index: int | None = None) -> int:
        """Add a network card while the guest runs; returns its number. The guest has to give it an address itself.

        BadOptionError; SoftwareMissingError if libslirp is needed and cannot be had.
        """
        params: dict[str, Any] = {"network": network, "publish": list(publish), "index": index}
        return int(self._client.request("network-attach", SECONDS, **params)["index"])

    def remove_network(self, index: int) -> None:
        """Ask the guest to let go of a network card; it is in :meth:`networks` until then."""
        self._client.request("network-detach", SECONDS, index=index)
