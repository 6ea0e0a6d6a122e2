"""Decides which documents train, which validate, and in which order: pure functions of seed and document.

Knows no files and no tokens. The split goes by text, so that equal texts land on the same side; the order goes by key.
"""

import hashlib
from collections.abc import Sequence

from data_tools.sources import Document

_HASH_RANGE = 1 << 64


def keyed_hash(seed: int, purpose: str, content: bytes) -> int:
    """64 bits that look random and depend on all three."""
    key = hashlib.blake2b(f"gptdist {purpose} {seed}".encode(), digest_size=32).digest()
    return int.from_bytes(hashlib.blake2b(content, key=key, digest_size=8).digest(), "big")


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """All documents in their keyed order; a prefix of it is a fair sample."""
    return sorted(documents, key=lambda document: (keyed_hash(seed, "order", document.key.encode()), document.key))


def limited(documents: Sequence[Document], max_bytes: int | None) -> list[Document]:
    """The longest prefix with at most `max_bytes` of text, but at least one document; None: all."""
    if max_bytes is None:
        return list(documents)
    total = 0
    for count, document in enumerate(documents):
        total += document.text_bytes
        if total > max_bytes:
            return list(documents[: max(1, count)])
    return list(documents)


def split_documents(
    documents: Sequence[Document], seed: int, validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """(train, validation), both in the given order.

    A text validates when its keyed hash falls into the lowest `validation_fraction`. Of two or more different texts,
    where a fraction is asked for, at least one validates and at least one trains.
    """
    hashes = [keyed_hash(seed, "split", document.digest) for document in documents]
    bound = int(validation_fraction * _HASH_RANGE)
    if validation_fraction > 0 and len(set(hashes)) >= 2:
        bound = min(max(bound, min(hashes) + 1), max(hashes))
    train = [document for document, value in zip(documents, hashes, strict=True) if value >= bound]
    validation = [document for document, value in zip(documents, hashes, strict=True) if value < bound]
    return train, validation
