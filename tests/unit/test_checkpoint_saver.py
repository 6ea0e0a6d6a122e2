"""Saving in the background: what is written is what was copied, failures are settled alike, nobody waits for ever."""

import errno
import os
import threading
import time

import pytest
import torch

from gptdist.checkpoint import saver as saver_module
from gptdist.checkpoint import tensor_file
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.read import Checkpoint, find_latest
from gptdist.checkpoint.retention import Retention
from gptdist.checkpoint.saver import CheckpointSaver
from gptdist.checkpoint.snapshot import Fragment, HostBuffers
from gptdist.checkpoint.verified import verified_at
from gptdist.checkpoint.write import SaveOptions
from gptdist.comms import Comms
from gptdist.errors import ConfigError, StorageError
from gptdist.world import World
from tests.unit.thread_ranks import on_ranks

ONE_RANK = Comms(World())


def part(name, tensor, low=None, high=None):
    """Rows [low, high) of a tensor, or all of it."""
    box = Box.whole(tensor.shape)
    if low is not None:
        box = Box((low, *box.start[1:]), (high, *box.stop[1:]))
    return Fragment(name, tuple(tensor.shape), box, tensor[box.slices()])


def values(path, name="w"):
    with Checkpoint.open(path, verify=True) as checkpoint:
        return set(checkpoint.read(name).reshape(-1).tolist())


class Gate:
    """Holds the writing of files up until it is opened."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.reached = threading.Event()
        real = tensor_file.write_all

        def slow(descriptor, content):
            self.reached.set()
            assert self.open.wait(20)
            real(descriptor, content)

        monkeypatch.setattr(tensor_file, "write_all", slow)


# -- buffers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least_bytes", [24, 16 << 20])  # in pieces for several threads, and in one
def test_a_copy_is_the_state_of_its_moment_in_few_moves(least_bytes, monkeypatch):
    monkeypatch.setattr("gptdist.checkpoint.snapshot._LEAST_COPIED_AT_ONCE", least_bytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    flat = torch.arange(1000.0)
    parts = [Fragment("a", (10, 10), Box.whole((10, 10)), flat[:100].view(10, 10))]
    parts.append(Fragment("b", (300,), Box.whole((300,)), flat[100:400]))
    parts.append(Fragment("c", (3,), Box.whole((3,)), torch.tensor([1.0, -0.0, float("nan")]).bfloat16()))
    parts.append(Fragment("d", (), Box((), ()), torch.tensor(7)))
    parts.append(Fragment("e", (10, 10), Box.whole((10, 10)), flat[500:600].view(10, 10).T))
    parts.append(Fragment("f", (0, 4), Box.whole((0, 4)), torch.empty(0, 4)))
    buffers = HostBuffers(parts)
    expected = {fragment.name: fragment.data.clone() for fragment in parts}
    copies = {copy.name: copy for copy in buffers.copy(parts)}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint-copy")]
    flat += 1
    assert buffers.bytes == sum(part.data.numel() * part.data.element_size() for part in parts)
    for name, tensor in expected.items():
        copied = copies[name].data
        assert copied.shape == tuple(tensor.shape)
        bits = tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor
        assert copied.tobytes() == bits.contiguous().numpy().tobytes()
    assert copies["c"].dtype == "bfloat16"
    pieces = len(buffers._host_moves) + len(buffers._moves)
    assert pieces == 4 if least_bytes > 1000 else pieces > 4  # a and b lie side by side
    order = [copy.data.itemsize for copy in buffers.copy(parts)]
    assert order == sorted(order, reverse=True)


def test_memory_is_taken_once_and_a_state_that_moved_is_seen():
    state = torch.zeros(64)
    buffers = HostBuffers([part("w", state)])
    first = buffers.copy([part("w", state)])[0].data
    state += 1
    again = buffers.copy([part("w", state)])[0].data
    assert again.ctypes.data == first.ctypes.data and again[0] == 1
    moved = torch.full((32,), 5.0)
    assert buffers.copy([part("w", moved)])[0].data.tolist() == [5.0] * 32


# -- the saver ---------------------------------------------------------------------------------------------------------


def test_steps_go_on_while_it_writes_and_what_is_saved_is_what_was_copied(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    state = torch.zeros(3000)
    run_state = {"nested": {"samples": 0}}
    with CheckpointSaver(tmp_path, ONE_RANK, SaveOptions(read_back=True)) as saver:
        saver.prepare([part("w", state)])
        stall = saver.save(1, [part("w", state)], run_state)
        assert gate.reached.wait(20)
        for _ in range(100):
            state += 1  # training goes on
        run_state["nested"]["samples"] = 100
        assert not list(tmp_path.glob("step-*")) and stall < 5
        # The next save has to wait: the copy is still needed.
        second = threading.Thread(target=saver.save, args=(2, [part("w", state)], run_state))
        second.start()
        time.sleep(0.1)
        assert second.is_alive()
        gate.open.set()
        second.join(20)
        state += 1
        outcome = saver.wait()
    assert (outcome.step, outcome.path.name, outcome.error) == (2, "step-00000002", None)
    assert values(tmp_path / "step-00000001") == {0.0}
    assert values(tmp_path / "step-00000002") == {100.0}
    with Checkpoint.open(tmp_path / "step-00000001", verify=True) as checkpoint:
        assert checkpoint.state == {"nested": {"samples": 0}}
        assert verified_at(checkpoint.path, checkpoint.manifest)


def test_a_save_that_ends_during_the_next_ones_copy_leaves_its_buffers_alone(tmp_path, monkeypatch):
    """Buffers are free once the file is written; what follows must not free what another save has filled since."""
    state = torch.zeros(10)
    at_prune, go_on, copying = threading.Event(), threading.Event(), threading.Event()
    real_copy, real_save, steps = HostBuffers.copy, saver_module.save_checkpoint, []

    def save(folder, step, *args, **kwargs):
        steps.append(step)
        return real_save(folder, step, *args, **kwargs)

    def copy(self, fragments):
        copying.set()
        if at_prune.is_set() and not go_on.is_set():
            go_on.set()
            time.sleep(0.2)  # meanwhile the first save ends
        return real_copy(self, fragments)

    def on_phase(phase):
        if phase == "prune" and not at_prune.is_set():
            at_prune.set()
            assert go_on.wait(20)

    gate_now = threading.Event()
    real_write = tensor_file.write_all

    def write(descriptor, content):
        if 2 in steps:
            assert gate_now.wait(20)
        real_write(descriptor, content)

    monkeypatch.setattr(saver_module, "save_checkpoint", save)
    monkeypatch.setattr(HostBuffers, "copy", copy)
    monkeypatch.setattr(tensor_file, "write_all", write)
    with CheckpointSaver(tmp_path, ONE_RANK, on_phase=on_phase) as saver:
        saver.save(1, [part("w", state)], {})
        assert at_prune.wait(20)
        state += 1
        saver.save(2, [part("w", state)], {})
        state += 1
        third = threading.Thread(target=saver.save, args=(3, [part("w", state)], {}))
        third.start()
        time.sleep(0.1)
        assert third.is_alive(), "it copied over what the second save had not written yet"
        gate_now.set()
        third.join(20)
        saver.wait()
    assert [values(tmp_path / f"step-0000000{step}") for step in (1, 2, 3)] == [{0.0}, {1.0}, {2.0}]


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_settled_alike_counted_and_leaves_nothing(tmp_path, monkeypatch, background):
    """Rank 1's disk refuses steps 2, 3 and 5."""
    real, refused = tensor_file.write_all, []

    def full(descriptor, content):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "rank-00001" in path and any(f"step-0000000{step}" in path for step in (2, 3, 5)):
            refused.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, content)

    monkeypatch.setattr(tensor_file, "write_all", full)
    state = torch.zeros(8)

    def train(comms):
        low = 4 * comms.world.global_rank
        outcomes = []
        with CheckpointSaver(tmp_path, comms, background=background) as saver:
            for step in range(1, 7):
                saver.save(step, [part("w", state, low, low + 4)], {})
            last = saver.wait()
            while saver.poll():
                outcomes.append(saver.settle())
        return last, outcomes

    for last, outcomes in on_ranks(2, train):
        assert (last.step, last.error) == (6, None)
        assert [(outcome.step, outcome.failed_in_a_row) for outcome in outcomes] == [(2, 1), (3, 2), (5, 1)]
        for outcome in outcomes:
            assert isinstance(outcome.error, StorageError)
            assert "rank-00001.safetensors: the disk is full" in str(outcome.error)
            assert "bytes are free" in str(outcome.error) or "are free" in str(outcome.error)
    assert refused and sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-00000001",
        "step-00000004",
        "step-00000006",
    ]


def test_a_rank_may_hear_of_a_failure_before_the_others(tmp_path, monkeypatch):
    """The last one to leave the save settles the same failure as the first, though its `poll` was not yet true."""
    state, polled = torch.zeros(8), []

    def on_saving(comms):
        saver = CheckpointSaver(tmp_path / "file" / "c", comms)
        if comms.world.global_rank == 1:
            real = saver._run

            def late(job):
                time.sleep(0.3)
                real(job)

            saver._run = late
        low = 4 * comms.world.global_rank
        saver.save(1, [part("w", state, low, low + 4)], {})
        polled.append(saver.poll())
        outcome = saver.settle()
        saver.close()
        return outcome

    (tmp_path / "file").write_text("")
    for outcome in on_ranks(2, on_saving):
        assert outcome.step == 1 and "Not a directory" in str(outcome.error)
    assert False in polled


def test_a_lost_rank_is_an_error_and_no_hang(tmp_path, monkeypatch):
    """Rank 1 never begins the save: as one that was killed."""
    state = torch.zeros(4)

    def train(comms):
        if comms.world.global_rank == 1:
            time.sleep(0.2)
            comms._meeting.abort()
            return None
        saver = CheckpointSaver(tmp_path, comms)
        saver.save(1, [part("w", state)], {})
        with pytest.raises(threading.BrokenBarrierError):
            saver.wait()
        with pytest.raises(threading.BrokenBarrierError):
            saver.poll()
        with pytest.raises(threading.BrokenBarrierError):
            saver.save(2, [part("w", state)], {})
        saver.close(10)
        return saver._thread.is_alive()

    assert on_ranks(2, train)[0] is False
    assert not list(tmp_path.glob("*"))


def test_too_little_memory_for_the_copy_is_the_users_to_mend(tmp_path, monkeypatch):
    def none_left(*args, **settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nstack")

    state = torch.zeros(1000)
    monkeypatch.setattr(torch, "empty", none_left)
    with pytest.raises(ConfigError, match=r"4,000 bytes.*can't allocate memory\..*checkpoint\.background: false"):
        CheckpointSaver(tmp_path, ONE_RANK).prepare([part("w", state)])


def test_closing_finishes_what_was_begun_but_not_for_ever(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = CheckpointSaver(tmp_path, ONE_RANK)
    saver.save(1, [part("w", torch.ones(4))], {})
    began = time.monotonic()
    saver.close(0.2)
    assert time.monotonic() - began < 5 and not list(tmp_path.glob("step-*"))
    gate.open.set()
    saver.close()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_what_does_not_read_back_is_named_kept_and_counts_as_failed(tmp_path, monkeypatch):
    state, options = torch.arange(64.0), SaveOptions(Retention(1), read_back=True)
    with CheckpointSaver(tmp_path, ONE_RANK, options) as saver:
        saver.save(1, [part("w", state)], {})
        saver.wait()

        def rot(phase):
            if phase == "read-back":
                path = next(tmp_path.glob("step-00000002/*.safetensors"))
                content = bytearray(path.read_bytes())
                content[-3] ^= 4
                path.write_bytes(content)

        saver._on_phase = rot
        saver.save(2, [part("w", state)], {})
        saver.wait()
        assert saver.poll()
        outcome = saver.settle()
        assert isinstance(outcome.error, StorageError)
        assert "step-00000002 was saved, but does not read back" in str(outcome.error)
        assert "rank-00000.safetensors has sha256" in str(outcome.error)
        assert (tmp_path / "latest").read_text() == "step-00000001\n"
        found = find_latest(tmp_path)
        assert found.checkpoint.step == 1 and len(found.skipped) == 1
        saver._on_phase = lambda phase: None
        saver.save(3, [part("w", state)], {})
        assert saver.wait().error is None
    # Newer than all that is kept it would be evidence; a newer good one makes it rubbish like any other.
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003"]


def test_staged_files_are_copied_out_and_gone(tmp_path, monkeypatch):
    staging, folder = tmp_path / "nvme", tmp_path / "checkpoints"
    state = torch.arange(100.0)
    seen = []

    def train(comms):
        low = 50 * comms.world.global_rank
        options = SaveOptions(read_back=True, staging_dir=staging)

        def on_phase(phase):
            if phase == "copy-out":
                seen.append(sorted(path.name.split("-", 2)[2] for path in staging.iterdir()))

        with CheckpointSaver(folder, comms, options, on_phase=on_phase) as saver:
            saver.save(1, [part("w", state, low, low + 50)], {})
            return saver.wait().path

    assert on_ranks(2, train) == [folder / "step-00000001"] * 2
    assert any("rank-00000.safetensors" in names for names in seen)
    assert values(folder / "step-00000001") == set(state.tolist())
    assert not list(staging.iterdir())


def test_a_staged_file_that_changes_on_the_way_is_noticed(tmp_path):
    staging, folder = tmp_path / "nvme", tmp_path / "checkpoints"

    def on_phase(phase):
        if phase == "copy-out":
            path = next(staging.iterdir())
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    with CheckpointSaver(folder, ONE_RANK, SaveOptions(staging_dir=staging), on_phase=on_phase) as saver:
        saver.save(1, [part("w", torch.arange(9.0))], {})
        error = saver.wait().error
    assert isinstance(error, StorageError) and "changed after it was written" in str(error)
    assert not list(staging.iterdir()) and not list(folder.iterdir())
