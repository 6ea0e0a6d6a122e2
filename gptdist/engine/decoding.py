"""Texts that grow token by token, at the cost of the new tokens only where the layout allows.

Knows when the network may go on from what it remembers and when the window must be computed anew. Draws nothing.
"""

import torch
from torch import Tensor

from gptdist.engine.engine import InferenceEngine
from gptdist.model.key_values import KeyValues


class Decoding:
    """A batch of texts of one length. Every rank must make the same calls.

    Computed anew for every token: texts longer than the model's context, of which the last `sequence_length` tokens
    count, with positions from 0, so that no key is as it was; and layouts with a pipeline or with sequence parallelism.
    """

    def __init__(self, engine: InferenceEngine, remember: bool = True) -> None:
        """`remember` False: compute everything anew, always."""
        self._engine = engine
        self._tokens: Tensor | None = None
        self._past = KeyValues() if remember and engine.network.can_remember else None

    def read(self, tokens: Tensor) -> Tensor:
        """Append `tokens` [texts, count] int64 to the texts; logits after the last: fp32 [texts, vocab_size], CPU."""
        self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens], dim=1)
        context = self._engine.model.sequence_length
        if self._tokens.shape[1] > context:
            self._past = None
        if self._past is not None:
            return self._engine.network.continue_texts(self._tokens, self._past).cpu()
        return self._engine.logits(self._tokens[:, -context:])[:, -1]

    def select(self, rows: Tensor) -> None:
        """Go on with texts `rows` of those there are; one may be taken several times."""
        if self._tokens is not None:
            self._tokens = self._tokens[rows]
        if self._past is not None:
            self._past.select(rows)
