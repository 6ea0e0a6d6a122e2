"""Slurm's shorthand for hosts and tasks, read without calling Slurm: `node[03-05,9],gpu1` and `2(x3),1`.

Pure text and integers; knows no environment variable and starts no process.
"""

import re

from gptdist.errors import LaunchError

_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def first_host(node_list: str) -> str:
    """The first host of a Slurm host list: `node[03-05,9]-ib,gpu1` gives `node03-ib`. Raises LaunchError."""
    first = re.fullmatch(r"((?:[^\[\],]|\[[^\[\]]*\])*)(,.*)?", node_list.strip())
    host = re.sub(r"\[([^\[\],-]+)[^\[\]]*\]", r"\1", first.group(1) if first else "")
    if not host or not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        raise LaunchError(
            f"Slurm's node list {node_list!r} has no host that can be read. It should look like node[01-04,9] or "
            "node1,node2."
        )
    return host


def tasks_per_node(text: str) -> list[int]:
    """Tasks on each node, in Slurm's order: `2(x3),1` gives [2, 2, 2, 1]. Raises LaunchError."""
    tasks: list[int] = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part.strip())
        if match is None:
            raise LaunchError(
                f"Slurm's tasks per node {text!r} cannot be read at {part!r}. It should look like 2(x3),1."
            )
        tasks += [int(match.group(1))] * int(match.group(2) or 1)
    return tasks
