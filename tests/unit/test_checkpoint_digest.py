"""Digests that know no layout, cuts that keep order, and files that any safetensors reader opens."""

import hashlib
import os
import random
import tempfile
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gptdist.checkpoint import tensor_file
from gptdist.checkpoint.digest import add_digests, partial_digest, render_digest
from gptdist.checkpoint.fragment import DTYPES, FragmentPlace, HostFragment, as_float64, from_float64, numpy_dtype
from gptdist.checkpoint.logical import Box, cut_in_order, flat_start, overlap_or_gap
from gptdist.checkpoint.tensor_file import TensorFile, read_fragment_places, write_tensor_file, write_tensor_stream

SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)


def random_bits(shape, dtype, seed):
    """Every bit pattern, NaNs with payload too; booleans are 0 or 1."""
    kind = numpy_dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, Box.whole(shape).size * kind.itemsize, dtype=np.uint8)
    return (raw & 1 if dtype == "bool" else raw).view(kind).reshape(shape)


def same_bits(one, two):
    return (one.dtype, one.shape) == (two.dtype, two.shape) and one.tobytes() == two.tobytes()


def any_cut(data, box):
    """Boxes that cover `box` exactly once, by cutting a part in two again and again."""
    boxes = [box]
    for _ in range(data.draw(st.integers(0, 6))):
        part = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axes = [axis for axis, size in enumerate(part.shape) if size > 1]
        if not axes:
            boxes.append(part)
            continue
        axis = data.draw(st.sampled_from(axes))
        at = data.draw(st.integers(part.start[axis] + 1, part.stop[axis] - 1))
        boxes.append(Box(part.start, (*part.stop[:axis], at, *part.stop[axis + 1 :])))
        boxes.append(Box((*part.start[:axis], at, *part.start[axis + 1 :]), part.stop))
    return boxes


@settings(deadline=None)
@given(SHAPES, st.sampled_from(sorted(DTYPES)), SEEDS, st.data())
def test_a_digest_is_the_same_for_any_boxes_in_any_order(shape, dtype, seed, data):
    tensor = random_bits(shape, dtype, seed)
    whole = Box.whole(shape)
    boxes = data.draw(st.permutations(any_cut(data, whole)))
    assert overlap_or_gap(shape, boxes) is None
    parts = [partial_digest(tensor[box.slices()], box, shape) for box in boxes]
    assert add_digests(parts) == partial_digest(tensor, whole, shape)


@settings(deadline=None)
@given(SHAPES, st.sampled_from(sorted(DTYPES)), SEEDS, st.data())
def test_any_flipped_bit_changes_the_digest(shape, dtype, seed, data):
    tensor = random_bits(shape, dtype, seed)
    changed = bytearray(tensor.tobytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = np.frombuffer(changed, tensor.dtype).reshape(shape)
    whole = Box.whole(shape)
    assert partial_digest(other, whole, shape) != partial_digest(tensor, whole, shape)


@pytest.mark.parametrize("axis", [0, 1])
def test_exchanged_rows_and_columns_change_the_digest(axis):
    tensor = random_bits((6, 5), "float32", 3)
    whole = Box.whole(tensor.shape)
    digest = partial_digest(tensor, whole, tensor.shape)
    assert partial_digest(np.roll(tensor, 1, axis), whole, tensor.shape) != digest
    assert partial_digest(tensor.reshape(5, 6), Box.whole((5, 6)), (5, 6)) != digest


def mixed(number):
    """The weights of the digest in whole numbers of Python."""
    low = 2**64 - 1
    word = ((number + 1) * 0x9E3779B97F4A7C15) & low
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & low
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & low
    return (word ^ (word >> 31)) | 1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 5), "float32"), ((2, 3, 4), "bfloat16"), ((9,), "float64"), ((), "int8"), ((4, 1), "bool")],
)
def test_the_digest_is_the_sum_that_the_format_says(shape, dtype):
    tensor = random_bits(shape, dtype, 11)
    bits = tensor.view(f"u{tensor.dtype.itemsize}").reshape(-1, shape[-1] if shape else 1)
    places = product(range(bits.shape[0]), range(bits.shape[1]))
    expected = sum(int(bits[row, column]) * mixed(row) * mixed(2**63 + column) for row, column in places) % 2**64
    assert partial_digest(tensor, Box.whole(shape), shape) == expected
    assert render_digest(expected) == f"{expected:016x}"


def test_a_wide_row_is_digested_as_its_parts(monkeypatch):
    tensor = random_bits((2, 200_000), "float32", 5)  # more columns than are looked at at a time
    cuts = [0, 1, 65_535, 65_537, 199_999, 200_000]
    boxes = [Box((0, low), (2, high)) for low, high in pairwise(cuts)]
    parts = [partial_digest(tensor[box.slices()], box, tensor.shape) for box in boxes]
    assert add_digests(parts) == partial_digest(tensor, Box.whole(tensor.shape), tensor.shape)


@given(SHAPES, st.integers(1, 400), st.data())
def test_cuts_are_small_contiguous_and_in_order(shape, most, data):
    start = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    box = Box.whole(shape).shift(start)
    flat = np.arange(box.size).reshape(shape)
    found = [flat[part.slices(start)].reshape(-1).tolist() for part in cut_in_order(box, most)]
    assert [value for part in found for value in part] == list(range(box.size))
    assert all(0 < len(part) <= most for part in found)


@given(SHAPES, st.data())
def test_where_a_box_lies_in_another_and_whether_in_one_stretch(shape, data):
    offset = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    cuts = [sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n)))) for n in shape]
    inner = Box(tuple(a for a, b in cuts), tuple(max(b, a + 1) for a, b in cuts)).shift(offset)
    flat = np.arange(Box.whole(shape).size).reshape(shape)[inner.slices(offset)].reshape(-1)
    together = flat.tolist() == list(range(flat[0], flat[0] + len(flat)))
    assert flat_start(Box.whole(shape).shift(offset), inner) == (int(flat[0]) if together else None)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(sorted(DTYPES)), SEEDS), min_size=1, max_size=4), st.data())
def test_any_fragments_of_any_dtypes_come_back_to_the_bit(tensors, data):
    fragments, digests = [], {}
    for number, (shape, dtype, seed) in enumerate(tensors):
        name = f"weight/{number}"
        tensor = random_bits(shape, dtype, seed)
        digests[name] = partial_digest(tensor, Box.whole(shape), shape)
        for box in any_cut(data, Box.whole(shape)):
            part = tensor[box.slices()] if data.draw(st.booleans()) else tensor[box.slices()].copy()
            fragments.append(HostFragment(name, shape, box, dtype, part))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "_CHUNK_BYTES", data.draw(st.sampled_from([8, 64, 4 << 20])))
        path = Path(folder) / "x.safetensors"
        written = write_tensor_file(path, fragments)
        content = path.read_bytes()
        assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert written.digests == digests
        places = {place.key: place for place in read_fragment_places(path)}
        assert places == {part.key: FragmentPlace(part.name, part.shape, part.box, part.dtype) for part in fragments}
        with TensorFile(path) as file:
            for part in fragments:
                cuts = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in part.box.shape]
                wanted = Box(tuple(a for a, _ in cuts), tuple(b for _, b in cuts)).shift(part.box.start)
                out = np.empty(wanted.shape, part.data.dtype)
                file.copy_into(out, part.key, part.box, part.dtype, wanted)
                assert same_bits(out, part.data[wanted.slices(part.box.start)])


def test_any_safetensors_reader_opens_the_file(tmp_path):
    values = {dtype: random_bits((3, 4), dtype, 7) for dtype in sorted(set(DTYPES) - {"bfloat16"})}
    fragments = [HostFragment(dtype, (3, 4), Box.whole((3, 4)), dtype, value) for dtype, value in values.items()]
    write_tensor_file(tmp_path / "x.safetensors", fragments)
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(values)
        assert all(same_bits(file.get_tensor(key), value) for key, value in values.items())
        assert file.metadata()["format"] == "pt"


def test_bfloat16_is_what_torch_takes_it_for(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.randn(3, 4).bfloat16()
    bits = values.view(torch.uint16).numpy()
    write_tensor_file(tmp_path / "x.safetensors", [HostFragment("w", (3, 4), Box.whole((3, 4)), "bfloat16", bits)])
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), values)
    assert np.array_equal(as_float64(bits, "bfloat16"), values.double().numpy())
    doubles = np.concatenate([np.random.default_rng(1).standard_normal(5000) * 10.0**k for k in (-42, -38, 0, 37)])
    doubles = np.append(doubles.astype(np.float32), [0.0, -0.0, np.inf, -np.inf, 3.4e38]).astype(np.float64)
    expected = torch.from_numpy(doubles).float().bfloat16().view(torch.uint16).numpy()
    assert same_bits(from_float64(doubles, "bfloat16"), expected)
    assert np.isnan(as_float64(from_float64(np.array([np.nan]), "bfloat16"), "bfloat16")).all()


def test_a_file_is_never_written_over(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensor_file(path, [HostFragment("w", (2,), Box.whole((2,)), "float32", np.ones(2, np.float32))])
    assert path.read_text() == "mine"


def test_phases_are_told_and_an_error_while_reading_leaves_the_file_to_the_caller(tmp_path):
    phases = []
    value = np.ones(2, np.float32)
    write_tensor_file(tmp_path / "x", [HostFragment("w", (2,), Box.whole((2,)), "float32", value)], phases.append)
    assert phases == ["file", "sync"]

    def read(place, box):
        raise OSError(5, "no such sector")

    with pytest.raises(OSError, match="no such sector"):
        write_tensor_stream(tmp_path / "y", [FragmentPlace("w", (2,), Box.whole((2,)), "float32")], read)


def damaged_headers():
    """(what is wrong, header text, bytes after it)."""
    entry = '"dtype":"F32","shape":[2]'
    yield "hole", f'{{"w":{{{entry},"data_offsets":[4,12]}}}}', 12
    yield "overlap", f'{{"v":{{{entry},"data_offsets":[0,8]}},"w":{{{entry},"data_offsets":[4,12]}}}}', 12
    yield "past the end", f'{{"w":{{{entry},"data_offsets":[0,8]}}}}', 7
    yield "more than it says", f'{{"w":{{{entry},"data_offsets":[0,8]}}}}', 9
    yield "size", f'{{"w":{{{entry},"data_offsets":[0,12]}}}}', 12
    yield "negative", f'{{"w":{{{entry},"data_offsets":[-8,0]}}}}', 0
    yield "huge", '{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}', 8
    yield "negative shape", '{"w":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}', 8
    yield "not numbers", '{"w":{"dtype":"F32","shape":[true,2.0],"data_offsets":[0,8]}}', 8
    yield "dtype", '{"w":{"dtype":"O8","shape":[1],"data_offsets":[0,8]}}', 8
    yield "dtype no text", '{"w":{"dtype":[],"shape":[1],"data_offsets":[0,8]}}', 8
    yield "a list", "[]", 0
    yield "no JSON", "{", 0
    yield "deep", "[" * 5000, 0
    yield "not UTF-8", "\udcff\udcfe", 0
    yield "no entry", '{"w":1}', 0


@pytest.mark.parametrize(
    ("text", "after"), [case[1:] for case in damaged_headers()], ids=[c[0] for c in damaged_headers()]
)
def test_a_header_is_believed_only_as_far_as_the_file_goes(tmp_path, text, after):
    header = text.encode(errors="surrogateescape")
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(after))
    with pytest.raises(ValueError, match="not a safetensors file"):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (2**63).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}"]
)
def test_a_file_too_short_for_its_header_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        TensorFile(tmp_path / "x")


def test_no_flipped_bit_of_a_header_crashes_the_reader(tmp_path):
    """It is read as something, or refused; never a memory map beyond the file."""
    path = tmp_path / "x"
    value = random_bits((3, 4), "float32", 1)
    fragment = HostFragment("w", (3, 4), Box.whole((3, 4)), "float32", value)
    write_tensor_file(path, [fragment])
    content = path.read_bytes()
    chance = random.Random(3)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content) - value.nbytes)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        out = np.empty((3, 4), np.float32)
        try:
            with TensorFile(path) as file:
                file.fragment_places()
                file.copy_into(out, "w", fragment.box, "float32", fragment.box)
        except ValueError:
            refused += 1
        else:
            assert same_bits(out, value)
    assert refused > 200


def test_memory_that_was_mapped_is_let_go(tmp_path):
    rows = 3000
    value = np.zeros((rows, 32768), np.uint8)
    fragment = HostFragment("w", value.shape, Box.whole(value.shape), "uint8", value)
    write_tensor_file(tmp_path / "x", [fragment])

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")  # of files

    with TensorFile(tmp_path / "x") as file:
        before = resident()
        out = np.empty((10, 32000), np.uint8)
        for row in range(0, rows, 10):
            file.copy_into(out, "w", fragment.box, "uint8", Box((row, 0), (row + 10, 32000)))
        assert resident() - before < 24 << 20 < value.nbytes
