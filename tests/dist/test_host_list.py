"""`--hosts` on machines of a network of their own."""

from collections.abc import Iterator

import pytest

from tests.dist.machines import Machines, why_no_machines

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
