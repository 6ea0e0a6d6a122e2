"""Which node is broken, or slower than the others, from what every rank measured.

Pure: numbers and texts in, findings out; knows no tensor, file or clock. A node is judged by the others: what only some
nodes have is theirs; what all of them have is nobody's, and the user's to mend.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

SLOW_MATMUL = 2.0
"""A device that takes this many times the median for a product is slow."""
SLOW_LINK = 3.0
"""A node whose best link has this fraction of the others' best is slow; links vary more than devices."""
SKEW_WARNED_SECONDS = 1.0
"""From here on the logs of two nodes can no longer be read side by side."""
SKEW_FATAL_SECONDS = 300.0
"""From here on munge's and Kerberos' credentials are refused, and object storage follows: jobs on the node fail."""


class Severity(StrEnum):
    """What a finding means for the run."""

    BROKEN = "broken"  # a node is unfit: the run ends, and is better off without it
    SETUP = "wrong"  # the run ends, and would anywhere
    WARNING = "warning"  # the run goes on, and the user should know


@dataclass(frozen=True)
class Complaint:
    """Something that a rank found wrong by itself. `everywhere`: what it means where every node has it;
    `spares_first`: the first node cannot have it."""

    subject: str
    text: str
    severity: Severity = Severity.BROKEN
    everywhere: Severity = Severity.SETUP
    spares_first: bool = False


@dataclass(frozen=True)
class RankReport:
    """What one rank found out without the others. `matmul_seconds`: None where its device gave no right answer."""

    global_rank: int
    node: int
    host: str
    device: str
    matmul_seconds: float | None
    versions: Mapping[str, str]
    complaints: tuple[Complaint, ...] = ()


@dataclass(frozen=True)
class Link:
    """An all-reduce between two ranks as one of them saw it; None where it gave no right sum in time."""

    one: int
    other: int
    bytes_per_second: float | None


@dataclass(frozen=True)
class Finding:
    """One line of the table. `nodes`: whose fault it is; empty where that cannot be told, or where all have it."""

    severity: Severity
    subject: str
    where: str
    text: str
    nodes: tuple[int, ...] = ()


def judge_ranks(reports: Sequence[RankReport]) -> list[Finding]:
    """What ranks found by themselves, slow devices, and versions that differ."""
    return [*_complaints(reports), *_slow_devices(reports), *_versions(reports)]


def judge_clocks(offsets: Mapping[int, float], hosts: Mapping[int, str]) -> list[Finding]:
    """`offsets`: seconds that each node's clock is ahead of the first one's."""
    middle = statistics.median(offsets.values()) if len(offsets) > 2 else 0.0
    findings = []
    for node, offset in offsets.items():
        skew = offset - middle
        if abs(skew) < SKEW_WARNED_SECONDS:
            continue
        fatal = abs(skew) >= SKEW_FATAL_SECONDS
        than = "the median" if len(offsets) > 2 else f"{hosts[min(hosts)]}'s (or that one is wrong)"
        text = f"its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} {than}; let it be set by NTP" + (
            f". From {SKEW_FATAL_SECONDS:g} s on, credentials are refused" if fatal else ""
        )
        blamed = (node,) if len(offsets) > 2 else ()
        findings.append(Finding(Severity.BROKEN if fatal else Severity.WARNING, "clock", hosts[node], text, blamed))
    return findings


def judge_links(links: Iterable[Link], reports: Sequence[RankReport]) -> list[Finding]:
    """Links that gave no answer, and nodes (of GPUs also ranks) whose best link is much slower than the others' best.

    A healthy node next to a slow one has one slow link and one that is not; a slow node has slow links only.
    """
    links = _of_both_ends(links)
    by_rank = {report.global_rank: report for report in reports}
    between: dict[int, list[float]] = defaultdict(list)
    within: dict[int, list[float]] = defaultdict(list)
    for link in links:
        speed = link.bytes_per_second or 0.0
        one, other = by_rank[link.one], by_rank[link.other]
        if one.node != other.node:
            between[one.node].append(speed)
            between[other.node].append(speed)
        elif one.device != "cpu":  # processors of one node talk through memory that they share with everything else
            within[link.one].append(speed)
            within[link.other].append(speed)
    hosts = {report.node: report.host for report in reports}
    findings = _dead_links(links, by_rank)
    for node, speed, median in _slow({node: max(speeds) for node, speeds in between.items()}):
        text = _slow_link(speed, median, "other nodes")
        findings.append(Finding(Severity.WARNING, "links", hosts[node], text, (node,)))
    for rank, speed, median in _slow({rank: max(speeds) for rank, speeds in within.items()}):
        text = f"rank {rank} ({by_rank[rank].device}): {_slow_link(speed, median, 'ranks of its own node')}"
        findings.append(Finding(Severity.WARNING, "links", by_rank[rank].host, text, (by_rank[rank].node,)))
    return findings


def render_findings(findings: Sequence[Finding]) -> str:
    """A table, one line each: how bad, where, what."""
    worst_first = sorted(findings, key=lambda finding: list(Severity).index(finding.severity))
    rows = [(finding.severity.value, finding.where, finding.subject) for finding in worst_first]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heads = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {head}  {finding.text}" for head, finding in zip(heads, worst_first, strict=True))


def _complaints(reports: Sequence[RankReport]) -> list[Finding]:
    """Of ranks of one node that say the same, one line."""
    nodes = {report.node: report.host for report in reports}
    found: dict[Complaint, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for report in reports:
        for complaint in report.complaints:
            found[complaint][report.node].append(report.global_rank)
    by_subject: dict[str, set[int]] = defaultdict(set)
    for complaint, places in found.items():
        by_subject[complaint.subject].update(places)
    findings = []
    for complaint, places in found.items():
        spared = {min(nodes)} if complaint.spares_first else set()
        all_have_it = len(by_subject[complaint.subject] | spared) == len(nodes)
        severity = complaint.everywhere if all_have_it else complaint.severity
        for node in places:
            blamed = (node,) if severity is Severity.BROKEN else ()
            findings.append(Finding(severity, complaint.subject, nodes[node], complaint.text, blamed))
    return findings


def _slow_devices(reports: Sequence[RankReport]) -> list[Finding]:
    timed = [report for report in reports if report.matmul_seconds]
    if len({report.node for report in reports}) == 1 and all(report.device == "cpu" for report in reports):
        return []  # they share the cores of one machine
    # Of two, the faster is what a device can do: hence the low median of times, and the high one of speeds.
    median = statistics.median_low([report.matmul_seconds or 0.0 for report in timed]) if timed else 0.0
    return [
        Finding(
            Severity.WARNING,
            "matmul",
            report.host,
            f"rank {report.global_rank} ({report.device}): {1e3 * report.matmul_seconds:.3g} ms for a product that "
            f"takes {1e3 * median:.3g} ms at the median; from {SLOW_MATMUL:g} times that on it is slow",
            (report.node,),
        )
        for report in timed
        if report.matmul_seconds and report.matmul_seconds >= SLOW_MATMUL * median
    ]


def _versions(reports: Sequence[RankReport]) -> list[Finding]:
    """Nodes of another version than most; where no version has most nodes, nobody is blamed."""
    findings = []
    for name in sorted({name for report in reports for name in report.versions}):
        found = {report.node: (report.host, report.versions.get(name, "absent")) for report in reports}
        counts = Counter(version for _, version in found.values())
        if len(counts) == 1:
            continue
        most, count = counts.most_common(1)[0]
        clear = 2 * count > len(found)
        reference = most if clear else found[min(found)][1]
        for node, (host, version) in found.items():
            if version != reference:
                text = f"{name} {version}, {'most nodes have' if clear else found[min(found)][0] + ' has'} {reference}"
                severity = Severity.BROKEN if clear else Severity.SETUP
                findings.append(Finding(severity, "versions", host, text, (node,) if clear else ()))
    return findings


def _of_both_ends(links: Iterable[Link]) -> list[Link]:
    """Each pair once, by the end that saw the worse."""
    seen: dict[tuple[int, int], list[float | None]] = defaultdict(list)
    for link in links:
        seen[link.one, link.other].append(link.bytes_per_second)
    return [Link(*ends, None if None in speeds else min(filter(None, speeds))) for ends, speeds in seen.items()]


def _dead_links(links: Sequence[Link], by_rank: Mapping[int, RankReport]) -> list[Finding]:
    """Blamed is a node none of whose links answers, where others' do."""
    dead: Counter[int] = Counter()
    alive: set[int] = set()
    for link in links:
        ends = {by_rank[link.one].node, by_rank[link.other].node}
        if link.bytes_per_second is None:
            dead.update(ends)
        else:
            alive |= ends
    blamed = {node for node in dead if node not in alive}
    if not alive:
        blamed = {node for node, count in dead.items() if count > sum(dead.values()) / 2}
    findings = []
    for link in links:
        if link.bytes_per_second is None:
            one, other = by_rank[link.one], by_rank[link.other]
            nodes = tuple(sorted({one.node, other.node} & blamed))
            where = ", ".join(dict.fromkeys(end.host for end in (one, other) if not nodes or end.node in nodes))
            text = f"no right sum in time between rank {link.one} ({one.host}) and rank {link.other} ({other.host})"
            findings.append(Finding(Severity.BROKEN, "links", where, text, nodes))
    return findings


def _slow(speeds: Mapping[int, float]) -> list[tuple[int, float, float]]:
    """(place, its speed, the median) of those that are slow; ones that gave no answer have findings of their own."""
    median = statistics.median_high(speeds.values()) if speeds else 0.0
    return [(place, speed, median) for place, speed in speeds.items() if 0 < SLOW_LINK * speed <= median]


def _slow_link(speed: float, median: float, to: str) -> str:
    return (
        f"{speed / 1e9:.3g} GB/s to {to} at best; the median is {median / 1e9:.3g} GB/s, and {SLOW_LINK:g} times less "
        "is slow"
    )
