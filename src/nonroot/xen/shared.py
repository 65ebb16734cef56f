"""The shared information page and what lies beside it: vcpu_info, the guest's clock, its wall clock, run states.

The guest's clock is exact and never moves: machine time and the TSC count the same nanoseconds, so the record that
turns the one into the other is written once.

Source: Xen's public/xen.h and vcpu.h; xen/arch/x86/time.c for the protocol of the versions.
"""

from typing import Any, Final

from nonroot._engine import XenPath
from nonroot.hvm.device import StateError
from nonroot.saved.fields import Fields
from nonroot.xen.abi import PAGE_SIZE, Errno, HypercallError, tsc_scale
from nonroot.xen.layout import ABI32, ABI64, LEGACY_VCPUS, TIME, TIME_RECORD, TIME_STABLE, VCPU_INFO_SIZE, Abi
from nonroot.xen.memory import SHARED_INFO, Physmap, Place, Words

__all__ = ["SharedInfo"]

SECOND: Final = 1_000_000_000


class SharedInfo:
    """The shared page of a domain and its vCPUs' parts of it. Any thread, but ``use_abi`` and ``register``."""

    def __init__(self, physmap: Physmap, vcpus: int, tsc_khz: int, wall_ns: int, path: XenPath | None = None) -> None:
        """``wall_ns``: UTC when machine time was 0. ``path``: is told where everything is."""
        self._path = path
        self.abi: Abi = ABI64
        """The layout that the guest uses."""
        self._physmap = physmap
        self._words = Words(physmap.memory)
        self._page = physmap.own(SHARED_INFO)
        self._vcpus = vcpus
        self._scale = tsc_scale(tsc_khz)
        self.wall_ns = wall_ns
        """Written at the next :meth:`refresh`."""
        self._infos: list[Place | None] = []
        self._registered: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """As at power-on; the page has been cleared."""
        self.abi = ABI64
        self._registered.clear()
        self._infos = [self._page.plus(VCPU_INFO_SIZE * v) if v < LEGACY_VCPUS else None for v in range(self._vcpus)]
        self._show()
        self.refresh()

    def use_abi(self, abi: Abi) -> None:
        """The guest has shown which layout it uses. Pending bits are not carried over, as in Xen."""
        if abi is not self.abi:
            self.abi = abi
            self._show()
            self.refresh()

    def _show(self) -> None:
        """Tell the path where everything is."""
        if self._path is not None:
            self._path.layout(self.abi.bits, self.abi.pending, self.abi.mask, self.abi.selector)
            for vcpu, info in enumerate(self._infos):
                self._path.info(vcpu, info)

    def refresh(self) -> None:
        """Write clock and wall clock."""
        for info in self._infos:
            if info is not None:
                self._words.store_bytes(info.plus(TIME), self.time_record())
        seconds, nanoseconds = divmod(self.wall_ns, SECOND)
        clock, high = self._page.plus(self.abi.wall_clock), self._page.plus(self.abi.wall_clock_high)
        before = (self._words.load(clock.plus(4)), self._words.load(clock.plus(8)), self._words.load(high))
        if before == (seconds & 0xFFFF_FFFF, nanoseconds, seconds >> 32):
            return
        version = self._words.load(clock) & ~1
        self._words.store(clock, version + 1 & 0xFFFF_FFFF)
        self._words.store(clock.plus(4), seconds & 0xFFFF_FFFF)
        self._words.store(clock.plus(8), nanoseconds)
        self._words.store(high, seconds >> 32)
        self._words.store(clock, version + 2 & 0xFFFF_FFFF)

    def saved(self) -> dict[str, Any]:
        """Where everything is."""
        return {
            "long": self.abi.long,
            "infos": [[v, *info] for v, info in enumerate(self._infos) if info is not None],
            "registered": sorted(self._registered),
        }

    def restore(self, record: Fields) -> None:
        """As :meth:`saved` found it; clock and wall clock are written anew. StateError."""
        long, last = record.flag("long"), self._vcpus - 1
        infos = record.rows("infos", last, self._physmap.own_backing, 1 << 52)
        registered = set(record.numbers("registered", last))
        places: list[Place | None] = [None] * self._vcpus
        for vcpu, backing, offset in infos:
            place = Place(backing, offset)
            try:
                if offset % PAGE_SIZE > PAGE_SIZE - VCPU_INFO_SIZE:
                    raise ValueError("it crosses pages")
                self._words.load_bytes(place, VCPU_INFO_SIZE)
            except (ValueError, OverflowError):
                raise StateError(f"xen shared state: infos of vCPU {vcpu} is no place") from None
            places[vcpu] = place
        self.abi = ABI64 if long else ABI32
        self._infos, self._registered = places, registered
        self._show()
        self.refresh()

    def time_record(self) -> bytes:
        """How the guest turns its TSC into nanoseconds since its start."""
        mul, shift = self._scale
        return TIME_RECORD.pack(2, 0, 0, 0, mul, shift, TIME_STABLE)

    def register(self, vcpu: int, gfn: int, offset: int) -> None:
        """A vCPU's information moves into the guest's own memory, with all that is pending. HypercallError EINVAL."""
        page = self._physmap.page(gfn)
        if vcpu in self._registered or page is None or offset % 4 or not 0 <= offset <= PAGE_SIZE - VCPU_INFO_SIZE:
            raise HypercallError(Errno.EINVAL)
        new, old = page.plus(offset), self._infos[vcpu]
        if old is not None:
            self._words.store_bytes(new, self._words.load_bytes(old, VCPU_INFO_SIZE))
        else:
            self._words.store_bytes(new, bytes(VCPU_INFO_SIZE))
        self._words.store_bytes(new.plus(TIME), self.time_record())
        self._infos[vcpu] = new
        self._registered.add(vcpu)
        self._show()
        self._physmap.memory.touch(gfn)

    # ── pending bits ──

    def set_pending(self, port: int) -> bool:
        """Whether the port has become pending and is not masked."""
        if not self._set(self._bit(self.abi.pending, port), port):
            return False
        return not self._words.load(self._bit(self.abi.mask, port)) >> port % 32 & 1

    def is_pending(self, port: int) -> bool:
        """Whether the port is pending."""
        return bool(self._words.load(self._bit(self.abi.pending, port)) >> port % 32 & 1)

    def clear_pending(self, port: int) -> None:
        """Nothing is pending on a port that is opened or closed."""
        self._words.update(self._bit(self.abi.pending, port), 1 << port % 32, 0)

    def unmask(self, port: int) -> bool:
        """Clear the mask; whether it was set and the port is pending."""
        before = self._words.update(self._bit(self.abi.mask, port), 1 << port % 32, 0)
        return bool(before >> port % 32 & 1) and self.is_pending(port)

    def select(self, vcpu: int, port: int) -> bool:
        """Mark the port's word for a vCPU; whether its upcall has become pending by that."""
        info = self._infos[vcpu]
        if info is None:
            return False
        word = port // self.abi.bits
        if not self._set(info.plus(self.abi.selector + word // 32 * 4), word):
            return False
        return not self._words.update(info, 0, 1) & 0xFF

    def upcall_pending(self, vcpu: int) -> bool:
        """Whether the vCPU has not taken its last upcall yet."""
        info = self._infos[vcpu]
        return info is not None and bool(self._words.load(info) & 0xFF)

    def mark_all(self, vcpu: int) -> None:
        """After a registration: whatever is pending is looked for again."""
        info = self._infos[vcpu]
        if info is not None:
            for at in range(self.abi.word // 4):
                self._words.store(info.plus(self.abi.selector + 4 * at), 0xFFFF_FFFF)
            self._words.update(info, 0, 1)

    def _bit(self, area: int, port: int) -> Place:
        return self._page.plus(area + port // 32 * 4)

    def _set(self, place: Place, bit: int) -> bool:
        mask = 1 << bit % 32
        return not self._words.update(place, 0, mask) & mask
