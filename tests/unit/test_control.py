"""The control channel: lines over a socket, and the handshake before them."""

import json
import resource
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.world import World
from launch.outer import CONTROL_PORTS, find_allocation, find_place, find_world
from launch.ranks.channel import Channel, Closed
from launch.ranks.handshake import LONGEST_LINE, AgentsHandshake, LeadsHandshake, Refused
from launch.ranks.lead_link import LeadAway, find_lead
from launch.ranks.messages import Hello, Start, encode
from launch.ranks.place import Place
from launch.ranks.supervise import _allow_connections, _hello
from tests.unit.test_rendezvous import places, srun_env

HELLO = Hello(first_rank=2, ranks=2, host="node1", pid=7)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        channel = Channel(listener.accept()[0], longest_line=1000)
    yield channel, peer
    channel.close()
    peer.close()


def received(channel: Channel) -> list[bytes]:
    while not (lines := channel.receive()):
        pass
    return lines


# -- lines -------------------------------------------------------------------------------------------------------------


def test_lines_arrive_whole_however_they_were_cut(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    assert channel.receive() == []
    for piece in (b"on", b"e\ntw", b"o\n\nthr"):
        peer.sendall(piece)
    lines: list[bytes] = []
    while len(lines) < 3:
        lines += channel.receive()
    assert lines == [b"one", b"two", b""]
    peer.sendall(b"ee\n")
    assert received(channel) == [b"three"]


def test_lines_that_were_not_asked_for_stay(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(b"one\ntwo\n\nthree\nfo")
    while not (lines := channel.receive(most=1)):
        pass
    assert lines == [b"one"]
    peer.close()
    assert channel.receive(most=2) == [b"two", b""]
    assert channel.receive() == [b"three"]
    with pytest.raises(Closed):
        received(channel)


def test_the_last_words_are_heard_before_the_end(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(b"last words\nand half a")
    peer.close()
    assert received(channel) == [b"last words"]
    with pytest.raises(Closed, match="was closed"):
        received(channel)


@pytest.mark.parametrize("sent", [b"x" * 1001, b"short\n" + b"x" * 1001 + b"\n", b"x" * 1_000_000])
def test_a_line_has_an_end(sent: bytes, pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.setblocking(False)
    with pytest.raises(Closed, match="more than 1,000 bytes"):
        while True:
            with suppress(BlockingIOError):
                sent = sent[peer.send(sent) :] if sent else b""
            channel.receive()


def test_a_peer_that_takes_nothing_is_given_up(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    with pytest.raises(Closed, match="takes nothing"):
        for _ in range(100):
            channel.send(b"x" * (1 << 20))


def test_a_peer_that_takes_its_time_gets_everything(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    sent = b"".join(b"%d\n" % number * 1000 for number in range(2000))
    channel.send(sent)
    assert not channel.flush()
    found = bytearray()
    while len(found) < len(sent):
        found += peer.recv(1 << 20)
        channel.flush()
    assert bytes(found) == sent


def test_a_peer_that_has_gone(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.close()
    with pytest.raises(Closed):
        for _ in range(100):
            channel.send(b"x" * 1000)


# -- the handshake -----------------------------------------------------------------------------------------------------


def meet(leads: LeadsHandshake, agents: AgentsHandshake) -> Hello:
    hello, answer = leads.check(agents.introduce(leads.greeting()))
    agents.check(answer)
    return hello


@pytest.mark.parametrize("key", [b"", b"secret"])
def test_those_who_belong_together_find_so(key: bytes) -> None:
    leads, agents = LeadsHandshake("job 1", key), AgentsHandshake("job 1", key, HELLO)
    said = agents.introduce(leads.greeting())
    assert key == b"" or key not in said + leads.greeting()
    assert max(map(len, (leads.greeting(), said))) < LONGEST_LINE
    assert meet(leads, agents) == HELLO


@pytest.mark.parametrize(
    ("identity", "key", "why"), [("job 2", b"secret", "another start"), ("job 1", b"", "key"), ("job 1", b"x", "key")]
)
def test_those_who_do_not_are_refused(identity: str, key: bytes, why: str) -> None:
    leads = LeadsHandshake("job 1", b"secret")
    with pytest.raises(Refused, match=why) as refused:
        meet(leads, AgentsHandshake(identity, key, HELLO))
    agents = AgentsHandshake("job 1", b"secret", HELLO)
    agents.introduce(leads.greeting())
    with pytest.raises(Refused, match=why):
        agents.check(leads.refuse(str(refused.value)))


def test_an_order_in_the_same_breath_as_the_answer_is_heard() -> None:
    """The last agent to come is the one that all waited for: its orders are right behind."""
    order = Start(generation=0, master_address="127.0.0.1", master_port=1234)

    def lead(listener: socket.socket) -> None:
        handshake = LeadsHandshake("local", b"key")
        with listener.accept()[0] as agent, agent.makefile("rb") as said:
            agent.sendall(handshake.greeting())
            _, answer = handshake.check(said.readline())
            agent.sendall(answer + encode(order))
            said.read()

    with socket.create_server(("127.0.0.1", 0)) as listener, selectors.DefaultSelector() as selector:
        answering = threading.Thread(target=lead, args=(listener,))
        answering.start()
        port = listener.getsockname()[1]
        place = Place(world_size=4, first_rank=2, local_ranks=2, lead_ports=(port,), identity="local")
        link = LeadAway(selector, find_lead(place, HELLO, lambda: b"key", 5.0), "lead")
        orders = link.turn()
        deadline = time.monotonic() + 5
        while not orders and time.monotonic() < deadline:
            for key, _ in selector.select(0.1):
                key.data()
            orders = link.turn()
        link.close()
        answering.join()
    assert orders == [order]


def test_a_lead_without_the_key_is_none() -> None:
    agents = AgentsHandshake("job 1", b"secret", HELLO)
    false_lead = LeadsHandshake("job 1", b"")
    said = json.loads(agents.introduce(false_lead.greeting()))
    with pytest.raises(Refused, match="another key"):
        agents.check(json.dumps({"proof": said["proof"], "refused": None}).encode())


def test_words_of_an_earlier_handshake_prove_nothing() -> None:
    overheard = AgentsHandshake("job 1", b"secret", HELLO).introduce(LeadsHandshake("job 1", b"secret").greeting())
    with pytest.raises(Refused, match="another key"):
        LeadsHandshake("job 1", b"secret").check(overheard)


def test_a_proof_is_of_all_that_was_said() -> None:
    leads = LeadsHandshake("job 1", b"secret")
    said = json.loads(AgentsHandshake("job 1", b"secret", HELLO).introduce(leads.greeting()))
    said["hello"]["first_rank"] = 0
    with pytest.raises(Refused, match="another key"):
        leads.check(json.dumps(said).encode())


def test_another_version_is_told_apart() -> None:
    greeting = json.loads(LeadsHandshake("job 1", b"").greeting())
    with pytest.raises(Refused, match="another version"):
        AgentsHandshake("job 1", b"", HELLO).introduce(json.dumps({**greeting, "gptdist_control": 99}).encode())


@given(st.binary())
def test_nonsense_is_refused(line: bytes) -> None:
    leads, agents = LeadsHandshake("job 1", b""), AgentsHandshake("job 1", b"", HELLO)
    for hear in (leads.check, agents.introduce, agents.check):
        with pytest.raises(Refused):
            hear(line)


# -- who stands where --------------------------------------------------------------------------------------------------


def test_each_task_of_a_step_is_an_agent() -> None:
    nodes = [2, 2, 1]
    tasks = [srun_env(nodes, *place) for place in places(nodes)]
    found = []
    for env in tasks:
        world = find_world(env)
        assert world is not None
        place = find_place(env, world, 0, Path("key"))
        assert place is not None
        assert (place.first_rank, place.first_local_rank) == (world.global_rank, world.local_rank)
        assert (place.local_ranks, place.world_size, place.local_world_size) == (1, 5, world.local_world_size)
        assert place.leads == (world.global_rank == 0) and not place.is_alone and not place.is_one_node
        found.append(place)
    assert len({(place.lead_host, place.lead_ports, place.identity) for place in found}) == 1
    assert found[0].lead_host == "gpu03" and len(found[0].lead_ports) == CONTROL_PORTS


def test_a_machine_goes_by_the_name_that_the_scheduler_excludes_it_by() -> None:
    env = {**srun_env([1, 1], 1, 1, 0), "SLURMD_NODENAME": "gpu04"}
    world = find_world(env)
    assert world is not None and world.host == "gpu04"
    place = find_place(env, world, 0, Path("key"))
    assert place is not None and place.host == "gpu04"
    assert place.world(0, Start(generation=0, master_address="gpu03", master_port=5000), -1).host == "gpu04"
    assert _hello(place).host == "gpu04"
    own = find_world({name: value for name, value in env.items() if name != "SLURMD_NODENAME"})
    assert own is not None and own.host == socket.gethostname()


def test_a_lead_of_thousands_may_open_a_connection_to_each() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        _allow_connections(2000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(3024, limits[1]), limits[1])
        _allow_connections(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(3024, limits[1]), limits[1]), "never less"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_starts_of_a_job_are_told_apart() -> None:
    env = srun_env([2], 0, 0, 0)
    world = find_world(env)
    assert world is not None
    identities = set()
    for change in ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "78"}):
        place = find_place({**env, **change}, world, 0, Path("key"))
        assert place is not None
        identities.add(place.identity)
    assert len(identities) == 4
    allocation = find_allocation({**env, "SLURM_RESTART_COUNT": "3"})
    assert (allocation.name, allocation.restart, allocation.can_requeue) == ("slurm 77", 3, True)


def test_a_port_that_was_set_is_where_ranks_meet_so_agents_meet_above_it() -> None:
    env = srun_env([2], 0, 0, 0)
    world = find_world(env, port=5000)
    assert world is not None
    place = find_place(env, world, 5000, Path("key"))
    assert place is not None and place.lead_ports == tuple(range(5001, 5001 + CONTROL_PORTS))


def test_other_launchers_start_ranks_themselves() -> None:
    assert find_place({}, World(launcher="torchrun"), 0, Path("key")) is None
