"""What Linux makes of the devices: interrupt controllers, timers, clocks and ports, seen from a shell."""

import hashlib
import os
import re
import threading
import time

import pytest

from nonroot.engines.native import InterpretEngine
from nonroot.guests import Guest, cached
from nonroot.hvm.machine import Machine, MachineConfig, Outcome, Outputs, Reason

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = b"# \x1b[6n"
CMDLINE = "console=ttyS0 quiet cryptomgr.notests panic=-1 "


@pytest.fixture(scope="module")
def guest() -> Guest:
    found = cached("cloud-amd64")
    if found is None:
        message = "Debian's cloud-amd64 kernel has not been fetched (make guests)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


class Shell:
    """A booted machine and what one types at it."""

    def __init__(self, guest: Guest, options: str = "", **config: object) -> None:
        self.output = bytearray()
        self.outcome: Outcome | None = None
        self._changed = threading.Condition()
        base_wall_ns = 1_000_000_000 * 10**9
        self.machine = Machine(
            MachineConfig(
                128 << 20,
                guest.kernel.read_bytes(),
                cmdline=CMDLINE + options,
                initrd=guest.initrd.read_bytes() if guest.initrd else None,
                base_wall_ns=base_wall_ns,
            ),
            InterpretEngine(),
            Outputs(self._console),
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        try:
            self._wait(PROMPT)
        except AssertionError:
            self.close()
            raise

    def _run(self) -> None:
        self.outcome = self.machine.run()

    def _console(self, number: int, data: bytes) -> None:
        with self._changed:
            self.output += data
            self._changed.notify_all()

    def _wait(self, text: bytes) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.output, 120), bytes(self.output[-2000:])

    def run(self, command: str) -> str:
        """What ``command`` prints."""
        with self._changed:
            self.output.clear()
        self.machine.console_input(b"echo 'BEG'IN; " + command.encode() + b"\n")
        self._wait(PROMPT)
        # What comes before is the echo of the command, which the shell wraps.
        return bytes(self.output).decode().replace("\r", "").split("BEGIN\n")[-1].rsplit("\n", 1)[0]

    def end(self, command: str) -> Outcome:
        """Type the last command; how the machine ended."""
        self.machine.console_input(command.encode() + b"\n")
        self._thread.join(60)
        assert self.outcome is not None, bytes(self.output[-2000:])
        return self.outcome

    def close(self) -> None:
        self.machine.stop()
        self._thread.join(60)


@pytest.mark.parametrize(
    ("options", "controller", "source"),
    [
        ("", "IO-APIC", "tsc"),
        ("noapic", "XT-PIC", "tsc"),
        ("nolapic", "XT-PIC", "tsc"),
        ("acpi=off", "XT-PIC", "tsc"),
        ("clocksource=acpi_pm", "IO-APIC", "acpi_pm"),
        ("lapic=notscdeadline", "IO-APIC", "tsc"),
        ("nohz=off highres=off", "IO-APIC", "tsc"),
    ],
)
def test_interrupt_controllers_and_timers(guest: Guest, options: str, controller: str, source: str) -> None:
    shell = Shell(guest, options)
    try:
        serial = next(line for line in shell.run("cat /proc/interrupts").splitlines() if "ttyS0" in line)
        assert controller in serial
        current = shell.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
        assert current in (source, "tsc-early") if source == "tsc" else current == source
        began = time.monotonic()
        first, second = map(float, shell.run("cut -d' ' -f1 /proc/uptime; sleep 2; cut -d' ' -f1 /proc/uptime").split())
        assert 1.9 < second - first < time.monotonic() - began + 0.5
    finally:
        shell.close()


@pytest.mark.parametrize(("command", "reason"), [("poweroff -f", Reason.POWER_OFF), ("reboot -f", Reason.RESET)])
@pytest.mark.parametrize("options", ["", "reboot=pci", "reboot=kbd"])
def test_ends(guest: Guest, options: str, command: str, reason: Reason) -> None:
    if command.startswith("poweroff") and options:
        pytest.skip("reboot= does not change how Linux powers off")
    shell = Shell(guest, options)
    assert shell.end(command).reason == reason


def test_devices_as_linux_finds_them(guest: Guest) -> None:
    shell = Shell(guest)
    try:
        devices = shell.run(
            "cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/vendor $d/device $d/class); done; cd"
        )
        assert devices.splitlines() == ["0000:00:00.0 0x8086 0x1237 0x060000", "0000:00:01.0 0x8086 0x7000 0x060100"]
        ports = shell.run("cat /proc/ioports")
        for line in (
            "0020-0021 : pic1",
            "0040-0043 : timer0",
            "0070-0071 : rtc0",
            "0608-060b : ACPI PM_TMR",
            "03f8-03ff : serial",
        ):
            assert line in ports
        log = shell.run("dmesg")
        assert re.search(r"00:01: ttyS0 at I/O 0x3f8 \(irq = 4, base_baud = 115200\) is a 16550A", log)
        assert "IOAPIC[0]: apic_id 1, version 32, address 0xfec00000, GSI 0-23" in log
        assert "PM-Timer running at invalid rate" not in log
        assert "AE_" not in log  # no complaint of ACPICA
        assert shell.run("date -u +%Y-%m-%dT%H").startswith("2001-09-09T01")
    finally:
        shell.close()


def test_rtc_is_set_and_read(guest: Guest) -> None:
    shell = Shell(guest)
    try:
        shell.run("mknod -m 600 /dev/rtc0 c $(tr : ' ' < /sys/class/rtc/rtc0/dev) 2>/dev/null")
        shell.run("date -u -s '2033-05-18 03:33:20'")
        shell.run("hwclock -u -w")
        assert shell.run("cat /sys/class/rtc/rtc0/date") == "2033-05-18"
        now = int(shell.run("cat /sys/class/rtc/rtc0/since_epoch"))
        assert 2_000_000_000 <= now < 2_000_000_120
    finally:
        shell.close()


def test_pasted_text_arrives_whole(guest: Guest) -> None:
    shell = Shell(guest)
    try:
        lines = [f"line {n} {'x' * (n % 60)}" for n in range(400)]
        text = "".join(line + "\n" for line in lines)
        shell.machine.console_input(b"sh -c 'echo rea\"\"dy; exec cat > /tmp/pasted'\n")
        shell._wait(b"ready\r\n")
        shell.machine.console_input(text.encode() + b"\x04")
        shell._wait(b"line 399")
        assert shell.run("sha256sum < /tmp/pasted").split()[0] == hashlib.sha256(text.encode()).hexdigest()
    finally:
        shell.close()
