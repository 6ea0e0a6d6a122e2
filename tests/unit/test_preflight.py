"""Who is at fault, from made-up measurements; the parts that measure, on this machine."""

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptdist.config.sections import CheckpointConfig, DataConfig, LaunchConfig, ModelConfig, RunConfig
from gptdist.errors import EXIT_FAILED, EXIT_USER_MISTAKE, LaunchError, NodeUnfit
from gptdist.layout import Layout
from launch.preflight import check, folders, measure
from launch.preflight.judge import (
    SKEW_FATAL_SECONDS,
    SLOW_LINK,
    SLOW_MATMUL,
    Complaint,
    Finding,
    Link,
    RankReport,
    Severity,
    judge_clocks,
    judge_links,
    judge_ranks,
    render_findings,
)
from tests.unit.thread_ranks import on_ranks

VERSIONS = {"torch": "2.13.0", "python": "3.11.9"}


def reports(nodes: int, per_node: int = 2, device: str = "cuda:0") -> list[RankReport]:
    """Healthy ones, a little different from each other."""
    return [
        RankReport(rank, rank // per_node, f"node{rank // per_node}", device, 1e-3 * (1 + rank % 5 / 20), VERSIONS)
        for rank in range(nodes * per_node)
    ]


def ring(nodes: int, per_node: int, slow: dict[int, float] | None = None) -> list[Link]:
    """Links of data-parallel neighbours, a link as slow as its slower end."""
    layout = Layout(nodes * per_node, tensor=per_node)
    factors = slow or {}
    return [
        Link(
            a,
            b,
            (1e11 if a // per_node == b // per_node else 1e10)
            / max(factors.get(a // per_node, 1.0), factors.get(b // per_node, 1.0)),
        )
        for pairs in measure.pair_rounds(layout)
        for a, b in pairs
    ]


def severities(findings: list[Finding]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(finding.severity.value, finding.subject, finding.nodes) for finding in findings]


# -- verdicts ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 8), st.sampled_from(["cpu", "cuda:1"]), st.randoms(use_true_random=False))
def test_healthy_nodes_that_differ_a_little_are_not_blamed(nodes, per_node, device, random):
    found = [replace(each, matmul_seconds=random.uniform(1.0, 1.9)) for each in reports(nodes, per_node, device)]
    assert judge_ranks(found) == []
    links = [replace(link, bytes_per_second=random.uniform(1.0, 1.9)) for link in ring(nodes, per_node)]
    assert judge_links(links, found) == []
    offsets = {node: random.uniform(-0.4, 0.4) if node else 0.0 for node in range(nodes)}
    assert judge_clocks(offsets, dict.fromkeys(offsets, "")) == []


@given(st.integers(2, 9), st.integers(1, 4), st.data())
def test_a_slow_device_is_named(nodes, per_node, data):
    healthy = reports(nodes, per_node)
    rank = data.draw(st.sampled_from(range(len(healthy))))
    healthy[rank] = replace(healthy[rank], matmul_seconds=1e-3 * 1.2 * SLOW_MATMUL)
    (finding,) = judge_ranks(healthy)
    assert (finding.severity, finding.subject, finding.nodes) == (Severity.WARNING, "matmul", (rank // per_node,))
    assert f"rank {rank} (cuda:0)" in finding.text


def test_processors_of_one_machine_are_not_compared():
    found = [replace(each, matmul_seconds=10.0**each.global_rank) for each in reports(1, 4, "cpu")]
    assert judge_ranks(found) == []
    assert len(judge_ranks([replace(each, device="cuda:0") for each in found])) == 2


@given(st.integers(3, 9), st.integers(1, 3), st.floats(2 * SLOW_LINK, 100.0), st.data())
def test_a_node_with_a_slow_link_is_named_and_its_neighbours_are_not(nodes, per_node, factor, data):
    slow = data.draw(st.sampled_from(range(nodes)))
    # Of the processors' own links only those between nodes are judged.
    findings = judge_links(ring(nodes, per_node, {slow: factor}), reports(nodes, per_node, "cpu"))
    assert severities(findings) == [("warning", "links", (slow,))]
    assert findings[0].where == f"node{slow}" and "GB/s to other nodes" in findings[0].text


def test_a_gpu_with_a_slow_link_inside_its_node_is_named():
    layout = Layout(8)
    links = [Link(a, b, 1e9 if 5 in (a, b) else 1e11) for pairs in measure.pair_rounds(layout) for a, b in pairs]
    (finding,) = judge_links(links, reports(1, 8))
    assert finding.nodes == (0,) and "rank 5 (cuda:0): 1 GB/s" in finding.text


@given(st.integers(3, 8), st.integers(1, 3), st.data())
def test_a_node_that_none_can_talk_to_is_broken(nodes, per_node, data):
    dead = data.draw(st.sampled_from(range(nodes)))
    links = [
        replace(link, bytes_per_second=None) if dead in (link.one // per_node, link.other // per_node) else link
        for link in ring(nodes, per_node)
        if link.one // per_node != link.other // per_node
    ]
    findings = judge_links(links, reports(nodes, per_node))
    blamed = {node for finding in findings for node in finding.nodes}
    assert blamed == {dead} and all(finding.severity is Severity.BROKEN for finding in findings)


def test_of_two_nodes_that_cannot_talk_neither_is_blamed():
    (finding,) = judge_links([Link(0, 2, None)], reports(2))
    assert (finding.severity, finding.nodes, finding.where) == (Severity.BROKEN, (), "node0, node1")


@given(st.integers(3, 9), st.floats(1.1, 1e6), st.sampled_from([-1, 1]), st.data())
def test_a_clock_that_is_off_is_named_whichever_it_is(nodes, skew, sign, data):
    wrong = data.draw(st.sampled_from(range(nodes)))
    clocks = {node: 100.0 + (sign * skew if node == wrong else 0.001 * node) for node in range(nodes)}
    offsets = {node: clock - clocks[0] for node, clock in clocks.items()}
    (finding,) = judge_clocks(offsets, {node: f"node{node}" for node in offsets})
    assert finding.nodes == (wrong,)
    assert ("ahead of" if sign > 0 else "behind") in finding.text
    if abs(skew - SKEW_FATAL_SECONDS) > 0.1:
        assert (finding.severity is Severity.BROKEN) == (skew > SKEW_FATAL_SECONDS)


def test_of_two_clocks_neither_is_blamed():
    (finding,) = judge_clocks({0: 0.0, 1: -400.0}, {0: "a", 1: "b"})
    assert finding.severity is Severity.BROKEN and finding.nodes == () and "behind a's (or that one" in finding.text


@given(st.integers(1, 9), st.integers(1, 3), st.data())
def test_versions_that_differ_are_named_with_the_node_where_most_agree(nodes, per_node, data):
    others = data.draw(st.sets(st.integers(0, nodes - 1)))
    found = [
        replace(each, versions=VERSIONS | {"torch": "2.12.0"}) if each.node in others else each
        for each in reports(nodes, per_node)
    ]
    findings = judge_ranks(found)
    if len(others) in (0, nodes):
        assert findings == []
    elif 2 * len(others) == nodes:
        assert {finding.severity for finding in findings} == {Severity.SETUP}
        assert all(not finding.nodes for finding in findings)
    else:
        fewer = others if 2 * len(others) < nodes else set(range(nodes)) - others
        assert {finding.nodes for finding in findings} == {(node,) for node in fewer}
        assert {finding.severity for finding in findings} == {Severity.BROKEN}


@pytest.mark.parametrize("subject", ["scratch", "matmul", "shared folder"])
def test_what_all_nodes_have_is_nobodys(subject):
    complaint = {
        "scratch": Complaint("scratch", "full"),
        "matmul": Complaint("matmul", "wrong", everywhere=Severity.BROKEN),
        "shared folder": Complaint("shared folder", "not seen", spares_first=True),
    }[subject]

    def judged(nodes: int, bad: set[int]) -> list[tuple[str, str, tuple[int, ...]]]:
        return severities(
            judge_ranks([replace(r, complaints=(complaint,) if r.node in bad else ()) for r in reports(nodes)])
        )

    assert judged(3, {1}) == [("broken", subject, (1,))]
    if subject == "scratch":
        assert judged(2, {1}) == [("broken", subject, (1,))]
        assert judged(3, {0, 1, 2}) == [("wrong", subject, ())] * 3
        assert judged(1, {0}) == [("wrong", subject, ())]
    elif subject == "matmul":  # a broken device is its node's fault, also where there is no other
        assert judged(1, {0}) == [("broken", subject, (0,))]
    else:  # the first node sees what it wrote itself
        assert judged(3, {1, 2}) == [("wrong", subject, ())] * 2
        assert judged(2, {1}) == [("wrong", subject, ())]


def test_a_table_has_a_line_for_each_the_worst_first():
    findings = [
        Finding(Severity.WARNING, "clock", "a", "one"),
        Finding(Severity.BROKEN, "shared folder", "node17", "two"),
    ]
    assert render_findings(findings) == ("  broken   node17  shared folder  two\n  warning  a       clock          one")


# -- pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data * tensor * pipeline, tensor, pipeline)
        for data, tensor, pipeline in itertools.product((1, 2, 3, 4, 5), (1, 2, 4), (1, 2, 3))
    ],
    ids=Layout.describe,
)
def test_pairs_are_the_neighbours_of_every_group_without_a_rank_in_two_at_once(layout):
    rounds = measure.pair_rounds(layout)
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    found = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    expected = set()
    places = {
        rank: (layout.tensor_rank(rank), layout.data_rank(rank), layout.pipeline_stage(rank))
        for rank in range(layout.world_size)
    }
    sizes = (layout.tensor, layout.data, layout.pipeline)
    for one, other in itertools.combinations(places, 2):
        differs = [kind for kind in range(3) if places[one][kind] != places[other][kind]]
        if len(differs) == 1:
            gap = abs(places[one][differs[0]] - places[other][differs[0]])
            if gap in (1, sizes[differs[0]] - 1):
                expected.add((one, other))
    assert found == sorted(expected)
    assert len(rounds) <= 9


# -- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 256, 384])
def test_the_known_product_is_exact(size):
    a, b, product = measure.known_product(size, "cpu")
    assert torch.equal(a.long() @ b.long(), product.long())
    assert a.unique().numel() > 1 or size == 1
    assert (a.abs() @ b.abs()).max() < 2**24, "partial sums are exact in any order"


def test_a_wrong_element_is_counted(monkeypatch):
    effort = measure.effort_of("cpu", 1)
    seconds, complaint = measure.check_device("cpu", effort)
    assert seconds is not None and 0 < seconds < 5 and complaint is None

    def flip(a, b):
        product = a @ b
        product[3, 5] += 1
        product[7, 7] = float("nan")
        return product

    monkeypatch.setattr(measure, "multiply", flip)
    seconds, complaint = measure.check_device("cpu", effort)
    assert seconds is None and complaint.everywhere is Severity.BROKEN
    assert complaint.text == "cpu computed 2 of 65,536 elements of a known product wrong"


def test_clocks_are_compared_with_the_first(monkeypatch):
    def work(comms):
        return measure.measure_clocks(comms, [0, 0, 1, 2])

    offsets = on_ranks(4, work)
    assert all(abs(offset) < 0.5 for found in offsets for offset in found.values())
    assert [sorted(found) for found in offsets] == [[0, 1, 2]] * 4


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_mark_is_seen_where_the_folder_is_shared_and_leaves_nothing(tmp_path, monkeypatch):
    run_dir = tmp_path / "runs" / "new"
    with folders.mark_left(run_dir) as mark:
        assert mark is not None and mark.path(run_dir).parent == tmp_path
        assert folders.look_for_mark(mark, run_dir) is None
        monkeypatch.setattr(folders, "SHARED_SECONDS", 0.2)
        elsewhere = tmp_path / "other" / "runs" / "new"
        complaint = folders.look_for_mark(mark, elsewhere)
        assert complaint is not None and complaint.spares_first and str(elsewhere) in complaint.text
        mark.path(run_dir).write_text("of another run")
        assert folders.look_for_mark(mark, run_dir) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_mark_that_comes_late_is_waited_for(tmp_path, monkeypatch):
    mark = folders.Mark("late", "token")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            (tmp_path / "late").write_text("token")

    monkeypatch.setattr(folders.time, "sleep", sleep)
    assert folders.look_for_mark(mark, tmp_path) is None and len(slept) == 3


def test_marks_of_killed_runs_go(tmp_path):
    old, young = tmp_path / ".preflight-old", tmp_path / ".preflight-young"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, time.time() - 2 * folders.STALE_SECONDS))
    with folders.mark_left(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [young]


def test_scratch_that_is_full_or_cannot_be_written(tmp_path, monkeypatch):
    config = RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=32, num_heads=1, vocab_size=300, sequence_length=32),
        data=DataConfig(cache_dir=str(tmp_path / "cache")),
        checkpoint=CheckpointConfig(staging_dir=str(tmp_path / "staging")),
        launch=LaunchConfig(run_dir=str(tmp_path / "run")),
    )
    free = {"staging": 1 << 40, "cache": 1 << 40}
    monkeypatch.setattr(folders, "free_bytes", lambda path: free[path.name])
    assert folders.check_scratch(config, 2) == []
    free |= {"staging": 1000, "cache": 1000}
    staging, cache = folders.check_scratch(config, 2)
    assert (staging.severity, staging.everywhere) == (Severity.BROKEN, Severity.SETUP)
    assert (cache.severity, cache.everywhere) == (Severity.WARNING, Severity.WARNING)
    assert "checkpoint.staging_dir" in staging.text and "1,000 bytes are free" in staging.text

    def refuse(self, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    assert [found.text for found in folders.check_scratch(config, 2)] == [
        f"checkpoint.staging_dir ({tmp_path}/staging): cannot be written: No space left on device",
        f"data.cache_dir ({tmp_path}/cache): cannot be written: No space left on device",
    ]
    assert "launch.run_dir" in folders.check_run_dir(tmp_path / "run").text
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_refuses(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        assert "cannot be written: Not a directory" in folders.check_run_dir(folder).text
        with folders.mark_left(folder) as mark:
            assert mark is None
    assert folders.check_run_dir(tmp_path / "new" / "run") is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- the end of it -------------------------------------------------------------------------------------------------


def test_verdicts_become_errors(capsys):
    def conclude(*findings):
        return on_ranks(4, lambda comms: check._conclude(list(findings), reports(2), comms))

    slow = Finding(Severity.WARNING, "links", "node1", "slow", (1,))
    broken = Finding(Severity.BROKEN, "matmul", "node1", "wrong", (1,))
    assert conclude() == [None] * 4 and conclude(slow) == [None] * 4
    assert capsys.readouterr().err == "warning: preflight:\n  warning  node1  links  slow\n", "once"
    errors = conclude(slow, broken, replace(broken, where="node0", nodes=(0,)), broken)
    assert all(type(error) is NodeUnfit and error.hosts == ("node1", "node0") for error in errors)
    assert errors[0].exit_code == EXIT_FAILED and "node1, node0 cannot take part" in str(errors[0])
    assert str(errors[0]).count("\n") == 4
    (error, *_) = conclude(replace(broken, severity=Severity.SETUP, nodes=()))
    assert type(error) is LaunchError and error.exit_code == EXIT_USER_MISTAKE
    (error, *_) = conclude(replace(broken, nodes=()))
    assert type(error) is NodeUnfit and error.hosts == ()
