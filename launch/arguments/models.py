"""The grammar of the commands that take a trained model: generate, serve, eval, export, import.

What each does is in the file of its name.
"""

from pathlib import Path
from typing import Any

from launch.arguments.parser import (
    Parser,
    add_command,
    corpus,
    from_zero,
    port,
    positive,
    size_in_bytes,
    temperature,
    top_p,
)


def add_generate(parser: Parser, commands: Any) -> None:
    generate = add_command(parser, commands, "generate", "continue a prompt with a trained model")
    _add_model(generate)
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; - reads standard input")
    generate.add_argument("--tokens", type=positive, default=64, metavar="N", help="tokens to add (default: 64)")
    generate.add_argument("--tensor", type=positive, default=1, metavar="N", help="split the model over N ranks here")
    drawing = generate.add_argument_group("drawing")
    drawing.add_argument("--temperature", type=temperature, metavar="T", help="0: likeliest (default: 0.8)")
    drawing.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens only")
    drawing.add_argument(
        "--top-p", type=top_p, metavar="P", help="and from the likeliest that together have probability P"
    )
    drawing.add_argument("--seed", type=int, default=1234, metavar="N", help="key of the draws (default: 1234)")
    searching = generate.add_argument_group("searching instead")
    searching.add_argument("--beams", type=positive, default=1, metavar="N", help="follow the N likeliest texts")
    searching.add_argument(
        "--length-penalty",
        type=temperature,
        default=1.0,
        metavar="A",
        help="score: log-probability / tokens ** A (default: 1)",
    )
    searching.add_argument(
        "--no-repeat", type=from_zero, default=0, metavar="N", help="no N tokens in a row twice (default: 0, allowed)"
    )


def _add_model(command: Parser) -> None:
    command.add_argument(
        "path",
        type=Path,
        metavar="MODEL",
        help="a run's folder, its checkpoints folder, one step-... folder, or a Hugging Face folder",
    )
    command.add_argument("--trust-others", action="store_true", help="also what other users own or may write")


def add_serve(parser: Parser, commands: Any) -> None:
    serve = add_command(parser, commands, "serve", "a small server of OpenAI's protocol, and a page, to try a model")
    _add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    serve.add_argument("--port", type=port, default=8000, metavar="N", help="0: a free one (default: 8000)")
    serve.add_argument("--name", metavar="NAME", help="what clients call the model (default: its folder's name)")
    serve.add_argument("--api-key-file", type=Path, metavar="FILE", help="ask clients for the key in FILE")


def add_eval(parser: Parser, commands: Any) -> None:
    evaluate = add_command(parser, commands, "eval", "loss, perplexity and bits per byte on held-out text")
    _add_model(evaluate)
    evaluate.add_argument(
        "--corpus", type=corpus, metavar="CORPUS", help="folder or URL (default: the one it was trained on)"
    )
    evaluate.add_argument("--samples", type=positive, metavar="N", help="held-out windows (default: all)")


def add_export(parser: Parser, commands: Any) -> None:
    export = add_command(
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
        "--corpus", type=corpus, metavar="CORPUS", help="q8_0: held-out text to measure on (default: the run's)"
    )
    export.add_argument(
        "--samples", type=positive, metavar="N", help="q8_0: held-out windows (default: train.eval_samples)"
    )
    export.add_argument(
        "--max-shard-size", type=size_in_bytes, default=5_000_000_000, metavar="SIZE", help="of one file (default: 5GB)"
    )
    export.add_argument("--trust-others", action="store_true", help="also take what other users own or may write")
    export.add_argument(
        "--no-proof", dest="proof", action="store_false", help="do not run probe tokens through both models"
    )


def add_import(parser: Parser, commands: Any) -> None:
    importing = add_command(parser, commands, "import", "a Hugging Face model's folder as a run's first checkpoint")
    importing.add_argument("path", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    importing.add_argument("--out", type=Path, required=True, metavar="RUN_DIR", help="must not exist, or be empty")
    importing.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json or `bytes`, where the folder has none, or not the right one"
    )
    importing.add_argument(
        "--sequence-length", type=positive, metavar="N", help="a shorter context than the model's (default: all of it)"
    )
