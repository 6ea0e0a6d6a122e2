"""The counts of a build, its report, and how it shows where it is: sums in any order, hostile text, broken streams."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.reporting import page
from data_tools.reporting.progress import NoProgress, Progress
from data_tools.reporting.report import PAGE_SOURCES, CorpusReport, SplitReport, render_html, render_report
from data_tools.reporting.statistics import SAMPLES_PER_CLASS, BuildStatistics, Counts, merge
from gptdist.data.manifest import TokenizerInfo
from launch.corpora.build_progress import BuildProgress
from launch.corpora.build_summary import BuildOutcome, render_summary

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</pre><script>alert(1)</script>&amp;\"'\x00\x07\x1b[2J\x7f\x85\u202eevil"
HOSTILE += "\u2066\u200b\ud800\ufffe\r\n\tعربي 👩\u200d🔬"

NAMES = st.sampled_from(["a.txt", "b/c.jsonl", "train", "ü"])
BATCHES = st.one_of(
    st.tuples(
        st.just("kept"),
        st.sampled_from(["train", "validation"]),
        NAMES,
        st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 40)), max_size=5),
    ),
    st.tuples(
        st.just("dropped"), st.sampled_from(["empty", "too short"]), NAMES, st.integers(0, 9), st.integers(0, 1 << 50)
    ),
    st.tuples(
        st.just("sample"), st.sampled_from(["kept", "empty"]), st.integers(0, (1 << 64) - 1), NAMES, st.text(max_size=9)
    ),
    st.tuples(st.just("read"), st.integers(0, 9), st.integers(0, 1 << 50)),
)


def build_statistics(batches: list[Any]) -> BuildStatistics:
    statistics = BuildStatistics()
    for kind, *values in batches:
        if kind == "kept":
            split, source, lengths = values
            text_bytes, tokens = (np.array([pair[side] for pair in lengths], dtype=np.int64) for side in (0, 1))
            statistics.add_kept(split, source, text_bytes, tokens)
        elif kind == "dropped":
            statistics.add_dropped(*values)
        elif kind == "sample":
            statistics.offer_sample(*values)
        else:
            statistics.add_read(*values)
    return statistics


@given(st.lists(st.tuples(BATCHES, st.integers(0, 2)), max_size=40), st.randoms())
@settings(max_examples=150, deadline=None)
def test_parts_add_up_in_any_order_and_grouping(batches: list[tuple[Any, int]], random: Any) -> None:
    whole = build_statistics([batch for batch, _ in batches])
    shuffled = random.sample(batches, len(batches))
    a, b, c = (build_statistics([batch for batch, part in shuffled if part == number]) for number in range(3))
    for total in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        assert total == whole
        assert json.dumps(total.to_dict()) == json.dumps(whole.to_dict())
    assert BuildStatistics.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    before = a.to_dict()
    a += BuildStatistics()
    assert a.to_dict() == before


@given(st.lists(st.integers(0, (1 << 53) - 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_lengths_fall_into_their_bins(lengths: list[int]) -> None:
    statistics = BuildStatistics()
    statistics.add_kept("train", "a", np.array(lengths), np.ones(len(lengths), dtype=np.uint32))
    histogram = statistics.byte_lengths
    for index in range(60):
        inside = [length for length in lengths if length.bit_length() == index]
        assert histogram.documents[index] == len(inside)
        if sum(lengths) < 1 << 53:
            assert histogram.totals[index] == sum(inside)


def test_documents_of_several_sources_count_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    ids, text_bytes, tokens = rng.integers(0, 5, 1000), rng.integers(0, 9999, 1000), rng.integers(1, 999, 1000)
    names = [f"s{number}" for number in range(9)]
    together, alone = BuildStatistics(), BuildStatistics()
    together.add_kept_mixed("train", names, ids, text_bytes, tokens)
    for number, name in enumerate(names):
        alone.add_kept("train", name, text_bytes[ids == number], tokens[ids == number])
    assert together == alone
    assert together.kept == {"train": Counts(1000, int(text_bytes.sum()), int(tokens.sum()))}
    assert sorted(together.sources) == names[:5]
    with pytest.raises(ValueError, match="3 sources, 2 byte lengths and 3 token lengths"):
        alone.add_kept_mixed("train", names, ids[:3], tokens[:2], tokens[:3])


def test_the_smallest_hashes_are_the_samples() -> None:
    statistics = BuildStatistics()
    hashes = [int(value) for value in np.random.default_rng(1).integers(0, 1 << 64, 500, dtype=np.uint64)]
    for value in hashes:
        if value <= statistics.sample_limit("kept"):
            statistics.offer_sample("kept", value, f"key {value}", "x" * 1000)
    kept = statistics.samples["kept"]
    assert [sample.hash for sample in kept] == sorted(hashes)[:SAMPLES_PER_CLASS]
    assert kept[0].key == f"key {min(hashes)}"
    assert kept[0].text == "x" * 300 + "…"
    assert statistics.sample_limit("kept") == kept[-1].hash
    assert statistics.sample_limit("empty") == (1 << 64) - 1


@pytest.mark.parametrize("raw", [None, [], {}, {"documents_read": -1}, {"documents_read": True}, {"kept": 3}])
def test_other_json_is_not_taken_for_statistics(raw: object) -> None:
    with pytest.raises(ValueError, match=r"statistics of a build|not a count"):
        BuildStatistics.from_dict(raw)
    good = BuildStatistics().to_dict()
    with pytest.raises(ValueError, match=r"statistics of a build|not a count"):
        BuildStatistics.from_dict({**good, "kept": {"train": [1, 2, 3, 4]}})


def corpus_report(text: str = "plain", sources: int = 3, name: str = "web") -> CorpusReport:
    statistics = BuildStatistics()
    for number in range(sources):
        lengths = np.array([3 + number, 4000]) * (number + 1)
        statistics.add_kept("train", f"{text}{number}", lengths, lengths // 4 + 1)
    statistics.add_dropped("too short", f"{text}0", 5, 50)
    statistics.add_dropped("near duplicate", f"{text}1", 2000, 10**9)
    statistics.add_dropped(f"{text} rule", f"{text}1", 1, 100)
    statistics.add_read(2 * sources + 2006, 10**10)
    statistics.offer_sample("kept", 7, text, text)
    statistics.offer_sample("near duplicate", 7, text, "\nfirst line empty")
    kept = statistics.kept_in_all()
    splits = {"train": SplitReport(kept.documents, kept.text_bytes, kept.tokens, 3, 2, 12345678)}
    options = {"seed": 0, "normalise": None, "near": {"bands": 9}, text: text, "clean": True}
    return CorpusReport(
        name, TokenizerInfo("json", "tokenizer.json", "a" * 64, 50257, 50256), "uint16", splits, options, statistics
    )


class Outline(HTMLParser):
    """Tags in balance, the text inside each kind of element, and every attribute."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(content.decode("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.replace("\u00a0", " ")


@pytest.mark.parametrize("text", ["plain", HOSTILE, "x" * 500, ""])
@pytest.mark.parametrize("sources", [0, 1, 3])
def test_the_page_is_whole_and_loads_and_runs_nothing(text: str, sources: int) -> None:
    content = render_html(corpus_report(text, sources, name=text))
    outline = Outline(content)
    assert not outline.tags & {"script", "link", "img", "iframe", "object", "base", "form", "a", "use", "foreignobject"}
    assert not [name for name in outline.attributes if name.startswith("on") or name in ("href", "src", "style")]
    assert b"url(" not in content and b"@import" not in content and b"http:" not in content and b"https:" not in content
    assert b"default-src 'none'" in content and b"prefers-color-scheme: dark" in content
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufffe]", content.decode())


def test_hostile_text_is_shown_as_what_it_is() -> None:
    content = render_html(corpus_report(HOSTILE))
    shown = "".join(Outline(content).texts["pre"])
    for part in ("</pre><script>alert(1)</script>&amp;\"'", "evil", "\n\tعربي 👩\u200d🔬"):
        assert part in shown
    codes = " ".join(Outline(content).texts["i"]).split()
    marks = (0x00, 0x07, 0x0D, 0x1B, 0x7F, 0x85, 0x200B, 0x202E, 0x2066, 0xFFFE, 0xD800)
    assert set(codes) == {f"U+{mark:04X}" for mark in marks}


@given(st.text())
@settings(deadline=None)
def test_any_text_can_be_put_in_a_page(text: str) -> None:
    escaped = page.escape(text)
    assert not re.search(r"<(?!/?i\b)", escaped)
    escaped.encode("utf-8")


def test_the_page_says_the_numbers() -> None:
    rows = Outline(render_html(corpus_report())).rows
    assert ["train", "6", "24.0 kB", "6,011", "3.997", "3", "2", "100 %"] in rows
    assert ["too short", "5", "0.25 %", "50 B", "2,007", "99.75 %", ""] in rows
    assert ["near duplicate", "2,000", "99.40 %", "1.00 GB", "7", "0.35 %", ""] in rows
    assert ["kept", "", "", "", "6", "0.30 %", ""] in rows
    assert ["plain2", "2", "0", "12.0 kB", "3,005", "3.998", "49.99 %", ""] in rows
    assert ["512 to 1,023", "1", "16.67 %", "1,001", "16.65 %"] in rows
    assert ["near", '{"bands": 9}'] in rows and ["normalise", "none"] in rows and ["clean", "yes"] in rows
    assert [row[0] for row in rows if row[0] in ("too short", "near duplicate", "plain rule", "kept")] == [
        "too short",
        "near duplicate",
        "plain rule",
        "kept",
    ]


def test_documents_that_went_missing_are_not_hidden() -> None:
    report = corpus_report()
    report.statistics.add_read(4, 0)
    assert ["not accounted for", "4", "0.20 %", "", "6", "0.30 %", ""] in Outline(render_html(report)).rows


def test_many_sources_are_the_largest_and_the_rest() -> None:
    report = corpus_report(sources=1200)
    rows = Outline(render_html(report)).rows
    first = next(index for index, row in enumerate(rows) if row[0] == "Source")
    assert rows[first + 1][0] == "plain1199"
    assert rows[first + 1 + PAGE_SOURCES][0] == "1,150 other sources"
    statistics = json.loads(render_report(report))["statistics"]
    assert len(statistics["sources"]) == 1000
    others = statistics["other_sources"]
    assert others["sources"] == 200
    tokens = sum(source["tokens"] for source in statistics["sources"].values()) + others["tokens"]
    assert tokens == report.statistics.kept_in_all().tokens


def test_the_json_report_is_stable_and_complete() -> None:
    report = corpus_report(HOSTILE)
    other = CorpusReport(**{**vars(report), "statistics": merge(BuildStatistics(), report.statistics)})
    assert render_report(report) == render_report(other) and render_html(report) == render_html(other)
    content = json.loads(render_report(report))
    kept = report.statistics.kept_in_all()
    assert list(content)[:4] == ["format", "version", "corpus", "tokenizer"]
    assert content["totals"] == {
        "documents": 6,
        "text_bytes": kept.text_bytes,
        "tokens": kept.tokens,
        "bytes_per_token": round(kept.text_bytes / kept.tokens, 6),
    }
    assert content["statistics"]["dropped"]["near duplicate"] == [2000, 10**9, 0]
    assert content["options"]["near"] == {"bands": 9}


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "\u2013"),
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 10**9, "< 0.01 %"),
        (10**9 - 1, 10**9, "> 99.99 %"),
        (1, 3, "33.33 %"),
    ],
)
def test_percentages(part: int, whole: int, text: str) -> None:
    assert page.render_percent(part, whole).replace("\u00a0", " ") == text


def test_bars_are_as_long_as_their_shares() -> None:
    bar = page.render_bar(page.Bar(0.25, 0.5))
    assert re.findall(r'class="(\w+)" x="([\d.]+)%" width="([\d.]+)%"', bar) == [
        ("track", "0.00", "100.00"),
        ("s0", "0.00", "25.00"),
        ("lost", "25.00", "50.00"),
    ]
    chart = page.render_histogram("t", ["1", "2"], ["1", "2 to 3"], [page.Series("d", "documents", [30, 10])])
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights[0] == pytest.approx(3 * heights[1])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_stages(progress: Progress, clock: Clock) -> None:
    with progress:
        progress.stage("tokenize", 4_000_000, "bytes", workers=4)
        progress.advance(1_000_000, 100, 1_000_000, 250_000, {"empty": 3}, resumed=True)
        clock.now += 11
        progress.advance(1_100_000, 110, 1_100_000, 275_000, {"empty": 1, "too short": 2000})
        clock.now += 5
        progress.advance(0)
        progress.note("docs/a.jsonl, line 3: not JSON [red]\x1b[2J")
        clock.now += 6
        progress.advance(1_900_000, 220, 1_100_000, 275_000)
        progress.stage("decide", 10, "tasks")
        clock.now += 20
        progress.advance(10)


def test_a_log_has_a_line_now_and_then_and_at_each_end() -> None:
    stream, clock = io.StringIO(), Clock()
    run_stages(BuildProgress(stream, clock), clock)
    assert stream.getvalue().splitlines() == [
        "tokenize  52 %  2.10 MB of 4.00 MB  10 documents/s  100 kB/s  25.0k tokens/s  eta 19s  4 workers  "
        "dropped 2,004: too short 2,000, empty 4",
        "docs/a.jsonl, line 3: not JSON [red]\\x1b[2J",
        "tokenize  100 %  4.00 MB of 4.00 MB  15 documents/s  100 kB/s  25.0k tokens/s  eta 0s  4 workers  "
        "dropped 2,004: too short 2,000, empty 4",
        "tokenize  4.00 MB in 22s (1.00 MB of it done before)  15 documents/s  100 kB/s  25.0k tokens/s  "
        "dropped 2,004: too short 2,000, empty 4",
        "decide  100 %  10 of 10 tasks  0.50 tasks/s  eta 0s  dropped 2,004: too short 2,000, empty 4",
        "decide  10 tasks in 20s  0.50 tasks/s",
    ]


def test_a_terminal_is_redrawn_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    run_stages(BuildProgress(stream, clock), clock)
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue())
    assert "━" in plain and "52 %  2.10 MB of 4.00 MB  eta 19s" in plain
    assert "10 documents/s  100 kB/s  25.0k tokens/s  4 workers\n" in plain
    assert "docs/a.jsonl, line 3: not JSON [red]\\x1b[2J\n" in plain
    assert plain.endswith("decide  10 tasks in 20s  0.50 tasks/s\n")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().count(hidden) == stream.getvalue().count(hidden + shown) == 2, (
        "a kill would leave it hidden"
    )


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    run_stages(BuildProgress(stream, clock), clock)
    assert "\x1b" not in stream.getvalue()


def test_a_stage_that_failed_is_not_said_to_have_ended() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), BuildProgress(stream, Clock()) as progress:
        progress.stage("read", 10, "tasks")
        progress.advance(4)
        raise RuntimeError
    assert stream.getvalue() == "read  40 %  4 of 10 tasks  stopped\n"


class Broken(io.StringIO):
    def __init__(self, error: Exception, tty: bool) -> None:
        super().__init__()
        self.error, self.tty = error, tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "gone"),
        OSError(5, "hung up"),
        OSError(28, "full"),
        ValueError("closed"),
        UnicodeEncodeError("ascii", "━", 0, 1, "no"),
    ],
)
def test_no_stream_stops_a_build(error: Exception, tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock()
    run_stages(BuildProgress(Broken(error, tty), clock), clock)


def test_no_stream_at_all_stops_no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    run_stages(BuildProgress(closed, Clock()), Clock())
    monkeypatch.setattr(sys, "stderr", None)
    run_stages(BuildProgress(), Clock())
    run_stages(NoProgress(), Clock())


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    script = (
        "from launch.corpora.build_progress import BuildProgress\nwith BuildProgress() as progress:\n"
        "    for _ in range(99): progress.stage('read', 1, 'tasks'); progress.advance(1)\n"
    )
    read, write = os.pipe()
    os.close(read)
    env: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", script], stderr=write, env=env, timeout=60)
    os.close(write)
    assert done.returncode == 0


def test_the_summary() -> None:
    report = corpus_report("r")
    statistics = report.statistics
    for number in range(5):
        statistics.add_dropped(f"reason {number}", "a", number + 6, 10)
    outcome = BuildOutcome(
        "out/web", "json, 50,257 ids, by gigatoken", statistics, 20.0, 10**9, 10**8, "out/web/report.html", 4
    )
    assert render_summary(outcome) == (
        "corpus     out/web\n"
        "tokenizer  json, 50,257 ids, by gigatoken\n"
        "read       2,012 documents, 10.0 GB of text\n"
        "dropped    2,046 documents (101.69 %)\n"
        "           near duplicate   2,000 (99.40 %), 1.00 GB\n"
        "           reason 4            10 (0.50 %), 10 B\n"
        "           reason 3             9 (0.45 %), 10 B\n"
        "           reason 2             8 (0.40 %), 10 B\n"
        "           4 other reasons     19 (0.94 %), 170 B\n"
        "train      6,011 tokens, 6 documents, 3.997 bytes per token\n"
        "took       20s, 50.0 MB/s, 5.00M tokens/s, 4 workers\n"
        "report     out/web/report.html\n"
    )
    statistics.kept["validation"] = Counts(1, 2, 3)
    assert len(render_summary(outcome).splitlines()) <= 15
