"""`--hosts a,b,c[:port]`: machines that each start the same command, and which of them this one is.

No launcher, no ssh: a machine knows itself by its names, or because an address of the list is its own. Opens no
connection.
"""

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import LaunchError
from launch.ranks.place import Place

USUAL_PORTS = range(28500, 28516)
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class HostList:
    """The machines of a run in the order of their nodes; `port`: where they meet on the first, None for the usual
    ones."""

    names: tuple[str, ...]
    port: int | None = None


@dataclass(frozen=True)
class Machine:
    """Which machine of a run this is; the only one where there is no list."""

    hosts: HostList | None = None
    node: int = 0

    @property
    def count(self) -> int:
        return 1 if self.hosts is None else len(self.hosts.names)


def find_machine(text: str, node: int | None) -> Machine:
    """This machine in the list that --hosts gives; `node`: what --node says. Other ranks are then reached through the
    interface of its listed address, unless the environment names another. Raises LaunchError."""
    hosts = parse_hosts(text)
    found = find_node(hosts, node)
    interface = interface_of(hosts.names[found])
    if interface not in (None, "lo"):
        # Else gloo takes that of the host name, which on many machines is the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return Machine(hosts, found)


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


def place_among(machine: Machine, nproc: int, ranks: int, key_file: Path) -> Place | None:
    """Where the agent of a machine stands, where `nproc` ranks start on each and the first `ranks` of all train; None
    where all of its own stay idle. `key_file`: in the run's folder, which all machines see."""
    hosts = machine.hosts
    if hosts is None:
        return Place.alone(ranks)
    first = machine.node * nproc
    here = min(nproc, ranks - first)
    if here <= 0:
        return None
    return Place(
        world_size=ranks,
        first_rank=first,
        local_ranks=here,
        local_world_size=here,
        node_rank=machine.node,
        launcher="hosts",
        lead_host=hosts.names[0],
        lead_ports=tuple(USUAL_PORTS) if hosts.port is None else (hosts.port,),
        identity=f"{','.join(hosts.names)} x {nproc}, {key_file.parent}",
        key_file=key_file,
    )


def interface_of(name: str) -> str | None:
    """The network interface of this machine that has the address of the host `name`: through it the others are reached.
    None where it cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, UnicodeError):
        wanted = {entry[4][0] for entry in socket.getaddrinfo(name, 0, socket.AF_INET, socket.SOCK_DGRAM)}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, interface in socket.if_nameindex():
                with suppress(OSError):  # one without an address
                    found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
                    if socket.inet_ntoa(found[20:24]) in wanted:
                        return interface
    return None


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
