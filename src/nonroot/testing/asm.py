"""
A small Intel-syntax assembler for guest programs in tests.

Instructions are matched against iced-x86's opcode tables and encoded by its encoder, so every instruction that iced
knows (legacy and VEX encodings) can be written; this module only adds the text form, labels and data::

    program = assemble('''
            mov dx, 0x3f8
            lea rsi, [rel text]
            mov ecx, 6
            rep outsb
            hlt
        text:
            db "hello", 10
    ''', bits=64, origin=0x1000)
    program.code, program.labels["text"]

Syntax, close to NASM's:

* ``label:``, ``name equ expression``, comments after ``;`` or ``#``.
* ``bits 16|32|64``, ``org address`` (pads up to it), ``align n``, ``db dw dd dq`` with expressions and strings,
  ``resb n``, ``times n instruction-or-data``.
* Memory operands ``[base + index*scale + displacement]``, ``[rel label]`` (RIP-relative), ``[fs:…]`` or ``fs:[…]``,
  with ``byte``, ``word``, ``dword``, ``qword``, ``tword``, ``xmmword`` or ``ymmword`` before it where the
  size is not clear.
* Far branches ``jmp selector:offset``; prefixes ``lock``, ``rep``, ``repe``, ``repne``, ``o16``, ``o32``, ``o64``
  (choose the operand size of instructions without sized operands), ``a16``, ``a32``, ``a64`` (of string instructions).
* ``$`` is the address of the current line. Expressions are integers, labels, constants, ``+ - * // % << >> & | ^ ~``.

``iret``, ``pushf``, ``popf``, ``pusha``, ``popa`` take the size of the mode (``iretq`` etc. are explicit).
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nonroot.testing.asm_opcodes import (
    REGISTERS,
    FarPointer,
    Imm,
    Mem,
    Operand,
    Prefixes,
    Reg,
    Register,
    candidates,
    encodings,
    register_class,
)


class AsmError(ValueError):
    """A line cannot be assembled; the message names the line."""


@dataclass(frozen=True)
class Program:
    """The result of :func:`assemble`."""

    #: The bytes, for the address :attr:`origin`.
    code: bytes
    #: Address of the first byte.
    origin: int
    #: Label and ``equ`` values.
    labels: Mapping[str, int]

    def __bytes__(self) -> bytes:
        return self.code

    def __getitem__(self, label: str) -> int:
        return self.labels[label]


@dataclass
class _Line:
    number: int
    text: str
    bits: int
    minimum: int = 0
    operands: list[str] = field(default_factory=list)


_SEGMENTS = {"es", "cs", "ss", "ds", "fs", "gs"}
_SIZES = {"byte": 1, "word": 2, "dword": 4, "fword": 6, "qword": 8, "tword": 10, "tbyte": 10, "oword": 16}
_SIZES |= {"xmmword": 16, "ymmword": 32}
_DATA = {"db": 1, "dw": 2, "dd": 4, "dq": 8}
_SIZED = {"iret": ("iret", "iretd", "iretq")}
_SIZED |= {n: (n, n + "d", n + "q") for n in ("pushf", "popf")}
_SIZED |= {n: (n, n + "d", n) for n in ("pusha", "popa")}
_ALIASES = {"je": "je", "jz": "je", "jnz": "jne", "jc": "jb", "jnc": "jae", "jnae": "jb", "jnb": "jae", "jna": "jbe"}
_ALIASES |= {"jnbe": "ja", "jpe": "jp", "jpo": "jnp", "jnge": "jl", "jnl": "jge", "jng": "jle", "jnle": "jg"}
_ALIASES |= {"sal": "shl", "loopz": "loope", "loopnz": "loopne", "fwait": "wait", "xlat": "xlatb", "sysretl": "sysret"}
for _cc, _to in (
    ("z", "e"),
    ("nz", "ne"),
    ("c", "b"),
    ("nc", "ae"),
    ("nae", "b"),
    ("nb", "ae"),
    ("na", "be"),
    ("nbe", "a"),
):
    for _p in ("set", "cmov"):
        _ALIASES[_p + _cc] = _p + _to


class _Expression:
    """Integer expressions and the linear combinations of registers inside brackets."""

    def __init__(self, symbols: Mapping[str, int], here: int, final: bool) -> None:
        self._symbols = symbols
        self._here = here
        self._final = final

    def value(self, text: str) -> int:
        registers, constant = self.linear(text)
        if registers:
            raise AsmError(f"{text!r} is not a number")
        return constant

    def linear(self, text: str) -> tuple[list[tuple[int, int]], int]:
        """([(register, factor)], constant)."""
        source = re.sub(r"\$", "__here__", text.strip())
        source = re.sub(r"\b([0-9][0-9a-fA-F]*)h\b", r"0x\1", source)
        try:
            tree = ast.parse(source, mode="eval").body
        except SyntaxError:
            raise AsmError(f"cannot read the expression {text!r}") from None
        return self._walk(tree, text)

    def _walk(self, node: ast.expr, text: str) -> tuple[list[tuple[int, int]], int]:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return [], node.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) == 1:
            return [], ord(node.value)
        if isinstance(node, ast.Name):
            if node.id.lower() in REGISTERS:
                return [(REGISTERS[node.id.lower()], 1)], 0
            if node.id == "__here__":
                return [], self._here
            if node.id in self._symbols:
                return [], self._symbols[node.id]
            if self._final:
                raise AsmError(f"unknown name {node.id!r}")
            return [], self._here
        if isinstance(node, ast.UnaryOp):
            registers, constant = self._walk(node.operand, text)
            if not registers and isinstance(node.op, ast.USub):
                return [], -constant
            if not registers and isinstance(node.op, ast.Invert):
                return [], ~constant
        if isinstance(node, ast.BinOp):
            left, a = self._walk(node.left, text)
            right, b = self._walk(node.right, text)
            if isinstance(node.op, ast.Add):
                return left + right, a + b
            if isinstance(node.op, ast.Sub) and not right:
                return left, a - b
            if isinstance(node.op, ast.Mult) and not (left and right) and (not left or not a) and (not right or not b):
                return [(r, f * (a or b)) for r, f in left + right], a * b
            if not left and not right:
                match node.op:
                    case ast.FloorDiv() | ast.Div() if b:
                        return [], a // b
                    case ast.Mod() if b:
                        return [], a % b
                    case ast.LShift():
                        return [], a << b
                    case ast.RShift():
                        return [], a >> b
                    case ast.BitAnd():
                        return [], a & b
                    case ast.BitOr():
                        return [], a | b
                    case ast.BitXor():
                        return [], a ^ b
        raise AsmError(f"cannot read the expression {text!r}")


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets and strings."""
    parts: list[str] = []
    depth, quote, current = 0, "", ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[(":
            depth += 1
        elif c in "])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        current += c
    if current.strip() or parts:
        parts.append(current.strip())
    return parts


def _strip_comment(line: str) -> str:
    quote = ""
    for i, c in enumerate(line):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in ";#":
            return line[:i]
    return line


def _memory(text: str, size: int, segment: int, expression: _Expression) -> Mem:
    inner = text.strip()[1:-1].strip()
    match = re.match(r"(es|cs|ss|ds|fs|gs)\s*:(.*)$", inner, re.IGNORECASE | re.DOTALL)
    if match:
        segment, inner = REGISTERS[match[1].lower()], match[2].strip()
    if re.match(r"rel\b", inner):
        return Mem(size, Register.RIP, Register.NONE, 1, expression.value(inner[3:]), segment)
    registers, displacement = expression.linear(inner)
    if len(registers) == 2 and registers[0][0] == registers[1][0]:
        registers = [(registers[0][0], registers[0][1] + registers[1][1])]
    base = index = Register.NONE
    scale = 1
    vector = [r for r in registers if register_class(r[0]) in ("XMM", "YMM")]
    ordered = [r for r in registers if r not in vector] + vector
    for register, factor in ordered:
        # A register with factor 1 is the base if there is none yet; vector registers are always the index.
        if factor == 1 and base == Register.NONE and register_class(register) not in ("XMM", "YMM"):
            base = register
        elif index == Register.NONE and factor in (1, 2, 4, 8):
            index, scale = register, factor
        elif index == Register.NONE and factor in (3, 5, 9) and base == Register.NONE:
            base, index, scale = register, register, factor - 1
        else:
            raise AsmError(f"no such address: {text}")
    swapped = index in (Register.RSP, Register.ESP) or base in (Register.SI, Register.DI)
    if scale == 1 and swapped and index != Register.NONE:
        base, index = index, base
    return Mem(size, base, index, scale, displacement, segment)


def _operand(text: str, expression: _Expression) -> Operand:
    size, segment, far = 0, Register.NONE, False
    rest = text.strip()
    while True:
        match = re.match(r"(\w+)\b\s*", rest)
        word = match[1].lower() if match else ""
        if match and word in _SIZES:
            size = _SIZES[word]
        elif not (match and word in ("ptr", "short", "near", "far")):
            break
        far = far or word == "far"
        rest = rest[match.end() :]
    match = re.match(r"(es|cs|ss|ds|fs|gs)\s*:\s*(\[.*)$", rest, re.IGNORECASE | re.DOTALL)
    if match:
        segment, rest = REGISTERS[match[1].lower()], match[2]
    if rest.startswith("["):
        if not rest.endswith("]"):
            raise AsmError(f"the bracket of {text!r} is not closed")
        return replace(_memory(rest, size, segment, expression), far=far)
    if rest.lower() in REGISTERS:
        return Reg(REGISTERS[rest.lower()])
    if match := re.fullmatch(r"st\((\d)\)", rest.lower()):
        return Reg(REGISTERS["st" + match[1]])
    if ":" in rest:
        selector, offset = rest.split(":", 1)
        return FarPointer(expression.value(selector), expression.value(offset))
    return Imm(expression.value(rest))


@functools.lru_cache(maxsize=65536)
def _encodings(
    mnemonic: str, operands: tuple[Operand, ...], prefixes: tuple[tuple[str, Any], ...], bits: int, ip: int
) -> list[tuple[tuple[int, int], int, bytes]]:
    """All encodings, the preferred one first."""
    found = encodings(mnemonic, list(operands), Prefixes(**dict(prefixes)), bits, ip)
    return sorted(found, key=lambda e: e[0])


def _instruction(text: str, bits: int, ip: int, minimum: int, expression: _Expression) -> bytes:
    prefixes = Prefixes()
    rest = text.strip()
    while True:
        word, _, tail = rest.partition(" ")
        match word.lower():
            case "lock":
                prefixes.lock = True
            case "rep" | "repe" | "repz":
                prefixes.rep = True
            case "repne" | "repnz":
                prefixes.repne = True
            case "o16" | "o32" | "o64":
                prefixes.operand_size = int(word[1:])
            case "a16" | "a32" | "a64":
                prefixes.address_size = int(word[1:])
            case _:
                break
        rest = tail.strip()
    mnemonic = word.lower()
    mnemonic = _ALIASES.get(mnemonic, mnemonic)
    if mnemonic in _SIZED:
        mnemonic = _SIZED[mnemonic][{16: 0, 32: 1, 64: 2}[prefixes.operand_size or bits]]
    if mnemonic not in candidates():
        raise AsmError(f"no such instruction: {word}")
    if mnemonic == "nop" and not tail.strip():
        return b"\x90"
    operands = [_operand(o, expression) for o in _split(tail)]
    if isinstance(operands[0] if operands else None, FarPointer) and re.match(r"dword\b", tail.strip(), re.IGNORECASE):
        prefixes.operand_size = 32
    # Only branches and RIP-relative operands depend on the instruction's address.
    branch = mnemonic[0] == "j" or mnemonic.startswith(("call", "loop", "xbegin"))
    fixed = not branch and not any(isinstance(o, Mem) and o.base == Register.RIP for o in operands)
    found = _encodings(mnemonic, tuple(operands), tuple(vars(prefixes).items()), bits, 0 if fixed else ip)
    if not found:
        raise AsmError(f"no encoding of {text!r} in {bits}-bit mode")
    sizes = {size for _, size, _ in found if size}
    unsized = any(isinstance(o, Mem) and o.size == 0 and not o.far for o in operands)
    registers = any(isinstance(o, Reg) for o in operands)
    if unsized and len(sizes) > 1 and (not registers or mnemonic in ("movzx", "movsx", "cvtsi2sd", "cvtsi2ss")):
        raise AsmError(f"the size of the memory operand of {text!r} is not clear")
    for _, _, encoded in found:
        if len(encoded) >= minimum:
            return encoded
    return found[-1][2].ljust(minimum, b"\x90")


def _data(directive: str, text: str, expression: _Expression) -> bytes:
    size, out = _DATA[directive], bytearray()
    for item in _split(text):
        if len(item) >= 2 and item[0] in "\"'" and item[-1] == item[0]:
            raw = item[1:-1].encode()
            out += raw + bytes(-len(raw) % size)
        else:
            out += (expression.value(item) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    return bytes(out)


def _emit(line: _Line, address: int, expression: _Expression) -> bytes:
    word, _, tail = line.text.partition(" ")
    word, tail = word.lower(), tail.strip()
    match word:
        case "db" | "dw" | "dd" | "dq":
            return _data(word, tail, expression)
        case "resb":
            return bytes(expression.value(tail))
        case "align":
            return bytes(-address % expression.value(tail))
        case "org":
            gap = expression.value(tail) - address
            if gap < 0:
                raise AsmError(f"org {tail} is before the current address {address:#x}")
            return bytes(gap)
        case "times":
            count, _, what = tail.partition(" ")
            out = b""
            for _ in range(expression.value(count)):
                inner = _Line(line.number, what.strip(), line.bits)
                out += _emit(inner, address + len(out), expression)
            return out
    return _instruction(line.text, line.bits, address, line.minimum, expression)


def assemble(source: str, *, bits: int = 64, origin: int = 0, constants: Mapping[str, int] | None = None) -> Program:
    """
    Assembles a program.

    :param bits: mode at the start: 16, 32 or 64.
    :param origin: address of the first byte.
    :param constants: names for expressions, beside the program's labels.
    :raises AsmError: naming the line that cannot be assembled.
    """
    lines: list[_Line | tuple[str, str | None]] = []
    mode = bits
    for number, raw in enumerate(source.splitlines(), 1):
        text = _strip_comment(raw).strip()
        while match := re.match(r"([A-Za-z_.][\w.]*)\s*:(?!\s*\[)", text):
            if match[1].lower() in _SEGMENTS:
                break
            lines.append((match[1], None))
            text = text[match.end() :].strip()
        if match := re.match(r"([A-Za-z_.][\w.]*)\s+equ\s+(.*)$", text):
            lines.append((match[1], match[2]))
        elif match := re.fullmatch(r"bits\s+(16|32|64)", text):
            mode = int(match[1])
        elif text:
            lines.append(_Line(number, re.sub(r"^(\S+)\s+", r"\1 ", text), mode))
    symbols = dict(constants or {})
    final = False
    for _ in range(100):
        code, before = bytearray(), dict(symbols)
        changed = False
        for item in lines:
            here = origin + len(code)
            expression = _Expression(symbols, here, final)
            if isinstance(item, tuple):
                symbols[item[0]] = here if item[1] is None else expression.value(item[1])
                continue
            try:
                emitted = _emit(item, here, expression)
            except AsmError as error:
                raise AsmError(f"line {item.number}: {error}") from None
            if len(emitted) > item.minimum:
                item.minimum, changed = len(emitted), True
            code += emitted
        if final and not changed and symbols == before:
            return Program(bytes(code), origin, symbols)
        final = True
    raise AsmError("the program's labels do not settle")


def asm(source: str, *, bits: int = 64, origin: int = 0, **constants: int) -> bytes:
    """Only the bytes of :func:`assemble`."""
    return assemble(source, bits=bits, origin=origin, constants=constants).code
