"""LayerNorm and RMSNorm that may stand in a sequence-parallel region.

Pure torch. Under sequence parallelism each tensor rank normalises its own slice of the sequence with the whole weight,
so a weight's gradient is only this rank's share: the mark `sequence_parallel` tells the engine to sum it over tensor
ranks. Computation is in fp32 whatever the input, as torch's own kernels do internally.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the last dimension, `hidden_size` wide, with weight and bias."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.weight = _parameter(config, self.shape)
        self.bias = _parameter(config, self.shape)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019) over the last dimension, with a weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.weight = _parameter(config, self.shape)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.shape, self.weight, self.eps)


def _parameter(config: Any, shape: tuple[int, ...]) -> nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter
