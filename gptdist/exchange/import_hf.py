"""A Hugging Face folder as a run's first checkpoint: its weights in our form, and the run state of a beginning.

Streams, knows no torch. What the folder of a run holds beside it is the command's.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.checkpoint.fragment import FragmentPlace
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import Manifest, TensorEntry
from gptdist.checkpoint.rewrite import write_checkpoint
from gptdist.errors import ExchangeError
from gptdist.exchange.read_hf import HuggingFaceSource

_FILE_BYTES = 4 << 30


def import_weights(source: HuggingFaceSource, destination: Path, state: Mapping[str, Any]) -> Manifest:
    """Write all weights of `source`, fp32, as the checkpoint `destination` of step 0.

    Raises ExchangeError for weights that are not finite, CheckpointError, StorageError.
    """
    tensors = {name: TensorEntry(source.shape(name), "float32", "", ()) for name in source.names()}

    def read(place: FragmentPlace, box: Box) -> np.ndarray:
        values = source.read(place.name, box)
        if not np.isfinite(values).all():
            raise ExchangeError(f"{source.path}: the weights that become {place.name} are not all finite.")
        return values

    total = sum(4 * Box.whole(entry.shape).size for entry in tensors.values())
    created = datetime.now(UTC).isoformat(timespec="seconds")
    planned = Manifest(0, created, {}, tensors, dict(state))
    return write_checkpoint(destination, planned, -(-total // _FILE_BYTES), read)
