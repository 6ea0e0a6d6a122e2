"""Before the first step: every node, every link, every folder and version, in a few seconds; then one verdict.

Every rank calls it, and every rank comes to the same verdict. On one machine it does only what makes sense there, in
some milliseconds.
"""

import importlib.metadata
import platform
import re
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from gptdist.comms import Comms
from gptdist.config.sections import RunConfig
from gptdist.errors import LaunchError, NodeUnfit
from gptdist.layout import Layout
from launch.preflight.folders import Mark, check_run_dir, check_scratch, look_for_mark, mark_left
from launch.preflight.judge import (
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
from launch.preflight.measure import check_device, device_name, effort_of, measure_clocks, measure_links

PACKAGES = ("torch", "deepspeed", "megatron-core", "gptdist")
_DRIVER = Path("/proc/driver/nvidia/version")
_SOURCES = Path(__file__).resolve().parents[2]


def run_preflight(config: RunConfig, layout: Layout, comms: Comms, device: str) -> None:
    """Look at everything. Raises NodeUnfit where nodes are to blame, LaunchError where the user is; warns of the rest.

    `device`: "cpu" or "cuda", of every rank.
    """
    began = time.monotonic()
    world = comms.world
    nodes = len(set(comms.gather(world.node_rank))) if not world.is_one_node else 1
    effort = effort_of(device, nodes)
    seconds, complaint = check_device(device, effort)
    complaints = [complaint] if complaint else []
    complaints += _check_folders(config, comms, nodes)
    report = RankReport(
        world.global_rank,
        world.node_rank,
        world.host,
        device_name(device),
        seconds,
        versions(nodes),
        tuple(complaints),
    )
    reports = [_report(found) for found in comms.gather(asdict(report))]
    _conclude(judge_ranks(reports), reports, comms)
    findings = []
    if nodes > 1:
        hosts = {found.node: found.host for found in reports}
        findings += judge_clocks(measure_clocks(comms, [found.node for found in reports]), hosts)
    links = comms.gather([asdict(link) for link in measure_links(layout, comms, device, effort)])
    findings += judge_links([Link(**link) for found in links for link in found], reports)
    _conclude(findings, reports, comms)
    if nodes > 1 and comms.is_first:
        print(f"preflight  {nodes} nodes, {world.world_size} ranks: {time.monotonic() - began:.1f} s", flush=True)


def versions(nodes: int) -> dict[str, str]:
    """What must be the same on all ranks; of several nodes also the code itself, of which each could have a copy."""
    found = {"python": platform.python_version()}
    if _DRIVER.exists():
        match = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text())
        found["nvidia driver"] = match.group() if match else "unknown"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if nodes > 1:
        for name in PACKAGES:
            with suppress(importlib.metadata.PackageNotFoundError):  # gptdist may be run from its sources
                found[name] = importlib.metadata.version(name)
        found["gptdist's code"] = _code_digest()
    return found


def _code_digest() -> str:
    digest = sha256()
    for package in ("gptdist", "launch"):
        for path in sorted((_SOURCES / package).rglob("*.py")):
            digest.update(str(path.relative_to(_SOURCES)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _check_folders(config: RunConfig, comms: Comms, nodes: int) -> list[Complaint]:
    """One rank of each node looks."""
    run_dir = Path(config.launch.run_dir)
    leads = comms.world.local_rank == 0
    complaints = check_scratch(config, nodes) if leads else []
    if nodes == 1:
        return complaints  # that the run's folder can be written will be found in a moment, by writing it
    unwritable = check_run_dir(run_dir) if leads else None
    with mark_left(run_dir) if comms.is_first else nullcontext() as written:
        told = comms.broadcast(asdict(written) if written else None)
        mark = Mark(**told) if told else None
        unseen = look_for_mark(mark, run_dir) if mark and leads and not comms.is_first else None
        comms.barrier()  # the mark stays until all have looked
    return [*complaints, *(found for found in (unwritable, unseen) if found)]


def _report(found: Mapping[str, Any]) -> RankReport:
    """What came as JSON."""
    complaints = tuple(
        Complaint(
            each["subject"],
            each["text"],
            Severity(each["severity"]),
            Severity(each["everywhere"]),
            each["spares_first"],
        )
        for each in found["complaints"]
    )
    return RankReport(**{**found, "complaints": complaints})


def _conclude(findings: list[Finding], reports: list[RankReport], comms: Comms) -> None:
    bad = [finding for finding in findings if finding.severity is not Severity.WARNING]
    if not bad:
        if findings and comms.is_first:
            print(f"warning: preflight:\n{render_findings(findings)}", file=sys.stderr, flush=True)
        return
    table = render_findings(findings)
    hosts = {report.node: report.host for report in reports}
    blamed = tuple(dict.fromkeys(hosts[node] for finding in bad for node in finding.nodes))
    if any(finding.severity is Severity.BROKEN for finding in bad):
        whose = f"{', '.join(blamed)} cannot take part" if blamed else "the nodes cannot work together"
        raise NodeUnfit(f"before the first step, {whose}:\n{table}", blamed)
    raise LaunchError(f"before the first step, what all nodes need is missing or differs:\n{table}")
