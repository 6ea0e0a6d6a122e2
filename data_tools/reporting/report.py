"""The report of a corpus build: `report.json` for programs and `report.html` for people.

Both are parts of a corpus that is the same byte for byte whoever builds it, so they say nothing of times, machines,
paths or versions. Knows what is said and in which order; `page.py` knows how it looks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from data_tools.reporting import page
from data_tools.reporting.page import (
    Bar,
    Cell,
    Column,
    Series,
    escape,
    render_number,
    render_percent,
    render_ratio,
    render_short,
)
from data_tools.reporting.statistics import KEPT, BuildStatistics, Counts, LengthHistogram, Sample
from gptdist.data.manifest import Manifest, SplitInfo, TokenizerInfo

FORMAT = "gptdist-corpus-report"
VERSION = 1
JSON_SOURCES = 1000
PAGE_SOURCES = 50

DROP_ORDER = (
    "not readable",
    "empty",
    "too short",
    "too long",
    "contaminated",
    "exact duplicate",
    "near duplicate",
    "over the size limit",
)
"""Reasons in the order of the stages that drop for them; any other comes after these, by its name."""


@dataclass(frozen=True)
class SplitReport:
    """Totals of a split. `tokens` counts one end of text per document; `text_bytes` is UTF-8, without them."""

    documents: int
    text_bytes: int
    tokens: int
    chunks: int
    shards: int
    shard_bytes: int

    @staticmethod
    def of(split: SplitInfo) -> "SplitReport":
        """From the split's entry in the manifest."""
        return SplitReport(
            documents=split.documents,
            text_bytes=split.text_bytes,
            tokens=split.tokens,
            chunks=split.chunks,
            shards=len(split.shards),
            shard_bytes=sum(shard.bytes for shard in split.shards),
        )


@dataclass(frozen=True)
class CorpusReport:
    """All that a report says."""

    corpus: str
    """The corpus's name: the last part of its folder's path, never the path."""
    tokenizer: TokenizerInfo
    dtype: str
    """Of the tokens: uint16 or uint32."""
    splits: Mapping[str, SplitReport]
    """By name, in the order in which they are shown."""
    options: Mapping[str, object]
    """What the corpus was asked to be, as JSON values: nothing that may differ between identical builds, such as the
    number of workers, an absolute path, or which of two equal tokenizers ran."""
    statistics: BuildStatistics
    """Of the whole build. Its source names are shown: let them be relative."""

    @staticmethod
    def of(
        corpus: str, manifest: Manifest, options: Mapping[str, object], statistics: BuildStatistics
    ) -> "CorpusReport":
        """The report of the corpus that `manifest` describes."""
        splits = {name: SplitReport.of(split) for name, split in manifest.splits.items()}
        return CorpusReport(corpus, manifest.tokenizer, manifest.dtype, splits, options, statistics)

    def totals(self) -> Counts:
        """Of all splits."""
        total = Counts()
        for split in self.splits.values():
            total.add(split.documents, split.text_bytes, split.tokens)
        return total


def render_report(report: CorpusReport) -> bytes:
    """The bytes of `report.json`. Sources beyond the largest 1,000 are one sum, `other_sources`."""
    total = report.totals()
    shown, others = _largest_sources(report.statistics, JSON_SOURCES)
    statistics = report.statistics.to_dict()
    statistics["sources"] = {name: _source_fields(report.statistics, name) for name in shown}
    statistics["other_sources"] = {"sources": len(others), **_source_sum(report.statistics, others)}
    del statistics["source_drops"]
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "corpus": report.corpus,
        "tokenizer": asdict(report.tokenizer),
        "dtype": report.dtype,
        "totals": {**asdict(total), "bytes_per_token": round(total.text_bytes / max(1, total.tokens), 6)},
        "splits": {name: asdict(split) for name, split in report.splits.items()},
        "options": dict(report.options),
        "statistics": statistics,
    }
    return (json.dumps(fields, indent=1, allow_nan=False) + "\n").encode()


def render_html(report: CorpusReport) -> bytes:
    """The bytes of `report.html`: one page that needs nothing else."""
    sections = [
        _render_header(report),
        _render_splits(report),
        _render_funnel(report.statistics),
        _render_lengths(report.statistics),
        _render_sources(report.statistics),
        _render_samples(report.statistics),
        _render_options(report),
    ]
    return page.render_page(f"{report.corpus}: corpus report", "\n".join(sections)).encode()


def _render_header(report: CorpusReport) -> str:
    total, read = report.totals(), report.statistics.documents_read
    tokenizer = report.tokenizer
    shards = sum(split.shards for split in report.splits.values())
    shard_bytes = sum(split.shard_bytes for split in report.splits.values())
    tiles = [
        ("Tokens", render_short(total.tokens), render_number(total.tokens)),
        ("Documents", render_short(total.documents), render_number(total.documents)),
        ("Text", render_short(total.text_bytes, "B"), f"{render_number(total.text_bytes)} bytes"),
        ("Bytes per token", render_ratio(total.text_bytes, total.tokens), "fertility, end of text included"),
        ("Tokenizer", tokenizer.kind, f"{tokenizer.vocab_size:,} ids, end of text {tokenizer.end_of_text:,}"),
        ("Shards", render_number(shards), f"{render_short(shard_bytes, 'B')} of {report.dtype}"),
    ]
    cells = "\n".join(
        f'<div><dt>{title}</dt><dd class="big">{escape(big)}</dd><dd>{escape(small)}</dd></div>'
        for title, big, small in tiles
    )
    sentence = f"{total.documents:,} of {read:,} documents kept ({render_percent(total.documents, read)})"
    return (
        f"<header><p>Corpus report</p><h1><bdi>{escape(report.corpus)}</bdi></h1><p>{escape(sentence)}</p></header>\n"
        f'<dl class="tiles">\n{cells}\n</dl>'
    )


def _render_splits(report: CorpusReport) -> str:
    total = report.totals()
    columns = [
        Column("Split"),
        *_numbers("Documents", "Text*", "Tokens", "Bytes per token*", "Chunks*", "Shards*", "Share"),
    ]
    rows: list[list[Cell]] = [
        [
            name,
            render_number(split.documents),
            render_short(split.text_bytes, "B"),
            render_number(split.tokens),
            render_ratio(split.text_bytes, split.tokens),
            render_number(split.chunks),
            render_number(split.shards),
            render_percent(split.tokens, total.tokens),
        ]
        for name, split in report.splits.items()
    ]
    return f"<h2>Splits</h2>\n<p>Shares are of the tokens.</p>\n{page.render_table(columns, rows)}"


def _render_funnel(statistics: BuildStatistics) -> str:
    left, read = statistics.documents_read, statistics.documents_read
    columns = [
        Column("Step"),
        *_numbers("Dropped", "Of read", "Text dropped*", "Documents left*", "Left"),
        Column("", "bar"),
    ]
    rows: list[list[Cell]] = [
        ["read", "", "", "", render_number(read), render_percent(read, read), Bar(float(bool(read)))]
    ]
    for reason in _reasons(statistics.dropped):
        drop = statistics.dropped[reason]
        left -= drop.documents
        rows.append(_funnel_row(reason, drop.documents, render_short(drop.text_bytes, "B"), left, read))
    kept = statistics.kept_in_all().documents
    if left != kept:
        rows.append(_funnel_row("not accounted for", left - kept, "", kept, read))
    rows.append([KEPT, "", "", "", render_number(kept), render_percent(kept, read), Bar(kept / max(1, read))])
    words = (
        f"{render_short(statistics.bytes_read, 'B')} of text was read; {_plural(len(statistics.dropped), 'reason')} "
    )
    return (
        f"<h2>From read to kept</h2>\n<p>{words}took documents away, in this order.</p>\n"
        f"{page.render_table(columns, rows, last_is_total=True)}"
    )


def _funnel_row(step: str, documents: int, text: str, left: int, read: int) -> list[Cell]:
    counts = [render_number(documents), render_percent(documents, read), text]
    bar = Bar(max(0, left) / max(1, read), max(0, documents) / max(1, read))
    return [step, *counts, render_number(left), render_percent(left, read), bar]


def _render_lengths(statistics: BuildStatistics) -> str:
    tokens, text = statistics.token_lengths, statistics.byte_lengths
    count = sum(tokens.documents)
    if not count:
        return "<h2>Document length</h2>\n<p>No document was kept.</p>"
    mean = f"{sum(tokens.totals) / count:,.1f} tokens and {sum(text.totals) / count:,.1f} bytes"
    words = f"A document has {mean} on average; at least half of them have {_median_limit(tokens)} tokens or fewer."
    return (
        f"<h2>Document length</h2>\n<p>{escape(words)}</p>\n"
        + _render_length_histogram("Length in tokens", "tokens", tokens)
        + "\n"
        + _render_length_histogram("Length in bytes of text", "bytes", text)
    )


def _render_length_histogram(title: str, unit: str, histogram: LengthHistogram) -> str:
    used = [index for index, count in enumerate(histogram.documents) if count]
    bins = range(used[0], used[-1] + 1)
    ranges = [_bin_range(index) for index in bins]
    series = [
        Series("share of the documents", "documents", [histogram.documents[index] for index in bins]),
        Series(f"share of the {unit}", unit, [histogram.totals[index] for index in bins]),
    ]
    labels = [_bin_label(index) for index in bins]
    columns = [Column(f"Length in {unit}"), *_numbers("Documents", "Share", f"{unit.capitalize()}*", "Share")]
    totals = [sum(one.values) for one in series]
    rows: list[list[Cell]] = []
    for index, length in zip(bins, ranges, strict=True):
        counts = (histogram.documents[index], histogram.totals[index])
        cells = [cell for n, total in zip(counts, totals, strict=True) for cell in (f"{n:,}", render_percent(n, total))]
        rows.append([length, *cells])
    chart = page.render_histogram(title, labels, [f"{length} {unit}" for length in ranges], series)
    return f"{chart}\n<details><summary>Numbers</summary>{page.render_table(columns, rows)}</details>"


def _render_sources(statistics: BuildStatistics) -> str:
    shown, others = _largest_sources(statistics, PAGE_SOURCES)
    fields = [(name, _source_fields(statistics, name)) for name in shown]
    largest = max((source["tokens"] for _, source in fields), default=0)
    if others:
        fields.append((f"{len(others):,} other sources", _source_sum(statistics, others)))
    total = statistics.kept_in_all().tokens
    columns = [
        Column("Source"),
        *_numbers("Documents*", "Dropped*", "Text*", "Tokens", "Bytes per token*", "Share"),
        Column("", "bar"),
    ]
    rows: list[list[Cell]] = [
        [
            name,
            render_number(source["documents"]),
            render_number(source["dropped_documents"]),
            render_short(source["text_bytes"], "B"),
            render_number(source["tokens"]),
            render_ratio(source["text_bytes"], source["tokens"]),
            render_percent(source["tokens"], total),
            Bar(min(1, source["tokens"] / max(1, largest))),
        ]
        for name, source in fields
    ]
    words = f"{_plural(len(shown) + len(others), 'source')}, the largest first. "
    words += "Shares are of the tokens; bars compare with the largest source."
    return f"<h2>Sources</h2>\n<p>{words}</p>\n{page.render_table(columns, rows)}"


def _render_samples(statistics: BuildStatistics) -> str:
    parts = [
        "<h2>Samples</h2>",
        "<p>The beginning of a few documents of each kind, drawn by a hash of the document.</p>",
    ]
    counts = {KEPT: statistics.kept_in_all(), **statistics.dropped}
    for sample_class in sorted(statistics.samples, key=lambda name: (name != KEPT, *_reason_rank(name))):
        samples = statistics.samples[sample_class]
        documents = counts.get(sample_class, Counts()).documents
        what = "Kept" if sample_class == KEPT else f"Dropped: {sample_class}"
        parts.append(f"<h3>{escape(what)} <small>{len(samples):,} of {documents:,}</small></h3>")
        parts.extend(_render_sample(sample) for sample in samples)
    return "\n".join(parts)


def _render_sample(sample: Sample) -> str:
    # A new line right after <pre> is not part of the text in HTML, so that one that is must come second.
    return f'<article><h4><bdi>{escape(sample.key)}</bdi></h4><pre dir="auto">\n{escape(sample.text)}</pre></article>'


def _render_options(report: CorpusReport) -> str:
    tokenizer = {f"tokenizer {name}": value for name, value in asdict(report.tokenizer).items()}
    rows: list[list[Cell]] = [
        [name.replace("_", " "), _option(value)] for name, value in {**report.options, **tokenizer}.items()
    ]
    columns = [Column("Option"), Column("Value", "value")]
    return f"<h2>Build options</h2>\n<p>What this corpus was asked to be.</p>\n{page.render_table(columns, rows)}"


def _option(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _numbers(*titles: str) -> list[Column]:
    """Columns of numbers; a star marks a minor one."""
    return [Column(title.removesuffix("*"), "number", minor=title.endswith("*")) for title in titles]


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _reason_rank(reason: str) -> tuple[int, str]:
    return (DROP_ORDER.index(reason) if reason in DROP_ORDER else len(DROP_ORDER), reason)


def _reasons(dropped: Mapping[str, Counts]) -> list[str]:
    return sorted(dropped, key=_reason_rank)


def _bin_range(index: int) -> str:
    if index < 2:
        return str(index)
    return f"{1 << index - 1:,} to {(1 << index) - 1:,}"


def _bin_label(index: int) -> str:
    """Where the bin begins, as lengths of sequences are said: 4096 -> `4k`."""
    steps = max(0, index - 1) // 10
    return f"{(1 << index - 1) >> 10 * steps}{'kMGTPE'[steps - 1] if steps else ''}" if index else "0"


def _median_limit(histogram: LengthHistogram) -> str:
    """The upper end of the bin that the median is in."""
    half, seen = (sum(histogram.documents) + 1) // 2, 0
    for index, count in enumerate(histogram.documents):
        seen += count
        if seen >= half:
            return f"{(1 << index) - 1:,}"
    return "0"


def _largest_sources(statistics: BuildStatistics, most: int) -> tuple[list[str], list[str]]:
    """Names of the `most` largest sources by tokens kept, and of all others."""
    names = {*statistics.sources, *statistics.source_drops}

    def size(name: str) -> tuple[int, int, str]:
        kept, lost = statistics.sources.get(name, Counts()), statistics.source_drops.get(name, Counts())
        return (-kept.tokens, -lost.documents, name)

    ordered = sorted(names, key=size)
    return ordered[:most], ordered[most:]


def _source_fields(statistics: BuildStatistics, name: str) -> dict[str, int]:
    kept, lost = statistics.sources.get(name, Counts()), statistics.source_drops.get(name, Counts())
    return {**asdict(kept), "dropped_documents": lost.documents, "dropped_bytes": lost.text_bytes}


def _source_sum(statistics: BuildStatistics, names: Sequence[str]) -> dict[str, int]:
    total = {**asdict(Counts()), "dropped_documents": 0, "dropped_bytes": 0}
    for name in names:
        for field, value in _source_fields(statistics, name).items():
            total[field] += value
    return total
