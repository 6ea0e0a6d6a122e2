"""`make quickstart`: the main job from text to text on this machine, through the same commands a user types.

Builds a corpus, trains on two ranks, stops half-way, resumes under another layout, evaluates, generates, and fails
unless the model learned. Knows only the commands and the files they leave; runs on the CPU, so that it is the same
everywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from gptdist.config.load import load_run
from gptdist.config.sections import RunConfig
from gptdist.data.corpora import corpus_names
from gptdist.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE
from gptdist.monitor.console import render_count, render_duration

CONFIG = Path("configs/runs/quickstart.yaml")
MAX_TEXT = "16MB"
PROMPT = "def "
LEARNED = 0.8
"""Held-out loss must end below this share of the unigram entropy: far under what counting tokens alone can reach."""


class QuickstartFailed(Exception):
    """A command ended otherwise than it should have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages; the exit code says whether the model learned."""
    parser = argparse.ArgumentParser(description="Corpus, training, resume, evaluation and text, in minutes.")
    parser.add_argument("--corpus", type=Path, nargs="*", help="text of your own (default: Python's standard library)")
    # An empty CORPUS= in the Makefile arrives as an empty path.
    given = [path for path in parser.parse_args(argv).corpus or [] if str(path) not in ("", ".")]
    started = time.monotonic()
    config = load_run(CONFIG).config
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        entropy = build_corpus(config, given or [Path(sysconfig.get_paths()["stdlib"])])
        metrics = Path(config.launch.run_dir) / "metrics.jsonl"
        already = metrics.stat().st_size if metrics.exists() else 0
        half = config.train.steps // 2
        heading(2, f"train on two ranks, data parallel, and stop at step {half} of {config.train.steps}")
        gptdist("train", CONFIG, "--nproc", 2, "--fresh", f"train.stop_after={half}", expect=EXIT_RESUMABLE)
        heading(3, "resume from that checkpoint with the model split over the two ranks, tensor parallel")
        gptdist("train", CONFIG, "--nproc", 2, "parallel.tensor=2")
        heading(4, "evaluate the last checkpoint on held-out documents")
        gptdist("eval", config.launch.run_dir, "--samples", config.train.eval_samples)
        heading(5, "generate text")
        gptdist("generate", config.launch.run_dir, "--prompt", PROMPT, "--tokens", 60)
        return summarize(config, entropy, read_metrics(metrics, already), time.monotonic() - started)
    except QuickstartFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return EXIT_FAILED


def build_corpus(config: RunConfig, sources: Sequence[Path]) -> float:
    """Make the corpus unless it is there; returns the unigram entropy of its tokens, nats."""
    from data_tools.corpus.show import unigram_entropy

    heading(1, f"make a corpus from {', '.join(map(str, sources))}")
    out = Path(corpus_names(config.data)[0])
    if (out / "manifest.json").exists():
        print(f"{out} is there already; remove it to build it again")
        gptdist("data", "show", out)
    else:
        exclude = ("--exclude", "site-packages,test,tests,idlelib,__pycache__")
        gptdist(
            *("data", "build", *sources, "--out", out, "--tokenizer", f"train:{config.model.vocab_size}"),
            *("--max-bytes", MAX_TEXT, "--on-bad-text", "skip", *exclude),
        )
    return unigram_entropy(out, "train")


def gptdist(*words: object, expect: int = EXIT_DONE) -> None:
    """Show and run one command. Raises QuickstartFailed where it ends otherwise than expected."""
    shown = " ".join(str(word) for word in words)
    print(f"$ gptdist {shown}", flush=True)
    code = subprocess.run([sys.executable, "-m", "launch.cli", *map(str, words)], check=False).returncode
    if code != expect:
        raise QuickstartFailed(f"`gptdist {shown}` ended with exit code {code}, not {expect}; its message is above.")


def heading(number: int, what: str) -> None:
    """Announce a stage."""
    print(f"\n[{number}/5] {what}", flush=True)


def read_metrics(path: Path, offset: int) -> list[dict[str, float]]:
    """The records written since the file was `offset` bytes long."""
    with path.open() as lines:
        lines.seek(offset)
        return [json.loads(line) for line in lines]


def summarize(config: RunConfig, entropy: float, records: list[dict[str, float]], seconds: float) -> int:
    """Print what was reached and what to try next; the exit code says whether held-out loss fell below the bound."""
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    speeds = sorted(record["speed/tokens_per_second"] for record in records if "speed/tokens_per_second" in record)
    bound = LEARNED * entropy
    learned = losses[-1] < bound
    run_dir = config.launch.run_dir
    verdict = "below" if learned else "NOT below"
    print(
        f"\nheld-out loss   {losses[0]:.3f} -> {losses[-1]:.3f} nats per token, {verdict} the bound {bound:.3f}"
        f"\nunigram entropy {entropy:.3f} nats: the best that counting tokens alone can do; the bound is {LEARNED:g} "
        "of it"
        f"\nspeed           {render_count(speeds[len(speeds) // 2])} tokens/s (median of the log lines)"
        f"\ncheckpoint      {run_dir}/checkpoints/step-{config.train.steps:08d}"
        f"\nTensorBoard     {run_dir}/tensorboard"
        f"\ntime            {render_duration(seconds)}"
        f"\n\nTry next:"
        f"\n  .venv/bin/tensorboard --logdir {run_dir}/tensorboard"
        f'\n  .venv/bin/gptdist generate {run_dir} --prompt "import " --tokens 100'
        f"\n  .venv/bin/gptdist train {CONFIG} --nproc 2 train.steps={2 * config.train.steps} parallel.pipeline=2",
        flush=True,
    )
    if not learned:
        print("error: the model did not learn: see the held-out loss above", file=sys.stderr)
    return EXIT_DONE if learned else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
