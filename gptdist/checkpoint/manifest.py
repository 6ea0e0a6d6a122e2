"""The manifest of a checkpoint: every logical tensor, where its fragments are, and what each file must hash to.

Knows the JSON format (version 2) and the rules it keeps. Must not know torch, ranks or how files are written.
The last line holds the sha256 of all bytes before it, so that a changed manifest is noticed like a changed file.
Unknown keys are ignored: later writers may add some without a new version.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptdist.checkpoint.logical import Box, Shape, overlap_or_gap
from gptdist.errors import CheckpointError

FORMAT = "gptdist-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_DIGEST = re.compile("[0-9a-f]{16}")
_LAST_LINE = re.compile(rb'"sha256": "([0-9a-f]{64})"}\n')
_REMEDY = "The checkpoint is damaged: use another one, or delete its folder."


@dataclass(frozen=True)
class FileEntry:
    """One file of the checkpoint. `global_rank` is the rank that wrote it; nothing depends on it."""

    bytes: int
    sha256: str
    global_rank: int


@dataclass(frozen=True)
class FragmentEntry:
    """`box` of a logical tensor is the tensor `key` of `file`."""

    file: str
    key: str
    box: Box


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor. `dtype` is torch's name for it, such as bfloat16; `digest` does not know the fragments."""

    shape: Shape
    dtype: str
    digest: str
    fragments: tuple[FragmentEntry, ...]


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint is. `state` is JSON that the store does not look into; `created` is UTC, ISO 8601.
    `sha256` is known once it was a file: that of its bytes, and so of all that the checkpoint is."""

    step: int
    created: str
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    state: dict[str, Any]
    sha256: str = ""

    def render(self) -> bytes:
        """The file's bytes: JSON, one tensor or file a line."""
        files = {
            name: {"bytes": entry.bytes, "sha256": entry.sha256, "global_rank": entry.global_rank}
            for name, entry in sorted(self.files.items())
        }
        tensors = {
            name: {
                "shape": entry.shape,
                "dtype": entry.dtype,
                "digest": entry.digest,
                "fragments": [[part.file, part.key, part.box.start, part.box.stop] for part in entry.fragments],
            }
            for name, entry in sorted(self.tensors.items())
        }
        head = {"format": FORMAT, "version": VERSION, "step": self.step, "created": self.created}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        lines += [f'"files": {_render_lines(files)},', f'"tensors": {_render_lines(tensors)},']
        lines.append(f'"state": {json.dumps(self.state, sort_keys=True)},')
        body = ("{" + "\n".join(lines) + "\n").encode()
        return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()

    def check_cover(self) -> None:
        """Raises CheckpointError unless every logical tensor is there exactly once."""
        for name, tensor in self.tensors.items():
            problem = overlap_or_gap(tensor.shape, [part.box for part in tensor.fragments])
            if problem:
                raise CheckpointError(f"tensor {name} is not there exactly once: {problem}")

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, all its own rules checked; its files are not looked at.

    Raises CheckpointError, which names the manifest and what is wrong with it.
    """
    path = folder / MANIFEST
    try:
        is_folder = folder.is_dir()
        content = path.read_bytes() if is_folder and path.is_file() and not path.is_symlink() else None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if not is_folder:
        raise CheckpointError(f"no checkpoint folder {folder}. Give the path of a step-... folder.")
    if content is None:
        raise CheckpointError(
            f"{path} is missing: this is no checkpoint, or one that was never finished. Use another step-... folder."
        )
    try:
        return parse_manifest(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_manifest(content: bytes) -> Manifest:
    """The inverse of `Manifest.render`. Raises CheckpointError."""
    body, newline, last_line = content[:-1].rpartition(b"\n")
    digest = _LAST_LINE.fullmatch(last_line + content[-1:])
    if not digest or hashlib.sha256(body + newline).hexdigest().encode() != digest[1]:
        raise CheckpointError(_other_format(content) or f"its last line is not the sha256 of the rest. {_REMEDY}")
    try:
        data = json.loads(content)
        other = _other_format(content)
        if other:
            raise CheckpointError(other)
        if data["version"] != VERSION:
            raise CheckpointError(
                f"format version {data['version']!r}, but this gptdist reads version {VERSION}. "
                "Use the gptdist that wrote it, or a newer one."
            )
        return replace(_manifest_of(data), sha256=hashlib.sha256(content).hexdigest())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"not a manifest: {type(error).__name__}: {error}. {_REMEDY}") from None


def _other_format(content: bytes) -> str | None:
    """What to say of the manifest of something else, such as a corpus; None for one of a checkpoint, also a bad one."""
    try:
        found = json.loads(content)["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return None if found == FORMAT else f"format is {found!r}, not {FORMAT!r}. This is no checkpoint of gptdist."


def _manifest_of(data: dict[str, Any]) -> Manifest:
    files = {
        name: FileEntry(_count(entry["bytes"]), _text(entry["sha256"]), _count(entry["global_rank"]))
        for name, entry in data["files"].items()
    }
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"file name {name!r} is not allowed: only plain *.safetensors names inside the checkpoint's folder. "
                "Do not load this checkpoint unless you know who wrote it."
            )
    tensors = {}
    for name, entry in data["tensors"].items():
        fragments = tuple(
            FragmentEntry(_text(file), _text(key), Box(_integers(start), _integers(stop)))
            for file, key, start, stop in entry["fragments"]
        )
        unlisted = [part.file for part in fragments if part.file not in files]
        if unlisted:
            raise CheckpointError(
                f"tensor {name} has a fragment in {unlisted[0]!r}, which is not under files. {_REMEDY}"
            )
        digest = _text(entry["digest"])
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a digest")
        tensors[name] = TensorEntry(_integers(entry["shape"]), _text(entry["dtype"]), digest, fragments)
    state = data["state"]
    if not isinstance(state, dict):
        raise TypeError("state is not an object")
    manifest = Manifest(_count(data["step"]), _text(data["created"]), files, tensors, state)
    manifest.check_cover()
    return manifest


def _render_lines(entries: dict[str, Any]) -> str:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
    return "{\n" + ",\n".join(lines) + "}"


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _integers(values: object) -> Shape:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of counts")
    return tuple(_count(value) for value in values)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
