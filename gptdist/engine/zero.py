"""DeepSpeed's ZeRO around a `Network`: the only file that imports deepspeed.

DeepSpeed owns the optimizer state and its partitioning, clipping, loss scaling, skipping and offload. What it is told,
and which way gradients reach it, is decided in `zero_config.py`; this file does it.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gptdist.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from gptdist.engine.gradients import FlatGradients
from gptdist.engine.groups import Groups
from gptdist.engine.megatron import DTYPES, LocalParameter, Network
from gptdist.engine.partition import FlatState, ParameterRange
from gptdist.engine.zero_config import GradientFlow, choose_flow, deepspeed_config
from gptdist.errors import TrainingDiverged
from gptdist.model.parameters import decayed

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
import deepspeed
from deepspeed.ops.op_builder import ShareMemCommBuilder
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.ERROR)
# On a CPU DeepSpeed would compile a shared-memory collective when it starts; gloo serves without a compiler.
deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did, the same on every rank."""

    grad_norm: float  # before clipping; inf where the step was skipped
    skipped: bool
    loss_scale: float


class ZeroOptimizer:
    """AdamW under ZeRO for one rank's network."""

    def __init__(
        self,
        network: Network,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        local_rank: int,
    ) -> None:
        self.network = network
        self.precision = train.precision
        self.flow, self.stage = choose_flow(parallel)
        self.replicated = parallel.zero_stage == 0
        groups = network.groups
        data = groups.alone if self.replicated else groups.data
        self._hooks = _sum_over_tensor_ranks_at_once(network) if self.flow is GradientFlow.EACH_MICRO_BATCH else []
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed's engine insists on finding it there
        size = sum(local.parameter.numel() for local in network.parameters)
        config = deepspeed_config(optimizer, parallel, train, data.size(), size, pin_memory=torch.cuda.is_available())
        if self.stage == 3 and network.model.tie_embeddings and groups.layout.pipeline == 1:
            _register_tied_output(network)
        self.engine, *_ = deepspeed.initialize(
            model=network.chunks,
            optimizer=_build_adamw(network.parameters, optimizer),
            mpu=_DeepSpeedTopology(groups, data),
            dist_init_required=False,
            config=config,
        )
        check_understood(self.engine, config)
        self.states = self._stage3_states() if self.stage == 3 else self._stage12_states()
        self._flat: list[FlatGradients] = []
        if self.flow is GradientFlow.FLAT:
            self._use_flat_gradients(data)
        elif self.flow is GradientFlow.COALESCED and self.precision != "fp32":
            for local in network.parameters:
                local.parameter.grad_dtype = torch.float32

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters and let go of its buffers."""
        self.engine.destroy()
        for hook in self._hooks:
            hook.remove()
        if self.stage == 3:
            FWD_MODULE_STACK.remove(self.network.chunks)  # where stage 3 would keep the whole network for ever

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, micro_batches: Tensor, learning_rate: float) -> tuple[Tensor, StepResult]:
        """Forward, backward and update. Returns this rank's loss (see Network.forward_backward) and the step's
        result."""
        for group in self.engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        clock = self.network.clock
        clock.phase("forward and backward")
        loss = self._backward(micro_batches)
        clock.phase("optimizer step")
        try:
            self.engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise TrainingDiverged(
                    f"fp16 loss scale is at its minimum and gradients still overflow: {error}"
                ) from error
            raise
        optimizer = self.engine.optimizer
        if optimizer.overflow and self.stage < 3:
            # Offloaded, DeepSpeed would keep its fp32 sums of a skipped step, and skip every step after it.
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        return loss, StepResult(norm, bool(optimizer.overflow), float(optimizer.loss_scale))

    def own_are_finite(self) -> bool:
        """After a step: false where this rank's own gradients were not finite. Where DeepSpeed reduced them (ZeRO 2 and
        3, offload) nobody knows any more, and it is true."""
        return all(flat.own_are_finite() for flat in self._flat)

    def _backward(self, micro_batches: Tensor) -> Tensor:
        if self.flow is GradientFlow.FLAT:
            for flat in self._flat:
                flat.clear()
            loss = self.network.forward_backward(micro_batches, self._scaled)
            self.network.clock.phase("reducing gradients")
            self._sum_shared_gradients()
            for index, flat in enumerate(self._flat):
                part = flat.reduce(scatter=not self.replicated)
                self.engine.optimizer.averaged_gradients[index] = _as_deepspeed_partition(flat, part)
            return loss
        if self.flow is GradientFlow.COALESCED:
            with self.engine.coalesce_grad_reduction():
                loss = self.network.forward_backward(micro_batches, self.engine.scale)
                self.network.clock.phase("reducing gradients")  # DeepSpeed does, at the end of this block
                self._sum_shared_gradients()
                if getattr(self.engine.optimizer, "use_grad_accum_attribute", False):
                    for parameter in self.network.chunks.parameters():
                        parameter.__dict__["grad_accum"], parameter.grad = parameter.grad, None
            return loss
        total = torch.zeros((), device=self.network.device)
        for seen, loss in enumerate(self.network.losses(micro_batches), start=1):
            self.engine.optimizer.clear_backward_seen_flag()
            self.engine.set_gradient_accumulation_boundary(seen == len(micro_batches))
            self.engine.backward(loss)
            total += loss.detach()
        return total

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * self.engine.optimizer.loss_scale if self.precision == "fp16" else loss

    def _sum_shared_gradients(self) -> None:
        """Over tensor ranks where each saw other tokens, over the embedding group where a tied weight stands twice."""
        groups = self.network.groups
        shared = [_gradient(local) for local in self.network.parameters if local.sum_over_tensor_ranks]
        if shared:
            # One collective for all of them: they are small, and there are several in every layer.
            merged = torch.cat([gradient.reshape(-1) for gradient in shared])
            dist.all_reduce(merged, group=groups.tensor)
            for gradient, summed in zip(shared, merged.split([g.numel() for g in shared]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        for local in self.network.parameters:
            if local.tied and groups.embedding is not None:
                dist.all_reduce(_gradient(local), group=groups.embedding)

    # -- state ---------------------------------------------------------------------------------------------------

    def refresh_weights(self) -> None:
        """Make the weights the network computes with follow the fp32 masters, after state was read."""
        optimizer = self.engine.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := optimizer.persistent_parameters:
            persistent[0].partition(persistent)  # what is gathered already would not be gathered again
            persistent[0].all_gather(persistent)

    def scaler_state(self) -> dict[str, float]:
        """What the fp16 loss scaler remembers; empty in other precisions."""
        scaler = self.engine.optimizer.loss_scaler
        return {key: getattr(scaler, key) for key in _SCALER_FIELDS} if self.precision == "fp16" else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """The inverse of `scaler_state`; an empty state leaves the first scale."""
        for key in _SCALER_FIELDS if self.precision == "fp16" and state else ():
            setattr(self.engine.optimizer.loss_scaler, key, state[key])

    def _use_flat_gradients(self, data: dist.ProcessGroup) -> None:
        optimizer = self.engine.optimizer
        # DeepSpeed's own per-parameter hooks would walk the graph at every backward, for reductions it will not do.
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks.clear()
        for group, flat in zip(optimizer.bit16_groups, optimizer.bit16_groups_flat, strict=True):
            self._flat.append(FlatGradients(group, flat.numel(), self.network.groups.data))

    def _stage12_states(self) -> list[FlatState]:
        optimizer = self.engine.optimizer
        by_parameter = {id(local.parameter): local for local in self.network.parameters}
        states = []
        for index, group in enumerate(optimizer.bit16_groups):
            size = optimizer.partition_size[index]
            first = size * dist.get_rank(optimizer.real_dp_process_group[index])
            ranges, position = [], 0
            for parameter in group:
                start, stop = max(position, first), min(position + parameter.numel(), first + size)
                if start < stop:
                    ranges.append(_range(by_parameter[id(parameter)], start - position, stop - start, start - first))
                position += parameter.numel()
            states.append(_adam_state(optimizer.optimizer, optimizer.single_partition_of_fp32_groups[index], ranges))
        return states

    def _stage3_states(self) -> list[FlatState]:
        optimizer = self.engine.optimizer
        by_parameter = {id(local.parameter): local for local in self.network.parameters}
        rank = self.network.groups.data_rank
        states = []
        for index, group in enumerate(optimizer.fp16_groups):
            ranges = []
            for parameter in group:
                _, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
                count = min(numel, parameter.ds_numel - rank * numel)
                if count > 0:
                    ranges.append(_range(by_parameter[id(parameter)], rank * numel, count, offset))
            states.append(_adam_state(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat[index], ranges))
        return states


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def check_understood(engine: Any, config: dict[str, Any]) -> None:
    """DeepSpeed ignores keys it does not know without a word: ask it back what matters."""
    understood = {
        "gradient_clipping": engine.gradient_clipping(),
        "communication_data_type": {torch.float32: "fp32"}.get(engine.communication_data_type),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "stage": int(engine.zero_optimization_stage()),
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "offload_optimizer": engine.zero_offload_optimizer() is not None,
        "grad_accum_dtype": {dtype: name for name, dtype in DTYPES.items()}.get(engine.get_data_types()[1]),
    }
    asked = {
        **{key: config[key] for key in ("gradient_clipping", "communication_data_type", "gradient_accumulation_steps")},
        "stage": config["zero_optimization"]["stage"],
        "bf16": "bf16" in config,
        "fp16": "fp16" in config,
        "offload_optimizer": "offload_optimizer" in config["zero_optimization"],
        "grad_accum_dtype": config["data_types"]["grad_accum_dtype"],
    }
    wrong = {key: (asked[key], understood[key]) for key in asked if asked[key] != understood[key]}
    if wrong:
        raise RuntimeError(f"DeepSpeed understood its config otherwise than it was meant (asked, understood): {wrong}")


class _DeepSpeedTopology:
    """What DeepSpeed asks of an `mpu`: plain answers from our groups."""

    def __init__(self, groups: Groups, data: dist.ProcessGroup) -> None:
        layout = groups.layout
        self._answers = {
            "model_parallel": (groups.model, layout.tensor * layout.pipeline),
            "data_parallel": (data, data.size()),
            "tensor_model_parallel": (groups.tensor, layout.tensor),
            "pipeline_model_parallel": (groups.pipeline, layout.pipeline),
        }

    def __getattr__(self, name: str) -> Callable[[], Any]:
        for kind, (group, size) in self.__dict__.get("_answers", {}).items():
            if name == f"get_{kind}_group":
                return lambda: group
            if name == f"get_{kind}_world_size":
                return lambda: size
            if name == f"get_{kind}_rank":
                return group.rank
            if name == f"get_{kind}_group_ranks":
                return lambda: dist.get_process_group_ranks(group)
        raise AttributeError(name)


def _build_adamw(parameters: list[LocalParameter], optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [p.parameter for p in parameters if decayed(p.name)], "weight_decay": optimizer.weight_decay},
        {"params": [p.parameter for p in parameters if not decayed(p.name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )


def _adam_state(adam: torch.optim.Optimizer, master: Tensor, ranges: list[ParameterRange]) -> FlatState:
    # Made before the first step, so that a checkpoint of step 0 has it too and loading never depends on a dummy step.
    state = adam.state[master]
    state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    state["exp_avg"] = torch.zeros_like(master)
    state["exp_avg_sq"] = torch.zeros_like(master)
    return FlatState(master, state["exp_avg"], state["exp_avg_sq"], state["step"], ranges)


def _gradient(local: LocalParameter) -> Tensor:
    gradient = local.parameter.grad
    if gradient is None:
        raise RuntimeError(f"{local.name} has no gradient after backward")
    return gradient


def _range(local: LocalParameter, start: int, count: int, offset: int) -> ParameterRange:
    shape = tuple(getattr(local.parameter, "ds_shape", local.parameter.shape))
    return ParameterRange(local.pieces, shape, start, count, offset, local.owned)


def _as_deepspeed_partition(flat: FlatGradients, part: Tensor) -> GradPartitionBufferGroup:
    views = []
    for parameter, view in flat.slices(part):
        if parameter is None:
            vars(view)["_zero_padding"] = True  # DeepSpeed's word for "not part of the norm"
        views.append(view)
    return GradPartitionBufferGroup(views, part)


def _sum_over_tensor_ranks_at_once(network: Network) -> list[RemovableHandle]:
    """As `_sum_shared_gradients`, but in each backward: hooks run in order, and DeepSpeed's come after these."""

    def add_up(parameter: Tensor) -> None:
        dist.all_reduce(parameter.grad, group=network.groups.tensor)

    summed = (local.parameter for local in network.parameters if local.sum_over_tensor_ranks)
    return [parameter.register_post_accumulate_grad_hook(add_up) for parameter in summed]


def _register_tied_output(network: Network) -> None:
    chunk: Any = network.chunks[0]
    deepspeed.zero.register_external_parameter(chunk.output_layer, chunk.embedding.word_embeddings.weight)
