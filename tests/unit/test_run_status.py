"""In what state a run is: every state from the records and queues that lead to it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.slurm_queue import QueuedJob, parse_queue
from launch.runs.attempts import Attempt, Note
from launch.runs.goodput import LoggedStep
from launch.runs.run_files import RunFiles, SavedStep
from launch.runs.run_status import RunStatus, build_status
from launch.runs.status import render_status

NOW = 1000.0
RUN = Path("/shared/runs/a b")
JOB = QueuedJob("7", "RUNNING", "", 2, "node[1-2]", "58:20", "2026-01-01T10:00:00", f"{RUN}/job.sbatch")
BEGUN = Attempt("slurm 7", 0, 0, ("node1", "node2"), 4, began=900.0, start_step=0)
LATEST: dict[str, Any] = {
    "time": 990.0,
    "step": 40,
    "train/loss": 3.25,
    "speed/tokens_per_second": 12400.0,
    "speed/eta_seconds": 100.0,
}
SAVED = SavedStep(30, RUN / "checkpoints" / "step-00000030", 980.0, True)


def files(*attempts: Attempt, latest: dict[str, Any] | None = None, saved: SavedStep | None = SAVED) -> RunFiles:
    latest = LATEST if latest is None else latest
    log = (LoggedStep(latest["time"], latest["step"], 1.0),) if latest else ()
    return RunFiles(RUN, 100, log, latest, saved, attempts, (Note(950.0, "slow rank", "rank 3 on node2"),))


def status(found: RunFiles, *jobs: QueuedJob) -> RunStatus:
    return build_status(found, jobs, NOW)


def test_a_running_job() -> None:
    shown = status(files(BEGUN), JOB)
    assert (shown.state, shown.detail) == ("running", "job 7 on node[1-2], 58:20 left")
    assert (shown.step, shown.steps, shown.loss, shown.tokens_per_second) == (40, 100, 3.25, 12400.0)
    assert (shown.eta_seconds, shown.logged_age) == (90.0, 10.0)
    assert (shown.saved_step, shown.saved_age, shown.saved_verified) == (30, 20.0, True)
    assert shown.goodput == pytest.approx(0.4)
    assert shown.notes == ("slow rank: rank 3 on node2",)


def test_before_the_first_start() -> None:
    empty = files(latest={}, saved=None)
    waiting = replace(JOB, state="PENDING", reason="Priority", hosts="", start="2026-01-01T12:00:00")
    shown = status(empty, waiting)
    assert shown.state == "queued"
    assert shown.detail == "job 7 waits behind jobs of higher priority; expected to start 2026-01-01T12:00:00"
    assert status(empty, JOB).state == "starting"
    assert (status(empty).state, status(empty).goodput) == ("new", None)


def test_a_requeued_run_waits_with_what_is_saved() -> None:
    ended = replace(BEGUN, ended=995.0, last_step=41, saved_step=30, reason="preempted", exit_code=75, action="requeue")
    waiting = replace(JOB, state="PENDING", reason="BeginTime", hosts="", start="")
    shown = status(files(ended), waiting)
    assert (shown.state, shown.step, shown.tokens_per_second) == ("requeued", 30, None)
    assert shown.detail == "job 7 waits for its time: Slurm holds a requeued job for a while"
    assert status(files(ended)).state == "lost"
    again = status(files(ended), JOB)
    assert (again.state, again.step) == ("starting", 30)


def test_the_next_attempt_counts_from_where_it_began() -> None:
    ended = replace(BEGUN, ended=995.0, last_step=41, saved_step=30, reason="node2 was lost", action="requeue")
    ended = replace(ended, culprits=("node2",))
    again = replace(BEGUN, restart=1, hosts=("node1", "node3"), began=998.0, start_step=30)
    shown = status(files(ended, again), JOB)
    assert (shown.state, shown.step) == ("running", 30)
    (restart,) = shown.restarts
    assert (restart.reached, restart.back_to, restart.how) == (41, 30, "requeued without node2")
    assert restart.reason == "node2 was lost"


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ({"generation": 1}, "restarted in place"),
        ({"restart": 1}, "requeued"),
        ({"allocation": "slurm 8"}, "went on in slurm 8"),
    ],
)
def test_how_it_was_restarted(end: dict[str, Any], how: str) -> None:
    (restart,) = status(files(BEGUN, replace(BEGUN, began=999.0, **end)), JOB).restarts
    assert (restart.how, restart.reason) == (how, "it ended without a word")


@pytest.mark.parametrize(
    ("end", "state", "word"),
    [
        ({"action": "done", "exit_code": 0, "last_step": 100}, "done", "last step"),
        ({"action": "stop", "exit_code": 75, "reason": "stop file"}, "stopped", "stop file"),
        (
            {"action": "stop", "exit_code": 93, "reason": "no progress"},
            "failed",
            "given up, since a requeue would not help",
        ),
        ({"action": "stop", "exit_code": 2, "reason": "no corpus"}, "failed", "a mistake to mend: no corpus"),
        ({"action": "stop", "exit_code": 1, "reason": "rank 1 died"}, "failed", "rank 1 died"),
        ({"action": "stop", "exit_code": 1}, "failed", "exit code 1"),
    ],
)
def test_how_it_ended(end: dict[str, Any], state: str, word: str) -> None:
    shown = status(files(replace(BEGUN, ended=999.0, **end)))
    assert shown.state == state
    assert word in shown.detail
    assert (shown.step, shown.eta_seconds) == (100 if state == "done" else 30, None)


def test_killed_without_a_word() -> None:
    assert status(files(BEGUN)).state == "lost"
    assert build_status(files(BEGUN), None, NOW).state == "running"  # nobody to ask
    assert build_status(files(BEGUN), None, NOW + 500).state == "silent"
    local = replace(BEGUN, allocation="local")
    assert build_status(replace(files(local), alive=False), [], NOW).state == "lost"
    assert build_status(replace(files(local), alive=True), [], NOW + 500).state == "running"
    assert status(files(local)).state == "running"
    assert build_status(files(local), [], NOW + 500).state == "silent"


def test_a_job_is_the_runs_by_its_script_or_by_an_attempt() -> None:
    other = replace(JOB, id="8", script="/shared/runs/b/job.sbatch")
    by_hand = replace(JOB, script="/tmp/other.sh")
    assert [job.id for job in status(files(), other, JOB).jobs] == ["7"]
    assert [job.id for job in status(files(BEGUN), other, by_hand).jobs] == ["7"]
    assert status(files(), other, replace(JOB, script="")).jobs == ()


def test_what_squeue_prints_is_understood() -> None:
    shown = (
        "7\tRUNNING\tNone\t2\tnode[1-2]\t58:20\t2026-01-01T10:00:00\t/a b/job.sbatch\n"
        "8\tPENDING\tDependency\t2\t\t1:00:00\tN/A\t/a\tb/job.sbatch\n"
        "slurm_load_jobs error\n\n"
        "9\tPENDING\tlaunch failed requeued held\t1\t(null)\t1:00:00\tN/A\t(null)\n"
    )
    first, second, third = parse_queue(shown)
    assert (first.reason, first.hosts, first.time_left, first.script) == ("", "node[1-2]", "58:20", "/a b/job.sbatch")
    assert (second.waits, second.start, second.script) == (True, "", "/a\tb/job.sbatch")
    assert (third.script, third.waits, first.waits) == ("", True, False)


def test_one_run_is_a_line_for_each_thing() -> None:
    ended = replace(BEGUN, ended=960.0, last_step=35, saved_step=30, reason="node2 was\x1b[2J lost", action="requeue")
    shown = render_status(status(files(ended, replace(BEGUN, restart=1, began=970.0, start_step=30)), JOB))
    lines = dict(line.split(None, 1) for line in shown.splitlines() if not line.startswith(" "))
    assert lines["state"] == "running: job 7 on node[1-2], 58:20 left"
    assert lines["step"] == "40 of 100 (40 %)"
    assert lines["loss"] == "3.2500, logged 10s ago"
    assert lines["speed"] == "12.4k tok/s, 1m30s to go"
    assert lines["saved"] == "step 30, 20s ago, verified"
    assert lines["restarts"] == "1"
    assert "step 35, back to 30: requeued. node2 was\\x1b[2J lost" in shown
