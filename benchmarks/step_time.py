"""How long an optimizer step takes on CPUs under each layout, against plain PyTorch in the same run.

Usage: python -m benchmarks.step_time [--repetitions 5] [--steps 6] [--only NAME ...] [--out [FILE]]

A GPT of 5.9 million parameters (6 layers, width 256, 8 heads, context 256), fp32, one thread a rank. One rank is
compared with the plain model alone, two ranks with the plain model under DistributedDataParallel. Whatever the layout,
two ranks take 8 samples a step and one rank takes 4, so that times in one block are for equal work. Every repetition
measures all of them in turn; a ratio is taken within a repetition, and the median over repetitions is what counts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.ranks import Meeting, run_ranks
from benchmarks.reference_gpt import ReferenceGPT, build_adamw
from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from gptdist.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from gptdist.model.parameters import parameter_count
from gptdist.world import World

MODEL = ModelConfig(num_layers=6, hidden_size=256, num_heads=8, vocab_size=4096, sequence_length=256)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
SAMPLES_PER_RANK = 4
WARMUP_STEPS = 2
BUSY_LOAD = 1.0


@dataclass(frozen=True)
class Candidate:
    """One thing to time. `peer`: whose time its ratio is taken to; None for a peer itself."""

    name: str
    ranks: int
    peer: str | None = None
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = SAMPLES_PER_RANK


PLAIN, DDP = "plain PyTorch", "plain PyTorch, DDP"
CANDIDATES = (
    Candidate(PLAIN, 1),
    Candidate("1 rank", 1, PLAIN),
    Candidate(DDP, 2),
    *(Candidate(f"DP 2, ZeRO {stage}", 2, DDP, {"zero_stage": stage}) for stage in (0, 1, 2, 3)),
    Candidate("TP 2", 2, DDP, {"tensor": 2}, micro_batch_size=8),
    Candidate("TP 2 + SP", 2, DDP, {"tensor": 2, "sequence": True}, micro_batch_size=8),
    Candidate("PP 2, 4 micro-batches", 2, DDP, {"pipeline": 2}, micro_batch_size=2),
)


@dataclass
class Timing:
    """Median step time of each repetition, and the loss of the first step, which says that the work was the same.

    `cpu_seconds` is the first rank's own work, waiting not counted: it holds on a busy machine, where times do not.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_loss: float = 0.0


def main() -> None:
    """Measure, print the table, and write the file if asked to."""
    args = _parse()
    chosen = [candidate for candidate in CANDIDATES if not args.only or candidate.name in args.only]
    wanted = {candidate.peer for candidate in chosen} | {candidate.name for candidate in chosen}
    chosen = [candidate for candidate in CANDIDATES if candidate.name in wanted]
    before = machine()
    if before["load_average"] > BUSY_LOAD:
        print(
            f"note: the machine is busy (load {before['load_average']}): compare the ratios, not the times", flush=True
        )
    ranks = max(candidate.ranks for candidate in chosen)
    timings = run_ranks(_measure, ranks, chosen, args.repetitions, args.steps)
    _check_same_losses(chosen, timings)
    print(f"{parameter_count(MODEL):,} parameters, fp32, one thread a rank, torch {before['torch']}")
    print(render_table(("", "ranks", "ms a step", "to its peer", "least", "most", "CPU time"), _rows(chosen, timings)))
    if args.out:
        results = [{**asdict(c), **asdict(timings[c.name]), "ratios": _ratio(c, timings)} for c in chosen]
        write_json(args.out, {"machine": before, "steps": args.steps, "model": MODEL.model_dump(), "results": results})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each candidate in a repetition")
    parser.add_argument("--only", action="append", choices=[candidate.name for candidate in CANDIDATES])
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "step_time.json")
    return parser.parse_args()


def _measure(meeting: Meeting, candidates: list[Candidate], repetitions: int, steps: int) -> dict[str, Timing]:
    timings = {candidate.name: Timing() for candidate in candidates}
    for repetition in range(repetitions):
        # Forwards, then backwards: what drifts with time does not favour whoever comes first.
        for candidate in candidates if repetition % 2 == 0 else reversed(candidates):
            with meeting.group(f"{repetition}/{candidate.name}", candidate.ranks) as world:
                if world is not None:
                    _time_steps(candidate, world, steps, timings[candidate.name])
    return timings


def _time_steps(candidate: Candidate, world: World, steps: int, timing: Timing) -> None:
    step, close = (_build_plain if candidate.peer is None else _build_engine)(candidate, world)
    batches = _batches(candidate, steps + WARMUP_STEPS)
    seconds, cpu_seconds = [], []
    try:
        for number, batch in enumerate(batches, start=1):
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = step(batch, number)
            dist.barrier()  # a step ends when the slowest rank has ended it
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            timing.first_loss = loss if number == 1 else timing.first_loss
    finally:
        close()
    timing.seconds.append(statistics.median(seconds[WARMUP_STEPS:]))
    timing.cpu_seconds.append(statistics.median(cpu_seconds[WARMUP_STEPS:]))


def _batches(candidate: Candidate, count: int) -> Tensor:
    """[step, sample, sequence + 1] int64, the same for equally many ranks."""
    generator = torch.Generator().manual_seed(0)
    samples = candidate.ranks * SAMPLES_PER_RANK
    return torch.randint(MODEL.vocab_size, (count, samples, MODEL.sequence_length + 1), generator=generator)


Step = Callable[[Tensor, int], float]


def _build_engine(candidate: Candidate, world: World) -> tuple[Step, Callable[[], None]]:
    from gptdist.engine.engine import TrainEngine
    from gptdist.layout import Layout

    parallel = ParallelConfig(**candidate.parallel)
    samples = candidate.ranks * SAMPLES_PER_RANK
    train = TrainConfig(global_batch_size=samples, micro_batch_size=candidate.micro_batch_size)
    layout = Layout(
        world.world_size,
        parallel.tensor,
        parallel.pipeline,
        sequence_parallel=parallel.sequence,
        zero_stage=parallel.zero_stage,
    )
    engine = TrainEngine(MODEL, OPTIMIZER, parallel, train, layout, world)
    engine.initialise()
    data_rank = layout.data_rank(world.global_rank)

    def step(batch: Tensor, number: int) -> float:
        mine = batch.view(-1, layout.data, train.micro_batch_size, batch.shape[1])[:, data_rank]
        return engine.train_step(mine, OPTIMIZER.learning_rate, number).loss

    return step, engine.close


def _build_plain(candidate: Candidate, world: World) -> tuple[Step, Callable[[], None]]:
    torch.manual_seed(0)
    network: nn.Module = ReferenceGPT(MODEL)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if parameters != parameter_count(MODEL):
        raise RuntimeError(f"the reference has {parameters:,} parameters, the model {parameter_count(MODEL):,}")
    adamw = build_adamw(network, OPTIMIZER)
    if world.world_size > 1:
        network = nn.parallel.DistributedDataParallel(network)

    def step(batch: Tensor, number: int) -> float:
        loss = network(batch.view(-1, world.world_size, batch.shape[1])[:, world.global_rank])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(loss.item())

    return step, lambda: None


def _check_same_losses(candidates: list[Candidate], timings: dict[str, Timing]) -> None:
    """Our layouts on equally many ranks saw the same samples; a fast step that computes something else must not win."""
    for ranks in (1, 2):
        losses = {c.name: timings[c.name].first_loss for c in candidates if c.peer and c.ranks == ranks}
        if losses and max(losses.values()) - min(losses.values()) > 1e-4:
            raise RuntimeError(f"layouts disagree on the first loss: {losses}")


def _ratio(candidate: Candidate, timings: dict[str, Timing], of: str = "seconds") -> list[float]:
    """Its time over its peer's, in each repetition."""
    if candidate.peer is None:
        return []
    ours, theirs = (getattr(timings[name], of) for name in (candidate.name, candidate.peer))
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _rows(candidates: list[Candidate], timings: dict[str, Timing]) -> list[list[str]]:
    rows = []
    for candidate in candidates:
        ratios = _ratio(candidate, timings)
        of_cpu = _ratio(candidate, timings, of="cpu_seconds")
        spread = (statistics.median(ratios), min(ratios), max(ratios), statistics.median(of_cpu)) if ratios else ()
        shown = [f"{value:.3f}" for value in spread] or ["", "", "", ""]
        milliseconds = f"{1e3 * statistics.median(timings[candidate.name].seconds):.0f}"
        rows.append([candidate.name, str(candidate.ranks), milliseconds, *shown])
    return rows


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CPUs are the question here, also where there are GPUs
    main()
