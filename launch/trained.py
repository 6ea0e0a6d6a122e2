"""A trained model from a run folder, a folder of checkpoints, or one checkpoint: what `generate` and `eval` start from.

One process, no optimizer: the checkpoint is read directly under a layout of one rank, whatever layout wrote it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from gptdist.checkpoint.read import Checkpoint, open_newest
from gptdist.comms import Comms
from gptdist.config.sections import RunConfig
from gptdist.data.corpora import corpus_names
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.engine.engine import InferenceEngine
from gptdist.engine.partition import TensorSource
from gptdist.errors import CheckpointError
from gptdist.layout import Layout
from gptdist.remote import is_url, without_secrets
from gptdist.train.progress import check_same_model
from gptdist.world import World
from launch.rendezvous import join, leave
from launch.train import TOKENIZER_FILE, weight_shapes


@dataclass(frozen=True)
class Trained:
    """A model ready for inference, and what it was trained as."""

    engine: InferenceEngine
    comms: Comms
    config: RunConfig
    tokenizer: CorpusTokenizer
    step: int
    path: Path


@contextmanager
def open_trained(path: Path) -> Iterator[Trained]:
    """Load the newest good checkpoint at `path` (or `path` itself, if it is one). Raises CheckpointError."""
    with open_checkpoint(path) as checkpoint:
        config = _config(checkpoint)
        check_same_model(weight_shapes(checkpoint), config.model, str(checkpoint.path))
        tokenizer = _tokenizer(path, checkpoint, config)
        on_gpu = torch.cuda.is_available()
        comms = join(World(), config.launch.timeout, "cuda" if on_gpu else "cpu")
        # A CPU computes 16-bit matrices slowly and the weights are kept in fp32 anyway.
        train = config.train if on_gpu else config.train.model_copy(update={"precision": "fp32"})
        try:
            end_of_text = tokenizer.end_of_text if config.data.mask_documents else None
            engine = InferenceEngine(config.model, train, Layout(), World(), end_of_text)
            try:
                engine.load_weights(TensorSource(checkpoint))
                yield Trained(engine, comms, config, tokenizer, checkpoint.step, checkpoint.path)
            finally:
                engine.close()
        finally:
            leave()


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `path` means. Raises CheckpointError, naming what was looked for."""
    found = open_newest(path)
    for reason in found.skipped:
        print(f"warning: passed over a checkpoint: {reason}", flush=True)
    return found.checkpoint


def _config(checkpoint: Checkpoint) -> RunConfig:
    try:
        return RunConfig.model_validate(checkpoint.state["config"])
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{checkpoint.path} was saved by another version of gptdist "
            f"({checkpoint.state['versions'].get('gptdist')}): its "
            f"config's {'.'.join(map(str, first['loc']))} is not understood here ({first['msg']}). Use that version."
        ) from error


def _tokenizer(path: Path, checkpoint: Checkpoint, config: RunConfig) -> CorpusTokenizer:
    """From the run's folder, else from the corpus; it must be the one the model was trained with."""
    trained_on = checkpoint.state["data"]
    wanted, end_of_text = trained_on["tokenizer"], trained_on["end_of_text"]
    places: list[Path | str] = [
        path / TOKENIZER_FILE,
        checkpoint.path.parent.parent / TOKENIZER_FILE,
        Path(config.launch.run_dir) / TOKENIZER_FILE,
        *corpus_names(config.data),
    ]
    for place in places:
        if is_url(place) or Path(place).exists():
            tokenizer = CorpusTokenizer.load(place, end_of_text)
            if tokenizer.sha256 == wanted:
                return tokenizer
    raise CheckpointError(
        f"the tokenizer that {checkpoint.path} was trained with (sha256 {wanted[:12]}...) is in none of "
        f"{', '.join(without_secrets(str(place)) for place in dict.fromkeys(places))}. Put its file there."
    )
