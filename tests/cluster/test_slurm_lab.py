"""The lab itself: a Slurm with machines of their own, that break as machines do, and of which nothing is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.cluster.slurm_lab import SlurmLab, wait_until

ROOT = Path(__file__).resolve().parents[2]
BOOT_AND_WAIT = """
import sys, time
from pathlib import Path
from tests.cluster.slurm_lab import SlurmLab
with SlurmLab(Path(sys.argv[1]), nodes=1) as lab:
    lab.run("sbatch", "--wrap=sleep 1000").expect()
    lab.await_job(1, "RUNNING")
    Path(sys.argv[1], "up").touch()
    time.sleep(1000)
"""


def processes_of(folder: Path) -> list[int]:
    """Whoever was started with the lab's configuration."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def can_reach(lab: SlurmLab, host: str, node: int | None = None) -> bool:
    """Whether the slurmd of `host` takes a connection within two seconds."""
    knock = f"exec 3<> /dev/tcp/{host}/6818"
    return lab.run("timeout", "2", "bash", "-c", knock, node=node).code == 0


def network() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


def test_each_node_is_a_machine_of_its_own(lab: SlurmLab) -> None:
    script = 'echo "$(hostname) $SLURMD_NODENAME $(hostname -I) $CUDA_VISIBLE_DEVICES"'
    said = lab.run("srun", "--nodes=3", "--ntasks=3", "--gres=gpu:2", "sh", "-c", script).expect().out
    assert sorted(said.splitlines()) == [f"node{i} node{i} 10.0.0.{10 + i}  0,1" for i in (1, 2, 3)]
    assert can_reach(lab, "node3", node=1)
    assert lab.run("touch", "/dev/shm/here", node=1).code == 0
    assert lab.run("test", "-e", "/dev/shm/here", node=2).code == 1


def test_a_cut_cable_separates_and_a_mended_one_does_not(lab: SlurmLab) -> None:
    lab.cut_cable(2)
    assert not can_reach(lab, "node2")
    assert lab.is_on(2)
    lab.mend_cable(2)
    assert can_reach(lab, "node2")


def test_nothing_survives_whoever_booted_it_even_a_kill(lab: SlurmLab, tmp_path: Path) -> None:
    network_before = network()
    folder = tmp_path / "lab"
    folder.mkdir()
    owner = subprocess.Popen([sys.executable, "-c", BOOT_AND_WAIT, str(folder)], cwd=ROOT)
    try:
        wait_until((folder / "up").exists, 60, "a second lab beside the first", lambda: str(owner.poll()))
        assert len(processes_of(folder)) > 8
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    wait_until(lambda: not processes_of(folder), 10, "its processes to end", lambda: str(processes_of(folder)))
    assert network() == network_before
    assert "lab0" not in network()
