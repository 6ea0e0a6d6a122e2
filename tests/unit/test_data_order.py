"""`gptdist data order`: a step's documents and a document's steps fit each other; the check counts, and can fail."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.build import build_corpus
from data_tools.corpus import order_check
from data_tools.corpus.order import RunOrder, chunk_documents, find_document
from data_tools.corpus.order_check import prove_epoch
from gptdist.config.sections import RunConfig
from gptdist.data.local_order import LocalOrder
from gptdist.data.order import WindowOrder
from gptdist.data.reader import TokenReader
from gptdist.errors import CorpusError
from gptdist.train.schedule import samples_at_step
from launch import cli

CONTEXT = 16
BATCH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for name, count in (("a", 90), ("b", 50)):
        lines = (json.dumps({"text": f"{name}{number} é " * (1 + number % 7)}) for number in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        build_corpus(
            [folder / f"{name}.jsonl"],
            folder / name,
            "bytes",
            chunk_tokens=200,
            shard_bytes=6000,
            validation_fraction=0.1,
        )
    return folder


def config_file(folder: Path, out: Path, **data: Any) -> Path:
    blend = [{"corpus": str(folder / name), "weight": weight} for name, weight in (("a", 2), ("b", 1))]
    phases = [{"from_sample": 60, "blend": blend[1:]}]
    fields = {
        "model": {"sequence_length": CONTEXT},
        "data": {"blend": blend, "phases": phases, **data},
        "train": {"steps": 80, "global_batch_size": BATCH},
        "schedule": {"batch_ramp": {"start": 2, "increment": 2, "samples": 30}},
    }
    (out / "run.yaml").write_text(json.dumps(fields))
    return out / "run.yaml"


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["data", "order", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


LOCAL = {"shuffle": "local", "shuffle_blocks": 2, "shuffle_block_tokens": 200}


@pytest.mark.parametrize("shuffle", [{}, LOCAL])
def test_steps_and_documents_answer_each_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shuffle: dict[str, Any]
) -> None:
    path = config_file(folder, tmp_path, **shuffle)
    by_step: dict[int, set[str]] = {}
    next_sample = 0
    for step in range(1, 81):
        code, out, _ = ask(capsys, path, "--step", step)
        lines = out.splitlines()
        assert code == 0
        assert lines[0].startswith(f"step {step} of 80: samples {next_sample} to ")
        by_step[step] = set()
        for line in lines[1:]:
            found = re.fullmatch(r"sample (\d+)  (\S+)  epoch (\d+)  window (\d+)  chunk [\d-]+  (.*)", line)
            assert found and int(found[1]) == next_sample
            next_sample += 1
            by_step[step] |= {f"{Path(found[2]).name}: {key}" for key in found[5].split(", ")}
    config = RunConfig.model_validate(json.loads(path.read_text()))
    assert next_sample == samples_at_step(80, config.train, config.schedule) > 400

    seen = 0
    for name, reader in ((name, TokenReader(folder / name, "train")) for name in "ab"):
        for key in chunk_documents(reader, 3).keys[:2]:
            code, out, _ = ask(capsys, path, "--document", key)
            told = {int(line.split()[1]) for line in out.splitlines() if line.startswith("step ")}
            assert code == 0
            assert told == {step for step, keys in by_step.items() if f"{name}: {key}" in keys}
            assert out.splitlines()[-1].endswith(f"in {len(told)} of 80 steps")
            seen += len(told)
    assert seen > 4


def test_a_documents_tokens_are_where_it_is_said_to_be(folder: Path) -> None:
    reader = TokenReader(folder / "a", "train")
    stream = np.concatenate(list(reader.chunks()))
    content = (folder / "a.jsonl").read_bytes()
    for chunk in (0, len(reader.index) - 1):
        for key in chunk_documents(reader, chunk).keys:
            (found,) = find_document(reader, key)
            line = content[int(key.rpartition("@")[2]) :].splitlines()[0]
            text = bytes(stream[found.start : found.stop - 1].astype(np.uint8)).decode()
            assert text == json.loads(line)["text"]
            assert stream[found.stop - 1] == 256


def test_a_step_names_all_documents_of_its_windows(folder: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(json.loads(config_file(folder, tmp_path).read_text()))
    run = RunOrder(config, lambda step: step * BATCH)
    for line in list(run.step_lines(4))[1:]:
        name, window = line.split()[2], int(line.split("window ")[1].split()[0])
        reader = run.readers[name]
        ends = np.concatenate(
            [
                chunk_documents(reader, chunk).ends + reader.index.token_start[chunk]
                for chunk in range(len(reader.index))
            ]
        )
        keys = [key for chunk in range(len(reader.index)) for key in chunk_documents(reader, chunk).keys]
        tokens = range(window * CONTEXT, (window + 1) * CONTEXT + 1)
        expected = dict.fromkeys(keys[int((ends <= token).sum())] for token in tokens)
        assert line.split("  ")[-1].split(", ") == list(expected)


def test_held_out_and_unknown_documents(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(folder, tmp_path)
    key = chunk_documents(TokenReader(folder / "b", "validation"), 0).keys[0]
    code, out, _ = ask(capsys, path, "--document", key)
    assert code == 0 and "held out (its validation split): no step trains on it" in out
    code, _, err = ask(capsys, path, "--document", "nope")
    assert code == 2 and "There is no document 'nope' in" in err
    code, _, err = ask(capsys, path, "--step", 81)
    assert code == 2 and "step 81 is not one of this run's 1 to 80" in err
    code, _, err = ask(capsys, path, "--step", 1, "--epoch", 1)
    assert code == 2 and "--epoch is for --check" in err


def test_the_check_says_what_it_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = TokenReader(folder / "a", "train").num_windows(CONTEXT)
    for settings in ([], ["data.shuffle=local", "data.shuffle_block_tokens=100"]):
        code, out, err = ask(capsys, config_file(folder, tmp_path), "--check", "--epoch", 5, *settings)
        assert (code, err) == (0, "")
        assert f"a: epoch 5, {windows} samples over {windows} windows: {windows} windows used, 0 outside" in out
        assert out.count("each window exactly once") == 2
        assert "0 gaps or repeats in the counts of the corpora" in out
    monkeypatch.setattr(WindowOrder, "windows", lambda self, first, count: np.arange(count) // 2)
    code, out, _ = ask(capsys, config_file(folder, tmp_path), "--check")
    assert code == 1 and "NOT each window exactly once" in out


@pytest.mark.parametrize("at_once", [64, 100, 1 << 20])
def test_a_large_corpus_is_checked_piece_by_piece(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_check, "WINDOWS_AT_ONCE", at_once)
    monkeypatch.setattr(order_check, "_SAMPLES_AT_ONCE", 77)
    told: list[tuple[int, int]] = []
    for order in (WindowOrder(3, 1000), LocalOrder(3, 1000, 30, 4)):
        proof = prove_epoch(order, 2, lambda stage, done, total: told.append((done, total)))
        assert proof.holds and (proof.samples, proof.used, proof.outside) == (1000, 1000, 0)
        assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("wrong", [5, 999, 1000, 10**7])
def test_one_wrong_window_is_noticed(wrong: int) -> None:
    class Wrong(WindowOrder):
        def windows(self, first_sample: int, count: int) -> np.ndarray:
            found = super().windows(first_sample, count)
            found[found == 7] = wrong
            return found

    proof = prove_epoch(Wrong(3, 1000), 0)
    assert not proof.holds
    assert (proof.used, proof.outside) == (999, int(wrong >= 1000))


def test_a_damaged_chunk_is_named(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "a").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    reader = TokenReader(tmp_path, "train")
    shard = tmp_path / reader.manifest.split("train").shards[int(reader.index.shard[1])].file
    content = bytearray(shard.read_bytes())
    start = int(reader.index.sample_offset[1])
    content[start : start + 200] = b"\xff" * 200
    shard.write_bytes(content)
    with pytest.raises(CorpusError, match=r"Chunk 1 of the train split .* cannot be read"):
        chunk_documents(reader, 1)
    shard.unlink()
    with pytest.raises(CorpusError, match=rf"{shard.name} cannot be read"):
        chunk_documents(reader, 1)
