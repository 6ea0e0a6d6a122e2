"""A real Slurm of several nodes on this machine, for tests: boots it, runs commands on it, breaks it.

Knows namespaces, Slurm's own commands and the scripts in `lab/`; nothing of gptdist. Nothing outlives the process that
booted it: the lab's first process dies with it, and takes all others and the network along.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SCRIPTS = Path(__file__).resolve().parent / "lab"
BOOT_SECONDS = 30.0
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("--pid", "--net", "--mount", "--ipc", "--uts")


def why_not() -> str | None:
    """Why there can be no lab on this machine; None where there can."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root, for network namespaces"
    missing = [name for name in NEEDED if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"a Slurm of its own needs {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    trial = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "sh", "-c"]
    trial += ["mount -t proc proc /proc && ip link set lo up && ip link add name lab0 type bridge"]
    tried = subprocess.run(trial, capture_output=True, text=True, check=False, timeout=20)
    return f"a Slurm of its own needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Said:
    """How a command on the lab ended."""

    code: int
    out: str
    err: str

    def expect(self, code: int = 0) -> "Said":
        """Itself, if it ended with `code`."""
        if self.code != code:
            raise AssertionError(f"exit code {self.code}, not {code}\n{self.out[-4000:]}\n{self.err[-6000:]}")
        return self


class SlurmLab:
    """`folder` must be new and empty; `extra` goes into slurm.conf. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        nodes: int = 3,
        cpus: int = 4,
        gpus: int = 2,
        extra: str = "",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.nodes = nodes
        self._size = (str(nodes), str(cpus), str(gpus))
        self._extra = extra
        self._env = {"HOME": os.environ.get("HOME", "/root"), "PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8"}
        self._env |= {**(env or {}), "SLURM_CONF": str(folder / "slurm.conf")}
        self._root: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "SlurmLab":
        (self.folder / "extra.conf").write_text(self._extra)
        boot = ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child"]
        boot += [str(SCRIPTS / "boot.sh"), str(self.folder), *self._size]
        output = self.folder / "boot.out"
        with output.open("wb") as file:
            self._root = subprocess.Popen(
                boot, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._env, start_new_session=True
            )
        root = self._root
        try:
            wait_until(
                lambda: "ready" in output.read_text().split() or root.poll() is not None,
                BOOT_SECONDS,
                "the lab to boot",
            )
            if root.poll() is not None:
                raise RuntimeError(f"the lab ended with {root.poll()}")
        except BaseException as error:
            self.close()
            error.add_note(output.read_text() + self.log("slurmctld") + self.log("slurmd-node1"))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the lab, and wait until none is left."""
        if self._root is None:
            return
        # The first process goes when all others have gone, and `unshare` after it.
        self._kill(self.folder / "pid")
        try:
            self._root.wait(10)
        finally:
            self._root.kill()
            self._root.wait()
            self._root = None

    # -- commands ----------------------------------------------------------------------------------------------------

    def start(
        self,
        *words: object,
        node: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | None = subprocess.PIPE,
    ) -> "subprocess.Popen[str]":
        """A command in the background, on the login node, or on `node`. It dies with this process."""
        enter = ["nsenter", "--target", (self.folder / "pid").read_text().strip(), *_NAMESPACES]
        if node is not None:
            inner = (self.folder / f"node{node}" / "pid").read_text().strip()
            enter += ["nsenter", "--target", inner, *_NAMESPACES]
        # Entering a mount namespace forgets the working directory.
        enter += ["setpriv", "--pdeathsig", "KILL", "env", f"--chdir={cwd or self.folder}", *map(str, words)]
        return subprocess.Popen(
            enter,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE if stdout is not None else None,
            text=True,
            env={**self._env, **(env or {})},
        )

    def run(
        self,
        *words: object,
        node: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float = 60.0,
    ) -> Said:
        """A command to its end."""
        process = self.start(*words, node=node, cwd=cwd, env=env)
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return Said(process.returncode, out, err)

    # -- Slurm -------------------------------------------------------------------------------------------------------

    def job(self, job_id: str | int) -> dict[str, str]:
        """What Slurm knows of a job, by the names of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).expect().out
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def await_job(self, job_id: str | int, *states: str, timeout_seconds: float = 60.0, restarts: int = 0) -> str:
        """Wait until the job is in one of `states`, after at least so many restarts."""

        def settled() -> bool:
            job = self.job(job_id)
            return job["JobState"] in states and int(job["Restarts"]) >= restarts

        wait_until(settled, timeout_seconds, f"job {job_id} to be {' or '.join(states)}", lambda: str(self.job(job_id)))
        return self.job(job_id)["JobState"]

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within it no job starts; those that run go on."""
        self.run("scontrol", "update", "PartitionName=main", "State=DOWN").expect()
        try:
            yield
        finally:
            self.run("scontrol", "update", "PartitionName=main", "State=UP").expect()

    def hosts(self, job_id: str | int) -> list[str]:
        """The nodes of a job, in order."""
        return self.run("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).expect().out.split()

    def await_nodes(self, count: int) -> None:
        """Wait until so many are idle or at work."""

        def up() -> bool:
            words = ("--noheader", "--responding", "--states=idle,mix,alloc", "--format=%D")
            return sum(map(int, self.run("sinfo", *words).out.split())) == count

        wait_until(up, 60.0, f"{count} nodes", lambda: self.run("sinfo", "-N", "-l").out)

    def clear(self) -> None:
        """No jobs, all nodes up."""
        self.run("scancel", "--user=root", "--full", "--signal=KILL")
        self.run("scancel", "--user=root")
        for node in range(1, self.nodes + 1):
            self.mend_cable(node)
            if not self.is_on(node):
                self.start_node(node)

        def quiet() -> bool:
            idle = self.run("sinfo", "--noheader", "--responding", "--states=idle", "--format=%D").out.split()
            return sum(map(int, idle)) == self.nodes and not self.run("squeue", "--noheader").out

        wait_until(quiet, 60.0, "a lab without jobs", lambda: self.run("sinfo", "-N", "-l").out)

    def log(self, name: str) -> str:
        """The end of a daemon's log: `slurmctld`, `slurmd-node1`."""
        path = self.folder / "log" / f"{name}.log"
        return "".join(path.read_text(errors="replace").splitlines(keepends=True)[-30:]) if path.exists() else ""

    # -- trouble -----------------------------------------------------------------------------------------------------

    def is_on(self, node: int) -> bool:
        """Whether the node's first process lives."""
        pid = self.folder / f"node{node}" / "pid"
        return pid.exists() and self.run("test", "-d", f"/proc/{pid.read_text().strip()}").code == 0

    def kill_node(self, node: int) -> None:
        """The power fails: slurmd, the steps and all processes of its jobs end at once."""
        self.run("kill", "-KILL", (self.folder / f"node{node}" / "pid").read_text().strip()).expect()
        wait_until(lambda: not self.is_on(node), 10.0, f"node{node} to be off")

    def start_node(self, node: int) -> None:
        """Switch it on again; Slurm needs a second or two to see it."""
        self.run(SCRIPTS / "node.sh", self.folder, node).expect()

    def cut_cable(self, node: int) -> None:
        """Its processes live on, and reach nobody."""
        self.run("ip", "link", "set", f"cable{node}", "down").expect()

    def mend_cable(self, node: int) -> None:
        self.run("ip", "link", "set", f"cable{node}", "up").expect()

    def kill_controller(self) -> None:
        """Nobody answers any more; jobs go on."""
        self.run("sh", "-c", "kill -KILL $(cat /run/slurmctld.pid)").expect()

    def start_controller(self) -> None:
        """It knows its jobs again."""
        self.run("slurmctld").expect()
        wait_until(
            lambda: self.run("scontrol", "ping").code == 0, 20.0, "the controller", lambda: self.log("slurmctld")
        )

    @staticmethod
    def _kill(pid_file: Path) -> None:
        try:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return


def wait_until(
    happened: Callable[[], bool],
    timeout_seconds: float,
    what: str,
    state: Callable[[], str] = lambda: "",
    poll_seconds: float = 0.1,
) -> None:
    """Poll until `happened()`. Raises TimeoutError, with `state()`."""
    deadline = time.monotonic() + timeout_seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_seconds:.0f} s in vain for {what}\n{state()}")
        time.sleep(poll_seconds)
