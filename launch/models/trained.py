"""A trained model, from a run's folder, a checkpoint or a Hugging Face folder: for `generate`, `serve` and `eval`.

No optimizer. The weights are read directly under the layout asked for (one rank, or the model split over several),
whatever layout wrote them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import MANIFEST
from gptdist.checkpoint.read import open_newest
from gptdist.comms import Comms
from gptdist.config.rules.layout import rule_tensor_divides
from gptdist.config.sections import LaunchConfig, ParallelConfig, RunConfig
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.engine.engine import InferenceEngine
from gptdist.engine.partition import StateSource, TensorSource
from gptdist.errors import CorpusError, LayoutError
from gptdist.layout import Layout
from gptdist.train.compatible import check_same_model
from gptdist.world import World
from launch.models.stored import stored_config, stored_tokenizer
from launch.rendezvous import join, leave
from launch.take_up import weight_shapes

HF_CONFIG = "config.json"


@dataclass(frozen=True)
class Trained:
    """A model ready for inference, and what it was trained as.

    `opening`: ids that its tokenizer puts before every text; none of ours does. `step`: None where nothing says.
    """

    engine: InferenceEngine
    comms: Comms
    config: RunConfig
    tokenizer: CorpusTokenizer
    step: int | None
    path: Path
    opening: tuple[int, ...] = ()

    def prompt_ids(self, text: str) -> list[int]:
        """Ids to continue; at least one: an empty prompt is the beginning of a document, after another's end."""
        return [*self.opening, *self.tokenizer.encode(text)] or [self.tokenizer.end_of_text]


@contextmanager
def open_trained(path: Path, world: World | None = None, *, trust_others: bool = False) -> Iterator[Trained]:
    """Load the newest good checkpoint at `path`, or `path` itself if it is one or a Hugging Face folder.

    All ranks of `world` together, the model split over them. Raises CheckpointError, or LayoutError where it cannot be
    split so. `trust_others`: also a checkpoint that other users own or may write.
    """
    world = world or World()
    on_gpu = torch.cuda.is_available()
    comms = join(world, LaunchConfig().timeout, "cuda" if on_gpu else "cpu")
    try:
        if (path / HF_CONFIG).is_file() and not (path / MANIFEST).is_file():
            with _open_folder_of_hugging_face(path, comms, on_gpu) as trained:
                yield trained
        else:
            with _open_our_own(path, comms, on_gpu, trust_others) as trained:
                yield trained
    finally:
        leave()


@contextmanager
def _open_our_own(path: Path, comms: Comms, on_gpu: bool, trust_others: bool) -> Iterator[Trained]:
    found = open_newest(path, comms, trust_others=trust_others)
    for reason in found.skipped if comms.is_first else ():
        # Standard output is for text.
        print(f"warning: passed over a checkpoint: {reason}", file=sys.stderr, flush=True)
    with found.checkpoint as checkpoint:
        config = stored_config(checkpoint)
        check_same_model(weight_shapes(checkpoint), config.model, str(checkpoint.path))
        tokenizer = stored_tokenizer(checkpoint, config)
        end_of_text = tokenizer.end_of_text if config.data.mask_documents else None
        with _engine(config, TensorSource(checkpoint), comms.world, on_gpu, end_of_text) as engine:
            yield Trained(engine, comms, config, tokenizer, checkpoint.step, checkpoint.path)


@contextmanager
def _open_folder_of_hugging_face(path: Path, comms: Comms, on_gpu: bool) -> Iterator[Trained]:
    from gptdist.exchange.read_hf import HuggingFaceSource

    with HuggingFaceSource(path) as source:
        config = RunConfig(model=source.model)
        tokenizer = _tokenizer_of_hugging_face(path, config.model.vocab_size)
        with _engine(config, _AsTensors(source), comms.world, on_gpu, None) as engine:
            yield Trained(engine, comms, config, tokenizer, None, path, tuple(tokenizer.opening()))


def _tokenizer_of_hugging_face(path: Path, vocab_size: int) -> CorpusTokenizer:
    """Raises CorpusError for a tokenizer with ids that the model has not."""
    from gptdist.exchange.hf_tokenizer import TOKENIZER, is_of_bytes

    tokenizer = CorpusTokenizer.of_bytes() if is_of_bytes(path / TOKENIZER) else CorpusTokenizer.load(path)
    if tokenizer.vocab_size > vocab_size:
        raise CorpusError(
            f"{path / TOKENIZER} has ids up to {tokenizer.vocab_size - 1}, and the model beside it knows {vocab_size}. "
            "It is another model's: put the right one there."
        )
    return tokenizer


@contextmanager
def _engine(
    config: RunConfig, source: StateSource, world: World, on_gpu: bool, end_of_text: int | None
) -> Iterator[InferenceEngine]:
    tensor = world.world_size
    split = config.model_copy(update={"parallel": ParallelConfig(tensor=tensor)})
    broken = [rule.text for rule in rule_tensor_divides(split, tensor)]
    if broken:
        raise LayoutError(f"The model cannot be split over {tensor} ranks (--tensor {tensor}): {broken[0]}")
    # A CPU computes 16-bit matrices slowly and the weights are kept in fp32 anyway.
    train = config.train if on_gpu else config.train.model_copy(update={"precision": "fp32"})
    engine = InferenceEngine(config.model, train, Layout(world_size=tensor, tensor=tensor), world, end_of_text)
    try:
        engine.load_weights(source)
        yield engine
    finally:
        engine.close()


class _AsTensors:
    """A source of arrays as one of tensors."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def read(self, name: str, box: Box) -> torch.Tensor:
        return torch.from_numpy(self._source.read(name, box))
