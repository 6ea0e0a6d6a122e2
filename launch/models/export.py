"""`gptdist export`: a checkpoint as a folder that other tools load, proven to compute the same.

The folder is written beside its place under another name, proven there, and gets its name last; nothing else is ever
left. Loads no torch: the proof runs in processes of its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptdist.checkpoint.read import Checkpoint, checkpoint_paths
from gptdist.config.sections import RunConfig
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.durable import write_durably
from gptdist.errors import EXIT_DONE, CheckpointError, ExchangeError, NoGoodCheckpoint
from gptdist.exchange.architecture import exported_dialect, hf_config
from gptdist.exchange.conformance import CARD
from gptdist.exchange.hf_tokenizer import tokenizer_files
from gptdist.exchange.numbers import TORCH_NAMES
from gptdist.exchange.read_hf import CONFIG
from gptdist.exchange.write_hf import WrittenWeights, bytes_of, write_weights
from launch.models.card import begin_card
from launch.models.export_gguf import check_gguf_target, export_gguf
from launch.models.proof import check_can_prove, choose_probes, prove
from launch.models.stored import stored_config, stored_tokenizer
from launch.new_folder import check_free, check_room, new_folder

_ROOM_FOR_THE_REST = 64 << 20  # settings, tokenizer, card
_SHOWN_SECTIONS = ("model", "optimizer", "schedule", "train", "parallel")


def main(args: argparse.Namespace) -> int:
    """Export, falling back to older checkpoints where the newest are damaged."""
    if args.format == "gguf":
        check_gguf_target(args)
        export_one: Callable[[Checkpoint, argparse.Namespace], None] = export_gguf
    else:
        _check_hf_target(args)
        export_one = _export
    skipped: list[str] = []
    paths = checkpoint_paths(args.path)
    for path in paths:
        try:
            with Checkpoint.open(path, verify=False, trust_others=args.trust_others) as checkpoint:
                export_one(checkpoint, args)
            return EXIT_DONE
        except CheckpointError as error:
            if len(paths) == 1:
                raise
            print(f"warning: passed over a checkpoint: {path.name}: {error}", flush=True)
            skipped.append(f"{path.name}: {error}")
    reasons = "".join(f"\n  {reason}" for reason in skipped)
    raise NoGoodCheckpoint(f"{args.path} has {len(skipped)} checkpoint(s), but none of them can be exported:{reasons}")


def _check_hf_target(args: argparse.Namespace) -> None:
    if args.dtype == "q8_0":
        raise ExchangeError(
            "--dtype q8_0 is a format of GGUF files alone: no int8 that transformers loads by itself is known. Export "
            "with --format gguf --dtype q8_0, or with --dtype bf16."
        )
    if args.proof:
        check_can_prove()
    check_free(args.out)


def _export(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    config = stored_config(checkpoint)
    tokenizer = stored_tokenizer(checkpoint, config)
    dtype = TORCH_NAMES[args.dtype]
    architecture = hf_config(config.model, dtype, tokenizer.end_of_text)["architectures"][0]
    check_room(args.out, bytes_of(config.model, dtype) + _ROOM_FOR_THE_REST)
    print(f"exporting {checkpoint.path} as {architecture}, {dtype}", flush=True)
    with new_folder(args.out) as folder:
        weights = write_weights(folder, checkpoint, config.model, dtype, args.max_shard_size)
        notes = _write_settings(folder, config, dtype, tokenizer)
        card = build_card(checkpoint, config, tokenizer, dtype, weights)
        for note in notes:
            print(f"note    {note}", flush=True)
        if args.proof:
            print("proving it: the same tokens through our model and through transformers", flush=True)
            proof = prove(checkpoint.path, folder, config, dtype, tokenizer, choose_probes(config))
            card["proof"] = proof.card
        write_durably(folder / CARD, (json.dumps(card, indent=1) + "\n").encode())
    size = sum(entry["bytes"] for entry in weights.files.values())
    print(f"{args.out}: {len(weights.tensors)} tensors, {size:,} bytes in {len(weights.files)} file(s)")
    if args.proof:
        print(
            f"proven: of {proof.card['positions']} positions, the largest difference of a logit is "
            f"{proof.card['max_difference']:.3g} (allowed {proof.card['bound']:.3g}), the likeliest token is the same "
            f"at {proof.card['greedy_agreement']:.2%}; {CARD} has the rest"
        )
    else:
        print(f"not proven (--no-proof); {CARD} says so")


def _write_settings(folder: Path, config: RunConfig, dtype: str, tokenizer: CorpusTokenizer) -> tuple[str, ...]:
    written = tokenizer_files(tokenizer, config.model.sequence_length)
    settings = hf_config(config.model, dtype, tokenizer.end_of_text)
    for name, content in {CONFIG: (json.dumps(settings, indent=1) + "\n").encode(), **written.files}.items():
        write_durably(folder / name, content)
    return written.notes


def build_card(
    checkpoint: Checkpoint, config: RunConfig, tokenizer: CorpusTokenizer, dtype: str, weights: WrittenWeights
) -> dict[str, Any]:
    """The conformance card but for the proof: what was exported, from what."""
    resolved = config.model_dump(mode="json")
    return begin_card(checkpoint, tokenizer, "numpy") | {
        "architecture": exported_dialect(config.model).kind,
        "dtype": dtype,
        "config": {section: resolved[section] for section in _SHOWN_SECTIONS},
        "proof": None,
        "tensors": weights.tensors,
        "files": weights.files,
    }
