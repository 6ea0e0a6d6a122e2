"""A checkpoint written by one process from what it reads a little at a time: resharded, or averaged of others.

The steps are those of a save: a temporary folder, synced files, the manifest last, then the name. Memory is a few tens
of megabytes, however large a tensor is. Knows files, manifests and where they go. Must not know torch, or where the
elements come from.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from gptdist.checkpoint.digest import add_digests, render_digest
from gptdist.checkpoint.folder import FILE_MODE, FOLDER_MODE, commit, free_bytes, parse_step, storage_error
from gptdist.checkpoint.fragment import FragmentPlace
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import MANIFEST, FileEntry, FragmentEntry, Manifest, TensorEntry
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.tensor_file import ReadPart, file_size, write_tensor_stream
from gptdist.durable import write_durably
from gptdist.errors import CheckpointError, StorageError

_UNFINISHED = ".unfinished-"


def reshard(source: Checkpoint, destination: Path, ranks: int) -> Manifest:
    """Write `source` anew as files of `ranks` equal shares. Raises CheckpointError, or StorageError.

    State is carried over; digests are computed of what is written, and must be those of the source.
    """

    def read(place: FragmentPlace, box: Box) -> np.ndarray:
        return source.read(place.name, box)

    return write_checkpoint(destination, source.manifest, ranks, read)


def write_checkpoint(destination: Path, planned: Manifest, ranks: int, read: ReadPart) -> Manifest:
    """Write the tensors that `planned` names, of elements that `read` brings, as the new checkpoint `destination`.

    Of `planned`, files and fragments are not looked at; a digest that is not "" must come out. Returns the manifest
    written. Raises CheckpointError or StorageError, and then leaves nothing.
    """
    check_destination(destination, planned.step)
    shares = balanced_shares(planned.tensors, ranks)
    _check_room(destination, shares)
    with _unfinished_folder(destination) as folder:
        files = {}
        fragments: dict[str, list[FragmentEntry]] = {name: [] for name in planned.tensors}
        digests: dict[str, list[int]] = {name: [] for name in planned.tensors}
        for global_rank, places in enumerate(shares):
            path = folder / f"rank-{global_rank:05d}.safetensors"
            try:
                written = write_tensor_stream(path, places, read)
            except OSError as error:
                raise storage_error(error, path, file_size(places)) from error
            files[path.name] = FileEntry(written.bytes, written.sha256, global_rank)
            for name, part in written.digests.items():
                digests[name].append(part)
            for place in places:
                fragments[place.name].append(FragmentEntry(path.name, place.key, place.box))
        tensors = {
            name: TensorEntry(
                entry.shape, entry.dtype, render_digest(add_digests(digests[name])), tuple(fragments[name])
            )
            for name, entry in planned.tensors.items()
        }
        _check_digests(planned, tensors)
        manifest = replace(planned, files=files, tensors=tensors)
        manifest.check_cover()
        content = manifest.render()
        try:
            write_durably(folder / MANIFEST, content, FILE_MODE)
            commit(folder, destination)
        except OSError as error:
            raise storage_error(error, destination, len(content)) from error
    return manifest


def check_destination(destination: Path, step: int) -> None:
    """Raises CheckpointError where something is there already, or the name is that of another step."""
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} is there already. Give the name of a folder that does not exist yet.")
    named = parse_step(destination.name)
    if named and named[0] != step:
        raise CheckpointError(
            f"{destination} is named for step {named[0]}, but would hold step {step}. "
            f"Name it step-{step:08d}, or anything that does not begin with step-."
        )


def balanced_shares(tensors: Mapping[str, TensorEntry], ranks: int) -> list[list[FragmentPlace]]:
    """The tensors in the order of their names, cut along their rows into `ranks` shares of as many bytes, to a row.

    There are fewer shares where there are not so many rows.
    """
    whole = [FragmentPlace(name, entry.shape, Box.whole(entry.shape), entry.dtype) for name, entry in tensors.items()]
    total = sum(place.bytes for place in whole)
    shares: list[list[FragmentPlace]] = [[] for _ in range(ranks)]
    position = 0
    for place in sorted(whole, key=lambda place: place.name):
        rows = place.shape[0] if place.shape else 1
        row_bytes = place.bytes // rows if rows else 0
        first = 0
        while row_bytes and first < rows:
            share = position * ranks // total
            room = total * (share + 1) // ranks - position
            last = min(rows, first + max(1, -(-room // row_bytes)))
            box = Box((first, *place.box.start[1:]), (last, *place.shape[1:])) if place.shape else place.box
            shares[share].append(replace(place, box=box))
            position += (last - first) * row_bytes
            first = last
    return [places for places in shares if places]


@contextmanager
def _unfinished_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination`; gone afterwards, unless it was given that name."""
    folder = destination.with_name(_UNFINISHED + destination.name)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(FOLDER_MODE)
    except FileExistsError:
        raise StorageError(
            f"{folder} is there already: another command is writing {destination} just now, or one was killed while "
            "it did. Wait for the one, or delete the folder that the other left."
        ) from None
    except OSError as error:
        raise storage_error(error, folder, 0) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_room(destination: Path, shares: Sequence[Sequence[FragmentPlace]]) -> None:
    needed, free = sum(file_size(places) for places in shares), free_bytes(destination)
    if free < needed:
        raise StorageError(
            f"{destination} needs {needed:,} bytes, but only {free:,} are free there. Free some space, or name a "
            "folder on a larger disk."
        )


def _check_digests(planned: Manifest, tensors: Mapping[str, TensorEntry]) -> None:
    for name, entry in planned.tensors.items():
        if entry.digest and tensors[name].digest != entry.digest:
            raise CheckpointError(
                f"tensor {name} was read as other bits than were saved: its digest is {tensors[name].digest}, the "
                f"manifest says {entry.digest}. The source is damaged: `gptdist ckpt verify` names the file."
            )
