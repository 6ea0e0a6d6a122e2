"""Which documents of a whole corpus are dropped as duplicates: decisions over columns of one partition at a time.

Knows arrays, no texts and no files. All rows that can concern each other have the same key, and a key has one partition
(`partition_of`); so partitions can be decided one after the other, in any order, on any machine, each within the memory
that `partition_count` was told. Rows may come in any order too.

Everywhere the same document comes first: validation documents before training ones, so that none is trained on that is
also validated on, then by the order of the corpus, then by place, a number that no other document has.
"""

import math

import numpy as np

from data_tools.stages.near import similarity

DEFAULT_THRESHOLD = 0.8
# Documents of a group that later ones are compared with. It bounds the work for boilerplate that millions share.
MAX_REPRESENTATIVES = 8

# Bytes in memory for each row of a partition while it is decided: the columns handed in (33 and 41), and the sort.
EXACT_ROW_BYTES = 100
# Without the signatures, which may lie in a memory-mapped file and are read where two documents meet. A document has as
# many rows as there are bands.
NEAR_ROW_BYTES = 130

# Keyed partitions are not all of one size; nor does a process own all of its memory.
_SLACK = 1.25
_MAX_PARTITIONS = 1 << 20
_HALF = np.uint64(32)
# Comparisons that are made at once.
_ROWS_AT_ONCE = 1 << 14


def partition_count(num_documents: int, bytes_per_document: int, memory_bytes: int) -> int:
    """How many partitions let each be decided within `memory_bytes`.

    A row counts as a document here. A key that very many rows share cannot be parted: its group lies in one partition,
    whatever the number.
    """
    if memory_bytes < 1:
        raise ValueError(f"memory_bytes is {memory_bytes}; it must be at least 1")
    needed = math.ceil(num_documents * bytes_per_document * _SLACK / memory_bytes)
    return min(max(1, needed), _MAX_PARTITIONS)


def partition_of(keys: np.ndarray, partitions: int) -> np.ndarray:
    """The partition of each key: int64, the shape of `keys`. Keys are uint64 that look random, as hashes do."""
    return ((keys >> _HALF) * np.uint64(partitions) >> _HALF).astype(np.int64)


def exact_duplicates(digests: np.ndarray, is_train: np.ndarray, order: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Places of the documents to drop, sorted: of those with one digest, all but the first.

    digests: uint64 [n, 2], whose first column gives the partition. is_train: bool [n]. order: uint64 [n].
    place: int64 [n], all different. A partition may also be decided in batches: the union of what each batch drops,
    and of what the survivors of all drop, is the same set.
    """
    # Few rows have a twin; only these are worth a sort by five columns.
    rows = _rows_with_twins(digests[:, 0])
    rows = rows[np.lexsort((place[rows], order[rows], is_train[rows], digests[rows, 1], digests[rows, 0]))]
    twins = (digests[rows[1:]] == digests[rows[:-1]]).all(axis=1)
    return np.sort(place[rows[1:][twins]])


def near_duplicates(
    keys: np.ndarray,
    is_train: np.ndarray,
    order: np.ndarray,
    place: np.ndarray,
    signatures: np.ndarray,
    signature_of: np.ndarray | None = None,
    threshold: float = DEFAULT_THRESHOLD,
) -> np.ndarray:
    """Places of the documents to drop, sorted and each once, by the groups of equal band key in one partition.

    Each group is walked from its first document. A document is dropped where its similarity to one of the group's
    representatives reaches `threshold`; a document that is not becomes a representative, while there are fewer than
    MAX_REPRESENTATIVES. A group knows nothing of others: a document may be dropped for the likeness to one that another
    group drops. So of a chain of edited copies fewer may stay than the most that differ, but the first document of all
    that hang together always stays, and the result depends on nothing but the documents.

    keys: uint64 [n], of all bands together. is_train: bool [n], order: uint64 [n], place: int64 [n], the same for all
    rows of a document. signatures: [n, bins], or [m, bins] with `signature_of`, int [n], the signature of each row;
    then they may be a memory-mapped file of all documents, of which few are read. Beside the rows 20 MB are needed.
    """
    rows = _rows_with_twins(keys)
    rows = rows[np.lexsort((place[rows], order[rows], is_train[rows], keys[rows]))]
    group_keys = keys[rows]
    dropped: list[np.ndarray] = []
    for _ in range(MAX_REPRESENTATIVES):
        # All groups take their next step at once: the first row left in each is its next representative.
        is_first = np.ones(len(rows), dtype=bool)
        is_first[1:] = group_keys[1:] != group_keys[:-1]
        firsts = np.flatnonzero(is_first)
        if len(firsts) == len(rows):
            break
        representative = np.repeat(rows[firsts], np.diff(firsts, append=len(rows)))
        compared = ~is_first
        rows, group_keys, representative = rows[compared], group_keys[compared], representative[compared]
        is_near = _are_near(rows, representative, signatures, signature_of, threshold)
        # Where two bands of one document collide, it meets itself.
        is_near &= place[rows] != place[representative]
        dropped.append(place[rows[is_near]])
        rows, group_keys = rows[~is_near], group_keys[~is_near]
    return np.unique(np.concatenate(dropped)) if dropped else np.zeros(0, dtype=np.int64)


def _rows_with_twins(keys: np.ndarray) -> np.ndarray:
    """Rows whose key another row has too, in no order that means anything."""
    by_key = np.argsort(keys)
    ordered = keys[by_key]
    equals_next = ordered[1:] == ordered[:-1]
    has_twin = np.zeros(len(keys), dtype=bool)
    has_twin[1:] = equals_next
    has_twin[:-1] |= equals_next
    return by_key[has_twin]


def _are_near(
    left: np.ndarray, right: np.ndarray, signatures: np.ndarray, signature_of: np.ndarray | None, threshold: float
) -> np.ndarray:
    """Which pairs of rows reach the threshold: bool [pairs]."""
    if signature_of is not None:
        left, right = signature_of[left], signature_of[right]
    is_near = np.zeros(len(left), dtype=bool)
    for start in range(0, len(left), _ROWS_AT_ONCE):
        chosen = slice(start, start + _ROWS_AT_ONCE)
        is_near[chosen] = similarity(signatures[left[chosen]], signatures[right[chosen]]) >= threshold
    return is_near
