"""A model's weights as Hugging Face's tools read them: safetensors files of bounded size and their index.

Streams: a few megabytes of a tensor at a time, or one tensor where it lies transposed. Knows no torch. Every byte that
is read is digested, and compared with what the checkpoint says of itself, so nothing need be verified before.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from gptdist.checkpoint.digest import add_digests, partial_digest, render_digest
from gptdist.checkpoint.fragment import FragmentPlace, numpy_dtype
from gptdist.checkpoint.logical import Box, Shape
from gptdist.checkpoint.tensor_file import write_tensor_stream
from gptdist.config.sections import ModelConfig
from gptdist.durable import write_durably
from gptdist.errors import CheckpointError, ExchangeError
from gptdist.exchange.architecture import exported_dialect
from gptdist.exchange.numbers import in_rows, narrow
from gptdist.exchange.read_hf import INDEX, SINGLE
from gptdist.exchange.tensors import HFTensor, hf_array, hf_part, hf_tensors


class WeightSource(Protocol):
    """An open checkpoint."""

    def names(self, prefix: str = "") -> list[str]: ...
    def shape(self, name: str) -> Shape: ...
    def dtype(self, name: str) -> str: ...
    def digest(self, name: str) -> str: ...
    def read(self, name: str, box: Box | None = None, out: np.ndarray | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class WrittenWeights:
    """What was written. `tensors`: name -> dtype, shape and digest; `files`: name -> bytes and sha256."""

    tensors: dict[str, dict] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    file: str
    tensors: tuple[HFTensor, ...]


def plan_shards(model: ModelConfig, dtype: str, max_bytes: int) -> list[Shard]:
    """The files, filled in order with whole tensors; a tensor larger than `max_bytes` has a file of its own."""
    groups: list[list[HFTensor]] = [[]]
    size = 0
    for tensor in hf_tensors(model, exported_dialect(model)):
        needed = _place(tensor, dtype).bytes
        if groups[-1] and size + needed > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += needed
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{n:05d}-of-{count:05d}.safetensors", tuple(group)) for n, group in enumerate(groups, 1)]


def bytes_of(model: ModelConfig, dtype: str) -> int:
    """Bytes of all tensors."""
    return sum(_place(tensor, dtype).bytes for tensor in hf_tensors(model, exported_dialect(model)))


def write_weights(folder: Path, source: WeightSource, model: ModelConfig, dtype: str, max_bytes: int) -> WrittenWeights:
    """Write all tensors of `model` into `folder` as `dtype` (torch's name), and the index where there are several
    files.

    Raises CheckpointError where what was read is not what the checkpoint says it holds; ExchangeError for weights that
    are not finite, or that `dtype` cannot hold; OSError.
    """
    checked = CheckedSource(source)
    written = WrittenWeights()
    weight_map = {}
    for shard in plan_shards(model, dtype, max_bytes):
        reader = _Reader(checked, shard.tensors, dtype)
        places = [_place(tensor, dtype) for tensor in shard.tensors]
        result = write_tensor_stream(folder / shard.file, places, reader.read, plain=True)
        written.files[shard.file] = {"bytes": result.bytes, "sha256": result.sha256}
        for tensor in shard.tensors:
            weight_map[tensor.name] = shard.file
            digest = render_digest(result.digests[tensor.name])
            written.tensors[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "digest": digest}
    checked.compare()
    if len(written.files) > 1:
        index = {"metadata": {"total_size": bytes_of(model, dtype)}, "weight_map": weight_map}
        write_durably(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    return written


class _Reader:
    """Parts of the tensors of one file, in the order in which they are written."""

    def __init__(self, source: "CheckedSource", tensors: tuple[HFTensor, ...], dtype: str) -> None:
        self._source = source
        self._dtype = dtype
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._turned: tuple[str, np.ndarray] | None = None  # the last transposed tensor

    def read(self, place: FragmentPlace, part: Box) -> np.ndarray:
        tensor = self._tensors[place.name]
        if not tensor.transposed:
            values = hf_part(self._source, tensor, part)
        else:
            if self._turned is None or self._turned[0] != tensor.name:
                self._turned = None  # not two at a time
                self._turned = (tensor.name, hf_array(self._source, tensor))
            values = self._turned[1][part.slices()]
        return self._narrowed(values, tensor.name)

    def _narrowed(self, values: np.ndarray, name: str) -> np.ndarray:
        values = in_rows(values)  # a copy where it is transposed; else read for this alone
        bits = values if self._dtype == "float32" else narrow(values, self._dtype)
        if not _all_finite(bits, self._dtype):
            if not np.isfinite(values).all():
                raise ExchangeError(
                    f"the weights that become {name} are not all finite: this checkpoint is of a run that diverged. "
                    "Export an earlier one."
                )
            raise ExchangeError(
                f"the weights that become {name} reach {np.abs(values).max():.6g}, which {self._dtype} cannot hold. "
                "Export with --dtype bf16 or fp32."
            )
        return bits


class CheckedSource:
    """A source that digests what is read from it; every element is read once."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._digests: dict[str, int] = {}

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        if self._source.dtype(name) != "float32":
            raise ExchangeError(f"tensor {name} of the checkpoint is {self._source.dtype(name)}, not float32.")
        shape = self._source.shape(name)
        box = box if box is not None else Box.whole(shape)
        values = self._source.read(name, box)
        self._digests[name] = add_digests((self._digests.get(name, 0), partial_digest(values, box, shape)))
        return values

    def compare(self) -> None:
        """Raises CheckpointError, naming the first tensor that is not what the checkpoint says."""
        for name, digest in sorted(self._digests.items()):
            if render_digest(digest) != self._source.digest(name):
                raise CheckpointError(
                    f"tensor {name} has digest {render_digest(digest)}, the manifest says {self._source.digest(name)}: "
                    "a file of the checkpoint is damaged."
                )


def _place(tensor: HFTensor, dtype: str) -> FragmentPlace:
    return FragmentPlace(tensor.name, tensor.shape, Box.whole(tensor.shape), dtype)


def _all_finite(bits: np.ndarray, dtype: str) -> bool:
    if dtype != "bfloat16":
        return bool(np.isfinite(bits).all())
    assert bits.dtype == numpy_dtype(dtype)
    return not bool(((bits & 0x7F80) == 0x7F80).any())
