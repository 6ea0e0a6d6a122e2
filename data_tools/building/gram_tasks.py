"""The stage that finds which word sequences of the evaluation files are too common to mean contamination.

What a sequence is and how a text is cut is in `contamination.py`; here are its files in the work folder.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_tools.building.job import GRAMS_FILE, Job, OpenJob, open_job
from data_tools.building.runs import read_columns, write_columns
from data_tools.sources.documents import Document
from data_tools.sources.formats import read_piece
from data_tools.sources.pieces import cut_pieces
from data_tools.stages.contamination import COMMON_DOCUMENTS, EvaluationGrams
from data_tools.stages.words import hash_words


def collect_grams(build: OpenJob) -> dict[str, Any]:
    """Read the evaluation files and leave the hashes of their word sequences."""

    def texts() -> Iterator[str]:
        for piece in cut_pieces(build.plan.evaluation, build.plan.piece_bytes):
            for _, document in read_piece(piece, build.reading):
                if isinstance(document, Document):
                    yield document.text

    grams = EvaluationGrams.of_texts(texts())
    columns = {
        "hashes": grams.grams,
        "sizes": np.array(grams.sizes, dtype=np.int64),
        "prefix_filter": grams.prefix_filter,
    }
    write_columns(build.work.path / GRAMS_FILE, columns)
    return {"grams": len(grams.grams)}


def count_grams(job: Job, index: int) -> dict[str, Any]:
    """In how many documents of piece `index` each sequence stands."""
    build = open_job(job)
    grams = build.all_grams
    counts = grams.new_counts()
    documents = 0
    for _, document in read_piece(build.pieces[index], build.reading):
        if isinstance(document, Document):
            documents += 1
            hits = grams.hits(hash_words(document.text).hashes)
            if len(hits.gram):
                grams.count_documents(hits, counts)
    rows = np.flatnonzero(counts)
    write_columns(build.work.path / f"grams-{index:06d}.safetensors", {"rows": rows, "counts": counts[rows]})
    return build.save(f"grams-{index:06d}.json", {"documents": documents})


def find_common(build: OpenJob) -> dict[str, Any]:
    """Add the counts of all pieces up, and leave which sequences stand in more than `COMMON_DOCUMENTS` documents."""
    counts = np.zeros(len(build.all_grams.grams), dtype=np.int64)
    for index in range(build.plan.held_out_from):
        part = read_columns(build.work.path / f"grams-{index:06d}.safetensors", ["rows", "counts"])
        counts[part["rows"]] += part["counts"]
    return {"rows": np.flatnonzero(counts > COMMON_DOCUMENTS).tolist()}
