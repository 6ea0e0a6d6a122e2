"""Which part of a logical tensor each piece of a rank's memory holds, in integers only.

Knows boxes, flat ranges and how a local tensor is made of pieces of logical ones. Must not know torch, files, ranks or
which parallelism made the pieces: whoever shards a tensor describes it with `Piece`s, and the rest follows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """The indices start[d] <= i[d] < stop[d] of a tensor. With no dimensions: the one element of a scalar."""

    start: Shape
    stop: Shape

    def __post_init__(self) -> None:
        fits = len(self.start) == len(self.stop)
        if not fits or any(not 0 <= a <= b for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"not a box: start {self.start}, stop {self.stop}; every 0 <= start <= stop")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """All of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Shape:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def intersect(self, other: "Box") -> "Box | None":
        """The elements in both; None where there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def contains(self, other: "Box") -> bool:
        """Whether every element of `other` is in this box."""
        lower = all(a <= b for a, b in zip(self.start, other.start, strict=True))
        return lower and all(a >= b for a, b in zip(self.stop, other.stop, strict=True))

    def shift(self, offset: Sequence[int]) -> "Box":
        """The same box moved by `offset`, which may be negative."""
        return Box(
            tuple(a + by for a, by in zip(self.start, offset, strict=True)),
            tuple(b + by for b, by in zip(self.stop, offset, strict=True)),
        )

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """To index a tensor whose first element sits at `origin` of the logical tensor (default: zeros)."""
        origin = origin if origin is not None else (0,) * len(self.start)
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True))


@dataclass(frozen=True)
class Piece:
    """Rows `local_rows` (first, after the last, along dimension 0) of a local tensor hold `box` of the logical tensor
    `name`, whose whole shape is `shape`. A local scalar counts as one row. Local rows of no piece are padding."""

    name: str
    shape: Shape
    box: Box
    local_rows: tuple[int, int]


@dataclass(frozen=True)
class FlatFragment:
    """Elements [start, stop) of a flat range hold, contiguously and row-major, `box` of logical tensor `name`."""

    name: str
    shape: Shape
    box: Box
    start: int
    stop: int


def boxes_of_flat_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a row-major tensor as the fewest boxes that are each contiguous in it, in order."""
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(
            f"range {start}:{stop} is not inside a tensor of shape {tuple(shape)} ({prod(shape)} elements)"
        )
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    width = prod(shape[1:])
    row, column = divmod(start, width)
    last_row, last_column = divmod(stop, width)
    if row == last_row:
        return _boxes_in_row(shape, row, column, last_column)
    boxes = []
    if column:
        boxes += _boxes_in_row(shape, row, column, width)
        row += 1
    if row < last_row:
        boxes.append(Box((row,) + (0,) * (len(shape) - 1), (last_row, *shape[1:])))
    if last_column:
        boxes += _boxes_in_row(shape, last_row, 0, last_column)
    return boxes


def cut_in_order(box: Box, most: int) -> Iterator[Box]:
    """The box in parts of at most `most` elements, each contiguous in it, in row-major order."""
    if box.size <= most:
        yield box
        return
    (first, *start), (last, *stop) = box.start, box.stop
    row = Box(tuple(start), tuple(stop))
    rows = most // row.size
    for low in range(first, last, max(1, rows)):
        if rows:
            yield Box((low, *start), (min(low + rows, last), *stop))
        else:
            for inner in cut_in_order(row, most):
                yield Box((low, *inner.start), (low + 1, *inner.stop))


def flat_start(outer: Box, inner: Box) -> int | None:
    """Where in a row-major `outer` the elements of `inner`, a box within it, begin; None where they do not lie
    together."""
    start, is_long = 0, False
    for low, high, first, last in zip(outer.start, outer.stop, inner.start, inner.stop, strict=True):
        if is_long and (first, last) != (low, high):
            return None
        is_long = is_long or last - first > 1
        start = start * (high - low) + first - low
    return start


def fragments_of_range(
    local_shape: Sequence[int], pieces: Iterable[Piece], start: int, stop: int
) -> list[FlatFragment]:
    """What elements [start, stop) of a flattened local tensor hold; positions are relative to `start`, in order.

    Raises ValueError where a piece does not fit the local tensor it is said to be part of.
    """
    if not 0 <= start <= stop <= prod(local_shape):
        raise ValueError(f"range {start}:{stop} is not inside a local tensor of shape {tuple(local_shape)}")
    width = prod(local_shape[1:])
    fragments = []
    for piece in sorted(pieces, key=lambda piece: piece.local_rows):
        _check_piece(local_shape, piece)
        first = piece.local_rows[0] * width
        low, high = max(start, first), min(stop, piece.local_rows[1] * width)
        if low >= high:
            continue
        position = low - start
        for box in boxes_of_flat_range(piece.box.shape, low - first, high - first):
            after = position + box.size
            fragments.append(FlatFragment(piece.name, piece.shape, box.shift(piece.box.start), position, after))
            position = after
    return fragments


def overlap_or_gap(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """None where the boxes cover every element of the tensor exactly once, else what is wrong, for people.

    Sweeps along dimension 0, so each box meets only those that share rows with it.
    """
    whole = Box.whole(shape)
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.start):
        if len(box.start) != len(shape) or not whole.contains(box) or not box.size:
            return f"box {render_box(box)} is empty or outside shape {list(shape)}"
        active = [earlier for earlier in active if not shape or earlier.stop[0] > box.start[0]]
        for earlier in active:
            if earlier.intersect(box) is not None:
                return f"boxes {render_box(earlier)} and {render_box(box)} overlap"
        active.append(box)
    covered = sum(box.size for box in boxes)
    if covered != whole.size:
        return f"only {covered} of {whole.size} elements are there"
    return None


def render_box(box: Box) -> str:
    """`[0:4,8:16]`, as one would index."""
    return "[" + ",".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True)) + "]"


def _boxes_in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    inner = boxes_of_flat_range(shape[1:], start, stop)
    return [Box((row, *box.start), (row + 1, *box.stop)) for box in inner]


def _check_piece(local_shape: Sequence[int], piece: Piece) -> None:
    first, after = piece.local_rows
    rows = local_shape[0] if local_shape else 1
    held = (after - first, *local_shape[1:]) if local_shape else ()
    if not (0 <= first <= after <= rows and piece.box.shape == held and Box.whole(piece.shape).contains(piece.box)):
        raise ValueError(
            f"piece {piece.name} {render_box(piece.box)} of shape {piece.shape} does not fit rows {first}:{after} "
            f"of a local tensor of shape {tuple(local_shape)}"
        )
