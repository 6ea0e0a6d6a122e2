"""The last words of `gptdist data build`: what was read, kept and dropped, how fast, and where to read more.

Knows only what it is given; a pure function of it.
"""

from dataclasses import dataclass

from data_tools.reporting.statistics import BuildStatistics, Counts
from gptdist.monitor.console import render_count, render_duration
from launch.corpora.build_progress import render_decimal_bytes

MOST_REASONS = 5


@dataclass(frozen=True)
class BuildOutcome:
    """A build that is done. `fresh_text_bytes` and `fresh_tokens` are this run's own, for its rates."""

    corpus: str
    tokenizer: str
    """Which one, and which implementation ran: `tokenizer.json, 50,257 ids, by gigatoken`."""
    statistics: BuildStatistics
    seconds: float
    fresh_text_bytes: int
    fresh_tokens: int
    report: str
    """Where the report for people is."""
    workers: int = 1


def render_summary(outcome: BuildOutcome) -> str:
    """At most 15 lines for two splits, aligned."""
    statistics = outcome.statistics
    read, dropped = statistics.documents_read, statistics.dropped_in_all()
    lines = [
        f"corpus     {outcome.corpus}",
        f"tokenizer  {outcome.tokenizer}",
        f"read       {read:,} documents, {render_decimal_bytes(statistics.bytes_read)} of text",
        f"dropped    {dropped.documents:,} documents{_share(dropped.documents, read)}",
        *_render_reasons(statistics),
        *(_render_split(name, counts) for name, counts in sorted(statistics.kept.items())),
        f"took       {_render_speed(outcome)}",
        f"report     {outcome.report}",
    ]
    return "\n".join(lines) + "\n"


def _render_reasons(statistics: BuildStatistics) -> list[str]:
    rows = sorted(statistics.dropped.items(), key=lambda row: (-row[1].documents, row[0]))
    if len(rows) > MOST_REASONS:
        rest = Counts()
        for _, counts in rows[MOST_REASONS - 1 :]:
            rest.add(counts.documents, counts.text_bytes)
        rows[MOST_REASONS - 1 :] = [(f"{len(rows) - MOST_REASONS + 1} other reasons", rest)]
    name_width = max((len(reason) for reason, _ in rows), default=0)
    count_width = max((len(f"{counts.documents:,}") for _, counts in rows), default=0)
    return [
        f"           {reason:<{name_width}}  {counts.documents:>{count_width},}"
        f"{_share(counts.documents, statistics.documents_read)}, {render_decimal_bytes(counts.text_bytes)}"
        for reason, counts in rows
    ]


def _render_split(name: str, counts: Counts) -> str:
    per_token = f", {counts.text_bytes / counts.tokens:.3f} bytes per token" if counts.tokens else ""
    return f"{name:<10} {counts.tokens:,} tokens, {counts.documents:,} documents{per_token}"


def _render_speed(outcome: BuildOutcome) -> str:
    parts = [render_duration(outcome.seconds)]
    if outcome.seconds > 0 and outcome.fresh_text_bytes:
        parts.append(f"{render_decimal_bytes(outcome.fresh_text_bytes / outcome.seconds)}/s")
        parts.append(f"{render_count(outcome.fresh_tokens / outcome.seconds)} tokens/s")
    if outcome.workers > 1:
        parts.append(f"{outcome.workers:,} workers")
    return ", ".join(parts)


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.2f} %)" if whole and part else ""
