"""A safetensors file of anybody's, by memory map, in numpy alone; nothing in it can run or reach outside its file.

Knows the format (its README, "Format"): 8 bytes of length, a JSON header, the data. Must not know what tensors mean.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from gptdist.checkpoint.logical import Shape
from gptdist.errors import ExchangeError
from gptdist.exchange.numbers import BITS, widen_into

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LARGEST_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies; `dtype` is the format's name, of which DTYPES has those that can be read."""

    dtype: str
    shape: Shape
    start: int
    stop: int


class SafetensorsFile:
    """Raises ExchangeError, naming the file, where it is not of the format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                    raise ExchangeError(
                        f"{path} is no whole safetensors file: its header would be {length:,} bytes of {size:,}. "
                        "Fetch it again."
                    )
                header = json.loads(file.read(length))
            self.tensors = _tensors(header, size - 8 - length)
            self._bytes = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, "u1")
        except OSError as error:
            raise ExchangeError(f"cannot read {path}: {error.strerror or error}.") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ExchangeError(f"{path} is no whole safetensors file: {error}. Fetch it again.") from None

    def bits(self, name: str) -> np.ndarray:
        """The tensor as it is stored, a view of the map; bf16 as uint16."""
        stored = self.tensors[name]
        dtype = BITS[DTYPES[stored.dtype]]
        return self._bytes[stored.start : stored.stop].view(dtype).reshape(stored.shape)

    def read_into(self, out: np.ndarray, name: str, where: tuple[slice, ...]) -> None:
        """Fill fp32 `out` with a part of a tensor."""
        widen_into(out, self.bits(name)[where], DTYPES[self.tensors[name].dtype])


def _tensors(header: dict, data_bytes: int) -> dict[str, Stored]:
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
            raise ValueError(f"tensor {name} has sizes that are no counts")
        if not start <= stop <= data_bytes:
            raise ValueError(f"tensor {name} would end at byte {stop:,} of {data_bytes:,}")
        dtype = str(entry["dtype"])
        if dtype in DTYPES and prod(shape) * BITS[DTYPES[dtype]].itemsize != stop - start:
            raise ValueError(f"tensor {name} {list(shape)} of {dtype} does not take {stop - start:,} bytes")
        tensors[name] = Stored(dtype, shape, start, stop)
    return tensors
