"""The process groups a rank is in, as one value.

Made by `megatron.py` from Megatron's own, and handed to DeepSpeed; knows neither library.
"""

from dataclasses import dataclass

import torch.distributed as dist

from gptdist.layout import Layout


@dataclass(frozen=True)
class Groups:
    """`data` is None-free: even a group of one rank is a group, because DeepSpeed and Megatron ask for one."""

    layout: Layout
    global_rank: int
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    model: dist.ProcessGroup  # tensor x pipeline: the ranks that together hold one replica
    embedding: dist.ProcessGroup | None  # first and last stage, where the tied embedding stands twice
    alone: dist.ProcessGroup  # this rank only

    @property
    def tensor_rank(self) -> int:
        return self.layout.tensor_rank(self.global_rank)

    @property
    def data_rank(self) -> int:
        return self.layout.data_rank(self.global_rank)

    @property
    def pipeline_stage(self) -> int:
        return self.layout.pipeline_stage(self.global_rank)

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_stage == self.layout.pipeline - 1
