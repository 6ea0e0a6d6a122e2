"""How far a run is, and what of it a checkpoint keeps beside the tensors.

Knows the shape of a checkpoint's run state, and which data a run may go on with; what else must be as it was is in
`compatible.py`. Does not read or write files.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from gptdist.checkpoint.retention import EVALUATION_LOSS
from gptdist.comms import Comms
from gptdist.config.load import resolved_dict
from gptdist.config.sections import RunConfig
from gptdist.data.corpora import blend_phases
from gptdist.data.manifest import Manifest
from gptdist.errors import CheckpointError, CorpusError
from gptdist.remote import is_url, without_secrets
from gptdist.train.rollback import Rollback

RECORDED_PACKAGES = ("gptdist", "torch", "deepspeed", "megatron-core", "numpy")


@dataclass
class Progress:
    """Counters of a run; `samples`, trained on, and the rollbacks are all the state of the data order."""

    step: int = 0
    samples: int = 0
    loss: float | None = None  # of the last step
    skipped_in_a_row: int = 0
    skipped_total: int = 0
    rollbacks: tuple[Rollback, ...] = ()  # say which samples of the order are passed over
    spikes: dict[str, Any] | None = None  # what `SpikeWatch` knows

    def become(self, other: "Progress") -> None:
        """Go back, or on, to where `other` is."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))


def run_state(
    progress: Progress,
    config: RunConfig,
    layout: str,
    manifests: Mapping[str, Manifest],
    engine: dict[str, Any],
    evaluation_loss: float | None = None,
) -> dict[str, Any]:
    """The JSON that stands in a checkpoint's manifest. Random state is a key (train.seed, step), so the seed is all of
    it. `evaluation_loss`: of the evaluation at this very step, if there was one."""
    return {
        **dataclasses.asdict(progress),
        EVALUATION_LOSS: evaluation_loss,
        "tokens": progress.samples * config.model.sequence_length,
        "layout": layout,
        "engine": engine,
        "random": {"seed": config.train.seed, "step": progress.step},
        "data": data_identity(config, manifests),
        "config": _shareable(resolved_dict(config)),
        "versions": {name: _version(name) for name in RECORDED_PACKAGES},
    }


def _shareable(value: Any) -> Any:
    """Settings without what may be secret in a URL: checkpoints are copied to where the config is not."""
    if isinstance(value, dict):
        return {_shareable(key): _shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shareable(item) for item in value]
    return without_secrets(value) if is_url(value) else value


def restored_progress(state: dict[str, Any]) -> Progress:
    """The inverse of `run_state` for the counters."""
    counters = {field.name: state[field.name] for field in dataclasses.fields(Progress) if field.name in state}
    return Progress(**{**counters, "rollbacks": restored_rollbacks(state)})


def restored_rollbacks(state: Mapping[str, Any]) -> tuple[Rollback, ...]:
    """The rollbacks of a run, oldest first; a checkpoint of a version that knew none has none."""
    return tuple(Rollback.restored(record) for record in state.get("rollbacks", ()))


def data_identity(config: RunConfig, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """What, with a sample number, fixes a training window: nothing in it may change while samples are counted on,
    except phases that have not begun. Corpora are what their index is, wherever they lie.
    """
    data = config.data
    identity: dict[str, Any] = {
        "tokenizer": next(iter(manifests.values())).tokenizer.sha256,
        "end_of_text": next(iter(manifests.values())).tokenizer.end_of_text,
        "seed": data.seed,
        "sequence_length": config.model.sequence_length,
        "shuffle": data.shuffle,
    }
    if data.shuffle == "local":
        identity |= {"shuffle_blocks": data.shuffle_blocks, "shuffle_block_tokens": data.shuffle_block_tokens}
    identity["phases"] = [
        {
            "from_sample": phase.from_sample,
            "blend": [
                {
                    "corpus": without_secrets(name),
                    "index": manifests[name].split("train").index.sha256,
                    "weight": weight,
                }
                for name, weight in phase.weights
            ],
        }
        for phase in blend_phases(data)
    ]
    return identity


def check_same_on_all_ranks(identity: dict[str, Any], names: Sequence[str], comms: Comms) -> None:
    """Raises CorpusError, on all ranks, where not all have the same `data_identity`: a node's copy may be older."""
    own = json.dumps(identity, sort_keys=True).encode()
    digests = comms.gather(hashlib.sha256(own).hexdigest())
    other = next((global_rank for global_rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise CorpusError(
            f"Not all ranks have the same corpus: on rank {other}, {', '.join(names)} has another index or another "
            "tokenizer than on rank 0. Copy the same corpus to every node, or put it where all can read it."
        )


_WHAT = {
    "tokenizer": "its tokenizer is not the corpus's",
    "end_of_text": "another token ended its documents",
    "seed": "data.seed was another",
    "sequence_length": "model.sequence_length was another",
    "shuffle": "data.shuffle was another",
    "shuffle_blocks": "data.shuffle_blocks was another",
    "shuffle_block_tokens": "data.shuffle_block_tokens was another",
}


def check_same_data(saved: dict[str, Any], current: dict[str, Any], samples: int, where: str) -> None:
    """Raises CheckpointError where going on after `samples` samples would repeat or leave out some, or read ids by
    another tokenizer. Phases that begin at `samples` or later may be any.
    """
    for key, what in _WHAT.items():
        if saved.get(key) != current.get(key):
            raise CheckpointError(
                f"{where} cannot be resumed with this data: {what} ({saved.get(key)!r} then, {current.get(key)!r} "
                "now), so its count of samples means other text. Set it back, or start anew with --fresh or another "
                "launch.run_dir."
            )
    before, now = (_phases_before(identity, samples) for identity in (saved, current))
    for number in range(max(len(before), len(now))):
        then = before[number] if number < len(before) else None
        today = now[number] if number < len(now) else None
        if _phase_key(then) != _phase_key(today):
            raise CheckpointError(
                f"{where} cannot be resumed with this data: it was trained on {_what_else(then, today)} ("
                f"{_render_phase(then)}; the config now says {_render_phase(today)}), so its count of {samples:,} "
                "samples means other text. What was consumed cannot be changed; to go on with another blend, leave the "
                f"earlier phases as they were and add a phase to data.phases with from_sample: {samples}. Or start "
                "anew with --fresh or another launch.run_dir."
            )


def _phases_before(identity: dict[str, Any], samples: int) -> list[dict[str, Any]]:
    return [phase for phase in identity["phases"] if phase["from_sample"] < samples]


def _phase_key(phase: dict[str, Any] | None) -> object:
    """What must be the same: not the corpora's names, which change when folders move."""
    return phase and (phase["from_sample"], [(part["index"], part["weight"]) for part in phase["blend"]])


def _what_else(then: dict[str, Any] | None, today: dict[str, Any] | None) -> str:
    if then is None or today is None or then["from_sample"] != today["from_sample"]:
        return "other phases"
    same = [part["index"] for part in then["blend"]] == [part["index"] for part in today["blend"]]
    return "other weights" if same else "another corpus"


def _render_phase(phase: dict[str, Any] | None) -> str:
    """`data/a (weight 7, index 0123456789ab) and ... from sample 0 on`."""
    if phase is None:
        return "no such phase"
    parts = (f"{part['corpus']} (weight {part['weight']}, index {part['index'][:12]})" for part in phase["blend"])
    return f"{' and '.join(parts)} from sample {phase['from_sample']:,} on"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
