"""How the ranks of a run are arranged: tensor x data x pipeline parallel, as one pure value.

Knows integers only: no torch, no process group. Ranks are numbered as Megatron numbers them, tensor fastest, then data,
then pipeline, so that tensor-parallel neighbours share a node.
"""

from dataclasses import dataclass

from gptdist.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """The sizes of each kind of parallelism. Raises LayoutError where they do not multiply to `world_size`."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0

    def __post_init__(self) -> None:
        model_ranks = self.tensor * self.pipeline
        if self.world_size % model_ranks:
            lower = self.world_size // model_ranks * model_ranks
            choices = f"{lower} or {lower + model_ranks}" if lower else f"{model_ranks}"
            raise LayoutError(
                f"parallel.tensor ({self.tensor}) x parallel.pipeline ({self.pipeline}) = {model_ranks} does not "
                f"divide the world size {self.world_size}. Use {choices} ranks, or change parallel.tensor or "
                "parallel.pipeline."
            )

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // (self.tensor * self.pipeline)

    def tensor_rank(self, global_rank: int) -> int:
        """Index within the tensor-parallel group, 0 to tensor - 1."""
        return global_rank % self.tensor

    def data_rank(self, global_rank: int) -> int:
        """Index within the data-parallel group, 0 to data - 1."""
        return global_rank // self.tensor % self.data

    def pipeline_stage(self, global_rank: int) -> int:
        """Index of the pipeline stage, 0 to pipeline - 1."""
        return global_rank // (self.tensor * self.data)

    def global_rank(self, tensor_rank: int, data_rank: int, pipeline_stage: int) -> int:
        """The inverse of the three above."""
        return tensor_rank + self.tensor * (data_rank + self.data * pipeline_stage)

    def layers(self, num_layers: int, pipeline_stage: int, chunk: int = 0) -> range:
        """The transformer layers (counted from 0) that `chunk` of `pipeline_stage` holds.

        Interleaved schedules deal chunks round the stages: chunk v of stage p is the (v * pipeline + p)-th run of
        num_layers / (pipeline * virtual_pipeline) layers (Narayanan et al. 2021, section 2.2).
        """
        chunks = self.pipeline * self.virtual_pipeline
        if num_layers % chunks:
            raise LayoutError(
                f"model.num_layers ({num_layers}) is not a multiple of parallel.pipeline ({self.pipeline}) x "
                f"parallel.virtual_pipeline ({self.virtual_pipeline}) = {chunks}."
            )
        size = num_layers // chunks
        first = (chunk * self.pipeline + pipeline_stage) * size
        return range(first, first + size)

    def describe(self) -> str:
        """For people: `DP 2 x TP 2+SP x PP 2x2, ZeRO 1`."""
        tensor = f"TP {self.tensor}{'+SP' if self.sequence_parallel else ''}"
        pipeline = f"PP {self.pipeline}{f'x{self.virtual_pipeline}' if self.virtual_pipeline > 1 else ''}"
        return f"DP {self.data} x {tensor} x {pipeline}, ZeRO {self.zero_stage}"
