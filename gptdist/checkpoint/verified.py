"""The marker of a checkpoint that was read again, byte for byte, after it was saved.

Knows the file `verified` in a checkpoint's folder. It names the manifest that it speaks of, and so all that was hashed;
a marker of another manifest counts for nothing. Loading does not believe it: it tells retention what to rely on.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from gptdist.checkpoint.manifest import Manifest
from gptdist.durable import write_durably

VERIFIED = "verified"
_LARGEST = 4096


def mark_verified(folder: Path, manifest: Manifest) -> None:
    """Note that every byte that `manifest` describes was read and is right. Raises OSError."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    content = json.dumps({"manifest_sha256": manifest.sha256, "when": when})
    write_durably(folder / VERIFIED, f"{content}\n".encode())


def verified_at(folder: Path, manifest: Manifest) -> str | None:
    """When it was verified (UTC, ISO 8601); None where it was not, or was something else then."""
    try:
        with (folder / VERIFIED).open("rb") as file:
            marker = json.loads(file.read(_LARGEST))
        return str(marker["when"]) if marker["manifest_sha256"] == manifest.sha256 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
