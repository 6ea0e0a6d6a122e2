"""The batch script: its text, and what it does when bash runs it, with names that no shell should ever see unquoted."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.job_script import Job, _quote_option, check_paths, job_name, render_job_script
from launch.cluster.settings import ClusterConfig, ContainerConfig, load_cluster
from tests.unit.fake_slurm import FakeSlurm

GOLDEN = Path(__file__).parent / "golden"
CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
HOSTILE = "a b'\"$(touch PWNED)`touch PWNED`;touch PWNED&|<>*?[!]{~}# é"
RECORD_ARGUMENTS = """#!/bin/bash
printf '%s\\0' "$@" "${SETTING-}" "${TMPDIR-}" "${A_SECRET-}" "$GPTDIST_JOB_ENDS" > "$RECORDS/$2"
exit "${PYTHON_ENDS:-0}"
"""


@pytest.mark.parametrize("name", ["gpu", "dgx_h100", "cpu"])
def test_the_text_is_the_golden_file(name: str) -> None:
    """To accept a new text, delete the file, run this, and look at the difference."""
    cluster = load_cluster(CLUSTERS / f"{name}.yaml").config
    job = Job("my_run", Path("/shared/runs/my run"), Path("/home/me/project"), "/home/me/venv/bin/python", 1)
    text = render_job_script(cluster, job)
    golden = GOLDEN / f"job_{name}.sbatch"
    if not golden.exists():
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden.name} was not there and is now: look at it")
    assert text == golden.read_text(encoding="utf-8")


class Bench:
    """A place with hostile names, where the script's commands record what they are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slurm = FakeSlurm(folder / "slurm", ("srun", "squeue", "module", "apptainer"))
        self.records = folder / "records"
        self.run_dir, self.work_dir = folder / HOSTILE / "run", folder / f"work {HOSTILE}"
        for made in (self.records, self.run_dir / "code", self.work_dir):
            made.mkdir(parents=True)
        self.python = self.slurm.add("python $(touch PWNED)", RECORD_ARGUMENTS)
        self.slurm.answers("srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')
        self.job = Job("name", self.run_dir, self.work_dir, str(self.python))

    def start(self, cluster: ClusterConfig, **environment: str) -> "subprocess.Popen[str]":
        script = self.folder / "job.sbatch"
        script.write_text(render_job_script(cluster, self.job).replace("#!/bin/bash -l", "#!/bin/bash"))
        env = {
            **os.environ,
            "PATH": f"{self.slurm.bin}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.slurm.folder),
            "RECORDS": str(self.records),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "7",
            "USER": "me",
            **environment,
        }
        return subprocess.Popen(
            ["bash", str(script)], env=env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, cluster: ClusterConfig, **environment: str) -> tuple[int, str]:
        process = self.start(cluster, **environment)
        output, _ = process.communicate(timeout=20)
        assert not list(self.folder.rglob("PWNED")), "a name was run as a command"
        return process.returncode, output

    def recorded(self, name: str) -> list[str]:
        return (self.records / name).read_bytes().decode().split("\0")[:-1]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_hostile_names_reach_python_as_they_are(bench: Bench) -> None:
    secrets_file = bench.folder / f"secrets {HOSTILE}"
    secrets_file.write_text("A_SECRET='$(touch PWNED) x'\n")
    cluster = ClusterConfig(
        ranks_per_node=3,
        cpus_per_rank=2,
        modules=(HOSTILE,),
        env={"SETTING": HOSTILE},
        scratch=f"/scratch {HOSTILE}/%u/%j",
        secrets_file=str(secrets_file),
    )
    code, output = bench.run(cluster)
    assert (code, output) == (0, "")
    run = str(bench.run_dir)
    values = [HOSTILE, f"/scratch {HOSTILE}/me/7", "$(touch PWNED) x", ""]
    assert bench.recorded("train") == [f"{run}/code", "train", f"{run}/job.yaml", *values]
    assert bench.recorded("after-allocation")[:5] == [f"{run}/code", "after-allocation", run, "--srun-exit", "0"]
    assert bench.slurm.calls("module") == [["load", HOSTILE]]
    (srun,) = bench.slurm.calls("srun")
    assert srun[:4] == ["--nodes=2", "--ntasks=6", "--ntasks-per-node=3", "--cpus-per-task=2"]
    assert f"--output={run}/logs/job-%j-rank-%t.out" in srun
    assert "$(touch PWNED) x" not in (bench.folder / "job.sbatch").read_text(), "the secret is in the script"


@pytest.mark.parametrize(
    ("squeue", "ends"), [("echo 2030-01-02T03:04:05", "1893553445"), ("echo N/A", ""), ("exit 1", ""), ("echo", "")]
)
def test_ranks_are_told_when_their_time_is_over(bench: Bench, squeue: str, ends: str) -> None:
    bench.slurm.answers("squeue", squeue)
    bench.run(ClusterConfig(ranks_per_node=1), TZ="UTC")
    assert bench.recorded("train")[-1] == ends


def test_the_virtual_environment_comes_first(bench: Bench) -> None:
    venv = bench.folder / "venv $(touch PWNED) '"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(RECORD_ARGUMENTS)
    python.chmod(0o755)
    assert bench.run(ClusterConfig(ranks_per_node=1, venv=str(venv)))[0] == 0
    assert bench.recorded("train")[1] == "train"
    assert bench.slurm.calls("srun")[0][-4] == str(python)


def test_what_the_last_command_ends_with_is_what_the_job_ends_with(bench: Bench) -> None:
    bench.slurm.answers("srun", "exit 7")
    assert bench.run(ClusterConfig(ranks_per_node=1), PYTHON_ENDS="75")[0] == 75
    assert bench.recorded("after-allocation")[4] == "7"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_is_usr1_to_srun(bench: Bench, number: signal.Signals) -> None:
    ready, seen = bench.folder / "ready", bench.folder / "seen"
    waits = f"trap 'echo saved > {seen}; exit 75' USR1; trap 'exit 9' TERM; touch {ready}; while :; do sleep 0.02; done"
    bench.slurm.answers("srun", waits)
    process = bench.start(ClusterConfig(ranks_per_node=1))
    deadline = time.monotonic() + 10
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert seen.exists()
    assert bench.recorded("after-allocation")[3:5] == ["--srun-exit", "75"]


def test_a_second_signal_does_not_end_the_wait(bench: Bench) -> None:
    ready, count = bench.folder / "ready", bench.folder / "count"
    waits = (
        f"trap 'echo x >> {count}' USR1; touch {ready}; until [ $(wc -l < {count}) = 2 ]; do sleep 0.02; done; exit 3"
    )
    count.write_text("")
    bench.slurm.answers("srun", waits)
    process = bench.start(ClusterConfig(ranks_per_node=1))
    deadline = time.monotonic() + 10
    for signals in range(2):
        while (not ready.exists() or len(count.read_text()) < 2 * signals) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert bench.recorded("after-allocation")[3:5] == ["--srun-exit", "3"]


def test_apptainer(bench: Bench) -> None:
    container = ContainerConfig(
        kind="apptainer",
        image=f"/images/{HOSTILE}.sif",
        mounts=("/data", "/a:/b:ro"),
        python="py",
        options=("--cleanenv",),
    )
    bench.run(ClusterConfig(gpus_per_node=2, container=container))
    (call,) = bench.slurm.calls("apptainer")
    run, work = str(bench.run_dir), str(bench.work_dir)
    mounts = [f"{run}:{run}", f"{work}:{work}", "/data", "/a:/b:ro"]
    assert call == [
        *("exec", "--nv", "--pwd", work, "--cleanenv"),
        *(word for mount in mounts for word in ("--bind", mount)),
        *(f"/images/{HOSTILE}.sif", "py", f"{run}/code", "train", f"{run}/job.yaml"),
    ]
    assert bench.recorded("after-allocation")[1] == "after-allocation", "outside of the image"


def test_pyxis(bench: Bench) -> None:
    container = ContainerConfig(kind="pyxis", image=f"docker://{HOSTILE}", mounts=("/data",), python=str(bench.python))
    assert bench.run(ClusterConfig(gpus_per_node=2, container=container))[0] == 0
    (call,) = bench.slurm.calls("srun")
    run, work = str(bench.run_dir), str(bench.work_dir)
    assert f"--container-image=docker://{HOSTILE}" in call
    assert f"--container-mounts={run}:{run},{work}:{work},/data:/data" in call
    assert f"--container-workdir={work}" in call
    assert bench.recorded("train")[1] == "train"


def options_of(cluster: ClusterConfig, **of_job: Any) -> list[str]:
    job = Job("n", Path("/r"), Path("/w"), "/p", **of_job)
    return [line[8:] for line in render_job_script(cluster, job).splitlines() if line.startswith("#SBATCH ")]


def test_what_is_not_set_is_not_asked_for() -> None:
    assert options_of(ClusterConfig(ranks_per_node=2)) == [
        "--job-name=n",
        "--output=/r/logs/job-%j.out",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks-per-node=2",
        "--signal=B:USR1@180",
        "--requeue",
    ]


def test_fewer_nodes_are_taken_only_where_there_are_no_more() -> None:
    asked = options_of(ClusterConfig(nodes=4, ranks_per_node=2, cpus_per_rank=3), min_nodes=2)
    assert asked[3:5] == ["--nodes=2-4", "--mincpus=6"]
    assert not [option for option in asked if "task" in option]
    assert "--nodes=4" in options_of(ClusterConfig(nodes=4, ranks_per_node=2), min_nodes=4)


def test_all_that_can_be_asked_for() -> None:
    cluster = ClusterConfig(
        partition="gpu", account="lab", qos="high", constraint="a|b", nodes=4, exclusive=True, gpus_per_node=8,
        gpu_type="h100", cpus_per_rank=3, memory=(5 << 30) + 1, time_limit=90000.0,
        sbatch_options=("--comment=a b", "--x"),
    )  # fmt: skip
    asked = options_of(cluster)
    assert asked[3:] == [
        "--partition=gpu",
        "--account=lab",
        "--qos=high",
        '--constraint="a|b"',
        "--nodes=4",
        "--ntasks-per-node=8",
        "--cpus-per-task=3",
        "--gres=gpu:h100:8",
        "--mem=5121M",
        "--exclusive",
        "--time=1-01:00:00",
        "--signal=B:USR1@180",
        "--requeue",
        '--comment="a b"',
        "--x",
    ]


def as_slurm_reads(text: str) -> str:
    """The first word of a line of `#SBATCH`: quotes of both kinds, a backslash for the next character, # a comment."""
    word, quote, escaped = "", "", False
    for letter in text:
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter in "\"'":
            quote = letter
        elif letter.isspace() or letter == "#":
            break
        else:
            word += letter
    return word


@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp"))))
def test_options_are_read_as_they_were_meant(value: str) -> None:
    assert as_slurm_reads(_quote_option(value)) == value


@pytest.mark.parametrize("path", ["/a\nb", "/a\\b", "/a\x07b", "/a%jb"])
def test_paths_that_a_script_cannot_hold(path: str) -> None:
    (text,) = check_paths([Path(path)], in_container=False)
    assert "--run-dir" in text and text.isprintable()


def test_paths_that_a_container_cannot_mount() -> None:
    assert list(check_paths([Path("/a:b"), Path("/ok")], in_container=False)) == []
    assert len(list(check_paths([Path("/a:b"), Path("/a,b"), Path("/ok")], in_container=True))) == 2


def test_names_of_jobs() -> None:
    assert job_name(Path("/x/my_run-1.2")) == "my_run-1.2"
    assert job_name(Path(f"/x/{HOSTILE.replace('/', '')}")).isascii()
    assert job_name(Path("/é")) == "gptdist"
