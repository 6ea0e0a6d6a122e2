"""Small checkpoints for tests of what reads them, made without torch; and a manifest changed as an enemy would."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.logical import Box, Shape
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.world import World

ONE_RANK = Comms(World())
FILE = "rank-00000.safetensors"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES: dict[str, Shape] = {"embedding.weight": (29, 8), "layers.0.norm.weight": (8,), "scale": ()}


def whole(name: str, value: np.ndarray, dtype: str | None = None) -> HostFragment:
    """The whole tensor."""
    return HostFragment(name, value.shape, Box.whole(value.shape), dtype or str(value.dtype), value)


def some_state(seed: int) -> dict[str, np.ndarray]:
    """Weights and moments of a small model."""
    generator = np.random.default_rng(seed)
    return {
        f"{kind}/{name}": np.asarray(generator.standard_normal(shape), dtype=np.float32)
        for kind in KINDS
        for name, shape in SHAPES.items()
    }


def save(
    folder: Path, step: int, tensors: dict[str, np.ndarray] | None = None, state: dict[str, Any] | None = None
) -> Path:
    """A checkpoint of `tensors` (default: `some_state(step)`), in `folder`."""
    tensors = some_state(step) if tensors is None else tensors
    fragments = [whole(name, value) for name, value in tensors.items()]
    told = {"step": step, "samples": 8 * step, "tokens": 1024 * step, "loss": 4.0 / step, "layout": "DP 1"}
    return save_checkpoint(folder, step, fragments, {**told, "engine": {}, **(state or {})}, ONE_RANK)


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it a right digest, as somebody who means harm would."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    body = (json.dumps(manifest, indent=1)[:-2] + ",\n").encode()
    (path / "manifest.json").write_bytes(body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode())


def flip_a_bit(path: Path, place: int = -1) -> None:
    """One bit of the byte at `place`."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
