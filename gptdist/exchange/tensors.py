"""Our logical tensors as Hugging Face's, and theirs as ours: one table of rows, read in both directions.

Knows numpy, a model and a dialect; a source of tensors is anything with `read(name, box)` that has `weight/...`. Must
not know torch: conversion runs in a process that never loads it, and holds one tensor at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from gptdist.checkpoint.logical import Box, Shape, render_box
from gptdist.config.sections import ModelConfig
from gptdist.exchange.architecture import exported_dialect
from gptdist.exchange.dialect import Dialect
from gptdist.model.parameters import logical_shapes

PREFIX = "weight/"


class TensorSource(Protocol):
    """What logical tensors are read from: a checkpoint, a folder of Hugging Face's."""

    def read(self, name: str, box: Box | None = None) -> Any:
        """`box` (default: all) of the logical tensor `name`, as something that numpy makes an array of."""
        ...


@dataclass(frozen=True)
class Part:
    """Rows `ours` and on of the logical tensor `name` (without `weight/`) are `count` rows `theirs` and on of a tensor
    of theirs, times `scale`."""

    name: str
    ours: int
    theirs: int
    count: int
    scale: float = 1.0


@dataclass(frozen=True)
class HFTensor:
    """A tensor of theirs: `shape` as in their files, rows counted before `transposed` turns them into columns.

    Without parts it is zero: a bias that ours has not.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    transposed: bool = False

    @cached_property
    def rows_first(self) -> Shape:
        """The shape as ours has it: (outputs, inputs)."""
        return tuple(reversed(self.shape)) if self.transposed else self.shape


def hf_tensors(model: ModelConfig, dialect: Dialect) -> list[HFTensor]:
    """Every tensor of `model` in `dialect`, in network order."""
    names = dialect.names
    shapes = logical_shapes(model)
    tensors = [_whole(names.base + names.word + ".weight", "embedding.word.weight", shapes)]
    if names.position:
        part = Part("embedding.position.weight", 0, 0, model.sequence_length)
        shape = (dialect.positions, model.hidden_size)
        tensors.append(HFTensor(f"{names.base}{names.position}.weight", shape, (part,)))
    for layer in range(model.num_layers):
        tensors += _layer(model, dialect, f"layers.{layer}", f"{names.base}{names.layers}.{layer}", shapes)
    tensors += _norm(f"{names.base}{names.final_norm}", "final_norm", shapes)
    if not model.tie_embeddings:
        tensors.append(_whole(f"{names.output}.weight", "output.weight", shapes))
    return tensors


def stream_hf_tensors(
    source: TensorSource, model: ModelConfig, dialect: Dialect | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, fp32 array) of every tensor in the architecture that `model` is exported to, one at a time.

    An array may be a transposed view; it is the caller's until the next one is asked for.
    """
    for tensor in hf_tensors(model, dialect or exported_dialect(model)):
        yield tensor.name, hf_array(source, tensor)


def hf_array(source: TensorSource, tensor: HFTensor) -> np.ndarray:
    """One tensor of theirs, fp32, made from ours; transposed it is a view."""
    array = _rows_first(source, tensor, Box.whole(tensor.rows_first))
    return array.T if tensor.transposed else array


def hf_part(source: TensorSource, tensor: HFTensor, box: Box) -> np.ndarray:
    """`box` of one tensor of theirs, fp32."""
    if not tensor.transposed:
        return _rows_first(source, tensor, box)
    return _rows_first(source, tensor, Box(box.start[::-1], box.stop[::-1])).T


def _rows_first(source: TensorSource, tensor: HFTensor, box: Box) -> np.ndarray:
    """`box` of a tensor as it is before it is transposed."""

    def read(part: Part, first: int, last: int) -> np.ndarray:
        """Rows of theirs, of one part."""
        shift = part.ours - part.theirs
        ours = Box((first + shift, *box.start[1:]), (last + shift, *box.stop[1:]))
        rows = np.asarray(source.read(PREFIX + part.name, ours), dtype=np.float32)
        return rows if part.scale == 1.0 else rows / np.float32(part.scale)

    first, last = box.start[0], box.stop[0]
    array: np.ndarray | None = None
    for part in tensor.parts:
        low, high = max(first, part.theirs), min(last, part.theirs + part.count)
        if (low, high) == (first, last):
            return read(part, low, high)  # no second array to copy it into
        if low < high:
            array = np.zeros(box.shape, np.float32) if array is None else array
            array[low - first : high - first] = read(part, low, high)
    return np.zeros(box.shape, np.float32) if array is None else array


class LogicalView:
    """Boxes of our logical tensors out of theirs. `theirs`: reads a part of one, by name and slices, as fp32."""

    def __init__(self, model: ModelConfig, tensors: Sequence[HFTensor], theirs: "TheirTensors") -> None:
        self._theirs = theirs
        self._shapes = {PREFIX + name: shape for name, shape in logical_shapes(model).items()}
        self._parts: dict[str, list[tuple[HFTensor, Part]]] = {name: [] for name in self._shapes}
        for tensor in tensors:
            for part in tensor.parts:
                self._parts[PREFIX + part.name].append((tensor, part))

    def names(self, prefix: str = "") -> list[str]:
        """Logical tensors whose name starts with `prefix`, sorted; all are `weight/...`."""
        return sorted(name for name in self._shapes if name.startswith(prefix))

    def shape(self, name: str) -> Shape:
        """Of the whole logical tensor. Raises KeyError for one that is not there."""
        return self._shapes[name]

    def read(self, name: str, box: Box | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """`box` (default: all) of a logical tensor, fp32, the caller's own; `out`: an array to fill instead.

        What theirs has not, a bias, is zero.
        """
        whole = Box.whole(self._shapes[name])
        box = box if box is not None else whole
        if len(box.start) != len(whole.start) or not whole.contains(box):
            raise ValueError(f"box {render_box(box)} is outside {name}, whose shape is {list(whole.stop)}")
        if out is None:
            out = np.empty(box.shape, np.float32)
        if not self._parts[name]:
            out[...] = 0.0
        for tensor, part in self._parts[name]:
            first, last = max(box.start[0], part.ours), min(box.stop[0], part.ours + part.count)
            if first >= last:
                continue
            columns = box.slices()[1:]
            rows = slice(first - part.ours + part.theirs, last - part.ours + part.theirs)
            into = out[first - box.start[0] : last - box.start[0]]
            if tensor.transposed:
                self._theirs.read_into(into.T, tensor.name, (*columns, rows))
            else:
                self._theirs.read_into(into, tensor.name, (rows, *columns))
            if part.scale != 1.0:
                into *= np.float32(part.scale)
        return out


class TheirTensors(Protocol):
    """Tensors by their own names."""

    def read_into(self, out: np.ndarray, name: str, where: tuple[slice, ...]) -> None:
        """Fill fp32 `out`, which may be strided, with a part of the tensor `name`."""
        ...


def _layer(
    model: ModelConfig, dialect: Dialect, ours: str, theirs: str, shapes: dict[str, Shape]
) -> Iterator[HFTensor]:
    names = dialect.names

    def linear(module: str, has_bias: bool) -> Iterator[HFTensor]:
        their, our = f"{theirs}.{names.layer[module]}", f"{ours}.{module}"
        yield _whole(f"{their}.weight", f"{our}.weight", shapes, names.transposed)
        if has_bias:
            yield _bias(f"{their}.bias", f"{our}.bias", shapes[f"{our}.weight"][0], shapes)

    yield from _norm(f"{theirs}.{names.layer['input_norm']}", f"{ours}.input_norm", shapes)
    yield from _query_key_value(model, dialect, f"{ours}.attention.qkv", theirs, shapes)
    yield from linear("attention.output", dialect.output_bias)
    yield from _norm(f"{theirs}.{names.layer['mlp_norm']}", f"{ours}.mlp_norm", shapes)
    for module in ("mlp.gate", "mlp.up", "mlp.down"):
        if module in names.layer:
            yield from linear(module, dialect.mlp_bias)


def _query_key_value(
    model: ModelConfig, dialect: Dialect, ours: str, theirs: str, shapes: dict[str, Shape]
) -> Iterator[HFTensor]:
    """The attention's input projection: one tensor of theirs or three, and rows in our order or in theirs."""
    names = dialect.names
    queries, head, groups = model.num_heads // model.kv_heads, model.head_size, model.kv_heads
    sizes: tuple[int, ...] = (model.num_heads * head, groups * head, groups * head)
    first_of = (0, sizes[0], sizes[0] + sizes[1]) if len(names.qkv) == 1 else (0, 0, 0)
    kinds = ("weight", "bias") if dialect.qkv_bias else ("weight",)
    for kind in kinds:
        name = f"{ours}.{kind}"
        parts: list[list[Part]] = [[], [], []]
        for group in range(groups):
            row = group * (queries + 2) * head
            for place, count in enumerate((queries * head, head, head)):
                scale = dialect.query_scale if place == 0 else 1.0
                parts[place].append(Part(name, row, first_of[place] + group * count, count, scale))
                row += count
        rows = sum(sizes)
        if names.grouped:
            parts = [[Part(name, 0, 0, rows)]]
        elif len(names.qkv) == 1:
            parts = [[part for of_one_kind in parts for part in of_one_kind]]
        tensor_rows = sizes if len(names.qkv) > 1 else (rows,)
        transposed = names.transposed and kind == "weight"
        for their, size, own in zip(names.qkv, tensor_rows, parts, strict=True):
            rest = (model.hidden_size,) if kind == "weight" else ()
            shape = (*rest, size) if transposed else (size, *rest)
            yield HFTensor(f"{theirs}.{their}.{kind}", shape, tuple(own) if name in shapes else (), transposed)


def _whole(theirs: str, ours: str, shapes: dict[str, Shape], transposed: bool = False) -> HFTensor:
    shape = shapes[ours]
    part = Part(ours, 0, 0, shape[0])
    return HFTensor(theirs, tuple(reversed(shape)) if transposed else shape, (part,), transposed)


def _bias(theirs: str, ours: str, size: int, shapes: dict[str, Shape]) -> HFTensor:
    return _whole(theirs, ours, shapes) if ours in shapes else HFTensor(theirs, (size,), ())


def _norm(theirs: str, ours: str, shapes: dict[str, Shape]) -> Iterator[HFTensor]:
    for kind in ("weight", "bias"):
        if f"{ours}.{kind}" in shapes:
            yield _whole(f"{theirs}.{kind}", f"{ours}.{kind}", shapes)
