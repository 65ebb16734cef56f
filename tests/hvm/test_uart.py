"""The 16550A, by register."""

import pytest

from nonroot.hvm.uart import RX_TIMEOUT_NS, Uart
from tests.hvm.makers import Outside

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


class Port(Uart):
    """Shorter access for the tests."""

    def put(self, offset: int, value: int) -> None:
        self.write(offset, 1, value)

    def get(self, offset: int) -> int:
        return self.read(offset, 1)


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def uart(outside: Outside) -> Port:
    port = Port("uart0", outside.clock, outside.irq, outside.sent.append, outside.event, outside.call)
    port.put(MCR, 0x0B)
    return port


def test_reset_values(outside: Outside) -> None:
    port = Port("uart0", outside.clock, outside.irq, outside.sent.append)
    assert [port.get(n) for n in (IER, IIR, LCR, MCR, LSR, MSR, SCR)] == [0, 1, 0, 0, 0x60, 0xB0, 0]


def test_transmit(uart: Port, outside: Outside) -> None:
    for byte in b"hello":
        uart.put(DATA, byte)
    assert outside.sent == b"hello"
    assert uart.get(LSR) == 0x60


@pytest.mark.parametrize(
    ("register", "written", "read"), [(IER, 0xFF, 0x0F), (LCR, 0x5B, 0x5B), (MCR, 0xFF, 0x1F), (SCR, 0xA5, 0xA5)]
)
def test_registers_keep_what_they_have(uart: Port, register: int, written: int, read: int) -> None:
    uart.put(register, written)
    assert uart.get(register) == read


def test_divisor_latch(uart: Port, outside: Outside) -> None:
    uart.put(LCR, 0x83)
    uart.put(DATA, 0x0C)
    uart.put(IER, 0x01)
    assert (uart.get(DATA), uart.get(IER)) == (0x0C, 0x01)
    uart.put(LCR, 0x03)
    assert uart.get(IER) == 0
    assert outside.sent == b""


@pytest.mark.parametrize("register", [LSR, MSR])
def test_read_only_registers(uart: Port, outside: Outside, register: int) -> None:
    before = uart.get(register)
    uart.put(register, 0xFF)
    assert uart.get(register) == before
    assert outside.events == [("uart0", "read-only-register", register)]


def test_thre_interrupt_rises_when_enabled_and_falls_by_reading_iir(uart: Port, outside: Outside) -> None:
    uart.put(IER, 0x02)
    assert outside.high()
    assert uart.get(IIR) == 0x02
    assert not outside.high()
    assert uart.get(IIR) == 0x01
    uart.put(DATA, 0x41)
    assert outside.high()
    uart.put(IER, 0x00)
    assert not outside.high()
    uart.put(IER, 0x02)  # again a rising enable: again an interrupt
    assert outside.high()


def test_writing_ier_again_does_not_raise_thre(uart: Port, outside: Outside) -> None:
    uart.put(IER, 0x02)
    uart.get(IIR)
    uart.put(IER, 0x03)
    assert not outside.high()


def test_out2_connects_the_interrupt(uart: Port, outside: Outside) -> None:
    uart.put(IER, 0x02)
    uart.put(MCR, 0x03)
    assert not outside.high()
    uart.put(MCR, 0x08)
    assert outside.high()


def test_receive_without_fifo(uart: Port, outside: Outside) -> None:
    uart.put(IER, 0x01)
    assert uart.receive(b"ab") == 1
    assert outside.high()
    assert uart.get(IIR) == 0x04
    assert uart.get(LSR) == 0x61
    assert uart.get(DATA) == ord("a")
    assert not outside.high()
    assert outside.calls == [()]
    assert uart.get(DATA) == 0


def test_fifo_takes_sixteen(uart: Port) -> None:
    uart.put(IIR, 0x01)
    assert uart.receive(bytes(range(40))) == 16
    assert uart.receive(b"x") == 0
    assert [uart.get(DATA) for _ in range(16)] == list(range(16))
    assert not uart.get(LSR) & 0x01


@pytest.mark.parametrize(("bits", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_trigger_levels(uart: Port, outside: Outside, bits: int, level: int) -> None:
    uart.put(IIR, bits << 6 | 0x01)
    uart.put(IER, 0x01)
    for n in range(level):
        assert not outside.high()
        uart.receive(bytes([n]))
    assert uart.get(IIR) == 0xC4
    uart.get(DATA)
    assert not outside.high()


def test_receive_timeout(uart: Port, outside: Outside) -> None:
    uart.put(IIR, 0x81)
    uart.put(IER, 0x01)
    uart.receive(b"x")
    assert not outside.high()
    deadline = uart.deadline()
    assert deadline == RX_TIMEOUT_NS
    uart.advance(deadline - 1)
    assert not outside.high()
    uart.advance(deadline)
    assert uart.get(IIR) == 0xCC
    assert outside.high()
    uart.get(DATA)
    assert not outside.high()
    assert uart.deadline() is None


def test_timeout_starts_anew_with_each_byte(uart: Port, outside: Outside) -> None:
    uart.put(IIR, 0xC1)
    uart.put(IER, 0x01)
    uart.receive(b"x")
    outside.clock.time_ns = 1000
    uart.receive(b"y")
    assert uart.deadline() == 1000 + RX_TIMEOUT_NS


def test_no_deadline_while_nobody_wants_the_interrupt(uart: Port) -> None:
    uart.put(IIR, 0xC1)
    uart.receive(b"x")
    assert uart.deadline() is None


def test_clearing_and_switching_the_fifo_drops_its_bytes(uart: Port) -> None:
    uart.put(IIR, 0x01)
    uart.receive(b"abc")
    uart.put(IIR, 0x03)
    assert not uart.get(LSR) & 1
    uart.receive(b"abc")
    uart.put(IIR, 0x00)
    assert not uart.get(LSR) & 1
    assert uart.get(IIR) == 0x01


def test_loopback_data_and_overrun(uart: Port, outside: Outside) -> None:
    uart.put(MCR, 0x10)
    uart.put(DATA, 0x55)
    assert outside.sent == b""
    assert uart.get(DATA) == 0x55
    uart.put(DATA, 1)
    uart.put(DATA, 2)
    assert uart.get(LSR) == 0x63
    assert uart.get(LSR) == 0x61
    assert uart.get(DATA) == 2
    assert uart.receive(b"x") == 0


@pytest.mark.parametrize(
    ("mcr", "msr"), [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0), (0x10, 0)]
)
def test_loopback_modem_lines(uart: Port, mcr: int, msr: int) -> None:
    uart.put(MCR, mcr)
    assert uart.get(MSR) & 0xF0 == msr


def test_overrun_interrupt_has_the_highest_priority(uart: Port) -> None:
    uart.put(MCR, 0x18)
    uart.put(IER, 0x0F)
    uart.put(DATA, 1)
    uart.put(DATA, 2)
    order = [uart.get(IIR)]
    uart.get(LSR)
    order.append(uart.get(IIR))
    uart.get(DATA)
    order.append(uart.get(IIR))
    assert order == [0x06, 0x04, 0x02]


@pytest.mark.parametrize(("lines", "delta"), [(0xA0, 0x01), (0x90, 0x02), (0x30, 0x08), (0xF0, 0x00)])
def test_modem_changes(uart: Port, outside: Outside, lines: int, delta: int) -> None:
    uart.put(IER, 0x08)
    uart.set_modem_lines(lines)
    assert outside.high() == bool(delta)
    if delta:
        assert uart.get(IIR) == 0x00
    assert uart.get(MSR) == lines | delta
    assert not outside.high()
    assert uart.get(MSR) == lines


def test_ring_indicator_counts_at_its_end(uart: Port) -> None:
    uart.set_modem_lines(0xF0)
    assert uart.get(MSR) & 0x0F == 0
    uart.set_modem_lines(0xB0)
    assert uart.get(MSR) & 0x0F == 0x04


def test_reset_keeps_the_modem_lines(uart: Port) -> None:
    uart.set_modem_lines(0x10)
    uart.put(SCR, 7)
    uart.reset()
    assert (uart.get(SCR), uart.get(MSR)) == (0, 0x10)


def test_linux_autoconfiguration_sees_a_16550a(uart: Port) -> None:
    """The probes of Linux' 8250 driver, in its order."""
    uart.put(IER, 0)
    assert uart.get(IER) & 0x0F == 0
    uart.put(IER, 0x0F)
    assert uart.get(IER) & 0x0F == 0x0F
    uart.put(IER, 0)
    uart.put(MCR, 0x1A)
    assert uart.get(MSR) & 0xF0 == 0x90
    uart.put(MCR, 0x0B)
    uart.put(LCR, 0xBF)
    uart.put(IIR, 0)
    uart.put(LCR, 0)
    uart.put(IIR, 0x01)
    assert uart.get(IIR) >> 6 == 3
