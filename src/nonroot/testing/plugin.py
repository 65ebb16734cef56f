r"""The pytest plugin: fixtures that give tests a booted guest. Installed with nonroot; pytest finds it by itself.

* ``domain``: a booted domain, shared by the tests of a module; the option ``--nonroot-scope`` or the ini option
  ``nonroot_scope`` makes it one per ``session``, ``package``, ``module``, ``class`` or ``function``. With ``function``,
  each is a fork of one boot, if the domain can be forked.
* ``fresh_domain``: for each test, a domain as it was when it was ready for its first command: it is booted once, and
  goes back to its snapshot then.
* ``make_domain``: a function that makes and starts further domains, which end with the test.
* ``domain_options``: override it (in a conftest.py, or a module) to return arguments of :class:`nonroot.Domain`.

>>> def test_kernel(domain):                         # doctest: +SKIP
...     assert domain.run(["uname", "-s"], check=True).stdout == "Linux\n"

A failed test shows the last lines of its domains' consoles. Where no Linux can be had, tests that use these
fixtures are skipped, with the reason; ``--nonroot-require`` makes that an error.
"""

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nonroot.api import Domain

__all__ = ["domain", "domain_options", "fresh_domain", "make_domain"]

SCOPES = ("session", "package", "module", "class", "function")
CONSOLE_LINES = 30
_OPTIONS = ("engine", "memory", "flavour")

_used: "pytest.StashKey[list[Domain]]" = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("nonroot", "guests in domains")
    group.addoption("--nonroot-scope", choices=SCOPES, help="how many tests share the `domain` fixture's guest")
    group.addoption("--nonroot-engine", metavar="NAME", help="what executes the guests (default: auto)")
    group.addoption("--nonroot-memory", metavar="SIZE", help="memory of each guest (default: 256M)")
    group.addoption("--nonroot-flavour", metavar="NAME", help="Debian's kernel to boot (default: cloud-amd64)")
    group.addoption("--nonroot-require", action="store_true", help="fail, not skip, where no Linux can be had")
    parser.addini("nonroot_scope", "how many tests share the `domain` fixture's guest", default="module")


def _scope(fixture_name: str, config: pytest.Config) -> Any:
    chosen = config.getoption("--nonroot-scope") or config.getini("nonroot_scope")
    if chosen not in SCOPES:
        raise pytest.UsageError(f"nonroot_scope must be one of {', '.join(SCOPES)}, not {chosen!r}")
    return chosen


@pytest.fixture(scope="session")
def domain_options() -> dict[str, Any]:
    """Arguments of :class:`nonroot.Domain` for the ``domain`` fixture; override it."""
    return {}


@pytest.fixture(scope=_scope)
def domain(request: pytest.FixtureRequest, domain_options: dict[str, Any]) -> "Iterator[Domain]":
    """A booted domain that is shared by the tests of its scope. Leave it as you found it."""
    made = None
    if request.scope == "function":
        made = _fork(request.config, domain_options, request.getfixturevalue("_nonroot_bases"))
    made = made or _boot(request.config, domain_options)
    try:
        yield made
    finally:
        made.destroy()


@pytest.fixture(scope="session")
def _nonroot_bases() -> "Iterator[dict[str, Domain | None]]":
    bases: dict[str, Domain | None] = {}
    yield bases
    for one in bases.values():
        if one is not None:
            one.destroy()


@pytest.fixture(scope="session")
def _nonroot_boots() -> "Iterator[dict[str, Domain]]":
    boots: dict[str, Domain] = {}
    yield boots
    for one in boots.values():
        one.destroy()


@pytest.fixture
def fresh_domain(
    request: pytest.FixtureRequest, domain_options: dict[str, Any], _nonroot_boots: "dict[str, Domain]"
) -> "Domain":
    """A domain as it was after its boot. Tests with the same ``domain_options`` get the same one, put back for each.

    One that cannot be put back, because a test ended it or attached devices, is booted anew.
    """
    from nonroot.errors import NonrootError

    key = repr(sorted(domain_options.items()))
    made = _nonroot_boots.pop(key, None)
    if made is not None:
        try:
            if made.stopped is None:
                made.revert()
                _nonroot_boots[key] = made
                return made
        except (NonrootError, TimeoutError):
            pass
        made.destroy()
    made = _nonroot_boots[key] = _boot(request.config, {"kept": True} | domain_options)
    made.wait_ready()
    made.snapshot()
    return made


@pytest.fixture
def make_domain(request: pytest.FixtureRequest, domain_options: dict[str, Any]) -> "Iterator[Callable[..., Domain]]":
    """Makes domains (:class:`nonroot.Domain`'s arguments, on top of ``domain_options``) that end with the test."""
    made: list[Domain] = []
    request.node.stash[_used] = made

    def make(**options: Any) -> "Domain":
        one = _boot(request.config, domain_options | options)
        made.append(one)
        return one

    yield make
    for one in made:
        one.destroy()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the guests said if a test fails."""
    report = yield
    if report.failed:
        made = item.stash.get(_used, None)
        domains = [] if made is None else made.copy()
        for name in ("domain", "fresh_domain"):
            shared = getattr(item, "funcargs", {}).get(name)
            if shared is not None and hasattr(shared, "console"):
                domains.append(shared)
        for number, one in enumerate(domains):
            lines = one.console.text.splitlines()[-CONSOLE_LINES:]
            report.sections.append((f"console of domain {number}", "\n".join(lines)))
    return report


def _fork(config: pytest.Config, options: dict[str, Any], bases: "dict[str, Domain | None]") -> "Domain | None":
    """A fork of the boot that all tests with these options share; None if it cannot be forked."""
    from nonroot.errors import NonrootError

    key = repr(sorted(options.items()))
    base = bases.get(key)
    if key not in bases:
        base = _boot(config, {"kept": True} | options)
        base.wait_ready()
    try:
        made = None if base is None else base.fork()
    except NonrootError:
        assert base is not None
        base.destroy()
        base = made = None
    bases[key] = base
    return made


def _boot(config: pytest.Config, options: dict[str, Any]) -> "Domain":
    from nonroot.api import Domain
    from nonroot.errors import SoftwareMissingError

    given = {name: config.getoption(f"--nonroot-{name}") for name in _OPTIONS}
    made = Domain(**{name: value for name, value in given.items() if value is not None} | options)
    try:
        made.start()
    except SoftwareMissingError as error:
        _missing(config, str(error))
    if not made.can_run_commands and options.get("agent", True):
        made.destroy()
        _missing(config, made.note or "there is no Linux to boot")
    return made


def _missing(config: pytest.Config, reason: str) -> None:
    if config.getoption("--nonroot-require"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
