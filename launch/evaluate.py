"""`gptdist eval`: a trained model's loss, perplexity and bits per byte on held-out text."""

import argparse
from pathlib import Path

from gptdist.config.sections import DataConfig
from gptdist.data.corpora import open_corpora
from gptdist.data.reader import TokenReader
from gptdist.errors import EXIT_DONE, CorpusError
from gptdist.train.evaluate import held_out_values
from launch.trained import Trained, open_trained


def main(args: argparse.Namespace) -> int:
    """Print a line of figures for each corpus."""
    with open_trained(args.path) as trained:
        length = trained.config.model.sequence_length
        for name, reader in _open_validation(trained, args.corpus).items():
            windows = reader.num_windows(length)
            samples = min(args.samples or windows, windows)
            values = held_out_values(trained.engine, reader, samples, trained.config.train.micro_batch_size)
            print(
                f"{trained.path} on {name}: loss {values['eval/loss']:.4f} nats per token, "
                f"perplexity {values['eval/perplexity']:.2f}, {values['eval/bits_per_byte']:.4f} bits per byte "
                f"({samples} of {windows} held-out windows)",
                flush=True,
            )
    return EXIT_DONE


def _open_validation(trained: Trained, corpus: Path | None) -> dict[str, TokenReader]:
    """The corpus given, else those of the run that have held-out text enough; at least one."""
    data = DataConfig(corpus=str(corpus)) if corpus else trained.config.data
    readers = open_corpora(data, "validation")
    for name, reader in readers.items():
        if reader.manifest.tokenizer.sha256 != trained.tokenizer.sha256:
            raise CorpusError(
                f"{name} was built with another tokenizer (sha256 {reader.manifest.tokenizer.sha256[:12]}...) "
                f"than the one {trained.path} was trained with ({trained.tokenizer.sha256[:12]}...). Build it with "
                f"--tokenizer {trained.path.parent.parent / 'tokenizer.json'}."
            )
    length = trained.config.model.sequence_length
    usable = {name: reader for name, reader in readers.items() if reader.num_tokens > length}
    if not usable and readers:
        next(iter(readers.values())).num_windows(length)  # raises, with how many tokens there are
    if not usable:
        raise CorpusError("None of the run's corpora has a validation split. Give one that has, with --corpus.")
    return usable
