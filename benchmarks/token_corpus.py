"""A corpus of random tokens for measurements of reading: as shards of ours, and as plain arrays for peers.

How fast tokens are read does not depend on what they say; how long documents are does, so their lengths are drawn as
lengths of real text fall: a log-normal around some hundred tokens with a long tail.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.corpus.index import rebuild_index
from data_tools.corpus.shards import write_shard
from gptdist.config.sections import DataConfig
from gptdist.data.corpora import build_source, open_corpora
from gptdist.data.loader import BatchLoader
from gptdist.data.manifest import VERSION
from gptdist.data.tokenizer import CorpusTokenizer

CHUNK_TOKENS = 1 << 20
SHARD_TOKENS = 1 << 27
_MEAN_LOG, _SIGMA_LOG = 6.0, 1.2  # median 400 tokens, mean about 830
_DTYPE = np.dtype("<u2")


@dataclass(frozen=True)
class TokenCorpus:
    """`folder` is the corpus. `tokens_path` is all its tokens in a row, `ends_path` where each document ends."""

    folder: Path
    tokens_path: Path
    ends_path: Path


def make_token_corpus(work_dir: Path, num_tokens: int, seed: int = 1) -> TokenCorpus:
    """About `num_tokens` tokens in `work_dir`; what an earlier call with the same number left is used again."""
    root = work_dir / f"tokens-{num_tokens}-v{VERSION}"
    made = TokenCorpus(root / "corpus", root / "tokens.npy", root / "ends.npy")
    if (made.folder / "manifest.json").is_file():
        return made
    made.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CorpusTokenizer.of_bytes()
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(_MEAN_LOG, _SIGMA_LOG, 1 + num_tokens // 100)).astype(np.int64) + 2
    ends = np.cumsum(lengths)
    ends = ends[: int(np.searchsorted(ends, num_tokens)) + 1]
    tokens = generator.integers(0, 256, int(ends[-1]), dtype=_DTYPE)
    tokens[ends - 1] = tokenizer.end_of_text
    np.save(made.tokens_path, tokens)
    np.save(made.ends_path, ends)
    starts = np.concatenate([[0], ends[:-1]])
    of_shard = starts // SHARD_TOKENS
    for number in range(int(of_shard[-1]) + 1):
        name = f"train-{number:05d}"
        chosen = np.flatnonzero(of_shard == number).tolist()
        documents = ((f"random/{place}", tokens[starts[place] : ends[place]]) for place in chosen)
        write_shard(made.folder / f"{name}.tar", name, documents, CHUNK_TOKENS, _DTYPE)
    (made.folder / "tokenizer.json").write_bytes(tokenizer.content)
    rebuild_index(made.folder)
    return made


def open_loader(corpus_dir: Path, sequence_length: int, micro_batch_size: int, seed: int = 1) -> BatchLoader:
    """What one rank that trains on the corpus alone reads by."""
    data = DataConfig(corpus=str(corpus_dir), seed=seed)
    source = build_source(data, open_corpora(data, "train"), sequence_length)
    return BatchLoader(source, micro_batch_size, data_rank=0, data_size=1)
