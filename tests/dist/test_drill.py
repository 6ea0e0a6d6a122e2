"""The drills pass, and a drill that must fail does."""

import json
from pathlib import Path

import pytest

from gptdist.checkpoint.snapshot import to_host
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.world import World
from launch.drills import checkpoint_damage
from launch.drills.certificate import Finding, all_passed, certificate_record
from launch.drills.saving_ranks import content_problem, fragments
from tests.dist.cases import is_full
from tests.dist.commands import Commands


def test_checkpoints_survive_every_fault(commands: Commands, tmp_path: Path) -> None:
    kills, flips, truncations = (100, 200, 60) if is_full() else (6, 200, 60)
    options = [f"--kills={kills}", f"--flips={flips}", f"--truncations={truncations}", "--ranks=3"]
    work, out = tmp_path / "work", tmp_path / "certificate.json"
    commands.run("drill", "checkpoint", *options, "--work", work, "--out", out, timeout_seconds=280).expect(0)
    found = json.loads(out.read_text())
    assert found["passed"]
    tried = {finding["fault"]: finding["times"] for finding in found["findings"]}
    assert len(tried) == 32
    assert tried["one flipped bit"] == flips and tried["a truncated file"] == truncations
    assert all(finding["noticed"] or "skipped" in finding["verdict"] for finding in found["findings"])
    assert list(work.iterdir()) == []


def test_what_goes_wrong_is_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checker that sees nothing, and a checkpoint with other content, must both be found out."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, to_host(fragments(step, World())), {"samples": step}, Comms(World()))
    opened = checkpoint_damage.Checkpoint.open
    monkeypatch.setattr(
        checkpoint_damage.Checkpoint, "open", lambda path, verify: opened(path.parent / "step-00000001", verify=verify)
    )
    finding = next(checkpoint_damage.damage(tmp_path, flips=2, truncations=2, seed=1))
    assert not all_passed([finding]) and certificate_record([finding])["passed"] is False
    assert "not noticed" in str(finding.problem)
    monkeypatch.undo()

    with opened(tmp_path / "step-00000002", verify=True) as checkpoint:
        assert content_problem(checkpoint) is None
        monkeypatch.setattr("launch.drills.saving_ranks.expected", lambda step, name: checkpoint.read(name) + 1)
        assert "is not what was saved" in str(content_problem(checkpoint))


def test_a_skipped_fault_is_said_and_does_not_fail() -> None:
    finding = Finding("a full disk", skipped="needs root")
    assert all_passed([finding]) and finding.verdict == "skipped: needs root"
