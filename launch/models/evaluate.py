"""`gptdist eval`: a trained model's loss, perplexity and bits per byte on held-out text."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from gptdist.data.corpora import open_corpora, open_stores
from gptdist.data.reader import TokenReader
from gptdist.errors import EXIT_DONE, CorpusError
from gptdist.train.evaluate import held_out_values
from launch.models.trained import Trained, open_trained


def main(args: argparse.Namespace) -> int:
    """Print a line of figures for each corpus."""
    with open_trained(args.path, trust_others=args.trust_others) as trained, ExitStack() as closing:
        length = trained.config.model.sequence_length
        for reader in open_validation(trained, args.corpus, closing):
            windows = reader.num_windows(length)
            samples = min(args.samples or windows, windows)
            values = held_out_values(trained.engine, reader, samples, trained.config.train.micro_batch_size)
            print(
                f"{trained.path} on {reader.corpus}: loss {values['eval/loss']:.4f} nats per token, "
                f"perplexity {values['eval/perplexity']:.2f}, {values['eval/bits_per_byte']:.4f} bits per byte "
                f"({samples} of {windows} held-out windows)",
                flush=True,
            )
    return EXIT_DONE


def open_validation(trained: Trained, corpus: Path | str | None, closing: ExitStack) -> list[TokenReader]:
    """The corpus given, else those of the run that have held-out text enough; at least one."""
    data = trained.config.data
    if corpus:
        data = data.model_copy(update={"corpus": str(corpus), "blend": None, "phases": ()})
    stores = open_stores(data)
    for store in stores.values():
        closing.callback(store.close)
    readers = list(open_corpora(data, "validation", stores).values())
    for reader in readers:
        if reader.manifest.tokenizer.sha256 != trained.tokenizer.sha256:
            raise CorpusError(
                f"{reader.corpus} was built with another tokenizer (sha256 {reader.manifest.tokenizer.sha256[:12]}...) "
                f"than the one {trained.path} was trained with ({trained.tokenizer.sha256[:12]}...). Build it with "
                "--tokenizer and the tokenizer.json of the model's folder."
            )
    length = trained.config.model.sequence_length
    usable = [reader for reader in readers if reader.num_tokens > length]
    if not usable and readers:
        readers[0].num_windows(length)  # raises, with how many tokens there are
    if not usable:
        raise CorpusError("None of the run's corpora has a validation split. Give one that has, with --corpus.")
    return usable
