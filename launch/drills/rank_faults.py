"""What ranks of a drilled run do to themselves, and what they note: who they are, and which samples they trained on.

Installed by `job.py` alone, in commands that a drill starts; nothing that a production run reads can switch it on. What
strikes is written in a plan in the drill's folder, and strikes once, however often ranks are started again.
"""

import ctypes
import hashlib
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptdist.monitor.append import append_whole
from gptdist.monitor.heartbeat import Heartbeat, StepTimes
from gptdist.world import World
from launch.drills.small_disk import fill

PLAN_FILE = "plan.json"
RANKS_FILE = "ranks.jsonl"

SLOWER = 5.0
SLOW_STEPS = 22
_SHORTEST_SLOW_SECONDS = 0.4  # steps of milliseconds are uneven, and a rank that costs so little is none to name


@dataclass(frozen=True)
class Strike:
    """`kind`, one of STRIKES, befalls `global_ranks` when they enter `phase` of `step` (counted as the watcher's
    reports do: after the last finished one).

    `step` 0: whichever. `generation`: only after so many restarts in place; None: whichever. `repeats`: each time, not
    once for the run's folder. `path` and `offset`: of a file to fill or to damage. `seconds`: of a clock, or how much
    longer a slow step takes, 0 for SLOWER times as long.
    """

    kind: str
    global_ranks: tuple[int, ...]
    step: int
    phase: str
    generation: int | None = None
    repeats: bool = False
    path: str = ""
    offset: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Struck:
    """That a strike befell a rank: when, by `time.monotonic_ns`, which is the same for all processes."""

    global_rank: int
    step: int
    phase: str
    at_nanoseconds: int


@dataclass(frozen=True)
class TrainedStep:
    """The samples that one rank took an optimizer step with, as digests of their tokens."""

    step: int
    data_rank: int
    rows: tuple[str, ...]


def write_plan(record_dir: Path, strikes: Sequence[Strike]) -> None:
    """What ranks that start from now on do."""
    (record_dir / PLAN_FILE).write_text(json.dumps([asdict(strike) for strike in strikes]))


def read_struck(record_dir: Path) -> list[Struck]:
    """All strikes so far, in their order."""
    struck = [Struck(**json.loads(path.read_text())) for path in record_dir.glob("struck-*.json")]
    return sorted(struck, key=lambda one: one.at_nanoseconds)


def read_ranks(record_dir: Path) -> list[tuple[int, int]]:
    """(global rank, process) of every rank that was ever started, in order."""
    return [(record["global_rank"], record["pid"]) for record in _read_lines(record_dir / RANKS_FILE)]


def read_trained(record_dir: Path, global_rank: int) -> list[TrainedStep]:
    """Every step that this rank took, in order, also those that a restart took back."""
    records = _read_lines(_trained_path(record_dir, global_rank))
    return [TrainedStep(record["step"], record["data_rank"], tuple(record["rows"])) for record in records]


def row_digest(tokens: bytes) -> str:
    """Of one sample: its tokens as int64."""
    return hashlib.blake2b(tokens, digest_size=8).hexdigest()


def flip_byte(path: Path, offset: int) -> None:
    """Damage a file; a second time mends it."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


class DrilledRank:
    """One rank, from its start to its end."""

    def __init__(self, record_dir: Path, world: World) -> None:
        self._record_dir = record_dir
        self._world = world
        plan = [_strike_of(fields) for fields in json.loads((record_dir / PLAN_FILE).read_text())]
        self._strikes = list(enumerate(plan))
        self._next_step = 1
        self._own_seconds: list[float] = []
        self._slow_until = 0
        self._slow_seconds = 0.0
        self.engine: Any = None
        record = {"global_rank": world.global_rank, "pid": os.getpid(), "parent": os.getppid()}
        append_whole(record_dir / RANKS_FILE, json.dumps(record).encode() + b"\n")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it this process is struck as planned."""
        from gptdist.engine.engine import TrainEngine

        wrapped: list[tuple[type, str, Callable[[Any], Any]]] = [
            (Heartbeat, "phase", self._wrap_phase),
            (Heartbeat, "resume", self._wrap_resume),
            (Heartbeat, "step_done", self._wrap_step_done),
            (TrainEngine, "train_step", self._wrap_train_step),
        ]
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
        try:
            for owner, name, wrap in wrapped:
                setattr(owner, name, wrap(getattr(owner, name)))
            yield
        finally:
            for owner, name, method in plain:
                setattr(owner, name, method)

    # -- what is seen ------------------------------------------------------------------------------------------------

    def _wrap_phase(self, phase: Any) -> Any:
        def entered(heartbeat: Heartbeat, name: str) -> None:
            phase(heartbeat, name)
            self._enter(name)

        return entered

    def _wrap_resume(self, resume: Any) -> Any:
        def resumed(heartbeat: Heartbeat, step: int) -> None:
            resume(heartbeat, step)
            self._next_step = step + 1

        return resumed

    def _wrap_step_done(self, step_done: Any) -> Any:
        def done(heartbeat: Heartbeat, times: StepTimes) -> None:
            step_done(heartbeat, times)
            self._next_step = times.step + 1
            if times.step > self._slow_until:
                self._own_seconds.append(times.seconds - times.collective_wait)

        return done

    def _wrap_train_step(self, train_step: Any) -> Any:
        def noted(engine: Any, micro_batches: Any, rate: float, step: int, *more: Any) -> Any:
            self.engine = engine
            report = train_step(engine, micro_batches, rate, step, *more)
            rows = micro_batches.reshape(-1, micro_batches.shape[-1]).cpu().numpy()
            digests = [row_digest(row.tobytes()) for row in rows]
            record = {"step": step, "data_rank": engine.groups.data_rank, "rows": digests}
            path = _trained_path(self._record_dir, self._world.global_rank)
            append_whole(path, json.dumps(record).encode() + b"\n")
            return report

        return noted

    def _enter(self, phase: str) -> None:
        if self._next_step <= self._slow_until and phase == "forward and backward":
            time.sleep(self._slow_seconds or self.slow_seconds())
        for number, strike in self._strikes:
            here = strike.phase == phase and strike.step in (0, self._next_step)
            mine = self._world.global_rank in strike.global_ranks
            if here and mine and strike.generation in (None, self._world.generation) and self._is_first(number, strike):
                STRIKES[strike.kind](strike, self)

    def _is_first(self, number: int, strike: Strike) -> bool:
        """Mark the strike; False where it was already."""
        path = self._record_dir / f"struck-{number}-{self._world.global_rank}.json"
        struck = Struck(self._world.global_rank, self._next_step, strike.phase, time.monotonic_ns())
        try:
            with path.open("x") as file:
                file.write(json.dumps(asdict(struck)))
        except FileExistsError:
            return strike.repeats
        return True

    # -- for strikes -------------------------------------------------------------------------------------------------

    def start_to_be_slow(self, seconds: float) -> None:
        """From this step on, for a while; by so many seconds, or, where that is 0, SLOWER times."""
        self._slow_seconds = seconds
        self._slow_until = self._next_step + SLOW_STEPS

    def slow_seconds(self) -> float:
        """What makes a step of its own SLOWER times as long."""
        own = statistics.median(self._own_seconds) if self._own_seconds else 0.0
        return max((SLOWER - 1) * own, _SHORTEST_SLOW_SECONDS)

    def kill_ranks(self) -> None:
        """All on this machine that have this one's parent, itself last."""
        for line in _read_lines(self._record_dir / RANKS_FILE):
            if line["parent"] == os.getppid() and line["pid"] != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(line["pid"], signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


# -- strikes -----------------------------------------------------------------------------------------------------------


def _kill(strike: Strike, rank: DrilledRank) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_all(strike: Strike, rank: DrilledRank) -> None:
    rank.kill_ranks()


def _kill_launcher(strike: Strike, rank: DrilledRank) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def _stop(strike: Strike, rank: DrilledRank) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang_for_ever(strike: Strike, rank: DrilledRank) -> None:
    while True:
        time.sleep(1)


def _segfault(strike: Strike, rank: DrilledRank) -> None:
    ctypes.string_at(0)


def _leave(strike: Strike, rank: DrilledRank) -> None:
    os._exit(0)


def _raise(strike: Strike, rank: DrilledRank) -> None:
    raise RuntimeError("drilled: an error that nobody foresaw")


def _be_slow(strike: Strike, rank: DrilledRank) -> None:
    rank.start_to_be_slow(strike.seconds)


def _skip_collective(strike: Strike, rank: DrilledRank) -> None:
    """The next one that training asks torch for is not joined."""
    import torch.distributed as dist

    names = ("all_reduce", "all_to_all_single", "reduce_scatter_tensor")
    plain = {name: getattr(dist, name) for name in names}

    def skip(*args: Any, **kwargs: Any) -> None:
        for name, function in plain.items():
            setattr(dist, name, function)

    for name in names:
        setattr(dist, name, skip)


def _spoil_gradient(strike: Strike, rank: DrilledRank) -> None:
    """One element of this rank's gradients becomes NaN."""
    parameter = next(local.parameter for local in rank.engine.network.parameters if local.parameter.grad is not None)
    parameter.grad.view(-1)[0] = float("nan")


def _ask_to_stop(strike: Strike, rank: DrilledRank) -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def _ask_by_usr1(strike: Strike, rank: DrilledRank) -> None:
    os.kill(os.getppid(), signal.SIGUSR1)


def _ask_again(strike: Strike, rank: DrilledRank) -> None:
    """A scheduler that signals every process of the job: the launcher, and this rank."""
    os.kill(os.getppid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def _fill_disk(strike: Strike, rank: DrilledRank) -> None:
    fill(Path(strike.path))


def _empty_disk(strike: Strike, rank: DrilledRank) -> None:
    Path(strike.path).unlink(missing_ok=True)


def _flip_byte(strike: Strike, rank: DrilledRank) -> None:
    flip_byte(Path(strike.path), strike.offset)


def _shift_clock(strike: Strike, rank: DrilledRank) -> None:
    true_time = time.time
    time.time = lambda: true_time() + strike.seconds


STRIKES: dict[str, Callable[[Strike, DrilledRank], None]] = {
    "kill": _kill,
    "kill all ranks": _kill_all,
    "kill launcher": _kill_launcher,
    "stop": _stop,
    "hang": _hang_for_ever,
    "segfault": _segfault,
    "leave": _leave,
    "raise": _raise,
    "be slow": _be_slow,
    "skip collective": _skip_collective,
    "spoil gradient": _spoil_gradient,
    "ask to stop": _ask_to_stop,
    "ask by USR1": _ask_by_usr1,
    "ask again": _ask_again,
    "fill disk": _fill_disk,
    "empty disk": _empty_disk,
    "flip byte": _flip_byte,
    "shift clock": _shift_clock,
}


def _strike_of(fields: dict[str, Any]) -> Strike:
    return Strike(**{**fields, "global_ranks": tuple(fields["global_ranks"])})


def _trained_path(record_dir: Path, global_rank: int) -> Path:
    return record_dir / f"trained-{global_rank}.jsonl"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; what a kill has torn is not one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]
