"""Makes Megatron-core run where there is no GPU, by answering the few CUDA calls it has written in.

`megatron.py` calls `install` with Megatron's modules before it builds anything; on a machine with a GPU nothing
happens. Each replacement answers with the CPU's own counterpart, so numerics are torch's CPU numerics and nothing is
skipped but synchronisation.
"""

import logging
from types import ModuleType
from typing import Any

import torch

_installed = False


def install(random_states: ModuleType, schedules: ModuleType) -> None:
    """Replace CUDA calls once for this process. Takes Megatron's `tensor_parallel.random` and
    `pipeline_parallel.schedules`."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True

    # torch.cuda is shared by the whole process, but a process without a GPU has no other user of it.
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    random: Any = random_states
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # On a CPU the "CUDA" stream is the CPU stream, so Megatron's warning that the CPU stream moved says nothing.
    logging.getLogger(random_states.__name__).setLevel(logging.ERROR)

    vars(schedules)["torch"] = _TorchWithCpuZeros()


class _TorchWithCpuZeros:
    """`torch`, except that `torch.zeros(..., device="cuda")` gives a CPU tensor."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return torch.zeros(*args, **kwargs)
