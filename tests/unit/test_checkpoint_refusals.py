"""What is not loaded, by any command, and the reason that is given: other owners, escapes, damage, exchanges."""

import os
import pwd
from argparse import Namespace

import numpy as np
import pytest

from gptdist.checkpoint.copying import copy_checkpoint
from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.listing import list_checkpoints, summarize
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import TensorEntry
from gptdist.checkpoint.read import Checkpoint, find_latest, is_checkpoint, open_newest
from gptdist.checkpoint.rewrite import reshard
from gptdist.checkpoint.verify import verify_checkpoint
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.config.sections import ModelConfig
from gptdist.errors import CheckpointError, NoGoodCheckpoint
from gptdist.model.parameters import logical_shapes
from gptdist.train.compatible import check_same_model
from gptdist.world import World
from launch import cli
from launch.checkpoints.show import verify as verify_all
from tests.unit.checkpoints import FILE, flip_a_bit, rewrite_manifest, save

SECOND = "rank-00001.safetensors"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def refused(path, message, verify=True, **settings):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path, verify=verify, **settings)


def offline(path, destination, *options):
    """Every command that loads one checkpoint."""
    yield ["ckpt", "verify", str(path), *options]
    yield ["ckpt", "diff", str(path), str(path), *options]
    yield ["ckpt", "reshard", str(path), str(destination), "--ranks", "2", *options]
    yield ["ckpt", "average", str(path), "--out", str(destination), *options]


def all_refuse(path, capsys, *words):
    """No command takes it, each says why, and nothing is made."""
    destination = path.parent / "new"
    for argv in offline(path, destination):
        code = cli.main(argv)
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert code == (1 if argv[1] == "verify" else 2), argv
        assert all(word in said for word in words), said
        assert "Traceback" not in said and not destination.exists()


# -- whose it is -----------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("part", ["", "manifest.json", FILE])
def test_what_another_user_owns_is_refused_unless_told(tmp_path, capsys, part):
    path = save(tmp_path, 1)
    other = pwd.getpwnam("nobody")
    os.chown(path / part, other.pw_uid, -1)
    all_refuse(
        path,
        capsys,
        f"{path / part} belongs to user nobody, neither to this user nor to root.",
        "checkpoint.trust_others: true, or --trust-others",
    )
    with pytest.raises(NoGoodCheckpoint, match="belongs to user nobody"):
        find_latest(tmp_path)
    (summary,) = list_checkpoints(tmp_path)
    assert not summary.ok and "belongs to user nobody" in summary.reason
    assert list_checkpoints(tmp_path, trust_others=True)[0].ok
    assert find_latest(tmp_path, trust_others=True) is not None
    for argv in offline(path, tmp_path / "new", "--trust-others"):
        assert cli.main(argv) == (2 if argv[1] == "average" else 0), argv  # reshard has made it by then


@pytest.mark.parametrize("part", ["", "manifest.json", FILE])
def test_what_every_user_may_write_is_refused_unless_told(tmp_path, capsys, part):
    path = save(tmp_path, 1)
    mode = 0o757 if not part else 0o646
    os.chmod(path / part, mode)
    all_refuse(path, capsys, f"{path / part} can be written by every user (mode {mode:o}).", "--trust-others")
    with pytest.raises(NoGoodCheckpoint, match="can be written by every user"):
        find_latest(tmp_path)
    assert cli.main(["ckpt", "verify", str(path), "--trust-others"]) == 0


def test_a_group_may_write(tmp_path):
    path = save(tmp_path, 1)
    for part in ("", "manifest.json", FILE):
        os.chmod(path / part, 0o775 if not part else 0o664)
    Checkpoint.open(path, verify=True).close()


def test_what_is_saved_without_a_umask_can_be_resumed(tmp_path):
    before = os.umask(0)
    try:
        path = save(tmp_path / "own", 1)
        reshard(Checkpoint.open(path, verify=True), tmp_path / "resharded", 2)
        copy_checkpoint(path, tmp_path / "copy")
    finally:
        os.umask(before)
    for made in (path, tmp_path / "resharded", tmp_path / "copy"):
        Checkpoint.open(made, verify=True).close()


def look(path):
    """As `ckpt list` does."""
    if not is_checkpoint(path):
        return list_checkpoints(path)
    summary = summarize(path, verify=False)
    assert summary.reason is not None
    raise CheckpointError(summary.reason)


def verify(path):
    """As `ckpt verify` does."""
    if not is_checkpoint(path):
        return verify_all(Namespace(path=path, trust_others=False))
    raise CheckpointError(verify_checkpoint(path).problem)


@needs_root
@pytest.mark.parametrize("command", [look, verify, open_newest, find_latest])
@pytest.mark.parametrize("inside", ["", "step-00000001"])
def test_a_folder_that_this_user_may_not_read_is_named(tmp_path, command, inside):
    closed = save(tmp_path / "closed", 1).parent
    closed.chmod(0o700)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=f"cannot read .*{closed}.*Permission denied"):
            command(closed / inside)
    finally:
        os.seteuid(0)


# -- where it leads --------------------------------------------------------------------------------------------------


def rename_file(manifest, name):
    manifest["files"] = {name: manifest["files"][FILE]}
    for tensor in manifest["tensors"].values():
        for fragment in tensor["fragments"]:
            fragment[0] = name


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "x.pkl",
        "x.pt",
        "x.bin",
        "x.npy",
        "x.safetensors\n",
        ".x.safetensors",
        "x.safetensors/",
        "\x1b[31m.safetensors",
        "",
    ],
)
def test_a_manifest_cannot_lead_elsewhere_or_to_another_format(tmp_path, capsys, name):
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: rename_file(manifest, name))
    all_refuse(path, capsys, f"file name {name!r} is not allowed: only plain *.safetensors names inside")


def test_links_are_not_followed(tmp_path, capsys):
    path = save(tmp_path, 1)
    for name, says in ((FILE, f"{FILE} is missing, or no regular file"), ("manifest.json", "manifest.json is missing")):
        (path / name).rename(tmp_path / "elsewhere")
        (path / name).symlink_to(tmp_path / "elsewhere")
        all_refuse(path, capsys, says)
        (path / name).unlink()
        (tmp_path / "elsewhere").rename(path / name)


def test_no_folder_and_no_pipe_is_waited_for(tmp_path, capsys):
    path = save(tmp_path, 1)
    (path / FILE).unlink()
    os.mkfifo(path / FILE)
    all_refuse(path, capsys, f"{FILE} is missing, or no regular file")


# -- damage ----------------------------------------------------------------------------------------------------------


def two_files(folder):
    """A checkpoint of two files of the same size, as two ranks write it."""
    value = np.arange(16, dtype=np.float32).reshape(4, 4)
    path = save_checkpoint(
        folder, 1, [HostFragment("weight/w", (4, 4), Box.whole((4, 4)), "float32", value)], {}, Comms(World())
    )
    with Checkpoint.open(path, verify=True) as checkpoint:
        reshard(checkpoint, folder / "step-00000001.1", 2)
    return folder / "step-00000001.1"


def test_two_files_of_the_same_size_that_were_exchanged_are_noticed(tmp_path, capsys):
    path = two_files(tmp_path)
    one, two = path / FILE, path / SECOND
    assert one.stat().st_size == two.stat().st_size
    os.rename(one, path / "x")
    os.rename(two, one)
    os.rename(path / "x", two)
    refused(path, f"{FILE} has sha256 .*, the manifest says")
    # Sizes alone do not tell; reading does.
    message = r"it has no tensor weight/w\[0:2,0:4\], which the manifest says it has"
    with Checkpoint.open(path, verify=False) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.read("weight/w")
    assert cli.main(["ckpt", "verify", str(path)]) == 1
    assert f"bad: {path / FILE} has sha256" in capsys.readouterr().out
    assert cli.main(["ckpt", "reshard", str(path), str(tmp_path / "new"), "--ranks", "1"]) == 2
    assert not (tmp_path / "new").exists()


def test_a_file_of_the_same_tensors_from_another_step_is_noticed(tmp_path, capsys):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    (two / FILE).write_bytes((one / FILE).read_bytes())
    refused(two, f"{FILE} has sha256")
    assert cli.main(["ckpt", "reshard", str(two), str(tmp_path / "new"), "--ranks", "1"]) == 2
    assert "was read as other bits than were saved" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["header", "payload", "manifest"])
def test_a_flipped_bit_is_named(tmp_path, capsys, where):
    path = save(tmp_path, 1)
    name = "manifest.json" if where == "manifest" else FILE
    flip_a_bit(path / name, {"header": 40, "payload": -1, "manifest": 60}[where])
    says = "its last line is not the sha256 of the rest" if where == "manifest" else "has sha256"
    refused(path, rf"{name}.*{says}")
    assert cli.main(["ckpt", "verify", str(path)]) == 1
    assert f"bad: {path / name}" in capsys.readouterr().out
    for argv in list(offline(path, tmp_path / "new"))[2:]:
        assert cli.main(argv) == 2 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["manifest.json", FILE])
def test_what_is_cut_short_or_gone_is_named(tmp_path, capsys, name):
    path = save(tmp_path, 1)
    size = (path / name).stat().st_size
    os.truncate(path / name, size - 1)
    all_refuse(
        path, capsys, name, "the sha256 of the rest" if name != FILE else f"has {size - 1:,} bytes, the manifest"
    )
    (path / name).unlink()
    all_refuse(path, capsys, f"{name} is missing")


@pytest.mark.parametrize(("version", "says"), [(1, "format version 1"), (3, "format version 3"), ("2", "version '2'")])
def test_another_version_is_refused(tmp_path, capsys, version, says):
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: manifest.update(version=version))
    all_refuse(path, capsys, says, "this gptdist reads version 2. Use the gptdist that wrote it, or a newer one.")


def test_another_kind_of_folder_is_refused(tmp_path, capsys):
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: manifest.update(format="gptdist-corpus"))
    all_refuse(path, capsys, "format is 'gptdist-corpus', not 'gptdist-checkpoint'. This is no checkpoint of gptdist.")
    (path / "manifest.json").write_text('{"format": "gptdist-corpus"}\n')
    refused(path, "This is no checkpoint of gptdist")
    (path / "manifest.json").write_text('{"format": "gptdist-checkpoint"}\n')
    refused(path, "its last line is not the sha256 of the rest")


def test_another_model_is_refused_with_what_differs():
    model = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=64, sequence_length=8)
    shapes = logical_shapes(model)
    check_same_model(shapes, model, "x")
    name = next(iter(shapes))
    fewer = {key: shape for key, shape in shapes.items() if key != name}
    for wrong, says in (
        (fewer, rf"x is a checkpoint of another model: it has no {name}"),
        (shapes | {name: (1, 2)}, rf"its {name} is \[1, 2\], the configured model's is"),
        (shapes | {"extra": (1,)}, "it has extra, which the configured model has not"),
    ):
        with pytest.raises(CheckpointError, match=says):
            check_same_model(wrong, model, "x")


def test_a_place_for_another_shape_or_dtype_is_refused(tmp_path):
    with Checkpoint.open(save(tmp_path, 1), verify=True) as checkpoint:
        for out in (np.empty((28, 8), np.float32), np.empty((29, 8), np.float64)):
            with pytest.raises(ValueError, match="the place for it"):
                checkpoint.read("weight/embedding.weight", out=out)
        place = np.zeros((40, 20), np.float32)
        part = place[3:32, 5:13]
        assert checkpoint.read("weight/embedding.weight", out=part) is part
        assert np.array_equal(place[3:32, 5:13], checkpoint.read("weight/embedding.weight"))
        assert not place[:3].any() and not place[:, :5].any() and not place[:, 13:].any()
        scalar = np.empty((), np.float32)
        assert checkpoint.read("weight/scale", out=scalar) == checkpoint.read("weight/scale")
        assert isinstance(checkpoint.manifest.tensors["weight/scale"], TensorEntry)
        assert checkpoint.digest("weight/scale") == checkpoint.manifest.tensors["weight/scale"].digest


def test_none_good_is_a_failure_with_the_list_and_none_at_all_is_a_mistake(tmp_path, capsys):
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step) / FILE)
    with pytest.raises(NoGoodCheckpoint, match=r"none of them is good:\n  step-00000002: .*\n  step-00000001: "):
        open_newest(tmp_path)
    assert cli.main(["ckpt", "reshard", str(tmp_path), str(tmp_path / "new"), "--ranks", "1"]) == 1
    assert "none of them is good" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere: neither"):
        open_newest(tmp_path / "nowhere")
