"""Domains whose device model is a stub domain, through the API."""

import os
import signal
from pathlib import Path

import pytest

from nonroot import Domain, _engine
from nonroot.confine.host import descendants, observe
from nonroot.errors import BadOptionError, UnsupportedError
from tests.platform.test_domain import SPIN, image, options
from tests.platform.test_reset import BY_8042, BY_CF9
from tests.waiting import wait_until


def models(domain: Domain) -> list[int]:
    """Its device model's processes."""
    found = []
    for pid, _ in descendants(domain.pid):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"nonroot.stubdom.process" in line:
            found.append(pid)
    return found


@pytest.mark.parametrize("model", ["internal", "stub", "dom0"])
def test_a_domain_resets_and_powers_off(tmp_path: Path, model: str) -> None:
    # The keyboard controller asks for this reset: a device of the stub's.
    with Domain(firmware=image(tmp_path, BY_8042), device_model=model, **options()) as domain:  # type: ignore[arg-type]
        assert domain.wait(30).reason == "poweroff"
        assert domain.console.text == "123"


def test_the_stub_is_confined_and_ends_with_the_domain(tmp_path: Path) -> None:
    with Domain(firmware=image(tmp_path, SPIN), device_model="stub", **options()) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        domain.screen()
        (pid,) = models(domain)
        if all(_engine.confinement_of_host()):
            assert {"seccomp", "no-new-privileges"} <= set(observe(pid))
    assert not Path(f"/proc/{pid}").exists()


def test_media_are_changed(tmp_path: Path) -> None:
    disc = tmp_path / "disc.iso"
    disc.write_bytes(bytes(2048 * 16))
    rom = image(tmp_path, SPIN)
    with Domain(firmware=rom, cdrom="none", floppy="none", device_model="stub", **options()) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        for name in ("cd0", "fd0"):
            domain.insert(f"{disc},ro", name)
            domain.insert(f"{disc},ro", name)
            assert domain.eject(name)


def test_a_stub_that_dies_is_replaced_and_nobody_notices(tmp_path: Path) -> None:
    rom = image(tmp_path, SPIN, 9)
    with Domain(firmware=rom, device_model="stub", **options()) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        domain.screen()
        (first,) = models(domain)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: domain.stats.engine.get("device-model.restarts") == 1)
        domain.screen()
        (second,) = models(domain)
        assert second != first
        domain.reset()
        domain.console.expect("2", 30)


def test_saving_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with Domain(firmware=image(tmp_path, SPIN), device_model="stub", **options()) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        with pytest.raises(UnsupportedError, match="device model"):
            domain.save(tmp_path / "saved")
        with pytest.raises(UnsupportedError, match="device model"):
            domain.fork()


def test_an_unknown_device_model(tmp_path: Path) -> None:
    with pytest.raises(BadOptionError, match="no device model 'qemu'"):
        Domain(firmware=image(tmp_path, BY_CF9), device_model="qemu", **options()).start()  # type: ignore[arg-type]
