"""What a job does when its ranks have ended, by the record and a queue that says what it is told to."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gptdist.errors import StorageError
from launch import cli
from launch.ranks.rules import DONE, REQUEUE, RESTART, STOP
from launch.runs.attempts import Attempt, begin, end, read_attempts
from launch.runs.run_files import RunFiles, SavedStep
from tests.unit.fake_slurm import FakeSlurm


class Job:
    """Job 7 of a run in a folder, as its batch script would ask about it."""

    def __init__(self, folder: Path, slurm: FakeSlurm) -> None:
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.slurm = slurm
        self.queue(("7", "RUNNING"))
        self.shows("(null)")

    def queue(self, *jobs: tuple[str, str]) -> None:
        row = "printf '%s\\t%s\\tNone\\t2\\tnode[1-2]\\t1:00\\tN/A\\t{script}\\n' {id} {state}\n"
        script = f"{self.run_dir}/job.sbatch"
        self.slurm.answers("squeue", "".join(row.format(script=script, id=job, state=state) for job, state in jobs))

    def shows(self, excluded: str, nodes: str = "2", update: str = "") -> None:
        """What Slurm tells of the job, in a partition of nine nodes."""
        job = f'"JobId=7 NumNodes={nodes} ExcNodeList={excluded} Partition=main"'
        self.slurm.answers(
            "scontrol",
            f'case "$1 $2" in "show job") echo {job};;\n"show hostnames") echo "$3" | tr , "\\n";;\n'
            f"update*) {update or ':'};; esac",
        )
        self.slurm.answers("sinfo", 'printf "node%d\\n" 1 2 3 4 5 6 7 8 9')

    def was(
        self, action: str | None, exit_code: int = 0, *, restart: int = 0, generation: int = 0, job: int = 7,
        saved: int | None = 10, culprits: tuple[str, ...] = (), start: int = 0, failed: bool = False,
    ) -> None:  # fmt: skip
        """An attempt of the record; without an action, one that has no end."""
        attempt = Attempt(f"slurm {job}", restart, generation, ("node1", "node2"), 4, 1.0, start)
        begin(self.run_dir, attempt)
        if action:
            ended = replace(attempt, ended=2.0, last_step=start + 5, saved_step=saved, reason="why", failed=failed)
            ended = replace(ended, culprits=culprits, exit_code=exit_code, action=action)
            end(self.run_dir, ended)

    def ends(self, srun_exit: int = 0) -> int:
        return cli.main(["after-allocation", str(self.run_dir), "--srun-exit", str(srun_exit)])

    def told(self, *first: str) -> list[list[str]]:
        return [call for call in self.slurm.calls("scontrol") if tuple(call[: len(first)]) == first]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{slurm.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(slurm.folder))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr("launch.cluster.after_allocation.ignore_term", lambda: None)
    monkeypatch.setattr("launch.cluster.slurm.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("launch.cluster.slurm.POLL_SECONDS", 0.1)
    monkeypatch.setattr("launch.cluster.after_allocation.CONTROLLER_SECONDS", 0.3)
    monkeypatch.setattr("launch.cluster.after_allocation.ASK_AGAIN_SECONDS", 0.1)
    return Job(tmp_path, slurm)


@pytest.mark.parametrize(("action", "code"), [(DONE, 0), (STOP, 93), (STOP, 2), (STOP, 1), (STOP, 75)])
def test_what_is_over_is_over_whatever_srun_says(job: Job, action: str, code: int) -> None:
    job.was(action, code)
    job.queue(("7", "RUNNING"), ("8", "PENDING"), ("9", "PENDING"))
    assert job.ends(srun_exit=143) == code
    assert job.told() == []
    assert job.slurm.calls("scancel") == [["8", "9"]], "the rest of the chain"


def test_requeue(job: Job) -> None:
    job.was(REQUEUE, 75)
    assert job.ends() == 75
    assert job.told() == [["requeue", "7"]]


def test_the_queue_is_asked_by_number_since_names_may_be_anothers(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "somebody-else")
    job.was(REQUEUE, 75)
    assert job.ends() == 75
    assert f"--user={os.getuid()}" in job.slurm.calls("squeue")[0]


def test_requeue_without_the_node_at_fault_and_without_those_of_before(job: Job) -> None:
    job.was(REQUEUE, 75, culprits=("node2.cluster.site", "node3"))
    job.shows("node5,node6")
    assert job.ends() == 75
    assert job.told("requeue") == [["requeue", "7"]]
    assert job.told("update") == [["update", "JobId=7", "ExcNodeList=node5,node6,node2,node3"]]


def test_a_job_that_still_ends_is_asked_again(job: Job) -> None:
    job.was(REQUEUE, 75, culprits=("node2",))
    job.shows("(null)", update='[ -e "$FAKE_SLURM/once" ] || { touch "$FAKE_SLURM/once"; exit 1; }')
    assert job.ends() == 75
    assert len(job.told("update")) == 2


def test_a_node_that_cannot_be_excluded_is_said(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.was(REQUEUE, 75, culprits=("node2",))
    job.shows("(null)", update='echo "slurm_update error: Access denied" >&2; exit 1')
    assert job.ends() == 75
    assert "job 7 may get node2 again: slurm_update error: Access denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "excluded"),
    [
        ("2-8", "node1,node5,node6,node2"),
        ("6", "node5,node6,node2"),  # the oldest comes back
        ("8", "node2"),
        ("9", ""),
    ],
)
def test_enough_nodes_are_left_for_a_job_that_would_else_wait_for_ever(
    job: Job, capsys: pytest.CaptureFixture[str], nodes: str, excluded: str
) -> None:
    job.was(REQUEUE, 75, culprits=("node2.cluster.site", "not-of-this-partition"))
    job.shows("node1,node5,node6", nodes)
    assert job.ends() == 75
    assert job.told("update") == [["update", "JobId=7", f"ExcNodeList={excluded}"]]
    assert ("may get node2.cluster.site" in capsys.readouterr().err) == (not excluded)


def test_a_run_that_fewer_nodes_will_do_for_is_left_so_many(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunFiles(job.run_dir, 10, (), {}, None, (), (), min_nodes=7)
    monkeypatch.setattr("launch.cluster.after_allocation.read_run", lambda run_dir: files)
    job.was(REQUEUE, 75, culprits=("node2",))
    job.shows("node1,node5", nodes="9")  # of a requeued job Slurm shows how many it had, not the fewest it asked for
    assert job.ends() == 75
    assert job.told("update") == [["update", "JobId=7", "ExcNodeList=node5,node2"]]


def test_in_a_chain_the_next_one_goes_on(job: Job) -> None:
    job.was(REQUEUE, 75, culprits=("node2",))
    job.queue(("7", "RUNNING"), ("8", "PENDING"), ("9", "PENDING"))
    assert job.ends() == 75
    assert job.told("requeue") == [] and job.slurm.calls("scancel") == []
    assert [call[1] for call in job.told("update")] == ["JobId=8", "JobId=9"]


def test_a_cancelled_job_is_not_requeued(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.was(REQUEUE, 75)
    job.queue(("7", "COMPLETING"))
    assert job.ends() == 75
    assert job.told() == [] and "someone cancelled it" in capsys.readouterr().err


def test_a_job_that_slurm_has_requeued_itself_is_not_given_the_lost_node_again(job: Job) -> None:
    job.was(REQUEUE, 75, culprits=("node2",))
    job.queue(("7", "COMPLETING"))
    assert job.ends() == 75
    assert job.told("requeue") == []
    assert job.told("update") == [["update", "JobId=7", "ExcNodeList=node2"]]


def test_where_requeue_is_forbidden(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.was(REQUEUE, 75)
    job.slurm.answers("scontrol", 'echo "Requested operation is presently disabled for job 7" >&2; exit 1')
    assert job.ends() == 75
    said = capsys.readouterr().err
    assert "presently disabled" in said and "--chain" in said and "job.sbatch" in said


def test_a_controller_that_is_down(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.was(REQUEUE, 75)
    job.slurm.answers("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    assert job.ends() == 75
    assert "job.sbatch" in capsys.readouterr().err
    job.was(DONE, 0)
    assert job.ends() == 0, "a run that is done stays so"
    assert "To go on" not in capsys.readouterr().err


def test_a_controller_that_restarts_is_asked_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cluster.after_allocation.CONTROLLER_SECONDS", 60.0)
    job.was(REQUEUE, 75)
    down = (
        '[ -e "$FAKE_SLURM/up" ] || { touch "$FAKE_SLURM/up"; echo "Unable to contact slurm controller" >&2; exit 1; }'
    )
    row = f"printf '7\\tRUNNING\\tNone\\t2\\tnode[1-2]\\t1:00\\tN/A\\t{job.run_dir}/job.sbatch\\n'"
    job.slurm.answers("squeue", f"{down}\n{row}")
    assert job.ends() == 75
    assert job.told() == [["requeue", "7"]]


@pytest.mark.parametrize("variable", ["SLURM_JOB_END_TIME", "GPTDIST_JOB_ENDS"])
@pytest.mark.parametrize(("left", "told"), [(-5, [["requeue", "7"]]), (500, [])])
def test_a_job_that_its_time_limit_ends_goes_on_and_a_cancelled_one_does_not(
    job: Job, monkeypatch: pytest.MonkeyPatch, variable: str, left: int, told: list[list[str]]
) -> None:
    for name in ("SLURM_JOB_END_TIME", "GPTDIST_JOB_ENDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(int(time.time()) + left))
    job.was(REQUEUE, 75)
    job.queue(("7", "COMPLETING"))
    assert job.ends() == 75
    assert job.told() == told


def test_a_begin_without_an_end_was_killed_without_a_word(job: Job) -> None:
    job.was(None)
    assert job.ends(srun_exit=137) == 75
    (attempt,) = read_attempts(job.run_dir)
    assert attempt.ended is not None and attempt.action == REQUEUE and attempt.failed
    assert attempt.reason is not None and "without a word" in attempt.reason
    assert job.told() == [["requeue", "7"]]


def test_an_end_between_two_attempts_in_place_is_a_failure_of_its_own(job: Job) -> None:
    job.was(RESTART, 1, failed=True)
    assert job.ends(srun_exit=137) == 75
    assert [attempt.generation for attempt in read_attempts(job.run_dir)] == [0, 1]


def test_what_a_run_had_saved_when_it_was_killed_is_on_record(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunFiles(job.run_dir, 100, (), {}, SavedStep(40, job.run_dir, None, True), (), ())
    monkeypatch.setattr("launch.cluster.after_allocation.read_run", lambda run_dir: files)
    job.was(None)
    assert job.ends(srun_exit=137) == 75
    assert read_attempts(job.run_dir)[0].saved_step == 40


def test_killed_again_and_again_without_progress_is_given_up(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    for restart in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        job.was(None, restart=restart, saved=None)
        codes.append(job.ends(srun_exit=137))
    assert codes[:3] == [75, 75, 75] and 93 in codes
    last = read_attempts(job.run_dir)[codes.index(93)]
    assert last.action == STOP and last.reason is not None and "3 restarts in a row saved no step" in last.reason


def test_killed_again_and_again_with_progress_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(8):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        job.was(None, restart=restart, start=10 * restart)
        assert job.ends(srun_exit=137) == 75


def test_where_no_rank_ever_began_nothing_is_tried_again(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.ends(srun_exit=1) == 1
    (attempt,) = read_attempts(job.run_dir)
    assert (attempt.action, attempt.exit_code) == (STOP, 1)
    assert "no rank began to train: srun ended with exit code 1" in capsys.readouterr().err
    assert job.told() == []


def test_where_it_worked_before_a_launch_that_fails_is_tried_elsewhere(job: Job) -> None:
    job.was(REQUEUE, 75, job=6)
    assert job.ends(srun_exit=1) == 75
    assert job.told() == [["requeue", "7"]]


def test_a_mistake_is_not_tried_again(job: Job) -> None:
    job.was(REQUEUE, 75, job=6)
    assert job.ends(srun_exit=2) == 2
    assert job.told() == []


@pytest.mark.parametrize("srun_exit", [138, 143])
def test_asked_to_end_before_any_rank_began(job: Job, srun_exit: int) -> None:
    assert job.ends(srun_exit) == 75
    assert not read_attempts(job.run_dir)[0].failed
    assert job.told() == [["requeue", "7"]]


def test_it_is_for_jobs(job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert job.ends() == 2
    assert "is for the batch script of a run" in capsys.readouterr().err


def test_a_full_disk_leaves_the_decision_to_srun(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_full(run_dir: Path, attempt: Attempt) -> None:
        raise StorageError("disk full.")

    monkeypatch.setattr("launch.cluster.after_allocation.end", is_full)
    assert job.ends(srun_exit=75) == 75
    assert job.told() == [["requeue", "7"]] and "this is not on record: disk full." in capsys.readouterr().err


@pytest.mark.parametrize(("saved", "code"), [(10, 0), (9, 1)])
def test_a_good_end_without_a_record_is_believed_where_the_last_step_is_saved(
    job: Job, monkeypatch: pytest.MonkeyPatch, saved: int, code: int
) -> None:
    files = RunFiles(job.run_dir, 10, (), {}, SavedStep(saved, job.run_dir, None, True), (), ())
    monkeypatch.setattr("launch.cluster.after_allocation.read_run", lambda run_dir: files)
    assert job.ends(srun_exit=0) == code
    assert read_attempts(job.run_dir)[0].action == (STOP if code else DONE)
