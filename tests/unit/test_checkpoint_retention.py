"""Which checkpoints stay, over histories of saves; and whether those to come have room."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.checkpoint import folder as folder_module
from gptdist.checkpoint import room as room_module
from gptdist.checkpoint import write
from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import MANIFEST, Manifest, load_manifest
from gptdist.checkpoint.retention import Retention, prune
from gptdist.checkpoint.room import look_for_room
from gptdist.checkpoint.staging import staged_file
from gptdist.checkpoint.verified import VERIFIED, mark_verified, verified_at
from gptdist.checkpoint.write import SaveOptions, save_checkpoint
from gptdist.comms import Comms
from gptdist.config.sections import RunConfig
from gptdist.errors import StorageError
from gptdist.model.parameters import parameter_count
from gptdist.world import World
from launch.saving import check_room

ONE_RANK = Comms(World())


def make(folder, step, loss=None, verified=False):
    """A checkpoint without tensors."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / MANIFEST).write_bytes(Manifest(step, "", {}, {}, {"evaluation_loss": loss}).render())
    if verified:
        mark_verified(path, load_manifest(path))
    return path


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_the_newest_every_nth_and_the_best_stay(tmp_path):
    losses = {1: 3.0, 2: 1.5, 3: 2.5, 4: None, 5: 1.4, 6: 2.4, 7: float("nan"), 8: 2.3, 9: 2.2, 10: 2.1}
    for step, loss in losses.items():
        path = make(tmp_path, step, loss)
        prune(tmp_path, path, Retention(keep=2, every=4, best=2))
    # 9, 10: newest; 4, 8: every fourth; 5, 2: best.
    assert steps(tmp_path) == [2, 4, 5, 8, 9, 10]


def test_the_newest_verified_one_is_never_deleted(tmp_path):
    for step in range(1, 8):
        path = make(tmp_path, step, verified=step in (2, 3))
        prune(tmp_path, path, Retention(keep=1))
    assert steps(tmp_path) == [3, 7]
    prune(tmp_path, make(tmp_path, 8, verified=True), Retention(keep=1))
    assert steps(tmp_path) == [8]


def test_a_marker_of_something_else_counts_for_nothing(tmp_path):
    path, other = make(tmp_path, 1, verified=True), make(tmp_path, 2, loss=1.0)
    assert verified_at(path, load_manifest(path))
    for content in ((path / VERIFIED).read_bytes(), b"", b"[]", b"\xff", b'{"manifest_sha256": 3}'):
        (other / VERIFIED).write_bytes(content)
        assert verified_at(other, load_manifest(other)) is None


def test_what_is_protected_stays_and_a_step_saved_again_replaces_itself(tmp_path):
    first = make(tmp_path, 1)
    for step in (2, 3, 4):
        prune(tmp_path, make(tmp_path, step), Retention(keep=1), protected={first})
    assert steps(tmp_path) == [1, 4]
    again = tmp_path / "step-00000004.1"
    again.mkdir()
    (again / MANIFEST).write_bytes((tmp_path / "step-00000004" / MANIFEST).read_bytes())
    prune(tmp_path, again, Retention(keep=3), protected={first})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004.1"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 3), st.integers(1, 12))
def test_one_that_is_far_enough_behind_stays(tmp_path_factory, gaps, keep, behind):
    """However often is saved: there is always one at least `behind` steps old, if one was ever saved that long ago, and
    it is not much older than it must be."""
    folder = tmp_path_factory.mktemp("c")
    saved = []
    for gap in gaps:
        saved.append((saved[-1] if saved else 0) + gap)
        prune(folder, make(folder, saved[-1]), Retention(keep, behind=behind))
        left = steps(folder)
        far = [step for step in left if step <= saved[-1] - behind]
        assert bool(far) == any(step <= saved[-1] - behind for step in saved)
        assert not far or far[-1] > saved[-1] - 2 * (behind + max(gaps))
        assert set(saved[-keep:]) <= set(left) and len(left) <= keep + 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, 1.0, 2.0, 3.0]), st.booleans(), st.booleans()), max_size=12),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 2),
)
def test_what_stays_is_what_the_rules_say(tmp_path_factory, history, keep, every, best):
    """Each save: (evaluation loss, verified, damaged later). The rules once more, over plain numbers."""
    folder = tmp_path_factory.mktemp("c")
    bad: set[int] = set()
    for step, (loss, verified, damaged) in enumerate(history, 1):
        path = make(folder, step, loss, verified)
        before = set(steps(folder))
        prune(folder, path, Retention(keep, every, best))

        good = sorted(before - bad, reverse=True)
        expected = set(good[:keep]) | {old for old in before if every and old % every == 0}
        losses = {old: history[old - 1][0] for old in good}
        expected |= set(sorted((old for old in good if losses[old]), key=lambda old: (losses[old], -old))[:best])
        expected |= set([old for old in good if history[old - 1][1]][:1])
        expected |= {old for old in before & bad if sum(newer > old for newer in good) < keep}
        assert set(steps(folder)) == expected
        if damaged:
            (path / MANIFEST).write_text("{}")
            bad.add(step)


def test_a_link_is_pruned_and_what_it_leads_to_stays(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", 1)
    folder = tmp_path / "c"
    newer = make(folder, 2)
    (folder / elsewhere.name).symlink_to(elsewhere)
    prune(folder, newer, Retention(keep=1))
    assert [path.name for path in folder.iterdir()] == [newer.name]
    assert (elsewhere / MANIFEST).exists()


# -- room --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("existing", "retention", "more"),
    [
        (0, Retention(1), 2),
        (0, Retention(3), 3),
        (2, Retention(3), 2),
        (3, Retention(3), 1),
        (9, Retention(3), 1),
        (3, Retention(3, best=2), 3),
        (3, Retention(3, behind=12), 3),
        (9, Retention(3, every=100), 3),
        (9, Retention(), 3),
    ],
)
def test_room_counts_what_retention_lets_be_there_at_once(tmp_path, monkeypatch, existing, retention, more):
    for step in range(existing):
        make(tmp_path, step)
    for free, fits, warns in ((100 * more, True, False), (100 * more - 1, more > 1, True), (99, False, True)):
        monkeypatch.setattr(room_module, "free_bytes", lambda path, free=free: free)
        room = look_for_room(tmp_path, 100, retention)
        assert room.more == more
        assert bool(room.warning) == warns
        if fits:
            room.check("step 7")
        else:
            with pytest.raises(
                StorageError, match=rf"cannot write step 7 to {tmp_path}: .*needs 100 bytes, {free} are"
            ):
                room.check("step 7")
    if more > 1:
        monkeypatch.setattr(room_module, "free_bytes", lambda path: 199)
        assert (
            "has room for 1 more checkpoint (199 bytes are free, one needs 100)"
            in look_for_room(tmp_path, 100, retention).warning
        )


def test_a_save_without_room_writes_nothing(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage)
    parts = [HostFragment("w", (99,), Box.whole((99,)), "float32", np.zeros(99, np.float32))]
    monkeypatch.setattr(write, "_make_folder", lambda path: pytest.fail("it began to write"))
    with pytest.raises(StorageError, match="the disk is full, it has room for 100 bytes"):
        save_checkpoint(tmp_path, 5, parts, {}, ONE_RANK)
    assert list(tmp_path.iterdir()) == []


def test_little_room_is_said_and_staging_has_to_fit_too(tmp_path, monkeypatch, caplog):
    parts = [HostFragment("w", (100,), Box.whole((100,)), "float32", np.zeros(100, np.float32))]
    frees = {"staging": 10, "checkpoints": 10**9}
    monkeypatch.setattr(
        folder_module.shutil,
        "disk_usage",
        lambda path: SimpleNamespace(free=frees["staging" if "staging" in str(path) else "checkpoints"]),
    )
    (tmp_path / "staging").mkdir()
    options = SaveOptions(Retention(3), staging_dir=tmp_path / "staging")
    with pytest.raises(StorageError, match=r"checkpoint\.staging_dir .* has room for 10 bytes, the files of this node"):
        save_checkpoint(tmp_path / "c", 5, parts, {}, ONE_RANK, options)
    frees |= {"staging": 10**9, "checkpoints": 1500}
    save_checkpoint(tmp_path / "c", 5, parts, {}, ONE_RANK, options)
    assert "has room for 2 more checkpoints (1,500 bytes are free" in caplog.text


def test_what_a_killed_save_left_does_not_count_as_taken(tmp_path, monkeypatch):
    """A disk just large enough must not keep the run from starting again: its first save deletes what was left."""
    config = RunConfig.model_validate(
        {"data": {"corpus": "x"}, "launch": {"run_dir": str(tmp_path)}, "checkpoint": {"keep": 1}}
    )
    needed = 12 * parameter_count(config.model)
    left = tmp_path / "checkpoints" / ".tmp-step-00000007-0123abcd"
    make(tmp_path / "checkpoints", 6)
    left.mkdir()
    with (left / "rank-00000.safetensors").open("wb") as file:
        file.truncate(needed)  # sparse
    monkeypatch.setattr(room_module, "free_bytes", lambda path: 10)
    assert check_room(config) is None
    (left / "rank-00000.safetensors").unlink()
    with pytest.raises(StorageError, match="the disk is full"):
        check_room(config)


def test_what_a_crash_left_staged_makes_room_before_it_is_asked_for(tmp_path, monkeypatch):
    parts = [HostFragment("w", (100,), Box.whole((100,)), "float32", np.zeros(100, np.float32))]
    staging, folder = tmp_path / "staging", tmp_path / "c"
    staging.mkdir()
    with staged_file(staging, folder, "rank-00003.safetensors") as name:  # by a rank that is elsewhere now
        pass
    name.write_bytes(b"left")
    other = staging / "gptdist-0123456789ab-rank-00000.safetensors"
    other.write_bytes(b"another run's")

    def usage(path):
        return SimpleNamespace(free=10 if name.exists() and "staging" in str(path) else 10**9)

    monkeypatch.setattr(folder_module.shutil, "disk_usage", usage)
    save_checkpoint(folder, 5, parts, {}, ONE_RANK, SaveOptions(Retention(3), staging_dir=staging))
    assert list(staging.iterdir()) == [other]
