"""GRUB's image for PVH domains: a 32-bit guest that uses the hypercall page, the memory map and the console's ring."""

import pytest

import nonroot
from nonroot.errors import SoftwareMissingError
from nonroot.guests.packages import package

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

IMAGE = "usr/lib/grub-xen/grub-i386-xen_pvh.bin"


def test_grub_reaches_its_prompt_on_the_paravirtual_console() -> None:
    try:
        image = package("grub-xen-host") / IMAGE
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    with nonroot.Domain(kernel=image, protocol="pvh", xen=True, memory="128M", agent=False) as domain:
        domain.console.expect("Welcome to GRUB!", 60)
        domain.console.expect("grub> ", 60)
        domain.console.write("echo typed-$grub_cpu\r")
        domain.console.expect("typed-i386", 60)
