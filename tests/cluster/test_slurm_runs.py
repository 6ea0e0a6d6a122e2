"""Runs on a real Slurm: preempted, robbed of nodes, in chains, smaller and larger: each reaches its last step alone."""

import re
from pathlib import Path

import pytest

from tests.cluster.slurm_lab import SlurmLab
from tests.cluster.slurm_runs import SlurmRun
from tests.dist.commands import Commands, curve, last_step, open_last

# Half a minute each on a machine that does nothing else; each allocation is four interpreters that import all of torch.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def undisturbed(tmp_path: Path, corpus: Path) -> Commands:
    """For the run that nothing happens to: on this machine, without Slurm."""
    return Commands(tmp_path, corpus)


def same_weights(run: SlurmRun, other: Path) -> None:
    """Bitwise, by the digests of every tensor."""
    said = run.gptdist("ckpt", "diff", run.run_dir, other)
    assert said.code == 0, said.out + said.err


def test_preempted_requeued_without_a_dead_node_and_finished(
    lab: SlurmLab, tmp_path: Path, corpus: Path, undisturbed: Commands
) -> None:
    layout = {"parallel.tensor": 2, "train.steps": 60}
    run = SlurmRun(lab, tmp_path / "runs" / "a b", corpus, layout)
    (job,) = run.submit()
    assert run.status()["state"] in ("queued", "starting")

    run.await_step(12)
    status = run.status()
    assert (status["state"], status["steps"], status["restarts"]) == ("running", 60, [])
    assert status["step"] >= 12
    assert status["loss"] > 0
    assert 0 < status["goodput"] < 1
    assert status["saved_step"] % 10 == 0
    assert re.fullmatch(rf"job {job} on node\[1-2\], .* left", status["detail"])

    with lab.closed():
        lab.run("scancel", "--batch", "--signal=TERM", job).expect()
        status = run.await_status("requeued")
        reached = last_step(run.run_dir)
        assert status["saved_step"] == status["step"] == reached  # saved where it was, nothing is made again
        assert status["detail"].startswith(f"job {job} waits for")
    run.await_step(reached + 12)
    status = run.await_status("running")
    (restart,) = status["restarts"]
    assert (restart["reached"], restart["back_to"], restart["how"]) == (reached, reached, "requeued")
    assert "USR1" in restart["reason"] or "TERM" in restart["reason"]

    first, last = lab.hosts(job)
    with lab.closed():
        lab.kill_node(int(last.removeprefix("node")))
        status = run.await_status("requeued")
        assert reached <= status["step"] == status["saved_step"]
    status = run.await_status("done", timeout_seconds=180)
    assert [one["how"] for one in status["restarts"]] == ["requeued", f"requeued without {last}"]
    assert last in status["restarts"][1]["reason"]
    assert status["restarts"][1]["hosts"] == [first, "node3"]
    assert (status["step"], status["saved_step"], status["jobs"]) == (60, 60, [])
    assert lab.await_job(job, "COMPLETED") == "COMPLETED"

    alone = tmp_path / "alone"
    undisturbed.start("train", run.config, "--nproc", 4, f"launch.run_dir={alone}").wait().expect(0)
    same_weights(run, alone)
    assert curve(run.run_dir) == curve(alone)


def test_a_chain_of_four_allocations_reaches_the_last_step(lab: SlurmLab, tmp_path: Path, corpus: Path) -> None:
    # Each job is stopped in its turn, as its time limit would.
    run = SlurmRun(lab, tmp_path / "runs" / "chain", corpus, {"train.steps": 48})
    jobs = run.submit("--chain", 4, "cluster.nodes=1")
    assert len(jobs) == 4
    for number, job in enumerate(jobs):
        lab.await_job(job, "RUNNING")
        assert [one["id"] for one in run.status()["jobs"]] == jobs[number:]
        if number == 3:
            break
        run.await_step(12 * number + 6)
        lab.run("scancel", "--batch", "--signal=USR1", job).expect()
        lab.await_job(job, "COMPLETED", "FAILED", "COMPLETING")
    status = run.await_status("done")
    assert [one["how"] for one in status["restarts"]] == [f"went on in slurm {job}" for job in jobs[1:]]
    assert [one["reached"] - one["back_to"] for one in status["restarts"]] == [0, 0, 0]
    assert sorted(curve(run.run_dir)) == list(range(1, 49))


def test_shrinks_to_the_nodes_there_are_and_grows_back(
    lab: SlurmLab, tmp_path: Path, corpus: Path, undisturbed: Commands
) -> None:
    run = SlurmRun(lab, tmp_path / "runs" / "elastic", corpus, {"launch.min_nodes": 2, "train.steps": 48})
    (job,) = run.submit("cluster.nodes=3", "cluster.gpus_per_node=1")
    run.await_step(12)
    assert lab.hosts(job) == ["node1", "node2", "node3"]

    with lab.closed():
        lab.kill_node(1)  # that of the job's script, so that Slurm itself requeues
        run.await_status("requeued")
        before = last_step(run.run_dir)
    run.await_step(before + 10)
    assert lab.hosts(job) == ["node2", "node3"]

    lab.start_node(1)
    lab.await_nodes(3)
    lab.run("scancel", "--batch", "--signal=USR1", job).expect()
    status = run.await_status("done", timeout_seconds=180)
    assert [one["hosts"] for one in status["restarts"]] == [["node2", "node3"], ["node1", "node2", "node3"]]

    alone = tmp_path / "alone"
    words = (f"launch.run_dir={alone}", "launch.min_nodes=null")
    undisturbed.start("train", run.config, "--nproc", 3, *words).wait().expect(0)
    there, here = curve(run.run_dir), curve(alone)
    assert [row[2] for row in there.values()] == [row[2] for row in here.values()]  # the samples consumed
    for step, (loss, _, _) in here.items():
        assert there[step][0] == pytest.approx(loss, rel=2e-5)
    with open_last(run.run_dir) as one, open_last(alone) as other:
        assert one.state["samples"] == other.state["samples"]


def test_stop_saves_and_nothing_comes_back(lab: SlurmLab, tmp_path: Path, corpus: Path) -> None:
    run = SlurmRun(lab, tmp_path / "runs" / "stopped", corpus, {"train.steps": 5000})
    first, second = run.submit("--chain", 2, "cluster.nodes=1", "cluster.gpus_per_node=1")
    run.await_step(12)
    said = run.gptdist("stop", run.run_dir).expect(0).out
    assert f"cancelled job {second}, which waited" in said
    status = run.status()
    assert (status["state"], status["jobs"]) == ("stopped", [])
    assert 12 <= status["step"] == status["saved_step"] == last_step(run.run_dir)
    assert f"step {status['step']} is saved" in said
    assert not (run.run_dir / "STOP").exists()
    assert lab.job(first)["Restarts"] == "0"
    shown = run.gptdist("logs", run.run_dir).expect(0).out
    assert f"job-{first}-rank-0.out <==" in shown
    assert f"Step {status['step']} is saved in" in shown
