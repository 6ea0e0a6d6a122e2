"""Saving by several ranks (threads here) and reading any box back, bit for bit."""

import errno
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gptdist.checkpoint import tensor_file, write
from gptdist.checkpoint.digest import partial_digest, render_digest
from gptdist.checkpoint.folder import step_folders
from gptdist.checkpoint.listing import list_checkpoints
from gptdist.checkpoint.logical import Box, Piece, fragments_of_range
from gptdist.checkpoint.read import Checkpoint, find_latest
from gptdist.checkpoint.retention import Retention
from gptdist.checkpoint.snapshot import Fragment, as_tensor, dtype_name, host_array, to_host
from gptdist.checkpoint.write import SaveOptions, set_aside_checkpoints
from gptdist.comms import Comms
from gptdist.errors import CheckpointError, GptdistError, StorageError
from gptdist.world import World
from tests.unit.thread_ranks import on_ranks

ONE_RANK = Comms(World())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]


def save_checkpoint(folder, step, fragments, state, comms, keep=None):
    options = write.SaveOptions(Retention(keep))
    return write.save_checkpoint(folder, step, to_host(fragments), state, comms, options)


def read(checkpoint, name, box=None):
    """As a torch tensor."""
    return as_tensor(checkpoint.read(name, box), checkpoint.dtype(name))


def whole(name, tensor):
    return Fragment(name, tuple(tensor.shape), Box.whole(tensor.shape), tensor)


def rows(name, tensor, low, high):
    box = Box((low, *(0,) * (tensor.ndim - 1)), (high, *tensor.shape[1:]))
    return Fragment(name, tuple(tensor.shape), box, tensor[low:high])


def random_bits(shape, dtype, seed):
    """Every bit pattern, NaNs with payload too, since state must come back bitwise."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).bool()
    width = torch.empty((), dtype=dtype).element_size()
    count = Box.whole(shape).size * width
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def same_bits(one, two):
    one, two = one.contiguous(), two.contiguous()
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return not one.numel() or torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


@st.composite
def partitioned_state(draw):
    """(tensors, fragments of each rank): tensors sliced by columns or not, flattened, cut anywhere and dealt out."""
    world_size = draw(st.integers(1, 3))
    tensors, dealt = {}, [[] for _ in range(world_size)]
    for n in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
        tensor = random_bits(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
        name = tensors_name = f"weight/layers.{n}.w"
        tensors[tensors_name] = tensor
        cut = draw(st.integers(0, shape[-1])) if len(shape) > 1 else 0
        for left, right in pairwise(sorted({0, cut, shape[-1]})) if len(shape) > 1 else [(0, 0)]:
            box = Box((*(0,) * (len(shape) - 1), left), (*shape[:-1], right)) if len(shape) > 1 else Box.whole(shape)
            local = tensor[box.slices()].contiguous()
            piece = Piece(name, shape, box, (0, local.shape[0] if local.ndim else 1))
            inner = draw(st.lists(st.integers(0, local.numel()), max_size=3))
            for start, stop in pairwise(sorted({0, local.numel(), *inner})):
                rank = draw(st.integers(0, world_size - 1))
                for part in fragments_of_range(tuple(local.shape), [piece], start, stop):
                    data = local.reshape(-1)[start:stop][part.start : part.stop].view(part.box.shape)
                    dealt[rank].append(Fragment(part.name, part.shape, part.box, data))
    return tensors, dealt


@settings(max_examples=40, deadline=None)
@given(partitioned_state(), st.data())
def test_any_partition_over_ranks_reads_back_bitwise_in_any_box(case, data):
    tensors, dealt = case
    with tempfile.TemporaryDirectory() as folder:

        def save(comms):
            return save_checkpoint(Path(folder), 7, dealt[comms.world.global_rank], {"samples": 5}, comms)

        paths = on_ranks(len(dealt), save)
        assert paths == [Path(folder) / "step-00000007"] * len(dealt)
        with Checkpoint.open(paths[0], verify=True, comms=ONE_RANK) as checkpoint:
            assert checkpoint.names() == sorted(tensors)
            for name, tensor in tensors.items():
                assert (checkpoint.shape(name), checkpoint.dtype(name)) == (
                    tuple(tensor.shape),
                    dtype_name(tensor.dtype),
                )
                assert same_bits(read(checkpoint, name), tensor)
                digest = partial_digest(host_array(tensor), Box.whole(tensor.shape), tuple(tensor.shape))
                assert checkpoint.digest(name) == render_digest(digest)
                cuts = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in tensor.shape]
                box = Box(tuple(a for a, _ in cuts), tuple(b for _, b in cuts))
                found = read(checkpoint, name, box)
                assert found.is_contiguous()
                assert same_bits(found, tensor[box.slices()])


def test_files_are_plain_safetensors_and_only_what_is_needed_is_there(tmp_path):
    weight, step = torch.arange(12.0).view(3, 4), torch.tensor(9)
    path = save_checkpoint(tmp_path, 400, [whole("weight/w", weight), whole("step", step)], {"loss": 2.5}, ONE_RANK)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000400"]
    assert sorted(os.listdir(path)) == ["manifest.json", "rank-00000.safetensors"]
    assert (tmp_path / "latest").read_text() == "step-00000400\n"
    with safe_open(path / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight/w"), weight)
        assert torch.equal(file.get_tensor("step"), step)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["tensors"]["weight/w"] == {
        "shape": [3, 4],
        "dtype": "float32",
        "digest": manifest["tensors"]["weight/w"]["digest"],
        "fragments": [["rank-00000.safetensors", "weight/w", [0, 0], [3, 4]]],
    }
    assert manifest["state"] == {"loss": 2.5}


def test_strided_views_are_written_without_being_made_contiguous_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", 64)  # Several chunks, not a divisor of the rows.
    tensor = torch.arange(7 * 10, dtype=torch.bfloat16).view(7, 10)
    flipped = Fragment("t", (10, 7), Box.whole((10, 7)), tensor.T)
    half = Fragment("h", (7, 10), Box((0, 3), (7, 10)), tensor[:, 3:])
    rest = Fragment("h", (7, 10), Box((0, 0), (7, 3)), tensor[:, :3])
    grad = whole("g", torch.nn.Parameter(tensor.float()))
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, 1, [flipped, half, rest, grad], {}, ONE_RANK), verify=True)
    assert same_bits(read(checkpoint, "t"), tensor.T.contiguous())
    assert same_bits(read(checkpoint, "h"), tensor)
    assert same_bits(read(checkpoint, "g"), tensor.float())


def test_what_was_read_outlives_the_checkpoint_and_belongs_to_the_caller(tmp_path):
    path = save_checkpoint(tmp_path, 1, [whole("w", torch.arange(6.0))], {}, ONE_RANK)
    with Checkpoint.open(path, verify=False) as checkpoint:
        loaded = read(checkpoint, "w")
    loaded += 1
    with Checkpoint.open(path, verify=True) as checkpoint:
        assert torch.equal(read(checkpoint, "w"), torch.arange(6.0))
    assert torch.equal(loaded, torch.arange(6.0) + 1)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 15), max_size=5), min_size=2, max_size=4))
def test_columns_cut_into_rows_of_different_heights_read_back(cuts_by_column):
    tensor = torch.arange(16 * len(cuts_by_column)).view(16, len(cuts_by_column))
    boxes = [
        Box((low, column), (high, column + 1))
        for column, cuts in enumerate(cuts_by_column)
        for low, high in pairwise(sorted({0, 16, *cuts}))
    ]
    parts = [Fragment("w", tuple(tensor.shape), box, tensor[box.slices()]) for box in boxes]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(save_checkpoint(Path(folder), 1, parts, {}, ONE_RANK), verify=False)
        for low in range(16):
            for high in range(low + 1, 17):
                assert torch.equal(read(checkpoint, "w", Box((low, 0), (high, tensor.shape[1]))), tensor[low:high])


def test_reading_what_is_not_there(tmp_path):
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, 1, [whole("w.a", torch.ones(2))], {}, ONE_RANK), verify=True)
    with pytest.raises(CheckpointError, match=r"no tensor 'w\.b' among its 1\. The nearest name is 'w\.a'"):
        checkpoint.read("w.b")
    with pytest.raises(ValueError, match=r"box \[0:3\] is outside w\.a, whose shape is \[2\]"):
        checkpoint.read("w.a", Box((0,), (3,)))


def test_ranks_without_state_write_no_file_and_a_new_world_reads_it(tmp_path):
    tensor = torch.arange(8.0).view(4, 2)
    parts = [[rows("w", tensor, 2, 4)], [], [rows("w", tensor, 0, 2)]]
    on_ranks(3, lambda comms: save_checkpoint(tmp_path, 3, parts[comms.world.global_rank], {"who": 0}, comms))
    assert sorted(os.listdir(tmp_path / "step-00000003")) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00002.safetensors",
    ]

    def load(comms):
        found = find_latest(tmp_path, comms)
        return read(found.checkpoint, "w", Box((1, 0), (3, 2))), found.checkpoint.state, found.skipped

    for values, state, skipped in on_ranks(2, load):
        assert torch.equal(values, tensor[1:3])
        assert (state, skipped) == ({"who": 0}, [])


def test_a_full_disk_on_one_rank_is_discarded_by_all(tmp_path, monkeypatch):
    tensor = torch.arange(8.0)
    old = save_checkpoint(tmp_path, 1, [whole("w", tensor)], {}, ONE_RANK)
    real = tensor_file.write_all

    def full(descriptor, content):
        if "rank-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.write(descriptor, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, content)

    monkeypatch.setattr(tensor_file, "write_all", full)
    parts = [[rows("w", tensor, 0, 4)], [rows("w", tensor, 4, 8)]]
    errors = on_ranks(2, lambda comms: save_checkpoint(tmp_path, 2, parts[comms.world.global_rank], {}, comms))
    for error in errors:
        assert isinstance(error, StorageError)
        assert "rank-00001.safetensors: the disk is full. This file needs " in str(error)
        assert " bytes, " in str(error)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    assert find_latest(tmp_path).checkpoint.path == old


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda tensor: rows("w", tensor, 3, 8), r"step 2 was not saved: .*boxes \[0:4\] and \[3:8\] overlap"),
        (lambda tensor: rows("w", tensor, 5, 8), r"step 2 was not saved: .*only 7 of 8 elements"),
        (lambda tensor: rows("w", tensor.bfloat16(), 4, 8), r"ranks disagree on tensor w: float32 \[8\], but rank 1"),
        (lambda tensor: rows("w", torch.ones(9), 4, 9), r"ranks disagree on tensor w"),
        (lambda tensor: Fragment("w", (8,), Box((4,), (8,)), tensor), r"has data of shape \(8,\)"),
        (lambda tensor: rows("w", tensor.to(torch.complex64), 4, 8), r"dtype complex64; can store"),
    ],
)
def test_ranks_that_save_the_wrong_parts_leave_nothing(tmp_path, second, message):
    tensor = torch.arange(8.0)
    parts = [[rows("w", tensor, 0, 4)], [second(tensor)]]
    errors = on_ranks(2, lambda comms: save_checkpoint(tmp_path, 2, parts[comms.world.global_rank], {}, comms))
    for error in errors:
        assert isinstance(error, GptdistError | ValueError)
        with pytest.raises(type(error), match=message):
            raise error
    assert os.listdir(tmp_path) == []


def test_state_that_json_cannot_hold_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "c", 2, [], {"lr": torch.ones(1)}, ONE_RANK)
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*/file/c: Not a directory\. Set checkpoint\.dir"):
        save_checkpoint(tmp_path / "file" / "c", 2, [], {}, ONE_RANK)


def save_step(folder, step, keep=None):
    return save_checkpoint(folder, step, [whole("w", torch.tensor([step]))], {"samples": step}, ONE_RANK, keep)


def test_a_disk_that_gives_files_to_another_user_is_said_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(write, "trust_problem", lambda path: f"{path} belongs to user nobody")
    write.save_checkpoint(tmp_path, 1, [], {}, ONE_RANK, SaveOptions(trust_others=True))
    assert not caplog.text
    write.save_checkpoint(tmp_path, 2, [], {}, ONE_RANK)
    assert "will be refused when it is to be resumed" in caplog.text and "belongs to user nobody" in caplog.text


def test_a_step_saved_again_never_reuses_the_folder(tmp_path):
    names = [save_step(tmp_path, 5).name for _ in range(3)]
    assert names == ["step-00000005", "step-00000005.1", "step-00000005.2"]
    assert [path.name for path in step_folders(tmp_path)] == ["step-00000005.2"]
    assert (tmp_path / "latest").read_text() == "step-00000005.2\n"


def test_pruning_keeps_the_newest_good_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    save_step(tmp_path, 5, keep=2)
    # 4 is bad and does not count; it stays as evidence while it is newer than the oldest kept.
    assert [path.name[-1] for path in step_folders(tmp_path)] == ["5", "4", "3"]
    save_step(tmp_path, 6, keep=1)
    assert [path.name[-1] for path in step_folders(tmp_path)] == ["6"]


def test_the_one_just_saved_stays_though_older_runs_went_further(tmp_path):
    for step in (7, 8, 9):
        save_step(tmp_path, step)
    save_step(tmp_path, 2, keep=1)
    assert {path.name[-1] for path in step_folders(tmp_path)} >= {"2", "9"}


def test_setting_aside_hides_an_older_run(tmp_path):
    assert set_aside_checkpoints(tmp_path / "none", ONE_RANK) is None
    for step in (7, 8):
        save_step(tmp_path, step)
    assert set_aside_checkpoints(tmp_path, ONE_RANK) == tmp_path / "set-aside-1"
    assert find_latest(tmp_path) is None
    save_step(tmp_path, 1)
    assert find_latest(tmp_path).checkpoint.step == 1
    assert set_aside_checkpoints(tmp_path, ONE_RANK) == tmp_path / "set-aside-2"
    assert [summary.step for summary in list_checkpoints(tmp_path / "set-aside-1", verify=True)] == [8, 7]
