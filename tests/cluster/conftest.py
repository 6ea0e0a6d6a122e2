"""What the tests on a real Slurm share: one lab, booted at first use, without jobs and whole before each test."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_lab import SYSTEM_PATH, SlurmLab, why_not

ROOT = Path(__file__).resolve().parents[2]
NODES = 3
# Partitions that refuse, each for a reason of its own.
PARTITIONS = """
PartitionName=short Nodes=node[1-2] MaxTime=5 State=UP
PartitionName=closed Nodes=ALL AllowAccounts=physics State=UP
PartitionName=broken Nodes=ALL State=DOWN
PartitionName=others Nodes=ALL AllowGroups=nobody State=UP
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # Ranks share this machine's few cores: more threads would wait for each other.
    env = {"PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with SlurmLab(tmp_path_factory.mktemp("lab"), NODES, extra=PARTITIONS, env=env) as lab:
        yield lab


@pytest.fixture
def lab(booted: SlurmLab) -> SlurmLab:
    """Three nodes of four processors and two pretended GPUs, as `node1` to `node3`."""
    booted.clear()
    return booted
