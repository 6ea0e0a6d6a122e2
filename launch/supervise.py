"""An agent from its beginning to its end: warm, linked with the lead or leading itself, its signals caught.

The one way in which ranks are started. Knows which parts an agent is made of; each part knows the rest.
"""

import os
import selectors
import signal
import socket
from collections.abc import Sequence
from typing import Any

from gptdist.errors import EXIT_RESUMABLE
from launch.agent import Agent, Meeting, Work
from launch.forked_rank import Target
from launch.lead import Lead, Supervision
from launch.lead_link import LeadHere
from launch.messages import Hello
from launch.place import Place
from launch.verdict import EXIT_INTERRUPTED, Verdict
from launch.warm import Stopped, catch_signals, environment, threads_of_a_rank
from launch.warm import preload as preload_modules


def run_agent(
    place: Place,
    target: str | Target,
    payload: Any = None,
    *,
    preload: Sequence[str] = (),
    port: int = 0,
    supervision: Supervision | None = None,
    join_seconds: float = 600.0,
    limit_seconds: float | None = None,
    private_fds: Sequence[int] = (),
) -> Verdict:
    """Run `target(world, payload)` on the ranks at `place`, and lead all others where that is its part; how the run
    ended, which is not shown.

    `preload`: modules to import before ranks are forked. `port`: where ranks meet, 0 for a free one. `supervision`:
    where ranks that fail are to be replaced, on the lead. `join_seconds`: for all agents to come. `limit_seconds`: for
    the whole run. `private_fds`: what ranks must not keep open. Call it from the main thread. Raises LaunchError.
    """
    threads = threads_of_a_rank(os.environ, place.local_ranks, place.local_world_size)
    with environment(threads), catch_signals() as signals, selectors.DefaultSelector() as selector:
        try:
            preload_modules(preload)
        except Stopped as stop:
            return Verdict(EXIT_INTERRUPTED if stop.number == signal.SIGINT else EXIT_RESUMABLE)
        signals.raises = False
        meeting = Meeting(place, port)
        link = LeadHere(place.first_rank)
        lead = Lead(place.world_size, meeting.open, link.post, supervision, join_seconds, limit_seconds)
        link.appoint(lead, _hello(place))
        work = Work(target, payload, threads)
        return Agent(place, work, signals, selector, link, meeting, private_fds).run()


def _hello(place: Place) -> Hello:
    return Hello(first_rank=place.first_rank, ranks=place.local_ranks, host=socket.gethostname()[:255], pid=os.getpid())
