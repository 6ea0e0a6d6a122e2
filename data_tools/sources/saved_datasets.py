"""Knows which files of a folder are a Hugging Face dataset that was saved there with `save_to_disk`.

Knows the names of its files and the little JSON beside them; needs no library of theirs and reads no rows. Other Arrow
files in such a folder are caches of the same rows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.sources.remote import Listing, open_url, shown_url
from gptdist.errors import CorpusError


def saved_datasets(listing: Listing) -> dict[str, list[str]]:
    """Folder -> the Arrow files that are the dataset, for each dataset (or split of one) in a listing.

    Raises CorpusError where a split or file is missing.
    """
    saved = {}
    for below, (url, _) in listing.items():
        folder, _, name = below.rpartition("/")
        at = f"{folder}/" if folder else ""
        if name == "state.json" and f"{at}dataset_info.json" in listing:
            saved[folder] = _arrow_files(url, at, listing)
        elif name == "dataset_dict.json":
            for split in _names_in(url, lambda content: content["splits"]):
                if f"{at}{split}/state.json" not in listing:
                    raise CorpusError(f"Dataset {_folder(url)} lacks its split {split!r}. Copy it again.")
    return saved


def _arrow_files(url: str, at: str, listing: Listing) -> list[str]:
    names = _names_in(url, lambda state: [entry["filename"] for entry in state["_data_files"]])
    for name in names:
        if f"{at}{name}" not in listing:
            raise CorpusError(f"Dataset {_folder(url)} lacks {name!r}, which its state.json lists. Copy it again.")
    if _names_in(url, lambda state: [entry["filename"] for entry in state.get("_indices_data_files") or []]):
        raise CorpusError(
            f"Dataset {_folder(url)} was saved by an old release, with an index of its rows. Load it and save it again."
        )
    return names


def _names_in(url: str, pick: Callable[[Any], list[str]]) -> list[str]:
    """File names from a small JSON file. Raises CorpusError."""
    try:
        if "://" in url:
            with open_url(url) as file:
                content = file.read()
        else:
            content = Path(url).read_bytes()
        names = [str(name) for name in pick(json.loads(content))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorpusError(
            f"{shown_url(url)} is not what a dataset saved on disk has ({type(error).__name__}). Copy it again."
        ) from None
    for name in names:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise CorpusError(f"{shown_url(url)} names {name!r}, which is outside its folder.")
    return names


def _folder(url: str) -> str:
    return shown_url(url).rpartition("/")[0]
