"""Domain zero's requests about devices that come and go: done by the domain's process, and kept in its record.

What is added is there again when the domain is started again, and what was taken away is not, as xl has it. The
record's ``disks`` that are no CD-ROM drives stand for ``options["disks"]`` in the same order; ``cards`` has the numbers
of the cards in ``options["networks"]``.
"""

from typing import Any, Final

from nonroot.domain.networks import Network, parse_networks
from nonroot.errors import BadOptionError
from nonroot.toolstack import table
from nonroot.toolstack.table import Known
from nonroot.toolstack.vifs import with_mac

__all__ = ["DeviceVerbs", "number_cards"]

DEVICE_SECONDS: Final = 60.0
"""An image of another format, or a network, may need a process to be started."""


def number_cards(record: dict[str, Any]) -> None:
    """The cards' numbers at a domain's start: they are counted."""
    record["cards"] = list(range(len(record["options"]["networks"])))


class DeviceVerbs:
    """A part of :class:`nonroot.toolstack.dom0.DomainZero`."""

    async def _domain(self, params: dict[str, Any]) -> Known:
        raise NotImplementedError

    def _going(self, known: Known) -> Known:
        raise NotImplementedError

    async def do_block_attach(self, params: dict[str, Any]) -> dict[str, Any]:
        """Add the disk ``vdev``: ``drive`` is its image with its options; ``cdrom`` makes it one that is read only."""
        known = self._going(await self._domain(params))
        drive, vdev, cdrom = params.get("drive"), params.get("vdev"), bool(params.get("cdrom"))
        disk = params.get("disk")
        if not isinstance(drive, str) or not isinstance(vdev, str) or not isinstance(disk, dict):
            raise BadOptionError("a disk has a name and an image")
        done = await known.link.request("block-attach", DEVICE_SECONDS, drive=drive, vdev=vdev, cdrom=cdrom)
        record = known.record
        if record is not None:
            kept = drive if not cdrom else f"{drive},ro"
            record["options"]["disks"].append(f"{kept},{vdev}")
            record["disks"].append(disk | {"cdrom": False})
            table.save_record(known.uuid, record)
        return done

    async def do_block_detach(self, params: dict[str, Any]) -> dict[str, Any]:
        """Ask the guest to let go of the disk ``vdev``."""
        known = self._going(await self._domain(params))
        vdev = params.get("vdev")
        await known.link.request("block-detach", DEVICE_SECONDS, vdev=vdev)
        record = known.record
        if record is not None:
            names = [disk["vdev"] for disk in record["disks"] if not disk["cdrom"]]
            if vdev in names:
                del record["options"]["disks"][names.index(vdev)]
                record["disks"] = [disk for disk in record["disks"] if disk["cdrom"] or disk["vdev"] != vdev]
                table.save_record(known.uuid, record)
        return {}

    async def do_network_attach(self, params: dict[str, Any]) -> dict[str, Any]:
        """Add a card on ``network``."""
        known = self._going(await self._domain(params))
        network = params.get("network")
        if not isinstance(network, str):
            raise BadOptionError("which network?")
        network = with_mac(network)
        done = await known.link.request("network-attach", DEVICE_SECONDS, network=network)
        record, index = known.record, done.get("index")
        if record is not None and isinstance(index, int):
            record["options"]["networks"].append(network)
            record.setdefault("cards", []).append(index)
            table.save_record(known.uuid, record)
        return done

    async def do_network_detach(self, params: dict[str, Any]) -> dict[str, Any]:
        """Ask the guest to let go of the card ``index``."""
        known = self._going(await self._domain(params))
        index = params.get("index")
        await known.link.request("network-detach", DEVICE_SECONDS, index=index)
        record = known.record
        if record is not None:
            options, cards = record["options"], record.get("cards", [])
            if index in cards:
                at = cards.index(index)
                network = Network.parse(options["networks"][at])
                del cards[at], options["networks"][at]
                if network.is_user and not any(Network.parse(text).is_user for text in options["networks"]):
                    options["publish"] = []  # they were that card's
            elif index == len(parse_networks(options["networks"], options["publish"])) - 1:
                options["publish"] = []  # and with them the card that was made for them
            table.save_record(known.uuid, record)
        return {}
