"""Lists of hosts and a machine's own place in them."""

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.errors import LaunchError
from launch.hosts import (
    HostList,
    Machine,
    find_node,
    interface_of,
    is_own_address,
    names_of_this_machine,
    parse_hosts,
    place_among,
)
from launch.ranks.place import Place

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}(\.[a-z]{2,5})?", fullmatch=True)


@given(st.lists(NAMES, min_size=1, max_size=9, unique=True), st.none() | st.integers(1024, 65535))
def test_a_list_with_or_without_a_port(names, port):
    text = ",".join(names) + ("" if port is None else f":{port}")
    assert parse_hosts(text) == HostList(tuple(names), port)
    assert parse_hosts(text.replace(",", " , ")) == HostList(tuple(names), port)


@pytest.mark.parametrize(
    ("text", "names", "port"),
    [
        ("10.0.0.1,10.0.0.2:4000", ("10.0.0.1", "10.0.0.2"), 4000),
        ("fe80::1,fe80::2", ("fe80::1", "fe80::2"), None),
        ("[fe80::1],[fe80::2]:4000", ("fe80::1", "fe80::2"), 4000),
        ("[fe80::1]", ("fe80::1",), None),
        ("::1", ("::1",), None),
    ],
)
def test_addresses(text, names, port):
    assert parse_hosts(text) == HostList(names, port)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no machine"),
        ("a,,b", "names no machine"),
        ("a,b,", "names no machine"),
        ("a,b,a", "names a twice"),
        ("a,b:ssh", "'ssh' is no port"),
        ("a,b:22", "'22' is no port"),
        ("a,b:70000", "'70000' is no port"),
        ("a,b c", "'b c' is no host name"),
        ("user@a,b", "'user@a' is no host name"),
    ],
)
def test_mistakes_are_told(text, says):
    with pytest.raises(LaunchError, match="--hosts") as caught:
        parse_hosts(text)
    assert says in str(caught.value)


@given(st.lists(NAMES, min_size=1, max_size=9, unique=True), st.data())
def test_a_machine_finds_itself_by_name_then_by_address(names, data):
    hosts = HostList(tuple(names))
    place = data.draw(st.integers(0, len(names) - 1))
    assert find_node(hosts, own_names={names[place]}, is_own=lambda name: True) == place
    assert find_node(hosts, own_names={"me"} - set(names), is_own=lambda name: name == names[place]) == place
    assert find_node(hosts, node=place, own_names=set(), is_own=lambda name: False) == place


@pytest.mark.parametrize(
    ("own", "node", "says"),
    [
        (set(), None, r"none of them is this machine \(me\)\. Say which it is with --node, from 0 to 2"),
        ({"a", "c"}, None, "a, c are all this machine"),
        ({"a"}, 3, "--node is 3, and --hosts has 3 machines, counted from 0. Use 0 to 2"),
    ],
)
def test_none_and_several_are_errors(own, node, says):
    with pytest.raises(LaunchError, match=says):
        find_node(HostList(("a", "b", "c")), node, own_names={"me"}, is_own=lambda name: name in own)


@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_places_hold_each_rank_once(machines, nproc, data):
    ranks = data.draw(st.integers(1, machines * nproc))
    hosts = HostList(tuple(f"h{number}" for number in range(machines)))
    places = [place_among(Machine(hosts, node), nproc, ranks, Path("run/.key")) for node in range(machines)]
    found = [
        rank for place in places if place for rank in range(place.first_rank, place.first_rank + place.local_ranks)
    ]
    assert found == list(range(ranks))
    assert [place is None for place in places] == [node * nproc >= ranks for node in range(machines)]
    there = [place for place in places if place]
    assert there[0].leads and not any(place.leads for place in there[1:])
    assert len({(place.identity, place.lead_host, place.lead_ports, place.world_size) for place in there}) == 1
    assert place_among(Machine(HostList(("a", "b"), 4000), 1), 1, 2, Path("run/.key")).lead_ports == (4000,)
    assert place_among(Machine(), nproc, ranks, Path("run/.key")) == Place.alone(ranks)


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


def test_this_machine_knows_its_own():
    assert socket.gethostname() in names_of_this_machine()
    assert is_own_address("127.0.0.1")
    assert not is_own_address("192.0.2.1"), "of a network that is for documentation alone"
    assert find_node(HostList(("192.0.2.1", "127.0.0.1"))) == 1
