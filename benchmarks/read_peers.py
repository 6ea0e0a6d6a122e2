"""Other libraries' loaders of shuffled training rows, each as its documentation tells; run by `data_read.py`.

Runs in an environment of its own, so it imports nothing of this project. `python read_peers.py NAME MODE SOURCE WORK
ROWS` writes the tokens in NAME's format where that was not done yet, reads a quarter of ROWS to warm up and ROWS
against the clock, and prints a line of JSON.
"""

import json
import os
import shutil
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

PEERS = ("litdata", "mosaicml-streaming", "webdataset")
# Rows one by one as the library yields them; batches by its own loader, alone and with worker processes.
MODES = ("rows", "batches", "batches, 2 workers")
ROW_TOKENS = 2049
BATCH_ROWS = 8
_SHUFFLE_SEED = 42
_WORKERS = 2
# litdata's guide to pretraining has 2049 x 8012 tokens in a chunk, webdataset's shards of some hundred megabytes.
_LITDATA_CHUNK_ROWS = 8012
_WEBDATASET_SHARD_DOCUMENTS = 50_000
_WEBDATASET_SHUFFLE = 1000

Batches = Iterator[Any]
Modes = dict[str, Callable[[], Batches]]


def litdata_documents(source: str) -> Iterator[Any]:
    """What `litdata.optimize` calls in its worker: the documents of the corpus as tensors."""
    import torch

    tokens, ends = load_source(Path(source))
    start = 0
    for end in ends.tolist():
        yield torch.from_numpy(tokens[start:end].astype(np.uint16))
        start = end


def litdata_modes(source: Path, work: Path) -> Modes:
    """TokensLoader over a StreamingDataset with its own shuffle."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    if not (work / "index.json").is_file():
        rows = max(64, min(_LITDATA_CHUNK_ROWS, len(load_source(source)[0]) // ROW_TOKENS // 8))
        optimize(
            fn=litdata_documents,
            inputs=[str(source)],
            output_dir=str(work),
            chunk_size=ROW_TOKENS * rows,
            item_loader=TokensLoader(block_size=ROW_TOKENS),
            num_workers=1,
            verbose=False,
        )

    def dataset() -> Any:
        loader = TokensLoader(block_size=ROW_TOKENS)
        return StreamingDataset(str(work), item_loader=loader, shuffle=True, drop_last=True, seed=_SHUFFLE_SEED)

    def batches(workers: int) -> Batches:
        return iter(StreamingDataLoader(dataset(), batch_size=BATCH_ROWS, num_workers=workers, drop_last=True))

    return {
        MODES[0]: lambda: iter(dataset()),
        MODES[1]: lambda: batches(0),
        MODES[2]: lambda: batches(_WORKERS),
    }


def mosaic_modes(source: Path, work: Path) -> Modes:
    """MDS of rows cut to their length beforehand, StreamingDataset with its default shuffle."""
    # Its picture datasets need torchvision, whose CUDA build does not load beside a CPU torch.
    sys.modules["streaming.vision"] = ModuleType("streaming.vision")
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    if not (work / "index.json").is_file():
        shutil.rmtree(work, ignore_errors=True)
        tokens, _ = load_source(source)
        with MDSWriter(out=str(work), columns={"tokens": f"ndarray:uint16:{ROW_TOKENS}"}) as out:
            for start in range(0, len(tokens) - ROW_TOKENS, ROW_TOKENS):
                out.write({"tokens": np.ascontiguousarray(tokens[start : start + ROW_TOKENS])})
    dataset = StreamingDataset(
        local=str(work), shuffle=True, shuffle_seed=_SHUFFLE_SEED, batch_size=BATCH_ROWS, num_canonical_nodes=1
    )

    def rows() -> Batches:
        return (sample["tokens"] for sample in dataset)

    def batches(workers: int) -> Batches:
        loader = DataLoader(dataset, batch_size=BATCH_ROWS, num_workers=workers, drop_last=True)
        return (batch["tokens"] for batch in loader)

    return {MODES[0]: rows, MODES[1]: lambda: batches(0), MODES[2]: lambda: batches(_WORKERS)}


def webdataset_modes(source: Path, work: Path) -> Modes:
    """One sample a document, shuffled in a buffer, packed into rows as they come."""
    import torch
    import webdataset as wds

    if not (work / "done").is_file():
        write_documents(source, work)
    urls = sorted(str(path) for path in work.glob("*.tar"))

    def packed(samples: Iterator[Any]) -> Iterator[Any]:
        pieces: list[np.ndarray] = []
        held = 0
        for (document,) in samples:
            pieces.append(document)
            held += len(document)
            if held >= ROW_TOKENS:
                row = np.concatenate(pieces)
                whole = len(row) // ROW_TOKENS * ROW_TOKENS
                yield from row[:whole].reshape(-1, ROW_TOKENS)
                pieces, held = [row[whole:]], len(row) - whole

    def dataset() -> Any:
        found = wds.WebDataset(urls, shardshuffle=len(urls), seed=_SHUFFLE_SEED, empty_check=False)
        return found.shuffle(_WEBDATASET_SHUFFLE).decode().to_tuple("tokens.npy").compose(packed)

    def batches(workers: int) -> Batches:
        batched = dataset().batched(BATCH_ROWS, collation_fn=lambda rows: torch.from_numpy(np.stack(rows)))
        return iter(wds.WebLoader(batched, batch_size=None, num_workers=min(workers, len(urls))))

    return {
        MODES[0]: lambda: iter(dataset()),
        MODES[1]: lambda: batches(0),
        MODES[2]: lambda: batches(_WORKERS),
    }


def write_documents(source: Path, work: Path) -> None:
    """Tars of one npy a document, by the standard library: webdataset's own writer does the same, slowly."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokens, ends = load_source(source)
    per_shard = max(1, min(_WEBDATASET_SHARD_DOCUMENTS, -(-len(ends) // (2 * _WORKERS))))
    start = 0
    for first in range(0, len(ends), per_shard):
        with tarfile.open(work / f"{first // per_shard:05d}.tar", "w") as tar:
            for number, end in enumerate(ends[first : first + per_shard].tolist(), first):
                buffer = BytesIO()
                np.save(buffer, tokens[start:end])
                info = tarfile.TarInfo(f"{number:08d}.tokens.npy")
                info.size = buffer.tell()
                tar.addfile(info, BytesIO(buffer.getvalue()))
                start = end
    (work / "done").touch()


def load_source(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in a row, mapped, and the end of each document."""
    return np.load(source / "tokens.npy", mmap_mode="r"), np.load(source / "ends.npy")


def read(make: Callable[[], Batches], rows: int) -> dict[str, Any]:
    """Seconds for `rows` rows, epoch after epoch, without what the first batch takes, such as starting workers."""
    batches = make()
    next(batches)
    count = 0
    checksum = 0
    started = time.perf_counter()
    while count < rows:
        batch = next(batches, None)
        if batch is None:
            batches = make()
            continue
        if batch.shape[-1] != ROW_TOKENS:
            raise RuntimeError(f"rows are {batch.shape[-1]} tokens, not {ROW_TOKENS}")
        count += 1 if batch.ndim == 1 else batch.shape[0]
        checksum ^= int(batch.reshape(-1)[-1])  # so that what is yielded is there
    return {"seconds": time.perf_counter() - started, "tokens": count * ROW_TOKENS, "checksum": checksum}


def main() -> None:
    """Measure what the command line names."""
    name, mode, source, work, rows = sys.argv[1:]
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answer
    make = dict(zip(PEERS, (litdata_modes, mosaic_modes, webdataset_modes), strict=True))[name]
    batches = make(Path(source), Path(work))[mode]
    read(batches, int(rows) // 4)
    answer.write(json.dumps(read(batches, int(rows))) + "\n")
    answer.flush()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
