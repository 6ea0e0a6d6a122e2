"""What Slurm's commands print, read: times, partitions, GPUs, complaints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.slurm import _parse_gpus, _parse_partition, clean_environment, parse_time, render_time, said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2-00:00:00", 172800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("12:00:00", 43200),
        ("30:00", 1800),
        ("30", 1800),
        ("infinite", None),
        ("n/a", None),
        ("UNLIMITED", None),
    ],
)
def test_times(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds


@given(st.integers(0, 10**8))
def test_times_are_written_as_they_are_read(seconds: int) -> None:
    assert parse_time(render_time(seconds)) == seconds


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:2", {"": 2}),
        ("gpu:2(S:0-1)", {"": 2}),
        ("gpu:h100:8(S:0-1),nvme:1", {"h100": 8}),
        ("gpu:a100:4(S:0,2),gpu:h100:4", {"a100": 4, "h100": 4}),
        ("gpu", {}),
        ("lustre:1", {}),
    ],
)
def test_gpus(gres: str, gpus: dict[str, int]) -> None:
    assert _parse_gpus(gres) == gpus


def test_partitions() -> None:
    part = _parse_partition("gpu*|12|1-4|2-00:00:00|128+|1031000+|gpu:h100:8(S:0-1)|up")
    assert part is not None
    assert (part.name, part.is_default, part.nodes, part.max_nodes, part.cpus) == ("gpu", True, 12, 4, 128)
    assert (part.time_limit_seconds, part.memory_bytes, part.gpus) == (172800, 1031000 << 20, {"h100": 8})
    assert _parse_partition("something else") is None


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("sbatch: error: Batch job submission failed: Invalid qos specification\n", "Invalid qos specification"),
        ("allocation failure: Requested nodes are busy", "Requested nodes are busy"),
        ("sbatch: error: One.\nsbatch: error: One.\nsbatch: error: Two.\n", "One; Two"),
        ("", "nothing"),
    ],
)
def test_complaints(stderr: str, expected: str) -> None:
    assert said(stderr) == expected


def test_an_environment_without_an_outer_job() -> None:
    outer = {"SLURM_JOB_ID": "1", "SLURM_CONF": "c", "SLURM_CLUSTERS": "x", "RANK": "0", "PMI_RANK": "1", "PATH": "p"}
    assert clean_environment(outer) == {"SLURM_CONF": "c", "SLURM_CLUSTERS": "x", "PATH": "p"}
    assert clean_environment({"SLURM_JWT": "token"}), "how users of some sites prove who they are"
