"""The boot matrix: systems that know nothing of us boot from disk, CD and floppy, under every engine.

The fast part boots boot loaders and Xen; whole systems are slow.
"""

import re
from pathlib import Path

import pytest

from nonroot.hvm.firmware import Firmware
from nonroot.hvm.outcome import Reason
from nonroot.testing import boot_images
from tests.matrix import media, modes_guest
from tests.matrix.conftest import Maker, fetched
from tests.matrix.pc import Pc
from tests.needed import need

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1800)]

MIB = 1 << 20
RESCUE = "usr/lib/grub-rescue/grub-rescue-"
MEMTEST = "usr/lib/memtest86+/memtest86+"
PROMPT = r"^(\S+ )?# "


# ── boot loaders and what boots in a second ──


def test_grub_rescue_cd(make: Maker) -> None:
    pc = make(cd=fetched("grub-rescue-pc", RESCUE + "cdrom.iso"), boot="d")
    pc.wait_screen("GNU GRUB")
    pc.wait_screen("Press enter to boot")
    pc.press("c")
    pc.wait_screen("^grub>")
    pc.press("ls<ret>")
    pc.wait_screen(r"^\(cd\)")
    pc.press("<esc>")
    pc.shows("grub-menu")


@pytest.mark.slow
def test_grub_rescue_floppy(make: Maker) -> None:
    pc = make(floppy=fetched("grub-rescue-pc", RESCUE + "floppy.img"), boot="a")
    pc.wait_screen("Press enter to boot")
    pc.press("c")
    pc.wait_screen("^grub>")
    pc.press("ls<ret>")
    pc.wait_screen(r"^\(fd0\)")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["x64", "ia32"])
def test_memtest(make: Maker, kind: str) -> None:
    pc = make(cd=fetched("memtest86+", f"{MEMTEST}{kind}.iso"), boot="d")
    pc.wait_screen(r"Memtest86\+ v")
    pc.wait_screen(r"Memory *: +12[78]MB")
    pc.wait_screen("Status: Testing", 120)
    pc.wait_screen(r"Pattern: 0x[0-9a-f]+", 120)
    assert re.search(r"Errors: 0\b", pc.text())
    pc.shows("memtest-text", differing=0.1)


@pytest.mark.slow
def test_modes_of_the_vga_bios(make: Maker, tmp_path: Path) -> None:
    image = tmp_path / "modes.img"
    image.write_bytes(modes_guest.floppy())
    pc = make(floppy=image, boot="a")
    for mode in modes_guest.MODES:
        pc.run_until(lambda mode=mode: pc.serial[-1:] == bytes([mode.number & 0xFF]), 60, mode.name)  # type: ignore[misc]
        pc.shows(mode.name, 10, 0)
        assert pc.picture().size == mode.size
        pc.press(" ")
    pc.run_until(lambda: bool(pc.rows()), 10, "text mode did not come back")


def test_xen_by_multiboot(make: Maker) -> None:
    kernel = fetched("xen-hypervisor-4.17-amd64", "boot/xen-4.17-amd64.gz").read_bytes()
    pc = make(kernel=kernel, cmdline="console=com1 com1=115200 noreboot", memory=256 * MIB)
    pc.wait_serial(r"\(XEN\) Xen version 4\.17")
    pc.wait_serial("dom0 kernel not specified")


@pytest.mark.slow
def test_ovmf_to_its_shell(make: Maker, tmp_path: Path) -> None:
    disk = tmp_path / "empty.img"
    disk.write_bytes(bytes(MIB))
    image = fetched("ovmf", "usr/share/ovmf/OVMF.fd").read_bytes()
    pc = make(disks=[disk], firmware=Firmware(image), memory=256 * MIB)
    pc.wait_serial(r"UEFI Interactive Shell", 180)
    pc.wait_serial("Shell> ", 120)
    assert pc.picture().size == (1280, 800)
    pc.shows("ovmf-shell", differing=0.03)
    pc.press("ver<ret>")
    pc.wait_serial("UEFI v2", 60)


@pytest.mark.slow
def test_ovmf_boots_a_cd(make: Maker) -> None:
    image = fetched("ovmf", "usr/share/ovmf/OVMF.fd").read_bytes()
    pc = make(cd=fetched("memtest86+", MEMTEST + "x64.iso"), firmware=Firmware(image), memory=256 * MIB)
    pc.wait_serial("starting Boot0001", 180)
    pc.run_until(lambda: pc.picture().size == (640, 480), 300, "memtest did not change the mode")
    pc.shows("memtest-framebuffer", differing=0.1)


# ── a CD of our own with GRUB ──

GRUB_CONFIG = """\
set timeout=-1
menuentry 'Invaders' --hotkey=i { multiboot /invaders }
menuentry 'Graphics' --hotkey=g {
    loadfont /ascii.pf2
    set gfxmode=800x600x32
    terminal_output gfxterm
}
menuentry 'Xen' --hotkey=x { multiboot /xen.gz xen console=com1 com1=115200 noreboot }
"""


@pytest.fixture(scope="module")
def grub_cd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {
        "invaders": fetched("grub-invaders", "boot/invaders.exec"),
        "xen.gz": fetched("xen-hypervisor-4.17-amd64", "boot/xen-4.17-amd64.gz"),
    }
    return media.grub_cd(tmp_path_factory.mktemp("grub") / "grub.iso", files, GRUB_CONFIG)


@pytest.mark.slow
def test_invaders_is_played(make: Maker, grub_cd: Path) -> None:
    pc = make(cd=grub_cd, boot="d")
    pc.wait_screen("Invaders")
    pc.press("i")
    pc.wait_screen(r"-\*- +-\*-")
    pc.wait_screen(r"/ \\")

    def ship() -> int:
        return next((row.index("/ \\") for row in reversed(pc.rows()) if "/ \\" in row), -1)

    pc.run_until(lambda: ship() >= 0, 30, "there is no ship")
    start = ship()
    pc.hold("<left>", lambda: 0 <= ship() < start, "the ship did not move to the left")
    pc.hold(" ", lambda: any(row.strip() == "|" or " | " in row for row in pc.rows()), "it did not shoot")


@pytest.mark.slow
def test_grub_in_graphics(make: Maker, grub_cd: Path) -> None:
    pc = make(cd=grub_cd, boot="d")
    pc.wait_screen("Invaders")
    pc.press("g")
    pc.shows("grub-graphics")


@pytest.mark.slow
def test_xen_by_grub(make: Maker, grub_cd: Path) -> None:
    pc = make(cd=grub_cd, boot="d", memory=256 * MIB)
    pc.wait_screen("Invaders")
    pc.press("x")
    pc.wait_serial("dom0 kernel not specified", 120)


# ── Debian ──

POWER_BUTTON_EVENT = "$(grep -A 5 LNXPWRBN /proc/bus/input/devices | grep -o 'event[0-9]*')"


def log_in(pc: Pc) -> None:
    pc.wait_serial("login: ", 120)
    pc.send("root\n")
    pc.wait_serial(PROMPT, 120)


def run(pc: Pc, command: str) -> None:
    pc.send(command + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["amd64", "686-pae", "686"])
def test_debian_from_a_disk(make: Maker, flavour: str) -> None:
    version = need(flavour, "make matrix").version
    disk = boot_images.debian_disk(flavour, modules=("button", "evdev", "i6300esb"))
    pc = make(disks=[f"{disk},overlay"], boot="c", memory=256 * MIB)
    pc.wait_screen("Debian on nonroot")
    pc.wait_serial("Linux version 6", 600)
    log_in(pc)
    run(pc, "uname -r; echo written by the first boot > /root/file; sync; reboot")
    pc.wait_serial(f"^{re.escape(version)}")
    pc.wait_serial("Linux version 6", 600)
    assert pc.machine.resets == 1
    log_in(pc)
    run(pc, "cat /root/file")
    pc.wait_serial("^written by the first boot")
    # The watchdog: nobody feeds it.
    run(pc, "watchdog -T 2 -t 1000 /dev/watchdog")
    pc.run_until(lambda: pc.machine.resets == 2, 120, "the watchdog did not reset the machine")
    pc.wait_screen("Debian on nonroot")


@pytest.mark.slow
def test_isolinux_and_the_power_button(make: Maker) -> None:
    version = need("686", "make matrix").version
    pc = make(cd=boot_images.debian_cd("686", modules=("button", "evdev")), boot="d", memory=256 * MIB)
    pc.wait_serial("ISOLINUX 6", 60)
    pc.wait_serial("Linux version 6", 600)
    log_in(pc)
    run(pc, "uname -r")
    pc.wait_serial(f"^{re.escape(version)}")
    run(pc, f"(head -c 16 /dev/input/{POWER_BUTTON_EVENT} > /dev/null && poweroff) & sleep 1; echo it waits")
    pc.wait_serial("^it waits", 60)
    pc.machine.press_power_button()
    assert pc.run_to_end(120).reason is Reason.POWER_OFF
