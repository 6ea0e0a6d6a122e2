"""What `data_build` compares with, each run in a process of its own: prints one JSON line with text bytes and seconds.

Usage: python -m benchmarks.build_peers NAME CORPUS.jsonl TOKENIZER.json OUT_DIR
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def gigatoken_file(corpus: Path, tokenizer: Path, out_dir: Path) -> int:
    """gigatoken alone, its own quickest way: its reader of JSON lines, all cores, ids in memory and nothing else."""
    import gigatoken

    encoder = gigatoken.Tokenizer(str(tokenizer))
    return len(encoder.encode_files(gigatoken.JsonlFileSource([str(corpus)])))


def gigatoken_memory(corpus: Path, tokenizer: Path, out_dir: Path) -> Callable[[], int]:
    """gigatoken alone on texts that are in memory already: the encoding and nothing else is timed."""
    import gigatoken

    encoder = gigatoken.Tokenizer(str(tokenizer))
    texts = list(_texts(corpus))
    return lambda: len(encoder.encode_batch(texts))


def hf_shardwriter(corpus: Path, tokenizer: Path, out_dir: Path) -> int:
    """What people write by hand: HF tokenizers' encode_batch on all cores, and webdataset's ShardWriter."""
    import numpy as np
    from tokenizers import Tokenizer
    from webdataset import ShardWriter

    encoder = Tokenizer.from_file(str(tokenizer))
    out_dir.mkdir()
    count = 0
    with ShardWriter(f"{out_dir}/shard-%06d.tar", maxsize=256 << 20, verbose=0) as writer:
        batch: list[str] = []
        for text in [*_texts(corpus), None]:
            if text is not None:
                batch.append(text)
                if len(batch) < 1000:
                    continue
            for encoding in encoder.encode_batch(batch, add_special_tokens=False):
                writer.write({"__key__": f"{count:09d}", "tokens.npy": np.array(encoding.ids, dtype=np.uint16)})
                count += 1
            batch = []
    return count


PEERS: dict[str, Callable[[Path, Path, Path], int | Callable[[], int]]] = {
    "gigatoken, from the file": gigatoken_file,
    "gigatoken, texts in memory": gigatoken_memory,
    "HF encode_batch + ShardWriter": hf_shardwriter,
}


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open("rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def main() -> None:
    """Run one peer; what it prepares and returns as a function is not timed, and what it returns as a number is."""
    name, corpus, tokenizer, out_dir = sys.argv[1:]
    started = time.perf_counter()
    result = PEERS[name](Path(corpus), Path(tokenizer), Path(out_dir))
    if callable(result):
        started = time.perf_counter()
        result = result()
    print(json.dumps({"documents": result, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
