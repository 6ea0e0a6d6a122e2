"""The drill of runs: some of its faults through the command, and a proof that finds what it must find."""

import argparse
import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptdist.checkpoint.folder import step_folders
from gptdist.errors import ConfigError
from launch.drills import run_faults
from launch.drills.command import run as drill
from launch.drills.lab_faults import LAB_FAULTS
from launch.drills.rank_faults import STRIKES, Strike, Struck, read_trained, write_plan
from launch.drills.run_faults import FAULTS, build_reference
from launch.drills.same_run import Reference, steps_lost
from launch.drills.small_run import Ended, Line, SmallRun
from launch.drills.stage import Stage, Unexpected
from tests.dist.cases import is_full

# One of each kind of end: in place, by the user, by nobody; a proof of its own; mended in between.
FAST = ("kill-rank-0", "kill-launcher", "nan", "bad-shard")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The untouched run on two ranks."""
    folder = tmp_path_factory.mktemp("drill")
    return build_reference(folder, ranks=2)


def test_runs_survive_faults(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_faults, "build_reference", lambda *_: reference)
    names, out = tuple(FAULTS) if is_full() else FAST, tmp_path / "certificate.json"
    work = tmp_path / "work"
    args = argparse.Namespace(faults=names, soak=None, lab=False, ranks=2, seed=5, work=work, out=out)
    code = drill(args)
    found = json.loads(out.read_text())
    assert code == 0 and found["passed"], [finding["verdict"] for finding in found["findings"]]
    assert [finding["fault"] for finding in found["findings"]] == [FAULTS[name].title for name in names]
    by_title = {finding["fault"]: finding for finding in found["findings"]}
    assert "rank 0 was killed by signal 9" in by_title[FAULTS["kill-rank-0"].title]["noticed"]
    assert by_title[FAULTS["kill-launcher"].title]["after_seconds"] < 5
    assert by_title[FAULTS["kill-launcher"].title]["steps_lost"] > 0
    assert list(work.iterdir()) == []


def test_there_are_enough_faults_and_all_are_written_down() -> None:
    told = Path("docs/drills.md").read_text()
    assert len(FAULTS) >= 24
    assert [name for name in (*FAULTS, *LAB_FAULTS) if f"`{name}`" not in told] == []


def test_an_unknown_fault_is_a_mistake(tmp_path: Path) -> None:
    args = argparse.Namespace(
        faults=("kill-rank", "meteor"), soak=None, lab=False, ranks=2, seed=5, work=tmp_path, out=None
    )
    with pytest.raises(ConfigError, match=r"no fault meteor\. Faults: kill-rank, "):
        drill(args)


# -- the proof ---------------------------------------------------------------------------------------------------------


def copied(run: SmallRun, folder: Path) -> SmallRun:
    shutil.copytree(run.folder, folder)
    return dataclasses.replace(run, folder=folder)


def edit(run: SmallRun, global_rank: int, change: Callable[[list[str]], list[str]]) -> None:
    path = run.record_dir / f"trained-{global_rank}.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def test_the_proof_finds_samples_that_are_not_used_once(reference: Reference, tmp_path: Path) -> None:
    steps = reference.run.steps
    assert reference.problem(reference.run) is None

    missing = copied(reference.run, tmp_path / "missing")
    edit(missing, 1, lambda lines: lines[:-1])
    assert reference.problem(missing) == f"step {steps} was not taken by all ranks"

    other = copied(reference.run, tmp_path / "other")
    rows = [read_trained(other.record_dir, 0)[at].rows for at in (6, 7)]
    edit(other, 0, lambda lines: [line.replace(rows[0][2], rows[1][0]) for line in lines])
    assert reference.problem(other) == "step 7 left out 1 of its samples and used 1 others"

    again = copied(reference.run, tmp_path / "again")
    edit(again, 0, lambda lines: [*lines[:8], *lines[4:]])
    assert reference.problem(again) is None
    assert steps_lost(again) == 4

    changed = copied(reference.run, tmp_path / "changed")
    edit(changed, 0, lambda lines: [lines[0].replace(rows[0][2], ""), lines[6].replace(rows[0][2], "x"), *lines])
    assert reference.problem(changed) == "rank 0 took step 7 twice, with other samples"

    beyond = copied(reference.run, tmp_path / "beyond")
    for rank in (0, 1):
        edit(beyond, rank, lambda lines: [*lines, lines[-1].replace(f'"step": {steps}', f'"step": {steps + 1}')])
    assert reference.problem(beyond) == f"step {steps + 1} is beyond the last one"


def test_the_proof_finds_another_state(reference: Reference, tmp_path: Path) -> None:
    early = copied(reference.run, tmp_path / "early")
    shutil.rmtree(step_folders(early.checkpoints_dir)[0])
    assert "tensors differ" in str(reference.problem(early))
    shutil.rmtree(early.checkpoints_dir)
    assert reference.problem(early) == "no checkpoint was left"


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_only_the_right_words_in_time_pass(reference: Reference, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", reference, random.Random(1))
    stage.run.prepare()
    struck = Struck(global_rank=1, step=3, phase="saving", at_nanoseconds=5_000_000_000)
    (stage.run.record_dir / "struck-0-1.json").write_text(json.dumps(dataclasses.asdict(struck)))
    lines = (Line(6_000_000_000, "rank 1 was stopped"), Line(9_000_000_000, "error: rank 1 was killed"))
    stage.ends = (Ended(75, lines, orphans=False, gone_at_nanoseconds=9_500_000_000),)

    noticed = stage.expect_said("rank 1 was killed", within_seconds=4.5)
    assert (noticed.words, noticed.after) == ("rank 1 was killed", 4.0)
    with pytest.raises(Unexpected, match=r"within 3 s, not 4\.0"):
        stage.expect_said("rank 1 was killed", within_seconds=3)
    with pytest.raises(Unexpected, match="nobody said"):
        stage.expect_said("rank 0 was killed")
    stage.expect_code(75)
    with pytest.raises(Unexpected, match="ended with 75, not 0"):
        stage.expect_code(0)
    stage.ends = (dataclasses.replace(stage.ends[0], orphans=True),)
    with pytest.raises(Unexpected, match="outlived"):
        stage.expect_code(75)


def test_every_strike_is_known(tmp_path: Path) -> None:
    """A plan is read as it was written, and names no strike that is not there."""
    strike = Strike("kill", (0, 2), 7, "saving", generation=1, path="here", offset=4)
    write_plan(tmp_path, [strike])
    (fields,) = json.loads((tmp_path / "plan.json").read_text())
    assert Strike(**{**fields, "global_ranks": tuple(fields["global_ranks"])}) == strike
    assert strike.kind in STRIKES
