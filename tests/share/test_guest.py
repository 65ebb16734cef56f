"""Debian's kernel with folders of this machine: what it does there is there, and what it may not do is refused."""

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nonroot
from nonroot.errors import BadFileError, BadOptionError
from tests.needed import need
from tests.waiting import lives, wait_until

MIB = 1 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("both", "fixed"):
        (folder / name).mkdir()
    (folder / "secret").write_text("secret")
    (folder / "fixed/text").write_text("fixed")
    (folder / "fixed/up").symlink_to("../secret")
    return folder


@pytest.fixture(scope="module")
def domain(place: Path) -> Iterator[nonroot.Domain]:
    need("cloud-amd64")
    shares = [f"{place}/both:/mnt/both", f"{place}/fixed:/mnt/fixed:ro"]
    with nonroot.Domain(flavour="cloud-amd64", shares=shares) as made:
        yield made


def sh(domain: nonroot.Domain, script: str) -> str:
    result = domain.run(["sh", "-c", f"cd /mnt/both; {script}"], timeout=200)
    assert result.returncode == 0, (result.stdout, result.stderr)
    return str(result.stdout)


def servers(pid: int) -> list[int]:
    """Processes that serve folders of that domain's process, the oldest first."""
    found: list[tuple[int, int]] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and b"share_server" in (entry / "cmdline").read_bytes():
                    found.append((int(fields[19]), int(entry.name)))
            except OSError:
                pass
    return [number for _, number in sorted(found)]


guest_test = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]


class TestInOneGuest:
    """The same guest for all: booting takes longer than most of these."""

    pytestmark = guest_test

    def test_large_files_are_the_same_on_both_sides(self, domain: nonroot.Domain, place: Path) -> None:
        data = os.urandom(50 * MIB)
        (place / "both/large").write_bytes(data)
        expected = hashlib.sha256(data).hexdigest()
        assert sh(domain, "sha256sum < large").split()[0] == expected
        sh(domain, "cp large copy && sync")
        assert hashlib.sha256((place / "both/copy").read_bytes()).hexdigest() == expected
        assert sh(domain, "dd if=/dev/urandom bs=333 count=1500 of=odd 2>/dev/null; sha256sum odd").split()[0] == (
            hashlib.sha256((place / "both/odd").read_bytes()).hexdigest()
        )
        sh(domain, "rm large copy odd")

    def test_a_thousand_small_files(self, domain: nonroot.Domain, place: Path) -> None:
        sh(domain, "mkdir many; cd many; i=0; while [ $i -lt 1000 ]; do echo file $i > f$i; i=$((i+1)); done")
        many = place / "both/many"
        assert {path.name for path in many.iterdir()} == {f"f{index}" for index in range(1000)}
        assert all((many / f"f{index}").read_text() == f"file {index}\n" for index in range(1000))
        for index in range(300):
            (many / f"h{index}").write_text(f"{index}\n")
        told = sh(domain, "cd many; ls | wc -l; cat h* | awk '{s+=$1} END {print s}'; find . -type f | wc -l")
        assert told.split() == ["1300", "44850", "1300"]
        sh(domain, "rm -r many")
        assert not many.exists()

    def test_names_modes_links_and_sizes(self, domain: nonroot.Domain, place: Path) -> None:
        both = place / "both"
        sh(
            domain,
            """
            mkdir -p a/b && echo one > a/one && chmod 750 a/one && ln a/one hard && ln -s a/one soft
            mv a/one a/b/two && [ "$(cat hard)" = one ] && ! cat soft 2>/dev/null
            [ $(stat -c %h hard) = 2 ] && [ $(stat -c %u:%g:%a hard) = 0:0:750 ]
            dd if=/dev/zero of=cut bs=1000 count=10 2>/dev/null && truncate -s 1234 cut && [ $(stat -c %s cut) = 1234 ]
            touch -d '2001-02-03 04:05:06' cut && mkfifo pipe && (echo through > pipe & [ "$(cat pipe)" = through ])
            mkdir full && touch full/x && ! rmdir full 2>/dev/null && ! mknod null c 1 3 2>/dev/null
            ! chmod u+s cut 2>/dev/null && ! chown 7 cut 2>/dev/null && chown 0 cut
            """,
        )
        assert (both / "a/b/two").read_text() == "one\n"
        assert stat.S_IMODE((both / "hard").stat().st_mode) == 0o750
        assert str((both / "soft").readlink()) == "a/one"
        assert (both / "hard").stat().st_ino == (both / "a/b/two").stat().st_ino
        assert ((both / "cut").stat().st_size, (both / "cut").stat().st_mtime) == (1234, 981173106)
        assert (both / "pipe").is_fifo()
        assert (both / "cut").stat().st_uid == os.getuid()
        sh(domain, 'rm -r a hard soft cut pipe full; [ -z "$(ls -A)" ]')

    def test_appending_and_open_files_without_names(self, domain: nonroot.Domain, place: Path) -> None:
        told = sh(
            domain,
            """
            exec 3>>log; echo one >&3
            exec 4<>open; echo still >&4; rm open; exec 5</proc/self/fd/4; stat -L -c %h /proc/self/fd/4
            """,
        )
        assert told.split() == ["0"]
        with (place / "both/log").open("a") as file:
            file.write("host\n")
        sh(domain, "echo two >> log")
        assert (place / "both/log").read_text() == "one\nhost\ntwo\n"
        (place / "both/log").unlink()

    def test_changes_of_this_machine_are_seen_after_a_second(self, domain: nonroot.Domain, place: Path) -> None:
        file = place / "both/text"
        file.write_text("first")
        assert sh(domain, "cat text") == "first"
        file.write_text("second, and longer")
        (place / "both/new").mkdir()
        assert sh(domain, "sleep 1.1; cat text; ls -d new") == "second, and longernew\n"
        file.unlink()
        assert sh(domain, "sleep 1.1; ls; rmdir new") == "new\n"

    def test_programs_are_executed_from_the_share(self, domain: nonroot.Domain, place: Path) -> None:
        sh(
            domain,
            "cp /bin/busybox . && printf '#!/mnt/both/busybox sh\\necho $0 says $1\\n' > script; chmod +x script",
        )
        assert sh(domain, "./script hello") == "./script says hello\n"
        shutil.copy(place / "both/busybox", place / "fixed/busybox")
        assert sh(domain, "/mnt/fixed/busybox echo fixed too") == "fixed too\n"
        sh(domain, "rm busybox script")
        (place / "fixed/busybox").unlink()

    def test_libraries_are_mapped_and_locks_hold_in_the_guest(self, domain: nonroot.Domain, place: Path) -> None:
        """A program of this machine with its libraries: flock."""
        program = shutil.which("flock")
        if program is None or shutil.which("ldd") is None:
            pytest.skip("there is no flock on this machine")
        needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        files = [word for word in needed.split() if word.startswith("/")]
        for path in [program, *files]:
            shutil.copy(path, place / "both")
        (loader,) = [Path(path).name for path in files if Path(path).name.startswith("ld-")]
        flock = f"./{loader} --library-path . ./flock -n"
        script = f"exec 9>lock 8<lock; {flock} 9 && ! {flock} 8 && exec 9>&- && {flock} 8 && echo locked; rm *"
        assert sh(domain, script) == "locked\n"

    def test_what_is_read_only_stays_even_if_the_guest_mounts_it_otherwise(
        self, domain: nonroot.Domain, place: Path
    ) -> None:
        before = [(path.name, path.lstat().st_mtime_ns) for path in (place / "fixed").iterdir()]
        attempts = """
            for try in 'echo x > text' 'echo x >> text' 'rm text' 'mv text other' 'mkdir d' 'ln text l' 'ln -s a s' \\
                       'chmod 777 text' 'touch text' 'truncate -s 0 text' 'mkfifo p' 'chown 0 text'; do
                sh -c "$try" 2>/dev/null && echo "$try"
            done; cat text"""
        told = sh(domain, f"cd /mnt/fixed; {attempts}; mount -o remount,rw /mnt/fixed; {attempts}; true")
        assert told == "fixedfixed"
        assert sh(domain, "grep -c 'fixed virtiofs rw' /proc/mounts; mount -o remount,ro /mnt/fixed") == "1\n"
        assert [(path.name, path.lstat().st_mtime_ns) for path in (place / "fixed").iterdir()] == before
        assert (place / "fixed/text").read_text() == "fixed"

    def test_there_is_no_way_out(self, domain: nonroot.Domain, place: Path) -> None:
        script = f"""
            ln -s {place}/secret absolute; ln -s ../../../../../../../../{place}/secret relative; ln -s .. up
            cat absolute relative ../secret up/secret /mnt/fixed/up /mnt/fixed/../secret; ls -a up; true
        """
        result = domain.run(["sh", "-c", f"cd /mnt/both; {script}"])
        assert "secret" not in result.stdout
        assert set(result.stdout.split()) == {".", "..", "both", "fixed"}
        sh(domain, "rm absolute relative up")
        assert (place / "secret").read_text() == "secret"

    def test_it_can_be_mounted_anew(self, domain: nonroot.Domain, place: Path) -> None:
        (place / "both/here").touch()
        script = "umount /mnt/both && ls /mnt/both && mount -t virtiofs share0 /mnt/both && ls /mnt/both"
        result = domain.run(["sh", "-c", f"for i in 1 2 3; do {script}; done; rm /mnt/both/here"])
        assert (result.stdout, result.stderr) == ("here\n" * 3, "")

    def test_a_lost_server_gives_errors_and_a_killed_domain_leaves_no_process(
        self, domain: nonroot.Domain, place: Path
    ) -> None:
        both, fixed = servers(domain.pid)
        os.kill(both, signal.SIGKILL)
        result = domain.run(["sh", "-c", "ls /mnt/both; cat /mnt/fixed/text"])
        assert result.stdout == "fixed"
        assert "not connected" in result.stderr
        domain.kill()
        wait_until(lambda: not lives(fixed))


@pytest.mark.parametrize("flavour", ["cloud-amd64", "686-pae"])
@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shares_of_a_guest_without_xen_on_the_command_line(flavour: str, tmp_path: Path) -> None:
    need(flavour)
    (tmp_path / "in").write_bytes(os.urandom(MIB))
    command = [sys.executable, "-P", "-m", "nonroot", "run", "--no-xen", "--flavour", flavour, "--share"]
    command += [
        f"{tmp_path}:/deep/er",
        "-w",
        "/deep/er",
        "--",
        "sh",
        "-c",
        "sha256sum in | tee out; grep er /proc/mounts",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split()[0] == hashlib.sha256((tmp_path / "in").read_bytes()).hexdigest()
    assert (tmp_path / "out").read_text() in result.stdout
    assert "share0 /deep/er virtiofs rw,nodev" in result.stdout


def test_what_cannot_be_shared_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadFileError, match="the folder .*/none does not exist"):
        nonroot.Domain(shares=[f"{tmp_path}/none:/mnt"]).start()
    with pytest.raises(BadFileError, match="/file is not a folder, so it cannot be shared"):
        nonroot.Domain(shares=[f"{tmp_path}/file:/mnt"]).start()
    with pytest.raises(BadOptionError, match="cannot be had in virtual time"):
        nonroot.Domain(shares=[f"{tmp_path}:/mnt"], virtual_time=True).start()
    with pytest.raises(BadOptionError, match="is no shared folder"):
        nonroot.Domain(shares=["/a"])
