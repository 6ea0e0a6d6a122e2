"""What is in a corpus, for people; and the unigram entropy that a model has to beat.

Reads tokens through the same reader as training, and keys from the tars. Knows nothing of how a corpus is built.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.corpus.tar_members import ShardFile
from gptdist.data.manifest import Manifest, SplitInfo
from gptdist.data.reader import TokenReader
from gptdist.data.store import Store, open_store
from gptdist.data.tokenizer import CorpusTokenizer

_SAMPLE_TOKENS = 200
_SAMPLE_LINES = 12


def render_corpus(corpus: Path | str, split: str = "train", samples: int = 1) -> str:
    """A summary of the corpus at a folder or URL: tokenizer, totals of each split, and the beginnings of some documents
    decoded.
    """
    with closing(open_store(corpus)) as store:
        return _render(store, split, samples)


def _render(store: Store, split: str, samples: int) -> str:
    manifest = Manifest.load(store)
    tokenizer = manifest.tokenizer
    lines = [
        f"corpus     {store.name}",
        f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} ids, end of text {tokenizer.end_of_text}, "
        f"sha256 {tokenizer.sha256[:12]}",
        f"tokens     {manifest.dtype}",
    ]
    for name, info in manifest.splits.items():
        lines.append(f"{name:<11}{info.tokens:,} tokens, {info.documents:,} documents, {_per_document(info)}")
        lines.append(
            f"{'':<11}{info.text_bytes:,} bytes of text, {info.chunks:,} chunks in {len(info.shards):,} shards of "
            f"{sum(shard.bytes for shard in info.shards):,} bytes"
        )
    dropped = manifest.build.get("dropped")
    if isinstance(dropped, dict) and dropped:
        lines.append(f"left out   {', '.join(f'{count:,} {reason}' for reason, count in dropped.items())}")
    for sample in sample_documents(store, split, samples):
        lines.append(f"sample {_printable(sample.key)} ({sample.tokens:,} tokens)")
        lines.extend(f"  | {_printable(line)}" for line in sample.text.splitlines()[:_SAMPLE_LINES])
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class SampleDocument:
    """The key of a document, its length without its end of text, and the beginning of its text."""

    key: str
    tokens: int
    text: str


def sample_documents(store: Store, split: str, count: int) -> Iterator[SampleDocument]:
    """At most `count` documents from all over the split, at most one a chunk: the first of it."""
    reader = TokenReader("", split, store=store)
    tokenizer = CorpusTokenizer.of_corpus(store, reader.manifest)
    info = reader.manifest.split(split)
    count = min(count, len(reader.index))
    for number in range(count):
        chunk = number * len(reader.index) // count
        tokens = reader.chunk_tokens(chunk)
        length = int(np.argmax(tokens == tokenizer.end_of_text))
        text = tokenizer.decode(tokens[: min(length, _SAMPLE_TOKENS)].tolist())
        shard = info.shards[int(reader.index.shard[chunk])]
        yield SampleDocument(_first_key(store.path(shard), int(reader.index.sample_offset[chunk])), length, text)


def sample_text(corpus_dir: Path, split: str = "train") -> str:
    """The beginning of the split's first document, decoded."""
    return next((sample.text for sample in sample_documents(open_store(corpus_dir), split, 1)), "")


def unigram_entropy(corpus_dir: Path, split: str = "train") -> float:
    """Entropy of the split's tokens as independent draws, in nats per token: exact, from the counts of all of them.

    It is the loss of a model that knows how frequent each token is and nothing else.
    """
    reader = TokenReader(corpus_dir, split)
    counts = np.zeros(reader.manifest.tokenizer.vocab_size, dtype=np.int64)
    for tokens in reader.chunks():
        counts += np.bincount(tokens, minlength=len(counts))
    seen = counts[counts > 0] / max(1, reader.num_tokens)
    return float(-(seen * np.log(seen)).sum())


def _first_key(shard_path: Path, offset: int) -> str:
    """Key of the first document of the chunk that begins at byte `offset`."""
    if not shard_path.is_file():
        return "(its key is in a shard that is not here)"
    with ShardFile(shard_path) as shard:
        return shard.content(next(shard.chunks(offset))).keys[0]


def _printable(text: str) -> str:
    """Control characters spelt out: text from anywhere must not steer the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _per_document(info: SplitInfo) -> str:
    if not info.documents:
        return "nothing"
    return f"{info.tokens / info.documents:.1f} tokens a document, {info.text_bytes / info.tokens:.3f} bytes per token"
