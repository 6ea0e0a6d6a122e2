"""How long ranks take to meet and to come back after a kill, against torchrun; and what watching them costs.

Usage: python -m benchmarks.launch [--only start restart watching] [--ranks 2 4 8 16] [--repetitions 5] [--out [FILE]]

start: from the command to the first all-reduce of ranks that have imported what training imports. Goal: at most 0.35 of
torchrun's time with 16 ranks.
restart: from `kill -9` of a rank to the next finished step of the same run, against `torchrun --max-restarts`, in which
the very same ranks train. Goal: at most 0.4.
watching: the step time of watched ranks against that of ranks that nobody watches, and the processor time of the
watcher. Goal: at most 1 % of a step of 100 ms.

Ours and theirs take turns; a ratio is taken within a turn, and the median of the ratios is what counts.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from benchmarks.token_corpus import make_token_corpus

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"start": 0.35, "restart": 0.4, "watching": 1.01}
RESTART_RANKS = 4
WATCHED_RANKS = 2
WATCHED_STEPS = 80
SETTLING_STEPS = 20
SAVED_STEP, KILLED_STEP = 4, 7
PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.002
TOKENS = 400_000

_Found = TypeVar("_Found")

# Its step takes a tenth of a second on two cores.
RUN: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "vocab_size": 257, "sequence_length": 128},
    "train": {"steps": 100_000, "global_batch_size": 8, "micro_batch_size": 2, "eval_interval": 0},
    "checkpoint": {"interval": SAVED_STEP, "keep": 2},
    "monitor": {"log_interval": 1, "tensorboard": False, "progress": False},
}


@dataclass
class Question:
    """One row of the table: seconds of ours and of theirs in each turn."""

    subject: str
    ranks: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    watcher_load: list[float] = field(default_factory=list)  # of one core

    @property
    def ratios(self) -> list[float]:
        return [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]


def main() -> None:
    """Measure, print the table, and write the file if asked to."""
    args = _parse()
    before = machine()
    questions = [Question("start", ranks) for ranks in args.ranks if "start" in args.only]
    questions += [Question(subject, ranks) for subject, ranks in _FIXED.items() if subject in args.only]
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = Path(temporary)
        corpus = make_token_corpus(work_dir, TOKENS).folder if set(args.only) & set(_FIXED) else None
        for turn in range(args.repetitions):
            for question in questions:
                both = [(question.ours, _OURS[question.subject]), (question.theirs, _THEIRS[question.subject])]
                for times, measure in both if turn % 2 == 0 else reversed(both):
                    folder = work_dir / f"{question.subject}-{question.ranks}-{turn}-{measure.__name__}"
                    folder.mkdir()
                    times.append(measure(question, folder, corpus))
    print(render_table(("", "ranks", "ours, s", "theirs, s", "ratio", "least", "most", "goal"), _rows(questions)))
    for question in questions:
        if question.watcher_load:
            print(f"the watcher took {statistics.median(question.watcher_load):.2%} of one core")
    if args.out:
        results = [{**asdict(question), "ratios": question.ratios} for question in questions]
        write_json(args.out, {"machine": before, "goals": GOALS, "run": RUN, "results": results})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16], help="of start")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "launch.json")
    return parser.parse_args()


def _rows(questions: Sequence[Question]) -> list[list[str]]:
    rows = []
    for question in questions:
        times = [f"{statistics.median(seconds):.3f}" for seconds in (question.ours, question.theirs)]
        spread = (statistics.median(question.ratios), min(question.ratios), max(question.ratios))
        judged = question.subject != "start" or question.ranks == 16
        goal = f"{GOALS[question.subject]:.2f}" if judged else ""
        rows.append([question.subject, str(question.ranks), *times, *(f"{ratio:.3f}" for ratio in spread), goal])
    return rows


# -- start ---------------------------------------------------------------------------------------------------------


def _start_ours(question: Question, folder: Path, corpus: Path | None) -> float:
    return _until_met(folder, ["-m", "benchmarks.launch_rank", str(folder / "met"), str(question.ranks)])


def _start_theirs(question: Question, folder: Path, corpus: Path | None) -> float:
    return _until_met(folder, [*_torchrun(question.ranks), "-m", "benchmarks.launch_rank", str(folder / "met")])


def _until_met(folder: Path, words: list[str]) -> float:
    began = time.monotonic()
    with _running(folder, words) as process:
        code = process.wait(PATIENCE_SECONDS)
    if code:
        raise RuntimeError(f"{' '.join(words)} ended with {code}:\n{(folder / 'log').read_text()[-3000:]}")
    return float((folder / "met").read_text()) - began


# -- restart -------------------------------------------------------------------------------------------------------


def _restart_ours(question: Question, folder: Path, corpus: Path | None) -> float:
    return _until_back(folder, ["-m", "launch.cli", *_train(folder, corpus), "--nproc", str(question.ranks)])


def _restart_theirs(question: Question, folder: Path, corpus: Path | None) -> float:
    words = [*_torchrun(question.ranks), "--max-restarts", "3", "-m", "launch.cli", *_train(folder, corpus)]
    return _until_back(folder, words)


def _until_back(folder: Path, words: list[str]) -> float:
    """Kill the rank that was started last, once a checkpoint lies behind; until a step that it had done is done
    again."""
    with _running(folder, words) as process:
        _await_step(process, folder, KILLED_STEP)
        victim = max(_children(process.pid))
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        reached = _last_step(folder)

        def row_again() -> dict[str, Any] | None:
            return next((row for row in _rows_of(folder) if row["time"] > killed and row["step"] <= reached), None)

        back = _await(process, folder, row_again)
        return float(back["time"]) - killed


# -- watching ------------------------------------------------------------------------------------------------------


def _watched(question: Question, folder: Path, corpus: Path | None) -> float:
    words = ["-m", "launch.cli", *_train(folder, corpus), "checkpoint.interval=0", "--nproc", str(question.ranks)]
    with _running(folder, words) as process:
        _await_step(process, folder, SETTLING_STEPS)
        began, used = time.monotonic(), _processor_seconds(process.pid)
        _await_step(process, folder, WATCHED_STEPS)
        question.watcher_load.append((_processor_seconds(process.pid) - used) / (time.monotonic() - began))
    return _step_seconds(folder)


def _unwatched(question: Question, folder: Path, corpus: Path | None) -> float:
    """The same ranks as torchrun would start them, with nobody there once they are started."""
    port = _free_port()
    words = ["-m", "launch.cli", *_train(folder, corpus), "checkpoint.interval=0"]
    with ExitStack() as stack:
        for rank in range(question.ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": question.ranks, "LOCAL_WORLD_SIZE": question.ranks}
            place |= {"GROUP_RANK": 0, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            env = {**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
            process = stack.enter_context(_running(folder, words, **env))
        _await_step(process, folder, WATCHED_STEPS)
    return _step_seconds(folder)


def _step_seconds(folder: Path) -> float:
    steps = [row for row in _rows_of(folder) if SETTLING_STEPS < row["step"] <= WATCHED_STEPS]
    return statistics.median(row["speed/step_seconds"] for row in steps)


_FIXED = {"restart": RESTART_RANKS, "watching": WATCHED_RANKS}
_Measure = Callable[[Question, Path, Path | None], float]
_OURS: dict[str, _Measure] = {"start": _start_ours, "restart": _restart_ours, "watching": _watched}
_THEIRS: dict[str, _Measure] = {"start": _start_theirs, "restart": _restart_theirs, "watching": _unwatched}


# -- processes and runs --------------------------------------------------------------------------------------------


@contextmanager
def _running(folder: Path, words: list[str], **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A command in a session of its own, of which nothing is left afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **env}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _torchrun(ranks: int) -> list[str]:
    """With a fixed place to meet, which is its quickest way."""
    place = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *place]


def _train(folder: Path, corpus: Path | None) -> list[str]:
    run = {**RUN, "data": {"corpus": str(corpus)}, "launch": {"run_dir": str(folder / "run")}}
    config = folder / "run.yaml"
    config.write_text(json.dumps(run))
    return ["train", str(config)]


def _rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def _last_step(folder: Path) -> int:
    return max((int(row["step"]) for row in _rows_of(folder)), default=0)


def _await_step(process: "subprocess.Popen[bytes]", folder: Path, step: int) -> None:
    _await(process, folder, lambda: _last_step(folder) >= step)


def _await(process: "subprocess.Popen[bytes]", folder: Path, answer: Callable[[], _Found | None]) -> _Found:
    """What `answer` returns once it returns something."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := answer()):
        if process.poll() is not None or time.monotonic() > deadline:
            log = (folder / "log").read_text()[-3000:]
            raise RuntimeError(f"waited in vain ({process.args!r} ended with {process.returncode}):\n{log}")
        time.sleep(POLL_SECONDS)
    return found


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def _processor_seconds(pid: int) -> float:
    """Of the process itself, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
