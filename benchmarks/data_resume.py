"""How long training waits for its first batch when it resumes at any sample, of a small corpus and of 15T tokens.

Usage: python -m benchmarks.data_resume [--trillions 15] [--repetitions 7] [--work DIR] [--out [FILE]]

Each measurement is a process of its own: it opens the corpus, asks for the batch at a sample, and says how long that
took and how much memory it holds. The large corpus has a whole index and manifest; of its tokens only the shards that
the measured samples need are on disk, all alike. Goals: below 0.1 s to open, below 0.1 s to the first batch, and
300 MB resident. The roof: reading the same rows from one file of plain tokens, in such a process.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from benchmarks.token_corpus import make_token_corpus, open_loader
from data_tools.corpus.shards import WrittenShard, write_shard
from gptdist.data import manifest
from gptdist.data.chunk_index import MAGIC, VERSION
from gptdist.data.manifest import IndexInfo, Manifest, ShardInfo, SplitInfo, TokenizerInfo
from gptdist.data.order import WindowOrder
from gptdist.data.tokenizer import CorpusTokenizer

SEQUENCE_LENGTH = 2048
BATCH_ROWS = 8
SEED = 1
SMALL_TOKENS = 4_000_000
FAR_SAMPLE = 1_000_000_000
CHUNK_TOKENS = 1 << 20
SHARD_CHUNKS = 127  # what fits into 256 MiB
GOAL_SECONDS = 0.1
GOAL_RESIDENT_BYTES = 300e6


@dataclass(frozen=True)
class Case:
    """A corpus and the sample to resume at. `plain_path`: the tokens in a row, for the roof."""

    name: str
    folder: Path
    sample: int
    plain_path: Path


def main() -> None:
    """Measure, print the table, and write the file if asked to."""
    args = _parse()
    if args.measure:
        print(json.dumps(_measure_here(args.measure, args.sample, args.plain)))
        return
    before = machine()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = args.work or Path(temporary)
        cases = _cases(work_dir, args.trillions, args.repetitions)
        found: dict[str, list[dict[str, float]]] = {}
        for case in cases:
            found.setdefault(case.name, []).append(_measure(case))
    rows = [[name, *_shown(results)] for name, results in found.items()]
    head = (
        "",
        "ms to open",
        "ms to the first batch",
        "slowest",
        "roof, ms",
        "MB resident",
        "of that imports",
        "not files",
    )
    print(render_table(head, rows))
    print(f"goals: {1e3 * GOAL_SECONDS:.0f} ms to open, as much to the first batch, {GOAL_RESIDENT_BYTES / 1e6:.0f} MB")
    if args.out:
        write_json(args.out, {"machine": before, "trillions": args.trillions, "results": found})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trillions", type=float, default=15.0, help="tokens of the large corpus")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--work", type=Path, help="a folder that keeps the corpora for the next time")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "data_resume.json")
    for hidden in ("--measure", "--plain"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sample", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _cases(work_dir: Path, trillions: float, repetitions: int) -> list[Case]:
    small = make_token_corpus(work_dir, SMALL_TOKENS)
    large = work_dir / f"large-{trillions}T-v{manifest.VERSION}"
    shard = large / "shard.tar"
    num_tokens = make_large_corpus(large, shard, int(trillions * 1e12))
    order = WindowOrder(SEED, (num_tokens - 1) // SEQUENCE_LENGTH)
    samples = random.Random(f"gptdist resume {trillions}")
    cases = []
    for _ in range(repetitions):
        cases.append(Case(f"{SMALL_TOKENS:,} tokens, sample 10^9", small.folder, FAR_SAMPLE, small.tokens_path))
        sample = samples.randrange(order.num_windows)
        _link_shards(large, shard, order.windows(sample, BATCH_ROWS * 8))
        name = f"{num_tokens:,} tokens, a random sample"
        cases.append(Case(name, large, sample, small.tokens_path))
    return cases


def make_large_corpus(folder: Path, shard_path: Path, num_tokens: int) -> int:
    """Manifest and index of shards that are all copies of `shard_path`; returns how many tokens they hold."""
    shards = max(1, num_tokens // (CHUNK_TOKENS * SHARD_CHUNKS))
    total = shards * CHUNK_TOKENS * SHARD_CHUNKS
    if (folder / "manifest.json").is_file():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CorpusTokenizer.of_bytes()
    generator = np.random.default_rng(SEED)
    document = generator.integers(0, 256, CHUNK_TOKENS, dtype="<u2")
    document[-1] = tokenizer.end_of_text
    documents = ((f"random/{number}", document) for number in range(SHARD_CHUNKS))
    written = write_shard(shard_path, "train-00000", documents, CHUNK_TOKENS, document.dtype)
    index = _write_index(folder / "train.index", written, shards)
    names = (f"train-{number:05d}.tar" for number in range(shards))
    infos: tuple[ShardInfo, ...] = tuple(replace(written.info, file=name) for name in names)
    split = SplitInfo(total, shards * SHARD_CHUNKS, total, index, infos)
    info = TokenizerInfo(
        tokenizer.kind, "tokenizer.json", tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text
    )
    (folder / "tokenizer.json").write_bytes(tokenizer.content)
    (folder / "manifest.json").write_bytes(Manifest(info, "uint16", {"train": split}, {}).render())
    return total


def _write_index(path: Path, written: WrittenShard, shards: int) -> IndexInfo:
    """The index of `shards` shards like `written`, in the form of docs/formats.md, column by column."""
    chunks = shards * len(written.chunks)
    columns = [np.tile(written.chunks[:, place], shards) for place in (0, 1, 2, 3, 4)]
    starts = [np.concatenate([[0], np.cumsum(column.astype(np.int64))]) for column in columns[:2]]
    header = MAGIC + np.array([VERSION, 64], "<u4").tobytes()
    header += np.array([chunks, starts[0][-1], starts[1][-1]], "<u8").tobytes()
    digest = hashlib.sha256()
    with path.open("wb") as file:
        parts: list[Any] = [header.ljust(64, b"\0"), *(column.astype("<i8") for column in (*starts, *columns[2:4]))]
        parts += [columns[4].astype("<u8"), np.repeat(np.arange(shards, dtype="<u4"), len(written.chunks))]
        for part in parts:
            file.write(part)
            digest.update(part)
    return IndexInfo(path.name, path.stat().st_size, digest.hexdigest())


def _link_shards(folder: Path, shard_path: Path, windows: np.ndarray) -> None:
    """Have the shards that hold `windows`, as further names of the one shard."""
    first = windows * SEQUENCE_LENGTH // (CHUNK_TOKENS * SHARD_CHUNKS)
    last = (windows + 1) * SEQUENCE_LENGTH // (CHUNK_TOKENS * SHARD_CHUNKS)
    for number in sorted({*first.tolist(), *last.tolist()}):
        path = folder / f"train-{number:05d}.tar"
        if not path.exists():
            try:
                os.link(shard_path, path)
            except OSError:  # a file system without links, or too many of them
                shutil.copyfile(shard_path, path)


def _measure(case: Case) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data_resume", "--measure", str(case.folder), "--plain"]
    command += [str(case.plain_path), "--sample", str(case.sample)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _measure_here(folder: Path, sample: int, plain_path: Path) -> dict[str, float]:
    """Open the corpus and take one batch, in this process."""
    import torch

    torch.zeros(1)
    imports, _ = _memory()
    started = time.perf_counter()
    loader = open_loader(folder, SEQUENCE_LENGTH, BATCH_ROWS, SEED)
    opened = time.perf_counter()
    loader.start(sample, lambda consumed: BATCH_ROWS)
    batch = loader.next()
    first = time.perf_counter()
    loader.close()
    if batch.first_sample != sample or batch.tokens.shape != (1, BATCH_ROWS, SEQUENCE_LENGTH + 1):
        raise RuntimeError(f"the batch at sample {sample} is {batch.tokens.shape} at {batch.first_sample}")
    resident, own = _memory()
    plain_started = time.perf_counter()
    flat = np.load(plain_path, mmap_mode="r")
    starts = random.Random(sample).choices(range(len(flat) - SEQUENCE_LENGTH - 1), k=BATCH_ROWS)
    np.stack([flat[start : start + SEQUENCE_LENGTH + 1].astype(np.int64) for start in starts])
    return {
        "open_seconds": opened - started,
        "first_batch_seconds": first - opened,
        "roof_seconds": time.perf_counter() - plain_started,
        "resident_bytes": resident,
        "own_bytes": own,
        "import_bytes": imports,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _memory() -> tuple[int, int]:
    """Bytes resident, and those of them that are the process's own and not pages of files, which others may share."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        resident, own = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    except (OSError, KeyError):  # not Linux
        resident = own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, own


def _shown(results: list[dict[str, float]]) -> list[str]:
    def median(name: str) -> float:
        return statistics.median(result[name] for result in results)

    total = [result["open_seconds"] + result["first_batch_seconds"] for result in results]
    times = (median("open_seconds"), median("first_batch_seconds"), max(total), median("roof_seconds"))
    memory = (median("resident_bytes"), median("import_bytes"), median("own_bytes"))
    return [*(f"{1e3 * value:.1f}" for value in times), *(f"{value / 1e6:.0f}" for value in memory)]


if __name__ == "__main__":
    main()
