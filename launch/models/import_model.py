"""`gptdist import`: a Hugging Face model's folder as a run's folder, to evaluate, generate and train on from.

Written beside its place under another name, which it gets last. Loads no torch.
"""

import argparse
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptdist.config.load import resolved_dict
from gptdist.config.sections import LaunchConfig, RunConfig
from gptdist.data.tokenizer import BYTES, CorpusTokenizer
from gptdist.durable import write_durably
from gptdist.errors import EXIT_DONE, CorpusError, ExchangeError
from gptdist.exchange.hf_tokenizer import TOKENIZER, TOKENIZER_CONFIG, imported_tokenizer
from gptdist.exchange.import_hf import import_weights
from gptdist.exchange.read_hf import CONFIG, HuggingFaceSource
from gptdist.model.parameters import parameter_count
from launch.models.stored import TOKENIZER_FILE, versions_of
from launch.new_folder import check_free, new_folder

STEP_FOLDER = Path("checkpoints") / "step-00000000"


def main(args: argparse.Namespace) -> int:
    """Import, and say how to go on."""
    check_free(args.out)
    with HuggingFaceSource(args.path, args.sequence_length) as source:
        tokenizer = _tokenizer(args.path, args.tokenizer, source)
        state = _state(source, tokenizer, args.out)
        with new_folder(args.out) as folder:
            manifest = import_weights(source, folder / STEP_FOLDER, state)
            write_durably(folder / TOKENIZER_FILE, tokenizer.content)
            write_durably(folder / "config.yaml", _config_yaml(source, args.out).encode())
        print(
            f"{args.out / STEP_FOLDER}: {parameter_count(source.model):,} parameters, {manifest.total_bytes:,} bytes, "
            f"from {source.dialect.kind} in {args.path}"
        )
    print(
        f"to train on: gptdist data build SOURCE --out CORPUS --tokenizer {args.out / TOKENIZER_FILE}, then "
        f"gptdist train {args.out / 'config.yaml'} data.corpus=CORPUS"
    )
    return EXIT_DONE


def _tokenizer(folder: Path, given: str | None, source: HuggingFaceSource) -> CorpusTokenizer:
    """The folder's, or the one given. Raises CorpusError or ExchangeError."""
    if given == BYTES:
        tokenizer = CorpusTokenizer.of_bytes()
    else:
        path = folder / TOKENIZER if given is None else Path(given)
        path = path / TOKENIZER if path.is_dir() else path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CorpusError(
                f"{path} cannot be read ({error.strerror}), so nothing says what the model's ids mean. Name the "
                "model's tokenizer.json with --tokenizer FILE. A folder with vocab.json and merges.txt alone becomes "
                "one with tokenizer.json when transformers saves its tokenizer again."
            ) from None
        ending = source.config.get("eos_token_id")
        if isinstance(ending, list):  # a chat model's: the first is what ends a text
            ending = ending[0] if ending else None
        if (path.parent / TOKENIZER_CONFIG).is_file() and not isinstance(ending, int):
            tokenizer = CorpusTokenizer.load(path)
        else:
            tokenizer = imported_tokenizer(content, str(path), ending if isinstance(ending, int) else None)
    if tokenizer.vocab_size > source.model.vocab_size:
        raise ExchangeError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, and the model knows {source.model.vocab_size}. "
            "It is another model's: name the right one with --tokenizer FILE."
        )
    return tokenizer


def _state(source: HuggingFaceSource, tokenizer: CorpusTokenizer, out: Path) -> dict[str, Any]:
    """Run state of step 0: a model and its tokenizer, no data and no optimizer."""
    config = RunConfig(model=source.model, launch=LaunchConfig(run_dir=str(out)))
    return {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "loss": None,
        "skipped_in_a_row": 0,
        "skipped_total": 0,
        "layout": "imported",
        "data": {"tokenizer": tokenizer.sha256, "end_of_text": tokenizer.end_of_text},
        "config": resolved_dict(config),
        "versions": versions_of("gptdist"),
        "imported_from": {
            "folder": source.path.absolute().name,
            "model_type": source.dialect.kind,
            "config_sha256": hashlib.sha256((source.path / CONFIG).read_bytes()).hexdigest(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def _config_yaml(source: HuggingFaceSource, out: Path) -> str:
    """A config that begins a run with the imported weights."""
    model = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in source.model.model_dump(mode="json").items())
    return (
        f"# Begins a run with the weights of a {source.dialect.kind}. Set data.corpus to a corpus of its tokenizer,\n"
        "# and the sections optimizer, schedule and train as for any run.\n"
        f"model:\n{model}\n"
        f"checkpoint:\n  start_from: {json.dumps(str((out / STEP_FOLDER).absolute()))}\n\n"
        f"launch:\n  run_dir: {json.dumps(str(out.absolute()) + '-trained')}\n"
    )
