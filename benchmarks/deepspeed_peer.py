"""DeepSpeed's own way with checkpoints, for comparison: train a step, save, convert to universal, load, zero_to_fp32.

Usage: python -m benchmarks.deepspeed_peer save DIR --parameters N | load DIR --parameters N | (see `commands`)

Runs beside the benchmarks of checkpoints, each phase as processes of its own. The model is a stack of matrices with as
many parameters as ours, in bf16 with fp32 masters and two moments under ZeRO 2: what its checkpoint holds is 14 bytes a
parameter, ours 12. It knows nothing of gptdist but how benchmarks start ranks.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ranks import Meeting, run_ranks

WIDTH = 1024
TAG = "step"


class Stack(nn.Module):
    """Square matrices, one after the other."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        count = max(1, round(parameters / WIDTH**2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + 0.01 * layer(hidden)
        return hidden


def main() -> None:
    """One phase; prints its seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("save", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    phase = _save if args.phase == "save" else _load
    print(json.dumps({"seconds": run_ranks(phase, args.ranks, args.folder, args.parameters)}))


def to_universal(source: Path, out: Path) -> list[str]:
    """The command that converts a checkpoint, so that another layout can load it."""
    options = ["--inject_missing_state", "--num_extract_workers", "2", "--num_merge_workers", "2"]
    folders = ["--input_folder", str(source / TAG), "--output_folder", str(out / TAG)]
    return [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *options]


def to_fp32(source: Path, out: Path) -> list[str]:
    """The command that makes fp32 weights in safetensors of a checkpoint."""
    where = [str(source), str(out), "--tag", TAG, "--safe_serialization"]
    return [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", *where]


def _save(meeting: Meeting, folder: Path, parameters: int) -> float:
    with meeting.group("save", meeting.processes):
        engine = _engine(parameters, meeting, universal=False)
        engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().pow(2).mean())
        engine.step()
        started = time.perf_counter()
        engine.save_checkpoint(str(folder), tag=TAG)
        seconds = time.perf_counter() - started
        engine.destroy()
    return seconds


def _load(meeting: Meeting, folder: Path, parameters: int) -> float:
    with meeting.group("load", meeting.processes):
        engine = _engine(parameters, meeting, universal=True)
        started = time.perf_counter()
        engine.load_checkpoint(str(folder), tag=TAG)
        seconds = time.perf_counter() - started
        engine.destroy()
    return seconds


def _engine(parameters: int, meeting: Meeting, *, universal: bool) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["LOCAL_RANK"] = str(meeting.global_rank)
    import deepspeed
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    torch.manual_seed(0)
    model = Stack(parameters).bfloat16()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": universal},
        },
    )
    return engine


if __name__ == "__main__":
    main()
