"""The stages that find duplicates over all documents, one partition of their keys at a time.

What a duplicate is, is decided in `duplicates.py`; here are the columns it needs, gathered from the runs, and the files
that name what is dropped. Memory: a partition, sized to `_PARTITION_BYTES`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from data_tools.building.arrange import HASH_RANGE, Choice
from data_tools.building.job import Job, OpenJob, open_job
from data_tools.building.runs import read_columns, write_columns
from data_tools.stages.duplicates import (
    EXACT_ROW_BYTES,
    NEAR_ROW_BYTES,
    exact_duplicates,
    near_duplicates,
    partition_count,
    partition_of,
)
from data_tools.stages.near import DEFAULT_BANDS, DEFAULT_BINS

_PARTITION_BYTES = 512 << 20


class _Rows(NamedTuple):
    """Documents of one run that are in the corpus so far: which rows, and what decides who comes first."""

    path_index: int
    rows: np.ndarray
    is_train: np.ndarray
    order: np.ndarray

    @property
    def place(self) -> np.ndarray:
        """int64: a number that no other document has."""
        return np.int64(self.path_index << 32) | self.rows


def partitions(build: OpenJob) -> dict[str, int]:
    """How many parts each of the two stages has."""
    documents = sum(build.load(f"read-{index:06d}.json")["documents"] for index in range(len(build.pieces)))
    return {
        "exact": partition_count(documents, EXACT_ROW_BYTES, _PARTITION_BYTES),
        "near": partition_count(
            documents * DEFAULT_BANDS, NEAR_ROW_BYTES + 4 * DEFAULT_BINS // DEFAULT_BANDS, _PARTITION_BYTES
        ),
    }


def find_exact_duplicates(job: Job, index: int) -> dict[str, Any]:
    """Documents whose normalised text is that of an earlier one: partition `index`."""
    build = open_job(job)
    count = build.load("partitions.json")["exact"]
    digests, parts = [], []
    for rows, columns in _documents(build, "same"):
        mine = partition_of(columns[:, 0], count) == index
        digests.append(columns[mine])
        parts.append(_chosen(rows, mine))
    is_train, order, place = _columns(parts)
    dropped = exact_duplicates(np.concatenate(digests), is_train, order, place)
    return _save(build, f"exact-{index:06d}", dropped, place, order)


def find_near_duplicates(job: Job, index: int) -> dict[str, Any]:
    """Documents that are nearly an earlier one, and are not dropped already: partition `index` of the band keys."""
    build = open_job(job)
    count = build.load("partitions.json")["near"]
    gone = build.dropped_places("exact")
    keys, parts = [], []
    for rows, bands in _documents(build, "bands"):
        row, band = np.nonzero((partition_of(bands, count) == index) & (bands != 0))
        stays = ~np.isin(rows.place[row], gone)
        row, band = row[stays], band[stays]
        keys.append(bands[row, band])
        parts.append(_chosen(rows, row))
    is_train, order, place = _columns(parts)
    key = np.concatenate(keys)
    # Only documents that meet another one need their signatures.
    values, counts = np.unique(key, return_counts=True)
    meets = np.isin(key, values[counts > 1])
    key, is_train, order, place = key[meets], is_train[meets], order[meets], place[meets]
    asked, signature_of = np.unique(place, return_inverse=True)
    dropped = near_duplicates(
        key, is_train, order, place, _signatures(build, asked), signature_of, build.plan.options.near_threshold
    )
    return _save(build, f"near-{index:06d}", dropped, place, order)


def _documents(build: OpenJob, column: str) -> Iterator[tuple[_Rows, np.ndarray]]:
    """Run by run the documents within the limit of the corpus, with one more column of theirs."""
    decisions = build.decisions
    for number, (run, held_out) in enumerate(build.runs):
        columns = read_columns(build.work.path / run, ["order", "split", column])
        choice = Choice(decisions.order_limit, HASH_RANGE if held_out else decisions.split_bound)
        limit = HASH_RANGE if held_out else decisions.order_limit
        rows = np.arange(len(columns["order"]))
        if limit < HASH_RANGE:
            rows = np.flatnonzero(columns["order"] < np.uint64(limit))
        is_train = ~choice.held_out(columns["split"][rows])
        yield _Rows(number, rows, is_train, columns["order"][rows]), columns[column][rows]


def _chosen(rows: _Rows, which: np.ndarray) -> _Rows:
    return _Rows(rows.path_index, rows.rows[which], rows.is_train[which], rows.order[which])


def _columns(parts: list[_Rows]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.concatenate([part.is_train for part in parts]),
        np.concatenate([part.order for part in parts]),
        np.concatenate([part.place for part in parts]),
    )


def _signatures(build: OpenJob, places: np.ndarray) -> np.ndarray:
    """uint32 [places, bins] of documents by place, sorted."""
    found = np.empty((len(places), DEFAULT_BINS), dtype=np.uint32)
    runs = places >> 32
    for run in np.unique(runs).tolist():
        mine = runs == run
        columns = read_columns(build.work.path / build.runs[run][0], ["signature"])
        found[mine] = columns["signature"][places[mine] & 0xFFFFFFFF]
    return found


def _save(build: OpenJob, name: str, dropped: np.ndarray, place: np.ndarray, order: np.ndarray) -> dict[str, Any]:
    """Leave what is dropped, by order, for the shards to look up."""
    places, first = np.unique(place, return_index=True)
    orders = order[first][np.searchsorted(places, dropped)]
    by_order = np.argsort(orders, kind="stable")
    write_columns(build.work.path / f"{name}.safetensors", {"order": orders[by_order], "place": dropped[by_order]})
    return build.save(f"{name}.json", {"dropped": len(dropped)})
