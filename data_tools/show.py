"""What is in a corpus, for people; and the unigram entropy that a model has to beat.

Reads through the same reader as training. Knows nothing of how a corpus is built.
"""

from pathlib import Path

import numpy as np

from gptdist.data.manifest import Manifest
from gptdist.data.reader import TokenReader
from gptdist.data.tokenizer import CorpusTokenizer

_SAMPLE_TOKENS = 200
_SAMPLE_LINES = 12


def render_corpus(corpus_dir: Path) -> str:
    """A summary of the corpus: tokenizer, totals of each split, and the beginning of a document decoded."""
    corpus_dir = Path(corpus_dir)
    manifest = Manifest.load(corpus_dir)
    tokenizer = manifest.tokenizer
    lines = [
        f"corpus     {corpus_dir}",
        f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} ids, end of text {tokenizer.end_of_text}, "
        f"sha256 {tokenizer.sha256[:12]}",
        f"tokens     {manifest.dtype}",
    ]
    for name, split in manifest.splits.items():
        per_token = f"{split.text_bytes / split.tokens:.3f} bytes per token" if split.tokens else "nothing"
        lines.append(
            f"{name:<11}{split.tokens:,} tokens, {split.documents:,} documents, {split.text_bytes:,} bytes of text, "
            f"{per_token}, {split.chunks:,} chunks in {len(split.shards):,} shards"
        )
    if left_out := [
        f"{manifest.build[key]} {key}" for key in sorted(manifest.build) if _counts_left_out(manifest, key)
    ]:
        lines.append(f"left out   {', '.join(left_out).replace('_', ' ')}")
    lines.append("sample")
    lines.extend(f"  | {line}" for line in sample_text(corpus_dir).splitlines()[:_SAMPLE_LINES])
    return "\n".join(lines) + "\n"


def sample_text(corpus_dir: Path, split: str = "train") -> str:
    """The beginning of the split's first document, decoded."""
    tokens = next(TokenReader(corpus_dir, split).chunks(), np.empty(0, dtype=np.uint16))[:_SAMPLE_TOKENS].tolist()
    tokenizer = CorpusTokenizer.load(corpus_dir)
    if tokenizer.end_of_text in tokens:
        tokens = tokens[: tokens.index(tokenizer.end_of_text)]
    return tokenizer.decode(tokens)


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


def _counts_left_out(manifest: Manifest, key: str) -> bool:
    return key.endswith("_documents") and bool(manifest.build[key])
