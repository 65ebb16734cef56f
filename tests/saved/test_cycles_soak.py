"""Save, restore, go on, again and again: at random moments of a boot and of work on files."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from nonroot.engines import select
from nonroot.guests import cached
from nonroot.hvm.machine import MachineConfig, Reason
from nonroot.hvm.ram import ram_file
from nonroot.hvm.saved import take
from nonroot.xen.config import XenConfig
from tests.saved.machines import Recorded

ROUND = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
BATCHES, CYCLES = 10, 100
WORK = """
b=/bin/busybox; $b mount -t tmpfs none /tmp; cd /tmp;
for n in 1 2 3 4; do
  $b mkdir d$n; $b dd if=/bin/busybox of=d$n/a bs=64k count=12 2>/dev/null; $b gzip -c d$n/a > d$n/b.gz;
  $b tar cf $n.tar d$n; $b mkdir x$n; $b tar xf $n.tar -C x$n;
  $b gunzip -c x$n/d$n/b.gz | $b cmp - d$n/a || echo WRONG $b;
  $b find . -type f | $b sort | $b xargs $b md5sum | $b md5sum; $b rm -r x$n;
done;
cd /; $b umount /tmp; echo all done $b; $b poweroff -f
""".replace("\n", " ")


def state(machine: Recorded) -> list[object]:
    """The records, and a hash of the memory."""
    fd = ram_file(machine.machine.memory_files)
    digest = xxhash.xxh3_128()
    try:
        while piece := os.read(fd, 8 << 20):
            digest.update(piece)
    finally:
        os.close(fd)
    return [take(machine.machine), digest.hexdigest()]


@pytest.mark.soak
@pytest.mark.guest
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_thousand_times(tmp_path: Path, batch: int) -> None:
    guest = cached("cloud-amd64")
    if guest is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched (make guests)")
    generator = random.Random(1000 * ROUND + batch)
    line = f'panic=-1 cryptomgr.notests rdinit=/bin/busybox -- sh -c "{WORK}"'
    xen = batch % 2 == 1
    config = MachineConfig(
        96 << 20,
        guest.kernel.read_bytes(),
        cmdline=("console=hvc0 " if xen else "console=ttyS0 ") + line,
        initrd=None if guest.initrd is None else guest.initrd.read_bytes(),
        base_wall_ns=10**18,
        virtual_time=(1, 1),
        xen=XenConfig(domid=3) if xen else None,
    )
    fast = "interpret" if select.translator_missing() else "translate"
    undisturbed = Recorded(config, select.create(fast))
    end = undisturbed.machine.run()
    assert end.reason == Reason.POWER_OFF
    assert b"all done /bin/busybox" in undisturbed.output
    assert b"WRONG /bin/busybox" not in undisturbed.output
    whole = undisturbed.machine.vcpu.retired()

    moments = sorted(generator.sample(range(1_000_000, whole), CYCLES))
    machine = Recorded(replace(config), select.create(fast))
    shown = b""
    for moment in moments:
        assert machine.machine.run(moment).reason == Reason.STOPPED
        machine.save(tmp_path / "saved", packed=generator.random() < 0.2)
        other = machine.restored(tmp_path / "saved", select.create(generator.choice((fast, "interpret"))))
        assert state(other) == state(machine), f"after {moment} instructions"
        shown += machine.output
        machine = other
    assert machine.machine.run() == end
    assert shown + machine.output == undisturbed.output
    assert machine.machine.vcpu.retired() == whole
