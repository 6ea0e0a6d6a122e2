"""What is done to one text before it is a document, why it may not become one, and the digests that tell equal texts.

Knows no files and no other documents. Lengths are bytes of UTF-8 after the normalisation, since that is what gets
tokenised.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from enum import Enum
from typing import Literal, cast, get_args

from gptdist.errors import CorpusError

Normalization = Literal["none", "nfc", "nfkc"]

DIGEST_BYTES = 16


class DropReason(Enum):
    """Why a text does not become a document; the value is how reports call it."""

    EMPTY = "empty"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"


@dataclass(frozen=True)
class Cleaning:
    """What every text goes through. `max_bytes` None: no upper bound."""

    normalize: Normalization = "none"
    min_bytes: int = 0
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.normalize not in get_args(Normalization):
            names = ", ".join(repr(name) for name in get_args(Normalization))
            raise CorpusError(f"normalize is {self.normalize!r}; it must be one of {names}.")
        if self.min_bytes < 0:
            raise CorpusError(f"min_bytes is {self.min_bytes}; it must be at least 0.")
        if self.max_bytes is not None and self.max_bytes < max(1, self.min_bytes):
            raise CorpusError(
                f"max_bytes is {self.max_bytes} and min_bytes is {self.min_bytes}: no text can have such a length. "
                f"Use max_bytes of at least {max(1, self.min_bytes)}, or lower min_bytes."
            )


def clean(text: str, cleaning: Cleaning) -> str | DropReason:
    """The normalised text, or why it is dropped. Nothing is stripped: a text that is kept keeps its white space.

    Raises UnicodeEncodeError for half of a surrogate pair, which no source may yield.
    """
    if not text or text.isspace():
        return DropReason.EMPTY
    if cleaning.normalize != "none" and not text.isascii():
        form = cast(Literal["NFC", "NFKC"], cleaning.normalize.upper())
        text = unicodedata.normalize(form, text)
    num_bytes = _utf8_bytes(text)
    if num_bytes < cleaning.min_bytes:
        return DropReason.TOO_SHORT
    if cleaning.max_bytes is not None and num_bytes > cleaning.max_bytes:
        return DropReason.TOO_LONG
    return text


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for equal texts only: the head of the SHA-256 of its UTF-8."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def normalized_digest(text: str) -> bytes:
    """The digest of what two copies share whose letter case, white space or compatibility characters differ.

    That is NFKC, then lower case, then each run of white space as one space and none at the ends.
    """
    # ASCII is its own NFKC.
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return text_digest(" ".join(plain.lower().split()))


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
