"""Saving while training goes on: it changes no loss, saves the state of its moment, and no fault of it hangs or tears.

Bitwise through the engine, with disks as slow as one likes; faults through the command.
"""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptdist.checkpoint import tensor_file
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.saver import CheckpointSaver
from gptdist.checkpoint.snapshot import to_host
from gptdist.checkpoint.write import SaveOptions
from gptdist.world import World
from launch.rendezvous import open_channel
from tests.dist.cases import CLASSIC, Case, batch_of, engine_of
from tests.dist.commands import Commands, checkpoint_names, curve, last_step, metrics, open_last, tree
from tests.dist.ranks import RankPool

MANY = 100_000
CASES = {
    "DP2, ZeRO 1": Case(CLASSIC, 2, {"zero_stage": 1}),
    "DP3, ZeRO 3": Case(CLASSIC, 3, {"zero_stage": 3}, {"global_batch_size": 6}),
    "TP2 x PP2": Case(CLASSIC, 4, {"tensor": 2, "pipeline": 2, "zero_stage": 0}),
}


def train_and_save(world: World, case: Case, folder: str | None, background: bool) -> tuple[list[float], int]:
    """Losses of six steps, saving after 2 and 4; in the background, the first save's files are written while step 3 is
    done, and a moment later on the last rank. And how many steps were done while a file was being written."""
    losses: list[float] = []
    during = 0
    real, writing, third_step = tensor_file.write_all, threading.Event(), threading.Event()

    def slow(descriptor: int, content: memoryview) -> None:
        writing.set()
        if background and not third_step.wait(60):
            raise TimeoutError("step 3 waits for the file")
        time.sleep(0.2 * (world.global_rank == world.world_size - 1))
        real(descriptor, content)
        writing.clear()

    tensor_file.write_all = slow
    channel = open_channel(world, 120)
    options = SaveOptions(read_back=True)
    try:
        with engine_of(case, world) as engine:
            saver = CheckpointSaver(Path(folder or "/nowhere"), channel, options, background=background)
            for step in range(1, 7):
                losses.append(engine.train_step(batch_of(case, world, step), 1e-3, step).loss)
                if step == 3:
                    during += writing.is_set()
                    third_step.set()
                if folder is not None and step in (2, 4):
                    state = {part.key: part.data.copy() for part in to_host(engine.fragments())}
                    saver.save(step, engine.fragments(), {})
                    if step == 2 and background and not writing.wait(60):
                        raise TimeoutError("the thread does not write")
            if folder is not None:
                saver.wait()
                check_saved(Path(folder) / "step-00000004", state, world)
            saver.close()
    finally:
        tensor_file.write_all = real
    return losses, during


def check_saved(path: Path, state: dict[str, np.ndarray], world: World) -> None:
    """This rank's file holds what this rank held, byte for byte."""
    with tensor_file.TensorFile(path / f"rank-{world.global_rank:05d}.safetensors") as file:
        places = {place.key: place for place in file.fragment_places()}
        if sorted(places) != sorted(state):
            raise AssertionError("other fragments than the rank's")
        for key, place in places.items():
            found = np.empty_like(state[key])
            file.copy_into(found, key, place.box, place.dtype, place.box)
            if found.tobytes() != state[key].tobytes():
                raise AssertionError(f"{key} is not what it was at the step that was saved")


@pytest.mark.parametrize("name", CASES)
def test_saving_changes_no_loss_and_saves_its_moment(name: str, pool: RankPool, tmp_path: Path) -> None:
    case = CASES[name]
    plain = pool.run(train_and_save, case.world_size, case, None, True)
    behind = pool.run(train_and_save, case.world_size, case, str(tmp_path / "behind"), True)
    waited = pool.run(train_and_save, case.world_size, case, str(tmp_path / "waited"), False)
    assert len({tuple(losses) for losses, _ in (*plain, *behind, *waited)}) == 1
    assert [during for _, during in behind] == [1] * case.world_size, "no step was done while a file was written"
    assert not any(during for _, during in waited)
    for folder in ("behind", "waited"):
        with Checkpoint.open(tmp_path / folder / "step-00000002", verify=True) as checkpoint:
            digests = {key: checkpoint.digest(key) for key in checkpoint.names()}
        with Checkpoint.open(tmp_path / "waited" / "step-00000002", verify=True) as checkpoint:
            assert digests == {key: checkpoint.digest(key) for key in checkpoint.names()}


# -- through the command -----------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def is_rank(pid: int, folder: Path) -> bool:
    """Whether a process writes below `folder` now."""
    try:
        open_files = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(str(folder) in name and ".safetensors" in name for name in open_files)


def test_a_rank_killed_during_a_background_save_tears_nothing_and_hangs_nobody(
    commands: Commands, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = {"checkpoint__interval": 2, "checkpoint__keep": 2, "train__steps": MANY}
    run = commands.start_train(run_dir, 3, **settings, launch__restart=False)
    assert run.wait_until(lambda: len(checkpoint_names(run_dir)) > 0), run.wait().err
    victim: list[int] = []

    def killed() -> bool:
        writing = [pid for pid in children(run._process.pid or 0) if is_rank(pid, run_dir / "checkpoints")]
        if writing:
            os.kill(writing[-1], signal.SIGKILL)
            victim.append(writing[-1])
        return bool(victim)

    assert run.wait_until(killed)
    ended = run.wait(40).expect(1)
    assert "was killed by signal 9" in ended.err
    assert not ended.errors or len(ended.errors) == 1
    reached = last_step(run_dir)
    good = open_last(run_dir).step
    resumed = commands.train(run_dir, 2, **settings | {"train__steps": reached + 2}).expect(0)
    assert f"(step {good}," in resumed.out and "passed over" not in resumed.out
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))


def test_the_second_ctrl_c_does_not_wait_for_a_save(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    blocked = run_dir / "checkpoints" / ".tmp-latest"  # a save that never ends: nobody reads from the pipe it opens
    blocked.parent.mkdir(parents=True)
    os.mkfifo(blocked)
    run = commands.start_train(run_dir, 1, checkpoint__interval=2, train__steps=MANY)
    assert run.wait_until(lambda: len(checkpoint_names(run_dir)) > 0), run.wait().err
    run.send(signal.SIGINT)
    assert run.wait_until(lambda: "Ctrl-C again" in run._text(run._err))
    time.sleep(1)
    assert run.is_running()
    run.send(signal.SIGINT)
    assert "interrupted" in run.wait(20).expect(130).err
    assert open_last(run_dir).step == 2


def test_failed_saves_are_said_and_survived_as_often_as_allowed(commands: Commands, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    settings = {"checkpoint__interval": 2, "checkpoint__max_failed_saves": 1, "train__steps": 20}
    ended = commands.train(run_dir, 2, **settings).expect(2)
    assert len(ended.errors) == 1 and "the disk is full" in ended.errors[0]
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: step ")]
    assert len(warnings) == 1
    assert "step 6 was not saved, training goes on (1 in a row; checkpoint.max_failed_saves allows 1)" in warnings[0]
    assert "cannot write step 8 to" in ended.errors[0] and " bytes, " in ended.errors[0]
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004"]
    assert "more will be there at once" in ended.err, "it was not warned before"


def test_a_folder_that_becomes_read_only_is_one_error(commands: Commands, small_disk: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {"checkpoint__interval": 2, "checkpoint__keep": 1, "train__steps": MANY}
    run = commands.start_train(run_dir, 2, **settings, checkpoint__dir=small_disk / "c")
    assert run.wait_until(lambda: (small_disk / "c" / "latest").exists())
    deadline = time.monotonic() + 20
    while subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "it is never left alone long enough"
    ended = run.wait(40)
    ended.one_error("cannot write", "Read-only file system", "checkpoint.dir")
    assert len([line for line in ended.err.splitlines() if "Read-only" in line and "error" in line]) == 1


def test_minutes_save_at_the_same_steps_on_all_ranks_and_staged_files_are_gone(
    commands: Commands, tmp_path: Path
) -> None:
    run_dir, staging = tmp_path / "run", tmp_path / "nvme"
    settings: dict[str, Any] = {
        "checkpoint__interval": 0,
        "checkpoint__interval_minutes": 0.005,
        "checkpoint__staging_dir": staging,
        "checkpoint__keep_every": 1,
        "train__steps": 40,
    }
    commands.train(run_dir, 3, **settings).expect(0)
    assert len(checkpoint_names(run_dir)) >= 2
    for path in (run_dir / "checkpoints").glob("step-*"):
        with Checkpoint.open(path, verify=True) as checkpoint:
            assert checkpoint.state["step"] == checkpoint.step
            assert len(checkpoint.manifest.files) == 3 and (path / "verified").exists()
    assert not list(staging.iterdir())
    assert sorted(curve(run_dir)) == list(range(1, 41))
    assert any("checkpoint/stall_seconds" in row for row in metrics(run_dir))


def test_the_best_by_evaluation_stay(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {"checkpoint__keep": 1, "checkpoint__keep_best": 1, "train__eval_interval": 3}
    # It learns, and then does not: a rate that rises without end.
    rising = {"schedule__kind": "linear", "schedule__warmup_steps": 11, "schedule__decay_steps": 12}
    ended = commands.train(run_dir, 1, **settings, **rising, train__steps=12, optimizer__learning_rate=0.2).expect(0)
    losses = {row["step"]: row["eval/loss"] for row in metrics(run_dir) if "eval/loss" in row and row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert {int(name[5:]) for name in checkpoint_names(run_dir)} == {best, 12}, ended.out
    assert open_last(run_dir).state["evaluation_loss"] == losses[12]


def test_a_run_whose_folder_is_lost_goes_on_from_its_url(commands: Commands, tmp_path: Path) -> None:
    pytest.importorskip("moto", reason="moto is not installed")
    from tests.dist.bucket import Bucket

    bucket = Bucket()
    try:
        run_dir, settings = tmp_path / "run", {"checkpoint__upload": bucket.url("runs/one"), "train__steps": 8}
        words = commands.train_words(run_dir, 2, **settings, train__stop_after=6)
        commands.start(*words, **bucket.env).wait().expect(75)
        before = curve(run_dir)
        shutil.rmtree(run_dir)
        words = commands.train_words(run_dir, 1, **settings)
        ended = commands.start(*words, **bucket.env).wait().expect(0)
        assert re.search(r"resumed from .*step-00000006 \(step 6,", ended.out)
        assert (
            open_last(run_dir).step == 8 and sorted(curve(run_dir)) == [7, 8] and sorted(before) == [1, 2, 3, 4, 5, 6]
        )
        copy = tmp_path / "copy" / "step-00000008"
        words = ["ckpt", "copy", f"{bucket.url('runs/one')}/step-00000008", str(copy)]
        assert "every byte verified" in commands.start(*words, **bucket.env).wait().expect(0).out
        assert tree(copy).keys() == tree(run_dir / "checkpoints" / "step-00000008").keys()

        shutil.rmtree(run_dir)
        fresh = commands.start(*commands.train_words(run_dir, 1, **settings), "--fresh", **bucket.env).wait()
        fresh.one_error("of an earlier run", "step-00000008", "Set it to another folder")
    finally:
        bucket.close()


def test_an_upload_that_fails_stops_nothing(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "step-00000003").write_text("a file where a folder should be")
    run_dir = tmp_path / "run"
    ended = commands.train(run_dir, 1, checkpoint__upload=f"file://{tmp_path}/there", train__steps=3).expect(0)
    assert open_last(run_dir).step == 3 and "done. Step 3 is saved" in ended.out
    assert "step-00000003 was not uploaded to file://" in ended.err and "(1 in a row)" in ended.err
