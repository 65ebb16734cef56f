"""A domain's paravirtual disks and network cards: made in XenStore, served by a process of their own.

One thread hears the store and does the negotiations; the data goes through the domain's backend process, where each
connected device has a thread. What is not memory-safe has processes of its own: libslirp (confined), and QEMU's storage
daemon for images that are not raw: those are served by a thread of this process.
"""

import contextlib
import os
import random
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.handover import describe_image
from nonroot.backends.helper import Helper
from nonroot.backends.image import Image
from nonroot.backends.link import Link
from nonroot.backends.overlay import OverlayImage
from nonroot.backends.raw import RawImage
from nonroot.backends.slirp import UserNetwork, start_user_network
from nonroot.backends.supervisor import BackendProcess
from nonroot.backends.vbd import BlockDevice, create_vbd
from nonroot.backends.vdev import vdev_number
from nonroot.backends.vif import NetDevice, create_vif, random_mac
from nonroot.backends.xenbus import BackendDevice, XenbusState
from nonroot.errors import BadOptionError, NotRunningError, TransientError
from nonroot.xen.backend import FrontendAccess
from nonroot.xen.sharing import Sharing
from nonroot.xenstore.client import XenStore
from nonroot.xenstore.errors import XenStoreError, XenStoreLostError

__all__ = ["PvDevice", "PvDevices"]

RETRY_SECONDS: Final = 0.1
"""After the store could not be reached."""


@dataclass(slots=True)
class PvDevice:
    """One device."""

    kind: str
    """``vbd`` or ``vif``."""
    number: int
    backend: BackendDevice
    helper: Helper | None = None
    """The process at the other end of a card's link, if it is ours alone."""
    renew: Callable[[], object] = lambda: None
    """Makes its folders in XenStore as they were at first."""
    waits: bool = False
    """Whether it is not to be offered until its emulated twin is off."""
    suspended: XenbusState | None = None
    """The state in which it goes on; None: it is not suspended."""

    @property
    def state(self) -> XenbusState:
        """Of the backend."""
        return self.backend.state


class LentDisk(BlockDevice):
    """A disk whose image stays somebody else's."""

    def release(self) -> None:
        """The image is not closed."""


class PvDevices:
    """The devices of one domain. Methods: any thread."""

    def __init__(self, store: XenStore, access: FrontendAccess) -> None:
        """``store``: a connection that nobody else uses meanwhile; it stays the caller's to close."""
        self._store, self._access = store, access
        self._devices: dict[tuple[str, int], PvDevice] = {}
        self._posted: deque[Callable[[], object]] = deque()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        sharing = getattr(access, "sharing", None)
        self.process = BackendProcess(sharing) if isinstance(sharing, Sharing) else None
        """What serves connected devices, if the domain's memory can be shared; else threads of this process do."""

    # ── disks ──

    def add_disk(
        self,
        vdev: str,
        drive: Drive,
        cdrom: bool = False,
        suspended: XenbusState | None = None,
        layer: tuple[int, int] | None = None,
    ) -> PvDevice:
        """
        A disk by its name in the guest (``xvda``). BadOptionError, BadFileError, UnsupportedError.

        ``suspended``: it goes on in that state, at :meth:`resume`. ``layer``: of a drive with an overlay, descriptors
        of what is in the overlay already (:meth:`OverlayImage.layer`), which are the image's then.
        """
        number = vdev_number(vdev)
        self._check_free("vbd", number, f"there is a disk {vdev} already")
        return self._add_disk(vdev, number, open_image(drive, layer), cdrom, suspended=suspended)

    def add_twin(self, vdev: str, image: Image, owned: bool, suspended: XenbusState | None = None) -> PvDevice:
        """
        A disk that is an emulated one until :meth:`offer` names it. ``owned``: the image is to be closed with it.

        ``suspended``: it is that no more, and goes on in this state, as for :meth:`add_disk`.
        """
        number = vdev_number(vdev)
        self._check_free("vbd", number, f"there is a disk {vdev} already")
        waits = suspended is None
        return self._add_disk(vdev, number, image, False, waits=waits, owned=owned, suspended=suspended)

    def _add_disk(
        self,
        vdev: str,
        number: int,
        image: Image,
        cdrom: bool,
        waits: bool = False,
        owned: bool = True,
        suspended: XenbusState | None = None,
    ) -> PvDevice:
        def make() -> str:
            return create_vbd(self._store, self._access.domid, vdev, image, cdrom)

        try:
            path = make()
            shared = self.process is not None and describe_image(image) is not None
            backend = (BlockDevice if owned else LentDisk)(
                self._store,
                path,
                self._access,
                image,
                persistent=shared,
                post=self._post,
                process=self.process if shared else None,
            )
        except BaseException:
            if owned:
                image.close()
            raise
        return self._add(PvDevice("vbd", number, backend, renew=make, waits=waits, suspended=suspended))

    def resized(self, vdev: str) -> None:
        """Tell the guest that a disk's image has another size. NotRunningError if there is no such disk."""
        device = self._find("vbd", vdev_number(vdev), f"there is no disk {vdev}")
        if isinstance(device.backend, BlockDevice):
            self._post(device.backend.resized)

    # ── cards ──

    def add_card(
        self,
        network: UserNetwork,
        mac: str | None = None,
        index: int | None = None,
        suspended: XenbusState | None = None,
    ) -> PvDevice:
        """A card with the user's view of the network. SoftwareMissingError without libslirp; BadOptionError.

        ``suspended``: as for :meth:`add_disk`.
        """
        sock, helper = start_user_network(network)
        return self._add_card(sock, mac, index, helper, suspended)

    def join(
        self,
        port: socket.socket,
        mac: str | None = None,
        index: int | None = None,
        suspended: XenbusState | None = None,
    ) -> PvDevice:
        """A card at a port of a network between domains (:func:`nonroot.backends.switch.join_network`)."""
        return self._add_card(port, mac, index, None, suspended)

    def _add_card(
        self,
        sock: socket.socket,
        mac: str | None,
        index: int | None,
        helper: Helper | None,
        suspended: XenbusState | None,
    ) -> PvDevice:
        link = Link(sock)
        try:
            with self._lock:
                taken = {number for kind, number in self._devices if kind == "vif"}
                number = min(set(range(len(taken) + 1)) - taken) if index is None else index
                self._check_free("vif", number, f"there is a network card {number} already")
                address = mac or random_mac(random.SystemRandom())

                def make() -> str:
                    return create_vif(self._store, self._access.domid, number, address)

                path = make()
                backend = NetDevice(self._store, path, self._access, link, post=self._post, process=self.process)
                return self._add(PvDevice("vif", number, backend, helper, make, suspended=suspended))
        except BaseException:
            link.close()
            if helper is not None:
                helper.close()
            raise

    # ── both ──

    def devices(self) -> list[PvDevice]:
        """All that there are."""
        with self._lock:
            return list(self._devices.values())

    def remove(self, kind: str, number: int) -> None:
        """Ask the guest to let go of a device; it is gone when the guest has. NotRunningError."""
        device = self._find(kind, number, f"there is no {kind} {number}")
        self._post(lambda: self._begin_removal(device))

    def offer(self, numbers: set[int]) -> None:
        """These disks are emulated no more: the guest may have them. In the vCPU's thread; returns at once."""
        for device in self.devices():
            if device.waits and device.number in numbers:
                device.waits = False
                backend = device.backend
                if isinstance(backend, BlockDevice) and isinstance(backend.image, RawImage):
                    backend.image.look_again()
                self._post(backend.start)

    def restart(self, twins: set[int]) -> None:
        """The machine starts again: all connections end, and devices are offered as at first; disks of ``twins`` wait
        for :meth:`offer` again. In the vCPU's thread; when this returns, nothing of the guest's memory is in use.
        """

        def stop() -> None:
            for device in self.devices():
                with contextlib.suppress(XenStoreError, XenStoreLostError):
                    device.backend.stop()
            self._posted.appendleft(begin)

        def begin() -> None:
            for device in self.devices():
                device.renew()
                if not device.waits:
                    device.backend.start()

        for device in self.devices():
            if device.kind == "vbd" and device.number in twins:
                device.waits = True
        self._do(stop)

    def suspend(self) -> None:
        """
        Have nobody use the guest's memory, images and event channels, while its vCPUs stand. In the vCPU's thread.

        Each device's ``suspended`` says then in which state it goes on: here at :meth:`resume`, or in another domain.
        TransientError if XenStore cannot be reached.
        """

        def suspend() -> None:
            for device in self.devices():
                if device.suspended is None and not device.waits:
                    device.suspended = device.backend.suspend()

        self._do(suspend)

    def size(self, number: int) -> int:
        """Bytes of a disk."""
        backend = self._devices["vbd", number].backend
        return backend.image.size if isinstance(backend, BlockDevice) else 0

    def flush(self, number: int) -> None:
        """Have what was written to a suspended disk on stable storage. OSError."""
        device = self._devices["vbd", number]
        if isinstance(device.backend, BlockDevice) and not device.backend.image.read_only:
            device.backend.image.flush()

    def overlays(self) -> dict[int, OverlayImage]:
        """The overlays of suspended disks, by the disks' numbers."""
        found = {}
        for device in self.devices():
            backend = device.backend
            if isinstance(backend, BlockDevice) and isinstance(backend.image, OverlayImage):
                found[device.number] = backend.image
        return found

    def resume(self) -> None:
        """Go on with what is suspended. In the vCPU's thread, or before there is one. TransientError."""

        def resume() -> None:
            for device in self.devices():
                state = device.suspended
                if state is None:
                    continue
                device.suspended = None
                if state is XenbusState.UNKNOWN:
                    device.backend.start()
                else:
                    device.backend.adopt(state)

        self._do(resume)

    def _do(self, action: Callable[[], object]) -> None:
        """Have something done in the devices' thread, and wait until it is, or they end. TransientError."""
        if self._thread is None:
            return
        done = threading.Event()
        failures: list[XenStoreError | XenStoreLostError] = []

        def act() -> None:
            try:
                action()
            except (XenStoreError, XenStoreLostError) as error:
                failures.append(error)
            finally:
                done.set()

        self._post(act)
        while not done.wait(RETRY_SECONDS) and not self._closing.is_set():
            pass
        if failures:
            raise TransientError(f"XenStore cannot be asked about the domain's devices: {failures[0]}")

    def close(self) -> None:
        """The domain is over. Safe to call again."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            os.eventfd_write(self._wake, 1)
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            for device in self._devices.values():
                self._end(device)
            self._devices.clear()
            os.close(self._wake)
            self._wake = -1
        if self.process is not None:
            self.process.close()

    def _check_free(self, kind: str, number: int, sentence: str) -> None:
        with self._lock:
            if (kind, number) in self._devices:
                raise BadOptionError(sentence)

    def _find(self, kind: str, number: int, sentence: str) -> PvDevice:
        with self._lock:
            device = self._devices.get((kind, number))
        if device is None:
            raise NotRunningError(sentence)
        return device

    def _add(self, device: PvDevice) -> PvDevice:
        with self._lock:
            self._devices[device.kind, device.number] = device
            if self.process is not None:
                self.process.prepare()
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="nonroot-xenbus", daemon=True)
                self._thread.start()
        if not device.waits and device.suspended is None:
            self._post(device.backend.start)
        return device

    def _post(self, call: Callable[[], object]) -> None:
        self._posted.append(call)
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                while self._posted:
                    self._posted.popleft()()
                self._finish_removals()
                if self._store.dispatch(0.0):
                    continue  # what was called made requests, which may have taken further events
                # Events that another thread's request takes are followed by what that thread posts.
                if not self._posted:
                    select.select([self._store.fileno(), self._wake], [], [])
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            except (XenStoreError, XenStoreLostError):
                if self._closing.wait(RETRY_SECONDS):
                    return

    def _begin_removal(self, device: PvDevice) -> None:
        backend = device.backend
        self._store.write(f"{backend.path}/online", "0")
        if backend.state is XenbusState.CONNECTED:
            backend.ask_to_close()
        else:
            self._forget(device)

    def _finish_removals(self) -> None:
        for device in self.devices():
            if device.state is XenbusState.CLOSED and self._store.read(f"{device.backend.path}/online") == "0":
                self._forget(device)

    def _forget(self, device: PvDevice) -> None:
        with self._lock:
            self._devices.pop((device.kind, device.number), None)
        self._end(device)
        with contextlib.suppress(XenStoreError):
            self._store.rm(device.backend.path)
            self._store.rm(device.backend.frontend)

    def _end(self, device: PvDevice) -> None:
        with contextlib.suppress(XenStoreError, XenStoreLostError, OSError):
            device.backend.close()
        if device.helper is not None:
            device.helper.close()
