"""Held-out loss under any layout, as the three numbers people compare. Knows the engine's seam and the readers."""

import math
from collections.abc import Mapping

from gptdist.data.loader import held_out_batches
from gptdist.data.reader import TokenReader
from gptdist.engine.engine import InferenceEngine


def held_out_values(
    engine: InferenceEngine, reader: TokenReader, samples: int, micro_batch_size: int
) -> dict[str, float]:
    """`eval/loss` (nats per token), `eval/perplexity` and `eval/bits_per_byte` over `samples` windows of `reader`'s
    split.

    Bits per byte compares tokenizers: loss / ln 2, times the split's tokens per byte of text.
    """
    groups = engine.groups
    batches = held_out_batches(
        reader, engine.model.sequence_length, samples, micro_batch_size, groups.data_rank, engine.layout.data
    )
    loss = engine.evaluate(batches).loss
    split = reader.manifest.split(reader.split)
    return _values(loss, loss / math.log(2) * split.tokens / max(split.text_bytes, 1))


def blend_values(by_corpus: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]) -> dict[str, float]:
    """The values of several corpora, by their names in metrics, as those of one run.

    `eval/loss/NAME` of each; `eval/loss` and `eval/bits_per_byte` are means by the shares of the blend now in force
    among the corpora that have held-out text, and `eval/perplexity` is that of the mean loss. Without any such corpus
    the three are left out.
    """
    values = {f"eval/loss/{name}": own["eval/loss"] for name, own in by_corpus.items()}
    total = sum(shares[name] for name in by_corpus)
    if total:
        loss, bits = (
            sum(shares[name] * own[key] for name, own in by_corpus.items()) / total
            for key in ("eval/loss", "eval/bits_per_byte")
        )
        values |= _values(loss, bits)
    return values


def _values(loss: float, bits_per_byte: float) -> dict[str, float]:
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": bits_per_byte,
    }
