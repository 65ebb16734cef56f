"""Domain zero: the table of this user's domains, and what is done with them.

It starts and watches the domains' processes, and does what their configurations want when they stop. The processes do
not need it: they go on when it is killed, and the next one finds them again by the list of running domains
(:mod:`nonroot.domain.registry`) and its own records. Nothing that a guest wrote reaches it: consoles and screens go
from a domain's process to whoever looks at them.
"""

import asyncio
import contextlib
import os
import sys
import time
import uuid as uuids
from collections import Counter
from dataclasses import asdict
from typing import Any, Final

from nonroot.domain import registry
from nonroot.domain.options import DomainOptions
from nonroot.errors import (
    BadOptionError,
    DomainLostError,
    NonrootError,
    NotRunningError,
    TransientError,
    UnsupportedError,
    WaitTimeoutError,
)
from nonroot.toolstack import place, table
from nonroot.toolstack.config import ACTIONS, Policy
from nonroot.toolstack.devices import DeviceVerbs, number_cards
from nonroot.toolstack.link import Link
from nonroot.toolstack.table import CRASHES, Known

__all__ = ["DomainZero"]

CREATE_SECONDS: Final = 300.0
SAVE_SECONDS: Final = 600.0
SHORT_LIFE: Final = 3.0
"""Seconds; a domain that has lived no longer when it stops is suspect of doing so for ever."""
SHORT_LIVES: Final = 5
"""So many short lives in succession, and a domain is not restarted again."""
LOGS_KEPT: Final = 64
"""Files of consoles and processes."""
SUCCESSORS_KEPT: Final = 1000
CONSOLE_LIMIT: Final = 1 << 20


class DomainZero(DeviceVerbs):
    """All requests are methods of this; they run in one event loop."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._reserved: set[str] = set()
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._short: Counter[str] = Counter()
        self._retry: dict[int, float] = {}
        self._parting: dict[int, Known] = {}
        self._successors: dict[int, int | None] = {}
        self.began = time.time()

    @property
    def busy(self) -> bool:
        """Whether there are domains of its own, or work under way."""
        return any(known.record is not None for known in self._known.values()) or bool(self._tasks or self._reserved)

    # ── finding domains ──

    async def refresh(self) -> None:
        """Find the domains that run, whoever started them; forget those that do not."""
        async with self._changing:
            entries = {entry.name: entry for entry in registry.entries() if entry.name not in self._reserved}
            for known in list(self._known.values()):
                entry = entries.get(known.name)
                if known.state == "unknown" and (entry is None or time.monotonic() > self._retry.get(known.domid, 0)):
                    known.link.close()
                    self._drop(known)
            there = {known.name for known in self._known.values()}
            await asyncio.gather(*(self._find(entry) for name, entry in entries.items() if name not in there))
            uuids_known = {known.uuid for known in self._known.values()}
            if not self._reserved:
                for uuid in list(table.stray_records(uuids_known)):
                    table.forget_record(uuid)

    async def _find(self, entry: registry.Entry) -> None:
        facts = entry.facts
        domid, uuid = facts.get("domid"), facts.get("uuid")
        fresh = not isinstance(domid, int) or not isinstance(uuid, str) or domid in self._known
        if not isinstance(domid, int) or domid in self._known:
            domid = registry.allocate_domid(self._known)
        if fresh:
            uuid = str(uuids.uuid4())
        assert isinstance(domid, int)
        assert isinstance(uuid, str)
        known = self._make(entry.name, domid, uuid)
        known.started, known.facts = entry.started, {key: value for key, value in facts.items() if key != "uuid"}
        known.record = table.load_record(uuid)
        self._known[domid] = known
        try:
            await known.link.connect(entry.socket)
            if fresh:
                await known.link.request("describe", facts={"domid": domid, "uuid": uuid})
            state = await known.link.request("watch")
        except NonrootError as error:
            known.state = "unknown"
            self._retry[domid] = time.monotonic() + 2
            if isinstance(error, DomainLostError):
                known.link.close()
                self._drop(known)
            return
        self._news(known, str(state.get("state")), str(state.get("reason")))

    def _make(self, name: str, domid: int, uuid: str) -> Known:
        known: Known
        link = Link(lambda state, reason: self._news(known, state, reason), lambda: self._lost(known))
        known = Known(name, domid, uuid, link)
        known.settled = asyncio.get_running_loop().create_future()
        return known

    def _drop(self, known: Known, successor: int | None = None) -> None:
        if self._known.get(known.domid) is known:
            del self._known[known.domid]
        self._retry.pop(known.domid, None)
        self._settle(known, successor)

    def _settle(self, known: Known, successor: int | None) -> None:
        """What follows the domain's stop has been done."""
        if known.settled is not None and not known.settled.done():
            known.settled.set_result(successor)
            self._successors[known.domid] = successor
            if len(self._successors) > SUCCESSORS_KEPT:
                del self._successors[next(iter(self._successors))]

    async def _domain(self, params: dict[str, Any]) -> Known:
        """By ``domain``: its name, number or UUID. NotRunningError."""
        wanted = params.get("domain")
        if not isinstance(wanted, str):
            raise BadOptionError("which domain?")
        if wanted in ("0", registry.ZERO_NAME):
            raise UnsupportedError(f"{registry.ZERO_NAME} is nonroot's control process; name a domain")
        await self.refresh()
        for known in self._known.values():
            if wanted in (str(known.domid), known.uuid):
                return known
        for known in self._known.values():
            if wanted == known.name:
                return known
        names = ", ".join(known.name for known in self._known.values())
        raise NotRunningError(
            f"there is no domain {wanted[:60]!r}; " + (f"there are: {names}" if names else "none is running")
        )

    # ── requests ──

    async def do_hello(self, params: dict[str, Any]) -> dict[str, Any]:
        """Who this is."""
        return {"version": 1, "pid": os.getpid()}

    async def do_list(self, params: dict[str, Any]) -> dict[str, Any]:
        """All domains, by number; and domain zero itself."""
        await self.refresh()
        return {
            "domains": [self._known[domid].describe() for domid in sorted(self._known)],
            "dom0": {"pid": os.getpid(), "started": self.began, "cpu_seconds": table.cpu_seconds(os.getpid())},
        }

    async def do_find(self, params: dict[str, Any]) -> dict[str, Any]:
        """One domain."""
        return (await self._domain(params)).describe()

    async def do_create(self, params: dict[str, Any]) -> dict[str, Any]:
        """Make a domain: ``name``, ``uuid``, ``record``, and whether it stays ``paused``."""
        name, uuid, record = params.get("name"), params.get("uuid"), params.get("record")
        if not isinstance(name, str) or not isinstance(uuid, str) or not isinstance(record, dict):
            raise BadOptionError("a domain needs a name, a UUID and a configuration")
        registry.check_name(name)
        Policy(**record["policy"])
        DomainOptions.from_wire(dict(record["options"]))
        await self.refresh()
        known = await self._create(name, str(uuids.UUID(uuid)), record, paused=bool(params.get("paused")))
        return known.describe()

    async def do_pause(self, params: dict[str, Any]) -> dict[str, Any]:
        """Stop a domain's time."""
        known = self._going(await self._domain(params))
        if known.state == "running":
            await known.link.request("pause")
        return {}

    async def do_unpause(self, params: dict[str, Any]) -> dict[str, Any]:
        """Let a domain go on, or begin."""
        known = self._going(await self._domain(params))
        await known.link.request("start" if known.state == "created" else "unpause")
        return {}

    async def do_shutdown(self, params: dict[str, Any]) -> dict[str, Any]:
        """Ask the guest to shut down: by XenStore or by its power button, which ``acpi`` insists on."""
        known = self._going(await self._domain(params))
        known.reboot_wanted = False
        return {"domid": known.domid, "by": await self._ask_for("poweroff", known, bool(params.get("acpi")))}

    async def do_reboot(self, params: dict[str, Any]) -> dict[str, Any]:
        """Press the power button, and take the power-off for a reboot; with ``force`` reset it at once."""
        known = self._going(await self._domain(params))
        if known.record is None:
            raise UnsupportedError(f"{known.name} was not made by nonroot create, so it cannot be restarted; see reset")
        if params.get("force"):
            await known.link.request("reset")
            return {"domid": known.domid, "by": "reset button"}
        known.reboot_wanted = True
        return {"domid": known.domid, "by": await self._ask_for("reboot", known, False)}

    async def do_save(self, params: dict[str, Any]) -> dict[str, Any]:
        """Save a domain to the file ``path``; ``then`` it is to ``end``, ``stay`` paused, or ``go on``."""
        known = self._going(await self._domain(params))
        then = params.get("then")
        if then not in ("end", "stay", "go on"):
            raise BadOptionError(f"a domain that has been saved cannot {then!r}")
        if known.state == "created":
            raise NotRunningError(f"{known.name} has not begun; there is nothing to save yet")
        about: dict[str, Any] = {"name": known.name, "uuid": known.uuid}
        if known.record is not None:
            about["record"] = {key: value for key, value in known.record.items() if key != "options"}
        packed, stay = bool(params.get("packed", True)), then != "go on"
        fork = bool(params.get("fork", False))
        result = await known.link.request(
            "save", SAVE_SECONDS, path=params.get("path"), packed=packed, stay=stay, fork=fork, toolstack=about
        )
        if then == "end":
            await self._end(known)
        return result

    async def do_set_memory(self, params: dict[str, Any]) -> dict[str, Any]:
        """Ask the guest to do with ``bytes`` of memory."""
        known = self._going(await self._domain(params))
        size = params.get("bytes")
        most = known.facts.get("memory")
        if isinstance(size, int) and isinstance(most, int) and size > most:
            raise BadOptionError(f"{known.name} was made with {most >> 20} MiB, and can have no more while it runs")
        limit = known.facts.get("memory_limit", most)
        if isinstance(size, int) and isinstance(limit, int) and size > limit:
            raise BadOptionError(f"{known.name} is limited to {limit >> 20} MiB; nonroot mem-max changes that")
        try:
            await known.link.request("set_memory", bytes=size)
        except UnsupportedError:
            if size != most:  # what it has is what it gets
                raise
        return {}

    async def do_limit_memory(self, params: dict[str, Any]) -> dict[str, Any]:
        """Let the guest have ``bytes`` of memory at most, until it is started again."""
        known = self._going(await self._domain(params))
        size, most = params.get("bytes"), known.facts.get("memory")
        if isinstance(size, int) and isinstance(most, int) and size > most:
            raise BadOptionError(
                f"{known.name} was made with {most >> 20} MiB, and its limit cannot be above that; set memory= before "
                "its start"
            )
        try:
            await known.link.request("limit_memory", bytes=size)
        except UnsupportedError:
            if size != most:  # its limit is what it has
                raise
        known.facts["memory_limit"] = size
        await known.link.request("describe", facts={"memory_limit": size})
        return {}

    async def do_sysrq(self, params: dict[str, Any]) -> dict[str, Any]:
        """Press a magic SysRq key, ``key``, through XenStore."""
        known = self._going(await self._domain(params))
        await known.link.request("sysrq", key=params.get("key"))
        return {"by": "xenstore"}

    async def _ask_for(self, how: str, known: Known, acpi: bool) -> str:
        if known.state in ("paused", "created"):
            raise NotRunningError(f"{known.name} is paused, so it cannot shut down; unpause it first")
        return str((await known.link.request("shutdown", how=how, acpi=acpi)).get("by"))[:20]

    async def do_destroy(self, params: dict[str, Any]) -> dict[str, Any]:
        """End a domain at once."""
        known = await self._domain(params)
        await self._end(known)
        return {}

    async def do_rename(self, params: dict[str, Any]) -> dict[str, Any]:
        """Give a domain another name."""
        known = await self._domain(params)
        name = params.get("name")
        if not isinstance(name, str):
            raise BadOptionError("which name?")
        await self._rename(known, registry.check_name(name))
        return {}

    async def do_wait(self, params: dict[str, Any]) -> dict[str, Any]:
        """Wait until what follows a domain's stop has been done; ``next`` is the domid in its place, or null."""
        wanted = str(params.get("domain"))
        number = int(wanted) if wanted.isascii() and wanted.isdigit() else 0
        known = self._parting.get(number)
        if known is None:
            try:
                known = await self._domain(params)
            except NotRunningError:
                known = self._parting.get(number)
        if known is None:
            return {"next": self._successors.get(number), "state": "gone", "reason": ""}
        assert known.settled is not None
        successor = await asyncio.shield(known.settled)
        return {"next": successor, "state": "stopped" if known.domid in self._known else "gone", "reason": known.reason}

    async def do_medium(self, params: dict[str, Any]) -> dict[str, Any]:
        """Put ``image`` into the CD-ROM drive ``vdev``, or take out what is there if it is null."""
        known = self._going(await self._domain(params))
        record = known.record
        drives = [disk for disk in record["disks"] if disk["cdrom"]] if record is not None else []
        vdev, disk = params.get("vdev"), params.get("disk")
        number = next((at for at, one in enumerate(drives) if one["vdev"] == vdev), None)
        if number is None and record is None and vdev in ("cd0", "cd1"):
            number = int(str(vdev)[2])  # somebody else's domain: we do not know its names
        if number is None:
            names = ", ".join(one["vdev"] for one in drives) or ("cd0, cd1" if record is None else "none")
            raise BadOptionError(f"{known.name} has no CD-ROM drive {str(vdev)[:40]!r}; there are: {names}")
        if disk is None:
            result = await known.link.request("eject", drive=f"cd{number}", force=bool(params.get("force")))
            if not result.get("ejected"):
                raise TransientError(
                    f"the guest {known.name} has locked its drive {vdev}; unmount the CD there, or use --force"
                )
        else:
            await known.link.request("insert", drive=f"cd{number}", image=str(disk["drive"]))
        if record is not None:
            drives[number]["target"] = "" if disk is None else str(disk["target"])
            record["options"]["cdroms"][number] = "none" if disk is None else str(disk["drive"])
            table.save_record(known.uuid, record)
        return {}

    def _going(self, known: Known) -> Known:
        if known.state == "unknown":
            raise WaitTimeoutError(f"the process of {known.name} does not answer; nonroot destroy ends it")
        if known.state == "stopped":
            raise NotRunningError(f"{known.name} has stopped ({known.reason}); nonroot destroy removes it")
        return known

    # ── making domains ──

    async def _create(self, name: str, uuid: str, record: dict[str, Any], paused: bool = False) -> Known:
        """BadOptionError if the name is taken; whatever the domain's process says of its options."""
        if name in self._reserved or any(known.name == name for known in self._known.values()):
            raise BadOptionError(f"a domain named {name!r} is running already")
        if any(known.uuid == uuid for known in self._known.values()):
            raise BadOptionError(f"a domain with the UUID {uuid} is running already")
        self._reserved.add(name)
        known = self._make(name, registry.allocate_domid(self._known), uuid)
        try:
            with (place.logs_folder() / f"{name}.process").open("wb") as output:
                await known.link.spawn(output)
            await self._set_up(known, record)
            known.record = record
            self._known[known.domid] = known
            if not paused:
                await known.link.request("start")
        except BaseException:
            self._known.pop(known.domid, None)
            table.forget_record(uuid)
            known.link.kill()
            known.link.close()
            raise
        finally:
            self._reserved.discard(name)
        _prune_logs()
        return known

    async def _set_up(self, known: Known, record: dict[str, Any]) -> None:
        number_cards(record)
        options = record["options"] | {"name": known.name, "domid": known.domid}
        log = place.console_path(known.name)
        link = known.link
        description = await link.request("create", CREATE_SECONDS, **options)
        record["options"] |= {"saved": None, "kept": False}  # when it starts again, it boots
        facts = {
            "kernel": options["kernel"],
            "firmware": options["firmware"],
            "memory": options["memory"],
            "engine": str(description.get("engine"))[:40],
            "display": bool(options["display"] or options["firmware"]),
            "domid": known.domid,
            "console_log": os.fspath(log),
        }
        known.facts, known.started = facts, time.time()
        await link.request("register", name=known.name, facts=facts | {"uuid": known.uuid})
        await link.request("keep_console", path=os.fspath(log), limit=CONSOLE_LIMIT)
        table.save_record(known.uuid, record)
        await link.request("watch")
        vnc = record.get("vnc")
        if vnc:
            await link.request("vnc", 60, address=vnc["address"], password=vnc["password"] or None)
        await link.request("detach")

    async def _end(self, known: Known, successor: int | None = None) -> None:
        known.ending = True
        table.forget_record(known.uuid)
        await known.link.end()
        self._drop(known, successor)

    async def _rename(self, known: Known, name: str) -> None:
        if name in self._reserved or any(one.name == name and one is not known for one in self._known.values()):
            raise BadOptionError(f"a domain named {name!r} is running already")
        self._reserved |= {name, known.name}
        before = known.name
        try:
            await known.link.request("rename", name=name)
            known.name = name
        finally:
            self._reserved -= {name, before}

    # ── when domains stop ──

    def _news(self, known: Known, state: str, reason: str) -> None:
        if state == "stopped" and not reason:
            return  # it is about to say why
        if state in ("created", "running", "paused", "stopped"):
            known.state = state
        if state == "stopped":
            known.reason = reason
            self._begin(known)

    def _lost(self, known: Known) -> None:
        """The process has gone: at its client's end, or by a crash."""
        if known.ending:
            return  # who ends it tells those who wait, and which domain takes its place
        if known.record is None:
            self._drop(known)
            return
        if known.state == "stopped" and not known.acting:
            table.forget_record(known.uuid)
            self._drop(known)
            return
        known.state, known.reason = "stopped", "lost"
        self._begin(known)

    def _begin(self, known: Known) -> None:
        if known.ending or known.acting:
            return
        if known.record is None:
            self._settle(known, None)
            return
        known.acting = True
        task = asyncio.create_task(self._follow(known))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, known: Known) -> None:
        """Do what the configuration wants after a stop."""
        self._parting[known.domid] = known
        try:
            await self._act(known)
        except NonrootError as error:
            _log(f"{known.name} ({known.domid}), {known.reason}: {error}")
            self._drop(known)
        except Exception as unexpected:
            _log(f"{known.name} ({known.domid}), {known.reason}: {unexpected!r}")
            self._drop(known)
        finally:
            known.acting = False
            del self._parting[known.domid]

    async def _act(self, known: Known) -> None:
        record = known.record
        assert record is not None
        policy = Policy(**record["policy"])
        if known.reason in CRASHES:
            action = policy.on_crash
        elif known.reason == "reset" or known.reboot_wanted:
            action = policy.on_reboot
        else:
            action = policy.on_poweroff
        assert action in ACTIONS
        if action in ("restart", "rename-restart") and self._dies_young(known):
            _log(f"{known.name} has stopped at once {SHORT_LIVES} times, so it is not restarted ({known.reason})")
            action = "destroy"
        _log(f"{known.name} ({known.domid}) has stopped: {known.reason}; {action}")
        if action == "preserve" and known.reason != "lost":
            self._settle(known, None)
            return
        if action == "destroy" or action == "preserve":
            await self._end(known)
            return
        name, uuid = known.name, known.uuid
        if action == "rename-restart" and known.reason != "lost":
            await self._set_aside(known)
        else:
            known.ending = True
            await known.link.end()
            if self._known.get(known.domid) is known:
                del self._known[known.domid]
        successor = await self._create(name, uuid, record)
        self._settle(known, successor.domid)

    async def _set_aside(self, known: Known) -> None:
        """A stopped domain keeps its memory, but neither its name, its UUID nor its images."""
        assert known.record is not None
        taken = {one.name for one in self._known.values()}
        name = next(name for n in range(1, 10_000) if (name := f"{known.name[:34]}-{n}") not in taken)
        await known.link.request("close_drives")
        known.uuid = str(uuids.uuid4())
        await known.link.request("describe", facts={"uuid": known.uuid})
        await self._rename(known, name)
        policy = asdict(Policy(on_poweroff="preserve", on_reboot="preserve", on_crash="preserve"))
        known.record = known.record | {"policy": policy}
        table.save_record(known.uuid, known.record)

    def _dies_young(self, known: Known) -> bool:
        if time.time() - known.started > SHORT_LIFE:
            self._short.pop(known.uuid, None)
            return False
        self._short[known.uuid] += 1
        return self._short[known.uuid] >= SHORT_LIVES


def _prune_logs() -> None:
    with contextlib.suppress(OSError):
        files = sorted(place.logs_folder().iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[LOGS_KEPT:]:
            path.unlink(missing_ok=True)


def _log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stderr.flush()
