"""How much of what a GPU can multiply training turns into model FLOPs: tokens/s, model TFLOP/s and MFU by preset.

Usage: python -m benchmarks.train_throughput [--model gpt2_124m ...] [--nproc N] [--micro-batch-size B] [--out [FILE]]
       python -m benchmarks.train_throughput --cpu [--precision bf16]

Trains GPT-2 124M, GPT-2 355M and GPT-3 1.3B in bf16 on random tokens with the engine that `gptdist train` uses. The
roof is a bf16 matrix product (8192 x 8192 x 8192, random data) timed in the same process before and after, the faster
of the two; MFU against the maker's figure is shown where that is known. Without a GPU it says so and exits 0; `--cpu`
measures a small model there, against an fp32 matrix product on one thread a rank.
"""

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from benchmarks.ranks import Meeting, run_ranks
from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from gptdist.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from gptdist.layout import Layout
from gptdist.model.parameters import flops_per_token, parameter_count
from gptdist.monitor.peaks import peak_flops
from gptdist.monitor.throughput import memory_bytes
from gptdist.world import World

# The micro batch that fits 80 GB without recomputation, by preset.
PRESETS = {"gpt2_124m": 16, "gpt2_355m": 8, "gpt3_1_3b": 4}
SMALL = ModelConfig(num_layers=6, hidden_size=256, num_heads=8, vocab_size=4096, sequence_length=256)
SMALL_MICRO_BATCH = 4
MODELS_DIR = Path(__file__).parents[1] / "configs" / "models"
WARMUP_STEPS = 3
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Job:
    """One model to train, and how."""

    name: str
    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig
    steps: int
    roof_size: int  # of the square matrices of the roof


@dataclass(frozen=True)
class Measured:
    """What came of a job, per device where not said otherwise."""

    name: str
    parameters: int
    device: str
    devices: int
    micro_batch_size: int
    step_seconds: float
    tokens_per_second: float  # of all devices together
    model_flops: float
    roof_flops: float
    peak_flops: float | None
    memory_bytes: int
    loss: float

    @property
    def of_roof(self) -> float:
        return self.model_flops / self.roof_flops

    @property
    def mfu(self) -> float | None:
        return self.model_flops / self.peak_flops if self.peak_flops else None


def main() -> None:
    """Measure each model, print the table, and write the file if asked to."""
    args = _parse()
    if not torch.cuda.is_available() and not args.cpu:
        print("skipped: torch sees no GPU. Run it on a machine with one, or with --cpu for a small model on the CPU.")
        return
    if torch.cuda.is_available() and args.nproc > torch.cuda.device_count():
        print(f"skipped: --nproc {args.nproc} needs as many GPUs, torch sees {torch.cuda.device_count()}.")
        return
    before = machine()
    results = []
    for job in _jobs(args):
        result: Measured | str = run_ranks(_measure, args.nproc, job)
        if isinstance(result, str):
            print(f"{job.name}: {result}", flush=True)
            continue
        results.append(result)
        print(f"{job.name}: {result.tokens_per_second:,.0f} tokens/s, {result.of_roof:.1%} of the roof", flush=True)
    head = ("model", "parameters", "ms a step", "tokens/s", "TFLOP/s", "roof", "of roof", "MFU", "GiB", "loss")
    print(render_table(head, [_row(result) for result in results]))
    if args.out:
        rows = [{**asdict(result), "of_roof": result.of_roof, "mfu": result.mfu} for result in results]
        write_json(args.out, {"machine": before, "arguments": {**vars(args), "out": None}, "results": rows})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(PRESETS), help="default: all of them")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--micro-batch-size", type=int, help="default: what fits 80 GB")
    parser.add_argument("--micro-batches", type=int, default=4, help="of each rank, in a step")
    parser.add_argument("--nproc", type=int, default=1, help="data-parallel ranks, one GPU each")
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 with --cpu")
    parser.add_argument("--cpu", action="store_true", help="a small model, where there is no GPU")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "train_throughput.json")
    return parser.parse_args()


def _jobs(args: argparse.Namespace) -> list[Job]:
    on_gpu = torch.cuda.is_available()
    models = {name: load_preset(name) for name in args.model or PRESETS} if on_gpu else {"small": SMALL}
    jobs = []
    for name, model in models.items():
        size = args.micro_batch_size or PRESETS.get(name, SMALL_MICRO_BATCH)
        train = TrainConfig(
            global_batch_size=size * args.micro_batches * args.nproc,
            micro_batch_size=size,
            precision=args.precision or ("bf16" if on_gpu else "fp32"),
            recompute=args.recompute,
        )
        parallel = ParallelConfig(zero_stage=args.zero_stage)
        jobs.append(Job(name, model, train, parallel, args.steps, 8192 if on_gpu else 1024))
    return jobs


def load_preset(name: str) -> ModelConfig:
    """A model of configs/models."""
    with (MODELS_DIR / f"{name}.yaml").open() as file:
        return ModelConfig.model_validate(yaml.safe_load(file)["model"])


def _measure(meeting: Meeting, job: Job) -> Measured | str:
    with meeting.group(job.name, meeting.processes) as world:
        assert world is not None  # every process is in this group
        try:
            return _train(world, job)
        except torch.OutOfMemoryError as error:
            if meeting.processes > 1:
                raise  # others may wait for this rank in a collective: all must end
            return f"out of memory at micro batch {job.train.micro_batch_size}: {str(error).splitlines()[0]}"


def _train(world: World, job: Job) -> Measured:
    from gptdist.engine.engine import TrainEngine

    on_gpu = torch.cuda.is_available()
    roof = roof_flops(job.roof_size, on_gpu)
    layout = Layout(world.world_size, zero_stage=job.parallel.zero_stage)
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE)
    engine = TrainEngine(job.model, optimizer, job.parallel, job.train, layout, world)
    engine.initialise()
    seconds, loss = [], 0.0
    for number in range(1, WARMUP_STEPS + job.steps + 1):
        tokens = _tokens(job, number, world)
        dist.barrier()
        start = time.perf_counter()
        loss = engine.train_step(tokens, LEARNING_RATE, number).loss
        _finish(on_gpu)
        seconds.append(time.perf_counter() - start)
    engine.close()
    roof = max(roof, roof_flops(job.roof_size, on_gpu))
    step_seconds = statistics.median(seconds[WARMUP_STEPS:])
    tokens_per_second = job.train.global_batch_size * job.model.sequence_length / step_seconds
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return Measured(
        name=job.name,
        parameters=parameter_count(job.model),
        device=device,
        devices=world.world_size,
        micro_batch_size=job.train.micro_batch_size,
        step_seconds=step_seconds,
        tokens_per_second=tokens_per_second,
        model_flops=tokens_per_second * flops_per_token(job.model) / world.world_size,
        roof_flops=roof,
        peak_flops=peak_flops(device, job.train.precision) if on_gpu else None,
        memory_bytes=memory_bytes("cuda" if on_gpu else "cpu"),
        loss=loss,
    )


def roof_flops(size: int, on_gpu: bool, repetitions: int = 20) -> float:
    """FLOP/s of a square matrix product on random data: bf16 on the GPU, fp32 on the CPU. The median of several."""
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    # Random, because zeros draw less power and so run at higher clocks than training can.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(3 + repetitions):
        _finish(on_gpu)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _finish(on_gpu)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds[3:])


def _finish(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _tokens(job: Job, number: int, world: World) -> Tensor:
    """This rank's micro-batches of random tokens: [count, micro batch, sequence + 1] int64."""
    generator = torch.Generator().manual_seed(number * world.world_size + world.global_rank)
    count = job.train.global_batch_size // (job.train.micro_batch_size * world.world_size)
    shape = (count, job.train.micro_batch_size, job.model.sequence_length + 1)
    return torch.randint(job.model.vocab_size, shape, generator=generator)


def _row(result: Measured) -> list[str]:
    numbers: dict[str, Any] = {
        "ms": f"{1e3 * result.step_seconds:.0f}",
        "tokens": f"{result.tokens_per_second:,.0f}",
        "flops": f"{result.model_flops / 1e12:.3g}",
        "roof": f"{result.roof_flops / 1e12:.3g}",
        "of_roof": f"{result.of_roof:.1%}",
        "mfu": f"{result.mfu:.1%}" if result.mfu else "",
        "memory": f"{result.memory_bytes / 2**30:.1f}",
        "loss": f"{result.loss:.3f}",
    }
    return [result.name, f"{result.parameters:,}", *numbers.values()]


if __name__ == "__main__":
    main()
