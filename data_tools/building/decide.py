"""Decides what concerns all documents of a build at once, from the columns of their runs: limit, split, shards.

Memory: one run's columns, and one in 4,096 of all documents where the text is limited. The limit and the sizes of
shards are taken before duplicates are dropped.
"""

import numpy as np

from data_tools.building.arrange import HASH_RANGE, Choice, split_bound
from data_tools.building.job import Decisions, OpenJob
from data_tools.building.runs import read_columns
from gptdist.errors import CorpusError

_LIMIT_BINS = 1 << 12
# What a document and a chunk take in a shard beside tokens and key: an end, quotes and a comma; headers and padding.
_DOCUMENT_BYTES = 12
_CHUNK_BYTES = 2560
_BIN_SHIFT = np.uint64(64 - 12)


def decide(build: OpenJob) -> Decisions:
    """Where the corpus ends, what is held out, and how many shards each split has."""
    options = build.plan.options
    if not build.runs:
        raise CorpusError(
            "No document is left to build a corpus from: all were empty, unreadable or dropped. Look at the sources, "
            "or at the options that drop documents."
        )
    limit = HASH_RANGE if options.max_bytes is None else _order_limit(build, options.max_bytes)
    held_out_given = bool(build.plan.held_out)
    bound = 0 if held_out_given else split_bound(options.validation_fraction, *_extremes(build, limit))
    sizes = {"train": 0, "validation": 0}
    outside = np.zeros((len(build.plan.sources), 2), dtype=np.int64)
    for run, held_out in build.runs:
        columns = read_columns(
            build.work.path / run, ["order", "split", "token_ends", "key_ends", "source", "text_bytes"]
        )
        choice = Choice(limit, HASH_RANGE if held_out else bound)
        lengths = np.diff(columns["token_ends"], prepend=0) * build.dtype.itemsize
        lengths += np.diff(columns["key_ends"], prepend=0) + _DOCUMENT_BYTES
        inside = _below(columns["order"], HASH_RANGE if held_out else limit)
        aside = choice.held_out(columns["split"])
        np.add.at(outside[:, 0], columns["source"][~inside], 1)
        np.add.at(outside[:, 1], columns["source"][~inside], columns["text_bytes"][~inside])
        sizes["train"] += int(lengths[inside & ~aside].sum())
        sizes["validation"] += int(lengths[inside & aside].sum())
    chunk_bytes = options.chunk_tokens * build.dtype.itemsize
    for split, size in sizes.items():
        sizes[split] = size + -(-size // chunk_bytes) * _CHUNK_BYTES
    return Decisions(
        order_limit=limit,
        split_bound=bound,
        shards={split: -(-size // options.shard_bytes) for split, size in sizes.items()},
        over_limit=[[source, *counts] for source, counts in enumerate(outside.tolist()) if counts[0]],
    )


def _order_limit(build: OpenJob, max_bytes: int) -> int:
    """The order below which there are at most `max_bytes` of text, but at least one document."""
    runs = [run for run, held_out in build.runs if not held_out]
    per_bin = np.zeros(_LIMIT_BINS, dtype=np.int64)
    for run in runs:
        columns = read_columns(build.work.path / run, ["order", "text_bytes"])
        np.add.at(per_bin, (columns["order"] >> _BIN_SHIFT).astype(np.int64), columns["text_bytes"])
    before = np.cumsum(per_bin) - per_bin
    crossing = np.flatnonzero(before + per_bin > max_bytes)
    if not crossing.size:
        return HASH_RANGE
    order_parts, size_parts = [], []
    for run in runs:
        columns = read_columns(build.work.path / run, ["order", "text_bytes"])
        chosen = (columns["order"] >> _BIN_SHIFT) == np.uint64(crossing[0])
        order_parts.append(columns["order"][chosen])
        size_parts.append(columns["text_bytes"][chosen])
    order, sizes = np.concatenate(order_parts), np.concatenate(size_parts)
    rows = np.argsort(order, kind="stable")
    total = int(before[crossing[0]]) + np.cumsum(sizes[rows])
    first_out = int(np.flatnonzero(total > max_bytes)[0])
    limit = int(order[rows[first_out]])
    nothing_before = first_out == 0 and not before[crossing[0]]
    return limit + 1 if nothing_before else limit


def _extremes(build: OpenJob, limit: int) -> tuple[int, int]:
    """The lowest and the highest split hash of documents that may train."""
    lowest, highest = HASH_RANGE - 1, 0
    for run, held_out in build.runs:
        if not held_out:
            columns = read_columns(build.work.path / run, ["order", "split"])
            hashes = columns["split"][_below(columns["order"], limit)]
            if hashes.size:
                lowest, highest = min(lowest, int(hashes.min())), max(highest, int(hashes.max()))
    return (lowest, highest) if lowest <= highest else (0, 0)


def _below(order: np.ndarray, limit: int) -> np.ndarray:
    return np.ones(len(order), dtype=bool) if limit >= HASH_RANGE else order < np.uint64(limit)
