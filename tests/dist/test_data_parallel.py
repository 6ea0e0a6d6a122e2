"""A corpus is the same bytes whoever builds it and however often it is killed: processes, parts, MPI ranks."""

import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_tools.build import build_corpus
from data_tools.corpus.verify import verify_corpus
from tests.dist.cases import is_full
from tests.dist.commands import mpi_launcher

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("SLURM_", "PMI_", "OMPI_", "MPI_", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules of the standard library, copies of some with and without edits, and one to decontaminate against."""
    folder = tmp_path_factory.mktemp("sources")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for place in ("json", "email", "asyncio", "unittest"):
        for path in sorted((stdlib / place).glob("*.py")):
            text = path.read_text()
            (folder / "text" / place).mkdir(parents=True, exist_ok=True)
            (folder / "text" / place / path.name).write_text(text)
            if len(path.stem) % 3 == 0:
                (folder / "text" / place / f"again_{path.name}").write_text(text)
            if len(path.stem) % 4 == 0:
                (folder / "text" / place / f"nearly_{path.name}").write_text(f"# changed a little\n{text}")
    (folder / "evaluation.txt").write_text((stdlib / "json" / "decoder.py").read_text()[4000:8000])
    return folder


def arguments(sources: Path, out_dir: Path) -> list[str]:
    words = [str(sources / "text"), "--out", str(out_dir), "--tokenizer", "train:500", "--dedup", "near"]
    words += ["--decontaminate", str(sources / "evaluation.txt"), "--normalize", "nfc", "--min-document-bytes", "40"]
    return [*words, "--chunk-tokens", "8000", "--shard-bytes", "100000", "--piece-bytes", "60000"]


def start(words: Sequence[str], **env: str) -> subprocess.Popen[str]:
    """`gptdist data build` in a process group of its own, as nobody's rank unless `env` says so."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "data", "build", *words],
        env={**clean, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def await_parts(out_dir: Path, *parts: int) -> None:
    """Until these parts of a build have begun."""
    work = out_dir.with_name(f".{out_dir.name}.building")
    deadline = time.monotonic() + 60
    while not all((work / f"part-{part}.lock").exists() for part in parts):
        assert time.monotonic() < deadline, f"of {parts} not all began"
        time.sleep(0.01)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The corpus as one process makes it."""
    out_dir = tmp_path_factory.mktemp("expected") / "c"
    built = build_corpus(
        [sources / "text"],
        out_dir,
        "train:500",
        decontaminate=[sources / "evaluation.txt"],
        normalize="nfc",
        min_document_bytes=40,
        dedup="near",
        chunk_tokens=8000,
        shard_bytes=100_000,
        piece_bytes=10**9,  # another cut of the work: the corpus does not depend on it
    )
    assert built is not None
    dropped = built.manifest.build["dropped"]
    assert isinstance(dropped, dict)
    assert all(dropped[reason] > 5 for reason in ("exact duplicate", "near duplicate"))
    assert "contaminated" in dropped
    assert len(built.manifest.split("train").shards) > 8
    assert verify_corpus(out_dir) == []
    return files_of(out_dir)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers(sources: Path, expected: dict[str, bytes], tmp_path: Path, workers: int) -> None:
    output = finished(start([*arguments(sources, tmp_path / "c"), "--workers", str(workers)]))
    assert files_of(tmp_path / "c") == expected
    assert "near duplicate" in output
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("launcher", ["parts", "Slurm array", "srun"])
def test_parts_share_the_work(sources: Path, expected: dict[str, bytes], tmp_path: Path, launcher: str) -> None:
    def one(part: int) -> subprocess.Popen[str]:
        words = [*arguments(sources, tmp_path / "c"), "--workers", "1"]
        if launcher == "parts":
            return start([*words, "--part", f"{part}/3"])
        if launcher == "srun":
            places = {"SLURM_PROCID": part, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 3, "SLURM_LOCALID": part}
            places |= {"SLURM_NODEID": 0, "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": 3}
            places |= {"SLURM_JOB_ID": 17}
        else:
            places = {"SLURM_ARRAY_TASK_ID": part + 5, "SLURM_ARRAY_TASK_COUNT": 3}
            places |= {"SLURM_ARRAY_TASK_MIN": 5, "SLURM_ARRAY_TASK_MAX": 7}
        return start(words, **{name: str(value) for name, value in places.items()})

    parts = [one(part) for part in (2, 1)]
    await_parts(tmp_path / "c", 2, 1)  # else the first might do it all before they are there
    parts.append(one(0))
    outputs = [finished(part) for part in parts]
    assert "the first part finishes" in outputs[0]
    assert files_of(tmp_path / "c") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_part_that_fails_is_told_to_the_others(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    words = [str(sources / "text"), str(tmp_path / "bad.txt"), "--out", str(tmp_path / "c"), "--tokenizer", "bytes"]
    parts = [start([*words, "--part", "1/2", "--piece-bytes", "60000"])]
    await_parts(tmp_path / "c", 1)  # what failed before a part began is of an earlier attempt
    parts.append(start([*words, "--part", "0/2", "--piece-bytes", "60000"]))
    outputs = [part.communicate(timeout=60)[0] for part in parts]
    assert sorted(part.returncode for part in parts) == [1, 2]
    assert all("bad.txt is not UTF-8" in output for output in outputs)


def test_mpi_ranks_share_the_work(sources: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    program = mpi_launcher("MPICH")
    if program is None:
        pytest.skip("there is no mpiexec; pip install mpich")
    command = [program, "-n", "3", sys.executable, "-m", "launch.cli", "data", "build"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    done = subprocess.run(
        [*command, *arguments(sources, tmp_path / "c")],
        env={**clean, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "c") == expected


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    sources: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random(7)
    kills = 0
    words = [*arguments(sources, tmp_path / "c"), "--workers", "2"]
    took = time.monotonic()
    finished(start(words))
    took = time.monotonic() - took
    shutil.rmtree(tmp_path / "c")
    while kills < (100 if is_full() else 5):
        process = start(words)
        try:
            process.wait(chance.uniform(0.2 * took, took))
            assert process.returncode == 0, process.communicate()
            assert files_of(tmp_path / "c") == expected
            shutil.rmtree(tmp_path / "c")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert not (tmp_path / "c").exists() or files_of(tmp_path / "c") == expected
        process.communicate()
    finished(start(words))
    assert files_of(tmp_path / "c") == expected
    assert_nothing_else(tmp_path)


def test_finished_work_is_kept(sources: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    process = start([*arguments(sources, tmp_path / "c"), "--workers", "1"])
    work = tmp_path / ".c.building"
    deadline = time.monotonic() + 60
    while len(list(work.glob("read-*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finished_pieces = {path.stem.split("-")[1] for path in work.glob("read-*.json")}
    runs = {path: path.stat().st_mtime_ns for path in work.glob("run-*") if path.name.split("-")[1] in finished_pieces}
    assert len(runs) >= 5
    process = start([*arguments(sources, tmp_path / "c"), "--workers", "1"])
    while not list(work.glob("shard-*.json")) and process.poll() is None:
        kept = {path: path.stat().st_mtime_ns for path in runs if path.exists()}
        time.sleep(0.01)
    output = finished(process)
    assert "going on with the build" in output
    assert kept == runs
    assert files_of(tmp_path / "c") == expected


def test_a_worker_that_is_killed_is_named_and_nobody_is_left(sources: Path, tmp_path: Path) -> None:
    process = start([*arguments(sources, tmp_path / "c"), "--workers", "2"])
    deadline = time.monotonic() + 60
    victims: list[int] = []
    while not victims and time.monotonic() < deadline and process.poll() is None:
        if list((tmp_path / ".c.building").glob("read-*.json")):
            servers = [pid for pid in descendants(process.pid) if "forkserver" in command_of(pid)]
            victims = [pid for pid in servers if pid not in children(process.pid)]
        time.sleep(0.01)
    assert victims
    os.kill(victims[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was killed by signal 9" in output
    assert "run the same command to go on" in output
    assert not [pid for pid in victims if Path(f"/proc/{pid}").exists() and "data" in command_of(pid)]
    finished(start([*arguments(sources, tmp_path / "c"), "--workers", "2"]))


def busy_for(seconds: float, begun: str) -> None:
    Path(begun).touch()
    time.sleep(seconds)


def test_workers_end_in_the_middle_of_a_task_when_their_caller_is_killed(tmp_path: Path) -> None:
    """Else they would go on to write into a folder that may be another build's by then."""
    program = tmp_path / "caller.py"
    begun = [tmp_path / "first", tmp_path / "second"]
    program.write_text(
        "from data_tools.building.team import LocalTeam\n"
        "from tests.dist.test_data_parallel import busy_for\n"
        "if __name__ == '__main__':\n"
        "    team = LocalTeam(2)\n"
        "    team.while_waiting = lambda: print(*[one.pid for one in team._members.values()], flush=True)\n"
        f"    list(team.run(busy_for, [(60.0, {str(begun[0])!r}), (60.0, {str(begun[1])!r})]))\n"
    )
    caller = subprocess.Popen(
        [sys.executable, str(program)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert caller.stdout is not None
    workers = [int(word) for word in caller.stdout.readline().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while not all(mark.exists() for mark in begun) and time.monotonic() < deadline:
        time.sleep(0.02)
    caller.kill()
    caller.stdout.close()  # not `communicate`, which would wait for workers that still have the other end
    caller.wait()
    deadline = time.monotonic() + 10
    while any("forkserver" in command_of(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(mark.exists() for mark in begun)
    assert not [pid for pid in workers if "forkserver" in command_of(pid)]


def children(pid: int) -> list[int]:
    """Processes that `pid` started."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def descendants(pid: int) -> list[int]:
    """Processes below `pid`."""
    return [below for child in children(pid) for below in (child, *descendants(child))]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def assert_nothing_else(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["c"]
