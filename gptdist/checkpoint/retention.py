"""Which checkpoints stay once a new one is there.

Knows folders, manifests, the `verified` marker, and of run state the step's evaluation. Must not know torch or ranks.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gptdist.checkpoint.folder import doom, step_folders, step_of
from gptdist.checkpoint.listing import check_files, check_step_name
from gptdist.checkpoint.manifest import Manifest, load_manifest
from gptdist.checkpoint.verified import verified_at
from gptdist.errors import CheckpointError

EVALUATION_LOSS = "evaluation_loss"
"""In run state: held-out loss at the very step that was saved, or null."""


@dataclass(frozen=True)
class Retention:
    """The newest `keep` stay (None: all), those of steps that `every` divides, the `best` by evaluation loss, and the
    newest that is at least `behind` steps older than what was just saved, with the next that will be (0: neither)."""

    keep: int | None = None
    every: int = 0
    best: int = 0
    behind: int = 0


def prune(
    checkpoints_dir: Path, just_saved: Path, retention: Retention, protected: Collection[Path] = ()
) -> list[Path]:
    """Delete what need not stay; what was deleted.

    `just_saved`, `protected` and the newest verified one always stay. Of one step, only the last save does. Bad ones
    newer than those kept stay: they are evidence. Raises OSError.
    """
    folders = step_folders(checkpoints_dir)
    needed = [path for path in folders if path == just_saved or path in protected]
    superseded = {path for path in folders if step_of(path) == step_of(just_saved) and path not in needed}
    good: dict[Path, Manifest] = {}
    kept = set(needed)
    verified = False
    limit = step_of(just_saved) - retention.behind
    behind = not retention.behind  # whether one was found that is far enough behind
    for path in folders:
        enough = retention.keep is not None and sum(other not in superseded for other in good) >= retention.keep
        every = bool(retention.every) and step_of(path) % retention.every == 0
        if enough and verified and behind and not retention.best:
            # The rest need not be read: it can be a long list.
            if every and path not in superseded:
                kept.add(path)
            continue
        manifest = _good_manifest(path)
        if manifest is None:
            if not enough or every:
                kept.add(path)
            continue
        if (not enough or every) and path not in superseded:
            kept.add(path)
        if not verified and verified_at(path, manifest):
            verified = True
            kept.add(path)
        behind = behind or step_of(path) <= limit
        good[path] = manifest
    current = {path: manifest for path, manifest in good.items() if path not in superseded}
    kept |= _best(current, retention.best)
    if retention.behind:
        kept |= _behind(list(current), limit)
    gone = [path for path in folders if path not in kept]
    for path in gone:
        doom(path)
    return gone


def _behind(newest_first: list[Path], limit: int) -> set[Path]:
    """The newest of a step up to `limit`, and the oldest after it, which will be that one day."""
    far = [path for path in newest_first if step_of(path) <= limit]
    near = [path for path in newest_first if step_of(path) > limit]
    return {*far[:1], *near[-1:]}


def _best(good: dict[Path, Manifest], count: int) -> set[Path]:
    losses = {path: manifest.state.get(EVALUATION_LOSS) for path, manifest in good.items()}
    known = [(loss, -step_of(path), path) for path, loss in losses.items() if isinstance(loss, int | float)]
    # `loss == loss` leaves out NaN, which would be in no order; of equal ones the newer is the better.
    ranked = sorted(entry for entry in known if entry[0] == entry[0])
    return {path for _, _, path in ranked[:count]}


def _good_manifest(path: Path) -> Manifest | None:
    """The manifest, where files of the sizes it tells are there; contents are not hashed."""
    try:
        manifest = load_manifest(path)
        check_step_name(path, manifest)
        check_files(path, manifest, hashed=False)
    except (CheckpointError, OSError):
        return None
    return manifest
