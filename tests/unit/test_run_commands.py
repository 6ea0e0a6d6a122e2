"""`gptdist status`, `stop` and `logs` on made-up run folders, with a made-up Slurm in the PATH."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch import cli
from launch.runs import logs, stop
from launch.runs.attempts import Attempt, begin, end

BEGUN = Attempt("local", 0, 0, ("here",), 2, began=time.time(), start_step=0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    rows = [{"time": time.time(), "step": step, "train/loss": 4.0 - step, "speed/step_seconds": 0.1} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"time": 1, "st')
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write what a command of Slurm's does; there are no others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    put("squeue", "exit 0")
    return put


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stop, logs):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(module, "QUEUE_SECONDS", 0.03)
    monkeypatch.setattr(stop, "CANCEL_SECONDS", 0.1)


Slurm = Callable[[str, str], None]
Captured = pytest.CaptureFixture[str]


def test_status_of_one_and_of_all(
    run_dir: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    begin(run_dir, BEGUN)
    assert cli.main(["status", str(run_dir)]) == 0
    assert "state     running: on here" in capsys.readouterr().out
    assert cli.main(["status", str(run_dir), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["step"], shown["loss"]) == ("running", 2, 2.0)
    monkeypatch.chdir(run_dir.parent.parent)
    elsewhere = run_dir.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text("")
    slurm("squeue", f"printf '9\\tPENDING\\tPriority\\t1\\t\\t1:00\\tN/A\\t{elsewhere}/job.sbatch\\n'")
    assert cli.main(["status", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [(one["run"], one["state"]) for one in both] == [("runs/a", "running"), (str(elsewhere), "queued")]
    assert cli.main(["status"]) == 0
    assert "job 9 waits behind jobs of higher priority" in capsys.readouterr().out


def test_slurm_that_does_not_answer_is_no_reason_to_say_nothing(
    run_dir: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    slurm("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert cli.main(["status", str(run_dir)]) == 0
    captured = capsys.readouterr()
    assert "Unable to contact slurm controller (connect failure)" in captured.err
    assert "step      2" in captured.out
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["status", str(run_dir)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["status", "stop", "logs"])
def test_a_folder_that_is_no_run_is_one_error(command: str, tmp_path: Path, capsys: Captured) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert cli.main([command, str(path)]) == 2
        assert f"error: {path} is no run's folder" in capsys.readouterr().err


def test_stop_of_what_does_not_run_leaves_nothing_behind(run_dir: Path, slurm: Slurm, capsys: Captured) -> None:
    begin(run_dir, BEGUN)
    end(run_dir, replace(BEGUN, ended=time.time(), action="stop", exit_code=75, reason="stop file"))
    assert cli.main(["stop", str(run_dir)]) == 0
    assert "nothing to stop" in capsys.readouterr().out
    assert not (run_dir / "STOP").exists()


def test_stop_waits_until_the_run_has_saved(run_dir: Path, slurm: Slurm, capsys: Captured) -> None:
    begin(run_dir, BEGUN)

    def train() -> None:
        while not (run_dir / "STOP").exists():
            time.sleep(0.01)
        (run_dir / "STOP").unlink()
        time.sleep(0.1)
        end(run_dir, replace(BEGUN, ended=time.time(), action="stop", exit_code=75, reason="a stop file was found."))

    training = threading.Thread(target=train)
    training.start()
    assert cli.main(["stop", str(run_dir)]) == 0
    training.join()
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["it has answered, and saves", "ended: a stop file was found.", "no step is saved"]


def test_stop_asks_the_queue_now_and_then_and_at_once_in_the_end(
    run_dir: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "QUEUE_SECONDS", 60.0)
    begin(run_dir, BEGUN)
    slurm("squeue", f"echo asked >> '{run_dir}/asked'")

    def train() -> None:
        while not (run_dir / "STOP").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        end(run_dir, replace(BEGUN, ended=time.time(), action="stop", exit_code=75, reason="a stop file was found."))

    training = threading.Thread(target=train)
    training.start()
    assert cli.main(["stop", str(run_dir)]) == 0
    training.join()
    assert len((run_dir / "asked").read_text().split()) == 3, "before, at once, and at the end"


def test_stop_cancels_what_waits_and_what_does_not_answer(run_dir: Path, slurm: Slurm, capsys: Captured) -> None:
    begin(run_dir, replace(BEGUN, allocation="slurm 7"))
    queue, cancelled = run_dir / "queue", run_dir / "cancelled"
    jobs = {"7": "RUNNING\t\t1\tnode1", "8": "PENDING\tDependency\t1\t"}
    queue.write_text("".join(f"{job}\t{shown}\t1:00\tN/A\t{run_dir}/job.sbatch\n" for job, shown in jobs.items()))
    slurm("squeue", f"cat '{queue}'")
    slurm("scancel", f'for job; do echo "$job" >> "{cancelled}"; sed -i "/^$job\t/d" "{queue}"; done')
    assert cli.main(["stop", str(run_dir), "--patience", "50ms"]) == 1
    assert cancelled.read_text().split() == ["8", "7"]
    assert not (run_dir / "STOP").exists()
    said = capsys.readouterr().out
    assert "cancelled job 8, which waited" in said
    assert "job 7 is cancelled: what it did since its last save is lost" in said


def test_stop_cannot_end_what_is_not_slurms(run_dir: Path, slurm: Slurm, capsys: Captured) -> None:
    begin(run_dir, BEGUN)
    assert cli.main(["stop", str(run_dir), "--patience", "50ms"]) == 1
    assert (run_dir / "STOP").exists()
    assert "will stop it after its next step" in capsys.readouterr().out


def test_stop_needs_slurm_only_for_runs_of_slurms(run_dir: Path, slurm: Slurm, capsys: Captured) -> None:
    slurm("squeue", "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")
    begin(run_dir, BEGUN)
    assert cli.main(["stop", str(run_dir), "--patience", "50ms"]) == 1
    assert (run_dir / "STOP").exists()
    begin(run_dir, replace(BEGUN, allocation="slurm 7"))
    assert cli.main(["stop", str(run_dir)]) == 1
    assert "Could not establish a configuration source" in capsys.readouterr().err


def test_scancel_that_fails_is_one_error(run_dir: Path, slurm: Slurm, capsys: Captured) -> None:
    slurm("squeue", f"printf '9\\tPENDING\\tPriority\\t1\\t\\t1:00\\tN/A\\t{run_dir}/job.sbatch\\n'")
    slurm("scancel", "echo 'scancel: error: Kill job error on job id 9: Access/permission denied' >&2; exit 1")
    assert cli.main(["stop", str(run_dir)]) == 2
    assert capsys.readouterr().err == (
        "error: scancel 9 failed: Kill job error on job id 9: Access/permission denied.\n"
    )


def test_logs_of_ranks_in_order(run_dir: Path, capsys: Captured) -> None:
    folder = run_dir / "logs"
    folder.mkdir()
    for name in ("job-10-rank-0.out", "job-10.out", "job-9.out", "job-9-rank-0.out", "job-9-rank-1.out", "notes.txt"):
        (folder / name).write_text(f"{name} says\n")
    assert cli.main(["logs", str(run_dir)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith("says")]
    assert [line.split()[0] for line in said] == ["job-9.out", "job-9-rank-0.out", "job-10.out", "job-10-rank-0.out"]
    assert cli.main(["logs", str(run_dir), "--rank", "1"]) == 0
    assert capsys.readouterr().out == f"==> {folder}/job-9-rank-1.out <==\njob-9-rank-1.out says\n"
    assert cli.main(["logs", str(run_dir), "--rank", "2"]) == 2
    assert "rank 2" in capsys.readouterr().err


def test_logs_follow_until_the_run_is_over(run_dir: Path, capsys: Captured) -> None:
    folder = run_dir / "logs"
    folder.mkdir()
    (folder / "job-9-rank-0.out").write_text("step 1\n")
    begin(run_dir, BEGUN)

    def write() -> None:
        time.sleep(0.05)
        with (folder / "job-9-rank-0.out").open("a") as file:
            file.write("step 2\n")
        time.sleep(0.05)
        (folder / "job-10-rank-0.out").write_text("step 3\n")
        end(run_dir, replace(BEGUN, ended=1.0, action="done"))

    writing = threading.Thread(target=write)
    writing.start()
    assert cli.main(["logs", str(run_dir), "--follow"]) == 0
    writing.join()
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("==>")]
    assert shown == ["step 1", "step 2", "step 3"]


def test_logs_follow_a_run_that_was_submitted_once_more(run_dir: Path, slurm: Slurm, capsys: Captured) -> None:
    folder, queue = run_dir / "logs", run_dir / "queue"
    folder.mkdir()
    (folder / "job-7-rank-0.out").write_text("step 1\n")
    first = replace(BEGUN, allocation="slurm 7")
    begin(run_dir, first)
    end(run_dir, replace(first, ended=1.0, action="stop", exit_code=75))
    queue.write_text(f"8\tPENDING\tPriority\t1\t\t1:00\tN/A\t{run_dir}/job.sbatch\n")
    slurm("squeue", f"cat '{queue}'")

    def write() -> None:
        time.sleep(0.2)
        second = replace(first, allocation="slurm 8", began=2.0)
        begin(run_dir, second)
        (folder / "job-8-rank-0.out").write_text("step 2\n")
        queue.write_text(f"8\tCOMPLETING\t\t1\tnode1\t1:00\tN/A\t{run_dir}/job.sbatch\n")
        end(run_dir, replace(second, ended=3.0, action="done"))

    writing = threading.Thread(target=write)
    writing.start()
    assert cli.main(["logs", str(run_dir), "--follow"]) == 0
    writing.join()
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("==>")]
    assert shown == ["step 1", "step 2"]
