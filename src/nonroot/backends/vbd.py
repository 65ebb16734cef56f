"""The block backend as a device of XenStore: negotiation; who serves a connected disk is another matter."""

from collections.abc import Callable
from typing import Final

from nonroot.backends.blkback import MOST_INDIRECT, BlockConnection
from nonroot.backends.blkif import ABIS, SECTOR
from nonroot.backends.data_path import DiskPath
from nonroot.backends.direct import DirectDisk, can_be_direct, serve_disk
from nonroot.backends.handover import describe_image
from nonroot.backends.image import Image
from nonroot.backends.raw import RawImage
from nonroot.backends.supervisor import BackendProcess, Served
from nonroot.backends.vdev import vdev_number
from nonroot.backends.xenbus import BackendDevice, BadFrontendError, Store, create_device, number
from nonroot.xen.backend import FrontendAccess
from nonroot.xen.host import XenHost

__all__ = ["BlockDevice", "create_vbd"]

RING_PAGE_ORDER: Final = 2
"""log2 of the most pages of a ring."""
INFO_CDROM: Final = 1
INFO_REMOVABLE: Final = 2
INFO_READ_ONLY: Final = 4


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
        process: BackendProcess | None = None,
    ) -> None:
        """
        ``persistent``: offer that grants stay mapped, but for disks that the engine serves: nobody maps anything then,
        and the guest's copies would be for nothing. ``post``: has a callable called in the store's thread.
        ``process``: does the requests, if the image can be given to it; else a thread of this process does.
        """
        super().__init__(store, path, access)
        self.image = image
        self._is_direct = process is not None and can_be_direct(access) and isinstance(image, RawImage)
        self._persistent = persistent and not self._is_direct
        self._post = post
        self._process = process
        self._path: DiskPath | None = None
        self._served: Served | None = None
        self._direct: DirectDisk | None = None

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
        # A frontend that was told elsewhere that grants do not stay takes them back after each request.
        persistent = self._persistent and not self.adopted and self.front_flag("feature-persistent")
        name = f"vbd{self.path.rsplit('/', 1)[1]}"
        described = None if self._process is None else describe_image(self.image)
        if self._process is not None and described is not None:
            description, files = described
            facts = {"abi": abi.name, "refs": references, "persistent": persistent, "image": description}
            self._served = Served(name, {"op": "disk", **facts}, files, self._failed, 1)
            self.serve(self._process, self._served, [port_number])
            if self._is_direct and isinstance(self.image, RawImage) and isinstance(self.access, XenHost):
                self._direct = serve_disk(
                    self.access, self.map_ring, port_number, references, abi.name, self.image, self._served.journal
                )
        else:
            self._path = DiskPath(
                name,
                self.map_ring(references),
                abi.name,
                self.access.grants,
                self.image,
                lambda: self.ports[0].notify(),
                persistent=persistent,
                failed=self._failed,
            )
            self.bind(port_number, self._path.thread.wake)
            self._path.thread.start()
        kind = self.store.read(f"{self.path}/device-type")
        info = (INFO_READ_ONLY if self.image.read_only else 0) | (INFO_CDROM | INFO_REMOVABLE if kind == "cdrom" else 0)
        keys = {"sector-size": str(SECTOR), "physical-sector-size": str(SECTOR), "info": str(info)}
        return {**self._size_keys(), **keys}

    @property
    def connection(self) -> BlockConnection | None:
        """The data path, if it is in this process."""
        return None if self._path is None else self._path.connection

    def _failed(self, reason: str) -> None:
        self._post(lambda: self.fail(reason))

    def disconnect(self) -> None:
        """Stop after the requests that are being done."""
        if self._direct is not None:
            self._direct.stop()
            self._direct = None
        if self._path is not None:
            self._path.stop()
            self._path = None
        if self._served is not None and self._process is not None:
            self._process.stop(self._served)
            self._served = None

    def resized(self) -> None:
        """Tell the guest the image's size, which has changed; a raw image looks at its file."""
        if isinstance(self.image, RawImage):
            self.image.look_again()
        if self._served is not None and self._process is not None:
            self._process.resized(self._served)
        if self._direct is not None and isinstance(self.image, RawImage):
            self._direct.resized(self.image)
        self.republish(self._size_keys())

    def release(self) -> None:
        """Close the image."""
        self.image.close()
