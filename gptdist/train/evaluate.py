"""Held-out loss under any layout, as the three numbers people compare. Knows the engine's seam and the reader."""

import math

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
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": loss / math.log(2) * split.tokens / max(split.text_bytes, 1),
    }
