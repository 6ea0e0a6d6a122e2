"""fp32, bf16 and fp16 into each other, in numpy, which has no bf16: its bits travel as uint16; and rows into columns.

Pure. Narrowing rounds to nearest, ties to even, as torch does; widening is exact.
"""

import numpy as np

# Names people give, torch's names, and the type of the bits.
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BITS: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}
_BLOCK = 1 << 20
_TILE = 128


def widen_into(out: np.ndarray, bits: np.ndarray, dtype: str) -> None:
    """Fill fp32 `out` with `bits`, which are numbers of `dtype` (torch's name). Either may be strided."""
    if dtype != "bfloat16":
        out[...] = bits
        return
    rows = max(1, _BLOCK * max(len(out), 1) // max(out.size, 1)) if out.ndim else 1
    for first in range(0, len(out), rows):
        wide = bits[first : first + rows].astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        out[first : first + rows] = wide.view(np.float32)


def in_rows(values: np.ndarray) -> np.ndarray:
    """`values` itself where its rows are contiguous, else a copy whose rows are."""
    if values.flags.c_contiguous:
        return values
    if values.ndim != 2:
        return np.ascontiguousarray(values)
    # numpy walks through a transposed array line by line; by tiles that fit a processor's cache it takes a fifth.
    out = np.empty(values.shape, values.dtype)
    for row in range(0, values.shape[0], _TILE):
        for column in range(0, values.shape[1], _TILE):
            tile = (slice(row, row + _TILE), slice(column, column + _TILE))
            out[tile] = values[tile]
    return out


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 `values` as contiguous bits of `dtype` (torch's name); what is too large becomes infinite."""
    if dtype == "bfloat16":
        return _to_bfloat16(values)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, BITS[dtype])


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 `values` rounded to `dtype`, as fp32 again."""
    if dtype == "float32":
        return values
    out = np.empty(values.shape, np.float32)
    widen_into(out.reshape(-1), narrow(values, dtype).reshape(-1), dtype)
    return out


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    result = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype("<u2")
    if not np.isfinite(values).all():
        # Rounding up the bits of a NaN could turn it into an infinity.
        nans = np.isnan(values)
        result[nans] = (bits[nans] >> 16).astype("<u2") | np.uint16(0x40)
    return result
