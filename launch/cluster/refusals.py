"""Why Slurm will not run what a cluster's file asks for: looked for beforehand, and explained when it refuses.

Pure: settings and what Slurm said; asks nobody.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence

from gptdist.config.problems import Problem, places_of
from gptdist.errors import SlurmRefused
from launch.cluster.settings import WHOLE_NODE, Broken, ClusterConfig
from launch.cluster.slurm import Partition, render_time

REASONS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("invalid partition", ("partition",), "Use a partition that `sinfo` lists."),
    ("invalid account", ("account", "partition"), "`sacctmgr show associations user=$USER` lists them."),
    ("invalid qos", ("qos", "account"), "`sacctmgr show associations user=$USER` lists them."),
    ("time limit is invalid", ("time_limit", "partition", "qos"), "Ask for less: `sinfo` shows the limits."),
    ("generic resource", ("gpus_per_node", "gpu_type"), "`sinfo --format='%P %D %G'` lists the GPUs of nodes."),
    ("invalid feature", ("constraint",), "`sinfo --format='%P %D %f'` lists the features of nodes."),
    ("node count specification", ("nodes", "partition"), "Ask for fewer nodes, or another partition."),
    ("requested node configuration", ("nodes", "gpus_per_node", "cpus_per_rank", "memory"), "Ask for less."),
    ("more processors", ("nodes", "cpus_per_rank", "partition"), "Ask for fewer nodes or cores."),
    ("cpu count", ("cpus_per_rank", "ranks_per_node"), "Ask for fewer cores for each rank."),
    ("memory", ("memory",), "Ask for less, or for `all` of a node."),
    ("not permitted to use this partition", ("partition", "account"), "Use one of your own; `sinfo` lists them."),
    ("permission denied", ("partition", "account"), "Not every user, and not every machine, may submit there."),
    ("reservation", ("sbatch_options",), "`scontrol show reservation` lists them."),
    ("accounting/qos policy", ("account", "qos", "nodes", "time_limit"), "Ask for less, or wait for others to end."),
    ("partition", ("partition",), "Use another partition, or wait until it is up again."),
    ("unrecognized option", ("sbatch_options",), "Leave it out: this Slurm does not know it."),
    ("invalid node name", ("sbatch_options",), "`sinfo --Node` lists the nodes."),
    ("invalid license", ("sbatch_options",), "`scontrol show licenses` lists them."),
)  # fmt: skip
"""What Slurm says, the settings of the cluster's file that it is about, and what to do; the first match counts."""


def explain_refusal(said: str, cluster: ClusterConfig, origins: Mapping[str, str]) -> SlurmRefused:
    """One error of what Slurm said, with the settings that it is likely about, their values and places."""
    for words, names, remedy in REASONS:
        if words in said.lower():
            keys = [f"cluster.{name}" for name in names if name == names[0] or getattr(cluster, name)]
            about = ", ".join(f"{key} ({_value(cluster, key)})" for key in keys)
            return SlurmRefused(
                f"Slurm refuses the job: {said}. This is about {about}. {remedy}  [{places_of(keys, origins)}]"
            )
    return SlurmRefused(f"Slurm refuses the job: {said}. The job's script shows all that was asked for: see --dry-run.")


def misfits(cluster: ClusterConfig, partitions: Sequence[Partition], origins: Mapping[str, str]) -> list[Problem]:
    """What no node or partition of the cluster can give; Slurm itself might let such a job wait for ever."""
    return [Problem(text, places_of(keys, origins)) for text, keys in _misfits(cluster, partitions)]


def closed(cluster: ClusterConfig, partitions: Sequence[Partition]) -> list[str]:
    """What to warn of where the partition takes jobs but starts none."""
    name = next((part.name for part in _kinds(cluster, partitions) if not part.is_up), None)
    return [f"partition {name} is not up: the job will wait until it is (`sinfo` shows it)."] if name else []


def _kinds(cluster: ClusterConfig, partitions: Sequence[Partition]) -> list[Partition]:
    """The kinds of nodes in the partition that is asked for."""
    if cluster.partition is None:
        return [part for part in partitions if part.is_default]
    return [part for part in partitions if part.name == cluster.partition]


def _misfits(cluster: ClusterConfig, partitions: Sequence[Partition]) -> Iterator[Broken]:
    kinds = _kinds(cluster, partitions)
    if not kinds:
        yield _no_partition(cluster, partitions)
        return
    name = kinds[0].name
    limit = max((kind.time_limit_seconds or float("inf") for kind in kinds), default=float("inf"))
    if cluster.time_limit and cluster.time_limit > limit:
        text = (
            f"cluster.time_limit ({render_time(cluster.time_limit)}) is above what partition {name} allows "
            f"({render_time(limit)}). Use at most that: a run goes on in a new allocation until its last step."
        )
        yield text, ("cluster.time_limit", "cluster.partition")
    most = max((kind.max_nodes for kind in kinds if kind.max_nodes), default=None)
    if most is not None and cluster.nodes > most:
        text = f"cluster.nodes ({cluster.nodes}) is above the {most} that partition {name} gives one job. Use fewer."
        yield text, ("cluster.nodes", "cluster.partition")
    yield from _too_much_of_a_node(cluster, name, kinds)


def _no_partition(cluster: ClusterConfig, partitions: Sequence[Partition]) -> Broken:
    names = list(dict.fromkeys(part.name for part in partitions))
    there_are = f"There are: {', '.join(names)}." if names else "`sinfo` lists none that you may see."
    if cluster.partition is None:
        return f"cluster.partition is not set, and the cluster has no default. Set it. {there_are}", (
            "cluster.partition",
        )
    near = difflib.get_close_matches(cluster.partition, names, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"cluster.partition ({cluster.partition}) does not exist.{meant} {there_are}", ("cluster.partition",)


def _too_much_of_a_node(cluster: ClusterConfig, name: str, kinds: Sequence[Partition]) -> Iterator[Broken]:
    """Fewer nodes fit than are asked for: because of the first of these settings that leaves too few."""
    cpus = cluster.ranks_of_node * (cluster.cpus_per_rank or 1)
    size = _bytes(cluster)
    needs = (
        ("cluster.nodes", "", lambda kind: True),
        (
            "cluster.gpus_per_node",
            f"{cluster.gpus_per_node} GPUs{f' {cluster.gpu_type}' if cluster.gpu_type else ''}",
            lambda kind: _gpus(kind, cluster.gpu_type) >= cluster.gpus_per_node,
        ),
        ("cluster.cpus_per_rank", f"{cpus} cores", lambda kind: kind.cpus >= cpus),
        ("cluster.memory", f"{size / 2**30:.4g} GiB", lambda kind: kind.memory_bytes >= size),
    )
    left, total = list(kinds), sum(kind.nodes for kind in kinds)
    asked: list[str] = []
    for key, words, fits in needs:
        left = [kind for kind in left if fits(kind)]
        asked += [words] if words and not words.startswith("0 ") else []
        nodes = sum(kind.nodes for kind in left)
        if nodes < cluster.nodes:
            have = f", of which {nodes or 'none'} have {' and '.join(asked)}" if asked else ""
            offers = ", ".join(sorted({_offer(kind) for kind in kinds}))
            text = (
                f"cluster.nodes is {cluster.nodes}, and partition {name} has {total}{have}. Ask for less"
                f"{'' if key == 'cluster.nodes' else f' by {key}'}, or another partition. Its nodes: {offers}."
            )
            yield text, tuple(dict.fromkeys((key, "cluster.nodes", "cluster.partition")))
            return


def _offer(kind: Partition) -> str:
    gpus = "".join(f", {count} GPUs{f' {name}' if name else ''}" for name, count in sorted(kind.gpus.items()))
    return f"{kind.nodes} of {kind.cpus} cores, {kind.memory_bytes / 2**30:.4g} GiB{gpus}"


def _gpus(kind: Partition, gpu_type: str | None) -> int:
    return kind.gpus.get(gpu_type, 0) if gpu_type else sum(kind.gpus.values())


def _bytes(cluster: ClusterConfig) -> int:
    return 0 if cluster.memory in (None, WHOLE_NODE) else int(cluster.memory or 0)


def _value(cluster: ClusterConfig, key: str) -> str:
    value = getattr(cluster, key.removeprefix("cluster."))
    if not value:
        return "not set"
    if key == "cluster.time_limit":
        return render_time(value)
    if key == "cluster.memory" and value != WHOLE_NODE:
        return f"{value / 2**30:.4g} GiB"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
