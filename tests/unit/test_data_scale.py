"""A corpus of 15 trillion tokens opens at once and serves its first batch at once, in little memory.

The index and the manifest are whole, the shards hold only what is read. Always at a tenth of the size; with
GPTDIST_FULL=1 at the full one. Seconds are of the processor: those of the clock tell how busy the machine is.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptdist.data.chunk_index import _COLUMNS, _HEADER, MAGIC, VERSION, index_bytes
from gptdist.data.digest import chunk_digest
from gptdist.data.manifest import IndexInfo, Manifest, ShardLines, SplitInfo, TokenizerInfo
from gptdist.data.order import WindowOrder

CHUNK_TOKENS = 1 << 20
CHUNKS_PER_SHARD = 128
CONTEXT = 2048
ROWS = 8
SAMPLES = (10**9, 123_456_789, 7)

READ = """
import json, sys, time
import numpy as np
from gptdist.data.order import WindowOrder
from gptdist.data.reader import TokenReader
folder, context, rows, *samples = sys.argv[1:]
context, rows = int(context), int(rows)
opened, served, peaks = [], [], []
for sample in map(int, samples):
    started = time.process_time()
    reader = TokenReader(folder, "train")
    order = WindowOrder(1, reader.num_windows(context))
    opened.append(time.process_time() - started)
    out = np.empty((rows, context + 1), dtype=np.int64)
    started = time.process_time()
    reader.windows(order.windows(sample, rows), context, out)
    served.append(time.process_time() - started)
    # Not getrusage: it begins with what the parent had.
    peaks.append(next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
    expected = (order.windows(sample, rows)[:, None] * context + np.arange(context + 1)) % (1 << 20) % 50_000
    assert np.array_equal(out, expected)
print(json.dumps({"opened": min(opened), "served": min(served), "peak": peaks[0], "torch": "torch" in sys.modules}))
"""


def write_corpus(folder: Path, num_chunks: int) -> None:
    """Chunks of the same tokens: index % 50,000 of its place in the chunk."""
    npy = str({"descr": "<u2", "fortran_order": False, "shape": (CHUNK_TOKENS,)}).ljust(117).encode() + b"\n"
    tokens = (np.arange(CHUNK_TOKENS) % 50_000).astype("<u2").tobytes()
    chunk = bytes(512) + b"\x93NUMPY\x01\x00" + struct.pack("<H", len(npy)) + npy + tokens
    chunk += bytes(-len(chunk) % 512)
    values = {
        "token_start": lambda number: number * CHUNK_TOKENS,
        "document_start": lambda number: number * 1000,
        "sample_offset": lambda number: number % CHUNKS_PER_SHARD * len(chunk),
        "tokens_offset": lambda number: number % CHUNKS_PER_SHARD * len(chunk) + 512,
        "digest": lambda number: np.full(len(number), chunk_digest(chunk), dtype=np.uint64),
        "shard": lambda number: number // CHUNKS_PER_SHARD,
    }
    with (folder / "train.index").open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, _HEADER.size, num_chunks, num_chunks * CHUNK_TOKENS, num_chunks * 1000))
        for name, dtype, more in _COLUMNS:
            for first in range(0, num_chunks + more, 1 << 20):
                numbers = np.arange(first, min(first + (1 << 20), num_chunks + more), dtype=np.int64)
                file.write(values[name](numbers).astype(dtype).tobytes())
    shards = -(-num_chunks // CHUNKS_PER_SHARD)
    shard_bytes = CHUNKS_PER_SHARD * len(chunk)
    counts = f"{CHUNKS_PER_SHARD * CHUNK_TOKENS} {CHUNKS_PER_SHARD * 1000} {CHUNKS_PER_SHARD}"
    lines = [
        f"train-{number:05d}.tar {shard_bytes} {hashlib.sha256(number.to_bytes(8)).hexdigest()} {counts}"
        for number in range(shards)
    ]
    index = IndexInfo("train.index", index_bytes(num_chunks), "0" * 64)
    split = SplitInfo(num_chunks * CHUNK_TOKENS, num_chunks * 1000, 4, index, ShardLines(lines, num_chunks))
    tokenizer = TokenizerInfo("bytes", "tokenizer.json", "0" * 64, 50_000, 0)
    (folder / "manifest.json").write_bytes(Manifest(tokenizer, "uint16", {"train": split}, {}).render())
    order = WindowOrder(1, (num_chunks * CHUNK_TOKENS - 1) // CONTEXT)
    for sample in SAMPLES:
        for window in order.windows(sample, ROWS).tolist():
            for number in {window * CONTEXT // CHUNK_TOKENS, (window + 1) * CONTEXT // CHUNK_TOKENS}:
                path = folder / f"train-{number // CHUNKS_PER_SHARD:05d}.tar"
                with path.open("r+b" if path.exists() else "wb") as file:
                    file.seek(number % CHUNKS_PER_SHARD * len(chunk))
                    file.write(chunk)
                    file.truncate(shard_bytes)


FULL = pytest.param(
    15 * 10**12, id="15T", marks=pytest.mark.skipif("GPTDIST_FULL" not in os.environ, reason="GPTDIST_FULL is not set")
)


@pytest.mark.parametrize("tokens", [pytest.param(15 * 10**11, id="1.5T"), FULL])
def test_a_huge_corpus_opens_and_serves_at_once(tokens: int, tmp_path: Path) -> None:
    write_corpus(tmp_path, tokens // CHUNK_TOKENS)
    command = [sys.executable, "-c", READ, str(tmp_path), str(CONTEXT), str(ROWS), *map(str, SAMPLES)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    print(result)
    assert not result["torch"]
    assert result["opened"] < 0.1
    assert result["served"] < 0.1
    assert result["peak"] < 300e6
