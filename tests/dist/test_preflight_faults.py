"""Preflight on real ranks that each pass for a node, with one fault on one of them."""

import contextlib
import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gptdist.comms import Comms
from gptdist.config.sections import CheckpointConfig, LaunchConfig, RunConfig
from gptdist.errors import GptdistError
from gptdist.layout import Layout
from gptdist.world import World
from launch.preflight import check, folders, measure
from tests.dist.ranks import RankPool

MOST_SECONDS = 20.0


@dataclass(frozen=True)
class Outcome:
    """What preflight came to on one rank."""

    error: str
    message: str
    hosts: tuple[str, ...]
    printed: str
    seconds: float


def look(world: World, faults: dict[str, list[int]], run_dir: str, scratch: str) -> Outcome:
    """Preflight with rank r as node r; `faults`: name -> on which ranks."""
    me = world.global_rank
    mine = {name for name, ranks in faults.items() if me in ranks}
    world = replace(world, local_rank=0, local_world_size=1, node_rank=me, host=f"node{me}")
    comms = Comms(world, dist.new_group(backend="gloo"))
    config = RunConfig(
        launch=LaunchConfig(run_dir=f"{run_dir}-elsewhere/run" if "unshared" in mine else f"{run_dir}/run"),
        checkpoint=CheckpointConfig(staging_dir=scratch if "full disk" in mine else None),
    )
    printed = io.StringIO()
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.setattr(folders, "SHARED_SECONDS", 1.0)
        for name in mine:
            _inject(name, patch)
        try:
            check.run_preflight(config, Layout(world.world_size), comms, "cpu")
            error, message, hosts = "", "", ()
        except GptdistError as raised:
            error, message, hosts = type(raised).__name__, str(raised), getattr(raised, "hosts", ())
    return Outcome(error, message, hosts, printed.getvalue(), time.monotonic() - began)


def _inject(name: str, patch: pytest.MonkeyPatch) -> None:
    versions, exchange, multiply = check.versions, measure.exchange, measure.multiply

    def lazily(function: Any, seconds: float) -> Any:
        def slow(*args: Any) -> Any:
            time.sleep(seconds)
            return function(*args)

        return slow

    if name == "wrong matmul":
        patch.setattr(measure, "multiply", lambda a, b: (a + (a == 2)) @ b)
    elif name == "slow matmul":
        patch.setattr(measure, "multiply", lazily(multiply, 0.1))
    elif name == "skewed clock":
        patch.setattr(measure, "wall_clock", lambda: time.time() - 1000.0)
    elif name == "clock a little off":
        patch.setattr(measure, "wall_clock", lambda: time.time() + 3.0)
    elif name == "other version":
        patch.setattr(check, "versions", lambda nodes: versions(nodes) | {"torch": "1.13.1"})
    elif name == "wrong sums":
        patch.setattr(measure, "exchange", lambda tensor, peer: exchange(tensor, peer) + 1)
    elif name == "slow link":
        patch.setattr(measure, "exchange", lazily(exchange, 0.2))


def outcomes(pool: RankPool, world_size: int, folder: Path, **faults: list[int]) -> Outcome:
    """The one outcome that all ranks came to; the printed words are the first's."""
    named = {name.replace("_", " "): ranks for name, ranks in faults.items()}
    (folder / "shared-elsewhere").mkdir()
    (folder / "shared").mkdir()
    all_of_them = pool.run(look, world_size, named, str(folder / "shared"), str(folder / "small-disk"))
    assert len({(each.error, each.message, each.hosts) for each in all_of_them}) == 1
    assert not any(each.printed for each in all_of_them[1:])
    assert max(each.seconds for each in all_of_them) < MOST_SECONDS
    assert not list((folder / "shared").iterdir()) and not list((folder / "shared-elsewhere").iterdir())
    return all_of_them[0]


def table(text: str) -> list[list[str]]:
    """[severity, where, subject] of each line."""
    return [line.split(None, 3)[:3] for line in text.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_healthy_nodes_begin(pool: RankPool, world_size: int, tmp_path: Path) -> None:
    outcome = outcomes(pool, world_size, tmp_path)
    assert outcome.error == "", outcome.message
    assert "broken" not in outcome.printed


@pytest.mark.parametrize(
    ("fault", "subject"),
    [
        ("wrong_matmul", "matmul"),
        ("unshared", "shared"),
        ("skewed_clock", "clock"),
        ("other_version", "versions"),
        ("wrong_sums", "links"),
    ],
)
def test_the_broken_node_is_named(pool: RankPool, fault: str, subject: str, tmp_path: Path) -> None:
    outcome = outcomes(pool, 4 if subject == "links" else 3, tmp_path, **{fault: [2]})
    assert (outcome.error, outcome.hosts) == ("NodeUnfit", ("node2",)), outcome.message
    lines = [line for line in table(outcome.message) if line[0] == "broken"]
    assert lines and all(line[:3] == ["broken", "node2", subject] for line in lines), outcome.message


def test_a_node_whose_own_disk_is_full_is_named(pool: RankPool, small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "full").write_bytes(bytes(1 << 20)[: -(64 << 10)])
    outcome = outcomes(pool, 2, tmp_path, full_disk=[1])
    assert (outcome.error, outcome.hosts) == ("NodeUnfit", ("node1",))
    assert "checkpoint.staging_dir" in outcome.message and "Free some space" in outcome.message


def test_a_folder_that_no_other_node_sees_is_the_users_mistake(pool: RankPool, tmp_path: Path) -> None:
    outcome = outcomes(pool, 3, tmp_path, unshared=[1, 2])
    assert (outcome.error, outcome.hosts) == ("LaunchError", ())
    assert table(outcome.message) == [["wrong", "node1", "shared"], ["wrong", "node2", "shared"]]
    assert "a file system that all nodes share" in outcome.message


@pytest.mark.parametrize(
    ("fault", "subject"), [("slow_matmul", "matmul"), ("clock_a_little_off", "clock"), ("slow_link", "links")]
)
def test_a_slow_node_is_told_and_the_run_goes_on(pool: RankPool, fault: str, subject: str, tmp_path: Path) -> None:
    outcome = outcomes(pool, 4, tmp_path, **{fault: [1]})
    assert outcome.error == ""
    assert ["warning", "node1", subject] in table(outcome.printed), outcome.printed
