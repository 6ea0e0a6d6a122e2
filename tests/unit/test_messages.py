"""What agents and the lead tell each other: there and back again, and whatever else arrives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.monitor.heartbeat import StepTimes
from launch.ranks.failure_report import RankStack
from launch.ranks.hang import Standing
from launch.ranks.messages import (
    Alive,
    Beats,
    Dump,
    End,
    Ended,
    Exit,
    Hello,
    PassOn,
    Signalled,
    Stacks,
    Start,
    Unreadable,
    encode,
    read_hello,
    read_order,
    read_word,
)
from launch.ranks.verdict import RankEnd, Report

STANDING = Standing(3, True, 7, "saving", "broadcast", 1.5, 6, (StepTimes(7, 1.0, 0.1, 0.5, 0.4),))
WORDS = (
    Beats(generation=1, standings=(STANDING, Standing(4, False, 7, "loading", None, 0.0))),
    Ended(generation=0, end=RankEnd(1, None, 9, None, 5), now_nanoseconds=7),
    Ended(
        generation=0,
        end=RankEnd(1, 1, None, Report("E", 'a\n"é', "T", 1, True, False, 3, ("node1",)), 5, True),
        now_nanoseconds=7,
    ),
    Stacks(generation=2, stacks=(RankStack(0, "a\nb", "all_reduce"), RankStack(1, ""))),
    Signalled(number=10),
    Alive(),
)
ORDERS = (
    Start(generation=3, master_address="node1", master_port=4000),
    Dump(),
    PassOn(number=15),
    End(grace_seconds=0.5),
    Exit(code=75),
    Alive(),
)


def test_there_and_back_again() -> None:
    for word in WORDS:
        line = encode(word)
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        assert read_word(line) == word
    for order in ORDERS:
        assert read_order(encode(order)) == order
    hello = Hello(first_rank=8, ranks=4, host="node2", pid=99)
    assert read_hello(encode(hello)) == hello


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"kind": "beats"}',
        b'{"kind": "beats", "generation": "1", "standings": []}',
        b'{"kind": "beats", "generation": 1, "standings": [{"global_rank": 1}]}',
        b'{"kind": "signalled", "number": 9, "more": 1}',
        encode(WORDS[0]).replace(b'"step":7', b'"step":"7"'),
        encode(WORDS[0]).replace(b'"still_seconds":1.5', b'"still_seconds":NaN'),
        encode(WORDS[0]).replace(b'"still_seconds":1.5', b'"still_seconds":1.5,"more":0'),
        b'{"kind": "exit", "code": 0}',
        b'{"kind": "stacks", "generation": 1, "stacks": [[0, "text"]]}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_refused(line: bytes) -> None:
    with pytest.raises(Unreadable):
        read_word(line)


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_nonsense_is_refused(line: bytes) -> None:
    for read in (read_word, read_order, read_hello):
        with pytest.raises(Unreadable):
            read(line)


def test_fields_have_bounds() -> None:
    for change in ({"first_rank": -1}, {"ranks": 0}, {"host": "x" * 300}, {"pid": 1.5}):
        fields = {"kind": "hello", "first_rank": 0, "ranks": 1, "host": "x", "pid": 1, **change}
        with pytest.raises(Unreadable):
            read_hello(json.dumps(fields).encode())
    with pytest.raises(Unreadable):
        read_order(b'{"kind": "end", "grace_seconds": NaN}')
