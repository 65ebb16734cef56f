"""A CD of GRUB's own for the boot matrix; the other disks and CDs are those of nonroot.testing.boot_images."""

import shutil
from pathlib import Path

from nonroot.guests.packages import package
from nonroot.testing.boot_images import run_tool

__all__ = ["grub_cd"]

GRUB_MODULES = (
    *("biosdisk", "iso9660", "normal", "multiboot", "linux16", "linux", "echo", "gzio"),
    *("vbe", "gfxterm", "font"),
)
FONT = "usr/share/grub/ascii.pf2"


def grub_cd(target: Path, files: dict[str, Path], config: str) -> Path:
    """A CD on which GRUB runs ``config``; ``files`` lie in its root, and a font, ``/ascii.pf2``."""
    folder = target.with_suffix(".cd")
    (folder / "boot").mkdir(parents=True)
    for name, source in files.items():
        shutil.copy(source, folder / name)
    shutil.copy(package("grub-common") / FONT, folder)
    (folder / "boot/grub.cfg").write_text(config)
    modules = package("grub-pc-bin") / "usr/lib/grub/i386-pc"
    tool = package("grub-common") / "usr/bin/grub-mkimage"
    place = ("-O", "i386-pc-eltorito", "-d", modules, "-p", "/boot", "-o", folder / "boot/grub.img")
    run_tool([tool, *place, *GRUB_MODULES], ["libdevmapper1.02.1"])
    boot = ("-b", "boot/grub.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table")
    run_tool(
        [package("xorriso") / "usr/bin/xorriso", "-as", "mkisofs", "-quiet", "-o", target, *boot, folder],
        ["libisoburn1", "libburn4", "libisofs6", "libjte2"],
    )
    shutil.rmtree(folder)
    return target
