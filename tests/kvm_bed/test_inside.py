"""Linux boots under the kvm engine; these run inside of the bed, where the kernel and its initramfs are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nonroot.boot.cpio import Cpio, append
from nonroot.engines.kvm.engine import KvmEngine
from nonroot.hvm.config import Outputs
from nonroot.hvm.machine import Machine, MachineConfig
from nonroot.hvm.outcome import Reason

GUEST = Path("/bed/guest")
LIMIT_S = 120
INIT = b"""#!/bin/sh
mount -t proc proc /proc
echo "in userspace: $(cut -d' ' -f3 /proc/version)"
poweroff -f
"""

pytestmark = pytest.mark.skipif(not GUEST.exists(), reason="this runs inside of the bed")


def test_linux_reaches_userspace_by_pvh() -> None:
    archive = Cpio()
    archive.file("inside", INIT, 0o755)
    said = bytearray()
    config = MachineConfig(
        memory_bytes=128 << 20,
        kernel=(GUEST / "vmlinux").read_bytes(),
        initrd=append((GUEST / "initrd").read_bytes(), archive.finish()),
        cmdline="console=ttyS0 rdinit=/inside panic=-1 cryptomgr.notests mitigations=off",
        protocol="pvh",
    )
    machine = Machine(config, KvmEngine(), Outputs(console=lambda port, data: said.extend(data) if port == 0 else None))
    late = threading.Timer(LIMIT_S, machine.stop)
    late.daemon = True
    late.start()
    outcome = machine.run()
    late.cancel()
    text = said.decode(errors="replace")
    os.write(1, text[-3000:].encode())
    assert outcome.reason is Reason.POWER_OFF, f"{outcome}\n{text[-4000:]}\n{machine.statistics()}"
    assert "in userspace: 6." in text
