"""Checkpoints behind URLs: complete or not there, verified on every way, and never in the way of training."""

import json
import shutil
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gptdist.checkpoint import copying
from gptdist.checkpoint.copying import complete_checkpoints, fetch_newest, upload_checkpoint, withdraw_checkpoints
from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import MANIFEST, load_manifest
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.uploads import Uploader
from gptdist.checkpoint.verified import verified_at
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.config.sections import RunConfig
from gptdist.errors import CheckpointError, ConfigError, NoGoodCheckpoint, RemoteFailed, StorageError
from gptdist.remote import RemoteFolder
from gptdist.train.progress import Progress, run_state
from gptdist.world import World
from launch import saving
from launch.checkpoints.copy import main as ckpt_copy
from launch.saving import find_checkpoint
from tests.unit.thread_ranks import on_ranks

pytest.importorskip("fsspec", reason="fsspec is not installed")
ONE_RANK = Comms(World())


def save(folder: Path, step: int, ranks: int = 1) -> Path:
    """A checkpoint whose every element is its step, by as many ranks."""
    data = np.full(60, step, np.float32)

    def one(comms):
        size = 60 // ranks
        first = size * comms.world.global_rank
        part = HostFragment("w", (60,), Box((first,), (first + size,)), "float32", data[first : first + size])
        return save_checkpoint(folder, step, [part], {"step": step}, comms)

    return on_ranks(ranks, one)[0] if ranks > 1 else one(ONE_RANK)


def value(path: Path) -> float:
    with Checkpoint.open(path, verify=True) as checkpoint:
        return float(checkpoint.read("w").mean())


def remote_of(folder: Path, **settings) -> RemoteFolder:
    return RemoteFolder(f"file://{folder}", **{"attempts": 2, "first_wait_seconds": 0.01, **settings})


def test_ranks_share_out_the_files_and_the_manifest_comes_last(tmp_path, monkeypatch):
    path, order, lock = save(tmp_path / "here", 7, ranks=3), [], threading.Lock()
    for name in ("upload", "write"):
        real = getattr(RemoteFolder, name)

        def noted(self, *args, name=name, real=real):
            real(self, *args)
            with lock:
                order.append((threading.current_thread().name, args[1 if name == "upload" else 0]))

        monkeypatch.setattr(RemoteFolder, name, noted)
    remote = remote_of(tmp_path / "there")
    on_ranks(3, lambda comms: upload_checkpoint(path, remote, path.name, comms))
    assert len({thread for thread, _ in order[:3]}) == 3 and order[3][1] == f"{path.name}/{MANIFEST}"
    assert complete_checkpoints(remote) == [path.name]
    fetched = on_ranks(2, lambda comms: fetch_newest(remote, tmp_path / "back", comms))
    assert fetched == [(tmp_path / "back" / path.name, [])] * 2
    assert value(fetched[0][0]) == 7
    assert verified_at(fetched[0][0], load_manifest(fetched[0][0]))
    assert sorted(item.name for item in (tmp_path / "back").iterdir()) == [path.name]


def test_what_is_incomplete_or_damaged_is_passed_over(tmp_path):
    there = tmp_path / "there"
    remote = remote_of(there)
    for step in (1, 2, 3, 4):
        upload_checkpoint(save(tmp_path / "here", step), remote, f"step-{step:08d}")
    (there / "step-00000004" / MANIFEST).unlink()  # as while it is being uploaded
    damaged = there / "step-00000003" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (there / "step-00000002" / MANIFEST).write_text("{}")
    path, skipped = fetch_newest(remote, tmp_path / "back", ONE_RANK)
    assert path == tmp_path / "back" / "step-00000001" and value(path) == 1
    assert len(skipped) == 2 and "step-00000003" in skipped[0] and "sha256" in skipped[0]
    assert sorted(item.name for item in (tmp_path / "back").iterdir()) == ["step-00000001"]
    assert fetch_newest(remote_of(tmp_path / "nowhere"), tmp_path / "back", ONE_RANK) == (None, [])


@pytest.mark.parametrize("failing", [0, 1])
def test_ranks_pass_over_alike_what_one_of_them_cannot_fetch(tmp_path, monkeypatch, failing):
    monkeypatch.setattr("gptdist.remote.LONGEST_WAIT_SECONDS", 0.01)  # between attempts
    remote = remote_of(tmp_path / "there")
    for step in (1, 2):
        upload_checkpoint(save(tmp_path / "here", step, ranks=2), remote, f"step-{step:08d}")
    flipped = tmp_path / "there" / "step-00000002" / f"rank-0000{failing}.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"x")
    found = on_ranks(2, lambda comms: fetch_newest(remote, tmp_path / "back", comms))
    for path, skipped in found:
        assert path == tmp_path / "back" / "step-00000001"
        assert len(skipped) == 1 and "sha256" in skipped[0]
    real = RemoteFolder.read

    def read(self, file):
        if "00000002" in file:
            raise RemoteFailed("the bucket is on fire")
        return real(self, file)

    monkeypatch.setattr(RemoteFolder, "read", read)
    found = on_ranks(2, lambda comms: fetch_newest(remote, tmp_path / "again", comms))
    assert [path.name for path, _ in found] == ["step-00000001"] * 2
    assert all("the bucket is on fire" in skipped[0] for _, skipped in found)


def test_what_a_killed_fetch_left_makes_room_for_the_next(tmp_path):
    remote = remote_of(tmp_path / "there")
    upload_checkpoint(save(tmp_path / "here", 1), remote, "step-00000001")
    rubbish = tmp_path / "back" / ".tmp-step-00000001-0123abcd"
    rubbish.mkdir(parents=True)
    (rubbish / "rank-00000.safetensors").write_bytes(b"half")
    assert fetch_newest(remote, tmp_path / "back", ONE_RANK) == (tmp_path / "back" / "step-00000001", [])
    assert not rubbish.exists()


def run_with_url(tmp_path):
    return RunConfig.model_validate(
        {
            "data": {"corpus": "s3://key:secret@bucket/corpus"},
            "launch": {"run_dir": str(tmp_path / "run")},
            "checkpoint": {"upload": f"file://{tmp_path}/there"},
        }
    )


def test_a_slow_download_at_the_start_is_waited_for_as_an_upload_is(tmp_path, monkeypatch):
    upload_checkpoint(save(tmp_path / "here", 5), remote_of(tmp_path / "there"), "step-00000005")
    opened = []

    def open_channel(world, seconds):
        opened.append((Comms(world), seconds))
        return opened[-1][0]

    used, real = [], saving.fetch_newest
    monkeypatch.setattr(saving, "open_channel", open_channel)
    monkeypatch.setattr(
        saving, "fetch_newest", lambda remote, folder, comms: used.append(comms) or real(remote, folder, comms)
    )
    found = find_checkpoint(run_with_url(tmp_path), ONE_RANK)
    assert found is not None and found.checkpoint.step == 5
    assert opened == [(used[0], saving.LONGEST_UPLOAD_SECONDS)] and used[0] is not ONE_RANK


def test_none_good_here_and_behind_the_url_is_told_in_lines(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 4)
    (path / MANIFEST).write_text("{}")
    with pytest.raises(NoGoodCheckpoint) as failed:
        find_checkpoint(run_with_url(tmp_path), ONE_RANK)
    lines = str(failed.value).splitlines()
    assert lines[-1] == f"file://{tmp_path}/there has no checkpoint"
    assert lines[1].startswith("  step-00000004: ")
    remote = remote_of(tmp_path / "there")
    upload_checkpoint(save(tmp_path / "here", 5), remote, "step-00000005")
    (tmp_path / "there" / "step-00000005" / MANIFEST).write_text("{}")
    with pytest.raises(NoGoodCheckpoint) as failed:
        find_checkpoint(run_with_url(tmp_path), ONE_RANK)
    lines = str(failed.value).splitlines()
    assert lines[-2] == f"file://{tmp_path}/there has none that is good:"
    assert lines[-1].startswith(f"  file://{tmp_path}/there/step-00000005: ")


def test_a_checkpoint_keeps_no_secret_of_a_url():
    config = RunConfig.model_validate(
        {
            "data": {"corpus": "https://host/corpus?token=secret"},
            "checkpoint": {"upload": "s3://key:secret@bucket/runs"},
        }
    )
    manifest = SimpleNamespace(
        tokenizer=SimpleNamespace(sha256="ab", end_of_text=0),
        split=lambda name: SimpleNamespace(index=SimpleNamespace(sha256="cd")),
    )
    state = run_state(Progress(step=3), config, "DP 1", {config.data.corpus: manifest}, {})
    assert "secret" not in json.dumps(state)
    assert state["config"]["checkpoint"]["upload"] == "s3://***@bucket/runs"
    assert RunConfig.model_validate(state["config"]).model == config.model


def test_a_name_that_is_used_again_is_not_complete_meanwhile(tmp_path, monkeypatch):
    remote = remote_of(tmp_path / "there")
    upload_checkpoint(save(tmp_path / "one", 5), remote, "step-00000005")
    monkeypatch.setattr(RemoteFolder, "upload", lambda self, source, file: (_ for _ in ()).throw(OSError("unplugged")))
    with pytest.raises(OSError, match="unplugged"):
        upload_checkpoint(save(tmp_path / "two", 5), remote, "step-00000005")
    assert complete_checkpoints(remote) == []


def test_a_run_that_goes_back_is_not_resumed_from_what_it_had_uploaded(tmp_path):
    remote = remote_of(tmp_path / "there")
    for step in (4, 8, 12):
        upload_checkpoint(save(tmp_path / "here", step), remote, f"step-{step:08d}")
    assert withdraw_checkpoints(remote, 8) == ["step-00000012", "step-00000008"]
    path, skipped = fetch_newest(remote, tmp_path / "elsewhere", ONE_RANK)
    assert path.name == "step-00000004" and skipped == []


def test_an_upload_that_is_under_way_while_the_run_goes_back_does_not_complete(tmp_path, monkeypatch):
    path, remote, real = save(tmp_path / "here", 8), remote_of(tmp_path / "there"), RemoteFolder.write

    def late(self, file, content):
        shutil.rmtree(path)
        withdraw_checkpoints(remote_of(tmp_path / "there"), 8)
        real(self, file, content)

    monkeypatch.setattr(RemoteFolder, "write", late)
    with pytest.raises(CheckpointError, match="deleted while it was uploaded"):
        upload_checkpoint(path, remote, path.name)
    assert complete_checkpoints(remote) == []


def test_a_damaged_checkpoint_is_not_uploaded(tmp_path):
    path = save(tmp_path / "here", 5)
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        upload_checkpoint(path, remote_of(tmp_path / "there"), path.name)
    assert complete_checkpoints(remote_of(tmp_path / "there")) == []


def test_uploads_go_on_behind_failures_are_said_and_what_is_overtaken_is_left_out(tmp_path, monkeypatch, caplog):
    paths = [save(tmp_path / "here", step) for step in (1, 2, 3, 4)]
    entered, go_on, real = threading.Event(), threading.Event(), copying.upload_checkpoint

    def slow(path, *args):
        entered.set()
        assert go_on.wait(20)
        if path == paths[0]:
            raise RemoteFailed("the bucket is on fire")
        real(path, *args)

    monkeypatch.setattr("gptdist.checkpoint.uploads.upload_checkpoint", slow)
    uploader = Uploader(f"file://{tmp_path}/there", ONE_RANK)
    began = time.monotonic()
    uploader.submit(paths[0])
    assert entered.wait(20)
    for path in paths[1:]:
        uploader.submit(path)
    assert time.monotonic() - began < 5 and uploader.pending() == paths
    go_on.set()
    uploader.close()
    assert uploader.pending() == [] and uploader.failed_in_a_row == 0
    assert complete_checkpoints(remote_of(tmp_path / "there")) == ["step-00000004"]
    assert "step-00000001 (1 in a row): the bucket is on fire" in caplog.text
    assert caplog.text.count("is not uploaded: a newer one is there already") == 2


def test_closing_does_not_wait_for_ever(tmp_path):
    path = save(tmp_path / "here", 1)
    (tmp_path / "there").write_text("a file where a folder should be")
    uploader = Uploader(f"file://{tmp_path}/there", ONE_RANK, attempts=50, first_wait_seconds=30)
    uploader.submit(path)
    began = time.monotonic()
    uploader.close(0.2)
    assert time.monotonic() - began < 5
    uploader._thread.join(10)
    assert not uploader._thread.is_alive()


@pytest.mark.parametrize("by_url", [(False, False), (False, True), (True, False), (True, True)])
def test_copy_between_folders_and_urls(tmp_path, capsys, by_url):
    source, target = save(tmp_path / "a", 9), tmp_path / "b" / "step-00000009"
    words = [f"file://{path}" if url else str(path) for path, url in zip((source, target), by_url, strict=True)]
    ckpt_copy(Namespace(source=words[0], destination=words[1], trust_others=False))
    assert value(target) == 9 and f"is copied to {words[1]}" in capsys.readouterr().out
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_copies_that_are_refused_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("gptdist.remote.LONGEST_WAIT_SECONDS", 0.01)  # between attempts
    source, target = save(tmp_path / "a", 9), tmp_path / "b" / "copy"
    file = source / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    for name in (str(source), f"file://{source}"):
        with pytest.raises((CheckpointError, RemoteFailed), match="sha256"):
            ckpt_copy(Namespace(source=name, destination=str(target), trust_others=False))
    file.write_bytes(content)
    (tmp_path / "b" / "step-00000008").mkdir(parents=True, exist_ok=True)
    for name, kind, message in (
        ("b/step-00000008", CheckpointError, "is of step 9, but the folder is named for step 8"),
        ("b", StorageError, "is already there"),
    ):
        with pytest.raises(kind, match=message):
            ckpt_copy(Namespace(source=str(source), destination=str(tmp_path / name), trust_others=False))
    with pytest.raises(ConfigError, match="names no checkpoint"):
        ckpt_copy(Namespace(source=str(source), destination="s3://bucket", trust_others=False))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["step-00000008"]
