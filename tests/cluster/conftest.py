"""What the tests on a real Slurm share: one lab, booted at first use, without jobs and whole before each test."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.build import build_corpus
from tests.cluster.slurm_lab import SYSTEM_PATH, SlurmLab, why_not
from tests.dist.commands import SOURCES

ROOT = Path(__file__).resolve().parents[2]
NODES = 3
# Partitions that refuse, each for a reason of its own.
PARTITIONS = """
PartitionName=short Nodes=node[1-2] MaxTime=5 State=UP
PartitionName=closed Nodes=ALL AllowAccounts=physics State=UP
PartitionName=broken Nodes=ALL State=DRAIN
PartitionName=inner Nodes=ALL AllocNodes=node1 State=UP
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of Python's own sources as bytes."""
    folder = tmp_path_factory.mktemp("corpus") / "stdlib"
    stdlib = Path(sysconfig.get_path("stdlib"))
    build_corpus([stdlib / name for name in SOURCES], folder, "bytes", validation_fraction=0.1)
    return folder


@pytest.fixture
def lab(booted: SlurmLab) -> SlurmLab:
    """Three nodes of four processors and two pretended GPUs, as `node1` to `node3`."""
    booted.clear()
    return booted
