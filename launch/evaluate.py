"""`gptdist eval`: a trained model's loss, perplexity and bits per byte on held-out text."""

import argparse
from pathlib import Path

from gptdist.data.reader import TokenReader
from gptdist.errors import EXIT_DONE, CorpusError
from gptdist.train.evaluate import held_out_values
from launch.trained import Trained, open_trained


def main(args: argparse.Namespace) -> int:
    """Print one line of figures."""
    with open_trained(args.path) as trained:
        reader = _open_validation(trained, args.corpus)
        windows = reader.num_windows(trained.config.model.sequence_length)
        samples = min(args.samples or windows, windows)
        values = held_out_values(trained.engine, reader, samples, trained.config.train.micro_batch_size)
        print(
            f"{trained.path} on {reader.corpus}: loss {values['eval/loss']:.4f} nats per token, "
            f"perplexity {values['eval/perplexity']:.2f}, {values['eval/bits_per_byte']:.4f} bits per byte "
            f"({samples} of {windows} held-out windows)",
            flush=True,
        )
    return EXIT_DONE


def _open_validation(trained: Trained, corpus: Path | None) -> TokenReader:
    reader = TokenReader(corpus or Path(trained.config.data.corpus), "validation")
    if reader.manifest.tokenizer.sha256 != trained.tokenizer.sha256:
        raise CorpusError(
            f"{reader.corpus} was built with another tokenizer (sha256 {reader.manifest.tokenizer.sha256[:12]}...) "
            f"than the one {trained.path} was trained with ({trained.tokenizer.sha256[:12]}...). Build it with "
            f"--tokenizer {trained.path.parent.parent / 'tokenizer.json'}."
        )
    return reader
