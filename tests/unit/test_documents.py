"""Documents in windows, against counting one by one; attention that stays in them, against an explicit mask."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptdist.model.attention import CausalAttention
from gptdist.model.documents import document_lengths, positions_in_documents

END = 3

windows = st.integers(1, 20).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, END), min_size=length, max_size=length), min_size=1, max_size=4)
)


@given(windows)
def test_positions_and_lengths_are_what_counting_gives(ids: list[list[int]]) -> None:
    tokens = torch.tensor(ids)
    before = tokens.clone()
    positions: list[list[int]] = []
    lengths: list[int] = []
    for row in ids:
        positions.append([])
        for place, token in enumerate(row):
            fresh = place == 0 or row[place - 1] == END
            positions[-1].append(0 if fresh else positions[-1][-1] + 1)
            if token == END or place == len(row) - 1:
                lengths.append(positions[-1][-1] + 1)
    assert positions_in_documents(tokens, END).tolist() == positions
    found = document_lengths(tokens, END)
    assert (None if len(lengths) == len(ids) else lengths) == (None if found is None else found.tolist())
    assert torch.equal(tokens, before), "the tokens are the caller's"


def test_an_end_at_the_windows_edge_divides_nothing() -> None:
    assert document_lengths(torch.tensor([[1, 2, END], [1, 1, 2]]), END) is None
    assert document_lengths(torch.tensor([[END, 2, 1], [1, 1, 2]]), END).tolist() == [1, 2, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize("kv_heads", (4, 2, 1))
@settings(max_examples=25, deadline=None)
@given(windows, st.integers(0, 1000))
def test_attention_in_documents_equals_an_explicit_mask(kv_heads: int, ids: list[list[int]], seed: int) -> None:
    """Values and gradients."""
    tokens = torch.tensor(ids)
    batch, sequence = tokens.shape
    generator = torch.Generator().manual_seed(seed)
    qkv = [
        torch.randn(sequence, batch, heads, 8, generator=generator, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    starts = torch.arange(sequence) - positions_in_documents(tokens, END)
    seen = torch.arange(sequence)
    mask = (seen <= seen[:, None]) & (seen >= starts[:, :, None])
    weights = torch.randn(sequence, batch, 32, generator=generator)

    def values_and_gradients(context: Tensor) -> list[Tensor]:
        return [context, *torch.autograd.grad((context * weights).sum(), qkv)]

    attention = CausalAttention(SimpleNamespace(attention_dropout=0.0, sequence_parallel=False))
    ours = values_and_gradients(attention(*qkv, document_lengths(tokens, END)))
    by_head = [tensor.permute(1, 2, 0, 3).repeat_interleave(4 // tensor.shape[2], 1) for tensor in qkv]
    expected = values_and_gradients(
        F.scaled_dot_product_attention(*by_head, attn_mask=mask[:, None]).permute(2, 0, 1, 3).flatten(2)
    )
    assert ours[0].is_contiguous()
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
