"""`gptdist export --format gguf`: a checkpoint as one file for llama.cpp, proven to hold the checkpoint's numbers.

Knows the order of the steps and what is said; how the file is made is `gptdist/exchange/gguf.py`'s. The file appears
under its name, its card beside it, only when everything in it was read back and compared. Loads no torch: perplexity is
measured in a process of its own.
"""

import argparse
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptdist.checkpoint.read import Checkpoint
from gptdist.config.sections import RunConfig
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.durable import sync_folder, write_durably
from gptdist.errors import ExchangeError, StorageError
from gptdist.exchange.gguf_vocabulary import Vocabulary, gguf_vocabulary
from gptdist.exchange.write_hf import CheckedSource
from launch.models import quantized_loss
from launch.models.card import begin_card
from launch.models.proof import alone
from launch.models.stored import stored_config, stored_tokenizer
from launch.new_folder import check_room, term_cleans_up

# Weights rounded so far that the perplexity is measured before there is a file.
_MEASURED = ("q8_0",)
_ROOM_FOR_THE_REST = 64 << 20  # vocabulary, card


def check_gguf_target(args: argparse.Namespace) -> None:
    """Raises ExchangeError unless `args.out` can become a new file, and for what is missing here."""
    if find_spec("gguf") is None:
        raise ExchangeError("--format gguf needs the package gguf. Install it: pip install 'gptdist[gguf]'.")
    if args.out.suffix != ".gguf":
        raise ExchangeError(f"--out {args.out} must end in .gguf: --format gguf makes one file.")
    for path in (args.out, card_path(args.out)):
        if path.exists() or path.is_symlink():
            raise ExchangeError(f"{path} exists; nothing is ever replaced. Name another --out.")


def card_path(out: Path) -> Path:
    """Where the card of a file is: beside it, under its name, since a folder may hold several files."""
    return out.with_name(f"{out.stem}.conformance.json")


def export_gguf(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Write `args.out` in `args.dtype`. Raises ExchangeError for what the format cannot hold, NotConformant where the
    file is not the checkpoint's; no file is left then."""
    from gptdist.exchange import gguf  # of an extra

    config = stored_config(checkpoint)
    dtype, model = args.dtype, config.model
    architecture = gguf.gguf_architecture(model)
    check_room(args.out, gguf.gguf_bytes(model, dtype) + _ROOM_FOR_THE_REST)
    tokenizer = stored_tokenizer(checkpoint, config)
    vocabulary = gguf_vocabulary(tokenizer, model.vocab_size)
    about = _about(checkpoint, config)
    print(f"exporting {checkpoint.path} as {architecture}, {dtype}", flush=True)
    with term_cleans_up(), _new_file(args.out) as temporary:
        checked = CheckedSource(checkpoint)
        gguf.write_gguf(temporary, checked, model, vocabulary, dtype, about)
        checked.compare()
        gguf.check_gguf(temporary, checkpoint, model, dtype, about)
        card = build_card(checkpoint, config, tokenizer, vocabulary)
        card |= {"architecture": architecture, "dtype": dtype, "tensors": gguf.stored_dtypes(model, dtype)}
        card["files"] = {args.out.name: {"bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}}
        if dtype in _MEASURED:
            print("measuring perplexity, before and after", flush=True)
            card["perplexity"] = alone(quantized_loss.measure, checkpoint.path, temporary, args.corpus, args.samples)
        write_durably(card_path(args.out), (json.dumps(card, indent=1) + "\n").encode())
    _say(card, args.out)


def build_card(
    checkpoint: Checkpoint, config: RunConfig, tokenizer: CorpusTokenizer, vocabulary: Vocabulary
) -> dict[str, Any]:
    """What was exported, from what, and what is proven of it."""
    card = begin_card(checkpoint, tokenizer, "numpy", "gguf")
    split = {"pre_tokenizer": vocabulary.pre_tokenizer or None, "left_out_because": vocabulary.problem or None}
    return card | {
        "tokenizer": card["tokenizer"] | split,
        "config": {"model": config.model.model_dump(mode="json")},
        "proof": {"rule": "every number of the file, read back, is bit for bit the checkpoint's in the file's dtype"},
    }


def _about(checkpoint: Checkpoint, config: RunConfig) -> dict[str, str | int | float | bool]:
    name = Path(config.launch.run_dir).name or "gptdist"
    about: dict[str, str | int | float | bool] = {
        "general.name": name,
        "general.description": f"{name}, step {checkpoint.step}, exported by gptdist",
        "gptdist.step": checkpoint.step,
        "gptdist.manifest_sha256": checkpoint.manifest.sha256,
    }
    tokens = checkpoint.state.get("tokens")
    return about if tokens is None else about | {"gptdist.tokens": int(tokens)}


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """A neighbour of `out` that gets its name when all has gone well, and is removed otherwise.

    Raises StorageError for what the disk refuses.
    """
    temporary = out.with_name(f".tmp-{secrets.token_hex(4)}-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, out)
        sync_folder(out.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {error.strerror or error}. Name another --out, on a disk with room."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        if not out.exists():
            card_path(out).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(card: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: {len(card['tensors'])} tensors, {card['files'][out.name]['bytes']:,} bytes; all read back and compared"
    )
    if measured := card.get("perplexity"):
        print(
            f"perplexity on {measured['windows']} held-out windows of {measured['corpus']}: "
            f"{measured['checkpoint']:.4f} of the checkpoint, {measured['exported']:.4f} of the file "
            f"({measured['change']:+.4%})"
        )
    if problem := card["tokenizer"]["left_out_because"]:
        print(
            f"note    {out} has no vocabulary, so that llama.cpp takes and gives ids and no text: of the tokenizer "
            f"llama.cpp knows no equal, since {problem}",
            flush=True,
        )
