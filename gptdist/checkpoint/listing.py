"""What checkpoints a folder has, in a few lines for people.

Knows folders and manifests, and three names in run state (samples, loss, layout). Must not know torch, ranks.
"""

from dataclasses import dataclass
from pathlib import Path

from gptdist.checkpoint.folder import file_problem, parse_step, step_folders
from gptdist.checkpoint.manifest import MANIFEST, Manifest, load_manifest
from gptdist.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointSummary:
    """One line of `gptdist ckpt list`. `reason` says why where it is not `ok`; what is not known is None."""

    step: int
    path: Path
    bytes: int
    created: str | None
    samples: int | None
    loss: float | None
    layout: str | None
    ok: bool
    reason: str | None


def list_checkpoints(checkpoints_dir: Path, *, verify: bool = False) -> list[CheckpointSummary]:
    """The checkpoints of a folder, newest first. `verify` hashes every byte; otherwise only sizes are checked.

    Raises CheckpointError where the folder does not exist.
    """
    if not checkpoints_dir.is_dir():
        raise CheckpointError(f"no folder {checkpoints_dir}. Give a folder that holds step-... folders.")
    return [_summarize(path, verify) for path in step_folders(checkpoints_dir)]


def check_step_name(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError where a step-... folder holds another step. Other names say nothing."""
    named = parse_step(folder.name)
    if named and named[0] != manifest.step:
        raise CheckpointError(
            f"{folder / MANIFEST} is of step {manifest.step}, but the folder is named for step {named[0]}. "
            "Give the folder its own name back."
        )


def check_files(folder: Path, manifest: Manifest, *, hashed: bool) -> None:
    """Raises CheckpointError, naming the first file that is not what the manifest says."""
    for name, entry in sorted(manifest.files.items()):
        problem = file_problem(folder / name, entry.bytes, entry.sha256 if hashed else None)
        if problem:
            raise CheckpointError(problem)


def _step(path: Path) -> int:
    parsed = parse_step(path.name)
    return parsed[0] if parsed else -1


def _summarize(path: Path, verify: bool) -> CheckpointSummary:
    try:
        manifest = load_manifest(path)
    except CheckpointError as error:
        return CheckpointSummary(_step(path), path, 0, None, None, None, None, False, str(error))
    reason = None
    try:
        check_step_name(path, manifest)
        check_files(path, manifest, hashed=verify)
    except CheckpointError as error:
        reason = str(error)
    samples, loss, layout = (manifest.state.get(name) for name in ("samples", "loss", "layout"))
    return CheckpointSummary(
        step=_step(path),
        path=path,
        bytes=manifest.total_bytes,
        created=manifest.created,
        samples=samples if isinstance(samples, int) else None,
        loss=float(loss) if isinstance(loss, int | float) else None,
        layout=layout if isinstance(layout, str) else None,
        ok=reason is None,
        reason=reason,
    )
