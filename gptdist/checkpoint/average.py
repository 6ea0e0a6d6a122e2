"""The mean of the weights of several checkpoints of one model.

Sums in double precision, a few megabytes at a time. Optimizer state is not averaged and not carried over: what comes
out can be evaluated, exported and begun from, but not resumed. Knows three names in run state. Must not know torch.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.checkpoint.fragment import FragmentPlace, as_float64, from_float64
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import Manifest, TensorEntry
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.rewrite import write_checkpoint
from gptdist.errors import CheckpointError

WEIGHTS = "weight/"
AVERAGED_FROM = "averaged_from"
_FLOATS = ("float64", "float32", "bfloat16", "float16")


def average(sources: Sequence[Checkpoint], destination: Path) -> Manifest:
    """Write the mean of the sources' weights as the checkpoint `destination`. Raises CheckpointError, StorageError.

    Run state is that of the source of the highest step, without its loss and engine, and says what was averaged.
    """
    last = max(sources, key=lambda source: source.step)
    names = last.names(WEIGHTS)
    for source in sources:
        _check_alike(last, source, names)

    def read(place: FragmentPlace, box: Box) -> np.ndarray:
        total = np.zeros(box.shape)
        for source in sources:
            total += as_float64(source.read(place.name, box), place.dtype)
        return from_float64(total / len(sources), place.dtype)

    planned = replace(
        last.manifest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tensors={name: replace(last.manifest.tensors[name], digest="") for name in names},
        state=_state(last, sources),
    )
    return write_checkpoint(destination, planned, 1, read)


def _state(last: Checkpoint, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    state = {key: value for key, value in last.state.items() if key != "engine"}
    origins = [
        {"path": str(source.path), "step": source.step, "manifest_sha256": source.manifest.sha256} for source in sources
    ]
    return state | {"loss": None, "layout": f"average of {len(sources)}", AVERAGED_FROM: origins}


def _check_alike(first: Checkpoint, other: Checkpoint, names: list[str]) -> None:
    if not names:
        raise CheckpointError(f"{first.path} has no weights: no tensor whose name starts with {WEIGHTS!r}.")
    different = sorted(set(names) ^ set(other.names(WEIGHTS)))
    if different:
        raise CheckpointError(
            f"{first.path} and {other.path} are of different models: only one of them has {different[0]}. "
            "Average checkpoints of one model."
        )
    for name in names:
        one, two = first.manifest.tensors[name], other.manifest.tensors[name]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            raise CheckpointError(
                f"{first.path} and {other.path} are of different models: {name} is {_render(one)} in one and "
                f"{_render(two)} in the other. Average checkpoints of one model."
            )
        if one.dtype not in _FLOATS:
            raise CheckpointError(f"{first.path}: {name} is {_render(one)}; only {', '.join(_FLOATS)} have a mean.")


def _render(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"
