"""The offline commands on checkpoints: list, verify, diff, reshard, average; what they write, say and cost."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.checkpoint import rewrite
from gptdist.checkpoint.compare import compare
from gptdist.checkpoint.fragment import HostFragment, as_float64
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import TensorEntry
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.rewrite import balanced_shares, reshard
from gptdist.checkpoint.write import save_checkpoint
from gptdist.config.sections import RunConfig
from gptdist.errors import CheckpointError, StorageError
from gptdist.train.compatible import check_resumable
from launch import cli
from tests.unit.checkpoints import FILE, ONE_RANK, flip_a_bit, rewrite_manifest, save, some_state, whole

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(capsys):
    """run(*words) -> (exit code, stdout, stderr) of `gptdist ckpt ...`."""

    def call(*words):
        code = cli.main(["ckpt", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def contents(path):
    with Checkpoint.open(path, verify=True) as checkpoint:
        return {name: (checkpoint.dtype(name), checkpoint.read(name).tobytes()) for name in checkpoint.names()}


def in_tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# -- reshard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 1000])
def test_reshard_keeps_every_bit_and_balances_to_a_row(run, tmp_path, ranks):
    source = save(tmp_path, 3)
    code, out, _ = run("reshard", source, tmp_path / "new", "--ranks", ranks)
    assert code == 0 and "every digest is the same" in out
    assert contents(tmp_path / "new") == contents(source)
    with Checkpoint.open(source, verify=True) as one, Checkpoint.open(tmp_path / "new", verify=True) as other:
        assert compare(one, other).same and other.state == one.state and other.created == one.created
        files = other.manifest.files
        sizes = [
            sum(
                part.box.size * 4
                for entry in other.manifest.tensors.values()
                for part in entry.fragments
                if part.file == name
            )
            for name in files
        ]
        assert len(files) == ranks if ranks <= 7 else len(files) > 90
        assert max(sizes) - min(sizes) <= 2 * 4 * 8
    assert run("diff", source, tmp_path / "new")[0] == 0
    assert in_tree(tmp_path / "new") == sorted(["manifest.json", *files])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 9), max_size=3).map(tuple), st.sampled_from(["float32", "bfloat16", "bool"])),
        max_size=5,
    ),
    st.integers(1, 12),
)
def test_shares_cover_everything_once_in_equal_parts(tensors, ranks):
    entries = {f"t{n}": TensorEntry(shape, dtype, "", ()) for n, (shape, dtype) in enumerate(tensors)}
    shares = balanced_shares(entries, ranks)
    assert len(shares) <= ranks and all(shares)
    seen = {name: np.zeros(entry.shape, int) for name, entry in entries.items()}
    row = max([place.bytes // (place.box.shape or (1,))[0] for share in shares for place in share], default=0)
    for share in shares:
        for place in share:
            seen[place.name][place.box.slices()] += 1
    assert all((count == 1).all() for count in seen.values())
    sizes = [sum(place.bytes for place in share) for share in shares]
    assert all(abs(size - sum(sizes) / ranks) <= row + 1 for size in sizes if len(shares) == ranks)


DTYPES = ("float32", "bfloat16", "int64", "bool", "float64")


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_reshard_of_any_fragments_keeps_bytes(data, ranks):
    fragments = []
    for number in range(data.draw(st.integers(1, 3))):
        shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        dtype = data.draw(st.sampled_from(DTYPES))
        raw = np.random.default_rng(number).integers(0, 2, (*shape, 8), dtype=np.uint8)
        kind = np.dtype({"bfloat16": "uint16"}.get(dtype, dtype))
        value = raw[..., : kind.itemsize].copy().view(kind)[..., 0]
        cut = data.draw(st.integers(0, shape[-1]))
        for low, high in ((0, cut), (cut, shape[-1])):
            if low < high:
                box = Box((*(0,) * (len(shape) - 1), low), (*shape[:-1], high))
                fragments.append(HostFragment(f"t{number}", shape, box, dtype, value[box.slices()]))
    with tempfile.TemporaryDirectory() as folder:
        source = save_checkpoint(Path(folder), 1, fragments, {}, ONE_RANK)
        with Checkpoint.open(source, verify=True) as checkpoint:
            reshard(checkpoint, Path(folder) / "new", ranks)
        assert contents(Path(folder) / "new") == contents(source)


def test_more_files_than_a_process_may_open(run, tmp_path, monkeypatch):
    source = save(tmp_path, 1)
    assert run("reshard", source, tmp_path / "many", "--ranks", 90)[0] == 0
    monkeypatch.setattr("gptdist.checkpoint.read._OPEN_FILES", 5)
    with Checkpoint.open(tmp_path / "many", verify=True) as checkpoint:
        opened = len(os.listdir("/proc/self/fd"))
        for name in checkpoint.names():
            checkpoint.read(name)
            assert len(os.listdir("/proc/self/fd")) <= opened + 5
    assert run("verify", tmp_path / "many")[0] == 0
    assert run("reshard", tmp_path / "many", tmp_path / "one", "--ranks", 1)[0] == 0
    assert contents(tmp_path / "one") == contents(source)


def test_reshard_of_a_folder_takes_the_newest_good(run, tmp_path):
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    flip_a_bit(newest / FILE)
    code, out, err = run("reshard", tmp_path, tmp_path / "new", "--ranks", 2)
    assert code == 0 and "step 1" in out
    assert "passed over a checkpoint: step-00000002" in err


def test_reshard_notices_a_source_that_is_damaged(run, tmp_path):
    source = save(tmp_path, 1)
    flip_a_bit(source / FILE)
    code, _, err = run("reshard", source, tmp_path / "new", "--ranks", 2)
    assert code == 2 and "was read as other bits than were saved: its digest is" in err and "ckpt verify" in err
    assert in_tree(tmp_path) == in_tree_of_one(source)


def in_tree_of_one(source):
    return in_tree(source.parent)


def test_nothing_is_left_or_written_over(run, tmp_path, monkeypatch):
    source = save(tmp_path, 1)
    before = in_tree(tmp_path)
    for there in (source, tmp_path / "latest"):
        code, _, err = run("reshard", source, there, "--ranks", 2)
        assert code == 2 and "is there already. Give the name of a folder that does not exist yet." in err
    code, _, err = run("reshard", source, tmp_path / "step-00000009", "--ranks", 2)
    assert code == 2 and "named for step 9, but would hold step 1. Name it step-00000001" in err
    monkeypatch.setattr(rewrite, "free_bytes", lambda path: 100)
    code, _, err = run("reshard", source, tmp_path / "new", "--ranks", 2)
    assert code == 2 and "but only 100 are free there" in err
    monkeypatch.undo()
    (tmp_path / ".unfinished-new").mkdir()
    code, _, err = run("reshard", source, tmp_path / "new", "--ranks", 2)
    assert code == 2 and "another command is writing" in err and "or delete the folder" in err
    (tmp_path / ".unfinished-new").rmdir()
    (tmp_path / "file").write_text("")
    assert run("reshard", source, tmp_path / "file" / "new", "--ranks", 2)[0] == 2
    (tmp_path / "file").unlink()
    assert in_tree(tmp_path) == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = save(tmp_path, 1)
    before = in_tree(tmp_path)

    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptdist.checkpoint.tensor_file.write_all", full)
    with Checkpoint.open(source, verify=True) as checkpoint, pytest.raises(StorageError, match="the disk is full"):
        reshard(checkpoint, tmp_path / "new", 2)
    assert in_tree(tmp_path) == before


class Killed(BaseException):
    """As kill -9: nothing after it has any effect, cleaning up included."""


def test_killed_at_any_system_call_it_is_whole_or_not_there(tmp_path, monkeypatch):
    source = save(tmp_path, 1)
    expected = contents(source)
    left = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    finished = []
    for instant in range(200):
        destination = tmp_path / str(instant) / "new"
        with Checkpoint.open(source, verify=True) as checkpoint, monkeypatch.context() as patch:
            checkpoint.read("weight/scale")  # the source is open by now
            left = instant
            for name in ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                reshard(checkpoint, destination, 2)
                alive = True
            except Killed:
                alive = False
        finished.append(destination.exists())
        if destination.exists():
            assert contents(destination) == expected
        if alive:
            break
    assert alive and instant > 10
    assert finished == sorted(finished) and finished.count(True) < 5 < finished.count(False)


def test_a_resharded_checkpoint_is_found_by_a_run(tmp_path, run):
    source = save(tmp_path / "old", 5)
    assert run("reshard", source, tmp_path / "run" / "checkpoints" / "step-00000005", "--ranks", 2)[0] == 0
    code, out, _ = run("list", tmp_path / "run")
    assert code == 0 and "good" in out


SCRIPT = """
import resource, sys
from pathlib import Path
from launch import cli
code = cli.main(sys.argv[1:])
peak = int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')).split()[1])
print('PEAK', peak * 1024, 'TORCH', 'torch' in sys.modules, 'CODE', code)
"""


def measured(*words):
    """(peak resident bytes, whether torch was loaded, exit code) of a command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    _, peak, _, torch, _, code = done.stdout.splitlines()[-1].split()
    return int(peak), torch == "True", int(code)


def test_offline_commands_need_no_torch_and_less_memory_than_a_tensor(tmp_path):
    """One large tensor among small ones. The promise is a tensor and 200 MB in all; it is less than the tensor."""
    tensors = some_state(1) | {"weight/big": np.ones((3072, 8192), np.float32)}
    big = tensors["weight/big"].nbytes
    one, other = save(tmp_path / "a", 1, tensors), tmp_path / "b" / "step-00000001"
    del tensors
    least = measured("ckpt", "list", tmp_path / "a")[0]
    assert least < 100 << 20
    commands = {
        "reshard": ("reshard", one, other, "--ranks", 3),
        "diff": ("diff", one, other),
        "verify": ("verify", other),
        "list": ("list", tmp_path / "b"),
        "average": ("average", one, other, "--out", tmp_path / "mean"),
        "diff of what differs": ("diff", one, tmp_path / "mean"),
    }
    for name, words in commands.items():
        peak, torch, code = measured("ckpt", *words)
        assert code == (1 if name == "diff of what differs" else 0), name
        assert not torch, f"{name} loads torch"
        assert peak - least < 80 << 20 < big, f"{name} took {peak - least >> 20} MB more than `list`"
    shutil.rmtree(tmp_path / "a")


# -- diff ------------------------------------------------------------------------------------------------------------


def test_diff_says_which_tensors_and_by_how_much(run, tmp_path):
    tensors = some_state(1)
    changed = {name: value.copy() for name, value in tensors.items()}
    changed["weight/embedding.weight"][3, 4] += 0.5
    del changed["exp_avg/scale"]
    changed["exp_avg_sq/layers.0.norm.weight"] = np.zeros(9, np.float32)
    changed["weight/scale"] = tensors["weight/scale"].astype(np.float64)
    one, other = save(tmp_path / "a", 1, tensors), save(tmp_path / "b", 1, changed)
    code, out, _ = run("diff", one, other)
    assert code == 1
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "1 of 232" in lines["weight/embedding.weight"] and " 0.5 " in lines["weight/embedding.weight"]
    assert "only in the first" in lines["exp_avg/scale"]
    assert "shape [8], not [9]" in lines["exp_avg_sq/layers.0.norm.weight"]
    assert "the same numbers, but float32, not float64" in lines["weight/scale"]
    assert "4 of 9 tensors differ, the run's state is equal" in out
    with Checkpoint.open(one, verify=True) as left, Checkpoint.open(other, verify=True) as right:
        (found,) = [entry for entry in compare(left, right).tensors if entry.problem is None]
    norm = np.linalg.norm(tensors["weight/embedding.weight"].astype(np.float64))
    assert found.largest == pytest.approx(0.5, rel=1e-6) and found.relative == pytest.approx(0.5 / norm, rel=1e-6)


def test_diff_reads_nothing_where_digests_are_equal(run, tmp_path):
    one = save(tmp_path / "a", 1)
    other = tmp_path / "b" / "step-00000001"
    shutil.copytree(one, other)
    for path in (one, other):
        size = (path / FILE).stat().st_size
        (path / FILE).write_bytes(bytes(size))  # whoever reads it fails
    assert run("diff", one, other)[0] == 0


def test_diff_knows_numbers_that_are_none(tmp_path):
    value = np.array([1.0, np.nan, np.inf, 0.0], np.float32)
    other = np.array([1.0, np.nan, 2.0, -0.0], np.float32)
    with (
        Checkpoint.open(save(tmp_path / "a", 1, {"w": value}), verify=True) as left,
        Checkpoint.open(save(tmp_path / "b", 1, {"w": other}), verify=True) as right,
    ):
        (found,) = compare(left, right).tensors
    assert (found.elements, found.largest) == (2, np.inf)


def test_diff_compares_across_precisions(tmp_path):
    value = np.array([[1.0, 2.0], [3.0, 4.0078125]], np.float32)
    bits = (value.view(np.uint32) >> 16).astype(np.uint16)
    one = save(tmp_path / "a", 1, {"w": value})
    other = save_checkpoint(tmp_path / "b", 1, [whole("w", bits, "bfloat16")], {}, ONE_RANK)
    with Checkpoint.open(one, verify=True) as left, Checkpoint.open(other, verify=True) as right:
        (found,) = compare(left, right).tensors
    assert found.elements == 1 and found.largest == 4.0078125 - as_float64(bits, "bfloat16")[1, 1]


def test_diff_of_run_state(run, tmp_path):
    tensors = some_state(1)
    one = save(tmp_path / "a", 1, tensors, {"data": {"seed": 1, "phases": [1, 2]}, "config": {"a": 1}})
    other = save(tmp_path / "b", 1, tensors, {"data": {"seed": 2, "phases": [1, 2]}, "config": {"a": 2}})
    code, out, _ = run("diff", one, other)
    assert code == 1 and "state data.seed: 1, then 2\n" in out and "1 values of the run's state differ" in out
    assert "state config.a: 1, then 2  (says how it was made)" in out and "phases" not in out
    same = save(tmp_path / "c", 1, tensors, {"data": {"seed": 1, "phases": [1, 2]}, "layout": "TP 2"})
    code, out, _ = run("diff", one, same)
    assert code == 0 and "all 9 tensors are equal, the run's state is equal" in out
    assert 'state config: {"a": 1}, then absent' in out and 'state layout: "DP 1", then "TP 2"' in out


def test_diff_shows_the_worst_first_and_all_when_asked(run, tmp_path):
    tensors = {f"weight/{n:02d}": np.ones(2, np.float32) for n in range(50)}
    changed = {name: value * (1 + n * 1e-3) for n, (name, value) in enumerate(tensors.items())}
    one, other = save(tmp_path / "a", 1, tensors), save(tmp_path / "b", 1, changed)
    out = run("diff", one, other)[1]
    assert "weight/49" in out and "weight/01" not in out and "and 9 less different (--all shows them)" in out
    assert "weight/01" in run("diff", one, other, "--all")[1]


# -- verify and list -------------------------------------------------------------------------------------------------


def test_verify_marks_what_is_good_and_list_says_so(run, tmp_path):
    path = save(tmp_path, 2)
    assert run("list", tmp_path)[1].split()[:8] == [
        "step",
        "tokens",
        "loss",
        "size",
        "layout",
        "verified",
        "age",
        "state",
    ]
    assert run("list", tmp_path)[1].splitlines()[1].split()[7] == "-"
    code, out, _ = run("verify", path)
    assert code == 0 and out.startswith("step-00000002: good: 9 tensors, ")
    assert json.loads((path / "verified").read_text())["when"]
    (row,) = run("list", tmp_path)[1].splitlines()[1:]
    assert row.split()[:3] == ["2", "2,048", "2.0000"] and " ago " in row and row.split()[-1] == "good"
    rewrite_manifest(path, lambda manifest: manifest.update(new=1))
    (row,) = run("list", path)[1].splitlines()[1:]
    assert "ago" not in row  # another manifest than the one that was verified


def test_verify_of_a_folder_goes_through_all_and_exits_1(run, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step)
    flip_a_bit(tmp_path / "checkpoints" / "step-00000002" / FILE)
    code, out, _ = run("verify", tmp_path)
    assert code == 1 and out.count(": good: ") == 2 and "2 of 3 are good" in out
    assert f"step-00000002: bad: {tmp_path}/checkpoints/step-00000002/{FILE} has sha256" in out
    assert not (tmp_path / "checkpoints" / "step-00000002" / "verified").exists()
    code, _, err = run("verify", tmp_path / "nowhere")
    assert code == 2 and "there is no checkpoint at" in err


def test_verify_computes_digests_too(run, tmp_path):
    """Files that hash as the manifest says, but hold another state than its digests say."""
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: manifest["tensors"]["weight/scale"].update(digest="0123456789abcdef"))
    Checkpoint.open(path, verify=True).close()
    code, out, _ = run("verify", path)
    assert code == 1 and f"tensor weight/scale in {path / FILE} has digest" in out
    assert "the manifest says 0123456789abcdef" in out


def test_a_folder_that_cannot_be_written_is_verified_all_the_same(run, tmp_path, monkeypatch):
    path = save(tmp_path, 1)

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("gptdist.checkpoint.verify.mark_verified", refuse)
    code, out, _ = run("verify", path)
    assert code == 0 and "not marked as verified, since its folder cannot be written" in out


# -- average ---------------------------------------------------------------------------------------------------------


def test_average_is_the_mean_of_weights_alone(run, tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    code, out, _ = run("average", paths[2], paths[0], paths[1], "--out", tmp_path / "mean")
    assert code == 0 and "it has weights alone" in out
    with Checkpoint.open(tmp_path / "mean", verify=True) as checkpoint:
        assert checkpoint.names() == [name for name in sorted(some_state(1)) if name.startswith("weight/")]
        for name in checkpoint.names():
            mean = np.mean([some_state(step)[name].astype(np.float64) for step in (1, 2, 3)], axis=0)
            assert np.abs(checkpoint.read(name) - mean).max() <= 1e-7 * max(1, np.abs(mean).max())
        state = checkpoint.state
        assert checkpoint.step == 3 and state["loss"] is None and "engine" not in state
        assert [origin["step"] for origin in state["averaged_from"]] == [3, 1, 2]
        with pytest.raises(CheckpointError, match=r"mean of 3 checkpoints' weights.*checkpoint\.start_from"):
            check_resumable(checkpoint.names(), state, RunConfig(), "x")
    assert run("verify", tmp_path / "mean")[0] == 0


def test_average_sums_in_double_precision(run, tmp_path):
    """Summed in single precision the small part would be lost."""
    values = [2.0**24, 1.0, 1.0]
    paths = [save(tmp_path, n + 1, {"weight/w": np.array([value], np.float32)}) for n, value in enumerate(values)]
    assert run("average", *paths, "--out", tmp_path / "mean")[0] == 0
    with Checkpoint.open(tmp_path / "mean", verify=True) as checkpoint:
        assert checkpoint.read("weight/w")[0] == np.float32((2.0**24 + 2) / 3)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            {"weight/w": np.ones((2, 4), np.float32)},
            "of different models: weight/w is float32 [2, 3] in one and float32 [2, 4]",
        ),
        ({"weight/v": np.ones((2, 3), np.float32)}, "of different models: only one of them has weight/v"),
        ({"exp_avg/w": np.ones((2, 3), np.float32)}, "of different models: only one of them has weight/w"),
    ],
)
def test_only_one_model_has_a_mean(run, tmp_path, other, says):
    one = save(tmp_path, 2, {"weight/w": np.ones((2, 3), np.float32)})
    code, _, err = run("average", one, save(tmp_path, 1, other), "--out", tmp_path / "mean")
    assert code == 2 and says in err and not (tmp_path / "mean").exists()


def test_only_numbers_have_a_mean(run, tmp_path):
    one = save(tmp_path, 1, {"weight/w": np.ones(2, np.int64)})
    code, _, err = run("average", one, "--out", tmp_path / "mean")
    assert code == 2 and "weight/w is int64 [2]; only float64, float32, bfloat16, float16 have a mean" in err
    code, _, err = run("average", save(tmp_path, 2, {"exp_avg/w": np.ones(2)}), "--out", tmp_path / "mean")
    assert code == 2 and "has no weights" in err


def test_a_damaged_source_is_not_averaged(run, tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    flip_a_bit(one / FILE)
    code, _, err = run("average", one, two, "--out", tmp_path / "mean")
    assert code == 2 and f"{one / FILE} has sha256" in err and not (tmp_path / "mean").exists()
