"""How the bytes of a corpus are hashed: whole files by sha256, chunks by 64 bits of theirs.

Knows nothing of what the bytes mean. sha256 is what a person can check with `sha256sum`; the short chunk digest is what
a training run can afford before the first use of every chunk.
"""

import hashlib
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal. Raises OSError as `open` does."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def chunk_digest(data: bytes | memoryview) -> int:
    """64-bit digest of a chunk's bytes in its shard: finds damage, is no defence against an adversary."""
    return short_digest(hashlib.sha256(data).digest())


def short_digest(sha256: bytes) -> int:
    """The 64 bits of a sha256 that stand in the index."""
    return int.from_bytes(sha256[:8], "little")
