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

from gptdist.model.key_values import Continuation


class CausalAttention(nn.Module):
    """Grouped-query causal attention without parameters.

    `dropout_stream`: gives the context in which a tensor rank draws its own dropout; each rank holds other heads.
    `layer_number`: under which the keys and values of a text that is read bit by bit are kept.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int = 0,
        *,
        dropout_stream: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.dropout = float(config.attention_dropout)
        # Inside a sequence-parallel block the rank's own stream is already in force.
        self.dropout_stream = nullcontext if config.sequence_parallel else dropout_stream

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        document_lengths: Tensor | Continuation | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv heads, d] -> [s, b, heads * d].

        `document_lengths` (on the CPU, see `documents.py`): attention stays within each document. It stands where
        Megatron's layers hand on a mask, also to what is recomputed. Each document is a call of its own: no s x s mask
        is made, and attention costs the squares of the documents' lengths, not the window's. A GPU starts a kernel for
        every document, so many short ones leave it waiting.

        A `Continuation` in that place: these are the next tokens of texts whose earlier keys and values it holds.
        """
        if isinstance(document_lengths, Continuation):
            continuation = document_lengths
            keys, values = continuation.past.append(self.layer_number, key, value)
            if continuation.past.length:
                return _attend_to_past(query, keys, values, continuation.visible)
            document_lengths = continuation.document_lengths
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


def _attend_to_past(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """query [s, b, heads, d] of the last s tokens; keys and values [b, kv heads, length, d] -> [s, b, heads * d]."""
    context = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3), keys, values, attn_mask=visible, enable_gqa=query.shape[2] != keys.shape[1]
    )
    return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
