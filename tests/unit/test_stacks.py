"""Stacks of processes that hang in various ways, and why some do not answer."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.ranks import stacks
from launch.ranks.stacks import (
    STACK_SIGNAL,
    Frame,
    RankStacks,
    ThreadStack,
    answer_stacks,
    ask_stacks,
    collective_of,
    create_pad,
    is_stopped,
    parse_stacks,
    render_stacks,
    why_silent,
)

HERE = Path(__file__).name
C10D = "/site-packages/torch/distributed/distributed_c10d.py"
CLOCK = "/somewhere/gptdist/engine/clock.py"
DUMP = """Thread 0x00007f8216b6c6c0 (most recent call first):
  File "/lib/threading.py", line 982 in run
  File "/lib/threading.py", line 1002 in _bootstrap

Thread 0x00007f8216b6c6c1 [saver] (most recent call first):
  <no Python frame>

Current thread 0x00007f82179cfb80 (most recent call first):
  File "/a "quoted" path/in file.py", line 12 in <listcomp>
  File "/b.py", line ??? in outer
  ...
"""


@pytest.fixture(autouse=True)
def no_py_spy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH without it; a folder to put one in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@contextlib.contextmanager
def rank(hang: Callable[[], object], *, answers: bool = True) -> Iterator[tuple[int, int]]:
    """The process id and the pad of a forked process that is in `hang`."""
    pad = create_pad()
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        if answers:
            answer_stacks(pad)
        os.write(tell, b"!")
        hang()
        os._exit(0)
    os.read(ready, 1)
    time.sleep(0.05)  # until it is in `hang`
    try:
        yield pid, pad
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        for fd in (pad, ready, tell):
            os.close(fd)


def sleep() -> None:
    time.sleep(60)


def hold_the_interpreter() -> None:
    """In native code, with the interpreter's lock, for longer than anyone waits."""
    re.match(r"(a*)*$", "a" * 40 + "b")


def sleep_among_threads() -> None:
    for _ in range(3):
        threading.Thread(target=sleep, daemon=True).start()
    sleep()


@pytest.mark.parametrize("hang", [sleep, hold_the_interpreter, sleep_among_threads])
def test_a_process_that_hangs_says_where(hang: Callable[[], object]) -> None:
    with rank(hang) as (pid, pad):
        began = time.monotonic()
        found = ask_stacks({pid: pad})[pid]
        assert time.monotonic() - began < 1
    assert found.silent is None and found.waits_in is None
    assert len(found.threads) == (4 if hang is sleep_among_threads else 1)
    functions = [frame.function for frame in found.threads[0].frames if frame.file.endswith(HERE)]
    assert hang.__name__ in functions and functions[-1].startswith("test_")
    assert render_stacks(found).splitlines()[-1] == render_end(found)


def render_end(found: RankStacks) -> str:
    frame = found.threads[0].frames[0]
    return f"{frame.file}:{frame.line} in {frame.function}"


def test_asking_again_gives_the_new_answer_alone() -> None:
    with rank(sleep) as (pid, pad):
        first, second = ask_stacks({pid: pad}), ask_stacks({pid: pad})
        assert first == second and len(first[pid].threads) == 1


def test_many_are_asked_at_once_and_one_that_is_stopped_is_told_from_the_others() -> None:
    with contextlib.ExitStack() as running:
        pads = dict(running.enter_context(rank(sleep)) for _ in range(4))
        stopped = list(pads)[2]
        os.kill(stopped, signal.SIGSTOP)
        assert until(lambda: is_stopped(stopped))
        began = time.monotonic()
        found = ask_stacks(pads, seconds=0.5)
        assert time.monotonic() - began < 1.5
        assert list(found) == list(pads)
        assert [pid for pid, answer in found.items() if answer.silent] == [stopped]
        assert found[stopped] == RankStacks((), "it is stopped (SIGSTOP, or a debugger)")
        os.kill(stopped, signal.SIGCONT)
        assert ask_stacks(pads)[stopped].threads


def until(condition: Callable[[], bool]) -> bool:
    """Whether it came true within five seconds."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_process_that_does_not_handle_the_signal_is_not_killed_by_it() -> None:
    with rank(sleep, answers=False) as (pid, pad):
        found = ask_stacks({pid: pad}, seconds=0.2)[pid]
        assert found.threads == () and found.silent and "only just been started" in found.silent
        os.kill(pid, 0)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_a_process_that_has_ended_says_so() -> None:
    with rank(sleep) as (pid, pad):
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: why_silent(pid, 1) == "it has ended")  # not reaped yet
        assert ask_stacks({pid: pad}, seconds=0.2)[pid].silent == "it has ended"
        os.waitpid(pid, 0)
        assert ask_stacks({pid: pad}, seconds=0.2)[pid].silent == "it has ended"
        assert not is_stopped(pid)


@pytest.mark.parametrize(
    ("state", "place", "expected"),
    [
        ("D", "nfs_wait_bit_killable", "stuck in the kernel (nfs_wait_bit_killable): a disk, a network file system"),
        ("R", "", "did not answer within 2 s; it is busy in native code"),
        ("S", "futex_wait", "did not answer within 2 s; it is waiting in native code (futex_wait)"),
        ("t", "", "stopped by a debugger"),
    ],
)
def test_why_a_process_does_not_answer(state: str, place: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_state", lambda pid: state)
    monkeypatch.setattr(stacks, "_handles", lambda pid: True)
    monkeypatch.setattr(stacks, "_kernel_function", lambda pid: place)
    assert expected in why_silent(1, 2.0)


def install_py_spy(folder: Path, body: str) -> None:
    path = folder / "py-spy"
    path.write_text(f"#!{sys.executable}\nimport json, sys, time\n{body}\n")
    path.chmod(0o755)


def test_py_spy_is_asked_about_the_silent_alone(no_py_spy: Path) -> None:
    install_py_spy(
        no_py_spy,
        "pid = int(sys.argv[sys.argv.index('--pid') + 1])\n"
        "frames = [{'name': 'wait', 'filename': '/x.py', 'line': 3}]\n"
        "other = {'pid': pid, 'os_thread_id': pid + 1, 'thread_id': 1, 'frames': []}\n"
        "print(json.dumps([other, {'pid': pid, 'os_thread_id': pid, 'thread_id': 255, 'frames': frames}]))",
    )
    with rank(sleep) as first, rank(sleep) as second:
        os.kill(second[0], signal.SIGSTOP)
        found = ask_stacks(dict([first, second]), seconds=0.5)
    assert found[first[0]].silent is None and found[first[0]].threads[0].frames[0].function == "sleep"
    assert found[second[0]].silent == "it is stopped (SIGSTOP, or a debugger)"
    assert found[second[0]].threads == (ThreadStack("ff", (Frame("/x.py", 3, "wait"),)), ThreadStack("1", ()))


@pytest.mark.parametrize("body", ["time.sleep(60)", "sys.exit(1)", "print('{')", "print('[{}]')"])
def test_a_py_spy_that_fails_or_hangs_costs_no_more_than_its_time(
    body: str, no_py_spy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "PY_SPY_SECONDS", 0.5)
    install_py_spy(no_py_spy, body)
    with rank(sleep) as (pid, pad):
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        found = ask_stacks({pid: pad}, seconds=0.2)[pid]
        assert time.monotonic() - began < 2
    assert found.threads == () and found.silent


def test_what_faulthandler_writes_is_read() -> None:
    assert parse_stacks(DUMP) == (
        ThreadStack(
            "00007f82179cfb80",
            (Frame('/a "quoted" path/in file.py', 12, "<listcomp>"), Frame("/b.py", 0, "outer")),
        ),
        ThreadStack("00007f8216b6c6c1", ()),
        ThreadStack(
            "00007f8216b6c6c0", (Frame("/lib/threading.py", 982, "run"), Frame("/lib/threading.py", 1002, "_bootstrap"))
        ),
    )
    assert parse_stacks("") == () == parse_stacks("rubbish\n  File")


def test_the_collective_is_the_innermost_function_of_torch_distributed() -> None:
    reduce = [Frame(C10D, 3250, "all_reduce"), Frame("/site-packages/torch/distributed/c10d_logger.py", 83, "wrapper")]
    ours = [Frame("/gptdist/engine/gradients.py", 60, "reduce")]
    assert collective_of([Frame(CLOCK, 101, "noticed"), *reduce, *ours]) == "all_reduce"
    assert collective_of([*reduce, *ours]) == "all_reduce"
    assert collective_of([*ours, *reduce]) is None  # torch called us: we do not wait in it
    handle = [Frame(CLOCK, 101, "noticed"), Frame("/megatron/p2p_communication.py", 300, "_communicate"), *ours]
    assert collective_of(handle) == "the wait of _communicate (p2p_communication.py:300)"
    assert collective_of([]) is None


def test_a_report_shows_the_innermost_calls_last() -> None:
    frames = tuple(Frame(f"/f{depth}.py", depth, f"g{depth}") for depth in range(20))
    lines = render_stacks(RankStacks((ThreadStack("0", frames),)), most_frames=3).splitlines()
    assert lines == ["... 17 calls above", "/f2.py:2 in g2", "/f1.py:1 in g1", "/f0.py:0 in g0"]
    assert render_stacks(RankStacks((), "it has ended")) == "it has ended"


def test_the_signal_is_one_that_nothing_else_uses() -> None:
    assert signal.SIGRTMIN < STACK_SIGNAL < signal.SIGRTMAX
    with rank(sleep) as (pid, pad):
        for _ in range(20):
            os.kill(pid, STACK_SIGNAL)
        assert until(lambda: os.fstat(pad).st_size > 0)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
