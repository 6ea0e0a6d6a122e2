"""Faults around a run: signals, full disks, a port that is taken, what earlier runs left, a shard that goes bad.

Each is a function that strikes a run and tells how it was noticed, or raises Unexpected.
"""

import json
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from data_tools.corpus.order import RunOrder
from gptdist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER_MISTAKE
from gptdist.train.schedule import samples_at_step
from launch.drills.rank_faults import Strike, flip_byte
from launch.drills.small_disk import SmallDisk
from launch.drills.small_run import SmallRun
from launch.drills.stage import COMPUTING, LATEST, Noticed, Stage, Unexpected
from launch.ranks.run_lock import LOCK_FILE
from launch.runs.attempts import ATTEMPTS_FILE
from launch.runs.run_files import METRICS_FILE

DISK_BYTES = 8 << 20
READ_AHEAD_STEPS = 10
"""Batches are read some steps before they are trained on."""


def asked_to_stop(kind: str, name: str) -> Callable[[Stage], Noticed]:
    """By a signal to the launcher: it saves and ends, resumable, and no step is lost."""

    def happen(stage: Stage) -> Noticed:
        stage.start(Strike(kind, (stage.other_rank(),), stage.step(), COMPUTING))
        stage.expect_code(EXIT_RESUMABLE)
        return stage.expect_said(f"stopped: {name};")

    return happen


def asked_again_in_save(stage: Stage) -> Noticed:
    """A second TERM, to the launcher and to a rank, while the save runs that the first one asked for."""
    stage.set_up({"checkpoint.interval": 0})  # so the first save is that one
    first = Strike("ask to stop", (stage.other_rank(),), stage.step(), COMPUTING)
    stage.start(first, Strike("ask again", (stage.other_rank(),), 0, "saving"))
    stage.expect_code(EXIT_RESUMABLE)
    return stage.expect_said(r"stopped: SIGTERM;.*Step \d+ is saved")


def no_room_for_checkpoints(stage: Stage) -> Noticed:
    """The disk is full when a save begins: the run ends, and goes on once there is room."""
    with SmallDisk(stage.folder / "disk", DISK_BYTES) as disk:
        stage.set_up({"checkpoint.dir": str(disk.path / "checkpoints")})
        stage.start(Strike("fill disk", (0,), stage.step(), COMPUTING, path=str(disk.filler)))
        stage.expect_code(EXIT_USER_MISTAKE)
        noticed = stage.expect_said(rf"error: .*{disk.path}.*(No space left|free)")
        disk.empty_again()
        stage.prove()
    return noticed


def no_room_for_a_while(stage: Stage) -> Noticed:
    """As before, but the config lets saves fail: training goes on, and saves again."""
    with SmallDisk(stage.folder / "disk", DISK_BYTES) as disk:
        stage.set_up({"checkpoint.dir": str(disk.path / "checkpoints"), "checkpoint.max_failed_saves": 5})
        full = Strike("fill disk", (0,), stage.step(), COMPUTING, path=str(disk.filler))
        stage.start(full, Strike("empty disk", (0,), LATEST + 8, COMPUTING, path=str(disk.filler)))
        stage.expect_code(EXIT_DONE)
        noticed = stage.expect_said(r"warning: step \d+ was not saved, training goes on .*(No space left|free)")
        stage.prove()
    return noticed


def no_room_for_logs(stage: Stage) -> Noticed:
    """The disk of the run's folder is full, that of its checkpoints is not: training goes on."""
    with SmallDisk(stage.folder / "run", DISK_BYTES) as disk:
        stage.set_up({"checkpoint.dir": str(stage.folder / "checkpoints")})
        stage.start(Strike("fill disk", (0,), stage.step(), COMPUTING, path=str(disk.filler)))
        stage.expect_code(EXIT_DONE)
        noticed = stage.expect_said(r"warning: monitor: jsonl failed .*No space left")
        stage.prove()
    return noticed


def port_in_use(stage: Stage) -> Noticed:
    """By someone else, who lets it go before the second try."""
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        stage.set_up({"launch.port": port})
        stage.start()
        stage.expect_code(EXIT_USER_MISTAKE)
        noticed = stage.expect_said(f"error: .*{port}.*in use")
    stage.prove()
    return noticed


def leftovers(stage: Stage) -> Noticed:
    """What a run that lost its power may leave: a lock that nobody holds, records without an end, half a checkpoint."""
    run = stage.run
    half = run.checkpoints_dir / ".tmp-step-00000004"
    half.mkdir(parents=True)
    (half / "rank-00000.safetensors").write_bytes(b"\0" * 100)
    (run.run_dir / LOCK_FILE).write_text(json.dumps({"host": "gone", "pid": 1, "job": "local", "since": 0.0}))
    for name in (ATTEMPTS_FILE, METRICS_FILE):
        (run.run_dir / name).write_bytes(b'{"step": 3, "ti')
    stage.start()
    stage.expect_code(EXIT_DONE)
    left = [path.name for path in run.checkpoints_dir.iterdir() if path.name.startswith(".")]
    if left:
        raise Unexpected(f"still there: {', '.join(left)}")
    return Noticed("half a checkpoint was cleared away")


def shard_goes_bad(stage: Stage) -> Noticed:
    """A byte of a chunk that was not read yet; the shard is mended before the second try."""
    step = stage.step()
    shard, offset = _late_byte(stage.reference.run, step + READ_AHEAD_STEPS)
    stage.start(Strike("flip byte", (0,), step, COMPUTING, path=str(shard), offset=offset))
    flip_byte(shard, offset)
    stage.expect_code(EXIT_USER_MISTAKE)
    return stage.expect_said(f"error: .*{shard.name}")


def _late_byte(run: SmallRun, after_step: int) -> tuple[Path, int]:
    """A byte of the corpus, in tokens that are read for a later step and never before."""
    config = run.config()
    first, stop = (samples_at_step(step, config.train, config.schedule) for step in (after_step, run.steps))
    with closing(RunOrder(config, lambda step: samples_at_step(step, config.train, config.schedule))) as order:
        (reader,) = order.readers.values()
        chunks = []
        for sample in range(stop):
            start = order.source.place(sample).window * order.length
            chunks.append({reader.index.chunk_of(token) for token in (start, start + order.length)})
        early = set[int]().union(*chunks[:first])
        late = next(chunk for touched in chunks[first:stop] for chunk in touched - early)
        shards = reader.manifest.split("train").shards
        return run.corpus / shards[int(reader.index.shard[late])].file, int(reader.index.tokens_offset[late]) + 200
