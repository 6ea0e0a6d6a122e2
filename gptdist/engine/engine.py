"""The engine: one whole optimizer step, one evaluation, and the state that survives a restart.

The seam between everything above (loop, commands) and the two libraries below: `megatron.py` runs the network,
`zero.py` owns the optimizer. Reports are reduced, the same on every rank.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptdist.checkpoint.logical import Box, fragments_of_range
from gptdist.checkpoint.snapshot import Fragment
from gptdist.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from gptdist.engine.clock import StepClock
from gptdist.engine.groups import Groups
from gptdist.engine.megatron import Network, build_groups, destroy_groups
from gptdist.engine.partition import StateSource, owned_fragments, read_into, read_state
from gptdist.engine.zero import ZeroOptimizer
from gptdist.engine.zero_config import OPTIMIZER
from gptdist.layout import Layout
from gptdist.model.initial import initial_weight
from gptdist.model.parameters import logical_shapes
from gptdist.monitor.heartbeat import Heartbeat
from gptdist.world import World


@dataclass(frozen=True)
class Wishes:
    """What a rank wants all ranks to do after a step; of a report, what any of them wanted."""

    stop: bool = False
    save: bool = False
    settle_save: bool = False  # a save in the background failed, and not all may know yet


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, the same on every rank. `loss` is nats per token over the global batch."""

    loss: float
    grad_norm: float  # before clipping
    skipped: bool  # a loss or gradient was not finite: weights and moments are as before
    loss_scale: float
    wished: Wishes
    culprits: tuple[int, ...] = ()  # of a skipped step: global ranks whose own numbers were not finite, where known


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss, nats per token."""

    loss: float
    tokens: int


class InferenceEngine:
    """A network with weights and no optimizer: evaluation and logits, under any layout.

    `end_of_text`: the id that ends documents, where attention and positions are to stop; None: they do not. `clock`:
    what hears where a step is; None: nobody wants to know.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        layout: Layout,
        world: World,
        end_of_text: int | None = None,
        clock: StepClock | None = None,
    ) -> None:
        self.model = model
        self.layout = layout
        self.groups: Groups = build_groups(layout, world)
        self.clock = clock or StepClock(Heartbeat.open(-1))
        self.network = Network(model, train, self.groups, self.clock, end_of_text)

    @torch.no_grad()
    def load_weights(self, source: StateSource) -> None:
        """Read `weight/...` of every parameter this rank holds; padding becomes zero."""
        for local in self.network.parameters:
            flat = torch.zeros(local.parameter.numel())
            for fragment in fragments_of_range(tuple(local.parameter.shape), local.pieces, 0, flat.numel()):
                read_into(flat[fragment.start : fragment.stop], source, f"weight/{fragment.name}", fragment.box)
            local.parameter.copy_(flat.view(local.parameter.shape))

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
        """Mean loss over held-out windows: `batches` yields (tokens [micro batch, sequence + 1], mask [micro batch]).

        Every data rank must bring equally many batches.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.network.device)
        for tokens, mask in batches:
            total += self.network.evaluate(tokens.unsqueeze(0), mask.unsqueeze(0)).double()
        loss_sum, tokens_seen = self._sum_over_replicas(total).tolist()
        return Evaluation(loss_sum / max(tokens_seen, 1.0), int(tokens_seen))

    def next_token_logits(self, tokens: Tensor) -> Tensor:
        """Logits after the last of `tokens` [length] int64 (at most sequence_length used): fp32 [vocab_size], on all
        ranks."""
        logits = self.logits(tokens[-self.model.sequence_length :].unsqueeze(0))
        return logits[0, -1]

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [batch, length] int64 -> fp32 [batch, length, vocab_size] on the CPU of every rank."""
        logits = self.network.logits(tokens)
        if self.layout.pipeline > 1:
            if not self.groups.is_last_stage:
                logits = torch.empty(*tokens.shape, self.model.vocab_size, device=self.network.device)
            last = self.layout.global_rank(self.groups.tensor_rank, self.groups.data_rank, self.layout.pipeline - 1)
            dist.broadcast(logits, src=last, group=self.groups.pipeline)
        return logits.cpu()

    def _sum_over_replicas(self, values: Tensor) -> Tensor:
        """Sum over data ranks of values that the last stage's first tensor rank holds; zeros elsewhere are ignored."""
        if self.groups.tensor_rank or not self.groups.is_last_stage:
            values = torch.zeros_like(values)
        dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Forget the process groups, so that another engine can be built in this process."""
        destroy_groups()


class TrainEngine(InferenceEngine):
    """A network and its optimizer under one layout. Call `initialise`, or `read` or `read_weights` and
    then `refresh`, before the first step."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        layout: Layout,
        world: World,
        end_of_text: int | None = None,
        clock: StepClock | None = None,
    ) -> None:
        super().__init__(model, train, layout, world, end_of_text, clock)
        self.seed = train.seed
        self.zero = ZeroOptimizer(self.network, optimizer, parallel, train, world.local_rank)
        self._fragments: list[Fragment] | None = None  # of tensors that stay where they are; a save must not be slow

    def train_step(
        self, micro_batches: Tensor, learning_rate: float, step: int, wishes: Wishes | None = None
    ) -> StepReport:
        """One optimizer step over this data rank's micro-batches [count, micro batch, sequence + 1] int64.

        `step` keys dropout. A non-finite loss or gradient anywhere leaves every weight and moment as it was.
        `wishes`: this rank's; the report says which ones any rank had, at no collective of their own.
        """
        self.network.seed_dropout(self.seed, step)
        loss, result = self.zero.step(micro_batches, learning_rate)
        flags = astuple(wishes or Wishes())
        mine = torch.zeros(2 + len(flags), dtype=torch.float64)
        mine[2:] = torch.tensor(flags)
        if not self.groups.global_rank:
            mine[1] = result.grad_norm  # one rank's for all: decisions hang on it, and groups may sum in other orders
        mine = mine.to(self.network.device)
        if self.groups.is_last_stage and not self.groups.tensor_rank:
            mine[0] = loss.detach()
        dist.all_reduce(mine)
        loss_sum, norm, *wished = mine.tolist()
        total = loss_sum / self.layout.data
        skipped = result.skipped or not math.isfinite(total)
        culprits = self._culprits(loss) if skipped else ()
        return StepReport(total, norm, skipped, result.loss_scale, Wishes(*(count > 0 for count in wished)), culprits)

    def _culprits(self, loss: Tensor) -> tuple[int, ...]:
        """Whose loss or gradients were not finite, the same on every rank."""
        bad = torch.zeros(self.layout.world_size, device=self.network.device)
        if not (bool(torch.isfinite(loss)) and self.zero.own_are_finite()):
            bad[self.groups.global_rank] = 1
        dist.all_reduce(bad)
        return tuple(bad.nonzero().flatten().tolist())

    def initialise(self) -> None:
        """Initial weights, keyed by (seed, logical name); zero moments."""
        self.read_weights(_InitialWeights(self.model, self.seed))
        self.refresh()

    def read_weights(self, source: StateSource) -> None:
        """Weights of any layout; for the rest, the state of step 0. As `read`, no collective: `refresh` follows."""
        read_state(self.zero.states, source, kinds=("weight",))
        for flat in self.zero.states:
            flat.step.zero_()

    def fragments(self) -> list[Fragment]:
        """Views of everything this rank writes to a checkpoint: fp32 weights and both Adam moments."""
        if self._fragments is None:
            shares = self.layout.data if self.zero.replicated else 1
            share = self.groups.data_rank if self.zero.replicated else 0
            self._fragments = [Fragment(*fields) for fields in owned_fragments(self.zero.states, share, shares)]
        return self._fragments

    def state(self) -> dict[str, Any]:
        """What else a restart needs, JSON: optimizer steps taken and the loss scaler. Random state is keyed, not
        kept."""
        return {
            "optimizer": OPTIMIZER,
            "optimizer_steps": int(self.zero.states[0].step.item()),
            "loss_scaler": self.zero.scaler_state(),
        }

    def read(self, source: StateSource, state: dict[str, Any]) -> None:
        """Take up `fragments` and `state` of any layout. No collective, so that ranks can agree on what went wrong."""
        read_state(self.zero.states, source)
        for flat in self.zero.states:
            flat.step.fill_(state["optimizer_steps"])
        self.zero.load_scaler_state(state["loss_scaler"])

    def refresh(self) -> None:
        """After `read`, on all ranks: the weights computed with follow the fp32 masters."""
        self.zero.refresh_weights()

    def close(self) -> None:
        """Also undo DeepSpeed's hooks, through which every parameter would keep the engine and its groups alive."""
        self._fragments = None
        self.zero.close()
        super().close()


class _InitialWeights:
    """A StateSource of step 0. Keeps the last tensor drawn: its boxes are asked for one after the other."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._model, self._seed = model, seed
        self._shapes = logical_shapes(model)
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, box: Box) -> Tensor:
        logical = name.removeprefix("weight/")
        if self._last is None or self._last[0] != logical:
            self._last = (logical, initial_weight(self._model, self._seed, logical, self._shapes[logical]))
        return self._last[1][box.slices()]
