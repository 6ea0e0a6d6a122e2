"""One run in one folder: who is refused, and what a holder leaves behind."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from gptdist.errors import LaunchError
from launch.ranks.run_lock import hold_run, holder_is_alive


def test_a_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "one"
    with hold_run(run_dir, "slurm 77"):
        with pytest.raises(LaunchError) as refused, hold_run(run_dir, "local"):
            pass
        for words in (str(run_dir), os.uname().nodename, str(os.getpid()), "slurm 77", "launch.run_dir"):
            assert words in str(refused.value)
        with hold_run(tmp_path / "runs" / "two", "local"):
            pass
    with hold_run(run_dir, "local"):
        pass
    assert list(tmp_path.iterdir()) == [], "nothing is left of runs that left nothing"


def test_a_job_waits_for_the_lock_of_a_lost_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as before:
        before.enter_context(hold_run(tmp_path, "slurm 76"))
        with pytest.raises(LaunchError, match="slurm 76"), hold_run(tmp_path, "slurm 77", 0.05):
            pass
        assert "waiting up to 0 s" in capsys.readouterr().err
        monkeypatch.setattr("launch.ranks.run_lock.time.sleep", lambda seconds: before.close())
        with hold_run(tmp_path, "slurm 77", 60.0) as lock:
            assert lock is not None
    assert "which the run on" in capsys.readouterr().err


def test_whether_its_holder_lives_is_told_without_a_lock(tmp_path: Path) -> None:
    assert holder_is_alive(tmp_path) is None
    with hold_run(tmp_path, "local"):
        assert holder_is_alive(tmp_path) is True
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    here = os.uname().nodename
    for host, pid, alive in ((here, int(gone.stdout), False), ("elsewhere", os.getpid(), None), (here, "x", None)):
        (tmp_path / ".lock").write_text(json.dumps({"host": host, "pid": pid}))
        assert holder_is_alive(tmp_path) is alive


def test_what_the_run_made_stays(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "one"
    with hold_run(run_dir, "local") as lock:
        assert lock is not None and not os.get_inheritable(lock)
        (run_dir / "config.yaml").touch()
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def test_the_lock_of_the_dead_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"host": "node9", "pid": 1, "job": "slurm 76"}) + "x" * 500)
    with hold_run(tmp_path, "local") as lock:
        assert lock is not None
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "no json", "[1]", "{}"])
def test_a_holder_that_left_no_name(content: str, tmp_path: Path) -> None:
    with hold_run(tmp_path, "local"):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(LaunchError, match="in use by"), hold_run(tmp_path, "local"):
            pass


def test_a_folder_that_cannot_be_is_not_for_the_lock_to_tell(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with hold_run(tmp_path / "file" / "run", "local") as lock:
        assert lock is None


def test_the_lock_is_released_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError), hold_run(tmp_path / "run", "local"):
        raise ValueError
    assert not (tmp_path / "run").exists()
