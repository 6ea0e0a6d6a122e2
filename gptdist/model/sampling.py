"""From logits to the next token: greedy, temperature, top-k, top-p, each draw keyed by seed and position.

Pure functions over one position's logits; knows no engine and no tokenizer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptdist.errors import GptdistError
from gptdist.model.initial import keyed_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0: always the likeliest (of equals, that of the smallest id)."""

    temperature: float = 0.8
    top_k: int | None = None  # of the likeliest tokens only; None: all
    top_p: float = 1.0  # of the likeliest tokens that together have at least this probability
    seed: int = 0


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a draw follows: fp64 [vocab_size] of logits [vocab_size].

    In this order: the top k by logit, then the temperature, then the smallest set of likeliest tokens whose probability
    reaches `top_p` (the nucleus of Holtzman et al. 2020, section 3.1). Of tokens that are equally likely, the smaller
    ids come first.
    """
    values = _finite(logits)
    if sampling.temperature == 0:
        return torch.zeros_like(values).index_fill_(0, values.argmax(), 1.0)
    kept = len(values) if sampling.top_k is None else min(sampling.top_k, len(values))
    if kept == len(values) and sampling.top_p >= 1:
        return _softmax(values, sampling.temperature)
    ordered, order = values.sort(descending=True, stable=True)
    likeliest = _softmax(ordered[:kept], sampling.temperature)
    before = likeliest.cumsum(0) - likeliest
    # The first always stays: nothing comes before it, whatever the rounding.
    inside = int((before[1:] < sampling.top_p).sum()) + 1
    likeliest = likeliest[:inside] / likeliest[:inside].sum()
    return torch.zeros_like(values).index_copy_(0, order[:inside], likeliest)


def draw(logits: Tensor, sampling: Sampling, position: int) -> int:
    """The token at `position` (tokens before it), the same whenever logits, settings and position are."""
    chances = probabilities(logits, sampling)
    if sampling.temperature == 0:
        return int(chances.argmax())
    generator = torch.Generator().manual_seed(keyed_seed("sample", sampling.seed, position))
    return int(torch.multinomial(chances, 1, generator=generator))


def log_probabilities(logits: Tensor) -> Tensor:
    """Of each token by the model itself, before any sampling setting: fp64, shaped as `logits` [..., vocab_size]."""
    return torch.log_softmax(_finite(logits), dim=-1)


def _softmax(values: Tensor, temperature: float) -> Tensor:
    return torch.softmax((values - values.max()) / temperature, dim=-1)  # the difference first: no overflow


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise GptdistError("The model's logits are not finite numbers: its weights are damaged, or training diverged.")
    return logits.double()
