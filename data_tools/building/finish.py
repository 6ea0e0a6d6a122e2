"""The last stage of a build: index, manifest and report of the shards that are there, then the corpus gets its name.

Knows what is in a corpus folder besides shards. Memory: half a kilobyte for each chunk.
"""

import hashlib
from typing import Any

from data_tools.building.job import OpenJob
from data_tools.corpus.shards import CHUNK_COLUMNS
from data_tools.reporting.report import CorpusReport, render_html, render_report
from data_tools.reporting.statistics import BuildStatistics
from gptdist.data.chunk_index import ChunkRecord, render_index
from gptdist.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE,
    IndexInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    TokenizerInfo,
)
from gptdist.durable import write_durably
from gptdist.errors import CorpusError

REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"


def finish_corpus(build: OpenJob) -> tuple[Manifest, BuildStatistics]:
    """Write what describes the shards, and rename the folder; returns the manifest, and what was counted."""
    results = [build.load(f"shard-{index:06d}.json") for index in range(sum(build.decisions.shards.values()))]
    statistics = BuildStatistics()
    for index in range(len(build.pieces)):
        statistics += BuildStatistics.from_dict(build.load(f"read-{index:06d}.json")["statistics"])
    for result in results:
        statistics += BuildStatistics.from_dict(result["statistics"])
        for sample_class, sample_hash, key, ids in result["samples"]:
            if sample_hash <= statistics.sample_limit(sample_class):
                statistics.offer_sample(sample_class, sample_hash, key, build.tokenizer.decode(ids))
    for source, documents, text_bytes in build.decisions.over_limit:
        statistics.add_dropped("over the size limit", build.plan.sources[source], documents, text_bytes)
    splits = {split: _finish_split(build, split, results) for split in SPLITS}
    if not splits["train"].documents:
        dropped = ", ".join(f"{counts.documents:,} {reason}" for reason, counts in sorted(statistics.dropped.items()))
        raise CorpusError(
            f"No document is left to train on ({dropped}). Look at the sources, or at the options that drop documents."
        )
    tokenizer = build.tokenizer
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            tokenizer.kind, TOKENIZER_FILE, tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text
        ),
        dtype="uint16" if build.dtype.itemsize == 2 else "uint32",
        splits=splits,
        build={
            "plan": build.plan.identity(),
            "dropped": {reason: counts.documents for reason, counts in sorted(statistics.dropped.items())},
        },
    )
    name = hashlib.sha256(manifest.render()).hexdigest()[:12]
    report = CorpusReport.of(name, manifest, build.plan.identity()["options"], statistics)
    write_durably(build.work.corpus / REPORT_FILE, render_report(report))
    write_durably(build.work.corpus / REPORT_PAGE, render_html(report))
    write_durably(build.work.corpus / MANIFEST_FILE, manifest.render())
    build.work.finish()
    return manifest, statistics


def _finish_split(build: OpenJob, split: str, results: list[dict[str, Any]]) -> SplitInfo:
    written = [result for result in results if result["split"] == split and result["info"]]
    records = [
        ChunkRecord(shard=number, **dict(zip(CHUNK_COLUMNS, chunk, strict=True)))
        for number, result in enumerate(written)
        for chunk in result["chunks"]
    ]
    content = render_index(records)
    write_durably(build.work.corpus / f"{split}.index", content)
    shards = tuple(ShardInfo(**result["info"]) for result in written)
    return SplitInfo(
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(result["text_bytes"] for result in written),
        index=IndexInfo(f"{split}.index", len(content), hashlib.sha256(content).hexdigest()),
        shards=shards,
    )
