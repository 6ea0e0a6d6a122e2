"""`gptdist ckpt copy`: one checkpoint from a folder or URL to another, verified on the way."""

import argparse
import tempfile
from pathlib import Path

from gptdist.checkpoint.copying import copy_checkpoint, fetch_checkpoint, upload_checkpoint
from gptdist.errors import EXIT_DONE, ConfigError
from gptdist.remote import RemoteFolder, is_url


def main(args: argparse.Namespace) -> int:
    """Both name the checkpoint itself, a `step-...`; what was at the target stays as it was until all is there."""
    source, target = args.source, args.target
    if is_url(target):
        folder, name = _split(target)
        if is_url(source):
            with tempfile.TemporaryDirectory(prefix="gptdist-copy-") as between:
                upload_checkpoint(fetch_checkpoint(*_split(source), Path(between)), folder, name)
        else:
            upload_checkpoint(Path(source), folder, name)
    elif is_url(source):
        fetch_checkpoint(*_split(source), Path(target).parent, final=Path(target))
    else:
        copy_checkpoint(Path(source), Path(target))
    print(f"copied to {_shown(target)}")
    return EXIT_DONE


def _split(url: str) -> tuple[RemoteFolder, str]:
    parent, _, name = url.rstrip("/").rpartition("/")
    if not name or parent.endswith((":/", ":")):
        raise ConfigError(f"{_shown(url)} names no checkpoint. Give the URL of a step-... folder.")
    return RemoteFolder(parent), name


def _shown(name: str) -> str:
    return RemoteFolder(name).shown() if is_url(name) else name
