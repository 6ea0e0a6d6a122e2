"""Builds under bad luck: others that come late, end early or failed before, few open files, links, odd leftovers."""

import json
import os
import random
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from data_tools.build import BuiltCorpus, Share, build_corpus
from data_tools.building.work import WorkFolder
from data_tools.corpus.verify import verify_corpus
from gptdist.errors import CorpusError, WorkerFailed


def source_of(folder: Path, documents: int = 60) -> Path:
    """A JSON lines file with copies, near copies, blanks and broken lines."""
    chance = random.Random(documents)
    words = ["alpha", "beta", "gamma", "delta", "épsilon", "zeta", "eta", "theta", "iota", "kappa"]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 150))) for _ in range(documents)]
    texts += [*texts[:9], *(text.upper() for text in texts[9:15]), *(f"{text} end" for text in texts[15:25]), " "]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "broken\n")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OPTIONS: dict[str, Any] = {"on_bad_text": "skip", "chunk_tokens": 300, "shard_bytes": 4000}


@pytest.mark.parametrize("seed", range(12))
def test_every_document_is_counted_once_whatever_the_pieces(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    source = source_of(tmp_path, chance.choice([5, 60]))
    options = {
        "dedup": chance.choice(["none", "exact", "near"]),
        "normalize": chance.choice(["none", "nfkc"]),
        "min_document_bytes": chance.choice([1, 20]),
        "max_document_bytes": chance.choice([None, 700]),
        "max_bytes": chance.choice([None, 9000]),
        "validation_fraction": chance.choice([0, 0.05, 0.5]),
    }
    if seed % 3 == 0:
        (tmp_path / "evaluation.txt").write_text(json.loads(source.read_text().splitlines()[1])["text"][:400])
        options["decontaminate"] = [tmp_path / "evaluation.txt"]
    if seed % 4 == 0:
        (tmp_path / "held").mkdir()
        options["validation_sources"] = [source_of(tmp_path / "held", 6)]
    tokenizer = "train:300" if seed % 5 == 0 else "bytes"
    for name, piece_bytes in (("c", 900), ("d", 10**8)):
        built = build_corpus([source], tmp_path / name, tokenizer, piece_bytes=piece_bytes, **OPTIONS, **options)
    assert built is not None
    assert files_of(tmp_path / "c") == files_of(tmp_path / "d")
    assert verify_corpus(tmp_path / "c") == []
    counted = built.statistics
    assert counted is not None
    kept, dropped = counted.kept_in_all(), counted.dropped_in_all()
    splits = built.manifest.splits.values()
    assert counted.documents_read == kept.documents + dropped.documents
    assert counted.bytes_read == kept.text_bytes + dropped.text_bytes
    assert kept.documents == sum(split.documents for split in splits)
    assert kept.text_bytes == sum(split.text_bytes for split in splits)
    assert kept.tokens == sum(split.tokens for split in splits)


def test_a_trained_tokenizer_does_not_depend_on_the_pieces(tmp_path: Path) -> None:
    source = source_of(tmp_path, 300)
    for name, piece_bytes in (("c", 700), ("d", 10**8)):  # of many pieces only some are read for a sample so small
        build_corpus([source], tmp_path / name, "train:300", piece_bytes=piece_bytes, max_bytes=2000, **OPTIONS)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "d")


def test_more_runs_than_files_may_be_open(tmp_path: Path) -> None:
    source = source_of(tmp_path, 80)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        build_corpus([source], tmp_path / "c", "bytes", piece_bytes=300, dedup="near", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    build_corpus([source], tmp_path / "d", "bytes", dedup="near", **OPTIONS)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "d")


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.99])
def test_a_single_text_trains(tmp_path: Path, fraction: float) -> None:
    for seed in range(3):
        (tmp_path / "a.txt").write_text(f"text {seed}")
        built = build_corpus([tmp_path / "a.txt"], tmp_path / str(seed), "bytes", validation_fraction=fraction)
        assert built is not None
        assert built.manifest.split("train").documents == 1


def test_no_text_to_train_on_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "held"):
        (tmp_path / f"{name}.txt").write_text("the same text")
    with pytest.raises(CorpusError, match=r"left to train on \(1 exact duplicate\)"):
        build_corpus(
            [tmp_path / "a.txt"],
            tmp_path / "c",
            "bytes",
            validation_sources=[tmp_path / "held.txt"],
            dedup="exact",
        )
    assert not (tmp_path / "c").exists()


def test_two_parts_end_whoever_is_slow(tmp_path: Path) -> None:
    """Part 1 must not wait for files that the first part has removed, however late it looks."""
    source = source_of(tmp_path)
    results: dict[int, BuiltCorpus | None] = {}

    def build(part: int) -> None:
        share = Share(part, 2, patience_seconds=20)
        results[part] = build_corpus([source], tmp_path / "c", "bytes", share=share, piece_bytes=2000, **OPTIONS)

    threads = [threading.Thread(target=build, args=(part,)) for part in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(results) == {0, 1}
    assert results[1] is None
    assert names_in(tmp_path) == ["a.jsonl", "c"]
    build_corpus([source], tmp_path / "d", "bytes", **OPTIONS)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "d")


def test_a_part_that_comes_when_all_is_done_finds_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path)
    entered = WorkFolder.has_plan

    def finished_meanwhile(work: WorkFolder, fingerprint: str) -> bool:
        if not (tmp_path / "c").exists():
            build_corpus([source], tmp_path / "d", "bytes", **OPTIONS)
            (tmp_path / "d").rename(tmp_path / "c")
        return entered(work, fingerprint)

    monkeypatch.setattr(WorkFolder, "has_plan", finished_meanwhile)
    # A single build has no other parts to wait for, so it never asks.
    found = build_corpus([source], tmp_path / "c", "bytes", share=Share(1, 2, patience_seconds=5), **OPTIONS)
    assert found is not None
    assert found.statistics is None
    assert names_in(tmp_path) == ["a.jsonl", "c"]


def test_an_earlier_failure_is_over_and_a_new_one_is_not(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "c")
    with work.locked(0, 3):
        work.tell_failed(0, OSError("old"))
        work.tell_failed(2, KeyboardInterrupt())
    with work.locked(0, 3):
        assert not work.any_file("failed-0.json")
        with pytest.raises(WorkerFailed, match=r"nothing has come for 0 s"):
            work.wait_for(lambda: ["x"], "x", 0.01)
        work.tell_failed(2, KeyboardInterrupt())
        with pytest.raises(WorkerFailed, match="Another part of this build failed: KeyboardInterrupt"):
            work.wait_for(lambda: ["x"], "x", 5)


def test_parts_of_different_commands_do_not_wait_for_each_other(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "c")
    with work.locked(0, 2):
        work.take_up({"fingerprint": "other"}, 2)
        with pytest.raises(CorpusError, match="Start all parts with the same command"):
            build_corpus([source_of(tmp_path)], tmp_path / "c", "bytes", share=Share(1, 2), **OPTIONS)


def test_what_a_kill_after_the_rename_leaves_is_removed(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    build_corpus([source], tmp_path / "c", "bytes", **OPTIONS)
    left = tmp_path / ".c.building"
    left.mkdir()
    for name in ("building.lock", "run-000000-0000.safetensors"):
        (left / name).touch()
    with WorkFolder(tmp_path / "c").locked(1, 2):  # somebody is still at it
        build_corpus([source], tmp_path / "c", "bytes", **OPTIONS)
        assert left.exists()
    build_corpus([source], tmp_path / "c", "bytes", **OPTIONS)
    assert names_in(tmp_path) == ["a.jsonl", "c"]


def test_half_written_shards_of_a_dead_part_stay_out_of_the_corpus(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "c")
    with work.locked(0, 1):
        work.take_up({"fingerprint": "x"}, 1)
        (work.corpus / "train-00000.tar").touch()
        (work.corpus / ".tmp-node7-12-train-00003.tar").touch()
        work.finish()
    assert names_in(tmp_path) == ["c"]
    assert names_in(tmp_path / "c") == ["train-00000.tar"]


def test_a_lock_on_a_removed_file_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that waits at the door while another ends and removes the folder must not enter by the old lock."""
    work = WorkFolder(tmp_path / "c")
    lock = WorkFolder._lock
    removed: list[bool] = []

    def removed_meanwhile(self: WorkFolder, file: Any, kind: int) -> None:
        if not removed:
            removed.append(True)
            shutil.rmtree(self.path)
        lock(self, file, kind)

    monkeypatch.setattr(WorkFolder, "_lock", removed_meanwhile)
    with work.locked(0, 1), pytest.raises(CorpusError, match="Another build"), WorkFolder(tmp_path / "c").locked(0, 1):
        pass
    assert removed


def test_locks_are_readable_as_shared_ones_on_nfs_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = WorkFolder._lock

    def as_nfs(self: WorkFolder, file: Any, kind: int) -> None:
        assert file.readable()
        assert file.writable()
        lock(self, file, kind)

    monkeypatch.setattr(WorkFolder, "_lock", as_nfs)
    with WorkFolder(tmp_path / "c").locked(0, 2), WorkFolder(tmp_path / "c").locked(1, 2):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_link_as_output_is_followed(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    source = source_of(tmp_path)
    build_corpus([source], tmp_path / "link", "bytes", **OPTIONS)
    assert (tmp_path / "link").is_symlink()
    assert verify_corpus(tmp_path / "real") == []
    assert names_in(tmp_path) == ["a.jsonl", "link", "real"]


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(CorpusError, match=r"another file system is mounted.*--out .*c/corpus"):
        build_corpus([source_of(tmp_path)], tmp_path / "c", "bytes", **OPTIONS)
    assert names_in(tmp_path) == ["a.jsonl", "c"]
