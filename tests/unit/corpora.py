"""Makes small corpora for tests, from text or straight from tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_tools.corpus.shards import CHUNK_COLUMNS, write_shard
from gptdist.data.chunk_index import ChunkRecord, render_index
from gptdist.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    IndexInfo,
    Manifest,
    SplitInfo,
    TokenizerInfo,
)
from gptdist.data.tokenizer import CorpusTokenizer


def write_corpus(
    folder: Path,
    splits: Mapping[str, Sequence[np.ndarray]],
    *,
    dtype: str = "uint16",
    end_of_text: int = 256,
    chunk_tokens: int = 1000,
    shard_documents: int = 1 << 30,
) -> Manifest:
    """A corpus of these documents (ids without the end of text, keys d0, d1, ...), with the bytes tokenizer.

    A shard takes `shard_documents`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CorpusTokenizer.of_bytes()
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.content)
    kind = np.dtype(dtype).newbyteorder("<")
    infos = {}
    for split, documents in splits.items():
        written = []
        for first in range(0, len(documents), shard_documents):
            pairs = [
                (f"d{number}", np.append(ids, end_of_text).astype(kind))
                for number, ids in enumerate(documents[first : first + shard_documents], first)
            ]
            name = f"{split}-{len(written):05d}"
            written.append(write_shard(folder / f"{name}.tar", name, pairs, chunk_tokens, kind))
        records = [
            ChunkRecord(shard=number, **dict(zip(CHUNK_COLUMNS, chunk, strict=True)))
            for number, shard in enumerate(written)
            for chunk in shard.chunks.tolist()
        ]
        content = render_index(records)
        (folder / f"{split}.index").write_bytes(content)
        infos[split] = SplitInfo(
            tokens=sum(shard.info.tokens for shard in written),
            documents=len(documents),
            text_bytes=sum(map(len, documents)),
            index=IndexInfo(f"{split}.index", len(content), hashlib.sha256(content).hexdigest()),
            shards=tuple(shard.info for shard in written),
        )
    info = TokenizerInfo(tokenizer.kind, TOKENIZER_FILE, tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text)
    manifest = Manifest(info, dtype, infos, {})
    (folder / MANIFEST_FILE).write_bytes(manifest.render())
    return manifest
