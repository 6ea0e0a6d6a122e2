"""Adding bytes to the end of a file so that a full disk leaves no torn record.

Knows nothing of what the bytes mean.
"""

import os
from pathlib import Path


def append_whole(path: Path, record: bytes) -> None:
    """Append all of `record`, or nothing and raise OSError. Makes the folder and the file where they are missing.

    The file is opened anew each time: a value every few seconds does not notice, and a file system that went away and
    came back needs no other care. Only a kill in the middle of the write can leave a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size_before = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, record)
        except OSError:
            os.ftruncate(descriptor, size_before)
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, record: bytes) -> None:
    written = 0
    while written < len(record):
        written += os.write(descriptor, record[written:])
