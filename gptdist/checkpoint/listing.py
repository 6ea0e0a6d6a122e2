"""What checkpoints a folder has, in a few lines for people.

Knows folders and manifests, and four names in run state (samples, tokens, loss, layout). Must not know torch, ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gptdist.checkpoint.folder import file_problem, parse_step, step_folders, step_of, trust_problem
from gptdist.checkpoint.manifest import MANIFEST, Manifest, load_manifest
from gptdist.checkpoint.verified import verified_at
from gptdist.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointSummary:
    """One line of `gptdist ckpt list`. `reason` says why where it is not `ok`; what is not known is None.

    `verified`: when every byte was last found right (UTC, ISO 8601); None: not since it was written.
    """

    step: int
    path: Path
    bytes: int
    created: str | None
    samples: int | None
    tokens: int | None
    loss: float | None
    layout: str | None
    verified: str | None
    ok: bool
    reason: str | None


def list_checkpoints(
    checkpoints_dir: Path, *, verify: bool = False, trust_others: bool = False
) -> list[CheckpointSummary]:
    """The checkpoints of a folder, newest first. `verify` hashes every byte; otherwise only sizes are checked.
    What another user could have changed is not `ok`, unless `trust_others`.

    Raises CheckpointError where the folder does not exist.
    """
    found = find_step_folders(checkpoints_dir)
    if found is None:
        raise CheckpointError(f"no folder {checkpoints_dir}. Give a folder that holds step-... folders.")
    return [summarize(path, verify, trust_others) for path in found]


def find_step_folders(checkpoints_dir: Path) -> list[Path] | None:
    """As `step_folders`, for whoever was given the folder's name; None where there is none. Raises CheckpointError."""
    try:
        return step_folders(checkpoints_dir)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"cannot read the folder {checkpoints_dir}: {error.strerror or error}. Have its mode set so that this user "
            "may, or name another."
        ) from error


def check_step_name(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError where a step-... folder holds another step. Other names say nothing."""
    named = parse_step(folder.name)
    if named and named[0] != manifest.step:
        raise CheckpointError(
            f"{folder / MANIFEST} is of step {manifest.step}, but the folder is named for step {named[0]}. "
            "Give the folder its own name back."
        )


def check_trust(folder: Path, names: Iterable[str] = (MANIFEST,)) -> None:
    """Raises CheckpointError where the folder, or a file of these in it, may be somebody else's doing."""
    for path in (folder, *(folder / name for name in names)):
        problem = trust_problem(path)
        if problem:
            raise CheckpointError(problem)


def check_files(folder: Path, manifest: Manifest, *, hashed: bool) -> None:
    """Raises CheckpointError, naming the first file that is not what the manifest says."""
    for name, entry in sorted(manifest.files.items()):
        problem = file_problem(folder / name, entry.bytes, entry.sha256 if hashed else None)
        if problem:
            raise CheckpointError(problem)


def summarize(path: Path, verify: bool, trust_others: bool = False) -> CheckpointSummary:
    """One checkpoint, good or bad."""
    try:
        if not trust_others:
            check_trust(path)
        manifest = load_manifest(path)
    except CheckpointError as error:
        return CheckpointSummary(step_of(path), path, 0, None, None, None, None, None, None, False, str(error))
    reason = None
    try:
        check_step_name(path, manifest)
        if not trust_others:
            check_trust(path, manifest.files)
        check_files(path, manifest, hashed=verify)
    except CheckpointError as error:
        reason = str(error)
    samples, tokens, loss, layout = (manifest.state.get(name) for name in ("samples", "tokens", "loss", "layout"))
    return CheckpointSummary(
        step=step_of(path) if parse_step(path.name) else manifest.step,
        path=path,
        bytes=manifest.total_bytes,
        created=manifest.created,
        samples=samples if isinstance(samples, int) else None,
        tokens=tokens if isinstance(tokens, int) else None,
        loss=float(loss) if isinstance(loss, int | float) else None,
        layout=layout if isinstance(layout, str) else None,
        verified=verified_at(path, manifest),
        ok=reason is None,
        reason=reason,
    )
