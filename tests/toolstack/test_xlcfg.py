"""The syntax of xl's configuration files."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.toolstack.xlcfg import MAX_DEPTH, ConfigSyntaxError, format_config, parse


def values(text: str) -> dict[str, Any]:
    return {name: setting.value for name, setting in parse(text, "x.cfg").items()}


def test_what_configurations_look_like() -> None:
    text = r"""
# A guest of Debian's
name = "web"; memory = 0x200   # MiB
type='pvh'
kernel = '/boot/vm"linuz'
cmdline = "a\tb\"c\x41\101\\"
disk = [
    'format=raw, vdev=xvda, access=rw, target=/a.img',   # the root
    'phy:/b,xvdb,r',
]
vif = [ ]
nested = [['a', 1], []]
extra = "one"
extra += " two"
disk += ['/c,raw,xvdc,r'];;
"""
    assert values(text) == {
        "name": "web",
        "memory": 512,
        "type": "pvh",
        "kernel": '/boot/vm"linuz',
        "cmdline": 'a\tb"cAA\\',
        "disk": ["format=raw, vdev=xvda, access=rw, target=/a.img", "phy:/b,xvdb,r", "/c,raw,xvdc,r"],
        "vif": [],
        "nested": [["a", 1], []],
        "extra": "one two",
    }
    assert parse(text)["type"].line == 4


@pytest.mark.parametrize(
    ("text", "line", "column", "problem"),
    [
        ("name = web", 1, 8, "text needs quotes"),
        ("a = 1\nname 'web'", 2, 6, "'=' is expected after 'name', not \"'\""),
        ("a = 1 b = 2", 1, 7, "'b' follows a complete setting"),
        ("disk = [ 'a', \n 'b' \n", 3, 1, "the list that begins in line 1 does not end"),
        ("disk = [ 'a' 'b' ]", 1, 14, "',' or ']' is expected"),
        ("x = 'abc\n'", 1, 5, "this string does not end on its line"),
        (r"x = 'a\qb'", 1, 8, r"there is no escape \q"),
        (r"x = '\xg1'", 1, 7, "two hexadecimal digits"),
        ("x = 12ab", 1, 5, "'12ab' is no number"),
        ("x = 0x", 1, 5, "'0x' is no number"),
        ("x = -1", 1, 5, "cannot be negative"),
        ("x =", 1, 4, "not the end"),
        ("x =\n", 1, 4, "not the line's end"),
        ("x = 99999999999999999999", 1, 5, "is no number"),
        ("\n  ?", 2, 3, "a setting's name is expected"),
        ("x = 1\nx += 'a'", 2, 9, "'x' is a number, to which a string cannot be added"),
        ("x = " + "[" * (MAX_DEPTH + 1), 1, 5 + MAX_DEPTH, "nested deeper"),
    ],
)
def test_errors_say_where(text: str, line: int, column: int, problem: str) -> None:
    with pytest.raises(ConfigSyntaxError) as caught:
        parse(text, "x.cfg")
    assert (caught.value.line, caught.value.column) == (line, column)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"x.cfg, line {line}, column {column}: ")


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
anything = st.recursive(
    st.text(max_size=20) | st.integers(0, (1 << 63) - 1), lambda one: st.lists(one, max_size=3), max_leaves=6
)


@settings(max_examples=40)
@given(st.dictionaries(names, anything, max_size=5))
def test_what_is_written_is_read(made: dict[str, Any]) -> None:
    assert values(format_config(made)) == made


@given(st.text(max_size=80) | st.text(alphabet="ab=[]'\"\\,;#+ \n01x", max_size=60))
def test_no_text_does_harm(text: str) -> None:
    problem = None
    try:
        parse(text)
    except ConfigSyntaxError as error:
        problem = error
    if problem is not None:
        assert 1 <= problem.line <= text.count("\n") + 1
        assert 1 <= problem.column <= len(text) + 1
