"""`gptdist ckpt copy`: one checkpoint from a folder or URL to another, verified on the way."""

import argparse
import sys
import tempfile
from pathlib import Path

from gptdist.checkpoint.copying import copy_checkpoint, fetch_checkpoint, upload_checkpoint
from gptdist.checkpoint.read import is_checkpoint, open_newest
from gptdist.errors import EXIT_DONE, ConfigError
from gptdist.remote import RemoteFolder, is_url


def main(args: argparse.Namespace) -> int:
    """The target appears whole; behind a URL, it is complete once its manifest is there, which comes last."""
    source, target = args.source, args.destination
    if not is_url(source):
        source = str(_local(Path(source), args.trust_others))
    if is_url(source) and is_url(target):
        with tempfile.TemporaryDirectory(prefix="gptdist-copy-") as between:
            upload_checkpoint(fetch_checkpoint(*_split(source), Path(between)), *_split(target))
    elif is_url(source):
        fetch_checkpoint(*_split(source), Path(target).parent, final=Path(target))
    elif is_url(target):
        upload_checkpoint(Path(source), *_split(target))
    else:
        copy_checkpoint(Path(source), Path(target))
    print(f"{_shown(source)} is copied to {_shown(target)}, every byte verified", flush=True)
    return EXIT_DONE


def _local(path: Path, trust_others: bool) -> Path:
    # One that was named need not be hashed now: it is while it is copied.
    found = open_newest(path, verify=not is_checkpoint(path), trust_others=trust_others)
    for reason in found.skipped:
        print(f"warning: passed over a checkpoint: {reason}", file=sys.stderr, flush=True)
    with found.checkpoint as checkpoint:
        return checkpoint.path


def _split(url: str) -> tuple[RemoteFolder, str]:
    parent, _, name = url.rstrip("/").rpartition("/")
    if not name or parent.endswith((":/", ":")):
        raise ConfigError(f"{_shown(url)} names no checkpoint. Give the URL of a step-... folder.")
    return RemoteFolder(parent), name


def _shown(name: str) -> str:
    return RemoteFolder(name).shown() if is_url(name) else name
