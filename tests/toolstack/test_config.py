"""What settings mean, and what is said about those that mean nothing."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonroot.backends.vdev import disk_index
from nonroot.domain import registry
from nonroot.domain.options import DomainOptions
from nonroot.domain.xen_choice import knows_xen
from nonroot.errors import BadOptionError, NonrootError, UnsupportedError
from nonroot.toolstack.config import read_config, settle_xen
from nonroot.toolstack.disks import DiskSpec, parse_disk
from nonroot.xen.config import LAST_DOMID


def test_a_pvh_guest(tmp_path: Path) -> None:
    path = tmp_path / "web.cfg"
    path.write_text(
        "name='web'\ntype='pvh'\nmemory='64'\nkernel='/k'\nramdisk='/r'\nroot='/dev/xvda ro'\nextra='quiet'\n"
        "disk=['/a,raw,xvdb,r', 'vdev=xvda,target=/b=c,d']\non_crash='preserve'\nuuid='0'\n".replace("uuid='0'\n", "")
    )
    config = read_config(path, ["memory=128", "on_reboot=destroy"])
    options = config.options
    assert (config.name, config.kind, options.memory) == ("web", "pvh", 128 << 20)
    assert (options.kernel, options.initrd, options.append) == ("/k", "/r", "root=/dev/xvda ro quiet")
    assert options.disks == ["/b=c,,d,format=raw", "/a,format=raw,ro"]
    assert (config.policy.on_crash, config.policy.on_reboot, config.policy.on_poweroff) == (
        "preserve",
        "destroy",
        "destroy",
    )
    assert not options.reboot
    assert config.warnings == []


def test_an_hvm_guest() -> None:
    disk = "disk=['/a.qcow2,qcow2,hda,w', '/cd.iso,,hdc,cdrom', ',,hdd:cdrom,r']"
    config = read_config(None, ["name=pc", "builder='hvm'", disk, "boot=dn", "vnc=1", "vncdisplay=3", "vncpasswd=x"])
    assert config.firmware == "seabios"
    assert config.options.disks == ["/a.qcow2,format=qcow2"]
    assert config.options.cdroms == ["/cd.iso,format=raw", "none"]
    assert config.options.boot == "d"
    assert config.vnc == {"address": "127.0.0.1:5903", "password": "x"}
    assert config.warnings == ["boot: nonroot's guests do not boot from a network yet, so n is left out"]


def test_words_of_the_command_line_need_no_quotes() -> None:
    config = read_config(None, ["name=x", "kernel=/a b'c", "memory=32;cmdline='y z'"])
    assert (config.options.kernel, config.options.append) == ("/a b'c", "y z")


def test_unknown_settings_are_named() -> None:
    config = read_config(None, ["name=x", "memmory=3", "cpu_weight=256", "zzz=1"])
    assert config.warnings == [
        "no effect here: cpu_weight",
        "unknown setting 'memmory'; did you mean 'memory'?",
        "unknown setting 'zzz'",
    ]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["memory=1"], "needs a name"),
        (["name=a/b"], "no name for a domain"),
        (["name=x", "type=pv"], "no guests of type 'pv'"),
        (["name=x", "type=foo"], "there is no type 'foo'"),
        (["name=x", "memory=many"], "memory must be a number, not 'many'"),
        (["name=x", "memory=[1]"], "memory must be a number, not a list"),
        (["name=x", "kernel=[1]"], "kernel must be a string"),
        (["name=x", "disk=[1]"], "disk must be a list of strings"),
        (["name=x", "memory=64", "maxmem=32"], "maxmem (32) is less than memory (64)"),
        (["name=x", "vif=['type=ioemu,model=e1000']"], "nonroot emulates no network cards"),
        (["name=x", "vif=['bridge=lan']", "nonroot_xen=0"], "Xen's need nonroot_xen=1"),
        (["name=x", "type=hvm", "vif=['']", "nonroot_xen=0"], "Xen's need nonroot_xen=1"),
        (["name=x", "vif=['rate=1Mb/s']"], "'rate' is not supported"),
        (["name=x", "vif=['bridge=user']"], "cannot be named user"),
        (["name=x", "vif=['mac=1']"], "'1' is no"),
        (["name=x", "vcpus=2"], "one vCPU"),
        (["name=x", "on_crash=coredump-restart"], "on_crash: nonroot has no coredump-restart yet"),
        (["name=x", "on_crash=explode"], "there is no action 'explode'"),
        (["name=x", "uuid=1"], "'1' is no UUID"),
        (["name=x", "type=pvh", "bios=ovmf"], "bios needs type='hvm'"),
        (["name=x", "type=hvm", "bios=foo"], "there is no bios 'foo'"),
        (["name=x", "type=pvh", "disk=['/a,raw,xvda,w']"], "needs its kernel"),
        (["name=x", "disk=['/a,raw,xvda,w','/b,raw,hda,w']"], "two disks have the same place: xvda and hda"),
        (["name=x", "serial=tcp:1.2.3.4:5"], "first serial port is the console"),
        (["name=x", "type=hvm", "vnc=1", "vnclisten=0.0.0.0", "vncdisplay=1"], "VNC listens on this machine only"),
        (["name=x", "type=hvm", "vnc=1", "vncdisplay=1"], "needs vncpasswd"),
        (["name=x", "bootloader=pygrub"], "bootloader: nonroot does not run bootloaders"),
    ],
)
def test_problems_are_one_sentence(settings: list[str], problem: str) -> None:
    with pytest.raises(NonrootError) as caught:
        read_config(None, settings)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("/a.img,raw,xvda,rw", DiskSpec("xvda", "/a.img")),
        ("format=raw, vdev=xvda, access=ro, target=/a,b=c", DiskSpec("xvda", "/a,b=c", read_only=True)),
        ("phy:/dev/x,hdb,r", DiskSpec("hdb", "/dev/x", read_only=True)),
        ("tap:qcow2:/x,xvda,w", DiskSpec("xvda", "/x", "qcow2")),
        ("/dev/x,hdb,w", None),
        ("/dev/vg/x,,hdb", DiskSpec("hdb", "/dev/vg/x")),
        ("file:/a.iso,raw,hdc,cdrom", DiskSpec("hdc", "/a.iso", read_only=True, is_cd=True)),
        ("a.iso,raw,hdc,devtype=cdrom", DiskSpec("hdc", "/f/a.iso", read_only=True, is_cd=True)),
        (",,hdc:cdrom,r", DiskSpec("hdc", "", read_only=True, is_cd=True)),
        ("/x,vhd,vdev=xvdc,backendtype=qdisk,discard", DiskSpec("xvdc", "/x", "vpc")),
        ("vdev=xvda,target=/x,script=foo", DiskSpec("xvda", "/x,script=foo")),
        ("vdev=xvda,script=foo,target=/x", None),
        ("/x,raw,xvda1,w", None),
        ("/x,raw,sda", DiskSpec("sda", "/x")),
        ("/x,raw,foo,w", None),
        ("/x,raw", None),
        ("/x,raw,xvda,w,more", None),
        ("/x,raw,xvda,colour=blue", None),
        ("/x,raw,xvda,w,vdev=xvdb", None),
        ("vdev=xvda", None),
    ],
)
def test_disks(text: str, spec: DiskSpec | None) -> None:
    if spec is None:
        with pytest.raises(NonrootError):
            parse_disk(text, Path("/f"))
    else:
        assert parse_disk(text, Path("/f")) == spec


def test_names_of_disks() -> None:
    assert [disk_index(name) for name in ("xvda", "hdd", "sdz", "xvdaa")] == [0, 3, 25, 26]


@given(st.text(max_size=60) | st.text(alphabet="=,:/ adevtrgxw", max_size=60))
def test_no_disk_does_harm(text: str) -> None:
    with contextlib.suppress(BadOptionError, UnsupportedError):
        parse_disk(text, Path("/"))


def test_networks_and_disks_of_xen(tmp_path: Path) -> None:
    config = read_config(
        None, ["name=x", "vif=['', 'bridge=lan,mac=00:16:3e:01:02:03']", "nonroot_publish=['8080:80']"]
    )
    assert config.options.networks == ["user", "lan,mac=00:16:3e:01:02:03"]
    assert config.options.publish == ["8080:80"]
    kernel = tmp_path / "vmlinuz-1"
    kernel.write_bytes(b"\x7fELF")
    disks = "disk=['/a,raw,xvda,w', '/b,qcow2,hdb,r', '/c.iso,,hdc,cdrom']"

    def settled(*settings: str) -> DomainOptions:
        config = read_config(None, ["name=x", f"kernel={kernel}", disks, *settings])
        settle_xen(config)
        return config.options

    with_xen = ["/a,format=raw,xvda", "/b,format=qcow2,ro,hdb"]
    assert settled("nonroot_xen=1").disks == with_xen
    # Without a word, a kernel that knows Xen has it.
    without = settled()
    assert without.xen is False
    assert without.disks == ["/a,format=raw", "/b,format=qcow2,ro"]
    with pytest.raises(UnsupportedError, match="vmlinuz-1 has no drivers for them: say nonroot_xen=1 if it has"):
        settled("vif=['']")
    (tmp_path / "config-1").write_text("#\nCONFIG_XEN_PVHVM=y\nCONFIG_HVC_XEN=y\n")
    assert settled().xen is None, "if XenStore can be had"
    assert settled().disks == with_xen
    assert settled("nonroot_xen=0").xen is False
    assert settled("vif=['']").xen is True
    # A card has the same address whenever the domain is started.
    assert re.fullmatch(r"user,mac=00:16:3e(:[0-9a-f]{2}){3}", settled("vif=['']").networks[0])


def test_a_pc_is_xens() -> None:
    config = read_config(None, ["name=x", "disk=['/a,raw,hda,w', '/b,raw,xvdc,w']", "vif=['']"])
    settle_xen(config)
    assert config.options.xen is True
    assert config.options.disks == ["/a,format=raw,hda", "/b,format=raw,xvdc"]
    config = read_config(None, ["name=x", "disk=['/a,raw,hda,w']", "nonroot_xen=0"])
    settle_xen(config)
    assert config.options.xen is False
    assert config.options.disks == ["/a,format=raw"]


def test_numbers_of_domains_grow_and_begin_anew(folder: Path) -> None:
    numbers = [registry.allocate_domid() for _ in range(3)]
    assert numbers == [numbers[0] + n for n in range(3)]
    (folder / "next-domid").write_text(f"{LAST_DOMID}\n")
    assert registry.allocate_domid() == LAST_DOMID
    assert registry.allocate_domid([1, 2]) == 3
    registration = registry.Registration("one", domid=4)
    assert registry.allocate_domid() == 5
    registration.close()
    (folder / "next-domid").write_text("nonsense")
    assert registry.allocate_domid() == 1


def test_what_no_domain_may_be_named() -> None:
    for name in ("5", "0", "Domain-0", "a b", "", "-x"):
        with pytest.raises(BadOptionError, match="is no name for a domain"):
            registry.check_name(name)
    assert registry.check_name("5a") == "5a"


def test_kernels_that_know_xen(tmp_path: Path) -> None:
    """A Linux by its drivers for it; any other by the signature that it compares CPUID with."""
    kernel = tmp_path / "kernel"
    for content, known in (
        (b"\x7fELF Linux version 6.1 XenVMMXenVMM\0", False),
        (b"\x7fELF Linux version 6.1 Xen HVM\0xenboot\0", True),
        (b"\x7fELF another system XenVMMXenVMM\0", True),
        (b"\x7fELF another system", False),
    ):
        kernel.write_bytes(content)
        assert knows_xen(kernel) is known
    assert not knows_xen(tmp_path / "none")
