"""One GGUF file: its header and its tensors, written a tensor at a time, and read back a row at a time.

Knows the `gguf` library, whose only importer it is, and how the three kinds of numbers and Q8_0 lie. Knows nothing of
what the tensors mean; that is `gguf.py`.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np

from gptdist.errors import ExchangeError
from gptdist.exchange.gguf_vocabulary import Vocabulary

Shape = tuple[int, ...]
Field = str | int | float | bool

_TYPES = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
DTYPES = tuple(_TYPES)
# Numbers of Q8_0 that share one scale: a row must be made of whole blocks.
BLOCK = 32
_PIECE = 1 << 22  # numbers converted at a time


def encode(rows: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 [..., width] in `dtype`, as a file holds it: fp32 and fp16 as such, bf16 and q8_0 as bytes.

    Raises ExchangeError for numbers that are not finite, or that would not be.
    """
    kind = _TYPES[dtype][0]
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below; and blocks of all but nothing become 0
        stored: np.ndarray = gguf.quantize(np.ascontiguousarray(rows, dtype=np.float32), kind)
    if not np.isfinite(_largest(stored, dtype)):
        largest = np.abs(rows).max()
        if not np.isfinite(largest):
            raise ExchangeError("its numbers are not all finite: this checkpoint is of a run that diverged")
        raise ExchangeError(
            f"its largest number is {largest:g}, which {dtype} cannot hold. Export with --dtype fp32 or bf16"
        )
    return stored


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 [..., width] of what `encode` gives."""
    decoded: np.ndarray = gguf.dequantize(np.ascontiguousarray(stored), _TYPES[dtype][0])
    return decoded


def row_pieces(shape: Shape) -> list[slice]:
    """Rows, a few megabytes at a time, so that converting a tensor takes no second copy of it."""
    rows = max(1, _PIECE // math.prod(shape[1:]))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


class GgufWriter:
    """A file under way, synced at the end of `with`. Within, `put` each tensor of `tensors` once, in any order.

    `tensors`: name -> (shape, dtype). `fields` are metadata by their full key, of Python's types.
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        tensors: Mapping[str, tuple[Shape, str]],
        fields: Mapping[str, Field],
        vocabulary: Vocabulary,
        dtype: str,
    ) -> None:
        self._tensors = dict(tensors)
        self._missing = set(tensors)
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(int(_TYPES[dtype][1]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in fields.items():
            _add_field(writer, key, value)
        _add_vocabulary(writer, vocabulary)
        self._offsets: dict[str, int] = {}
        offset = 0
        for name, (shape, kind) in tensors.items():
            size = stored_bytes(shape, kind)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=_TYPES[kind][0])
            self._offsets[name] = offset
            offset += gguf.GGUFWriter.ggml_pad(size, writer.data_alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        self._file = writer.fout[0]
        self._start = gguf.GGUFWriter.ggml_pad(self._file.tell(), writer.data_alignment)
        self._file.truncate(self._start + offset)

    def put(self, name: str, array: np.ndarray) -> None:
        """Write one tensor, fp32 of its shape."""
        shape, dtype = self._tensors[name]
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape}")
        self._missing.remove(name)
        self._file.seek(self._start + self._offsets[name])
        for rows in row_pieces(shape):
            try:
                encode(array[rows], dtype).tofile(self._file)
            except ExchangeError as error:
                raise ExchangeError(f"{name} cannot be exported as it is: {error}.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Sync and close. Raises ValueError where a tensor was never put."""
        with self._file:
            if kind is not None:
                return
            if self._missing:
                raise ValueError(f"never written: {', '.join(sorted(self._missing))}")
            self._file.flush()
            os.fsync(self._file.fileno())


class GgufFile:
    """A file's tensors and metadata, mapped. Raises ExchangeError for a file that cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ExchangeError(f"{path} is no GGUF file that can be read: {error}.") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._dtypes = {kind: name for name, (kind, _) in _TYPES.items()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> Shape:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> str:
        return self._dtypes[self._tensors[name].tensor_type]

    def data_ranges(self) -> list[tuple[int, int]]:
        """Where in the file each tensor's numbers are, in bytes."""
        return [
            (int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)) for tensor in self._tensors.values()
        ]

    def field(self, key: str) -> Any:
        """A metadata value; None where there is none."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def read(self, name: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Rows of a tensor, as fp32."""
        return decode(self._tensors[name].data[rows], self.dtype(name))

    def close(self) -> None:
        """Unmap."""
        self._tensors.clear()
        self._reader.tensors.clear()
        self._reader.fields.clear()
        del self._reader.data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def stored_bytes(shape: Shape, dtype: str) -> int:
    """Of a tensor in a file."""
    numbers, size = gguf.GGML_QUANT_SIZES[_TYPES[dtype][0]]
    return math.prod(shape) // numbers * size


def _largest(stored: np.ndarray, dtype: str) -> float:
    """Of the numbers as stored, the largest by magnitude, or of Q8_0 the largest scale; infinite or not is asked."""
    if dtype == "bf16":
        values = stored.view(np.uint16).astype(np.uint32) << 16
        return float(np.abs(values.view(np.float32)).max(initial=0))
    if dtype == "q8_0":
        scales = np.ascontiguousarray(stored.reshape(-1, 2 + BLOCK)[:, :2]).view(np.float16)
        return float(scales.max(initial=0))
    return float(np.abs(stored).max(initial=0))


def _add_field(writer: gguf.GGUFWriter, key: str, value: Field) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        # llama.cpp asks for the sizes of a model as 32 bits; anything else may be larger.
        (writer.add_uint64 if key.startswith("gptdist.") else writer.add_uint32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    if not vocabulary.pre_tokenizer:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    # A document begins where another ended; nothing is put before a prompt that the user did not write.
    writer.add_bos_token_id(vocabulary.end_of_text)
    writer.add_eos_token_id(vocabulary.end_of_text)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
