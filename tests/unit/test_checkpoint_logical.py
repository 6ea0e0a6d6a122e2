"""Boxes, flat ranges and pieces, against brute force over every element."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.checkpoint.logical import (
    Box,
    Piece,
    boxes_of_flat_range,
    fragments_of_range,
    overlap_or_gap,
    render_box,
)

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def shape_and_boxes(draw, count):
    shape = draw(SHAPES)
    boxes = []
    for _ in range(count):
        cuts = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
        boxes.append(Box(tuple(a for a, _ in cuts), tuple(b for _, b in cuts)))
    return shape, boxes


def cells(box):
    return set(product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


def number_of_runs(shape, box):
    """How many stretches of consecutive flat positions a box is."""
    flat = sorted(np.arange(int(np.prod(shape))).reshape(shape)[box.slices()].reshape(-1).tolist())
    return 1 + sum(b != a + 1 for a, b in pairwise(flat))


@given(shape_and_boxes(2))
def test_box_algebra_is_that_of_sets(case):
    _, (one, two) = case
    both = one.intersect(two)
    assert (cells(both) if both else set()) == cells(one) & cells(two)
    assert one.size == len(cells(one))
    if one.size and two.size:
        assert one.contains(two) == (cells(two) <= cells(one))
    assert one.shift(two.start).shift([-n for n in two.start]) == one


@pytest.mark.parametrize(("start", "stop"), [((0,), (1, 2)), ((3,), (2,)), ((-1,), (2,))])
def test_a_box_that_is_none_is_refused(start, stop):
    with pytest.raises(ValueError, match="not a box"):
        Box(start, stop)


@given(SHAPES, st.data())
def test_a_flat_range_is_its_boxes_in_order(shape, data):
    total = int(np.prod(shape))
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    flat = np.arange(total).reshape(shape)
    boxes = boxes_of_flat_range(shape, start, stop)
    held = [int(value) for box in boxes for value in flat[box.slices()].reshape(-1)]
    assert held == list(range(start, stop))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
def test_no_fewer_contiguous_boxes_would_do(shape):
    total = int(np.prod(shape))
    cuts = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    boxes = [Box(tuple(a for a, _ in sides), tuple(b for _, b in sides)) for sides in product(*cuts)]
    flat = np.arange(total).reshape(shape)
    runs = {(int(flat[box.start]), int(flat[box.start]) + box.size) for box in boxes if number_of_runs(shape, box) == 1}
    for start in range(total):
        fewest = {start: 0}
        for stop in range(start + 1, total + 1):
            fewest[stop] = 1 + min(fewest[a] for a in range(start, stop) if (a, stop) in runs)
            assert len(boxes_of_flat_range(shape, start, stop)) == fewest[stop]


def split(total, parts):
    return [(total * part // parts, total * (part + 1) // parts) for part in range(parts)]


@st.composite
def tensor_parallel_shards(draw):
    """(logical tensors, [(local shape, local values, pieces)]) as tensor-parallel ranks hold them."""
    kind = draw(st.sampled_from(["rows", "columns", "fused", "vocabulary", "whole", "bias", "scalar"]))
    parts = draw(st.integers(1, 3))
    rows, width = parts * draw(st.integers(1, 4)), parts * draw(st.integers(1, 4))
    shape = {"bias": (rows,), "scalar": ()}.get(kind, (rows, width))
    if kind == "vocabulary":
        shape = (draw(st.integers(1, rows)), width)
    names = ["gate", "up"] if kind == "fused" else ["w"]
    size = int(np.prod(shape))
    tensors = {name: 1000 * n + np.arange(size).reshape(shape) for n, name in enumerate(names)}
    if kind in ("whole", "scalar"):
        return tensors, [(shape, tensors["w"], [Piece("w", shape, Box.whole(shape), (0, shape[0] if shape else 1))])]
    shards = []
    for part, (low, high) in enumerate(split(rows, parts)):
        if kind == "columns":
            left, right = split(width, parts)[part]
            local = tensors["w"][:, left:right]
            pieces = [Piece("w", shape, Box((0, left), (rows, right)), (0, rows))]
        elif kind == "vocabulary":
            local = np.full((high - low, width), -1)
            after = max(low, min(high, shape[0]))
            local[: after - low] = tensors["w"][low:after]
            pieces = [Piece("w", shape, Box((low, 0), (after, width)), (0, after - low))] if after > low else []
        else:
            local = np.concatenate([tensors[name][low:high] for name in names])
            box = Box((low, *(0,) * (len(shape) - 1)), (high, *shape[1:]))
            pieces = [
                Piece(name, shape, box, (n * (high - low), (n + 1) * (high - low))) for n, name in enumerate(names)
            ]
        shards.append((local.shape, local, pieces))
    return tensors, shards


@settings(max_examples=300)
@given(tensor_parallel_shards(), st.data())
def test_any_partition_of_any_shards_gives_each_element_back_exactly_once(case, data):
    tensors, shards = case
    counts = {name: np.zeros_like(value) for name, value in tensors.items()}
    again = {name: np.full_like(value, -2) for name, value in tensors.items()}
    boxes = {name: [] for name in tensors}
    for local_shape, local, pieces in shards:
        flat = np.ascontiguousarray(local).reshape(-1)
        inner = data.draw(st.lists(st.integers(0, flat.size), max_size=4))
        for start, stop in pairwise(sorted({0, flat.size, *inner})):
            position = 0
            for part in fragments_of_range(local_shape, pieces, start, stop):
                assert part.shape == tensors[part.name].shape
                assert position <= part.start < part.stop <= stop - start
                position = part.stop
                here = part.box.slices()
                again[part.name][here] = flat[start:stop][part.start : part.stop].reshape(part.box.shape)
                counts[part.name][here] += 1
                boxes[part.name].append(part.box)
    for name, value in tensors.items():
        assert (counts[name] == 1).all()
        assert (again[name] == value).all()
        assert overlap_or_gap(value.shape, boxes[name]) is None


@given(shape_and_boxes(4))
def test_overlap_or_gap_is_what_counting_says(case):
    shape, boxes = case
    boxes = [box for box in boxes if box.size]
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[box.slices()] += 1
    assert (overlap_or_gap(shape, boxes) is None) == bool((counts == 1).all())


def test_overlap_or_gap_names_the_boxes():
    top, bottom = Box((0, 0), (2, 4)), Box((1, 2), (4, 4))
    assert overlap_or_gap((4, 4), [bottom, top]) == "boxes [0:2,0:4] and [1:4,2:4] overlap"
    assert overlap_or_gap((4, 4), [top]) == "only 8 of 16 elements are there"
    assert overlap_or_gap((4, 3), [top]) == "box [0:2,0:4] is empty or outside shape [4, 3]"
    assert render_box(Box((), ())) == "[]"


@pytest.mark.parametrize(
    ("local_shape", "box", "local_rows"),
    [
        ((2, 4), Box((0, 0), (2, 3)), (0, 2)),
        ((2, 4), Box((0, 0), (2, 4)), (0, 1)),
        ((2, 4), Box((0, 0), (2, 4)), (1, 3)),
        ((2, 4), Box((7, 0), (9, 4)), (0, 2)),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(local_shape, box, local_rows):
    with pytest.raises(ValueError, match="does not fit rows"):
        fragments_of_range(local_shape, [Piece("w", (8, 4), box, local_rows)], 0, 8)


def test_ranges_outside_the_tensor_are_refused():
    with pytest.raises(ValueError, match="not inside"):
        boxes_of_flat_range((2, 2), 3, 5)
    with pytest.raises(ValueError, match="not inside"):
        fragments_of_range((2, 2), [], 0, 5)
