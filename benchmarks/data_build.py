"""How fast text becomes shards: `gptdist data build` from JSON lines, against its peers in the same run.

Usage: python -m benchmarks.data_build [SOURCE ...] [--megabytes 300] [--repetitions 3] [--workers N] [--out [FILE]]

The text is that of the sources (default: what Python's own folder holds), one document a line, each once. Everything
runs as a process of its own, one after the other, then in the opposite order; a process's start is in its time.
gigatoken alone makes ids in memory; ours also hashes, splits, shuffles, writes tars that survive a crash, and an index.
HF's tokenizer is so much slower that it gets the first part of the file only, and speeds are compared, in bytes of text
a second.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.build_peers import PEERS
from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from data_tools.tokenizing.tokenizers import train_tokenizer

OURS = "gptdist data build"
SLOW = "HF encode_batch + ShardWriter"
SLOW_SHARE = 12
VOCABULARY = 32_000
SUFFIXES = (".py", ".md", ".rst", ".txt", ".html", ".c", ".h", ".js")
TARGETS = {SLOW: 15.0, "gigatoken, from the file": 0.6, "gigatoken, texts in memory": None}


def main() -> None:
    """Measure, print the table, and write the file if asked to."""
    args = _parse()
    folder = Path(tempfile.mkdtemp(prefix="gptdist-data-build-", dir=args.folder))
    try:
        whole, part, tokenizer = folder / "text.jsonl", folder / "part.jsonl", folder / "tokenizer.json"
        sizes = {whole: write_text(args.sources, whole, args.megabytes * 10**6)}
        sizes[part] = _first_part(whole, part, sizes[whole] // SLOW_SHARE)
        tokenizer.write_bytes(train_tokenizer(f"train:{VOCABULARY}", _texts(whole, 16 << 20)).content)
        speeds: dict[str, list[float]] = {name: [] for name in (OURS, *PEERS)}
        before = machine()
        for repetition in range(args.repetitions):
            os.sync()  # or the first one waits while the disk takes the text
            for name in list(speeds)[:: -1 if repetition % 2 else 1]:  # nobody always comes after the same other
                corpus = part if name == SLOW else whole
                speeds[name].append(sizes[corpus] / _seconds(name, corpus, tokenizer, folder / "out", args.workers))
        report = {"text_bytes": sizes[whole], "vocabulary": VOCABULARY, "workers": args.workers, **_summary(speeds)}
        print(_table(report))
        if args.out:
            write_json(args.out, {"benchmark": "data_build", "machine": before, **report})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(sources: Sequence[Path], path: Path, limit: int) -> int:
    """JSON lines of at most `limit` bytes of text, from files in an order that mixes folders. Returns their bytes."""
    files = [file for source in sources for file in source.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    total = 0
    seen: set[int] = set()
    with path.open("w") as out:
        for file in sorted(files, key=lambda file: (hash_name(file.name), str(file))):
            try:
                text = file.read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if not text.strip() or hash(text) in seen:
                continue
            seen.add(hash(text))
            total += len(text.encode())
            if total > limit:
                break
            out.write(json.dumps({"file": file.name, "text": text}, ensure_ascii=False) + "\n")
    return min(total, limit)


def hash_name(name: str) -> int:
    """The same number for the same name in every process."""
    return int.from_bytes(name.encode(), "little") * 0x9E3779B97F4A7C15 % (1 << 64)


def _first_part(whole: Path, part: Path, limit: int) -> int:
    total = 0
    with whole.open("rb") as lines, part.open("wb") as out:
        for line in lines:
            total += len(json.loads(line)["text"].encode())
            out.write(line)
            if total >= limit:
                break
    return total


def _texts(path: Path, limit: int) -> Iterator[str]:
    total = 0
    with path.open() as lines:
        for line in lines:
            text = json.loads(line)["text"]
            total += len(text)
            yield text
            if total > limit:
                return


def _seconds(name: str, corpus: Path, tokenizer: Path, out_dir: Path, workers: int) -> float:
    """Of one run. Ours counts from the process's start to its end; a peer by its own clock, or as ours if that is more
    of what it does."""
    if name == OURS:
        command = [sys.executable, "-m", "launch.cli", "data", "build", str(corpus), "--out", str(out_dir)]
        command += ["--tokenizer", str(tokenizer), "--workers", str(workers)]
    else:
        command = [sys.executable, "-m", "benchmarks.build_peers", name, str(corpus), str(tokenizer), str(out_dir)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    shutil.rmtree(out_dir, ignore_errors=True)
    return float(json.loads(done.stdout)["seconds"]) if name == "gigatoken, texts in memory" else seconds


def _summary(speeds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(speeds[OURS], found, strict=True))
        for name, found in speeds.items()
        if name != OURS
    }
    return {
        "megabytes_per_second": {name: [round(speed / 1e6, 2) for speed in found] for name, found in speeds.items()},
        "ratio_of_ours": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "target": {name: TARGETS[name] for name in ratios},
    }


def _table(report: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{statistics.median(found):.1f}",
            f"{report['ratio_of_ours'][name]:.2f}" if name in report["ratio_of_ours"] else "",
            str(report["target"].get(name) or ""),
        ]
        for name, found in report["megabytes_per_second"].items()
    ]
    return render_table(["", "MB/s of text", "ours / it", "at least"], rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_build", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, default=[Path(sysconfig.get_paths()["stdlib"])])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--out", nargs="?", type=Path, const=RESULTS_DIR / "data_build.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
