"""The grammar of `gptdist data ...`.

What the commands do is in `data.py`, `data_build.py` and `data_order.py`.
"""

from pathlib import Path
from typing import Any

from launch.arguments.parser import Parser, add_command, corpus, from_zero, part, positive, size_in_bytes, words


def add_data(parser: Parser, commands: Any) -> None:
    data = add_command(parser, commands, "data", "corpora: build, verify, show, order")
    subcommands = data.add_subparsers(metavar="COMMAND", required=True, dest="second_word")
    _add_data_build(add_command(data, subcommands, "build", "make a corpus of token shards from text"))
    for name, what, where in (
        ("verify", "check every byte of a corpus", "folder or URL"),
        ("index", "make manifest and index of a corpus anew from its tars", "folder"),
    ):
        reading = add_command(data, subcommands, name, what)
        reading.add_argument("corpus", type=corpus, metavar="CORPUS", help=where)
        reading.add_argument("--workers", type=positive, metavar="N", help="processes (default: one a core)")
    show = add_command(data, subcommands, "show", "totals, tokenizer and pieces of text")
    show.add_argument("corpus", type=corpus, metavar="CORPUS", help="folder or URL")
    show.add_argument("--split", default="train", metavar="NAME", help="whose text to show (default: train)")
    show.add_argument("--samples", type=positive, default=1, metavar="N", help="documents to show (default: 1)")
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
        "--max-bytes", type=size_in_bytes, metavar="SIZE", help="take a sample of at most this much text: 50MB"
    )
    reading.add_argument(
        "--suffixes", type=words, metavar=".A,.B", help="files to take from folders (default: .txt,.py,...)"
    )
    reading.add_argument("--exclude", type=words, metavar="A,B", help="names of folders to pass over")
    reading.add_argument("--on-bad-text", choices=("error", "skip"), help="a text that is not UTF-8 (default: error)")
    stages = build.add_argument_group("what is done to it")
    stages.add_argument("--normalize", choices=("none", "nfc", "nfkc"), help="Unicode normal form (default: none)")
    stages.add_argument("--min-document-bytes", type=size_in_bytes, metavar="SIZE", help="drop shorter documents")
    stages.add_argument("--max-document-bytes", type=size_in_bytes, metavar="SIZE", help="drop longer documents")
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
    stages.add_argument("--chunk-tokens", type=positive, metavar="N", help="tokens in one sample of a shard")
    stages.add_argument("--shard-bytes", type=size_in_bytes, metavar="SIZE", help="size of one shard (default: 128MiB)")
    work = build.add_argument_group("who does it")
    work.add_argument("--workers", type=positive, metavar="N", help="processes (default: one a core)")
    work.add_argument(
        "--piece-bytes",
        type=size_in_bytes,
        metavar="SIZE",
        help="text read at a time (default: 32MiB to 256MiB)",
    )
    work.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="be part I (from 0) of N on a shared disk (default: the Slurm array's)",
    )


def _add_data_order(data: Parser, subcommands: Any) -> None:
    order = add_command(data, subcommands, "order", "what a step trains on, which steps saw a document; a proof")
    order.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    order.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that override the file's"
    )
    question = order.add_mutually_exclusive_group(required=True)
    question.add_argument("--step", type=positive, metavar="S", help="the documents that step S trains on")
    question.add_argument("--document", metavar="KEY", help="the steps that train on this document")
    question.add_argument("--check", action="store_true", help="prove over a whole epoch: each window exactly once")
    order.add_argument("--epoch", type=from_zero, metavar="E", help="epoch to check (default: 0, the first)")
