"""`gptdist export --format gguf`: a checkpoint as one file for llama.cpp, with the proof that it is the checkpoint's.

Knows the order of the steps and what is said; how the file is made is `gptdist/exchange/gguf.py`'s. The file appears
under its name, with its card beside it, only when everything in it was read back and compared.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.read import Checkpoint
from gptdist.config.sections import ModelConfig, RunConfig
from gptdist.durable import sync_folder, write_durably
from gptdist.errors import EXIT_DONE, ExchangeError, StorageError
from gptdist.exchange.gguf_vocabulary import gguf_vocabulary
from gptdist.exchange.tensors import LogicalView
from gptdist.train.evaluate import held_out_values
from gptdist.train.progress import check_same_model
from launch.evaluate import open_validation
from launch.train import weight_shapes
from launch.trained import config_of, open_checkpoint, open_trained, tokenizer_of

# Where weights are rounded so far that the perplexity is measured.
_MEASURED = ("q8_0",)


def export_gguf(args: argparse.Namespace) -> int:
    """Write `args.out` from the checkpoint at `args.path`. Raises ExchangeError for what does not fit, NotConformant
    for a file that is not the checkpoint's (none is left)."""
    gguf = _library()
    out, dtype = Path(args.out), args.dtype or "fp32"
    card_path = out.with_name(f"{out.name}.json")
    _check_target(out, card_path)
    with ExitStack() as closing:
        checkpoint = closing.enter_context(open_checkpoint(args.path))
        config = config_of(checkpoint)
        check_same_model(weight_shapes(checkpoint), config.model, str(checkpoint.path))
        dtypes = gguf.stored_dtypes(config.model, dtype)  # refuses, before anything slow
        tokenizer = tokenizer_of(args.path, checkpoint, config)
        vocabulary = gguf_vocabulary(tokenizer, config.model.vocab_size)
        about = _about(checkpoint, config)
        temporary = closing.enter_context(_written_aside(out))
        with _disk(out):
            gguf.write_gguf(temporary, checkpoint, config.model, vocabulary, dtype, about)
        gguf.check_gguf(temporary, checkpoint, config.model, dtype, about)
        card = {
            "format": "gguf",
            "file": out.name,
            "bytes": temporary.stat().st_size,
            "sha256": _sha256(temporary),
            "architecture": gguf.gguf_architecture(config.model),
            "dtype": dtype,
            "tensors": dtypes,
            "vocabulary": vocabulary.pre_tokenizer or None,
            "no_vocabulary_because": vocabulary.problem or None,
            "step": checkpoint.step,
            "checkpoint": checkpoint.path.name,
            "data": checkpoint.state["data"],
            "config": config.model.model_dump(mode="json"),
            "versions": checkpoint.state["versions"],
            "compared": "every tensor, read back from the file, is bit for bit the checkpoint's in its dtype",
        }
        if dtype in _MEASURED:
            card["perplexity"] = _perplexity(args, checkpoint.path, temporary, config.model)
        with _disk(out):
            write_durably(card_path, json.dumps(card, indent=1).encode() + b"\n")
            os.replace(temporary, out)
            sync_folder(out.parent)
    _say(card, out)
    return EXIT_DONE


def _library() -> Any:
    """`gptdist.exchange.gguf`, which needs the extra."""
    try:
        from gptdist.exchange import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ExchangeError("--format gguf needs the package gguf: pip install 'gptdist[gguf]'.") from None
    return gguf


def _check_target(out: Path, card: Path) -> None:
    if out.suffix != ".gguf":
        raise ExchangeError(f"--out {out} must be a file that ends in .gguf: --format gguf makes one file.")
    for path in (out, card):
        if path.exists() or path.is_symlink():
            raise ExchangeError(f"{path} exists. Name another file with --out, or move that one away.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {out.parent} of --out: {error.strerror or error}.") from error


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """A temporary name beside `out`, gone at the end unless it was renamed."""
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """What the disk refuses, as one error with the room there is."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(out.parent).free
        raise StorageError(
            f"cannot write {out}: {error.strerror or error} ({free / 2**20:.0f} MiB are free there). Nothing was left."
        ) from error


def _about(checkpoint: Checkpoint, config: RunConfig) -> dict[str, str | int | float | bool]:
    name = Path(config.launch.run_dir).name or "gptdist"
    return {
        "general.name": name,
        "general.description": f"{name}, step {checkpoint.step}, exported by gptdist",
        "gptdist.step": checkpoint.step,
        "gptdist.tokens": int(checkpoint.state["tokens"]),
    }


class _Weights:
    """Exported weights as an engine reads them: torch's."""

    def __init__(self, view: LogicalView) -> None:
        self._view = view

    def read(self, name: str, box: Box) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._view.read(name, box)))


def _perplexity(args: argparse.Namespace, checkpoint: Path, file: Path, model: ModelConfig) -> dict[str, Any]:
    """Held-out perplexity of the checkpoint's weights and of the file's, through our engine, on the same windows."""
    gguf = _library()
    measured: dict[str, Any] = {}
    with open_trained(checkpoint) as trained, ExitStack() as closing:
        reader = open_validation(trained, getattr(args, "corpus", None), closing)[0]
        windows = reader.num_windows(model.sequence_length)
        samples = min(getattr(args, "samples", None) or trained.config.train.eval_samples, windows)
        micro_batch_size = trained.config.train.micro_batch_size
        before = held_out_values(trained.engine, reader, samples, micro_batch_size)
        with gguf.GgufFile(file) as opened:
            trained.engine.load_weights(_Weights(gguf.gguf_view(opened, model)))
        after = held_out_values(trained.engine, reader, samples, micro_batch_size)
        for name, values in (("checkpoint", before), ("exported", after)):
            measured[name] = values["eval/perplexity"]
        measured["change"] = after["eval/perplexity"] / before["eval/perplexity"] - 1
        measured |= {"windows": samples, "corpus": str(reader.corpus), "index": reader.manifest.split(reader.split).index.sha256}
    return measured


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(card: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: {card['architecture']}, {card['dtype']}, {card['bytes'] / 2**20:.1f} MiB, step {card['step']}; every "
        "tensor read back and compared"
    )
    if measured := card.get("perplexity"):
        print(
            f"perplexity on {measured['windows']} held-out windows of {measured['corpus']}: "
            f"{measured['checkpoint']:.4f} before, {measured['exported']:.4f} as exported ({measured['change']:+.3%})"
        )
    if card["no_vocabulary_because"]:
        print(
            f"warning: {out} has no vocabulary, so llama.cpp takes and gives ids, not text: the tokenizer does not fit, "
            f"because {card['no_vocabulary_because']}",
            flush=True,
        )
