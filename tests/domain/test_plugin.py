"""The pytest plugin, in a pytest of its own, with guests on this machine."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nonroot.guests import cached

HERE = Path(__file__).parent


def run(tmp_path: Path, native_program: Path, tests: str, *arguments: str) -> str:
    (tmp_path / "kernel").write_bytes(b"\x7fELF\x02")
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent(f"""\
        import sys
        import pytest
        from nonroot.domain import client
        client.PROGRAM[:] = [sys.executable, {str(HERE / "native_runner.py")!r}]

        @pytest.fixture(scope="session")
        def domain_options():
            return {{"kernel": {str(tmp_path / "kernel")!r}, "initrd": {str(tmp_path / "kernel")!r}}}
        """)
    )
    (tmp_path / "test_it.py").write_text(textwrap.dedent(tests))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    environment = dict(
        os.environ, NONROOT_TEST_AGENT=str(native_program), PYTHONPATH=path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    command = [sys.executable, "-m", "pytest", "-p", "nonroot.testing.plugin", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    return result.stdout + result.stderr


SHARED = """
    pids = []

    def test_one(domain):
        assert domain.run("echo one").stdout == "one\\n"
        pids.append(domain.pid)

    def test_two(domain):
        pids.append(domain.pid)
        assert (pids[0] == pids[1]) == {same}

    def test_more(make_domain, domain):
        other = make_domain(append="more")
        assert other.pid != domain.pid
        assert other.run("echo two").returncode == 0
"""


@pytest.mark.parametrize(("scope", "same"), [("module", True), ("function", False)])
def test_fixtures_and_scopes(tmp_path: Path, native_program: Path, scope: str, same: bool) -> None:
    output = run(tmp_path, native_program, SHARED.format(same=same), "--nonroot-scope", scope)
    assert "3 passed" in output, output


def test_a_failure_shows_the_console(tmp_path: Path, native_program: Path) -> None:
    tests = """
        def test_bad(domain, make_domain):
            domain.console.expect("Linux version")
            make_domain().console.expect("Linux version")
            assert domain.run("false").returncode == 0
    """
    output = run(tmp_path, native_program, tests)
    assert "1 failed" in output
    assert output.count("Linux version 0.0 (test)") == 2
    assert "console of domain 1" in output


def test_a_wrong_scope_is_a_usage_error(tmp_path: Path, native_program: Path) -> None:
    output = run(tmp_path, native_program, "def test(domain): pass", "-o", "nonroot_scope=galaxy")
    assert "nonroot_scope must be one of" in output


def test_without_linux_tests_are_skipped_or_fail(tmp_path: Path, native_program: Path) -> None:
    tests = """
        import pytest
        from nonroot import guests
        from nonroot.errors import SoftwareMissingError

        @pytest.fixture(scope="session")
        def domain_options():
            return {}

        @pytest.fixture(scope="session", autouse=True)
        def nothing():
            def missing(*arguments, **options):
                raise SoftwareMissingError("no network here")
            guests.linux = missing

        def test(domain):
            pass
    """
    output = run(tmp_path, native_program, tests, "-rs")
    assert "1 skipped" in output
    assert "no network here" in output
    assert "1 error" in run(tmp_path, native_program, tests, "--nonroot-require")


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_test_has_a_fresh_domain(tmp_path: Path) -> None:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""\
        import pytest

        pids = []

        @pytest.fixture(scope="session")
        def domain_options():
            return {"memory": "128M"}

        @pytest.mark.parametrize("n", range(4))
        def test_fresh(fresh_domain, n):
            pids.append(fresh_domain.pid)
            assert fresh_domain.run(["test", "-e", "/tmp/mark"]).returncode == 1
            assert fresh_domain.run(["touch", "/tmp/mark"]).returncode == 0
            assert len(set(pids)) == 1

        def test_end(fresh_domain):
            fresh_domain.shutdown()

        def test_another(fresh_domain):
            assert fresh_domain.pid not in pids
            assert fresh_domain.run(["test", "-e", "/tmp/mark"]).returncode == 1
        """)
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    command = [sys.executable, "-m", "pytest", "-p", "nonroot.testing.plugin", "-p", "no:cacheprovider", "-q"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert "6 passed" in result.stdout, result.stdout + result.stderr
