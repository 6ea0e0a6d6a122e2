"""What a user can get wrong: one clear error, exit 2, and nothing written or changed.

Through the command. What it finds before any rank starts runs in this process; the rest in processes of its own.
"""

import json
import shutil
import socket
import sysconfig
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from data_tools.build import build_corpus
from data_tools.corpus.order import RunOrder
from gptdist.config.sections import RunConfig
from launch import cli
from tests.dist.commands import (
    SOURCES,
    TINY_RUN,
    Commands,
    checkpoint_names,
    curve,
    last_step,
    open_last,
    render_run,
    tree,
)

Answer = Callable[..., tuple[int, str]]


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """`gptdist ARGV` in this process: exit code and stderr."""

    def run(*argv: object) -> tuple[int, str]:
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of two steps, both saved; its corpus is where it was."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"train__steps": 2, "schedule__warmup_steps": 0, "checkpoint__interval": 1}
    Commands(folder, corpus).train(folder / "run", **settings).expect(0)
    return folder / "run"


# -- seen before a rank starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.depth=3"], ["model.depth", "is not a setting", "num_layers"]),
        (["train.step=3"], ["train.step", "Did you mean", "train.steps"]),
        (["train.steps=many"], ["train.steps", "many", "whole number"]),
        (["optimizer.beta1=1.5"], ["optimizer.beta1", "1.5"]),
        (["train.global_batch_size=7", "--nproc", 2], ["train.global_batch_size (7)", "6 or 8"]),
        (["parallel.tensor=3", "--nproc", 3], ["parallel.tensor (3)", "model.num_heads (4)", "1, 2 or 4"]),
        (["parallel.tensor=2", "--nproc", 3], ["does not divide the world size 3", "2 or 4 ranks"]),
        (["parallel.pipeline=4", "--nproc", 4], ["model.num_layers (2)", "parallel.pipeline (4)"]),
        (["parallel.sequence=true"], ["parallel.sequence", "parallel.tensor"]),
    ],
)
def test_a_run_that_cannot_be(words: list[object], says: list[str], answer: Answer, commands: Commands) -> None:
    run_dir = commands.folder / "run"
    argv = commands.train_words(run_dir)
    before = tree(commands.folder)
    code, err = answer(*argv, *words)
    assert code == 2
    assert all(word in err for word in says), err
    assert err.count("error: ") == 1 and "command line" in err and "Traceback" not in err
    assert tree(commands.folder) == before


def test_mistakes_in_the_file_are_named_by_line_and_all_at_once(answer: Answer, tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("model:\n  num_layer: 2\ndata:\n  corpus: none\ntrain:\n  steps: -4\n  steps: 5\n")
    code, err = answer("train", config)
    assert code == 2 and err.count("error: ") == 1
    assert f"{config}:2" in err and "Did you mean" in err and "num_layers" in err
    assert f"{config}:7" in err, "the key that is there twice"
    assert list(tmp_path.iterdir()) == [config]


def test_a_config_that_is_not_there(answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("{}")
    code, err = answer("train", tmp_path / "quikstart.yaml")
    assert code == 2 and "quikstart.yaml cannot be read" in err and "quickstart.yaml" in err.partition("cannot")[2]


def test_a_port_in_use(answer: Answer, commands: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = commands.train_words(commands.folder / "run", 2, launch__port=port)
        before = tree(commands.folder)
        code, err = answer(*argv)
    assert code == 2 and err.count("error: ") == 1 and f"port {port}" in err and "launch.port" in err
    assert tree(commands.folder) == before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", ["No document"]),
        ("blank.txt", b" \n\n", ["No document"]),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), ["latin.txt", "UTF-8", "3", "--on-bad-text skip"]),
        ("broken.jsonl", b'{"text": "good"}\n{"text": \n', ["broken.jsonl", "2"]),
        ("fieldless.jsonl", b'{"body": "good"}\n', ["fieldless.jsonl", "'text'", "--text-field"]),
    ],
)
def test_text_that_makes_no_corpus(name: str, content: bytes, says: list[str], answer: Answer, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    code, err = answer("data", "build", tmp_path / name, "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert code == 2 and err.count("error: ") == 1 and "Traceback" not in err
    assert all(word in err for word in says), err
    assert tree(tmp_path) == {name: content}, "something was left behind"


def test_sources_that_are_not_there(answer: Answer, tmp_path: Path) -> None:
    code, err = answer("data", "build", tmp_path / "none", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert code == 2 and str(tmp_path / "none") in err
    (tmp_path / "folder").mkdir()
    code, err = answer("data", "build", tmp_path / "folder", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert code == 2 and "No document" in err
    assert not (tmp_path / "out").exists()


# -- seen by the ranks -------------------------------------------------------------------------------------------


def test_no_corpus(commands: Commands, tmp_path: Path) -> None:
    commands.corpus = tmp_path / "nowhere"
    commands.train(tmp_path / "run", 2).one_error("nowhere is not a corpus", "does not exist", "gptdist data build")
    assert not (tmp_path / "run").exists()


def test_a_model_too_small_for_the_tokenizer(commands: Commands, tmp_path: Path) -> None:
    commands.train(tmp_path / "run", model__vocab_size=100).one_error("model.vocab_size (100)", "257")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_a_damaged_shard(split: str, damage: str, corpus: Path, commands: Commands, tmp_path: Path) -> None:
    commands.corpus = tmp_path / "damaged"
    shutil.copytree(corpus, commands.corpus)
    (shard,) = commands.corpus.glob(f"{split}*.tar")
    content = bytearray(shard.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        shard.unlink()
    words = {"flipped bit": "damaged", "truncated": "truncated", "missing": "cannot be read"}[damage]
    nproc = 2 if split == "train" else 1
    commands.train(tmp_path / "run", nproc).one_error(str(shard), words, "gptdist data verify")
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_damaged_under_a_run(commands: Commands, tmp_path: Path) -> None:
    """In a part that only a later step reads: the steps before are made, the shard is named, and once it is whole again
    the run goes on."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    commands.corpus, run_dir = tmp_path / "damaged", tmp_path / "run"
    build_corpus([stdlib / name for name in SOURCES], commands.corpus, "bytes", chunk_tokens=2000)
    config = RunConfig.model_validate(json.loads(render_run({**TINY_RUN, "data.corpus": str(commands.corpus)})))
    with closing(RunOrder(config, lambda step: 12 * step)) as order:
        (reader,) = order.readers.values()
        first_used: dict[int, int] = {}
        for sample in range(12 * 10):
            start = order.source.place(sample).window * order.length
            for chunk in (reader.index.chunk_of(start), reader.index.chunk_of(start + order.length)):
                first_used.setdefault(chunk, sample // 12 + 1)
        chunk, step = max(first_used.items(), key=lambda use: use[1])
        damaged = int(reader.index.tokens_offset[chunk]) + 100
    assert 4 < step <= 10
    (shard,) = commands.corpus.glob("train*.tar")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:damaged] + bytes([whole[damaged] ^ 4]) + whole[damaged + 1 :])
    commands.train(run_dir, 2).one_error(str(shard), f"chunk {chunk} ", "damaged", "gptdist data verify")
    assert last_step(run_dir) == step - 1
    shard.write_bytes(whole)
    commands.train(run_dir, 2).expect(0)
    assert sorted(curve(run_dir)) == list(range(1, 11))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model__hidden_size": 48}, ["another model", "model.hidden_size is 32 there, 48 here", "--fresh"]),
        ({"model__num_layers": 1}, ["another model", "model.num_layers is 2 there, 1 here", "--fresh"]),
        ({"model__bias": False}, ["another model", "model.bias is True there", "--fresh"]),
        ({"data__seed": 7}, ["data.seed was another", "--fresh"]),
        ({"model__sequence_length": 16}, ["another", "--fresh"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_config(
    settings: dict[str, object], says: list[str], trained: Path, commands: Commands
) -> None:
    before = tree(trained)
    commands.train(trained, train__steps=4, **settings).one_error("step-00000002", *says)
    assert tree(trained) == before


def test_resuming_with_another_corpus_or_tokenizer(trained: Path, commands: Commands, tmp_path: Path) -> None:
    before = tree(trained)
    text = tmp_path / "text.txt"
    text.write_text("Other words for another tokenizer, over and over again. " * 200)
    for tokenizer, says in (("bytes", "another corpus"), ("train:257", "tokenizer is not the corpus's")):
        commands.corpus = tmp_path / tokenizer.replace(":", "-")
        build_corpus([text], commands.corpus, tokenizer, validation_sources=[text])
        commands.train(trained, train__steps=4).one_error("step-00000002", says, "--fresh")
    commands.run("eval", trained, "--corpus", commands.corpus).one_error(str(commands.corpus), "another tokenizer")
    assert tree(trained) == before


def test_a_damaged_checkpoint_is_passed_over_and_none_is_never_step_0(
    trained: Path, commands: Commands, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    assert len(checkpoint_names(run_dir)) == 2
    newest, oldest = (run_dir / "checkpoints" / name for name in reversed(checkpoint_names(run_dir)))
    _flip_a_bit(newest)
    resumed = commands.train(run_dir, train__steps=3).expect(0)
    assert "passed over" in resumed.out and newest.name in resumed.out and f"checkpoints/{oldest.name}" in resumed.out
    assert open_last(run_dir).step == 3

    for name in checkpoint_names(run_dir):
        if name != newest.name:
            _flip_a_bit(run_dir / "checkpoints" / name)
    before = tree(run_dir)
    ended = commands.train(run_dir, train__steps=9)
    ended.one_error("none of them is good", code=1)
    assert "sha256" in ended.err and tree(run_dir) == before
    commands.run("generate", run_dir).one_error("none of them is good", code=1)


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_nothing_trained_there(command: str, commands: Commands, tmp_path: Path) -> None:
    commands.run(command, tmp_path / "nowhere").one_error("no checkpoint", "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_run_folder_that_cannot_be(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    commands.train(tmp_path / "file" / "run", 2).one_error(str(tmp_path / "file" / "run"), "launch.run_dir")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_no_room_for_a_checkpoint(commands: Commands, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(700_000))
    ended = commands.train(small_disk / "run", 2)
    ended.one_error(str(small_disk / "run"), "has room for", "416,640", "checkpoint.dir")
    assert list(tree(small_disk)) == ["ballast"]


def test_no_room_for_a_corpus(commands: Commands, small_disk: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 100_000)
    ended = commands.run("data", "build", text, "--out", small_disk / "corpus", "--tokenizer", "bytes")
    ended.one_error(str(small_disk / "corpus"))
    assert tree(small_disk) == {}


def _flip_a_bit(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
