"""Machines that are none: network namespaces with an address and a host name each, joined by a switch of their own.

Needs root and iproute2. Nothing of it is seen from outside, and nothing of it is left.
"""

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
_NET = "10.97.0"  # seen inside only
_NEW_MOUNTS, _NEW_NAME, _NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000


def why_no_machines() -> str | None:
    """Why there can be none here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        probe = subprocess.run(
            ["ip", "netns", "add", f"probe-{os.getpid()}"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "network namespaces need the ip command of iproute2"
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    _ip("netns", "delete", f"probe-{os.getpid()}")
    return None


class Machines:
    """`count` machines, called machine0, machine1 and so on."""

    def __init__(self, count: int) -> None:
        self.addresses = [f"{_NET}.{1 + number}" for number in range(count)]
        self._tag = f"gptdist-{os.getpid()}"
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Machines":
        hub = self._name("hub")
        try:
            _ip("netns", "add", hub)
            _ip("-n", hub, "link", "add", "switch", "type", "bridge")
            _ip("-n", hub, "link", "set", "switch", "up")
            for number, address in enumerate(self.addresses):
                name = self._name(number)
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", hub)
                _ip("-n", hub, "link", "set", f"port{number}", "master", "switch", "up")
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.kill()
            process.communicate()
        for name in ("hub", *range(len(self.addresses))):
            subprocess.run(["ip", "netns", "delete", self._name(name)], capture_output=True, check=False)

    def start(self, number: int, *words: object, **env: str) -> "subprocess.Popen[str]":
        """`python WORDS` on a machine; its standard output and error are one text."""
        named = 'hostname "$0" && exec "$@"'
        inside = ["ip", "netns", "exec", self._name(number), "unshare", "--uts", "sh", "-c", named, f"machine{number}"]
        process = subprocess.Popen(
            [*inside, sys.executable, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._running.append(process)
        return process

    def enter(self, number: int, hidden: Path | None = None) -> Callable[[], None]:
        """What a process does to be on a machine, for good; there, the folder `hidden` is another, empty one."""
        return partial(_enter, f"/run/netns/{self._name(number)}", f"machine{number}", hidden)

    def _name(self, name: object) -> str:
        return f"{self._tag}-{name}"


def _enter(network: str, name: str, hidden: Path | None) -> None:
    system = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(network, os.O_RDONLY)
    if system.setns(descriptor, _NEW_NETWORK) or system.unshare(_NEW_NAME | (_NEW_MOUNTS if hidden else 0)):
        raise OSError(ctypes.get_errno(), f"cannot enter {network}")
    os.close(descriptor)
    socket.sethostname(name)
    if hidden is not None:
        for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "tmpfs", str(hidden)]):
            subprocess.run(["mount", *words], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
