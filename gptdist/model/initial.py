"""Initial weights, each drawn from a generator keyed by (seed, logical name): the same under every layout.

Knows logical names and shapes only. The scheme is GPT-2's (Radford et al. 2019, section 2.3): normal with a fixed
standard deviation, the projections that write into the residual stream scaled by 1 / sqrt(2 * num_layers), norms 1,
biases 0.
"""

import hashlib
import math

import torch
from torch import Tensor

from gptdist.config.sections import ModelConfig

_RESIDUAL_PROJECTIONS = ("attention.output.weight", "mlp.down.weight")


def initial_weight(model: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole logical tensor `name` at step 0, fp32 on the CPU."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = model.init_std
    if name.endswith(_RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * model.num_layers)
    generator = torch.Generator().manual_seed(keyed_seed(seed, name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key: equal keys give equal seeds on every machine, and near keys unrelated ones."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
