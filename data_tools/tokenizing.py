"""Makes the tokenizer that a build asks for: an existing one, a new byte-level BPE, or plain bytes.

Knows the `tokenizers` trainer; what a tokenizer is afterwards is in `gptdist/data/tokenizer.py`.
"""

from collections.abc import Iterator
from pathlib import Path

from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError

END_OF_TEXT = "<|endoftext|>"
# 256 bytes and the end of text.
MIN_TRAINED_SIZE = 257


def check_tokenizer(spec: str, end_of_text: str | None = None) -> CorpusTokenizer | None:
    """The tokenizer that `spec` names, None where it must be trained first. Raises CorpusError for what is neither.

    `spec` is `bytes`, `train:SIZE`, or a path to a HF tokenizer.json or to a folder with one.
    """
    if spec == "bytes":
        return CorpusTokenizer.of_bytes()
    if spec.startswith("train:"):
        _trained_size(spec)
        return None
    if not Path(spec).exists():
        raise CorpusError(
            f"Tokenizer {spec!r} does not exist. Name a HF tokenizer.json, a folder with one, train:SIZE or bytes."
        )
    return CorpusTokenizer.load(Path(spec), end_of_text)


def train_tokenizer(spec: str, texts: Iterator[str]) -> CorpusTokenizer:
    """A byte-level BPE (Sennrich et al. 2016, on bytes as GPT-2's) of SIZE ids, or fewer from too little text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_trained_size(spec),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return CorpusTokenizer.parse(bpe.to_str(pretty=True).encode(), f"tokenizer {spec}", END_OF_TEXT)


def _trained_size(spec: str) -> int:
    size = spec.removeprefix("train:").replace(",", "").replace("_", "")
    if not size.isdecimal() or int(size) < MIN_TRAINED_SIZE:
        raise CorpusError(
            f"Tokenizer {spec!r}: the size must be a number of at least {MIN_TRAINED_SIZE} (256 bytes and the "
            "end of text), as in train:4096."
        )
    return int(size)
