"""An agent from its beginning to its end: warm, linked with the lead or leading itself, its signals caught.

The one way in which ranks are started. Knows which parts an agent is made of; each part knows the rest.
"""

import os
import resource
import selectors
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from gptdist.errors import EXIT_RESUMABLE, LaunchError
from launch.ranks.agent import Agent, LeadLink, Meeting, Work
from launch.ranks.forked_rank import Target
from launch.ranks.handshake import LeadsHandshake
from launch.ranks.lead import Lead, Supervision
from launch.ranks.lead_link import LeadAway, LeadHere, find_lead
from launch.ranks.messages import Hello
from launch.ranks.place import Place
from launch.ranks.reception import Reception
from launch.ranks.verdict import EXIT_INTERRUPTED, Verdict
from launch.ranks.warm import Stopped, catch_signals, environment, threads_of_a_rank
from launch.ranks.warm import preload as preload_modules
from launch.rendezvous import LOOPBACK, open_listener

_OWN_DESCRIPTORS = 1024
"""More than a lead needs besides its connections."""


def run_agent(
    place: Place,
    target: str | Target,
    payload: Any = None,
    *,
    preload: Sequence[str] = (),
    port: int = 0,
    supervision: Supervision | None = None,
    refusal: Verdict | None = None,
    join_seconds: float = 600.0,
    limit_seconds: float | None = None,
    private_fds: Sequence[int] = (),
) -> Verdict:
    """Run `target(world, payload)` on the ranks at `place`, and lead all others where that is its part; how the run
    ended, which is not shown.

    `preload`: modules to import before ranks are forked. `port`: where ranks meet, 0 for a free one. `supervision`:
    where ranks that fail are to be replaced, on the lead. `refusal`: why the lead will start none. `join_seconds`: for
    all agents to come. `limit_seconds`: for the whole run. `private_fds`: what ranks must not keep open. Call it from
    the main thread. Raises LaunchError.
    """
    threads = threads_of_a_rank(os.environ, place.local_ranks, place.local_world_size)
    with environment(threads), catch_signals() as signals, selectors.DefaultSelector() as selector:
        try:
            preload_modules(preload)
            hello = _hello(place)
            meeting = Meeting(place, port)
            link: LeadLink
            if place.leads:
                link = LeadHere(hello)
                terms = (supervision, refusal, join_seconds, limit_seconds)
                lead = Lead(place.world_size, meeting.open, link.post, *terms)
                link.appoint(lead, None if place.is_alone else _receive(place, selector, lead))
            else:
                channel = find_lead(place, hello, lambda: _read_key(place), join_seconds)
                link = LeadAway(selector, channel, place.lead_host)
        except Stopped as stop:
            return Verdict(EXIT_INTERRUPTED if stop.number == signal.SIGINT else EXIT_RESUMABLE)
        signals.raises = False
        return Agent(place, Work(target, payload, threads), signals, selector, link, meeting, private_fds).run()


def _receive(place: Place, selector: selectors.BaseSelector, lead: Lead) -> Reception:
    key = _read_key(place)
    _allow_connections(place.world_size)
    return Reception(selector, _listen(place), lead, lambda: LeadsHandshake(place.identity, key))


def _allow_connections(agents: int) -> None:
    """So many open at once, as far as this user may: the usual limit of 1024 is one that any process may raise."""
    wanted = agents + _OWN_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _listen(place: Place) -> socket.socket:
    """At the first of the lead's ports that is free: agents look at all of them."""
    for port in place.lead_ports:
        with suppress(LaunchError):
            return open_listener(LOOPBACK if place.is_one_node else "", port)
    raise LaunchError(
        f"None of the ports {place.lead_ports[0]} to {place.lead_ports[-1]} is free on this host, so no other can join "
        "it. End what uses them, or set launch.port to another."
    )


def _read_key(place: Place) -> bytes:
    """The run's secret; empty where there is none."""
    if place.key_file is None:
        return b""
    with suppress(FileNotFoundError):
        return place.key_file.read_bytes().strip()
    return b""


def _hello(place: Place) -> Hello:
    return Hello(first_rank=place.first_rank, ranks=place.local_ranks, host=place.host[:255], pid=os.getpid())
