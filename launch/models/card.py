"""What every conformance card says: which checkpoint was exported, of which data, with which tokenizer.

The card goes where the weights go, so it names corpora, never where they lie on this machine. Knows no format.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptdist.checkpoint.read import Checkpoint
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.remote import is_url, without_secrets
from launch.models.stored import versions_of

_OF_STATE = ("samples", "tokens", "loss", "layout", "versions", "imported_from")


def begin_card(checkpoint: Checkpoint, tokenizer: CorpusTokenizer, *packages: str) -> dict[str, Any]:
    """The card but for what a format has to say. `packages`: whose versions count, beside gptdist's."""
    state = checkpoint.state
    return {
        "format": "gptdist-conformance",
        "version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions_of("gptdist", *packages),
        "checkpoint": {
            "step": checkpoint.step,
            "created": checkpoint.created,
            "manifest_sha256": checkpoint.manifest.sha256,
            **{key: state.get(key) for key in _OF_STATE},
        },
        "data": _named(state.get("data")),
        "tokenizer": {"sha256": tokenizer.sha256, "kind": tokenizer.kind, "end_of_text": tokenizer.end_of_text},
    }


def corpus_name(corpus: str) -> str:
    """A corpus by its folder's own name, or its URL without secrets: which one it is, its index's digest says."""
    return without_secrets(corpus) if is_url(corpus) else Path(corpus).name


def _named(value: Any) -> Any:
    """The data identity with corpora by name."""
    if isinstance(value, dict):
        return {key: corpus_name(item) if key == "corpus" else _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list) else value
