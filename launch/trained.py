"""A trained model from a run folder, a folder of checkpoints, or one checkpoint: what `generate` and `eval` start from.

One process, no optimizer: the checkpoint is read directly under a layout of one rank, whatever layout wrote it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gptdist.checkpoint.read import Checkpoint, open_newest
from gptdist.comms import Comms
from gptdist.config.sections import RunConfig
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.engine.engine import InferenceEngine
from gptdist.engine.partition import TensorSource
from gptdist.layout import Layout
from gptdist.train.progress import check_same_model
from gptdist.world import World
from launch.rendezvous import join, leave
from launch.stored import stored_config, stored_tokenizer
from launch.train import weight_shapes


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
        config = stored_config(checkpoint)
        check_same_model(weight_shapes(checkpoint), config.model, str(checkpoint.path))
        tokenizer = stored_tokenizer(path, checkpoint, config)
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
