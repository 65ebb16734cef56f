"""The store and a simple model of it, side by side, in random histories of three domains with transactions."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.permissions import Permissions, parse_permissions
from nonroot.xenstore.session import Session
from nonroot.xenstore.store import Record, Store
from tests.xenstore.model import Model, Path, Perms

NAMES = st.sampled_from("ab")
PATHS = st.one_of(st.lists(NAMES, max_size=3).map(tuple), st.sampled_from([("a",), ("a", "b")]))
DOMAINS = st.integers(0, 2)
CALLERS = st.sampled_from([0, 0, 1, 2])
LETTERS = st.sampled_from("nrwb")
PERMS = st.lists(st.tuples(DOMAINS, LETTERS), min_size=1, max_size=3).map(tuple)
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["read", "directory", "get_perms", "mkdir", "rm"]), PATHS, st.none()),
    st.tuples(st.just("write"), PATHS, st.binary(max_size=2)),
    st.tuples(st.just("set_perms"), PATHS, PERMS),
)
Step = tuple[str, Path, Any]


def shown(permissions: Permissions) -> Perms:
    return tuple((entry.domid, str(entry)[0]) for entry in permissions)


def ask(session: Session, step: Step, number: int) -> Any:
    operation, names, argument = step
    path = "/" + "/".join(names)
    try:
        match operation:
            case "read":
                return session.read(path, number)
            case "directory":
                return sorted(session.directory(path, number)[1])
            case "get_perms":
                return shown(session.get_permissions(path, number))
            case "set_perms":
                entries = parse_permissions([f"{letter}{domid}" for domid, letter in argument])
                return session.set_permissions(path, entries, number)
            case "write":
                return session.write(path, argument, number)
        return getattr(session, operation)(path, number)
    except StoreError as error:
        return error.code


@dataclass
class Open:
    """A transaction: what it has seen and done so far."""

    domid: int
    number: int
    seen: Model
    began: int
    steps: list[tuple[Step, Any]] = field(default_factory=list)
    changed: bool = False


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.history: list[Record] = []
        self.store = Store(record=self.history.extend)
        self.model = Model()
        self.commits = 0
        self.open: list[Open] = []
        self.events: list[str] = []
        self.store.introduce(1, 1, 1)
        self.store.introduce(2, 1, 1)
        watcher = self.store.connect(lambda path, token: self.events.append(path))
        watcher.watch("/", "t")
        self.store.flush()
        self.events.clear()
        self.sessions = [self.store.connect(), *(self.store.attach(each, lambda path, token: None) for each in (1, 2))]
        for home in (("a",), ("b",)):
            self.step(0, ("mkdir", home, None))
        self.step(0, ("set_perms", ("a",), ((1, "r"),)))
        self.step(0, ("set_perms", ("b",), ((2, "b"),)))

    @rule(domid=CALLERS, step=OPERATIONS)
    def step(self, domid: int, step: Step) -> None:
        before = dict(self.model.nodes)
        expected = self.model.do(domid, *step)
        assert ask(self.sessions[domid], step, 0) == expected
        self.commits += bool(self.model.fired) or before != self.model.nodes
        self.check_events(exactly=True)

    @rule(domid=CALLERS)
    def start(self, domid: int) -> None:
        if len(self.open) < 4:
            number = self.sessions[domid].start()
            self.open.append(Open(domid, number, self.model.copy(), self.commits))

    @rule(data=st.data(), step=OPERATIONS)
    def step_inside(self, data: st.DataObject, step: Step) -> None:
        if not self.open:
            return
        self.do_inside(data.draw(st.sampled_from(self.open)), step)

    def do_inside(self, one: Open, step: Step) -> None:
        reply = ask(self.sessions[one.domid], step, one.number)
        fired = len(one.seen.fired)
        assert reply == one.seen.do(one.domid, *step)
        one.changed |= len(one.seen.fired) != fired
        one.steps.append((step, reply))

    @rule(data=st.data(), commit=st.booleans())
    def end(self, data: st.DataObject, commit: bool) -> None:
        if not self.open:
            return
        self.finish(data.draw(st.sampled_from(self.open)), commit)

    @rule(
        inside=st.lists(OPERATIONS, min_size=1, max_size=3),
        outside=st.lists(OPERATIONS, min_size=1, max_size=2),
        domid=CALLERS,
    )
    def interleave(self, inside: list[Step], outside: list[Step], domid: int) -> None:
        """A transaction that does something, while domain 0 does something else."""
        one = Open(domid, self.sessions[domid].start(), self.model.copy(), self.commits)
        for step in inside:
            self.do_inside(one, step)
        for step in outside:
            self.step(0, step)
        self.do_inside(one, ("write", ("c",) if domid == 0 else ("b", "c"), b"!"))
        self.finish(one, commit=True)

    def finish(self, one: Open, commit: bool) -> None:
        if one in self.open:
            self.open.remove(one)
        try:
            self.sessions[one.domid].end(one.number, commit)
        except StoreError as error:
            code = error.code
        else:
            code = ""
        if code:
            assert code == "EAGAIN"
            assert commit
            assert one.changed
            assert self.commits > one.began, "a conflict with nobody"
            return
        if commit and one.changed:
            # It must be as if all of it had been done now.
            for step, reply in one.steps:
                assert self.model.do(one.domid, *step) == reply
            self.commits += 1
            self.check_events(exactly=False)

    def check_events(self, *, exactly: bool) -> None:
        self.store.flush()
        expected = ["/" + "/".join(path) for path in self.model.fired]
        assert self.events == expected if exactly else self.events == list(dict.fromkeys(expected))
        self.events.clear()
        self.model.fired.clear()

    @invariant()
    def same_nodes(self) -> None:
        assert not self.store.check()
        found: dict[Path, tuple[bytes, Perms]] = {}
        waiting: list[Path] = [()]
        session = self.sessions[0]
        while waiting:
            names = waiting.pop()
            path = "/" + "/".join(names)
            found[names] = (session.read(path), shown(session.get_permissions(path)))
            waiting += [(*names, name) for name in session.directory(path)[1]]
        assert found == self.model.nodes

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        again = Store()
        again.restore(self.history)
        skip = ("epoch",)
        assert sorted(str(r) for r in again.records() if r[0] not in skip) == sorted(
            str(r) for r in self.store.records() if r[0] not in skip
        )


def sized(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=examples < 100,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


TestStore = StoreMachine.TestCase
TestStore.settings = sized(12, 20)


@pytest.mark.slow
def test_long_histories() -> None:
    run_state_machine_as_test(StoreMachine, settings=sized(200, 40))
