"""The paravirtual disks and network cards of one domain, as its user speaks of them: by names, images and networks.

    devices = GuestDevices(host)                  # nothing happens until something is wanted
    devices.add_disk("/data/root.img,ro", "xvda")
    devices.add_network(Network.parse("user", ["8080:80"]))
    devices.close()

Further kinds of devices that a domain is born with belong beside these, and into ``Runner``'s ``_plug``.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nonroot.backends.drive import Drive
from nonroot.backends.overlay import OverlayImage
from nonroot.backends.vdev import disk_name, vdev_number
from nonroot.backends.xenbus import XenbusState
from nonroot.domain.drives import MOST_DISKS, Twin
from nonroot.domain.networks import Network
from nonroot.domain.registry import runtime_dir
from nonroot.domain.saved_devices import Layer, SavedCard, SavedDevices, SavedDisk, check_can_be_forked, identity
from nonroot.errors import BadOptionError, NotRunningError, SoftwareMissingError
from nonroot.xen.backend import FrontendAccess
from nonroot.xenstore.client import XenStore
from nonroot.xenstore.errors import XenStoreError, XenStoreLostError

if TYPE_CHECKING:  # loaded with the first device: many domains have none
    from nonroot.domain.pv_devices import PvDevices

__all__ = ["GuestDevices"]


class GuestDevices:
    """Methods: any thread; they may take long (an image of another format, a first network), so not the loop's."""

    def __init__(self, host: FrontendAccess, hostname: str = "", prepare: Callable[[], object] = lambda: None) -> None:
        """``hostname``: the name that DHCP gives to the guest. ``prepare``: called before the first device is made."""
        self._prepare = prepare
        self._host = host
        self._hostname = hostname
        self._lock = threading.Lock()
        self._store: XenStore | None = None
        self._devices: PvDevices | None = None
        self._facts: dict[tuple[str, int], dict[str, Any]] = {}
        self._drives: dict[int, Drive] = {}
        self._networks: dict[int, Network] = {}
        self._twins: dict[str, int] = {}
        self._closed = False

    def _open(self) -> PvDevices:
        with self._lock:
            if self._closed:
                raise NotRunningError("the domain is ending")
            if self._devices is None:
                from nonroot.domain.pv_devices import PvDevices

                self._prepare()
                self._store = XenStore()
                self._devices = PvDevices(self._store, self._host)
            return self._devices

    @property
    def any(self) -> bool:
        """Whether there is a device, or was one."""
        return bool(self._facts)

    # ── saved domains ──

    def check_can_be_saved(self, forking: bool) -> None:
        """
        UnsupportedError, one sentence, for devices that cannot go on elsewhere.

        ``forking``: this domain goes on, too, so that nobody else may write to its images.
        """
        present = set(self._there())
        for number, drive in self._drives.items():
            if forking and ("vbd", number) in present:
                check_can_be_forked(drive)

    def suspend(self) -> SavedDevices:
        """Have nobody use the guest's memory and images, whose vCPUs stand; what is to be saved. TransientError.

        In the vCPU's thread; so is :meth:`resume`.
        """
        devices = self._devices
        if devices is None:
            return SavedDevices()
        devices.suspend()
        disks, cards = [], []
        for device in devices.devices():
            state = int(XenbusState.UNKNOWN if device.suspended is None else device.suspended)
            facts = self._facts[device.kind, device.number]
            if device.kind == "vbd":
                drive = self._drives[device.number]
                with contextlib.suppress(OSError):
                    devices.flush(device.number)
                size, known = devices.size(device.number), identity(drive)
                vdev = facts["vdev"]
                twin = vdev if vdev in self._twins else ""
                what = (vdev, device.number, drive, facts["cdrom"], state, size, known, twin, device.waits)
                disks.append(SavedDisk(*what))
            else:
                network = replace(self._networks[device.number], mac=facts["mac"])
                cards.append(SavedCard(device.number, network, state))
        return SavedDevices(tuple(disks), tuple(cards))

    def resume(self) -> None:
        """Go on with what is suspended. TransientError."""
        if self._devices is not None:
            self._devices.resume()

    def overlays(self) -> dict[str, OverlayImage]:
        """The overlays of disks that are no emulated ones, by name, while they are suspended."""
        found = {} if self._devices is None else self._devices.overlays()
        return {f"xvd{number}": image for number, image in found.items() if number not in self._twins.values()}

    def restore(
        self, saved: SavedDevices, twins: dict[str, Twin], layers: dict[str, Layer], *, copy: bool, fork: bool
    ) -> None:
        """
        Make devices that go on at :meth:`resume`. BadFileError, BadOptionError, UnsupportedError, SoftwareMissingError.

        ``twins``: of the emulated disks. ``layers``: what is in overlays already. ``copy``: this is one of many domains
        that go on from there: cards on networks between domains have other addresses. ``fork``: the domain that they
        come from is among those: ports stay published for that one.
        """
        for disk in saved.disks:
            twin = twins.pop(disk.twin, None)
            state = XenbusState(disk.state)
            if twin is not None:
                suspended = None if disk.waits else state
                self._twins[disk.vdev] = disk.number
                self._open().add_twin(disk.vdev, twin.image, twin.owned, suspended)
            else:
                self._open().add_disk(disk.vdev, disk.drive, disk.cdrom, state, layers.pop(f"xvd{disk.number}", None))
            self._keep_disk(disk.vdev, disk.number, disk.drive, disk.cdrom)
        for card in saved.cards:
            network = replace(card.network, publish=()) if fork else card.network
            if copy and not network.is_user:
                network = replace(network, mac=None)
            self._add_card(network, card.number, XenbusState(card.state))

    def addresses(self) -> dict[int, tuple[str, str]]:
        """The addresses of cards on networks between domains, by number, and the IP addresses that were asked for."""
        return {
            number: (self._facts["vif", number]["mac"], network.ip or "")
            for number, network in self._networks.items()
            if not network.is_user and ("vif", number) in self._there()
        }

    # ── disks ──

    def add_disk(self, text: str, vdev: str | None = None, cdrom: bool = False) -> dict[str, Any]:
        """A disk of an image with its options; without ``vdev``, the first free of xvda to xvdp. Its facts.

        BadOptionError, BadFileError, UnsupportedError.
        """
        drive = Drive.parse(text, "CD image" if cdrom else "disk image")
        if cdrom:
            drive = Drive(drive.path, True, False, drive.backing, drive.format, drive.what)
        devices = self._open()
        vdev = self._free_name() if vdev is None else vdev
        device = devices.add_disk(vdev, drive, cdrom)
        self._keep_disk(vdev, device.number, drive, cdrom)
        return self._describe("vbd", device.number)

    def add_twin(self, vdev: str, twin: Twin) -> dict[str, Any]:
        """A disk that is emulated until :meth:`twins_are_off` names it. Its facts."""
        device = self._open().add_twin(vdev, twin.image, twin.owned)
        self._twins[vdev] = device.number
        self._keep_disk(vdev, device.number, twin.drive, False)
        return self._describe("vbd", device.number)

    def twins_are_off(self, names: set[str]) -> None:
        """The emulated twins of these disks are off. In the vCPU's thread."""
        devices = self._devices
        if devices is not None and names:
            devices.offer({self._twins[name] for name in names})

    def restart(self) -> None:
        """The machine starts again: connections end, and devices are as at first. In the vCPU's thread."""
        devices = self._devices
        if devices is not None:
            devices.restart(set(self._twins.values()))

    def _keep_disk(self, vdev: str, number: int, drive: Drive, cdrom: bool) -> None:
        self._drives[number] = drive
        self._facts["vbd", number] = {
            "vdev": vdev,
            "number": number,
            "image": drive.path,
            "format": drive.effective_format,
            "read_only": drive.read_only,
            "overlay": drive.overlay,
            "cdrom": cdrom,
        }

    def _free_name(self) -> str:
        taken = {number for kind, number in self._there() if kind == "vbd"}
        for name in map(disk_name, range(MOST_DISKS)):
            if vdev_number(name) not in taken:
                return name
        raise BadOptionError(f"the domain has {MOST_DISKS} disks already; name the place of a further one")

    def remove_disk(self, vdev: str) -> None:
        """Ask the guest to let go of it; it is gone when the guest has. NotRunningError if there is none."""
        self._open().remove("vbd", vdev_number(vdev))

    def resize_disk(self, vdev: str) -> None:
        """Tell the guest that the image has another size. NotRunningError if there is no such disk."""
        self._open().resized(vdev)

    def disks(self) -> list[dict[str, Any]]:
        """What there is, by number."""
        return self._list("vbd")

    # ── network cards ──

    def add_network(self, network: Network, index: int | None = None) -> dict[str, Any]:
        """A card; without ``index``, the first free number. Its facts. BadOptionError, SoftwareMissingError."""
        return self._describe("vif", self._add_card(network, index, None))

    def _add_card(self, network: Network, index: int | None, suspended: XenbusState | None) -> int:
        """Its number."""
        devices = self._open()
        from nonroot.backends.switch import join_network
        from nonroot.backends.vif import random_mac

        mac = network.mac or random_mac(random.SystemRandom())
        if any(card["mac"].lower() == mac.lower() for card in self.networks()):
            raise BadOptionError(f"there is a network card {mac} already; each has an address of its own")
        if network.is_user:
            try:
                device = devices.add_card(network.user_network(self._hostname), mac, index, suspended)
            except SoftwareMissingError as error:
                raise SoftwareMissingError(
                    f"the user's network needs libslirp, which is not here: {error}; install Debian's package libslirp0"
                ) from None
        else:
            device = devices.join(join_network(runtime_dir(), network.name), mac, index, suspended)
        self._networks[device.number] = network
        self._facts["vif", device.number] = {"index": device.number, **network.to_wire(), "mac": mac}
        return device.number

    def remove_network(self, index: int) -> None:
        """Ask the guest to let go of a card. NotRunningError if there is none."""
        self._open().remove("vif", index)

    def networks(self) -> list[dict[str, Any]]:
        """What there is, by number."""
        return self._list("vif")

    # ── both ──

    def _there(self) -> list[tuple[str, int]]:
        devices = self._devices
        return [] if devices is None else [(device.kind, device.number) for device in devices.devices()]

    def _list(self, kind: str) -> list[dict[str, Any]]:
        numbers = sorted(number for found, number in self._there() if found == kind)
        return [self._describe(kind, number) for number in numbers if (kind, number) in self._facts]

    def _describe(self, kind: str, number: int) -> dict[str, Any]:
        """The facts, and what XenStore says: the backend's state, and a disk's size in bytes."""
        backend = f"/local/domain/0/backend/{kind}/{self._host.domid}/{number}"
        facts = {**self._facts[kind, number], "backend": backend, "state": "unknown"}
        store = self._store
        if store is not None:
            with contextlib.suppress(XenStoreError, XenStoreLostError):
                state = store.read(f"{backend}/state") or ""
                if state.isdigit() and int(state) in list(XenbusState):
                    facts["state"] = XenbusState(int(state)).name.lower()
                if kind == "vbd":
                    sectors = store.read(f"{backend}/sectors") or ""
                    facts["bytes"] = int(sectors) * 512 if sectors.isdigit() else None
        return facts

    def close(self) -> None:
        """The domain is over. Any thread; closing twice does nothing."""
        with self._lock:
            self._closed = True
            devices, self._devices = self._devices, None
            store, self._store = self._store, None
        if devices is not None:
            devices.close()
        if store is not None:
            store.close()
