"""Decides which documents train, which validate, and in which order: pure functions of seed and document.

Knows no files and no tokens. The split goes by text, so that equal texts land on the same side; the order goes by key.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HASH_RANGE = 1 << 64
# Multipliers and shifts of the splitmix64 finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
# generators").
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def keyed_hash(seed: int, purpose: str, content: bytes) -> int:
    """64 bits that look random and depend on all three."""
    return int.from_bytes(hashlib.blake2b(content, key=_key(seed, purpose), digest_size=8).digest(), "little")


def order_hashes(seed: int, keys: Sequence[bytes]) -> np.ndarray:
    """Where each document stands in the corpus: uint64 [n], `keyed_hash` of its key."""
    key = _key(seed, "order")
    digests = b"".join([hashlib.blake2b(content, key=key, digest_size=8).digest() for content in keys])
    return np.frombuffer(digests, dtype="<u8")


def split_hashes(seed: int, digests: np.ndarray) -> np.ndarray:
    """What decides on which side a text falls: uint64 [n] from the texts' digests, uint64 [n, 2]."""
    key = np.frombuffer(_key(seed, "split")[:16], dtype="<u8")
    values = digests[:, 0] ^ key[0]
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLY_1
    values = (values + digests[:, 1]) ^ key[1]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLY_2
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


@dataclass(frozen=True)
class Choice:
    """Which documents are in the corpus and on which side, by their two hashes.

    In: order below `order_limit`. Held out: split hash below `split_bound`, or all of a held-out source's.
    """

    order_limit: int
    split_bound: int

    def held_out(self, split: np.ndarray) -> np.ndarray:
        """bool [n] from split hashes."""
        if self.split_bound >= HASH_RANGE:
            return np.ones(len(split), dtype=bool)
        return split < np.uint64(self.split_bound)


def split_bound(validation_fraction: float, lowest: int, highest: int) -> int:
    """The split hash from which texts train, given the lowest and the highest there is.

    A text validates when its hash falls into the lowest `validation_fraction`. Of two or more different texts, where a
    fraction is asked for, at least one validates and at least one trains; a single one trains.
    """
    bound = int(validation_fraction * HASH_RANGE)
    if validation_fraction > 0:
        bound = min(max(bound, lowest + 1), highest)
    return bound


def shard_range(number: int, count: int) -> tuple[int, int]:
    """The order hashes that belong to shard `number` of `count`: from the first, up to but without the second."""
    return -(-number * HASH_RANGE // count), -(-(number + 1) * HASH_RANGE // count)


def _key(seed: int, purpose: str) -> bytes:
    return hashlib.blake2b(f"gptdist {purpose} {seed}".encode(), digest_size=32).digest()
