"""What the numerical tests train: small models, real text, and one engine under one layout. Runs inside ranks.

A `Case` is plain data, so that it can be sent to a rank and printed in a table. Knows the engine and no pool.
"""

import functools
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptdist.checkpoint.logical import Box, overlap_or_gap
from gptdist.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from gptdist.engine.clock import StepClock
from gptdist.engine.engine import StepReport, TrainEngine
from gptdist.layout import Layout
from gptdist.model.initial import keyed_seed
from gptdist.model.parameters import logical_shapes
from gptdist.world import World

END_OF_DOCUMENT = 256
NEWLINE = ord("\n")  # taken for the end of documents, it makes a line of text one: a few in every window
VOCAB_SIZE = 259  # 256 bytes, the end of a document and two ids never seen: no tensor parallelism divides it
LEARNING_RATE = 1e-3
_SOURCES = ("argparse.py", "ast.py", "bisect.py", "calendar.py", "copy.py", "csv.py", "dis.py", "enum.py", "heapq.py")

CLASSIC = ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=VOCAB_SIZE, sequence_length=32)
MODERN = CLASSIC.model_copy(
    update={
        "num_kv_heads": 2,
        "ffn_hidden_size": 176,
        "norm": "rmsnorm",
        "position": "rotary",
        "activation": "swiglu",
        "bias": False,
    }
)
MODELS = {
    "classic": CLASSIC,
    "classic untied": CLASSIC.model_copy(update={"tie_embeddings": False}),
    "modern": MODERN.model_copy(update={"tie_embeddings": False}),
    "modern tied": MODERN,
}


@dataclass(frozen=True)
class Case:
    """One engine: what it trains and how it is spread. `train` fields are small unless said.

    `end_of_text`: where attention and positions stop; None: nowhere.
    """

    model: ModelConfig
    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    end_of_text: int | None = None

    @property
    def parallel_config(self) -> ParallelConfig:
        return ParallelConfig(**self.parallel)

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig(**{"global_batch_size": 8, "micro_batch_size": 1, **self.train})

    @property
    def layout(self) -> Layout:
        parallel = self.parallel_config
        return Layout(
            self.world_size,
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline,
            parallel.sequence,
            parallel.zero_stage,
        )


@contextmanager
def engine_of(case: Case, world: World, clock: StepClock | None = None) -> Iterator[TrainEngine]:
    """An engine with its initial weights; its groups are forgotten afterwards."""
    optimizer = OptimizerConfig(
        **{"learning_rate": LEARNING_RATE, "weight_decay": 0.1, "clip_norm": 1.0, **case.optimizer}
    )
    sections = (case.model, optimizer, case.parallel_config, case.train_config)
    engine = TrainEngine(*sections, case.layout, world, case.end_of_text, clock)
    try:
        engine.initialise()
        yield engine
    finally:
        engine.close()


def batch_of(case: Case, world: World, step: int) -> Tensor:
    """This data rank's micro-batches of real text at `step` (from 1): [count, micro batch, sequence + 1] int64."""
    train, layout = case.train_config, case.layout
    samples = train.global_batch_size
    windows = text(case.model.sequence_length + 1)
    first = (step - 1) * samples
    rows = windows[torch.arange(first, first + samples) % len(windows)]
    split = rows.view(-1, layout.data, train.micro_batch_size, rows.shape[1])
    return split[:, layout.data_rank(world.global_rank)].contiguous()


def train_steps(
    engine: TrainEngine, case: Case, world: World, steps: range, learning_rate: float = LEARNING_RATE
) -> list[StepReport]:
    """The reports of optimizer steps `steps` over real text."""
    return [engine.train_step(batch_of(case, world, step), learning_rate, step) for step in steps]


def train(world: World, case: Case, steps: int = 10) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first `steps` steps."""
    with engine_of(case, world) as engine:
        reports = train_steps(engine, case, world, range(1, steps + 1))
    if any(report.skipped for report in reports):
        raise AssertionError(f"a step was skipped: {reports}")
    return [(report.loss, report.grad_norm) for report in reports]


class RandomWeights:
    """A StateSource in which no weight is special: norms and biases are random too, and so are the moments."""

    def __init__(self, model: ModelConfig, std: float = 0.1) -> None:
        self._shapes = logical_shapes(model)
        self._std = std

    def read(self, name: str, box: Box) -> Tensor:
        kind, logical = name.split("/", 1)
        generator = torch.Generator().manual_seed(keyed_seed("random", name))
        values = torch.empty(self._shapes[logical]).normal_(0.0, self._std, generator=generator)
        if kind == "exp_avg_sq":
            values.abs_()
        return (values + 1.0 if logical.endswith("norm.weight") else values)[box.slices()]


def held(engine: TrainEngine, kind: str = "weight") -> list[tuple[str, tuple[int, ...], Box, Any]]:
    """(logical name, whole shape, box, numbers) of what this rank would write to a checkpoint."""
    prefix = f"{kind}/"
    return [
        (fragment.name.removeprefix(prefix), fragment.shape, fragment.box, fragment.data.clone().numpy())
        for fragment in engine.fragments()
        if fragment.name.startswith(prefix)
    ]


def assemble(by_rank: list[list[tuple[str, tuple[int, ...], Box, Any]]]) -> dict[str, Tensor]:
    """The logical tensors that all ranks `held` together. Fails where an element is missing or held twice."""
    whole: dict[str, Tensor] = {}
    boxes: dict[str, list[Box]] = {}
    for name, shape, box, numbers in (part for parts in by_rank for part in parts):
        whole.setdefault(name, torch.empty(shape))[box.slices()] = torch.from_numpy(numbers)
        boxes.setdefault(name, []).append(box)
    for name, tensor in whole.items():
        wrong = overlap_or_gap(tuple(tensor.shape), boxes[name])
        assert wrong is None, f"{name}: {wrong}"
    return whole


@functools.cache
def text(length: int) -> Tensor:
    """Python's own sources as bytes, in windows of `length`: [windows, length] int64."""
    folder = Path(sysconfig.get_path("stdlib"))
    ids: list[int] = []
    for name in _SOURCES:
        ids += (folder / name).read_bytes()
        ids.append(END_OF_DOCUMENT)
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def is_full() -> bool:
    """Whether to run every combination, not the covering subset."""
    return os.environ.get("GPTDIST_FULL", "") not in ("", "0")
