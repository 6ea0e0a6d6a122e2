"""What is recorded of attempts survives kills, full disks and several writers."""

import errno
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.errors import StorageError
from launch.ranks.place import Allocation
from launch.ranks.record import Record
from launch.runs import attempts
from launch.runs.attempts import ATTEMPTS_FILE, Attempt, begin, end, note, read_attempts, read_notes

FIRST = Attempt("slurm 7", 0, 0, ("node1", "node2"), 4, began=1000.0, start_step=0)
ENDED = replace(
    FIRST,
    ended=1060.5,
    last_step=23,
    saved_step=20,
    reason="rank 3 on node2 was killed by signal 9 (SIGKILL).",
    culprits=("node2",),
    exit_code=75,
    action="requeue",
)


def test_what_was_recorded_is_read(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    begin(tmp_path, FIRST)
    assert read_attempts(tmp_path) == [FIRST]
    end(tmp_path, ENDED)
    second = replace(FIRST, restart=1, began=1100.0, start_step=20)
    begin(tmp_path, second)
    assert read_attempts(tmp_path) == [ENDED, second]


def test_an_attempt_that_was_killed_without_a_word_has_no_end(tmp_path: Path) -> None:
    killed = replace(FIRST, allocation="local")
    begin(tmp_path, killed)
    begin(tmp_path, replace(killed, generation=1))
    end(tmp_path, replace(killed, generation=1, ended=3.0, action="done", exit_code=0))
    first, second = read_attempts(tmp_path)
    assert (first.ended, first.action) == (None, None)
    assert (second.ended, second.action) == (3.0, "done")


def test_a_run_that_began_anew_has_no_attempts_before_that(tmp_path: Path) -> None:
    begin(tmp_path, FIRST)
    end(tmp_path, ENDED)
    anew = replace(FIRST, allocation="local", began=2000.0, fresh=True)
    begin(tmp_path, anew)
    assert read_attempts(tmp_path) == [anew]
    again = replace(anew, generation=1, fresh=False)
    begin(tmp_path, again)
    begin(tmp_path, again)
    end(tmp_path, replace(anew, ended=2100.0))
    assert read_attempts(tmp_path) == [replace(anew, ended=2100.0), again]


def test_the_first_attempt_of_a_run_that_begins_anew_says_so(tmp_path: Path) -> None:
    end(tmp_path, replace(ENDED, allocation="local"))
    record = Record(tmp_path, Allocation(), can_restart=True, fresh=True)
    for generation in (0, 1):
        record.start(generation, ["node1"], 2)
        record.began(0)
    found = read_attempts(tmp_path)
    assert [(attempt.restart, attempt.generation, attempt.fresh) for attempt in found] == [(1, 0, True), (1, 1, False)]
    Record(tmp_path, Allocation(), can_restart=True, fresh=False).start(1, ["node1"], 2)
    assert [attempt.restart for attempt in read_attempts(tmp_path)] == [1, 1, 2]


def test_notes_stand_between(tmp_path: Path) -> None:
    begin(tmp_path, FIRST)
    note(tmp_path, "slow rank", "rank 3 on node2 takes 2.1 times as long as the others")
    end(tmp_path, ENDED)
    (found,) = read_notes(tmp_path)
    assert (found.kind, found.text) == ("slow rank", "rank 3 on node2 takes 2.1 times as long as the others")
    assert found.at > 1e9
    assert read_attempts(tmp_path) == [ENDED]


def test_the_folder_is_made_and_an_end_stands_without_its_beginning(tmp_path: Path) -> None:
    end(tmp_path / "runs" / "a", ENDED)
    assert read_attempts(tmp_path / "runs" / "a") == [ENDED]


@given(cut=st.integers(min_value=0, max_value=400))
def test_a_torn_line_costs_no_other(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run_dir = tmp_path_factory.mktemp("torn")
    begin(run_dir, FIRST)
    whole = (run_dir / ATTEMPTS_FILE).read_bytes()
    end(run_dir, ENDED)
    both = (run_dir / ATTEMPTS_FILE).read_bytes()
    kept = both[: len(whole) + min(cut, len(both) - len(whole) - 2)]  # never the whole second line
    (run_dir / ATTEMPTS_FILE).write_bytes(kept)
    assert read_attempts(run_dir) == [FIRST]
    second = replace(FIRST, restart=1)
    begin(run_dir, second)
    assert read_attempts(run_dir) == [FIRST, second]


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    begin(tmp_path, FIRST)
    newer = {"event": "begin", **attempts.asdict(FIRST), "restart": 1, "of_a_newer_version": [1]}
    lines = [
        "",
        "null",
        "[]",
        "7",
        '{"event": "note"}',
        '{"event": "begin"}',
        '{"event": "end", "hosts": 3}',
        "\x00\x00",
        json.dumps(newer),
    ]
    with (tmp_path / ATTEMPTS_FILE).open("a") as file:
        file.write("\n".join(lines) + "\n")
    assert read_attempts(tmp_path) == [FIRST, replace(FIRST, restart=1)]


def _record_many(run_dir: Path, writer: int) -> None:
    for generation in range(20):
        begin(run_dir, replace(FIRST, allocation=f"slurm {writer}", generation=generation, hosts=("node",) * 500))


def test_several_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_record_many, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    found = [attempt.name for attempt in read_attempts(tmp_path)]
    assert sorted(found) == sorted(
        (f"slurm {number}", 0, generation) for number in range(4) for generation in range(20)
    )


def test_a_full_disk_is_one_clear_error_and_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, FIRST)
    written = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if len(data) > 50:
            return written(descriptor, data[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half_then_full)
        with pytest.raises(StorageError, match=r"cannot write .*attempts\.jsonl: No space left on device"):
            end(tmp_path, ENDED)
    assert read_attempts(tmp_path) == [FIRST]
    end(tmp_path, ENDED)
    assert read_attempts(tmp_path) == [ENDED]


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS_FILE).mkdir()
    with pytest.raises(StorageError, match=r"attempts\.jsonl cannot be read: Is a directory"):
        read_attempts(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        begin(tmp_path, FIRST)
