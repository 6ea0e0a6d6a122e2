"""What the distributed tests share: the pool of ranks, started at first use and ended with the session; a corpus."""

import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.build import build_corpus
from tests.dist.commands import SOURCES, Commands
from tests.dist.ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Rank processes for `pool.run(function, world_size, *args)`."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of Python's own sources as bytes, a tenth held out. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("corpus") / "stdlib"
    stdlib = Path(sysconfig.get_path("stdlib"))
    build_corpus([stdlib / name for name in SOURCES], folder, "bytes", validation_fraction=0.1)
    return folder


@pytest.fixture
def commands(tmp_path: Path, corpus: Path) -> Commands:
    """Runs `gptdist` commands."""
    return Commands(tmp_path, corpus)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a small disk needs the mount command")
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
