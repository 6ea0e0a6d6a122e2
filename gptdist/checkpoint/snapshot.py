"""Training state on its way out of torch: the only file here that knows torch.

A `Fragment` is a view of a rank's memory, on any device; what is written is a `HostFragment`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.logical import Box, Shape


@dataclass(frozen=True)
class Fragment:
    """`data` is `box` of the logical tensor `name`, whose whole shape is `shape`. A view will do, on any device."""

    name: str
    shape: Shape
    box: Box
    data: torch.Tensor


def to_host(fragments: Iterable[Fragment]) -> list[HostFragment]:
    """The same fragments for writing: views of what is on the CPU, copies of what is not."""
    return [
        HostFragment(part.name, part.shape, part.box, dtype_name(part.data.dtype), host_array(part.data))
        for part in fragments
    ]


def host_array(data: torch.Tensor) -> np.ndarray:
    """The tensor as numpy sees it; a view where it is on the CPU."""
    data = data.detach().cpu()
    return (data.view(torch.uint16) if data.dtype is torch.bfloat16 else data).numpy()


def as_tensor(data: np.ndarray, dtype: str) -> torch.Tensor:
    """The inverse of `host_array`, over the same memory."""
    tensor = torch.from_numpy(data)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
