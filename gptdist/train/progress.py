"""How far a run is, and what of it a checkpoint keeps beside the tensors.

Knows the shape of a checkpoint's run state and which differences between a checkpoint and a config forbid going on.
Does not read or write files.
"""

import dataclasses
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from gptdist.config.load import resolved_dict
from gptdist.config.sections import ModelConfig, RunConfig
from gptdist.data.manifest import Manifest
from gptdist.errors import CheckpointError
from gptdist.model.parameters import logical_shapes

RECORDED_PACKAGES = ("gptdist", "torch", "deepspeed", "megatron-core", "numpy")


@dataclass
class Progress:
    """Counters of a run; `samples` is the only state of the data order."""

    step: int = 0
    samples: int = 0
    loss: float | None = None  # of the last step
    skipped_in_a_row: int = 0
    skipped_total: int = 0


def run_state(
    progress: Progress, config: RunConfig, layout: str, manifest: Manifest, engine: dict[str, Any]
) -> dict[str, Any]:
    """The JSON that stands in a checkpoint's manifest. Random state is a key (train.seed, step), so the seed is all of
    it."""
    return {
        **dataclasses.asdict(progress),
        "tokens": progress.samples * config.model.sequence_length,
        "layout": layout,
        "engine": engine,
        "random": {"seed": config.train.seed, "step": progress.step},
        "data": data_identity(config, manifest),
        "config": resolved_dict(config),
        "versions": {name: _version(name) for name in RECORDED_PACKAGES},
    }


def restored_progress(state: dict[str, Any]) -> Progress:
    """The inverse of `run_state` for the counters."""
    return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})


def data_identity(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What, with a sample number, fixes a training window: nothing in it may change while samples are counted on."""
    train = manifest.split("train")
    return {
        "tokenizer": manifest.tokenizer.sha256,
        "index": train.index.sha256,
        "seed": config.data.seed,
        "sequence_length": config.model.sequence_length,
    }


def check_same_model(shapes: dict[str, tuple[int, ...]], model: ModelConfig, where: str) -> None:
    """Raises CheckpointError unless a checkpoint's `weight/` tensors (names without the prefix) are those of
    `model`."""
    wanted = logical_shapes(model)
    for name in wanted:
        if name not in shapes:
            raise CheckpointError(
                f"{where} is a checkpoint of another model: it has no {name}, which the configured model has. "
                "Set the model section to the checkpoint's, or start anew with --fresh or another launch.run_dir."
            )
        if tuple(shapes[name]) != wanted[name]:
            raise CheckpointError(
                f"{where} is a checkpoint of another model: its {name} is {list(shapes[name])}, the configured model's "
                f"is {list(wanted[name])}. Set the model section to the checkpoint's, or start anew with --fresh or "
                "another launch.run_dir."
            )
    extra = sorted(set(shapes) - set(wanted))
    if extra:
        raise CheckpointError(
            f"{where} is a checkpoint of another model: it has {extra[0]}, which the configured model has not. "
            "Set the model section to the checkpoint's, or start anew with --fresh or another launch.run_dir."
        )


_WHAT = {
    "tokenizer": "its tokenizer is not the corpus's",
    "index": "it was trained on another corpus",
    "seed": "data.seed was another",
    "sequence_length": "model.sequence_length was another",
}


def check_same_data(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raises CheckpointError where going on would repeat or leave out samples, or read ids by another tokenizer."""
    for key, what in _WHAT.items():
        if saved.get(key) != current[key]:
            raise CheckpointError(
                f"{where} cannot be resumed with this data: {what} ({saved.get(key)!r} then, {current[key]!r} now), so "
                "its count of samples means other text. Set it back, or start anew with --fresh or another "
                "launch.run_dir."
            )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
