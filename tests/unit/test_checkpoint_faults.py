"""Damaged, torn and hostile checkpoints: each is noticed and named, and a save killed anywhere loses nothing."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from gptdist.checkpoint import tensor_file
from gptdist.checkpoint.listing import list_checkpoints
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.read import Checkpoint, find_latest
from gptdist.checkpoint.retention import Retention
from gptdist.checkpoint.snapshot import Fragment, to_host
from gptdist.checkpoint.write import SaveOptions, save_checkpoint
from gptdist.comms import Comms
from gptdist.errors import CheckpointError, NoGoodCheckpoint
from gptdist.world import World

ONE_RANK = Comms(World())
FILE = "rank-00000.safetensors"


def save(folder, step, keep=None):
    value = torch.full((4, 6), float(step))
    parts = [
        Fragment("weight/w", (4, 6), Box((0, 0), (2, 6)), value[:2]),
        Fragment("weight/w", (4, 6), Box((2, 0), (4, 6)), value[2:]),
        Fragment("weight/b", (3,), Box.whole((3,)), torch.full((3,), step, dtype=torch.bfloat16)),
    ]
    state = {"samples": 8 * step, "loss": 1.5, "layout": "DP 1"}
    return save_checkpoint(folder, step, to_host(parts), state, ONE_RANK, SaveOptions(Retention(keep)))


def rewrite_manifest(path, change):
    """Change the manifest and give it a right digest, as somebody who means harm would."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    body = (json.dumps(manifest, indent=1)[:-2] + ",\n").encode()
    (path / "manifest.json").write_bytes(body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode())


def check_refused(path, message, verify=True):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path, verify=verify)


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    chance = random.Random(1)
    for name in ("manifest.json", FILE):
        content = (path / name).read_bytes()
        for _ in range(200):
            place, bit = chance.randrange(len(content)), chance.randrange(8)
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            (path / name).write_bytes(damaged)
            check_refused(path, name)
        (path / name).write_bytes(content)
    Checkpoint.open(path, verify=True)


def test_every_truncation_is_noticed_even_without_hashing(tmp_path):
    path = save(tmp_path, 1)
    for name in ("manifest.json", FILE):
        content = (path / name).read_bytes()
        for length in [*range(0, len(content), 17), len(content) - 1]:
            (path / name).write_bytes(content[:length])
            check_refused(path, name, verify=False)
        (path / name).write_bytes(content)


def test_missing_files_are_named(tmp_path):
    check_refused(tmp_path / "none", "no checkpoint folder .*none")
    path = save(tmp_path, 1)
    (path / "unknown.bin").write_bytes(b"ignored")
    Checkpoint.open(path, verify=True)
    (path / FILE).unlink()
    check_refused(path, f"{FILE} is missing")
    (path / "manifest.json").unlink()
    check_refused(path, r"manifest\.json is missing: this is no checkpoint, or one that was never finished")


def test_swapped_files_and_folders_are_noticed(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(one / FILE, two / FILE)
    check_refused(two, f"{FILE} has sha256")
    shutil.copytree(one, tmp_path / "step-00000003")
    check_refused(tmp_path / "step-00000003", "is of step 1, but the folder is named for step 3")
    shutil.copytree(one, tmp_path / "best")
    assert Checkpoint.open(tmp_path / "best", verify=True).step == 1


def test_files_that_change_after_opening_are_noticed_when_read(tmp_path):
    path = save(tmp_path, 1)
    checkpoint = Checkpoint.open(path, verify=True)
    (path / FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=f"{FILE} has 5 bytes"):
        checkpoint.read("weight/w")


def rename_file(manifest, name):
    manifest["files"] = {name: manifest["files"][FILE]}
    for tensor in manifest["tensors"].values():
        for fragment in tensor["fragments"]:
            fragment[0] = name


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", ".x.safetensors", "x.pkl", ""])
def test_a_manifest_cannot_lead_out_of_its_folder_or_to_other_formats(tmp_path, name):
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: rename_file(manifest, name))
    check_refused(path, "file name .* is not allowed", verify=False)


def test_a_link_is_no_file_of_a_checkpoint(tmp_path):
    path = save(tmp_path, 1)
    (path / FILE).rename(tmp_path / "elsewhere")
    (path / FILE).symlink_to(tmp_path / "elsewhere")
    check_refused(path, f"{FILE} is missing, or no regular file", verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "format is 'other'"),
        (lambda m: m.update(version=1), "format version 1, but this gptdist reads version 2"),
        (lambda m: m.update(version=3), "format version 3, but this gptdist reads version 2"),
        (lambda m: m["tensors"]["weight/w"].update(digest="x"), "'x' is not a digest"),
        (lambda m: m.pop("state"), "not a manifest: KeyError: 'state'"),
        (lambda m: m.update(state=[]), "state is not an object"),
        (lambda m: m.update(tensors=[]), "not a manifest: AttributeError"),
        (lambda m: m.update(step=-1), "-1 is not a count"),
        (lambda m: m["files"].clear(), f"has a fragment in '{FILE}', which is not under files"),
        (lambda m: m["tensors"]["weight/w"]["fragments"].pop(), "weight/w is not there exactly once: only 12 of 24"),
        (lambda m: m["tensors"]["weight/w"]["fragments"][1].__setitem__(2, [1, 0]), "overlap"),
        (lambda m: m["tensors"]["weight/w"]["fragments"][1].__setitem__(3, [5, 6]), "outside shape"),
        (lambda m: m["tensors"]["weight/w"]["fragments"][1].__setitem__(2, [9, 0]), "not a box"),
        (lambda m: m["tensors"]["weight/b"].update(dtype="os.system"), "has dtype 'os.system'; can read"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(tmp_path, change, message):
    path = save(tmp_path, 1)
    rewrite_manifest(path, change)
    check_refused(path, message, verify=False)


def test_later_writers_may_add_keys(tmp_path):
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda m: (m.update(new=1), m["tensors"]["weight/w"].update(new="x")))
    assert float(Checkpoint.open(path, verify=True).read("weight/w").sum()) == 24


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tensors"]["weight/b"].update(dtype="float16"),
        lambda m: m["tensors"]["weight/b"].update(shape=[1, 3], fragments=[[FILE, "weight/b", [0, 0], [1, 3]]]),
    ],
)
def test_a_file_that_contradicts_its_manifest_is_refused_when_read(tmp_path, change):
    path = save(tmp_path, 1)
    rewrite_manifest(path, change)
    with pytest.raises(CheckpointError, match=rf"{FILE}: tensor weight/b is BF16 \[3\], the manifest says"):
        Checkpoint.open(path, verify=True).read("weight/b")


def test_a_file_that_is_no_safetensors_is_refused_when_read(tmp_path):
    path = save(tmp_path, 1)
    content = (path / FILE).read_bytes()
    for wrong in (b"\x80\x04." + content[3:], b"\xff" * len(content)):
        (path / FILE).write_bytes(wrong)
        with pytest.raises(CheckpointError, match=f"{FILE}: not a safetensors file"):
            Checkpoint.open(path, verify=False).read("weight/w")


def test_a_foreign_safetensors_file_is_no_file_of_fragments(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a file of fragments"):
        tensor_file.read_fragment_places(tmp_path / "x.safetensors")


def test_loading_falls_back_and_says_why(tmp_path):
    assert find_latest(tmp_path / "none") is None
    assert find_latest(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / FILE, 10)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    found = find_latest(tmp_path)
    assert found.checkpoint.step == 1
    assert [line.split(":")[0] for line in found.skipped] == ["step-00000003", "step-00000002"]
    assert all("\n" not in line for line in found.skipped)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(
        NoGoodCheckpoint, match=r"has 2 checkpoint\(s\), but none of them is good:\n  step-00000003: .*10 b"
    ):
        find_latest(tmp_path)


def test_listing_is_cheap_and_says_what_is_wrong(tmp_path):
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    content = bytearray((bad / FILE).read_bytes())
    content[-1] ^= 1
    (bad / FILE).write_bytes(content)
    two, one = list_checkpoints(tmp_path)
    assert (one.step, one.samples, one.loss, one.layout, one.ok, one.reason) == (1, 8, 1.5, "DP 1", True, None)
    assert one.bytes == (one.path / FILE).stat().st_size
    assert two.ok
    assert not list_checkpoints(tmp_path, verify=True)[0].ok
    (bad / "manifest.json").write_text("{}")
    broken = list_checkpoints(tmp_path)[0]
    assert (broken.step, broken.ok, broken.samples) == (2, False, None)
    assert "sha256" in broken.reason
    with pytest.raises(CheckpointError, match="no folder"):
        list_checkpoints(tmp_path / "none")


class Killed(BaseException):
    """As kill -9: nothing after it has any effect, cleaning up included."""


@pytest.mark.parametrize("next_step", [2, 1])
def test_a_save_killed_at_any_system_call_loses_nothing(tmp_path, monkeypatch, next_step):
    """Step 2 after step 1, and step 1 saved again: a whole checkpoint is always found, the next save works."""
    names = ["mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir"]
    calls_left = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal calls_left
            calls_left -= 1
            if calls_left < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    outcomes = set()
    for instant in range(200):
        folder = tmp_path / str(instant)
        save(folder, 1)
        killed = False
        with monkeypatch.context() as patch:
            calls_left = instant
            for name in names:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                save(folder, next_step, keep=1)
            except Killed:
                killed = True
        found = find_latest(folder)
        assert found is not None and found.skipped == []
        assert float(found.checkpoint.read("weight/w")[0, 0]) == found.checkpoint.step
        assert all(summary.ok for summary in list_checkpoints(folder, verify=True))
        outcomes.add(found.checkpoint.path.name)
        save(folder, 3, keep=1)
        assert sorted(os.listdir(folder)) == ["latest", "step-00000003"]
        if not killed:
            break
    assert not killed
    assert instant > 10
    assert outcomes == {"step-00000001", "step-00000002" if next_step == 2 else "step-00000001.1"}
