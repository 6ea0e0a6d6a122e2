"""Checkpoints of random weights, made without training or torch, for tests of what reads them."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.checkpoint.fragment import FragmentPlace
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import Manifest, TensorEntry
from gptdist.checkpoint.rewrite import write_checkpoint
from gptdist.config.load import resolved_dict
from gptdist.config.sections import DataConfig, LaunchConfig, ModelConfig, RunConfig
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.model.parameters import logical_shapes

STD = 0.05


def random_weight(name: str, shape: tuple[int, ...], std: float = STD) -> np.ndarray:
    """No weight is special: norms and biases are random too."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(shape, np.float32) * np.float32(std)
    return values + np.float32(1) if name.endswith("norm.weight") else values


def write_run(
    run_dir: Path,
    model: ModelConfig,
    *,
    tokenizer: CorpusTokenizer | None = None,
    corpus: Path | None = None,
    step: int = 7,
    weights: dict[str, np.ndarray] | None = None,
) -> Path:
    """A run's folder with one checkpoint of random weights (or `weights`, by logical name); that checkpoint."""
    tokenizer = tokenizer or CorpusTokenizer.of_bytes()
    config = RunConfig(
        model=model, data=DataConfig(corpus=corpus and str(corpus)), launch=LaunchConfig(run_dir=str(run_dir))
    )
    state: dict[str, Any] = {
        "step": step,
        "samples": 8 * step,
        "tokens": 8 * step * model.sequence_length,
        "loss": 3.25,
        "skipped_in_a_row": 0,
        "skipped_total": 0,
        "layout": "1 rank",
        "data": {"tokenizer": tokenizer.sha256, "end_of_text": tokenizer.end_of_text},
        "config": resolved_dict(config),
        "versions": {"gptdist": "test"},
    }
    arrays = weights or {name: random_weight(name, shape) for name, shape in logical_shapes(model).items()}
    tensors = {f"weight/{name}": TensorEntry(array.shape, "float32", "", ()) for name, array in arrays.items()}

    def read(place: FragmentPlace, box: Box) -> np.ndarray:
        return arrays[place.name.removeprefix("weight/")][box.slices()]

    path = run_dir / "checkpoints" / f"step-{step:08d}"
    write_checkpoint(path, Manifest(step, "2026-01-01T00:00:00+00:00", {}, tensors, state), 3, read)
    (run_dir / "tokenizer.json").write_bytes(tokenizer.content)
    return path
