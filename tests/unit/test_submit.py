"""`gptdist submit` against a Slurm that answers what it is told to: what is made, asked and said, and what is left."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.cluster import run_folder
from launch.cluster.run_folder import SOURCE, new_job_folder
from tests.unit.fake_slurm import LAB, FakeSlurm

RUN = """
model: {num_layers: 2, hidden_size: 32, num_heads: 4, vocab_size: 300, sequence_length: 16}
data: {corpus: s3://key:geheim99@store/corpus}
train: {global_batch_size: 8}
launch: {run_dir: runs/one}
"""
CLUSTER = """
cluster:
  partition: main
  nodes: 2
  gpus_per_node: 2
  cpus_per_rank: 2
  memory: 1GiB
  time_limit: 1h
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """In a folder of its own, with a run and a cluster's file in it."""
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(fake.folder))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("run.yaml").write_text(RUN)
    Path("site.yaml").write_text(CLUSTER)
    for package in run_folder.PACKAGES:  # a small one in place of all the code, for speed
        (tmp_path / "source" / package).mkdir(parents=True)
    monkeypatch.setattr(run_folder, "SOURCE", tmp_path / "source")
    return fake


def submit(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    code = cli.main(["submit", "run.yaml", "--cluster", "site.yaml", *more])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def left() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_a_run_folder_has_all_of_the_run(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = submit(capsys, "train.steps=77")
    assert (code, err) == (0, "")
    run = Path("runs/one").absolute()
    assert str(run) in out and "2 nodes x 2 GPU ranks: DP 4" in out
    assert sorted(path.name for path in run.iterdir()) == [
        *(".key", "checkpoints", "cluster.yaml", "code", "job.sbatch", "job.yaml", "logs", "tensorboard")
    ]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in run.iterdir()}
    assert modes[".key"] == modes["job.yaml"] == 0o600
    assert len((run / ".key").read_text().strip()) == 64
    assert slurm.calls("sbatch") == [["--parsable", str(run / "job.sbatch")]]
    settings = (run / "job.yaml").read_text()
    assert "steps: 77" in settings and f"run_dir: {run}" in settings
    assert "geheim99" not in (run / "job.sbatch").read_text() + out + err


def test_the_copy_of_the_code_runs_by_itself(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "SOURCE", SOURCE)
    submit(capsys)
    code = Path("runs/one/code").absolute()
    assert not list(code.rglob("__pycache__"))
    asks = [sys.executable, str(code), "train", str(code.parent / "job.yaml"), "--print-config"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = subprocess.run(asks, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "global_batch_size: 8" in shown
    where = "import sys; sys.path.insert(0, sys.argv[1]); import launch.cli, gptdist; print(launch.cli.__file__)"
    asks = [sys.executable, "-c", where, str(code)]
    shown = subprocess.run(asks, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(code / "launch" / "cli.py")


def test_submitting_again_goes_on_with_new_settings_and_keeps_the_rest(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(capsys)
    run = Path("runs/one")
    key = (run / ".key").read_text()
    (run / "checkpoints" / "step-00000001").mkdir()
    (run / "code" / "old.py").write_text("")
    (run / ".old-code-1234").mkdir()
    assert submit(capsys, "train.steps=9")[0] == 0
    assert (run / "checkpoints" / "step-00000001").exists()
    assert not (run / "code" / "old.py").exists() and not list(run.glob(".*-code-*"))
    assert (run / ".key").read_text() != key and "steps: 9 " in (run / "job.yaml").read_text()


def test_a_run_with_a_job_is_left_alone(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    submit(capsys)
    script = Path("runs/one/job.sbatch").absolute()
    before = script.stat().st_mtime_ns
    slurm.answers("squeue", f"printf '12\\tRUNNING\\tNone\\t2\\tnode[1-2]\\t1:00\\tN/A\\t%s\\n' '{script}'")
    code, _, err = submit(capsys)
    assert code == 2 and "has a job already: 12 (RUNNING)" in err and "--run-dir" in err
    assert script.stat().st_mtime_ns == before


def test_a_chain(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answers("sbatch", 'echo "$(( $(ls "$FAKE_SLURM/calls" | grep -c stdin) ));cluster"')
    code, out, _ = submit(capsys, "--chain", "3")
    calls = slurm.calls("sbatch")
    first = [words[1] for words in calls]
    assert code == 0 and len(calls) == 3
    ids = re.findall(r"\d+", next(line for line in out.splitlines() if line.startswith("job")).partition(";")[0])
    assert len(ids) == 3 and first[1:] == [f"--dependency=afterany:{job_id}" for job_id in ids[:2]]


def test_of_a_chain_all_are_submitted_or_none(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    refuses = (
        'case "$*" in *afterany*) echo "sbatch: error: Batch job submission failed: No." >&2; exit 1;; esac; echo 5'
    )
    slurm.answers("sbatch", refuses)
    code, _, err = submit(capsys, "--chain", "3")
    assert code == 2 and "Slurm refuses the job: No. " in err
    assert slurm.calls("scancel") == [["5"]]
    assert left() == ["run.yaml", "site.yaml"]


def test_dry_run_shows_and_leaves_nothing(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answers("sbatch", "echo 'sbatch: Job 3 to start at 2026-01-01T00:00:00 on nodes node[1-2]' >&2")
    code, out, err = submit(capsys, "--dry-run", "--name", "mine")
    assert code == 0 and out.startswith("#!/bin/bash\n") and "#SBATCH --job-name=mine\n" in out
    assert "sbatch --test-only says: Job 3 to start at 2026-01-01T00:00:00 on nodes node[1-2]" in err
    assert slurm.calls("sbatch") == [["--test-only"]] and slurm.stdin("sbatch") == [out]
    assert left() == ["run.yaml", "site.yaml"]


def test_dry_run_where_there_is_no_slurm(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code, out, err = submit(capsys, "--dry-run")
    assert code == 0 and out.startswith("#!/bin/bash\n") and "there is no sinfo on the PATH" in err


def test_mistakes_of_both_files_at_once(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = submit(capsys, "train.stepz=3", "cluster.nodez=3")
    assert code == 2 and "Did you mean train.steps?" in err and "Did you mean cluster.nodes?" in err
    assert slurm.calls("sinfo") == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cluster.nodes=3", "train.global_batch_size (8) is not a multiple of"),
        ("parallel.tensor=3", "does not divide the world size 4"),
        ("cluster.partition=mian", "cluster.partition (mian) does not exist. Did you mean main? There are: main."),
        ("cluster.nodes=4", "cluster.nodes is 4, and partition main has 3. Ask for less"),
        ("cluster.gpus_per_node=4", "partition main has 3, of which none have 4 GPUs."),
        ("cluster.gpu_type=h100", "none have 2 GPUs h100."),
        ("cluster.cpus_per_rank=3", "of which none have 2 GPUs and 6 cores. Ask for less by cluster.cpus_per_rank"),
        ("cluster.memory=3GiB", "2 GPUs and 4 cores and 3 GiB."),
        ("cluster.secrets_file=none", "cluster.secrets_file (none) cannot be read: No such file"),
    ],
)
def test_what_cannot_be_had(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], override: str, says: str) -> None:
    code, out, err = submit(capsys, override)
    assert code == 2 and says in err and err.count("error: ") == 1, err
    assert out == "" and slurm.calls("sbatch") == [] and left() == ["run.yaml", "site.yaml"]


def test_limits_of_a_partition(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answers(
        "sinfo", "echo 'main|3|1-1|30:00|4|2000|gpu:2(S:0)|up'; echo 'other*|9|1-infinite|infinite|4|2000|(null)|up'"
    )
    code, _, err = submit(capsys)
    assert code == 2 and "2 problems in what is asked of the cluster" in err
    assert "cluster.time_limit (0-01:00:00) is above what partition main allows (0-00:30:00)" in err
    assert "cluster.nodes (2) is above the 1 that partition main gives one job" in err
    assert "site.yaml:8" in err
    _, _, err = submit(capsys, "cluster.partition=null")
    assert "partition other has 9, of which none have 2 GPUs." in err
    assert "Its nodes: 9 of 4 cores, 1.953 GiB" in err


def test_a_partition_that_starts_no_jobs_is_warned_of(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answers("sinfo", f"echo '{LAB.removesuffix('up')}down'")
    code, _, err = submit(capsys)
    assert code == 0 and len(slurm.calls("sbatch")) == 1
    assert "warning: partition main is not up: the job will wait until it is (`sinfo` shows it).\n" in err


@pytest.mark.parametrize(
    ("said", "about"),
    [
        (
            "Invalid account or account/partition combination specified",
            "cluster.account (not set), cluster.partition (main)",
        ),
        ("Invalid qos specification", "cluster.qos (not set)"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "cluster.time_limit (0-01:00:00)"),
        ("Invalid generic resource (gres) specification", "cluster.gpus_per_node (2)"),
        ("Node count specification invalid", "cluster.nodes (2), cluster.partition (main)"),
        ("Requested node configuration is not available", "cluster.nodes (2), cluster.gpus_per_node (2)"),
        ("Invalid partition name specified", "cluster.partition (main)"),
        ("User's group not permitted to use this partition", "cluster.partition (main)"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "cluster.nodes (2)"),
        ("Memory specification can not be satisfied", "cluster.memory (1 GiB)"),
        ("Something new", "see --dry-run"),
    ],
)
def test_refusals(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], said: str, about: str) -> None:
    slurm.answers("sbatch", f'echo "sbatch: error: Batch job submission failed: {said}" >&2; exit 1')
    code, out, err = submit(capsys)
    assert code == 2 and err.count("error: ") == 1 and said in err and about in err, err
    assert out == "" and left() == ["run.yaml", "site.yaml"]


@pytest.mark.parametrize(
    "stderr",
    [
        "slurm_load_partitions: Unable to contact slurm controller (connect failure)",
        "sinfo: error: If munged is up, restart with --num-threads=10\\nsinfo: error: Protocol authentication error",
        "slurm_load_partitions: Socket timed out on send/recv operation",
    ],
)
def test_a_controller_that_is_down(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], stderr: str) -> None:
    slurm.answers("sinfo", f"printf '{stderr}\\n' >&2; exit 1")
    code, _, err = submit(capsys)
    assert code == 1 and "Slurm's controller could not be asked" in err and "scontrol ping" in err
    assert left() == ["run.yaml", "site.yaml"]


def test_a_controller_that_does_not_answer(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.cluster.slurm.ANSWER_SECONDS", 0.2)
    slurm.answers("sinfo", "exec sleep 30")
    code, _, err = submit(capsys)
    assert code == 1 and "sinfo did not answer within 0.2 s" in err


def test_no_slurm(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, err = submit(capsys)
    assert code == 1 and "no login node of a Slurm cluster" in err and left() == ["run.yaml", "site.yaml"]


def test_folders_that_a_script_cannot_hold(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = submit(capsys, "--run-dir", "a\nb")
    assert code == 2 and "'" in err and "--run-dir" in err and len(err.splitlines()) == 1


def test_names_of_jobs_are_checked(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        submit(capsys, "--name", "$(reboot)")
    assert ended.value.code == 2 and "is no name for a job" in capsys.readouterr().err


def test_a_secrets_file_is_for_its_owner(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("secrets")
    path.write_text("WANDB_API_KEY=geheim88\n")
    path.chmod(0o640)
    code, _, err = submit(capsys, "cluster.secrets_file=secrets")
    assert code == 2 and "its mode is 0640. Run: chmod 600 secrets" in err
    path.chmod(0o600)
    code, out, err = submit(capsys, "cluster.secrets_file=secrets")
    assert code == 0
    everything = "".join(file.read_text() for file in Path("runs/one").glob("*") if file.is_file())
    assert "geheim88" not in everything + out + err and f". {path.absolute()}" in everything


def test_a_job_inherits_nothing_of_an_outer_job(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_JOB_ID", "RANK", "MASTER_ADDR", "OMPI_COMM_WORLD_RANK", "SLURM_CONF", "MINE"):
        monkeypatch.setenv(name, "1")
    slurm.answers("sbatch", 'env > "$FAKE_SLURM/env"; echo 5')
    assert submit(capsys)[0] == 0
    names = {line.partition("=")[0] for line in (slurm.folder / "env").read_text().splitlines()}
    assert {"SLURM_CONF", "MINE"} <= names
    assert not names & {"SLURM_NTASKS", "SLURM_JOB_ID", "RANK", "MASTER_ADDR", "OMPI_COMM_WORLD_RANK"}


def test_fewer_nodes_may_do(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = submit(capsys, "launch.min_nodes=1", "cluster.nodes=3")
    assert code == 0 and "1 to 3 nodes x 2 GPU ranks: DP 4" in out, (
        "six ranks, of which four share a batch of eight evenly"
    )
    assert "#SBATCH --nodes=1-3\n" in Path("runs/one/job.sbatch").read_text()
    code, _, err = submit(capsys, "launch.min_nodes=3")
    assert code == 2 and "launch.min_nodes (3) is above cluster.nodes (2)" in err and "site.yaml:4" in err


def test_what_is_missing_here_is_warned_of(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = submit(capsys, "data.corpus=nowhere", "cluster.venv=/nowhere")
    assert code == 0
    assert "there is no corpus nowhere on this machine" in err and "there is no /nowhere/bin/python" in err


def test_a_folder_that_cannot_be_written(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    code, _, err = submit(capsys, "--run-dir", "file/run")
    assert code == 2 and "--run-dir" in err and err.count("error: ") == 1
    assert left() == ["file", "run.yaml", "site.yaml"]


def test_a_failure_leaves_an_older_run_as_it_was(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(RuntimeError), new_job_folder(run, {}):
        raise RuntimeError
    assert (run / "checkpoints").exists() and (run / "code").exists()
    with pytest.raises(RuntimeError), new_job_folder(tmp_path / "b" / "c" / "run", {}):
        raise RuntimeError
    assert not (tmp_path / "b").exists()


def test_the_lab_is_what_sinfo_says_of_it() -> None:
    from launch.cluster.slurm import _parse_partition

    lab = _parse_partition(LAB)
    assert lab is not None and (lab.name, lab.is_default, lab.nodes, lab.gpus) == ("main", True, 3, {"": 2})
    assert (lab.max_nodes, lab.time_limit_seconds, lab.cpus, lab.memory_bytes) == (None, None, 4, 2000 << 20)
