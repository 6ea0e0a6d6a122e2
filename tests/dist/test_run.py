"""A run from its start to its ends: stops that can be resumed, faults, outer launchers, and what comes after.

Through the command, on a tiny model.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.commands import (
    Commands,
    checkpoint_names,
    curve,
    last_step,
    metrics,
    mpi_launcher,
    open_last,
    tree,
)

ROOT = Path(__file__).resolve().parents[2]
# Open MPI refuses to run as root without these; CI may be root in a container.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MANY = 100_000  # steps: more than any test waits for


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of ten steps on two ranks with a batch ramp, saved every third step and at the end, three kept."""
    folder = tmp_path_factory.mktemp("finished")
    ramp = {"schedule__batch_ramp.start": 4, "schedule__batch_ramp.increment": 4, "schedule__batch_ramp.samples": 24}
    Commands(folder, corpus).train(folder / "run", 2, **ramp, train__eval_interval=5).expect(0)
    return folder / "run"


# -- stops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "nproc"),
    [(signal.SIGTERM, 2), (signal.SIGUSR1, 1), (signal.SIGUSR2, 2), (signal.SIGINT, 2), (signal.SIGINT, 1)],
)
def test_a_signal_saves_and_can_be_resumed(
    number: signal.Signals, nproc: int, commands: Commands, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = {"train__steps": MANY, "checkpoint__interval": 0}
    run = commands.start_train(run_dir, nproc, **settings)
    assert run.wait_until(lambda: last_step(run_dir) >= 2)
    run.send(number)
    ended = run.wait(30).expect(75)

    seen = "SIGTERM" if number == signal.SIGINT else number.name
    step = open_last(run_dir).step
    assert f"stopped: {seen}" in ended.out and f"Step {step} is saved" in ended.out
    assert step == last_step(run_dir) and len(checkpoint_names(run_dir)) == 1
    assert not ended.errors and "Traceback" not in ended.err
    if number == signal.SIGTERM:
        resumed = commands.train(run_dir, nproc, **settings, train__stop_after=step + 2).expect(75)
        assert f"step {step}" in resumed.out
        assert sorted(curve(run_dir)) == list(range(1, step + 3))


def test_a_stop_file_saves_and_is_removed(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = commands.start_train(run_dir, 2, train__steps=MANY)
    assert run.wait_until(lambda: last_step(run_dir) >= 2)
    (run_dir / "STOP").touch()
    ended = run.wait(30).expect(75)
    assert "stop file" in ended.out and not (run_dir / "STOP").exists()
    step = open_last(run_dir).step
    assert step == last_step(run_dir)

    (run_dir / "STOP").touch()  # one that was made between two starts counts too, after one step
    commands.train(run_dir, 1, train__steps=MANY).expect(75)
    assert open_last(run_dir).step == step + 1


def test_stop_after_and_fresh(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = commands.train(run_dir, 1, train__stop_after=4).expect(75)
    assert "train.stop_after (4)" in ended.out
    assert open_last(run_dir).step == 4
    first = curve(run_dir)

    fresh = commands.train(run_dir, 1, "--fresh", train__stop_after=2, train__seed=7).expect(75)
    aside = run_dir / "checkpoints" / "set-aside-1"
    assert str(aside) in fresh.out
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoint_names(run_dir) == ["step-00000002"]
    assert curve(run_dir)[1] != first[1], "it did not start anew"
    assert "seed: 7" in (run_dir / "config.yaml").read_text()


def test_processes_of_their_own_do_the_same(commands: Commands, tmp_path: Path) -> None:
    """All other commands here are forked from a process that has imported everything; these are as from a shell."""
    run_dir = tmp_path / "run"
    words = commands.train_words(run_dir, 2, train__steps=MANY, checkpoint__interval=0)
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, stdout=out, stderr=err)
        while last_step(run_dir) < 2 and process.poll() is None:
            time.sleep(0.02)
        process.terminate()
        code = process.wait(60)
    assert code == 75, (tmp_path / "err").read_text()
    assert open_last(run_dir).step == last_step(run_dir)
    assert f"Step {last_step(run_dir)} is saved" in (tmp_path / "out").read_text()

    words = ["generate", str(run_dir), "--prompt", "def ", "--tokens", "4"]
    shell = [sys.executable, "-m", "launch.cli", *words]
    ended = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == commands.run(*words).expect(0).out


# -- the whole way -----------------------------------------------------------------------------------------------


def test_a_finished_run(finished: Path, commands: Commands) -> None:
    rows = metrics(finished)
    assert sorted(curve(finished)) == list(range(1, 11))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 5, 10]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert losses[-1] < losses[0] - 0.3, "it did not learn"
    # The ramp: three sizes, 4, 8 and 12, each from a third of the 24 samples on.
    assert [int(curve(finished)[step][2]) for step in range(1, 11)] == [4, 8, *range(16, 16 + 8 * 12, 12)]
    assert checkpoint_names(finished) == ["step-00000006", "step-00000009", "step-00000010"]
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        ["attempts.jsonl", "config.yaml", "tokenizer.json", "metrics.jsonl", "checkpoints"]
    )

    before = tree(finished)
    again = commands.run("train", finished / "config.yaml", "--nproc", 2).expect(0)
    assert "nothing to do" in again.out and "train.steps (10)" in again.out
    assert tree(finished) == before


def test_what_comes_after(finished: Path, commands: Commands) -> None:
    listed = commands.run("ckpt", "list", finished).expect(0).out
    assert [line.split()[0] for line in listed.splitlines()] == ["step", "10", "9", "6"]
    assert listed.count("good") == 3

    evaluated = commands.run("eval", finished, "--samples", "8").expect(0).out
    in_training = [row["eval/loss"] for row in metrics(finished) if "eval/loss" in row][-1]
    assert f"loss {in_training:.4f} nats per token" in evaluated

    words = ["--prompt", "def ", "--prompt", "import ", "--tokens", "12", "--seed", "5"]
    texts = [commands.run("generate", finished, *words).expect(0).out for _ in range(2)]
    assert texts[0] == texts[1] and "def " in texts[0] and "import " in texts[0]
    last = finished / "checkpoints" / checkpoint_names(finished)[-1]
    assert commands.run("generate", last, *words).expect(0).out == texts[0]


def test_a_resharded_checkpoint_is_resumed_as_if_it_were_the_old_one(
    finished: Path, commands: Commands, tmp_path: Path
) -> None:
    untouched, resharded = tmp_path / "untouched", tmp_path / "resharded"
    shutil.copytree(finished, untouched)
    newest = checkpoint_names(finished)[-1]
    source = finished / "checkpoints" / newest
    commands.run("ckpt", "reshard", source, resharded / "checkpoints" / newest, "--ranks", 5).expect(0)
    for run_dir in (untouched, resharded):
        words = (finished / "config.yaml", f"launch.run_dir={run_dir}", "train.steps=11")
        assert "step 10" in commands.run("train", *words).expect(0).out
    assert open_last(resharded).step == 11
    said = commands.run("ckpt", "diff", untouched, resharded).expect(0).out
    assert "tensors are equal, the run's state is equal" in said


def test_an_average_is_evaluated_and_generates_but_is_not_resumed(
    finished: Path, commands: Commands, tmp_path: Path
) -> None:
    names = checkpoint_names(finished)
    sources = [finished / "checkpoints" / name for name in names]
    mean = tmp_path / "run" / "checkpoints" / names[-1]
    commands.run("ckpt", "average", *sources, "--out", mean).expect(0)
    assert "nats per token" in commands.run("eval", mean, "--samples", "8").expect(0).out
    commands.run("generate", mean, "--tokens", "4").expect(0)
    before = tree(tmp_path / "run")
    again = commands.run("train", finished / "config.yaml", f"launch.run_dir={tmp_path / 'run'}", "train.steps=12")
    again.one_error("cannot be resumed: it is the mean of 3 checkpoints' weights", "checkpoint.start_from")
    assert tree(tmp_path / "run") == before


def test_steps_added_later_go_on(finished: Path, commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    config = finished / "config.yaml"
    commands.run("train", config, f"launch.run_dir={run_dir}", "train.steps=12", "--nproc", "2").expect(0)
    assert open_last(run_dir).step == 12 and sorted(curve(run_dir)) == list(range(1, 13))


# -- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nproc", "precision"), [(1, "fp32"), (2, "bf16")])
def test_a_run_that_diverges_says_so_once(nproc: int, precision: str, commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {"optimizer__learning_rate": 1e30, "schedule__warmup_steps": 0, "train__precision": precision}
    ended = commands.train(run_dir, nproc, **settings, train__max_skipped_steps=3, train__steps=MANY).expect(1)
    assert len(ended.errors) == 1 and "3 steps in a row" in ended.errors[0] and "learning_rate" in ended.errors[0]
    assert "Traceback" not in ended.err and "[rank" not in ended.errors[0]


def test_a_full_disk_for_logs_never_stops_training(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    (run_dir / "tensorboard").write_text("a file where a folder should be")
    ended = commands.train(run_dir, 2, monitor__tensorboard=True).expect(0)
    assert open_last(run_dir).step == 10
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: monitor: ")]
    assert [line.split()[2] for line in warnings if "training goes on" in line] == ["jsonl", "tensorboard"]
    assert "step 10/10" in ended.out and not ended.errors


def test_a_disk_that_fills_up_is_one_error_and_keeps_what_was_saved(commands: Commands, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    ended = commands.train(run_dir, 2, checkpoint__interval=2)
    ended.one_error("cannot write", "the disk is full", "checkpoint.keep")
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004"]
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    assert open_last(run_dir).step == 4, "it is whole"
    commands.train(run_dir, 2, checkpoint__interval=0).one_error("has room for")
    # With room again, the same command goes on.
    shutil.rmtree(run_dir / "checkpoints" / "step-00000002")
    resumed = commands.train(run_dir, 2, checkpoint__interval=0).expect(0)
    assert "(step 4, " in resumed.out and open_last(run_dir).step == 10


# -- outer launchers ---------------------------------------------------------------------------------------------


def test_under_torchrun(commands: Commands, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    _check_outer_run([*words, "--standalone", "-m", "launch.cli"], commands, tmp_path / "run")


@pytest.mark.parametrize("library", ["MPICH", "Open MPI"])
def test_under_mpirun(library: str, commands: Commands, tmp_path: Path) -> None:
    launcher = mpi_launcher(library)
    if launcher is None:
        pytest.skip(f"no mpiexec of {library} here: pip install mpich, or the machine's package openmpi-bin")
    words = [launcher, "-n", "2"] + (["--oversubscribe"] if library == "Open MPI" else [])
    _check_outer_run([*words, sys.executable, "-m", "launch.cli"], commands, tmp_path / "run")


def _check_outer_run(launcher: list[str], commands: Commands, run_dir: Path) -> None:
    """Two ranks train as the two that the command starts itself."""
    words = commands.train_words(run_dir, 1, train__steps=4)
    assert words[2:4] == ["--nproc", "1"]
    ended = subprocess.run(
        [*launcher, *words[:2], *words[4:]],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | AS_ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "on 2 x cpu" in ended.stdout and ended.stdout.count("done. Step 4") == 1
    own = run_dir.with_name("own")
    commands.train(own, 2, train__steps=4).expect(0)
    assert curve(run_dir) == curve(own)
