"""The block backend as a device of XenStore: negotiation, and the thread that serves a connected disk."""

from collections.abc import Callable
from typing import Final

from nonroot.backends.blkback import MOST_INDIRECT, BlockConnection
from nonroot.backends.blkif import ABIS, SECTOR
from nonroot.backends.device_thread import DeviceThread
from nonroot.backends.image import Image
from nonroot.backends.raw import RawImage
from nonroot.backends.ring import BackRing
from nonroot.backends.xenbus import BackendDevice, BadFrontendError, Store, create_device, number
from nonroot.errors import BadOptionError
from nonroot.xen.backend import FrontendAccess

__all__ = ["BlockDevice", "create_vbd", "vdev_number"]

RING_PAGE_ORDER: Final = 2
"""log2 of the most pages of a ring."""
INFO_CDROM: Final = 1
INFO_REMOVABLE: Final = 2
INFO_READ_ONLY: Final = 4


def vdev_number(name: str) -> int:
    """The number of a device by its name in the guest (``xvda``, ``xvdb3``, ``hda``, ``sda``). BadOptionError.

    >>> vdev_number("xvda")
    51712
    """
    base = name.rstrip("0123456789")
    part = int(name[len(base) :] or 0)
    prefix = next((prefix for prefix in ("xvd", "hd", "sd") if base.startswith(prefix)), "")
    letters = base[len(prefix) :]
    disk = 0
    for letter in letters:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    disk -= 1
    usable = prefix and letters.isascii() and letters.isalpha() and letters.islower() and len(letters) <= 2
    if usable and prefix == "xvd" and part < 256 and (disk >= 16 or part >= 16):
        return 1 << 28 | disk << 8 | part
    if usable and prefix == "xvd" and disk < 16 and part < 16:
        return 202 << 8 | disk << 4 | part
    if usable and prefix == "hd" and disk < 4 and part < 64:
        return (3, 3, 22, 22)[disk] << 8 | disk % 2 << 6 | part
    if usable and prefix == "sd" and disk < 16 and part < 16:
        return 8 << 8 | disk << 4 | part
    raise BadOptionError(f"{name!r} is no name of a disk: use xvda, xvdb, …, or hda to hdd, or sda to sdp")


def create_vbd(store: Store, domid: int, vdev: str, image: Image, cdrom: bool = False) -> str:
    """The folders of a disk named ``vdev``; the backend's path."""
    device = vdev_number(vdev)
    kind = "cdrom" if cdrom else "disk"
    front = {"virtual-device": str(device), "device-type": kind}
    mode = "r" if image.read_only else "w"
    removable = str(int(cdrom))
    back = {"removable": removable, "bootable": "1", "mode": mode, "device-type": kind, "dev": vdev, "type": "file"}
    return create_device(store, "vbd", domid, device, front, back)


class BlockDevice(BackendDevice):
    """A disk. The image is its own from now on."""

    def __init__(
        self,
        store: Store,
        path: str,
        access: FrontendAccess,
        image: Image,
        *,
        persistent: bool = True,
        post: Callable[[Callable[[], object]], object] = lambda call: call(),
    ) -> None:
        """``persistent``: offer that grants stay mapped. ``post``: has a callable called in the store's thread."""
        super().__init__(store, path, access)
        self.image = image
        self.connection: BlockConnection | None = None
        self._persistent = persistent
        self._post = post
        self._thread: DeviceThread | None = None
        self._ring: BackRing | None = None

    def features(self) -> dict[str, str]:
        """What Linux's backend says, too."""
        return {
            "feature-flush-cache": "1",
            "feature-barrier": "1",
            "feature-persistent": str(int(self._persistent)),
            "feature-max-indirect-segments": str(MOST_INDIRECT),
            "max-ring-page-order": str(RING_PAGE_ORDER),
            **self._discard_keys(),
        }

    def _discard_keys(self) -> dict[str, str]:
        if self.image.read_only or not hasattr(self.image, "discard"):
            return {"feature-discard": "0"}
        return {"feature-discard": "1", "discard-granularity": "4096", "discard-alignment": "0", "discard-secure": "0"}

    def _size_keys(self) -> dict[str, str]:
        return {"sectors": str(self.image.size // SECTOR)}

    def connect(self) -> dict[str, str]:
        """Rings, protocol, persistent grants; then the disk's size."""
        abi = ABIS.get(self.front("protocol") or "x86_64-abi")
        if abi is None:
            raise BadFrontendError(f"the frontend speaks the protocol {self.front('protocol')!r}, which does not exist")
        order_text = self.front("ring-page-order")
        if order_text is None:
            references = [number(self.front("ring-ref"), "ring-ref")]
        else:
            order = number(order_text, "ring-page-order", 0, RING_PAGE_ORDER)
            references = [number(self.front(f"ring-ref{index}"), f"ring-ref{index}") for index in range(1 << order)]
        port_number = number(self.front("event-channel"), "event-channel")
        persistent = self._persistent and self.front_flag("feature-persistent")
        self._ring = BackRing(self.map_ring(references), abi.request_bytes, abi.response_bytes)
        thread = self._thread = DeviceThread(self.path.rsplit("/", 1)[1], self._step, failed=self._failed)
        port = self.bind(port_number, thread.wake)
        self.connection = BlockConnection(self._ring, abi, self.access.grants, self.image, port.notify, persistent)
        thread.start()
        kind = self.store.read(f"{self.path}/device-type")
        info = (INFO_READ_ONLY if self.image.read_only else 0) | (INFO_CDROM | INFO_REMOVABLE if kind == "cdrom" else 0)
        keys = {"sector-size": str(SECTOR), "physical-sector-size": str(SECTOR), "info": str(info)}
        return {**self._size_keys(), **keys}

    def _step(self) -> bool:
        assert self.connection is not None
        return self.connection.step()

    def _failed(self, reason: str) -> None:
        self._post(lambda: self.fail(reason))

    def disconnect(self) -> None:
        """Stop the thread after its requests."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self._ring is not None:
            self._ring.release()
            self._ring = None

    def resized(self) -> None:
        """Tell the guest the image's size, which has changed; a raw image looks at its file."""
        if isinstance(self.image, RawImage):
            self.image.look_again()
        self.republish(self._size_keys())

    def release(self) -> None:
        """Close the image."""
        self.image.close()
