"""Where each of this rank's parameters stands in the logical model: Megatron's name and slice -> logical name and box.

Pure integers. It is the one place that knows Megatron's parameter names, its fused gate-and-up projection and its
padded vocabulary; checkpoints and initial weights both go through it.
"""

from gptdist.checkpoint.logical import Box, Piece
from gptdist.config.sections import ModelConfig
from gptdist.layout import Layout
from gptdist.model.parameters import logical_shapes

VOCAB_MULTIPLE = 64  # rows per tensor rank are a multiple of this: matrix kernels prefer round sizes

_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "embedding.word.weight",
    "embedding.position_embeddings.weight": "embedding.position.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "decoder.final_layernorm.bias": "final_norm.bias",
    "output_layer.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "input_norm",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.linear_proj": "attention.output",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp.up",
    "mlp.linear_fc2": "mlp.down",
}
_VOCAB_ROWS = ("embedding.word.weight", "output.weight")


def padded_vocab_size(model: ModelConfig, tensor_parallel: int) -> int:
    """Rows of the embedding once padded so that every tensor rank holds equally many."""
    multiple = VOCAB_MULTIPLE * tensor_parallel
    return -(-model.vocab_size // multiple) * multiple


def logical_name(megatron_name: str, layers: range, tied: bool) -> str:
    """`decoder.layers.0.mlp.linear_fc2.weight` in a chunk that holds `layers` -> `layers.6.mlp.down.weight`."""
    if tied and megatron_name == "output_layer.weight":
        return "embedding.word.weight"
    if megatron_name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[megatron_name]
    _, _, index, rest = megatron_name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"layers.{layers[int(index)]}.{_IN_LAYER[module]}.{kind}"


def split_dimension(name: str) -> int | None:
    """The dimension along which tensor ranks share out the logical tensor `name`; None: each holds all of it."""
    if name in _VOCAB_ROWS or any(part in name for part in (".attention.qkv.", ".mlp.up.", ".mlp.gate.")):
        return 0
    return 1 if name.endswith((".attention.output.weight", ".mlp.down.weight")) else None


def pieces_of(name: str, model: ModelConfig, layout: Layout, tensor_rank: int) -> list[Piece]:
    """What the local tensor behind logical `name` holds on `tensor_rank`.

    A SwiGLU up-projection is stored by Megatron as this rank's gate rows, then its up rows: two pieces. Rows of padded
    vocabulary belong to no piece.
    """
    shapes = logical_shapes(model)
    if model.activation == "swiglu" and ".mlp.up." in name:
        gate = name.replace(".mlp.up.", ".mlp.gate.")
        rows = shapes[name][0] // layout.tensor
        return [
            _row_piece(gate, shapes[gate], rows, tensor_rank, first_local_row=0),
            _row_piece(name, shapes[name], rows, tensor_rank, first_local_row=rows),
        ]
    shape = shapes[name]
    if name in _VOCAB_ROWS:
        rows = padded_vocab_size(model, layout.tensor) // layout.tensor
        return [_row_piece(name, shape, rows, tensor_rank, first_local_row=0)]
    match split_dimension(name):
        case 0:
            return [_row_piece(name, shape, shape[0] // layout.tensor, tensor_rank, first_local_row=0)]
        case 1:
            columns = shape[1] // layout.tensor
            box = Box((0, tensor_rank * columns), (shape[0], (tensor_rank + 1) * columns))
            return [Piece(name, shape, box, (0, shape[0]))]
    return [Piece(name, shape, Box.whole(shape), (0, shape[0]))]


def _row_piece(name: str, shape: tuple[int, ...], rows: int, tensor_rank: int, first_local_row: int) -> Piece:
    start = min(tensor_rank * rows, shape[0])
    stop = min(start + rows, shape[0])
    rest = shape[1:]
    box = Box((start, *(0 for _ in rest)), (stop, *rest))
    return Piece(name, shape, box, (first_local_row, first_local_row + stop - start))
