"""`--hosts` on machines of a network of their own."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.dist.commands import Commands, Ended, curve, open_last
from tests.dist.machines import Machines, why_no_machines

SAME = 2e-5  # relative: other layouts sum in another order

FIND = """
import sys
from gptdist.errors import LaunchError
from launch.hosts import find_node, parse_hosts
try:
    print(find_node(parse_hosts(sys.argv[1])))
except LaunchError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    reason = why_no_machines()
    if reason is not None:
        pytest.skip(reason)
    with Machines(3) as found:
        yield found


@pytest.mark.parametrize("port", ["", ":4000"])
def test_each_machine_finds_itself(machines: Machines, port: str) -> None:
    for hosts in (machines.addresses, ["machine0", "machine1", "machine2"], ["machine0", *machines.addresses[1:]]):
        asked = [machines.start(number, "-c", FIND, ",".join(hosts) + port) for number in range(3)]
        assert [process.communicate(timeout=60)[0].strip() for process in asked] == ["0", "1", "2"]


def test_a_machine_that_is_not_listed_says_so(machines: Machines) -> None:
    output, _ = machines.start(2, "-c", FIND, ",".join(machines.addresses[:2])).communicate(timeout=60)
    assert "none of them is this machine (machine2). Say which it is with --node, from 0 to 1" in output


def train_on(
    machines: Machines,
    count: int,
    commands: Commands,
    run_dir: Path,
    hidden: Mapping[int, Path] | None = None,
    **settings: object,
) -> list[Ended]:
    """`gptdist train --hosts` on the first `count` machines, one rank on each. `hidden`: a folder not seen there."""
    started = []
    for number in range(count):
        commands.enter = machines.enter(number, (hidden or {}).get(number))
        words = ("--hosts", ",".join(machines.addresses[:count]))
        started.append(commands.start_train(run_dir, 1, *words, **settings))
    return [command.wait() for command in started]


def test_a_run_goes_on_with_fewer_machines_and_with_all_again(
    machines: Machines, commands: Commands, tmp_path: Path
) -> None:
    settings = {"train__steps": 9, "train__micro_batch_size": 4, "launch__min_nodes": 2}
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    commands.train(whole, 3, **{**settings, "launch__min_nodes": None}).expect(0)

    for count, stop_after, code in ((3, 3, 75), (2, 6, 75), (3, None, 0)):
        ends = train_on(machines, count, commands, legs, **settings, train__stop_after=stop_after)
        assert [end.expect(code).code for end in ends] == [code] * count
        assert f"preflight  {count} nodes, {count} ranks" in ends[0].out and f"DP {count}" in ends[0].out
        assert ("note    to fit 2 ranks: train.micro_batch_size 4 -> 3" in ends[0].out) == (count == 2)
        assert not any(end.errors for end in ends)
    expected, found = curve(whole), curve(legs)
    assert sorted(found) == list(range(1, 10))
    for step, (loss, norm, samples) in found.items():
        assert samples == expected[step][2]
        assert (loss, norm) == (pytest.approx(expected[step][0], rel=SAME), pytest.approx(expected[step][1], rel=SAME))
    with open_last(whole) as one, open_last(legs) as other:
        assert {key: one.state[key] for key in ("samples", "random", "data")} == {
            key: other.state[key] for key in ("samples", "random", "data")
        }


def test_a_machine_that_does_not_see_the_runs_folder_is_named(
    machines: Machines, commands: Commands, tmp_path: Path
) -> None:
    run_dir = tmp_path / "shared" / "run"
    run_dir.parent.mkdir()
    ends = train_on(machines, 3, commands, run_dir, hidden={2: run_dir.parent})
    assert [end.code for end in ends] == [1, 1, 1]
    assert "machine2 cannot take part" in ends[0].errors[0] and not ends[1].errors and not ends[2].errors
    assert "broken  machine2  shared folder  launch.run_dir" in ends[0].err
    assert not list(run_dir.parent.iterdir())


def test_too_few_machines(machines: Machines, commands: Commands, tmp_path: Path) -> None:
    (end,) = train_on(machines, 1, commands, tmp_path / "run", launch__min_nodes=2)
    end.one_error("There is 1 node", "launch.min_nodes is 2")
