"""Logical parameters: names, shapes, counts, FLOPs and which of them decay."""

import itertools
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.config.sections import ModelConfig
from gptdist.model.parameters import decayed, flops_per_token, logical_shapes, parameter_count


def test_classic_names_shapes_and_order() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=10, sequence_length=4)
    assert list(logical_shapes(model).items()) == [
        ("embedding.word.weight", (10, 8)),
        ("embedding.position.weight", (4, 8)),
        ("layers.0.input_norm.weight", (8,)),
        ("layers.0.input_norm.bias", (8,)),
        ("layers.0.attention.qkv.weight", (24, 8)),
        ("layers.0.attention.qkv.bias", (24,)),
        ("layers.0.attention.output.weight", (8, 8)),
        ("layers.0.attention.output.bias", (8,)),
        ("layers.0.mlp_norm.weight", (8,)),
        ("layers.0.mlp_norm.bias", (8,)),
        ("layers.0.mlp.up.weight", (32, 8)),
        ("layers.0.mlp.up.bias", (32,)),
        ("layers.0.mlp.down.weight", (8, 32)),
        ("layers.0.mlp.down.bias", (8,)),
        ("final_norm.weight", (8,)),
        ("final_norm.bias", (8,)),
    ]


def test_modern_names_shapes_and_order() -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=12,
        vocab_size=10,
        norm="rmsnorm",
        position="rotary",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )
    layer = [
        ("input_norm.weight", (8,)),
        ("attention.qkv.weight", (16, 8)),
        ("attention.output.weight", (8, 8)),
        ("mlp_norm.weight", (8,)),
        ("mlp.up.weight", (12, 8)),
        ("mlp.gate.weight", (12, 8)),
        ("mlp.down.weight", (8, 12)),
    ]
    assert list(logical_shapes(model).items()) == [
        ("embedding.word.weight", (10, 8)),
        *((f"layers.{index}.{name}", shape) for index in range(2) for name, shape in layer),
        ("final_norm.weight", (8,)),
        ("output.weight", (10, 8)),
    ]


@given(
    num_layers=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (6, 6)]),
    head_size=st.integers(1, 9),
    ffn=st.none() | st.integers(1, 40),
    vocab=st.integers(1, 300),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    position=st.sampled_from(["learned", "rotary"]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    bias=st.booleans(),
    tied=st.booleans(),
)
def test_counts_agree_with_shapes_and_a_formula(
    num_layers, heads, head_size, ffn, vocab, norm, position, activation, bias, tied
) -> None:
    hidden = heads[0] * head_size
    model = ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        sequence_length=16,
        norm=norm,
        position=position,
        activation=activation,
        bias=bias,
        tie_embeddings=tied,
    )
    shapes = logical_shapes(model)
    assert parameter_count(model) == sum(prod(shape) for shape in shapes.values())
    width, qkv = ffn or 4 * hidden, hidden + 2 * heads[1] * head_size
    matrices = 3 if activation == "swiglu" else 2
    layer = qkv * hidden + hidden * hidden + matrices * width * hidden
    layer += bias * (qkv + 2 * hidden + (matrices - 1) * width) + 2 * hidden * (2 if norm == "layernorm" else 1)
    outside = vocab * hidden * (1 if tied else 2) + 16 * hidden * (position == "learned")
    assert parameter_count(model) == num_layers * layer + outside + hidden * (2 if norm == "layernorm" else 1)
    assert len([name for name in shapes if name.endswith(".bias") and "norm" not in name]) == bias * num_layers * (
        2 + matrices
    )


def test_decay_follows_dimension_except_norms() -> None:
    for tied, activation in itertools.product((True, False), ("gelu", "swiglu")):
        model = ModelConfig(num_layers=2, tie_embeddings=tied, activation=activation)
        for name, shape in logical_shapes(model).items():
            assert decayed(name) == (len(shape) == 2), name


def test_flops_of_gpt2_worked_by_hand() -> None:
    matmul = 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(ModelConfig()) == 6 * matmul + 12 * 12 * 768 * 1024


def test_flops_do_not_depend_on_tying_or_position() -> None:
    tied, untied = ModelConfig(), ModelConfig(tie_embeddings=False, position="rotary")
    assert flops_per_token(tied) == flops_per_token(untied)


def test_grouped_heads_save_projections_only() -> None:
    full, grouped = ModelConfig(), ModelConfig(num_kv_heads=4)
    saved = 12 * 2 * (12 - 4) * 64 * 768
    assert flops_per_token(full) - flops_per_token(grouped) == 6 * saved


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_are_near_six_per_parameter_for_large_models(activation: str) -> None:
    model = ModelConfig(num_layers=96, hidden_size=12288, num_heads=96, sequence_length=2048, activation=activation)
    assert flops_per_token(model) / (6 * parameter_count(model)) == pytest.approx(1.0, abs=0.03)
