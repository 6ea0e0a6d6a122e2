"""Causal attention by torch's scaled_dot_product_attention, in the shape Megatron's layers call it.

Pure torch: flash kernels on a GPU, a blocked kernel on a CPU, never the whole s x s matrix. What differs between tensor
ranks (the dropout stream) comes in as a context, so nothing here knows of groups.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Grouped-query causal attention without parameters.

    `dropout_stream`: gives the context in which a tensor rank draws its own dropout; each rank holds other heads.
    """

    def __init__(
        self, config: Any, *, dropout_stream: Callable[[], AbstractContextManager[Any]] = nullcontext, **_: Any
    ) -> None:
        super().__init__()
        self.dropout = float(config.attention_dropout)
        # Inside a sequence-parallel block the rank's own stream is already in force.
        self.dropout_stream = nullcontext if config.sequence_parallel else dropout_stream

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, document_lengths: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv heads, d] -> [s, b, heads * d].

        `document_lengths` (on the CPU, see `documents.py`): attention stays within each document. It stands where
        Megatron's layers hand on a mask, also to what is recomputed. Each document is a call of its own: no s x s mask
        is made, and attention costs the squares of the documents' lengths, not the window's. A GPU starts a kernel for
        every document, so many short ones leave it waiting.
        """
        dropout = self.dropout if self.training else 0.0
        with self.dropout_stream() if dropout else nullcontext():
            if document_lengths is None:
                context = _attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)), dropout=dropout)
                return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
            # One split, not a slice a document: the gradient of a slice is as large as what it was cut from.
            lengths = document_lengths.tolist()
            split = [tensor.transpose(0, 1).flatten(0, 1).split(lengths) for tensor in (query, key, value)]
            contexts = [
                _attend(*(tensor.transpose(0, 1)[None] for tensor in document), dropout=dropout)[0].transpose(0, 1)
                for document in zip(*split, strict=True)
            ]
        sequence, batch = query.shape[:2]
        return torch.cat(contexts).view(batch, sequence, -1).transpose(0, 1).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> Tensor:
    """query [b, heads, s, d], key and value [b, kv heads, s, d] -> as query."""
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
