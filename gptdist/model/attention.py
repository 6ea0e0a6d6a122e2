"""Causal attention by torch's scaled_dot_product_attention, in the shape Megatron's layers call it.

Pure torch: flash kernels on a GPU, a blocked kernel on a CPU, never the whole s x s matrix. What differs between tensor
ranks (the dropout stream) comes in as a context, so nothing here knows of groups.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv heads, d] -> [s, b, heads * d]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with self.dropout_stream() if dropout else nullcontext():
            context = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )
        sequence, batch = context.shape[2], context.shape[0]
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
