"""What the tokenizer itself answers to the texts that a faster library must agree on: asked once for all workers.

Knows the texts and a digest of the ids; not which library is compared. The faster one is still asked by each process
for itself: its processor and its copy of that library may be its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from data_tools.tokenizing.hard_texts import hard_texts, of_vocabulary
from data_tools.tokenizing.new_characters import texts_with_new_characters
from gptdist.data.tokenizer import CorpusTokenizer

# Words of the vocabulary that are compared, each as a document: a tenth of a second of the reference's time.
_COMPARED_WORDS = 1 << 13
# Hard texts that are compared as one as well, each in the other's company.
_JOINED_TEXTS = 256


@dataclass(frozen=True)
class ReferenceAnswers:
    """`texts`: first `samples` of the corpus, then hard ones. `library`, `tokenizer`: a version, a sha256."""

    texts: list[str]
    samples: int
    library: str
    tokenizer: str
    digest: str

    @staticmethod
    def of(tokenizer: CorpusTokenizer, sample_texts: Sequence[str], added_tokens: Sequence[str]) -> "ReferenceAnswers":
        """Ask `tokenizer` for the sample, for texts that are hard for tokenizers, and for words of its vocabulary."""
        vocabulary = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
        hard = [*hard_texts(added_tokens), *of_vocabulary(vocabulary, _COMPARED_WORDS)]
        # Of the texts that are never given to another library the answer would be the tokenizer's own.
        apart = set(texts_with_new_characters([text.encode() for text in hard]))
        texts = [*sample_texts, *(text for index, text in enumerate(hard) if index not in apart)]
        texts.append("\n".join(texts[len(sample_texts) : len(sample_texts) + _JOINED_TEXTS]))
        digest = ids_digest(*tokenizer.encode_flat(texts))
        return ReferenceAnswers(texts, len(sample_texts), library_version(), tokenizer.sha256, digest)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> "ReferenceAnswers":
        """What `to_dict` gave."""
        return ReferenceAnswers(**raw)

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)

    def are_of(self, tokenizer: CorpusTokenizer) -> bool:
        """Whether this process's reference is the one that answered."""
        return self.tokenizer == tokenizer.sha256 and self.library == library_version()

    def said(self) -> str:
        """How much was compared."""
        sample_bytes = sum(len(text.encode()) for text in self.texts[: self.samples])
        return f"{sample_bytes:,} bytes of the corpus and {len(self.texts) - self.samples:,} hard texts"


def library_version() -> str:
    """Of the reference."""
    return metadata.version("tokenizers")


def ids_digest(ids: np.ndarray, ends: np.ndarray) -> str:
    """Of the ids of some texts in a row, and where each text's end."""
    content = hashlib.sha256(np.ascontiguousarray(ends, dtype="<i8").tobytes())
    content.update(np.ascontiguousarray(ids, dtype="<u4").tobytes())
    return content.hexdigest()
