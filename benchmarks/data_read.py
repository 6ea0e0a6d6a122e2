"""How fast shuffled training rows are read, against raw memmaps and against other libraries on the same tokens.

Usage: python -m benchmarks.data_read --peer-python PEERS/bin/python [--tokens 100000000] [--rows 20000] [--rounds 5]
[--only NAME ...] [--work DIR] [--out [FILE]]

Rows are windows of 2,049 tokens in the order of training, delivered as int64 in batches; peers deliver rows of as many
tokens in their own shuffle and their own type, each in its fastest mode. All is in the page cache and was read before:
a first reading also checks digests, and is measured by itself. Every round measures all of them in turn; a ratio is
taken within a round, and the median over rounds is what counts. A batch is half a million tokens, that of GPT-3's
smallest (Brown et al. 2020, table 2.1). `benchmarks/peers.txt` says how to get the peers.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks import read_peers
from benchmarks.read_peers import MODES, PEERS, ROW_TOKENS
from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from benchmarks.token_corpus import TokenCorpus, make_token_corpus, open_loader
from gptdist.data.order import WindowOrder
from gptdist.data.reader import TokenReader

MICRO_BATCH_ROWS = 8
SEED = 1
RAW = ("raw memmap, row by row", "raw memmap, gathered")
READER, LOADER = "our reader", "our loader"
# What our rates should at least be, relative to the faster raw memmap and to each peer's fastest mode.
GOALS = {"raw memmap": 0.85, "litdata": 2.5, "mosaicml-streaming": 10.0, "webdataset": 10.0}

STEP_SECONDS = 0.1
STEP_ROWS, STEP_SEQUENCE_LENGTH = 8, 1024
STEP_GOAL = 0.01

Rates = dict[str, list[float]]


def main() -> None:
    """Measure, print the tables, and write the file if asked to."""
    args = _parse()
    before = machine()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = args.work or Path(temporary)
        corpus = make_token_corpus(work_dir, args.tokens)
        first = _first_reading(corpus, args.rows, args.batch_rows)
        rates = _measure(corpus, args)
        cost = measure_step_cost(corpus, args.steps)
    print(f"{args.rows:,} rows of {ROW_TOKENS:,} tokens from {args.tokens:,}, torch {before['torch']}")
    print(render_table(("", "million tokens/s", "least", "most"), _rate_rows(rates)))
    ratios = _ratios(rates)
    print(render_table(("", "ratio", "least", "most", "goal"), _ratio_rows(ratios)))
    print(f"first reading, with every chunk's digest: {first / 1e6:,.0f} million tokens/s")
    print(
        f"of a step of {1e3 * STEP_SECONDS:.0f} ms with {STEP_ROWS} x {STEP_SEQUENCE_LENGTH + 1:,} tokens: "
        f"{cost['wait']:.2%} waiting for data, {cost['cpu']:.2%} of a core for reading, {cost['slower']:+.2%} time "
        f"where all cores compute (goal: at most {STEP_GOAL:.0%})"
    )
    if args.out:
        settings = {name: getattr(args, name) for name in ("tokens", "rows", "batch_rows", "rounds", "steps")}
        results = {"tokens_per_second": rates, "first_reading": first, "ratios": ratios, "goals": GOALS, "step": cost}
        write_json(args.out, {"machine": before, **settings, **results})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of the peers' environment; without it: no peers")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument(
        "--batch-rows", type=int, default=256, help="rows in a batch of ours (default: 256, half a million tokens)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps for the loader's part in a step")
    parser.add_argument("--only", action="append", choices=PEERS, help="these peers; repeatable")
    parser.add_argument("--work", type=Path, help="a folder that keeps the corpora for the next time")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "data_read.json")
    return parser.parse_args()


def _measure(corpus: TokenCorpus, args: argparse.Namespace) -> Rates:
    """Tokens per second of each candidate in each round."""
    candidates: dict[str, Callable[[], float]] = _ours(corpus, args.rows, args.batch_rows)
    if args.peer_python:
        for name in args.only or PEERS:
            for mode in MODES:
                candidates[f"{name}, {mode}"] = _peer(args.peer_python, name, mode, corpus, args.rows)
    rates: Rates = {name: [] for name in candidates}
    for number in range(args.rounds):
        # Forwards, then backwards: what drifts with time does not favour whoever comes first.
        for name in list(candidates) if number % 2 == 0 else reversed(candidates):
            rates[name].append(candidates[name]())
    return rates


def _ours(corpus: TokenCorpus, rows: int, batch_rows: int) -> dict[str, Callable[[], float]]:
    """The roof and this project, each as a function that reads all rows once more."""
    rows = rows // batch_rows * batch_rows
    reader = TokenReader(corpus.folder, "train")
    order = WindowOrder(SEED, reader.num_windows(ROW_TOKENS - 1))
    windows = order.windows(0, rows)
    flat = np.load(corpus.tokens_path, mmap_mode="r")
    starts = windows * (ROW_TOKENS - 1)
    runs = sliding_window_view(flat, ROW_TOKENS)
    batches = range(0, rows, batch_rows)
    tokens = rows * ROW_TOKENS

    def row_by_row() -> None:
        for first in batches:
            out = np.empty((batch_rows, ROW_TOKENS), dtype=np.int64)
            for row, start in zip(out, starts[first : first + batch_rows].tolist(), strict=True):
                row[:] = flat[start : start + ROW_TOKENS]

    def gathered() -> None:
        for first in batches:
            out = np.empty((batch_rows, ROW_TOKENS), dtype=np.int64)
            out[:] = runs[starts[first : first + batch_rows]]

    def by_reader() -> None:
        for first in batches:
            out = np.empty((batch_rows, ROW_TOKENS), dtype=np.int64)
            reader.windows(windows[first : first + batch_rows], ROW_TOKENS - 1, out)

    loader = open_loader(corpus.folder, ROW_TOKENS - 1, MICRO_BATCH_ROWS, SEED)

    def by_loader() -> float:
        loader.start(0, lambda consumed: batch_rows)
        loader.next()  # peers are not charged for their first batch either
        started = time.perf_counter()
        for _ in batches:
            loader.next()
        seconds = time.perf_counter() - started
        loader.close()
        return tokens / seconds

    by_reader()  # looks at every chunk
    by_loader()
    timed = {RAW[0]: row_by_row, RAW[1]: gathered, READER: by_reader}
    measured = {name: _rate_of(function, tokens) for name, function in timed.items()}
    return {**measured, LOADER: by_loader}


def _rate_of(function: Callable[[], None], tokens: int) -> Callable[[], float]:
    def rate() -> float:
        started = time.perf_counter()
        function()
        return tokens / (time.perf_counter() - started)

    return rate


def _peer(python: Path, name: str, mode: str, corpus: TokenCorpus, rows: int) -> Callable[[], float]:
    work = corpus.tokens_path.parent / name
    work.mkdir(exist_ok=True)
    command = [str(python), read_peers.__file__, name, mode, str(corpus.tokens_path.parent), str(work), str(rows)]

    def rate() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        return float(answer["tokens"] / answer["seconds"])

    return rate


def _first_reading(corpus: TokenCorpus, rows: int, batch_rows: int) -> float:
    """Tokens per second of a loader that has not looked at any chunk yet."""
    loader = open_loader(corpus.folder, ROW_TOKENS - 1, MICRO_BATCH_ROWS, SEED)
    started = time.perf_counter()
    loader.start(0, lambda consumed: batch_rows)
    for _ in range(rows // batch_rows):
        loader.next()
    seconds = time.perf_counter() - started
    loader.close()
    return rows // batch_rows * batch_rows * ROW_TOKENS / seconds


def measure_step_cost(corpus: TokenCorpus, steps: int) -> dict[str, float]:
    """The loader's part in a step of 100 ms, as fractions of it.

    `wait` for data of a step that sleeps; `cpu` time of reading, which holds on a busy machine too; how much `slower` a
    step is that multiplies matrices on all cores, which the reading thread takes its time from. Steps with and without
    the loader take turns there.
    """
    loader = open_loader(corpus.folder, STEP_SEQUENCE_LENGTH, STEP_ROWS, SEED)
    loader.start(0, lambda consumed: STEP_ROWS)
    waits = []
    for _ in range(steps):
        time.sleep(STEP_SECONDS)
        waits.append(loader.next().wait_seconds / STEP_SECONDS)
    cpu_started = time.process_time()
    for _ in range(steps):
        loader.next()
    cpu = (time.process_time() - cpu_started) / steps / STEP_SECONDS
    matrix = torch.randn(1024, 1024)
    products = max(1, round(STEP_SECONDS / statistics.median(_compute(matrix, 1) for _ in range(9))))
    slower = []
    for number in range(steps):
        seconds = {}
        for with_loader in (True, False) if number % 2 else (False, True):
            started = time.perf_counter()
            if with_loader:
                loader.next()
            _compute(matrix, products)
            seconds[with_loader] = time.perf_counter() - started
        slower.append(seconds[True] / seconds[False] - 1)
    loader.close()
    return {
        "wait": statistics.median(waits),
        "longest_wait": max(waits),
        "cpu": cpu,
        "slower": statistics.median(slower),
    }


def _compute(matrix: torch.Tensor, products: int) -> float:
    started = time.perf_counter()
    for _ in range(products):
        torch.mm(matrix, matrix)
    return time.perf_counter() - started


def _ratios(rates: Rates) -> dict[str, list[float]]:
    """Our rate over the fastest way of each peer, in each round: `ours / peer` -> ratios."""
    ratios = {}
    for peer in GOALS:
        if modes := [name for name in rates if name.startswith(peer)]:
            fastest = max(modes, key=lambda name: statistics.median(rates[name]))
            for ours in (READER, LOADER):
                pairs = zip(rates[ours], rates[fastest], strict=True)
                ratios[f"{ours} / {fastest}"] = [mine / other for mine, other in pairs]
    return ratios


def _rate_rows(rates: Rates) -> list[list[str]]:
    return [
        [name, *(f"{value / 1e6:,.1f}" for value in (statistics.median(found), min(found), max(found)))]
        for name, found in rates.items()
    ]


def _ratio_rows(ratios: dict[str, list[float]]) -> list[list[str]]:
    rows = []
    for name, found in ratios.items():
        goal = next(value for peer, value in GOALS.items() if name.partition(" / ")[2].startswith(peer))
        shown = [f"{value:.2f}" for value in (statistics.median(found), min(found), max(found))]
        rows.append([name, *shown, f"{goal:.2f}"])
    return rows


if __name__ == "__main__":
    main()
