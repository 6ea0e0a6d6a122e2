"""A node that cannot take part is found before the first step, and the next allocation is without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_lab import SlurmLab
from tests.cluster.slurm_runs import SlurmRun
from tests.dist.commands import curve


@pytest.fixture
def scratch(lab: SlurmLab) -> Iterator[Path]:
    """A folder on each node's own disk; on node2 there is a file in its place."""
    in_the_way = lab.folder / "node2" / "local" / "scratch"
    in_the_way.touch()
    yield lab.folder / "local" / "scratch"
    in_the_way.unlink()


def test_a_node_whose_own_disk_cannot_be_written(lab: SlurmLab, scratch: Path, tmp_path: Path, corpus: Path) -> None:
    settings = {"train.steps": 8, "checkpoint.interval": 4, "checkpoint.staging_dir": str(scratch)}
    run = SlurmRun(lab, tmp_path / "unfit", corpus, settings)
    run.submit()
    status = run.await_status("done", timeout_seconds=180)
    (restart,) = status["restarts"]
    assert restart["how"] == "requeued without node2"
    assert "node2 cannot take part" in restart["reason"] and "checkpoint.staging_dir" in restart["reason"]
    assert restart["hosts"] == ["node1", "node3"]
    assert sorted(curve(run.run_dir)) == list(range(1, 9))
