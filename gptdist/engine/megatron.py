"""The network and its schedule: the only file that imports megatron.

Derives Megatron's TransformerConfig from our config, builds this rank's chunks of a GPTModel from Megatron's parallel
layers and our norms and attention, and runs micro-batches through Megatron's schedules. It knows nothing of optimizers:
gradients are left where `parameter.grad` points.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from gptdist.checkpoint.logical import Piece
from gptdist.config.sections import ModelConfig, TrainConfig
from gptdist.engine import cpu
from gptdist.engine.clock import StepClock
from gptdist.engine.groups import Groups
from gptdist.engine.placement import logical_name, padded_vocab_size, pieces_of, split_dimension
from gptdist.layout import Layout
from gptdist.model.attention import CausalAttention
from gptdist.model.documents import document_lengths, positions_in_documents
from gptdist.model.initial import keyed_seed
from gptdist.model.key_values import Continuation, KeyValues, visible_keys
from gptdist.model.norm import LayerNorm, RMSNorm
from gptdist.world import World

_Batch = tuple[Tensor, Tensor, Tensor | None]  # tokens, positions, document lengths

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_random_states = importlib.import_module("megatron.core.tensor_parallel.random")
_schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")


def build_groups(layout: Layout, world: World) -> Groups:
    """Megatron's process groups for `layout`; torch.distributed must be up with `layout.world_size` ranks."""
    cpu.install(_random_states, _schedules)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )
    spans_stages = layout.pipeline > 1 and layout.pipeline_stage(world.global_rank) in (0, layout.pipeline - 1)
    return Groups(
        layout=layout,
        global_rank=world.global_rank,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        embedding=parallel_state.get_embedding_group() if spans_stages else None,
        alone=dist.new_group([world.global_rank], use_local_synchronization=True),
    )


def destroy_groups() -> None:
    """Forget the groups, so that another layout can be built in the same process."""
    parallel_state.destroy_model_parallel()
    RotaryEmbedding.forward.cache_clear()  # it is cached by instance, and would keep whole networks alive


@dataclass(frozen=True)
class LocalParameter:
    """One parameter of this rank: where it stands in the logical model, and what must happen to its gradient."""

    name: str  # logical name; a fused gate-and-up projection goes by its up part
    parameter: nn.Parameter
    pieces: list[Piece]
    sum_over_tensor_ranks: bool  # sequence parallel: each tensor rank saw other tokens
    tied: bool  # stands on two stages, so its gradients must be summed over the embedding group
    owned: bool  # this rank is the one of its model group that answers for it, where several hold the same


class Network:
    """This rank's part of the GPT: one or more chunks of layers, with embedding and output where they belong."""

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        groups: Groups,
        clock: StepClock,
        end_of_text: int | None = None,
    ) -> None:
        """`end_of_text`: the id that ends documents, where attention and positions are to stop; None: they do not."""
        self.model = model
        self.groups = groups
        self.clock = clock
        self.end_of_text = end_of_text
        self.device = torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        self.dtype = DTYPES[train.precision]
        self.config = _transformer_config(model, train, groups.layout)
        self.chunks = nn.ModuleList(
            _build_chunk(self.config, model, groups, chunk) for chunk in range(groups.layout.virtual_pipeline)
        ).to(self.device, self.dtype)  # position embeddings too, which Megatron leaves in fp32
        self.parameters = list(self._local_parameters())
        # Megatron enters its stream for sequence-parallel embeddings even where nothing is dropped, as in evaluation.
        self.seed_dropout(train.seed, 0)

    def _local_parameters(self) -> Iterator[LocalParameter]:
        layout, model = self.groups.layout, self.model
        for index, chunk in enumerate(self.chunks):
            layers = layout.layers(model.num_layers, self.groups.pipeline_stage, index)
            for megatron_name, parameter in chunk.named_parameters():
                name = logical_name(megatron_name, layers, model.tie_embeddings)
                copy = model.tie_embeddings and megatron_name == "output_layer.weight"
                tied = model.tie_embeddings and name == "embedding.word.weight" and layout.pipeline > 1
                split = split_dimension(name) is not None
                owned = not copy and (split or self.groups.tensor_rank == 0)
                # DeepSpeed's words for what the gradient norm counts: with these, every logical element once.
                marks = {"model_parallel": owned, "tensor_model_parallel": owned, "ds_pipe_replicated": copy}
                vars(parameter).update(marks)
                yield LocalParameter(
                    name=name,
                    parameter=parameter,
                    pieces=pieces_of(name, model, layout, self.groups.tensor_rank),
                    sum_over_tensor_ranks=layout.sequence_parallel and not split and not name.startswith("embedding."),
                    tied=tied,
                    owned=owned,
                )

    def forward_backward(self, micro_batches: Tensor, scale_loss: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Run all micro-batches forward and backward under Megatron's schedule.

        micro_batches: [count, micro batch, sequence + 1] int64. Returns the mean loss over this data rank's samples on
        the last stage, 0 elsewhere: an fp32 scalar. A non-finite loss makes every gradient non-finite.
        """
        self.chunks.train()
        self.config.grad_scale_func = scale_loss
        losses = self._run(micro_batches, _training_loss, forward_only=False)
        return torch.stack(losses).mean() if losses else torch.zeros((), device=self.device)

    def losses(self, micro_batches: Tensor) -> Iterator[Tensor]:
        """The loss of each micro-batch, divided by their count, to go backward from before the next one is asked for.

        Without a pipeline Megatron's schedule is no more than this; optimizers that reduce after each backward drive
        it.
        """
        self.chunks.train()
        (chunk,) = self.chunks
        for tokens, positions, lengths in self._batches(micro_batches, micro_batches.shape[2] - 1):
            with self.clock.forward():
                output = chunk(tokens[:, :-1], positions, lengths, labels=tokens[:, 1:].contiguous())
                mean = _training_loss(output)[0] / len(micro_batches)
            yield mean

    @torch.no_grad()
    def evaluate(self, micro_batches: Tensor, mask: Tensor) -> Tensor:
        """Sum of the losses of real samples and their number of tokens: fp32 [2], zeros but on the last stage.

        mask: [count, micro batch], 1 for a real sample, 0 for padding.
        """
        self.chunks.eval()
        masks = iter(mask.to(self.device))
        losses = self._run(micro_batches, lambda output: _masked_loss(output, next(masks)), forward_only=True)
        return torch.stack(losses).sum(0) if losses else torch.zeros(2, device=self.device)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of every position, fp32 [batch, length, vocab_size], on the last stage; an empty tensor elsewhere.

        tokens: [batch, length] int64, length at most `model.sequence_length`.
        """
        self.chunks.eval()
        length = tokens.shape[1]
        fixed = self.model.sequence_length if self.groups.layout.pipeline > 1 else length
        multiple = self.groups.layout.tensor if self.groups.layout.sequence_parallel else 1
        filling = int(self.end_of_text == 0)  # any id but that one, which would make each a document
        padded = F.pad(tokens, (0, -(-max(fixed, length) // multiple) * multiple - length), value=filling)
        outputs = self._run(padded.unsqueeze(0), None, forward_only=True)
        if not outputs:
            return torch.empty(0, device=self.device)
        return outputs[0][:, :length, : self.model.vocab_size].float().contiguous()

    @property
    def can_remember(self) -> bool:
        """Whether `continue_texts` works: each rank has all layers, and whole sequences between them."""
        return self.groups.layout.pipeline == 1 and not self.groups.layout.sequence_parallel

    @torch.no_grad()
    def continue_texts(self, tokens: Tensor, past: KeyValues) -> Tensor:
        """Logits after the last of `tokens`, fp32 [batch, vocab_size] on every tensor rank; `past` then holds them all.

        tokens: [batch, length] int64 on the CPU, the whole texts, of which `past` holds the first ones already; length
        at most `model.sequence_length`.
        """
        self.chunks.eval()
        (chunk,) = self.chunks
        first, length = past.length, tokens.shape[1]
        if self.end_of_text is None:
            positions = torch.arange(length).expand(len(tokens), -1)
        else:
            positions = positions_in_documents(tokens, self.end_of_text)
        lengths = None if first or self.end_of_text is None else document_lengths(tokens, self.end_of_text)
        visible = visible_keys(positions, first) if first else None
        mask = Continuation(past, lengths, None if visible is None else visible.to(self.device))
        here = tokens[:, first:].to(self.device), positions[:, first:].to(self.device)
        with _rotary_from(first, chunk):
            logits = chunk(*here, mask, runtime_gather_output=True)
        past.advance(length - first)
        return logits[:, -1, : self.model.vocab_size].float().contiguous()

    def _run(
        self, micro_batches: Tensor, loss: Callable[[Tensor], tuple[Tensor, Tensor]] | None, forward_only: bool
    ) -> list[Tensor]:
        """Through Megatron's schedule. `loss` None: collect logits, and micro_batches have no labels."""
        count, size, length = micro_batches.shape
        layout = self.groups.layout
        inputs = length if loss is None else length - 1
        batches = self._batches(micro_batches, inputs)

        def step(iterator: Iterator[_Batch], chunk: GPTModel) -> tuple[Tensor, Callable]:
            tokens, positions, lengths = next(iterator)
            if loss is None:
                output = chunk(tokens, positions, lengths, runtime_gather_output=True)
                return output, lambda output, non_loss_data=True: output
            with self.clock.forward():
                output = chunk(tokens[:, :-1], positions, lengths, labels=tokens[:, 1:].contiguous())
            return output, loss

        chunks = list(self.chunks)
        iterators = [iter(batches) for _ in chunks]
        self.config.deallocate_pipeline_outputs = layout.pipeline > 1 and self.device.type == "cuda"
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=inputs,
            micro_batch_size=size,
            forward_only=forward_only,
            collect_non_loss_data=loss is None,
        )

    def _batches(self, micro_batches: Tensor, inputs: int) -> list[_Batch]:
        """Each micro-batch's tokens, and the positions and document lengths of its first `inputs` columns.

        The lengths go where Megatron's layers pass a mask on, to our attention. They stay on the CPU, which needs them
        to know what to start, and are read off the tokens before those leave it.
        """
        count, size, _ = micro_batches.shape
        tokens = micro_batches.to(self.device, non_blocking=True)
        if self.end_of_text is None:
            positions = torch.arange(inputs, device=self.device).expand(count, size, -1)
            return [(batch, place, None) for batch, place in zip(tokens, positions, strict=True)]
        read = micro_batches[..., :inputs].cpu()
        positions = positions_in_documents(read, self.end_of_text).to(self.device, non_blocking=True)
        lengths = [document_lengths(batch, self.end_of_text) for batch in read]
        return list(zip(tokens, positions, lengths, strict=True))

    def seed_dropout(self, seed: int, step: int) -> None:
        """Set every random stream from (seed, step) and this rank's place, so that no random state need be saved.

        Outside sequence-parallel regions tensor ranks hold the same activations and draw the same masks; where they
        hold different ones (heads, or slices of the sequence) each draws from Megatron's per-rank stream.
        """
        place = (seed, step, self.groups.data_rank, self.groups.pipeline_stage)
        tracker = get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", keyed_seed("dropout", *place, "tensor", self.groups.tensor_rank))
        torch.cuda.manual_seed(keyed_seed("dropout", *place))


class _PaddedVocabGPT(GPTModel):
    """Megatron's GPTModel whose padded vocabulary columns are outside the softmax, so that padding never shows."""

    real_columns: int  # of this rank's slice of the logits

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        if self.real_columns < logits.shape[-1]:
            logits[..., self.real_columns :] = float("-inf")
        return super().compute_language_model_loss(labels, logits)


@contextmanager
def _rotary_from(position: int, chunk: Any) -> Iterator[None]:
    """Within it, the first token's rotary position is `position`; Megatron's model counts from 0."""
    if not position or chunk.position_embedding_type != "rope":
        yield
        return
    hook = chunk.rotary_pos_emb.register_forward_pre_hook(
        lambda _, args, named: (args, {**named, "offset": position}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def _build_chunk(config: TransformerConfig, model: ModelConfig, groups: Groups, chunk: int) -> _PaddedVocabGPT:
    layout = groups.layout
    layers = layout.layers(model.num_layers, groups.pipeline_stage, chunk)
    interleaved = layout.virtual_pipeline > 1
    network = _PaddedVocabGPT(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules([_layer_spec(model)] * len(layers), layer_norm=_norm(model)),
        vocab_size=padded_vocab_size(model, layout.tensor),
        max_sequence_length=model.sequence_length,
        pre_process=layers.start == 0,
        post_process=layers.stop == model.num_layers,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope" if model.position == "rotary" else "learned_absolute",
        rotary_base=int(model.rotary_base),
        vp_stage=chunk if interleaved else None,
    )
    columns = network.vocab_size // layout.tensor
    network.real_columns = min(max(model.vocab_size - groups.tensor_rank * columns, 0), columns)
    return network


class _ColumnLinear(ColumnParallelLinear):
    """Megatron's linear layer; where it is not split, torch's, which adds the bias inside the matrix product.

    Megatron's makes another pass over the output for the bias, or leaves that to the layer that follows.
    """

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(hidden, *args, **kwargs)
        return F.linear(hidden, self.weight, self.bias), None


class _RowLinear(RowParallelLinear):
    """As `_ColumnLinear`."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(hidden)
        return F.linear(hidden, self.weight, self.bias), None


def _norm(model: ModelConfig) -> type[nn.Module]:
    return LayerNorm if model.norm == "layernorm" else RMSNorm


def _layer_spec(model: ModelConfig) -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=_ColumnLinear,
        core_attention=ModuleSpec(
            module=CausalAttention, params={"dropout_stream": lambda: get_cuda_rng_tracker().fork()}
        ),
        linear_proj=_RowLinear,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=_norm(model),
        self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=_norm(model),
        mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=_ColumnLinear, linear_fc2=_RowLinear)),
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(TransformerLayer, submodules=layer)


_ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "swiglu": F.silu}


def _transformer_config(model: ModelConfig, train: TrainConfig, layout: Layout) -> TransformerConfig:
    dtype = DTYPES[train.precision]
    interleaved = layout.virtual_pipeline > 1
    recompute: dict[str, Any] = {"none": {}, "selective": {"recompute_granularity": "selective"}}.get(
        train.recompute,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    )
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.bias,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=_ACTIVATIONS[model.activation],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        sequence_parallel=layout.sequence_parallel,
        # Weights are loaded, or drawn by logical name, after building; Megatron's own draw depends on the layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Fusions that need apex or Transformer Engine, or that change the activation's formula.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        # Batched sends between the same two ranks pair up wrongly when stages hold several chunks.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **recompute,
    )


def _training_loss(losses: Tensor) -> tuple[Tensor, Tensor]:
    """losses [micro batch, sequence] -> their mean, to go backward from, and the same to report."""
    loss = losses.float().mean()
    # inf's own gradient may be finite; times NaN it cannot be, so the optimizer sees what the loss says.
    loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
    return loss, loss.detach().clone()


def _masked_loss(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """losses [micro batch, sequence], mask [micro batch] -> a scalar Megatron asks for, and (sum, tokens)."""
    weights = mask.float().unsqueeze(1).expand_as(losses)
    total = torch.stack([(losses.float() * weights).sum(), weights.sum()])
    return total[0].clone(), total
