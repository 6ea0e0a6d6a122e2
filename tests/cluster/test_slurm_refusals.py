"""What a real Slurm refuses, and one that does not answer: each is one clear error, and nothing is left behind."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.slurm_lab import Said, SlurmLab
from tests.cluster.slurm_runs import LAB, RUN
from tests.dist.commands import render_run

# Several commands in one process, which has imported everything once.
COMMANDS = """
import contextlib, io, json, sys
from launch.cli import main
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
REFUSED = {
    "partition=nowhere": ("cluster.partition (nowhere) does not exist", "inner", "command line"),
    "nodes=4": ("cluster.nodes is 4", "partition main has 3", "lab.yaml"),
    "partition=short nodes=3": ("cluster.nodes is 3", "partition short"),
    "partition=short time_limit=6m": ("cluster.time_limit (0-00:06:00) is above what partition short allows",),
    "gpus_per_node=3 ranks_per_node=2": ("GPUs", "cluster.gpus_per_node"),
    "memory=100GiB": ("cluster.memory",),
    "partition=closed": ("Slurm refuses the job", "account", "partition (closed)"),
    "partition=closed account=chemistry": ("Slurm refuses the job", "account (chemistry)"),
    "partition=inner": ("Slurm refuses the job", "partition (inner)"),
    "partition=broken": ("Slurm refuses the job", "partition (broken)"),
    "constraint=h100": ("Slurm refuses the job", "feature", "cluster.constraint (h100)"),
    "sbatch_options=[--licenses=matlab:1]": ("Slurm refuses the job", "license", "--licenses=matlab:1"),
    "sbatch_options=[--reservation=friday]": ("Slurm refuses the job", "reservation", "--reservation=friday"),
    "sbatch_options=[--nodelist=node9]": ("Slurm refuses the job", "node name", "--nodelist=node9"),
    "sbatch_options=[--no-such-thing]": ("Slurm refuses the job", "unrecognized option", "--no-such-thing"),
}


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    values = {**RUN, "data.corpus": str(corpus), "launch.run_dir": str(tmp_path / "runs" / "a")}
    (tmp_path / "run.yaml").write_text(render_run(values))
    return tmp_path / "run.yaml"


@pytest.fixture
def mute(lab: SlurmLab) -> Iterator[SlurmLab]:
    """A lab whose controller is down."""
    lab.kill_controller()
    yield lab
    lab.start_controller()


def submit(lab: SlurmLab, config: Path, *settings: Sequence[str]) -> list[Said]:
    """One submission for each list of words."""
    words = [["submit", str(config), "--cluster", str(LAB), *each] for each in settings]
    done = lab.run(sys.executable, "-c", COMMANDS, json.dumps(words), cwd=config.parent, timeout_seconds=120).expect()
    return [Said(*json.loads(line)) for line in done.out.splitlines()]


def test_every_refusal_is_one_error_that_names_the_setting(lab: SlurmLab, config: Path) -> None:
    said = submit(lab, config, *([f"cluster.{word}" for word in settings.split()] for settings in REFUSED))
    missing = []
    for (settings, words), answer in zip(REFUSED.items(), said, strict=True):
        error = answer.expect(2).err
        assert error.count("error: ") == 1, settings
        missing += [f"{settings}: {word}: {error}" for word in words if word not in error]
    assert missing == []
    assert lab.run("squeue", "--noheader").out == ""
    assert not (config.parent / "runs").exists()


def test_a_dry_run_says_what_slurm_thinks_and_submits_nothing(lab: SlurmLab, config: Path) -> None:
    (said,) = submit(lab, config, ["--dry-run"])
    assert "#SBATCH --nodes=2" in said.expect(0).out
    assert "to start at" in said.err
    assert lab.run("squeue", "--noheader").out == ""
    assert not (config.parent / "runs").exists()


def test_a_controller_that_is_down_is_said_in_bounded_time(mute: SlurmLab, config: Path) -> None:
    (said,) = submit(mute, config, [])
    assert said.expect(1).err.count("error: ") == 1
    assert "controller" in said.err
    assert not (config.parent / "runs").exists()
