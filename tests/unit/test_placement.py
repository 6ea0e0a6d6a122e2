"""Pieces of tensor ranks against the logical model: together they cover it exactly once, whatever the sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.checkpoint.logical import Box, Piece, fragments_of_range, overlap_or_gap
from gptdist.config.sections import ModelConfig
from gptdist.engine.placement import VOCAB_MULTIPLE, logical_name, padded_vocab_size, pieces_of, split_dimension
from gptdist.layout import Layout
from gptdist.model.parameters import logical_shapes

CLASSIC = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}
MODERN = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False}
TENSOR_SIZES = (1, 2, 4, 8)


def model_of(kind: dict[str, object], vocab_size: int = 259, tied: bool = True, width: int = 64) -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        hidden_size=width,
        num_heads=8,
        num_kv_heads=8,
        ffn_hidden_size=3 * width,
        vocab_size=vocab_size,
        sequence_length=16,
        tie_embeddings=tied,
        **kind,
    )


def stored_names(model: ModelConfig) -> list[str]:
    """Logical names that stand for a parameter of their own; the gate is stored with the up-projection."""
    return [name for name in logical_shapes(model) if ".mlp.gate." not in name]


def all_pieces(model: ModelConfig, tensor: int) -> list[list[Piece]]:
    layout = Layout(world_size=tensor, tensor=tensor)
    return [
        [piece for name in stored_names(model) for piece in pieces_of(name, model, layout, tensor_rank)]
        for tensor_rank in range(tensor)
    ]


def local_shape(name: str, model: ModelConfig, tensor: int) -> tuple[int, ...]:
    """The shape Megatron gives the parameter behind `name` on one of `tensor` ranks."""
    shape = list(logical_shapes(model)[name])
    if name in ("embedding.word.weight", "output.weight"):
        shape[0] = padded_vocab_size(model, tensor)
    if model.activation == "swiglu" and ".mlp.up." in name:
        shape[0] *= 2
    if (dimension := split_dimension(name)) is not None:
        shape[dimension] //= tensor
    return tuple(shape)


@pytest.mark.parametrize("tensor", TENSOR_SIZES)
@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("kind", (CLASSIC, MODERN), ids=("classic", "modern"))
def test_tensor_ranks_cover_every_logical_tensor_once(kind: dict[str, object], tied: bool, tensor: int) -> None:
    model = model_of(kind, tied=tied)
    by_rank = all_pieces(model, tensor)
    for name, shape in logical_shapes(model).items():
        boxes = [[piece.box for piece in pieces if piece.name == name] for pieces in by_rank]
        assert all(len(mine) == 1 for mine in boxes), f"{name}: one box on each rank"
        flat = [mine[0] for mine in boxes]
        if split_dimension(name) is None:
            assert flat == [Box.whole(shape)] * tensor, f"{name}: whole on every rank"
        else:
            assert overlap_or_gap(shape, [box for box in flat if box.size]) is None, name


@settings(max_examples=60, deadline=None)
@given(
    tensor=st.sampled_from(TENSOR_SIZES),
    vocab_size=st.integers(1, 3000),
    width=st.sampled_from((8, 64, 72)),
    kind=st.sampled_from((CLASSIC, MODERN)),
)
def test_every_local_element_is_a_logical_one_or_padding(
    tensor: int, vocab_size: int, width: int, kind: dict[str, object]
) -> None:
    model = model_of(kind, vocab_size=vocab_size, tied=False, width=width)
    layout = Layout(world_size=tensor, tensor=tensor)
    for name in stored_names(model):
        boxes: dict[str, list[Box]] = {}
        padding = 0
        for tensor_rank in range(tensor):
            shape = local_shape(name, model, tensor)
            numel = Box.whole(shape).size
            fragments = fragments_of_range(shape, pieces_of(name, model, layout, tensor_rank), 0, numel)
            padding += numel - sum(fragment.stop - fragment.start for fragment in fragments)
            for fragment in fragments:
                boxes.setdefault(fragment.name, []).append(fragment.box)
        if split_dimension(name) is not None:
            for logical, found in boxes.items():
                assert overlap_or_gap(logical_shapes(model)[logical], found) is None
        is_vocab = name in ("embedding.word.weight", "output.weight")
        assert padding == ((padded_vocab_size(model, tensor) - vocab_size) * width if is_vocab else 0)


@given(vocab_size=st.integers(1, 100_000), tensor=st.sampled_from((1, 2, 3, 4, 6, 8)))
def test_vocabulary_is_padded_as_little_as_equal_round_shares_allow(vocab_size: int, tensor: int) -> None:
    padded = padded_vocab_size(model_of(CLASSIC, vocab_size=vocab_size), tensor)
    assert padded % (VOCAB_MULTIPLE * tensor) == 0
    assert vocab_size <= padded < vocab_size + VOCAB_MULTIPLE * tensor


def test_heads_stay_whole_and_grouped() -> None:
    """A rank's rows of qkv are whole groups: for each of its kv heads the query heads, the key, the value."""
    model = model_of(MODERN).model_copy(update={"num_kv_heads": 4})
    group_rows = (model.num_heads // model.kv_heads + 2) * model.head_size
    for tensor in (1, 2, 4):
        layout = Layout(world_size=tensor, tensor=tensor)
        for tensor_rank in range(tensor):
            (piece,) = pieces_of("layers.0.attention.qkv.weight", model, layout, tensor_rank)
            assert piece.box.start[0] % group_rows == piece.box.stop[0] % group_rows == 0


def test_swiglu_stores_gate_rows_before_up_rows() -> None:
    model = model_of(MODERN)
    gate, up = pieces_of("layers.1.mlp.up.weight", model, Layout(world_size=4, tensor=4), tensor_rank=3)
    assert (gate.name, gate.local_rows) == ("layers.1.mlp.gate.weight", (0, 48))
    assert (up.name, up.local_rows) == ("layers.1.mlp.up.weight", (48, 96))
    assert gate.box == up.box == Box((144, 0), (192, 64))


@pytest.mark.parametrize(
    ("megatron_name", "tied", "expected"),
    (
        ("embedding.word_embeddings.weight", True, "embedding.word.weight"),
        ("embedding.position_embeddings.weight", True, "embedding.position.weight"),
        ("output_layer.weight", True, "embedding.word.weight"),
        ("output_layer.weight", False, "output.weight"),
        ("decoder.final_layernorm.bias", False, "final_norm.bias"),
        ("decoder.layers.0.self_attention.linear_qkv.bias", True, "layers.6.attention.qkv.bias"),
        ("decoder.layers.1.mlp.linear_fc2.weight", True, "layers.7.mlp.down.weight"),
        ("decoder.layers.1.pre_mlp_layernorm.weight", True, "layers.7.mlp_norm.weight"),
    ),
)
def test_logical_names(megatron_name: str, tied: bool, expected: str) -> None:
    assert logical_name(megatron_name, range(6, 8), tied) == expected
