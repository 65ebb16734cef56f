"""Domain zero and the verbs, with real domains of the built-in guest."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nonroot import guests
from nonroot.api import Domain
from nonroot.domain import registry
from nonroot.errors import BadOptionError, NotRunningError
from nonroot.toolstack import place
from nonroot.toolstack.client import Toolstack
from nonroot.xenstore.client import XenStore
from tests.toolstack.conftest import Run, dom0_pid, until
from tests.waiting import PATIENCE, lives


def create(nonroot: Run, tiny: str, name: str, word: str = "idle", *more: str) -> None:
    outcome = nonroot("create", f"name={name}", f"kernel={tiny}", "memory=16", f"cmdline={word}", *more)
    assert (outcome.status, outcome.err) == (0, "")


def states(nonroot: Run) -> dict[str, str]:
    return {one["name"]: one["state"] for one in nonroot("list", "--json").json}


def test_life_of_two_domains(nonroot: Run, tiny: str, folder: Path, tmp_path: Path) -> None:
    assert not (folder / "dom0").exists() or not place.socket_path().exists()
    config = tmp_path / "alpha.cfg"
    config.write_text(f"kernel = '{tiny}'; memory = 16\ncmdline = 'idle'\nfrobnicate = 1\n")
    outcome = nonroot("create", str(config))
    assert outcome.status == 0
    assert outcome.err == "nonroot: warning: unknown setting 'frobnicate'\n"
    create(nonroot, tiny, "beta", "echo")
    assert stat.S_IMODE(place.folder().stat().st_mode) == 0o700
    assert stat.S_IMODE(place.socket_path().stat().st_mode) == 0o600
    # The table, as xl shows it.
    status, out, _ = nonroot("list")
    lines = [line.split() for line in out.splitlines()]
    assert status == 0
    assert lines[0] == ["Name", "ID", "Mem", "VCPUs", "State", "Time(s)"]
    assert [line[0] for line in lines[1:]] == ["Domain-0", "alpha", "beta"]
    alpha, beta = nonroot("list", "--json").json
    assert (alpha["domid"] + 1, alpha["memory"], alpha["managed"]) == (beta["domid"], 16 << 20, True)
    assert nonroot("domid", "beta").out == f"{beta['domid']}\n"
    assert nonroot("domname", str(alpha["domid"])).out == "alpha\n"
    assert nonroot("vcpu-list", "alpha").out.splitlines()[1].split()[:3] == ["alpha", str(alpha["domid"]), "0"]
    # The domain zero is killed: the domains go on, and the next one knows them.
    nonroot("pause", "alpha")
    os.kill(dom0_pid(), signal.SIGKILL)
    again = nonroot("list", "-l").json
    assert [(one["domid"], one["uuid"], one["pid"], one["state"]) for one in again] == [
        (alpha["domid"], alpha["uuid"], alpha["pid"], "paused"),
        (beta["domid"], beta["uuid"], beta["pid"], "running"),
    ]
    assert again[0]["config"]["cmdline"] == "idle"
    nonroot("unpause", str(alpha["domid"]))
    until(lambda: states(nonroot) == {"alpha": "running", "beta": "running"})
    # Names.
    assert nonroot("rename", "alpha", "beta").err == "nonroot: a domain named 'beta' is running already\n"
    assert nonroot("rename", "alpha", "gamma").status == 0
    assert nonroot("domid", "gamma").out == f"{alpha['domid']}\n"
    assert [entry.name for entry in registry.entries()] == ["beta", "gamma"]
    assert nonroot("create", "name=beta", f"kernel={tiny}", "memory=16").status == 125
    # What cannot be done yet is said of domains that there are.
    assert "balloon driver" in nonroot("mem-set", "beta", "8m").err
    assert nonroot("mem-set", "beta", str(16 << 10)).status == 0
    assert "not started as a Xen domain" in nonroot("block-attach", "beta", "/x,raw,xvdb,w").err
    assert "not started as a Xen domain" in nonroot("network-attach", "beta").err
    assert "has no network interface '0'" in nonroot("network-detach", "beta", "0").err
    assert nonroot("network-list", "--json", "beta").json == []
    assert "there are: beta, gamma" in nonroot("pause", "delta").err.replace("gamma, beta", "beta, gamma")
    assert "has no disk of Xen's 'xvdb'; there is none" in nonroot("block-detach", "beta", "xvdb").err
    assert nonroot("list", "0").out.splitlines()[1].startswith("Domain-0")
    for verb in ("pause", "destroy", "block-list", "console"):
        assert nonroot(verb, "0").err == "nonroot: Domain-0 is nonroot's control process; name a domain\n"
    assert "taken for a number" in nonroot("rename", "beta", "7").err
    # Looking.
    assert nonroot("uptime", "beta").out.splitlines()[1].split()[0] == "beta"
    assert nonroot("top", "-b").out.startswith("NAME ")
    messages = nonroot("dmesg", "gamma").out
    assert "boot protocol pvh" in messages
    assert "renamed from alpha to gamma" in messages
    assert [one["name"] for one in nonroot("vcpu-list", "--json", "gamma").json] == ["gamma"]
    assert nonroot("uptime", "--json", "gamma").json[0]["uptime"] > 0
    assert {one["name"] for one in nonroot("top", "--json").json} == {"beta", "gamma"}
    assert "boot protocol pvh" in nonroot("dmesg", "--json", "gamma").json["messages"][1][1]
    assert nonroot("info", "--json").json["nr_cpus"] == os.cpu_count()
    # Their ends: one by force, one by its own power-off, and then domain zero's.
    pid = dom0_pid()
    assert nonroot("destroy", "gamma").status == 0
    assert not lives(alpha["pid"])
    command = [sys.executable, "-m", "nonroot", "console", "beta"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as console:
        assert console.stdin is not None
        assert console.stdout is not None
        seen = b""
        while b"say something" not in seen:
            seen += os.read(console.stdout.fileno(), 4096)
        out, _ = console.communicate(b"hello\n\x04", timeout=30)
    assert console.returncode == 0
    assert b"hello" in out
    until(lambda: not registry.entries())
    status, out, err = nonroot("list")
    assert (status, out, err) == (0, "", "nonroot: no domain is running\n")
    until(lambda: not lives(pid) and not place.socket_path().exists())
    assert list(place.domains_folder().iterdir()) == []
    assert b"power off" in place.console_path("beta").read_bytes()


def test_the_console_is_a_terminal_as_well(nonroot: Run, tiny: str) -> None:
    create(nonroot, tiny, "beta", "echo", "nonroot_xen=1")
    with XenStore() as store:
        path = store.read(f"/local/domain/{nonroot('domid', 'beta').out.strip()}/console/tty")
    assert path is not None
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    seen = b""
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        while b"say something" not in seen:
            seen += os.read(terminal, 4096)
    finally:
        os.close(terminal)
    # Its users come and go.
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(terminal, b"hello\n")
        while b"hello" not in seen:
            seen += os.read(terminal, 4096)
        os.write(terminal, b"\x04")
    finally:
        os.close(terminal)
    until(lambda: not registry.entries())


def test_without_domains_nothing_is_started(nonroot: Run, folder: Path) -> None:
    before = place.socket_path().exists()
    assert nonroot("list", "--json").json == []
    for verb in ("pause", "domid", "console", "destroy", "block-list"):
        assert nonroot(verb, "nobody").err == "nonroot: there is no domain 'nobody'; none is running\n"
    assert place.socket_path().exists() == before


def test_bad_configurations(nonroot: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.cfg"
    path.write_text("name = 'x'\nmemory = = 3\n")
    assert nonroot("create", str(path)).err == (
        f"nonroot: {path}, line 2, column 10: a number, a string in quotes or a list in [] is expected, not '='\n"
    )
    path.write_bytes(b"name = 'x'\n\xff\n")
    assert "line 2 is not UTF-8" in nonroot("create", str(path)).err
    assert "cannot be read: no such file" in nonroot("create", str(tmp_path / "none.cfg")).err
    assert nonroot("create", "name=x", "kernel=/nowhere").err == (
        "nonroot: the kernel /nowhere cannot be read: no such file or directory\n"
    )
    assert "name a configuration file" in nonroot("create").err
    assert registry.entries() == []


def test_who_may_speak_and_what(folder: Path) -> None:
    with Toolstack() as toolstack:
        with pytest.raises(Exception, match="knows no request 'explode'"):
            toolstack.request("explode")
        with pytest.raises(BadOptionError):
            toolstack.request("create", name="../x", uuid="1", record={"policy": {}, "options": {}})
        with pytest.raises(NotRunningError):
            toolstack.request("find", domain="../x")
        for line in (b"[]\n", b"{\n", b'{"id":"x","method":"list"}\n', b"[" * 100_000 + b"\n"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(20)
                sock.connect(os.fspath(place.socket_path()))
                sock.sendall(line)
                assert sock.recv(1) == b""
        assert toolstack.request("hello")["version"] == 1


@pytest.mark.slow
def test_restarts(nonroot: Run, tiny: str) -> None:
    """A guest that ends is started again as its configuration says, but not for ever."""
    create(nonroot, tiny, "phoenix", "quiet", "on_poweroff=restart")
    seen: set[str] = set()

    def over() -> bool:
        seen.update(one["uuid"] for one in nonroot("list", "--json").json)
        return "phoenix has stopped at once 5 times" in place.log_path().read_text()

    until(over, 60)
    until(lambda: states(nonroot) == {})
    log = [line for line in place.log_path().read_text().splitlines() if " phoenix (" in line]
    assert [line.rpartition("; ")[2] for line in log] == ["restart"] * 4 + ["destroy"]
    numbers = [int(line.partition("(")[2].partition(")")[0]) for line in log]
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    assert len(seen) <= 1


@pytest.mark.slow
def test_the_console_stays_with_a_domain_that_restarts(nonroot: Run, tiny: str) -> None:
    command = [sys.executable, "-m", "nonroot", "create", "-c", "name=again", f"kernel={tiny}", "memory=16"]
    command += ["cmdline=echo", "on_poweroff=restart"]
    numbers = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as console:
        assert console.stdin is not None
        assert console.stdout is not None
        for _ in range(3):
            seen = b""
            while b"say something" not in seen:
                data = os.read(console.stdout.fileno(), 4096)
                assert data, seen
                seen += data
            numbers.append(int(nonroot("domid", "again").out))
            if len(numbers) < 3:
                console.stdin.write(b"\x04")
                console.stdin.flush()
        nonroot("destroy", "again")
        assert console.wait(30) == 0
    assert numbers == sorted(set(numbers))


@pytest.mark.slow
def test_media_and_keys(nonroot: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "a.iso").write_bytes(bytes(1 << 20))
    disks = f"disk=['{tmp_path}/a.iso,raw,hdc,cdrom', ',,hdd,cdrom']"
    create(nonroot, tiny, "pc", "idle", "type=hvm", disks)
    assert [one["target"] for one in nonroot("block-list", "--json", "pc").json] == [str(tmp_path / "a.iso"), ""]
    assert nonroot("cd-eject", "pc", "hdc").status == 0
    assert nonroot("cd-insert", "pc", "hdd", str(tmp_path / "a.iso")).status == 0
    assert [one["target"] for one in nonroot("block-list", "--json", "pc").json] == ["", str(tmp_path / "a.iso")]
    assert "there are: hdc, hdd" in nonroot("cd-insert", "pc", "hda", str(tmp_path / "a.iso")).err
    assert "does not exist" in nonroot("cd-insert", "pc", "hdc", str(tmp_path / "b.iso")).err
    assert "(empty)" in nonroot("block-list", "pc").out
    assert nonroot("sysrq", "pc", "s").status == 0
    assert "is no SysRq key" in nonroot("sysrq", "pc", "xx").err
    first = nonroot("list", "--json").json[0]
    assert nonroot("reboot", "-F", "-w", "--timeout", "30", "pc").status == 0
    again = until(lambda: nonroot("list", "--json").json)[0]
    assert (again["name"], again["domid"] > first["domid"]) == ("pc", True)
    assert [one["target"] for one in again["disks"]] == ["", str(tmp_path / "a.iso")]
    nonroot("destroy", "pc")


@pytest.mark.slow
def test_paused_from_the_start(nonroot: Run, tiny: str) -> None:
    create(nonroot, tiny, "later", "echo", "-p")
    assert nonroot("list", "--json").json[0]["state_letters"] == "--p---"
    assert "unpause it first" in nonroot("shutdown", "later").err
    assert nonroot("console", "--log", "later").out == ""
    nonroot("unpause", "later")
    until(lambda: "say something" in nonroot("console", "--log", "later").out)
    nonroot("destroy", "later")


@pytest.mark.slow
def test_crashes(nonroot: Run, tiny: str) -> None:
    create(nonroot, tiny, "keep", "crash", "on_crash=preserve")
    until(lambda: states(nonroot) == {"keep": "stopped"})
    kept = nonroot("list", "--json").json[0]
    assert (kept["state_letters"], kept["reason"]) == ("----c-", "triple_fault")
    assert "has stopped (triple_fault)" in nonroot("pause", "keep").err
    assert "stopped: triple_fault at 0x" in nonroot("dmesg", "keep").out
    nonroot("destroy", "keep")
    create(nonroot, tiny, "twice", "crash", "on_crash=rename-restart")
    until(lambda: {"twice-1", "twice-2"} <= set(states(nonroot)))
    os.kill(dom0_pid(), signal.SIGKILL)
    assert {"twice-1", "twice-2"} <= set(states(nonroot))
    until(lambda: "twice" not in states(nonroot))
    for name in states(nonroot):
        nonroot("destroy", name)
    assert registry.entries() == []


@pytest.mark.slow
def test_a_domain_whose_process_is_killed_or_hangs(nonroot: Run, tiny: str) -> None:
    create(nonroot, tiny, "killed", "idle", "on_crash=restart")
    create(nonroot, tiny, "hung")
    first, hung = nonroot("list", "--json").json
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: [d["domid"] for d in nonroot("list", "--json").json if d["name"] == "killed"] > [hung["domid"]])
    os.kill(hung["pid"], signal.SIGSTOP)
    began = time.monotonic()
    assert nonroot("destroy", "hung").status == 0
    assert time.monotonic() - began < PATIENCE
    assert not lives(hung["pid"])
    nonroot("destroy", "killed")


@pytest.mark.slow
def test_domains_of_others_are_in_the_list(nonroot: Run, tiny: str) -> None:
    with Domain(kernel=tiny, append="idle", agent=False, memory="16M", name="mine") as domain:
        found = nonroot("list", "--json").json
        assert [(one["name"], one["pid"], one["managed"]) for one in found] == [("mine", domain.pid, False)]
        assert nonroot("list", str(found[0]["domid"])).status == 0
        assert "not made by nonroot create" in nonroot("reboot", "mine").err
        assert nonroot("destroy", "mine").status == 0
        until(lambda: not registry.entries())


@pytest.mark.slow
def test_several_creations_at_once(nonroot: Run, tiny: str) -> None:
    common = [sys.executable, "-m", "nonroot", "create", f"kernel={tiny}", "memory=16", "cmdline=idle"]
    names = ("one", "two", "one")
    started = [subprocess.Popen([*common, f"name={name}"], stderr=subprocess.PIPE) for name in names]
    statuses = [(process.communicate(timeout=60), process.returncode)[1] for process in started]
    assert sorted(statuses) == [0, 0, 125]
    assert set(states(nonroot)) == {"one", "two"}
    assert nonroot("shutdown", "-w", "--timeout", "0.5", "one").status == 124  # it does not heed its power button
    assert nonroot("destroy", "one").status == nonroot("destroy", "two").status == 0


@pytest.mark.slow
def test_debian_on_its_console(nonroot: Run) -> None:
    """Debian's kernel by PVH: a shell on the console, left and found again, a reboot by the guest, its power-off."""
    if not guests.linux(allow_fetch=False).is_linux:
        pytest.skip("Debian's kernel has not been fetched")
    assert nonroot("create", "name=debian", "memory=128").status == 0
    first = int(nonroot("domid", "debian").out)

    def console(*options: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "nonroot", "console", *options, "debian"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(process: "subprocess.Popen[bytes]", *marks: bytes) -> None:
        assert process.stdout is not None
        seen = b""
        for mark in marks:
            while mark not in seen:
                data = os.read(process.stdout.fileno(), 4096)
                assert data, seen
                seen += data
            seen = seen.partition(mark)[2]

    def write(process: "subprocess.Popen[bytes]", text: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.flush()

    with console() as process:
        read(process, b"is up", b"# ")
        write(process, b"echo done-$((40+2))\n")
        read(process, b"done-42")
        process.terminate()
    with console() as process:
        read(process, b"is up", b"done-42", b"# ")  # what is kept of the past
        write(process, b"reboot -f\n")
        read(process, b"is up", b"# ")
        assert int(nonroot("domid", "debian").out) > first
        process.communicate(b"poweroff -f\n", timeout=60)
        assert process.returncode == 0
    until(lambda: not registry.entries(), 60)


@pytest.mark.slow
def test_a_xen_domain_is_in_xenstore_by_its_number(nonroot: Run, tiny: str) -> None:
    create(nonroot, tiny, "xenial", "idle", "nonroot_xen=1")
    domid = int(nonroot("domid", "xenial").out)
    with XenStore() as store:
        assert store.read(f"/local/domain/{domid}/name") == "xenial"
        assert nonroot("shutdown", "--json", "xenial").json["by"] == "xenstore"
        assert store.read(f"/local/domain/{domid}/control/shutdown") == "poweroff"
        assert nonroot("mem-set", "xenial", "8m").status == 0
        assert nonroot("destroy", "xenial").status == 0
