"""`--hosts a,b,c[:port]`: machines that each start the same command, and which of them this one is.

No launcher, no ssh: a machine knows itself by its names, or because an address of the list is its own. Opens no
connection.
"""

import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from gptdist.errors import LaunchError


@dataclass(frozen=True)
class HostList:
    """The machines of a run in the order of their nodes; `port`: where they meet on the first, None for the usual
    ones."""

    names: tuple[str, ...]
    port: int | None = None


def parse_hosts(text: str) -> HostList:
    """`a,b,c`, `a,b,c:29500`; an IPv6 address stands in brackets where a port follows. Raises LaunchError."""
    listed, port = _without_port(text)
    names = tuple(name.strip().removeprefix("[").removesuffix("]") for name in listed.split(","))
    if not all(names):
        raise LaunchError(f"--hosts {text!r} names no machine between two commas. Write --hosts a,b,c or a,b,c:PORT.")
    for name in names:
        if any(character.isspace() or character in "/@=" for character in name):
            raise LaunchError(f"--hosts: {name!r} is no host name or address. Write --hosts a,b,c or a,b,c:PORT.")
        if names.count(name) > 1:
            raise LaunchError(f"--hosts names {name} twice, and a machine runs the command once. Leave one out.")
    return HostList(names, port)


def find_node(
    hosts: HostList,
    node: int | None = None,
    own_names: Collection[str] | None = None,
    is_own: "Callable[[str], bool] | None" = None,
) -> int:
    """Which of `hosts` this machine is, counted from 0; `node`: what --node says, which counts.

    `own_names` and `is_own` (of a name or address) are this machine's unless given. Raises LaunchError where none or
    several match.
    """
    last = len(hosts.names) - 1
    if node is not None:
        if not 0 <= node <= last:
            raise LaunchError(
                f"--node is {node}, and --hosts has {last + 1} machines, counted from 0. Use 0 to {last}."
            )
        return node
    mine = names_of_this_machine() if own_names is None else own_names
    # A name that is ours counts before an address: some machines resolve every name to one of their own addresses.
    found = [place for place, name in enumerate(hosts.names) if name in mine]
    if not found:
        check = is_own or is_own_address
        found = [place for place, name in enumerate(hosts.names) if check(name)]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"{', '.join(hosts.names[place] for place in found)} are all this machine"
    else:
        problem = f"none of them is this machine ({', '.join(sorted(mine))})"
    raise LaunchError(
        f"--hosts {','.join(hosts.names)}: {problem}. Say which it is with --node, from 0 to {last}, or mend the list."
    )


def names_of_this_machine() -> set[str]:
    """Its name, with and without the domain."""
    name = socket.gethostname()
    return {name, name.partition(".")[0]}


def is_own_address(name: str) -> bool:
    """Whether `name` stands for an address of one of this machine's interfaces: only such can be bound to."""
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


def _without_port(text: str) -> tuple[str, int | None]:
    head, colon, tail = text.rpartition(":")
    last = head.rpartition(",")[2]
    if not colon or (":" in last and not (last.startswith("[") and last.endswith("]"))):
        return text, None  # no colon, or those of an IPv6 address
    if tail.endswith("]"):
        return text, None
    if not (tail.isdecimal() and 1024 <= int(tail) < 65536):
        raise LaunchError(f"--hosts {text!r}: {tail!r} is no port. Use one from 1024 to 65535, or leave it out.")
    return head, int(tail)
