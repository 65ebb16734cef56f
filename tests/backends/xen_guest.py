"""A Debian kernel as a Xen guest with paravirtual disks and network, in this process: machine, XenStore, backends."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from nonroot.boot.cpio import Cpio
from nonroot.domain.pv_devices import PvDevices
from nonroot.domain.xen import XenServices
from nonroot.engines import select
from nonroot.guests import initramfs
from nonroot.guests.linux import cached
from nonroot.hvm.machine import Machine, MachineConfig, Outputs
from nonroot.hvm.outcome import Outcome
from nonroot.xen.config import XenConfig
from nonroot.xenstore.client import XenStore

MODULES = ("drivers/block/xen-blkfront.ko", "drivers/net/xen-netfront.ko")

PROLOGUE = """\
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /mnt /tmp
ifconfig lo 127.0.0.1
insmod /xen-blkfront.ko
insmod /xen-netfront.ko
leave() { echo "result: $*"; poweroff -f; }
"""

WAIT_FOR_DISK = "for i in $(seq 300); do [ -b /dev/xvda ] && break; sleep 0.2; done"

DHCP = """\
cat > /dhcp.sh <<'EOF'
#!/bin/sh
[ "$1" = bound ] || exit 0
ifconfig $interface $ip netmask $subnet up
route add default gw $router
echo nameserver $dns > /etc/resolv.conf
EOF
chmod +x /dhcp.sh
ifconfig eth0 up
udhcpc -i eth0 -n -q -s /dhcp.sh >/dev/null 2>&1 || leave no DHCP
"""


class XenGuest:
    """One domain. ``path``: XenStore's socket; ``script``: what /init does after the prologue; ``leave`` ends it."""

    def __init__(self, store: XenStore, path: Path, script: str, memory: int = 192 << 20, **config: object) -> None:
        found = cached("cloud-amd64")
        if found is None or found.modules is None:
            pytest.skip("Debian's cloud kernel has not been fetched")
        extra = Cpio()
        for module in MODULES:
            extra.file(Path(module).name, (found.modules / "kernel" / module).read_bytes())
        busybox = found.kernel.parents[1] / "bin/busybox"
        initrd = initramfs.build(busybox.read_bytes(), PROLOGUE + script + "\nleave end\n") + extra.finish()
        self.store = store
        self.services = XenServices(XenStore(path), memory)
        self.domid = self.services.domid
        self.console = bytearray()
        self._changed = threading.Condition()
        machine_config = MachineConfig(
            memory_bytes=memory,
            kernel=found.kernel.read_bytes(),
            initrd=initrd,
            cmdline="console=hvc0 panic=-1 cryptomgr.notests quiet",
            base_wall_ns=time.time_ns(),
            xen=XenConfig(domid=self.domid),
            **config,  # type: ignore[arg-type]
        )
        engine = select.create(select.choose("auto").engine)
        self.machine = Machine(machine_config, engine, Outputs(self._console))
        assert self.machine.xen is not None
        self.host = self.machine.xen
        self.services.attach(self.host)
        self.devices = PvDevices(store, self.host)

    def _console(self, port: int, data: bytes) -> None:
        with self._changed:
            self.console += data
            self._changed.notify_all()

    def text(self) -> str:
        return self.console.decode(errors="replace").replace("\r", "")

    def wait_for(self, text: str, seconds: float = 150) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.text(), seconds), self.text()[-3000:]

    def run(self) -> Outcome:
        """Until it ends."""
        try:
            return self.machine.run()
        finally:
            self.devices.close()
            self.services.close()

    def result(self) -> str:
        """What it left."""
        lines = [line for line in self.text().splitlines() if line.startswith("result: ")]
        return lines[-1].removeprefix("result: ") if lines else ""
