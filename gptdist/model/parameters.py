"""The parameters of a GPT by logical name and shape, counted without building it.

Pure: knows a ModelConfig, no torch and no rank. Logical shapes know no parallelism and no padding of the vocabulary;
they are what checkpoints store and what initial weights are drawn by.
"""

from collections.abc import Iterator
from math import prod

from gptdist.config.sections import ModelConfig

Shape = tuple[int, ...]


def logical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every parameter, in network order; a linear weight is (outputs, inputs).

    The rows of `attention.qkv` come in Megatron's groups: for each key/value head its query heads, its key, its value.
    """
    hidden, vocab = model.hidden_size, model.vocab_size
    shapes: dict[str, Shape] = {"embedding.word.weight": (vocab, hidden)}
    if model.position == "learned":
        shapes["embedding.position.weight"] = (model.sequence_length, hidden)
    for layer in range(model.num_layers):
        shapes.update((f"layers.{layer}.{name}", shape) for name, shape in _layer_shapes(model))
    shapes.update(_norm("final_norm", model))
    if not model.tie_embeddings:
        shapes["output.weight"] = (vocab, hidden)
    return shapes


def parameter_count(model: ModelConfig) -> int:
    """Trained numbers in the model, a tied embedding counted once."""
    shapes = logical_shapes(model.model_copy(update={"num_layers": 0}))
    layer = sum(prod(shape) for _, shape in _layer_shapes(model))
    return sum(prod(shape) for shape in shapes.values()) + model.num_layers * layer


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs (forward and backward) per token: 6 per matmul parameter, and attention.

    PaLM (Chowdhery et al. 2022, appendix B): 6 N + 12 L (heads x head size) S. Here N is the weights that are
    multiplied: the output head counts, tied or not; looking up an embedding costs none. Grouped key/value heads
    shrink N through their projections only: every query head still meets S keys. Attention is counted in full,
    causal or not.
    """
    layer = sum(prod(shape) for _, shape in _layer_shapes(model) if len(shape) == 2)
    matmul_parameters = model.num_layers * layer + model.vocab_size * model.hidden_size
    attention = 12 * model.num_layers * model.num_heads * model.head_size * model.sequence_length
    return float(6 * matmul_parameters + attention)


def decayed(name: str) -> bool:
    """Whether AdamW decays the parameter of this logical name: matrices, embeddings too; no bias and no norm."""
    *_, module, kind = name.split(".")
    return kind == "weight" and not module.endswith("norm")


def _layer_shapes(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = model.hidden_size, model.ffn_size
    query_size = model.num_heads * model.head_size
    qkv_size = query_size + 2 * model.kv_heads * model.head_size
    yield from _norm("input_norm", model)
    yield from _linear("attention.qkv", qkv_size, hidden, model)
    yield from _linear("attention.output", hidden, query_size, model)
    yield from _norm("mlp_norm", model)
    yield from _linear("mlp.up", ffn, hidden, model)
    if model.activation == "swiglu":
        yield from _linear("mlp.gate", ffn, hidden, model)
    yield from _linear("mlp.down", hidden, ffn, model)


def _linear(name: str, outputs: int, inputs: int, model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if model.bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """A layernorm always has a bias, whatever `model.bias` says of the linear layers; an rmsnorm never has."""
    yield f"{name}.weight", (model.hidden_size,)
    if model.norm == "layernorm":
        yield f"{name}.bias", (model.hidden_size,)
