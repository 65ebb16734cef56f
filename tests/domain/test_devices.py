"""Disks and networks of a domain: what users say of them, whose they are, and what the guest's software gets."""

import gzip
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from nonroot.api import Domain
from nonroot.domain import guest_devices
from nonroot.domain.drives import DiskPlan, ide_disks, paravirtual_disks, plan_disks
from nonroot.domain.frames import FromGuest
from nonroot.domain.guest_devices import GuestDevices
from nonroot.domain.guest_setup import GuestSetup, find_modules
from nonroot.domain.networks import Network, parse_networks
from nonroot.domain.options import DomainOptions
from nonroot.domain.runner import command_line, guest_setup, xen_services
from nonroot.domain.xen_choice import choose_xen
from nonroot.errors import (
    BadFileError,
    BadOptionError,
    NonrootError,
    NotRunningError,
    SoftwareMissingError,
    UnsupportedError,
)
from nonroot.xenstore.client import XenStore
from tests.backends.frontend import Guest, xenstore
from tests.domain.native_agent import NativeAgent, build
from tests.waiting import wait_until

# ── networks ──


def test_networks_in_words() -> None:
    assert Network.parse("user").is_user
    lab = Network.parse("lab,mac=00:16:3E:00:00:07,ip=10.9.0.1/24")
    assert (lab.is_user, lab.mac, lab.ip) == (False, "00:16:3e:00:00:07", "10.9.0.1/24")
    both = Network.parse("user,isolated,loopback", ["8080:80", "0.0.0.0:53:53/udp"]).user_network("guest")
    assert (both.outside, both.host_loopback, both.hostname) == (False, True, "guest")
    assert [str(port) for port in both.publish] == ["127.0.0.1:8080:80", "0.0.0.0:53:53/udp"]


@pytest.mark.parametrize(
    ("text", "publish", "message"),
    [
        ("", [], "is no network: use 'user'"),
        ("a b", [], "is no network"),
        ("x" * 32, [], "is no network"),
        ("bridge", [], "it would need root"),
        ("user,fast", [], "'fast' is no option of a network"),
        ("user,mac=01:00:00:00:00:00", [], "is no address of a network card"),
        ("lab,ip=10.0.0.1", [], "is no address with its network's bits"),
        ("lab,ip=10.0.0.300/24", [], "is no address with its network's bits"),
        ("user,ip=10.0.2.9/24", [], "leave ip out"),
        ("lab,isolated", [], "is of domains only"),
        ("lab", ["80:80"], "is of domains only"),
        ("user", ["80"], "publishes no port"),
    ],
)
def test_networks_that_cannot_be(text: str, publish: list[str], message: str) -> None:
    with pytest.raises(NonrootError, match=re.escape(message)):
        Network.parse(text, publish)


def test_published_ports_are_the_users_network() -> None:
    assert [network.name for network in parse_networks([], ["2222:22"])] == ["user"]
    found = parse_networks(["lab", "user,isolated", "user"], ["2222:22"])
    assert [len(network.publish) for network in found] == [0, 1, 0]
    assert parse_networks([]) == []
    with pytest.raises(BadOptionError, match=r"port 80 of 127\.0\.0\.1 is published twice"):
        parse_networks([], ["80:80", "127.0.0.1:80:8080"])
    assert len(parse_networks([], ["80:80", "80:80/udp"])[0].publish) == 2


# ── disks ──


def options(**given: object) -> DomainOptions:
    return DomainOptions(**({"kernel": "/k", "xen": True} | given))  # type: ignore[arg-type]


def test_disks_of_a_started_kernel_are_xens() -> None:
    some = options(disks=["/a", "/b,,c,ro,xvda", "/c,ide,overlay", "/d"])
    assert paravirtual_disks(some) == [("xvdb", "/a"), ("xvda", "/b,,c,ro"), ("xvdc", "/d")]
    assert ide_disks(some) == ["/c,overlay"]


def test_disks_elsewhere_are_emulated() -> None:
    assert ide_disks(options(disks=["/a"], xen=False)) == ["/a"]


def test_disks_of_a_pc_are_both_until_they_are_unplugged() -> None:
    bios = options(disks=["/a", "/b,xvdf", "/c,ide", "/d,hdb", "/e"], cdroms=["none"], firmware="/f", kernel=None)
    assert plan_disks(bios) == [
        DiskPlan("/a", "xvda", True),
        DiskPlan("/b", "xvdf", True),
        DiskPlan("/c", None, True),
        DiskPlan("/d", "hdb", False),
        DiskPlan("/e", "xvdc", False),
    ]
    assert ide_disks(bios) == ["/a", "/b", "/c"]
    kernel = options(disks=["/a", "/b,hdb"], protocol="linux64")
    assert plan_disks(kernel) == [DiskPlan("/a", "xvda", False), DiskPlan("/b", "hdb", True)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"disks": ["{0},xvda", "{0},xvda"]}, "two disks have the same place: xvda"),
        ({"disks": ["{0},xvda", "{0},hda"]}, "two disks have the same place: xvda and hda"),
        ({"disks": ["{0},xvda,ide"]}, "a disk has one place, not xvda and ide"),
        ({"disks": ["{0}"] * 17}, "at most 16 disks, xvda to xvdp"),
        ({"disks": ["{0},ide"] * 5}, "at most 4 disks and CD-ROM drives"),
        ({"disks": ["{0},xvdb"], "xen": False}, "only a domain with Xen's disks has names for their places"),
        ({"networks": ["user"], "xen": False}, "can have no network"),
        ({"publish": ["1:1"], "xen": False}, "can have no network"),
    ],
)
def test_devices_that_cannot_be(tmp_path: Path, given: dict[str, object], message: str) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(b"\x7fELF")
    disks = given.get("disks", [])
    assert isinstance(disks, list)
    some = options(**given | {"kernel": os.fspath(image), "disks": [text.format(image) for text in disks]})
    with pytest.raises(BadOptionError, match=re.escape(message)):
        some.check()


# ── is it Xen's? ──

XEN_CONFIG = "#\nCONFIG_XEN_PVHVM=y\nCONFIG_HVC_XEN=y\n"


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    (tmp_path / "config-1").write_text(XEN_CONFIG)
    (tmp_path / "vmlinuz-1").write_bytes(b"\x7fELF no Xen in here")
    return os.fspath(tmp_path / "vmlinuz-1")


def chosen(**given: object) -> bool | None:
    some = options(**{"xen": None} | given)
    choose_xen(some)
    return some.xen


def test_xen_is_taken_where_a_kernel_knows_it(kernel: str) -> None:
    assert chosen(kernel=kernel) is None, "if XenStore can be had"
    assert chosen(kernel=kernel, disks=["/a"]) is None
    assert chosen(kernel=kernel, networks=["user"]) is True
    assert chosen(kernel=kernel, disks=["/a,xvdc"]) is True
    assert chosen(kernel=kernel, xen=False) is False
    assert chosen(kernel=kernel, virtual_time=True) is False
    assert chosen(kernel=kernel, virtual_time=True, xen=True) is True
    assert chosen(kernel=None, firmware="/f") is False
    assert chosen(kernel=kernel, protocol="multiboot") is False
    config = Path(kernel).with_name("config-1")
    config.write_text(XEN_CONFIG.replace("CONFIG_HVC_XEN=y", "# CONFIG_HVC_XEN is not set"))
    assert chosen(kernel=kernel) is False


def test_a_kernel_without_its_configuration_is_looked_into_if_need_be(kernel: str) -> None:
    Path(kernel).with_name("config-1").unlink()
    assert chosen(kernel=kernel, disks=["/a"]) is False
    with pytest.raises(UnsupportedError, match="network cards are Xen's, and the kernel vmlinuz-1 has no drivers"):
        chosen(kernel=kernel, networks=["user"])
    Path(kernel).write_bytes(b"\x7fELF ... Xen HVM\0 ... xenboot\0")
    assert chosen(kernel=kernel, networks=["user"]) is True
    assert chosen(kernel=kernel, disks=["/a"]) is None
    assert chosen(kernel=kernel) is False, "nothing depends on it"


def test_without_xenstore_a_domain_is_xens_only_if_it_must_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    long = tmp_path / ("x" * 100)  # a socket's path cannot be so long
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", os.fspath(long))
    services, reason = xen_services(options(xen=None))
    assert services is None
    assert "there is no private folder for running domains" in reason
    with pytest.raises(NonrootError, match="there is no private folder"):
        xen_services(options(xen=True))
    assert xen_services(options(xen=False)) == (None, "it was not asked for")


def test_networks_where_xen_cannot_be(kernel: str) -> None:
    with pytest.raises(UnsupportedError, match="in virtual time they would make runs differ"):
        chosen(kernel=kernel, networks=["user"], virtual_time=True)
    with pytest.raises(UnsupportedError, match="starts in firmware"):
        chosen(kernel=None, firmware="/f", publish=["1:1"])


# ── the guest's software ──


def test_command_line_and_setup() -> None:
    plain = options(setup=True)
    assert guest_setup(plain) is None
    assert command_line(plain) == "console=hvc0 panic=-1 cryptomgr.notests quiet rdinit=/.nonroot-agent"
    assert "console=ttyS0" in command_line(options(xen=False))
    assert "hvc0" not in command_line(options(append="console=ttyS0,9600")), "the user's console is the only one"
    some = options(setup=True, disks=["/a"], networks=["lab"], agent=False)
    setup = guest_setup(some)
    assert setup is not None
    assert setup.disks == ["xvda"]
    assert "rdinit=/.nonroot/init" in command_line(some, setup=True)
    assert guest_setup(options(disks=["/a"])) is None, "the initramfs is the user's"
    assert guest_setup(options(setup=True, xen=False, disks=["/a"])) is None
    shell = guest_setup(options(setup=True, xen=False, agent=False))
    assert shell is not None, "PID 1 is a shell, which hears no signals"
    assert b"exec busybox poweroff -f" in shell.archive()
    assert "xen-blkfront" not in shell.script()
    later = guest_setup(options(setup=True, xen=True, agent=False))
    assert later is not None
    assert later.script().count("modprobe xen-") == 2, "devices may come"


def test_the_script_is_one(tmp_path: Path) -> None:
    networks = parse_networks(["lab,ip=10.9.0.1/24", "quiet"], ["1:1"])
    script = GuestSetup(["xvda", "xvdc"], networks, more_modules=["more"], more_lines=["echo more"]).script()
    path = tmp_path / "setup"
    path.write_text(script)
    subprocess.run(["sh", "-n", str(path)], check=True)
    assert 'ifconfig "$dev" 10.9.0.1 netmask 255.255.255.0 up' in script
    assert script.count("udhcpc") == 1
    assert script.count("/dev/xvd") == 2


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules that a compiler makes: top needs mid, which needs low."""
    folder = tmp_path_factory.mktemp("modules") / "1.2.3"
    folder.mkdir()
    facts = {"low": "alias=lowest\\0depends=", "mid-dle": "depends=low", "top": "alias=fs-top\\0depends=mid_dle"}
    packed: dict[str, Callable[[bytes], bytes]] = {
        "low": lzma.compress,
        "mid-dle": gzip.compress,
        "top": zstandard.ZstdCompressor().compress,
    }
    endings = {"low": ".ko.xz", "mid-dle": ".ko.gz", "top": ".ko.zst"}
    for name, text in facts.items():
        source = f'__attribute__((section(".modinfo"), used)) static const char facts[] = "{text}";'
        file = folder / "kernel" / name / f"{name}{endings[name]}"
        file.parent.mkdir(parents=True)
        plain = folder / f"{name}.o"
        subprocess.run(["cc", "-c", "-x", "c", "-o", str(plain), "-"], input=source.encode(), check=True)
        file.write_bytes(packed[name](plain.read_bytes()))
    (folder / "kernel" / "broken.ko").write_bytes(b"no ELF")
    names = [f"kernel/{name}/{name}.ko" for name in facts]
    (folder / "modules.order").write_text("\n".join([*names, "kernel/broken.ko", "kernel/gone.ko"]))
    return folder


def test_modules_come_with_what_they_need(modules: Path) -> None:
    found = find_modules(modules, ["top", "missing", "broken", "gone", "low"])
    assert [module.name for module in found] == ["low", "mid-dle", "top"]
    assert all(module.data[:4] == b"\x7fELF" for module in found)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="there is no cpio on this machine")
def test_the_archive_has_tables_for_modprobe(modules: Path, tmp_path: Path) -> None:
    archive = GuestSetup(modules=modules, more_modules=["top"], more_lines=["true"]).archive()
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
    root = tmp_path / "lib" / "modules" / "1.2.3"
    assert (root / "modules.dep").read_text().splitlines() == [
        "kernel/low/low.ko:",
        "kernel/mid-dle/mid-dle.ko: kernel/low/low.ko",
        "kernel/top/top.ko: kernel/mid-dle/mid-dle.ko kernel/low/low.ko",
    ]
    assert (root / "modules.alias").read_text() == "alias lowest low\nalias fs-top top\n"
    assert (root / "kernel/top/top.ko").read_bytes()[:4] == b"\x7fELF"
    assert os.access(tmp_path / ".nonroot" / "setup", os.X_OK)


def test_the_agent_sets_up_before_it_greets_and_passes_complaints_on(tmp_path: Path) -> None:
    setup = tmp_path / "setup"
    setup.write_text("#!/bin/sh\necho first; echo second >&2\necho done > " + str(tmp_path / "done") + "\n")
    setup.chmod(0o755)
    path = build(64, tmp_path, "-DTEST_STDIO", f'-DSETUP="{setup}"')
    with NativeAgent(path) as agent:
        assert (tmp_path / "done").exists(), "it has greeted"
        assert [agent.next() for _ in range(2)] == [(FromGuest.LOG, b"first"), (FromGuest.LOG, b"second")]


# ── while it runs ──


def test_a_domain_that_is_not_xens(native: Callable[..., Domain]) -> None:
    domain = native()
    assert domain.disks() == []
    assert domain.networks() == []
    for call in (
        lambda: domain.add_disk("/dev/null"),
        lambda: domain.add_network("lab"),
        lambda: domain.remove_network(0),
        lambda: domain.resize_disk("xvda"),
    ):
        with pytest.raises(UnsupportedError, match="it was not started as a Xen domain"):
            call()
    with pytest.raises(BadOptionError, match="'fast' is no option"):
        domain.add_network("user,fast")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("xenstore")
    with xenstore(folder):
        yield folder / "socket"


@pytest.fixture
def devices(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GuestDevices]:
    monkeypatch.setattr(guest_devices, "XenStore", lambda: XenStore(place))
    found = GuestDevices(Guest())
    yield found
    found.close()


def test_disks_are_listed_with_what_they_are(devices: GuestDevices, tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    assert devices.disks() == []
    disk = devices.add_disk(f"{image},ro")
    assert (disk["vdev"], disk["number"], disk["image"], disk["read_only"]) == ("xvda", 51712, str(image), True)
    wait_until(lambda: devices.disks()[0]["state"] == "init_wait")
    assert devices.add_disk(f"{image},overlay", "xvdc")["vdev"] == "xvdc"
    assert devices.add_disk(f"{image},ro")["vdev"] == "xvdb"
    assert [one["vdev"] for one in devices.disks()] == ["xvda", "xvdb", "xvdc"]
    with pytest.raises(BadOptionError, match="there is a disk xvda already"):
        devices.add_disk(f"{image},ro", "xvda")
    with pytest.raises(BadOptionError, match="is no name of a disk"):
        devices.add_disk(f"{image},ro", "floppy")
    with pytest.raises(BadFileError, match="does not exist"):
        devices.add_disk(f"{tmp_path}/missing")
    devices.remove_disk("xvdb")  # nobody uses it
    wait_until(lambda: len(devices.disks()) == 2)
    with pytest.raises(NotRunningError):
        devices.remove_disk("xvdb")
    assert devices.add_disk(f"{image},ro")["vdev"] == "xvdb"


def test_cards_are_listed_with_what_they_are(
    devices: GuestDevices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(guest_devices, "runtime_dir", lambda: tmp_path)
    card = devices.add_network(Network.parse("lab,mac=00:16:3e:00:00:01"))
    assert (card["index"], card["network"], card["mac"], card["publish"]) == (0, "lab", "00:16:3e:00:00:01", [])
    assert devices.add_network(Network.parse("lab"), 3)["mac"].startswith("00:16:3e:")
    assert [one["index"] for one in devices.networks()] == [0, 3]
    with pytest.raises(BadOptionError, match="there is a network card 3 already"):
        devices.add_network(Network.parse("lab"), 3)
    devices.remove_network(0)
    wait_until(lambda: [one["index"] for one in devices.networks()] == [3])


def test_without_libslirp_the_user_learns_what_helps(devices: GuestDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise SoftwareMissingError("apt cannot be reached")

    monkeypatch.setattr("nonroot.domain.pv_devices.PvDevices.add_card", missing)
    with pytest.raises(SoftwareMissingError, match=r"needs libslirp.*apt cannot be reached; install .* libslirp0"):
        devices.add_network(Network.parse("user"))


def test_nothing_is_added_to_what_has_ended(devices: GuestDevices) -> None:
    devices.close()
    with pytest.raises(NotRunningError, match="the domain is ending"):
        devices.add_network(Network.parse("lab"))
    assert devices.disks() == []
