"""Our models as llama.cpp's: the architecture that computes the same, its tensors in a GGUF file, and their proof.

Knows names, metadata and the order in which llama.cpp rotates; which rows of ours a tensor is made of is
`tensors.py`'s, how the file lies `gguf_file.py`'s. Must not know torch: one tensor at a time, and never loads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gptdist.checkpoint.logical import Box
from gptdist.config.sections import ModelConfig
from gptdist.errors import ExchangeError, NotConformant
from gptdist.exchange.dialect import Dialect, Names
from gptdist.exchange.gguf_file import (
    BLOCK,
    DTYPES,
    Field,
    GgufFile,
    GgufWriter,
    Shape,
    decode,
    encode,
    row_pieces,
    stored_bytes,
)
from gptdist.exchange.gguf_vocabulary import Vocabulary
from gptdist.exchange.tensors import PREFIX, HFTensor, LogicalView, TensorSource, hf_array, hf_tensors
from gptdist.model.parameters import logical_shapes

# What a model must be for an architecture to compute the same: its "gelu" is the tanh approximation, in all of them.
_FITS = {
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": "gelu_tanh"},
    "gptneox": {"norm": "layernorm", "position": "rotary", "activation": "gelu_tanh"},
    "llama": {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu"},
}
_CLASSIC = Names(
    base="",
    word="token_embd",
    position="position_embd",
    final_norm="output_norm",
    output="output",
    layers="blk",
    layer={
        "input_norm": "attn_norm",
        "mlp_norm": "ffn_norm",
        "attention.output": "attn_output",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
    },
    qkv=("attn_qkv",),
)
_NAMES = {
    "gpt2": _CLASSIC,
    "gptneox": replace(_CLASSIC, position=None),
    "llama": replace(
        _CLASSIC, position=None, layer={**_CLASSIC.layer, "mlp.gate": "ffn_gate"}, qkv=("attn_q", "attn_k", "attn_v")
    ),
}
# What llama.cpp rotates by neighbours (rows 0 and 1 of a head, 2 and 3...), we by halves (0 and size / 2, ...).
_BY_NEIGHBOURS = ("attn_q", "attn_k")
_TIED_OUTPUT = "output.weight"


@dataclass(frozen=True)
class _GgufDialect(Dialect):
    """An architecture of llama.cpp's."""

    @property
    def names(self) -> Names:
        return _NAMES[self.kind]


def gguf_architecture(model: ModelConfig) -> str:
    """llama.cpp's name of the architecture that computes what `model` does. Raises ExchangeError where none does."""
    reasons = []
    for kind, needs in _FITS.items():
        misfits = [
            f"model.{key} {needed} (here {getattr(model, key)})"
            for key, needed in needs.items()
            if getattr(model, key) != needed
        ]
        if not misfits:
            return kind
        reasons.append(f"{kind} needs {' and '.join(misfits)}")
    raise ExchangeError(
        f"No architecture of llama.cpp computes what this model does: {'; '.join(reasons)}. There is no GGUF export "
        "of it; a model to be exported has to be trained with settings that one of them has."
    )


def gguf_tensors(model: ModelConfig) -> list[HFTensor]:
    """The tensors of the file in network order, and the rows of ours that each is made of (before `_by_neighbours`)."""
    kind = gguf_architecture(model)
    biases = model.bias or kind != "llama"
    dialect = _GgufDialect(kind, biases, biases, biases, positions=model.sequence_length)
    tensors = hf_tensors(model, dialect)
    if kind == "gptneox" and model.tie_embeddings:  # the one that must have an output of its own
        tensors.append(replace(tensors[0], name=_TIED_OUTPUT))
    return tensors


def stored_dtypes(model: ModelConfig, dtype: str) -> dict[str, str]:
    """Tensor -> its numbers. Norms, biases and position embeddings are fp32 in any file, as llama.cpp wants them.

    Raises ExchangeError for a dtype that there is not, and for rows that the blocks of Q8_0 do not fill.
    """
    if dtype not in DTYPES:
        raise ExchangeError(f"A GGUF file cannot have weights of {dtype}. Use --dtype {', '.join(DTYPES)}.")
    dtypes = {}
    for tensor in gguf_tensors(model):
        matrix = len(tensor.shape) == 2 and tensor.name != "position_embd.weight"
        if matrix and dtype == "q8_0" and tensor.shape[1] % BLOCK:
            raise ExchangeError(
                f"q8_0 keeps one scale for each {BLOCK} numbers of a row, and the rows of {tensor.parts[0].name} have "
                f"{tensor.shape[1]}. Export with --dtype fp16 or bf16."
            )
        dtypes[tensor.name] = dtype if matrix else "fp32"
    return dtypes


def gguf_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of all tensors, but for a few of alignment."""
    dtypes = stored_dtypes(model, dtype)
    return sum(stored_bytes(tensor.shape, dtypes[tensor.name]) for tensor in gguf_tensors(model))


def gguf_fields(model: ModelConfig) -> dict[str, Field]:
    """The metadata from which llama.cpp builds the network."""
    kind = gguf_architecture(model)
    fields: dict[str, Field] = {
        "vocab_size": model.vocab_size,
        "context_length": model.sequence_length,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.ffn_size,
        "block_count": model.num_layers,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.kv_heads,
    }
    of_norm = "layer_norm_rms_epsilon" if model.norm == "rmsnorm" else "layer_norm_epsilon"
    fields[f"attention.{of_norm}"] = model.norm_epsilon
    if model.position == "rotary":
        fields |= {"rope.dimension_count": model.head_size, "rope.freq_base": float(model.rotary_base)}
    if kind == "gptneox":
        fields["use_parallel_residual"] = False
    return {f"{kind}.{key}": value for key, value in fields.items()}


def write_gguf(
    path: Path,
    source: TensorSource,
    model: ModelConfig,
    vocabulary: Vocabulary,
    dtype: str = "fp32",
    about: Mapping[str, Field] | None = None,
) -> None:
    """Write the weights of `source` to `path`, one tensor in memory at a time, and sync. `about`: more metadata.

    Raises ExchangeError for a model or a number that the format cannot hold; then no file is left.
    """
    dtypes = stored_dtypes(model, dtype)
    tensors = gguf_tensors(model)
    plan = {tensor.name: (tensor.shape, dtypes[tensor.name]) for tensor in tensors}
    fields = {**(about or {}), **gguf_fields(model)}
    try:
        with GgufWriter(path, gguf_architecture(model), plan, fields, vocabulary, dtype) as writer:
            for tensor in tensors:
                if tensor.name == _TIED_OUTPUT and model.tie_embeddings:
                    continue
                array = hf_array(source, tensor)
                order = _by_neighbours(tensor.name, tensor.shape, model)
                writer.put(tensor.name, array if order is None else array[order])
                if tensor is tensors[0] and tensors[-1].name == _TIED_OUTPUT and model.tie_embeddings:
                    writer.put(_TIED_OUTPUT, array)  # now, so that each tensor of ours is read once
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class GgufWeights:
    """The tensors of a file as `tensors.py` reads them: fp32, queries and keys in the order of halves."""

    def __init__(self, file: GgufFile, model: ModelConfig) -> None:
        self._file = file
        self._model = model

    def read_into(self, out: np.ndarray, name: str, where: tuple[slice, ...]) -> None:
        """Fill `out` with a part of the tensor `name`."""
        rows, *columns = where
        order = _by_neighbours(name, self._file.shape(name), self._model)
        places = rows if order is None else np.argsort(order)[rows]
        out[...] = self._file.read(name, places)[(slice(None), *columns)]


def gguf_view(file: GgufFile, model: ModelConfig) -> LogicalView:
    """The weights of a file under our names: what a network loads to compute with what was exported."""
    return LogicalView(model, gguf_tensors(model), GgufWeights(file, model))


def check_gguf(path: Path, source: TensorSource, model: ModelConfig, dtype: str, about: Mapping[str, Field]) -> None:
    """Read a file back and compare it, bit by bit, with what `source` gives in `dtype`, under our names.

    Raises NotConformant with the first tensor or field that differs.
    """
    dtypes = stored_dtypes(model, dtype)
    tensors = gguf_tensors(model)
    planned = {tensor.name: (tensor.shape, dtypes[tensor.name]) for tensor in tensors}
    with GgufFile(path) as file:
        held = {name: (file.shape(name), file.dtype(name)) for name in file.names()}
        for name in sorted(held.keys() | planned.keys()):
            if held.get(name) != planned.get(name):
                raise NotConformant(f"{path}: tensor {name} is {held.get(name)}, and should be {planned.get(name)}.")
        for key, value in {**about, **gguf_fields(model)}.items():
            found = file.field(key)
            if found != (float(np.float32(value)) if isinstance(value, float) else value):
                raise NotConformant(f"{path}: {key} is {found!r}, and should be {value!r}.")
        for tensor in tensors:
            if not tensor.parts and file.read(tensor.name).any():
                raise NotConformant(f"{path}: {tensor.name} is not zero, and the model has no such bias.")
        dtype_of = {part.name: dtypes[tensor.name] for tensor in tensors for part in tensor.parts}
        view = gguf_view(file, model)
        for name, shape in logical_shapes(model).items():
            _compare(path, name, shape, source, view, dtype_of[name])


def _compare(path: Path, name: str, shape: Shape, source: TensorSource, view: LogicalView, dtype: str) -> None:
    for rows in row_pieces(shape):
        box = Box((rows.start, *(0 for _ in shape[1:])), (rows.stop, *shape[1:]))
        numbers = np.asarray(source.read(PREFIX + name, box), dtype=np.float32)
        wanted, found = decode(encode(numbers, dtype), dtype), view.read(PREFIX + name, box)
        differ = wanted.view(np.uint32) != found.view(np.uint32)
        if differ.any():
            place = int(np.argmax(differ.reshape(-1)))
            raise NotConformant(
                f"{path}: {name} is not what the checkpoint has: the first of {int(differ.sum())} numbers that differ, "
                f"in rows {rows.start} to {rows.stop}, is {found.reshape(-1)[place]!r} and should be "
                f"{wanted.reshape(-1)[place]!r}."
            )


def _by_neighbours(name: str, shape: Shape, model: ModelConfig) -> np.ndarray | None:
    """Which of our rows each row of the file is; None: all as they are."""
    if not any(f".{rotated}." in name for rotated in _BY_NEIGHBOURS):
        return None
    halves = np.arange(shape[0]).reshape(-1, 2, model.head_size // 2)
    return halves.swapaxes(1, 2).reshape(-1)
