"""Which documents go as duplicates: against a slow walk, whatever the order, the batches and the partitions."""

import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.stages.duplicates import (
    MAX_REPRESENTATIVES,
    exact_duplicates,
    near_duplicates,
    partition_count,
    partition_of,
)
from data_tools.stages.near import DEFAULT_BANDS, band_keys, signature, similarity

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def columns(rng: np.random.Generator, count: int) -> Columns:
    """is_train, order with some ties, place."""
    order = rng.integers(0, max(1, count // 2), count).astype(np.uint64)
    return rng.random(count) < 0.7, order, rng.permutation(count).astype(np.int64)


def slow_exact(digests: np.ndarray, is_train: np.ndarray, order: np.ndarray, place: np.ndarray) -> list[int]:
    groups = defaultdict(list)
    for row in range(len(place)):
        groups[tuple(digests[row].tolist())].append((bool(is_train[row]), int(order[row]), int(place[row])))
    return sorted(rank[2] for group in groups.values() for rank in sorted(group)[1:])


def slow_near(
    keys: np.ndarray,
    is_train: np.ndarray,
    order: np.ndarray,
    place: np.ndarray,
    signatures: np.ndarray,
    threshold: float,
) -> list[int]:
    groups = defaultdict(list)
    for row in range(len(place)):
        groups[int(keys[row])].append((bool(is_train[row]), int(order[row]), int(place[row]), row))
    dropped = set()
    for group in groups.values():
        representatives: list[int] = []
        for *_, row in sorted(group):
            if any(similarity(signatures[row], signatures[other]) >= threshold for other in representatives):
                dropped.add(int(place[row]))
            elif len(representatives) < MAX_REPRESENTATIVES:
                representatives.append(row)
    return sorted(dropped)


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 30))
@settings(deadline=None, max_examples=200)
def test_exact_duplicates_whatever_the_order_and_the_partitions(seed: int, count: int, different: int) -> None:
    rng = np.random.default_rng(seed)
    # Some digests agree in their first half only.
    kinds = rng.integers(0, 2**64, (different, 2), dtype=np.uint64)
    kinds[:, 0] = kinds[rng.integers(0, different, different), 0]
    all_columns = (kinds[rng.integers(0, different, count)], *columns(rng, count))
    expected = slow_exact(*all_columns)
    assert exact_duplicates(*all_columns).tolist() == expected
    shuffle = rng.permutation(count)
    assert exact_duplicates(*(column[shuffle] for column in all_columns)).tolist() == expected
    partition = partition_of(all_columns[0][:, 0], 5)
    parts = [exact_duplicates(*(column[partition == part] for column in all_columns)) for part in range(5)]
    assert sorted(np.concatenate(parts).tolist()) == expected
    # In batches: first each alone, then what they leave.
    dropped = np.concatenate([exact_duplicates(*(column[part::3] for column in all_columns)) for part in range(3)])
    left = ~np.isin(all_columns[3], dropped)
    last = exact_duplicates(*(column[left] for column in all_columns))
    assert sorted([*dropped.tolist(), *last.tolist()]) == expected


def test_a_validation_document_stays_before_a_training_one() -> None:
    digests = np.ones((3, 2), dtype=np.uint64)
    is_train, order, place = np.array([True, False, False]), np.array([0, 2, 1], dtype=np.uint64), np.array([5, 6, 7])
    assert exact_duplicates(digests, is_train, order, place).tolist() == [5, 6]
    signatures = np.ones((3, 128), dtype=np.uint32)
    assert near_duplicates(digests[:, 0], is_train, order, place, signatures).tolist() == [5, 6]


@given(
    st.integers(0, 2**32),
    st.integers(0, 80),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.25, 0.5, 0.8, 1.0]),
)
@settings(deadline=None, max_examples=200)
def test_near_duplicates_whatever_the_order_and_the_partitions(
    seed: int, count: int, different: int, letters: int, threshold: float
) -> None:
    rng = np.random.default_rng(seed)
    is_train, order, place = columns(rng, count)
    signatures = rng.integers(0, letters + 1, (count, 8)).astype(np.uint32)
    # Two rows for each document, as of two bands.
    document = np.tile(np.arange(count), 2)
    keys = rng.integers(0, 2**64, different, dtype=np.uint64)[rng.integers(0, different, 2 * count)]
    rows = (keys, is_train[document], order[document], place[document], signatures[document])
    # A document does not meet itself.
    _, first = np.unique(np.stack([keys, document.astype(np.uint64)], axis=1), axis=0, return_index=True)
    expected = slow_near(*(column[first] for column in rows), threshold)
    chosen = rng.permutation(first)
    assert near_duplicates(*(column[chosen] for column in rows), threshold=threshold).tolist() == expected
    narrow = (keys[chosen], *(column[document[chosen]] for column in (is_train, order, place)))
    assert near_duplicates(*narrow, signatures, document[chosen], threshold).tolist() == expected
    partition = partition_of(keys[chosen], 3)
    parts: set[int] = set()
    for part in range(3):
        mine = chosen[partition == part]
        parts |= set(near_duplicates(*(column[mine] for column in rows), threshold=threshold).tolist())
    assert sorted(parts) == expected


def test_a_document_is_not_dropped_for_its_own_sake() -> None:
    twice = np.zeros(2, dtype=np.uint64), np.ones(2, dtype=bool), np.zeros(2, dtype=np.uint64), np.array([3, 3])
    assert near_duplicates(*twice, np.ones((2, 128), dtype=np.uint32)).tolist() == []


def rows_of(documents: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """What a partition holds when there is one: documents come in the order of the list."""
    signatures = np.stack([signature(document) for document in documents])
    document = np.repeat(np.arange(len(documents)), DEFAULT_BANDS)
    keys = band_keys(signatures).reshape(-1)
    return keys, np.ones(len(keys), dtype=bool), document.astype(np.uint64), document, signatures, document


@pytest.mark.parametrize(("share", "found"), [(0.01, 1.0), (0.05, 0.0), (0.3, 0.0)])
def test_edited_copies(share: float, found: float) -> None:
    # 1 % of the words changed leave a similarity of 0.91, 5 % 0.63, 30 % 0.09.
    rng = np.random.default_rng(3)
    documents = []
    for _ in range(200):
        original = rng.integers(0, 2**64, 2000, dtype=np.uint64)
        copy = original.copy()
        changed = rng.permutation(2000)[: int(share * 2000)]
        copy[changed] = rng.integers(0, 2**64, len(changed), dtype=np.uint64)
        documents += [original, copy]
    dropped = near_duplicates(*rows_of(documents))
    assert (dropped % 2 == 1).all()
    assert abs(len(dropped) / 200 - found) <= 0.01


def test_the_first_of_a_chain_stays() -> None:
    # Each document is near its neighbours in the chain, and far from those further on.
    rng = np.random.default_rng(4)
    document = rng.integers(0, 2**64, 1000, dtype=np.uint64)
    chain = [document]
    for link in range(1, 30):
        document = document.copy()
        document[link * 10 : link * 10 + 100] = rng.integers(0, 2**64, 100, dtype=np.uint64)
        chain.append(document)
    rows = rows_of(chain)
    dropped = near_duplicates(*rows).tolist()
    assert 0 not in dropped
    assert len(dropped) >= 5
    for _ in range(5):
        shuffle = rng.permutation(len(rows[0]))
        assert near_duplicates(*(column[shuffle] for column in rows[:4]), rows[4], rows[5][shuffle]).tolist() == dropped


def test_large_groups_are_fast() -> None:
    rng = np.random.default_rng(6)
    same = rng.integers(0, 2**64, 500, dtype=np.uint64)
    keys, is_train, order, place, signatures, document = rows_of([same] * 10_000)
    started = time.perf_counter()
    assert np.array_equal(near_duplicates(keys, is_train, order, place, signatures, document), np.arange(1, 10_000))
    digests = np.ones((10_000, 2), dtype=np.uint64)
    alone = slice(None, None, DEFAULT_BANDS)
    dropped = exact_duplicates(digests, is_train[alone], order[alone], place[alone])
    assert np.array_equal(dropped, np.arange(1, 10_000))
    # One group of 10,000 that all differ costs 8 comparisons each, not 10,000.
    unlike = rng.integers(0, 2**32, (10_000, 128), dtype=np.uint32)
    assert not len(near_duplicates(digests[:, 0], is_train[alone], order[alone], place[alone], unlike))
    assert time.perf_counter() - started < 5


@given(st.integers(0, 10**12), st.integers(1, 1000), st.integers(1, 10**12))
def test_partitions_fit_in_memory(num_documents: int, bytes_per_document: int, memory_bytes: int) -> None:
    partitions = partition_count(num_documents, bytes_per_document, memory_bytes)
    assert 1 <= partitions <= 1 << 20
    if 1 < partitions < 1 << 20:
        assert num_documents * bytes_per_document / partitions < memory_bytes
        assert num_documents * bytes_per_document * 2 / partitions > memory_bytes / 2


@given(st.integers(1, 1 << 20), st.integers(0, 2**32))
def test_partitions_are_even(partitions: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**64, 1000, dtype=np.uint64)
    found = partition_of(np.concatenate([keys, np.array([0, 2**64 - 1], dtype=np.uint64)]), partitions)
    assert found[-2] == 0
    assert found[-1] == partitions - 1
    assert abs(found.mean() - (partitions - 1) / 2) < 0.06 * partitions
