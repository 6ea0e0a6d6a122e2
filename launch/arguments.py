"""The grammar of the `gptdist` command: subcommands, options, and what to answer when one is misspelt.

Imports nothing heavy, so that `gptdist --help` and mistakes answer at once. What a subcommand does is `cli.py`'s.
"""

import argparse
import difflib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gptdist.config.units import parse_bytes

EPILOG = """exit codes: 0 done, 1 failed, 2 a mistake to mend, 75 stopped early and resumable, 93 do not requeue
Under torchrun, srun or mpirun, `gptdist train` is one rank. GPTDIST_DEBUG=1 shows tracebacks."""


class Parser(argparse.ArgumentParser):
    """argparse, with the nearest valid word for a misspelt subcommand or option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **kwargs)
        self.subcommands: list[str] = []

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong and wrong.group(1) not in self.subcommands and self.subcommands:
            message = f"there is no command `{self.prog} {wrong.group(1)}`.{_nearest(wrong.group(1), self.subcommands)}"
            message += f" Commands: {', '.join(self.subcommands)}."
        print(f"error: {message}\n\n{self.format_usage().rstrip()}", file=sys.stderr)
        sys.exit(2)

    def reject(self, unknown: Sequence[str]) -> NoReturn:
        """End with an error about arguments this command does not know."""
        options = [option for action in self._actions for option in action.option_strings]
        hints = "".join(_nearest(word.partition("=")[0], options) for word in unknown if word.startswith("-"))
        self.error(f"`{self.prog}` does not know {' '.join(unknown)}.{hints}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; `command` says which it is. Exits 2 with one error where it cannot be read."""
    parsed, rest = build_parser().parse_known_args(argv)
    if parsed.command in ("train", "data order"):
        # argparse gives up on positional arguments once options follow them.
        parsed.overrides = [*parsed.overrides, *(word for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parsed.parser.reject(rest)
    return parsed


def build_parser() -> Parser:
    """The whole command."""
    parser = Parser(prog="gptdist", description="Pretrain GPT models from raw text, on any layout.", epilog=EPILOG)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="first_word")
    _add_train(parser, commands)
    _add_data(parser, commands)
    _add_generate(parser, commands)
    _add_serve(parser, commands)
    _add_eval(parser, commands)
    _add_export(parser, commands)
    _add_import(parser, commands)
    _add_ckpt(parser, commands)
    _add_drill(parser, commands)
    _add(parser, commands, "doctor", "what this machine has, and what that means for training")
    return parser


def _add_train(parser: Parser, commands: Any) -> None:
    train = _add(parser, commands, "train", "train, or resume, the run that CONFIG describes")
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/runs/quickstart.yaml")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that override the file's"
    )
    train.add_argument("--nproc", type=_positive, metavar="N", help="start N ranks on this machine (default: 1)")
    train.add_argument("--fresh", action="store_true", help="ignore checkpoints of an earlier run")
    train.add_argument("--print-config", action="store_true", help="show every setting and its origin, and stop")


def _add_data(parser: Parser, commands: Any) -> None:
    data = _add(parser, commands, "data", "corpora: build, verify, show, order")
    subcommands = data.add_subparsers(metavar="COMMAND", required=True, dest="second_word")
    _add_data_build(_add(data, subcommands, "build", "make a corpus of token shards from text"))
    for name, what, where in (
        ("verify", "check every byte of a corpus", "folder or URL"),
        ("index", "make manifest and index of a corpus anew from its tars", "folder"),
    ):
        reading = _add(data, subcommands, name, what)
        reading.add_argument("corpus", type=_corpus, metavar="CORPUS", help=where)
        reading.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one a core)")
    show = _add(data, subcommands, "show", "totals, tokenizer and pieces of text")
    show.add_argument("corpus", type=_corpus, metavar="CORPUS", help="folder or URL")
    show.add_argument("--split", default="train", metavar="NAME", help="whose text to show (default: train)")
    show.add_argument("--samples", type=_positive, default=1, metavar="N", help="documents to show (default: 1)")
    _add_data_order(data, subcommands)


def _add_data_build(build: Parser) -> None:
    build.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="files, folders, globs or URLs: text, .jsonl, .parquet, .arrow, .tar",
    )
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="the corpus; must not exist yet")
    build.add_argument(
        "--tokenizer", required=True, metavar="SPEC", help="bytes, train:SIZE, tiktoken:NAME, or a HF tokenizer.json"
    )
    build.add_argument("--end-of-text", metavar="TOKEN", help="the tokenizer's token that ends a document")
    build.add_argument("--no-fast", action="store_true", help="use the reference tokenizer even where gigatoken agrees")
    reading = build.add_argument_group("which text")
    reading.add_argument(
        "--text-field",
        action="append",
        metavar="[GLOB=]FIELD",
        help="field of a record that holds the text, or a template '{title}\\n\\n{text}'; repeatable (default: text)",
    )
    reading.add_argument(
        "--max-bytes", type=_bytes, metavar="SIZE", help="take a sample of at most this much text: 50MB"
    )
    reading.add_argument(
        "--suffixes", type=_words, metavar=".A,.B", help="files to take from folders (default: .txt,.py,...)"
    )
    reading.add_argument("--exclude", type=_words, metavar="A,B", help="names of folders to pass over")
    reading.add_argument("--on-bad-text", choices=("error", "skip"), help="a text that is not UTF-8 (default: error)")
    stages = build.add_argument_group("what is done to it")
    stages.add_argument("--normalize", choices=("none", "nfc", "nfkc"), help="Unicode normal form (default: none)")
    stages.add_argument("--min-document-bytes", type=_bytes, metavar="SIZE", help="drop shorter documents")
    stages.add_argument("--max-document-bytes", type=_bytes, metavar="SIZE", help="drop longer documents")
    stages.add_argument("--dedup", choices=("none", "exact", "near"), help="drop duplicates; near: exact ones too")
    stages.add_argument(
        "--near-threshold", type=float, metavar="S", help="similarity of near duplicates (default: 0.8)"
    )
    stages.add_argument(
        "--decontaminate",
        action="append",
        metavar="SOURCE",
        help="evaluation text to cut out of the corpus; repeatable",
    )
    stages.add_argument("--validation", action="append", metavar="SOURCE", help="held-out text; repeatable")
    stages.add_argument(
        "--validation-fraction", type=float, metavar="F", help="documents held out otherwise (default: 0.05)"
    )
    stages.add_argument("--seed", type=int, metavar="N", help="key of the order of documents (default: 1234)")
    stages.add_argument("--chunk-tokens", type=_positive, metavar="N", help="tokens in one sample of a shard")
    stages.add_argument("--shard-bytes", type=_bytes, metavar="SIZE", help="size of one shard (default: 128MiB)")
    work = build.add_argument_group("who does it")
    work.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one a core)")
    work.add_argument(
        "--piece-bytes", type=_bytes, metavar="SIZE", help="text a worker reads at a time (default: 32MiB to 256MiB)"
    )
    work.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="be part I (from 0) of N on a shared disk (default: the Slurm array's)",
    )


def _add_data_order(data: Parser, subcommands: Any) -> None:
    order = _add(data, subcommands, "order", "which documents a step trains on, which steps saw a document; a proof")
    order.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    order.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that override the file's"
    )
    question = order.add_mutually_exclusive_group(required=True)
    question.add_argument("--step", type=_positive, metavar="S", help="the documents that step S trains on")
    question.add_argument("--document", metavar="KEY", help="the steps that train on this document")
    question.add_argument("--check", action="store_true", help="prove over a whole epoch: each window exactly once")
    order.add_argument("--epoch", type=_from_zero, metavar="E", help="epoch to check (default: 0, the first)")


def _add_generate(parser: Parser, commands: Any) -> None:
    generate = _add(parser, commands, "generate", "continue a prompt with a trained model")
    _add_model(generate)
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; - reads standard input")
    generate.add_argument("--tokens", type=_positive, default=64, metavar="N", help="tokens to add (default: 64)")
    generate.add_argument("--tensor", type=_positive, default=1, metavar="N", help="split the model over N ranks here")
    drawing = generate.add_argument_group("drawing")
    drawing.add_argument("--temperature", type=_temperature, metavar="T", help="0: likeliest (default: 0.8)")
    drawing.add_argument("--top-k", type=_positive, metavar="K", help="draw from the K likeliest tokens only")
    drawing.add_argument(
        "--top-p", type=_top_p, metavar="P", help="and from the likeliest that together have probability P"
    )
    drawing.add_argument("--seed", type=int, default=1234, metavar="N", help="key of the draws (default: 1234)")
    searching = generate.add_argument_group("searching instead")
    searching.add_argument("--beams", type=_positive, default=1, metavar="N", help="follow the N likeliest texts")
    searching.add_argument(
        "--length-penalty",
        type=_temperature,
        default=1.0,
        metavar="A",
        help="score: log-probability / tokens ** A (default: 1)",
    )
    searching.add_argument(
        "--no-repeat", type=_from_zero, default=0, metavar="N", help="no N tokens in a row twice (default: 0, allowed)"
    )


def _add_model(command: Parser) -> None:
    command.add_argument(
        "path",
        type=Path,
        metavar="MODEL",
        help="a run's folder, its checkpoints folder, one step-... folder, or a Hugging Face folder",
    )
    command.add_argument("--trust-others", action="store_true", help="also what other users own or may write")


def _add_serve(parser: Parser, commands: Any) -> None:
    serve = _add(parser, commands, "serve", "a small server of OpenAI's protocol, and a page, to try a model with")
    _add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8000, metavar="N", help="0: a free one (default: 8000)")
    serve.add_argument("--name", metavar="NAME", help="what clients call the model (default: its folder's name)")
    serve.add_argument("--api-key-file", type=Path, metavar="FILE", help="ask clients for the key in FILE")


def _add_eval(parser: Parser, commands: Any) -> None:
    evaluate = _add(parser, commands, "eval", "loss, perplexity and bits per byte on held-out text")
    evaluate.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN_DIR")
    evaluate.add_argument(
        "--corpus", type=_corpus, metavar="CORPUS", help="folder or URL (default: the one it was trained on)"
    )
    evaluate.add_argument("--samples", type=_positive, metavar="N", help="held-out windows (default: all)")


def _add_export(parser: Parser, commands: Any) -> None:
    export = _add(
        parser, commands, "export", "a checkpoint as a folder that other tools load, proven to compute the same"
    )
    export.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN_DIR")
    export.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder, new or empty; of gguf the file, new"
    )
    export.add_argument(
        "--format",
        choices=("hf", "gguf"),
        default="hf",
        help="hf: a folder as Hugging Face's (default); gguf: a file for llama.cpp",
    )
    export.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "q8_0"),
        default="fp32",
        help="of the weights (default: fp32); q8_0, of gguf alone: 8 bits, the perplexity measured",
    )
    export.add_argument(
        "--corpus", type=_corpus, metavar="CORPUS", help="q8_0: held-out text to measure on (default: the run's)"
    )
    export.add_argument(
        "--samples", type=_positive, metavar="N", help="q8_0: held-out windows (default: train.eval_samples)"
    )
    export.add_argument(
        "--max-shard-size", type=_bytes, default=5_000_000_000, metavar="SIZE", help="of one file (default: 5GB)"
    )
    export.add_argument("--trust-others", action="store_true", help="also take what other users own or may write")
    export.add_argument(
        "--no-proof", dest="proof", action="store_false", help="do not run probe tokens through both models"
    )


def _add_import(parser: Parser, commands: Any) -> None:
    importing = _add(parser, commands, "import", "a Hugging Face model's folder as a run's first checkpoint")
    importing.add_argument("path", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    importing.add_argument("--out", type=Path, required=True, metavar="RUN_DIR", help="must not exist, or be empty")
    importing.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json or `bytes`, where the folder has none, or not the right one"
    )
    importing.add_argument(
        "--sequence-length", type=_positive, metavar="N", help="a shorter context than the model's (default: all of it)"
    )


def _add_ckpt(parser: Parser, commands: Any) -> None:
    checkpoints = _add(parser, commands, "ckpt", "checkpoints: list, verify, diff, reshard, average, copy")
    subcommands = checkpoints.add_subparsers(metavar="COMMAND", required=True, dest="second_word")
    listing = _add(checkpoints, subcommands, "list", "the checkpoints, one a line")
    listing.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINTS_DIR")
    verify = _add(checkpoints, subcommands, "verify", "check every byte of a checkpoint, or of all in a folder")
    verify.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN_DIR")
    diff = _add(checkpoints, subcommands, "diff", "which tensors and run state differ; exit 1 where any do")
    diff.add_argument("one", type=Path, metavar="A", help="checkpoint, or a folder whose newest is meant")
    diff.add_argument("other", type=Path, metavar="B")
    diff.add_argument("--all", action="store_true", help="every tensor, not the most different alone")
    reshard = _add(checkpoints, subcommands, "reshard", "write a checkpoint anew as N files of equal size")
    reshard.add_argument("source", type=Path, metavar="SRC", help="checkpoint, or a folder whose newest is meant")
    reshard.add_argument("destination", type=Path, metavar="DST", help="the new checkpoint; must not exist yet")
    reshard.add_argument("--ranks", type=_positive, required=True, metavar="N", help="how many files")
    average = _add(checkpoints, subcommands, "average", "the mean of the weights of checkpoints of one model")
    average.add_argument("sources", nargs="+", type=Path, metavar="CHECKPOINT")
    average.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new one; must not exist yet")
    copying = _add(checkpoints, subcommands, "copy", "copy a checkpoint between folders and URLs, verified on the way")
    copying.add_argument("source", metavar="SRC", help="checkpoint, a folder whose newest is meant, or a URL")
    copying.add_argument(
        "destination", metavar="DST", help="the new checkpoint, or its URL; a folder must not exist yet"
    )
    for command in (listing, verify, diff, reshard, average, copying):
        command.add_argument("--trust-others", action="store_true", help="also take what other users own or may write")


def _add_drill(parser: Parser, commands: Any) -> None:
    drill = _add(parser, commands, "drill", "faults on purpose, and what came of them: checkpoint")
    checkpoint = _add(
        drill,
        drill.add_subparsers(metavar="COMMAND", required=True, dest="second_word"),
        "checkpoint",
        "kill, starve and damage saves and checkpoints",
    )
    checkpoint.add_argument("--ranks", type=_positive, default=2, metavar="N", help="ranks that save (default: 2)")
    checkpoint.add_argument("--kills", type=_positive, default=100, metavar="N", help="kills at random moments")
    checkpoint.add_argument("--flips", type=_positive, default=200, metavar="N", help="flipped bits")
    checkpoint.add_argument("--truncations", type=_positive, default=60, metavar="N", help="truncated files")
    checkpoint.add_argument("--seed", type=int, default=1234, metavar="N", help="of moments and places")
    checkpoint.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where (default: temporary)"
    )
    checkpoint.add_argument("--out", type=Path, metavar="FILE", help="also write the certificate as JSON")


def _add(parent: Parser, commands: Any, name: str, summary: str) -> Parser:
    parent.subcommands.append(name)
    added: Parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    words = [parent.get_default("command"), name] if parent.get_default("command") else [name]
    added.set_defaults(command=" ".join(words), parser=added)
    return added


def _nearest(word: str, words: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {found[0]}?" if found else ""


def _typed(parse: Callable[[str], Any], text: str, accepts: Callable[[Any], bool], rule: str) -> Any:
    try:
        value = parse(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return value


def _positive(text: str) -> int:
    return int(_typed(int, text, lambda value: value >= 1, "must be a whole number of at least 1"))


def _from_zero(text: str) -> int:
    return int(_typed(int, text, lambda value: value >= 0, "must be a whole number of at least 0"))


def _temperature(text: str) -> float:
    return float(_typed(float, text, lambda value: 0 <= value < float("inf"), "must be a number of at least 0"))


def _top_p(text: str) -> float:
    return float(_typed(float, text, lambda value: 0 < value <= 1, "must be a number above 0 and at most 1"))


def _port(text: str) -> int:
    return int(_typed(int, text, lambda value: 0 <= value <= 65535, "must be a port, 0 to 65535"))


def _corpus(text: str) -> Path | str:
    return text if "://" in text else Path(text)


def _bytes(text: str) -> int:
    rule = "must be a size such as 5000000, 50MB or 2GiB"
    return int(_typed(lambda word: int(word) if word.isdecimal() else parse_bytes(word), text, lambda n: n > 0, rule))


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a part and how many there are, such as 0/8 to 7/8")
    return int(part), int(parts)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
