"""What is said of a Slurm cluster in a file of `configs/clusters/`: its settings, their rules, and reading it.

Errors are those of run configs: all at once, with file, line and what to change. Must not know how any of it is told to
Slurm (`job_script.py` does), and never shows a value that could be secret.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from gptdist.config.explain import explain
from gptdist.config.layers import read_layers
from gptdist.config.load import origins_of
from gptdist.config.problems import Problem, places_of, raise_problems
from gptdist.config.schema import Schema
from gptdist.config.sections import NonNegativeInt, PositiveInt, Section
from gptdist.config.units import Duration, parse_bytes, parse_duration
from launch.cluster.secret_values import without_secret_overrides, without_secrets

WHOLE_NODE = "all"
LONGEST_WARNING_SECONDS = 65535
"""What Slurm's --signal takes at most."""
OURS = (
    *("account", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclusive", "gres", "job-name", "mem"),
    *("nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "no-requeue"),
    *("signal", "time", "wrap", "export", "array"),
)
"""Options of sbatch that a cluster file has settings for, or that a run cannot have another way."""

_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


def _parse_time_limit(value: Any) -> float:
    match = _SLURM_TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        try:
            return parse_duration(value)
        except ValueError as error:
            raise ValueError('must be a time such as "12h", "2d" or Slurm\'s 1-12:00:00, more than 0') from error
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return parse_duration(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _parse_memory(value: Any) -> Any:
    if value == WHOLE_NODE:
        return value
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "{WHOLE_NODE}"') from error
    if size < 2**20:
        raise ValueError(f'must be at least 1MiB, or "{WHOLE_NODE}"')
    return size


def _matching(pattern: str, rule: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {rule}")
        return value

    return AfterValidator(check)


Name = Annotated[str, _matching(r"[A-Za-z0-9_.,+-]+", "a name of Slurm's: letters, digits and . _ + -")]
Constraint = Annotated[str, _matching(r"[A-Za-z0-9_.,&|*()\[\]+-]+", "features of Slurm's, such as h100 or a100|h100")]
OneLine = Annotated[str, _matching(r"[^\0-\x1f\x7f]+", "one line of text")]
NoSeparator = Annotated[str, _matching(r"[^\0-\x1f\x7f:,]+", "a path without colons and commas")]
Mount = Annotated[
    str, _matching(r"/[^\0-\x1f\x7f:,]*(:[^\0-\x1f\x7f:,]+){0,2}", "/FOLDER, /FOLDER:/INSIDE or /FOLDER:/INSIDE:ro")
]
SbatchOption = Annotated[
    str,
    _matching(r"--[a-z][a-z0-9-]*(=[^\0-\x1f\x7f]+)?", "one long option of sbatch, such as --reservation=NAME"),
]
TimeLimit = Annotated[float, BeforeValidator(_parse_time_limit)]
Memory = Annotated[int | Literal["all"], BeforeValidator(_parse_memory)]


class ContainerConfig(Section):
    """The image that ranks run in. The run's folder and the current folder are always mounted."""

    kind: Literal["pyxis", "apptainer"] = Field(description="pyxis: srun --container-image; apptainer: apptainer exec.")
    image: OneLine = Field(description="File or URL of the image.")
    mounts: tuple[Mount, ...] = Field((), description="More folders: /FOLDER, /FOLDER:/INSIDE or /FOLDER:/INSIDE:ro.")
    python: OneLine = Field("python3", description="Interpreter in the image, with what gptdist needs.")
    options: tuple[OneLine, ...] = Field((), description="More options of srun (pyxis) or of apptainer exec.")


class ClusterConfig(Section):
    """One cluster, and how much of it a run asks for."""

    partition: Name | None = Field(None, description="null: the cluster's default.")
    account: Name | None = Field(None, description="Who pays; null: the user's default.")
    qos: Name | None = Field(None, description="Quality of service; null: the default.")
    constraint: Constraint | None = Field(None, description="Features that nodes must have.")
    nodes: PositiveInt = Field(1, description="Nodes of a run.")
    exclusive: bool = Field(False, description="Share the nodes with no other job.")
    gpus_per_node: NonNegativeInt = Field(0, description="GPUs of a node; each is one rank. 0: ranks run on CPUs.")
    gpu_type: Name | None = Field(None, description="Of several kinds in a partition: h100, a100.")
    ranks_per_node: PositiveInt | None = Field(None, description="Ranks on a node; null: one for each GPU.")
    cpus_per_rank: PositiveInt | None = Field(None, description="Cores for each rank; null: Slurm's default, often 1.")
    memory: Memory | None = Field(None, description="Of a node: 500GiB, or all; null: Slurm's default.")
    time_limit: TimeLimit | None = Field(None, description="12h, 2d or 1-12:00:00; null: the partition's default.")
    signal_before_limit: Duration = Field(
        180.0, description="Time before the limit at which ranks are asked to save and stop, if they did not by then."
    )
    sbatch_options: tuple[SbatchOption, ...] = Field((), description="More lines for sbatch: --reservation=NAME.")
    modules: tuple[OneLine, ...] = Field((), description="Environment modules to load, in this order.")
    venv: NoSeparator | None = Field(None, description="Virtual or conda environment to use; null: that of submit.")
    container: ContainerConfig | None = Field(None, description="Image to run ranks in, instead of a venv.")
    env: dict[str, OneLine] = Field(
        default_factory=dict, description="Environment variables: of NCCL, of the network. No secrets."
    )
    secrets_file: OneLine | None = Field(
        None, description="File of lines NAME=VALUE, in shell's notation and with mode 0600, that jobs read."
    )
    scratch: NoSeparator | None = Field(
        None, description="Folder on each node's own disk for temporary files; %j: the job's id, %u: the user."
    )
    mpi: Name = Field("none", description="srun --mpi: none, unless the image or site needs pmi2 or pmix.")

    @property
    def ranks_of_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node


class ClusterFile(Section):
    """What the file holds."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)


CLUSTER = Schema(ClusterFile, "cluster file")

Broken = tuple[str, tuple[str, ...]]
"""What is wrong, and the settings that it is about."""


def rule_ranks(cluster: ClusterConfig) -> Iterator[Broken]:
    """A node has ranks: one for each GPU, or as many as are asked for."""
    gpus, ranks = cluster.gpus_per_node, cluster.ranks_per_node
    keys = ("cluster.ranks_per_node", "cluster.gpus_per_node")
    if not gpus and ranks is None:
        text = (
            "cluster.gpus_per_node is 0 and cluster.ranks_per_node is not set, so that a node has no rank. Set "
            "cluster.gpus_per_node, or for ranks on CPUs cluster.ranks_per_node."
        )
        yield text, keys
    elif gpus and ranks is not None and ranks > gpus:
        text = (
            f"cluster.ranks_per_node ({ranks}) is above cluster.gpus_per_node ({gpus}): two ranks cannot share a GPU. "
            f"Use at most {gpus}, or leave it out for one rank on each GPU."
        )
        yield text, keys
    if cluster.gpu_type and not gpus:
        text = f"cluster.gpu_type ({cluster.gpu_type}) is set, and cluster.gpus_per_node is 0. Set how many there are."
        yield text, ("cluster.gpu_type", "cluster.gpus_per_node")


def rule_one_python(cluster: ClusterConfig) -> Iterator[Broken]:
    """Ranks run in a container or in an environment of the nodes."""
    if cluster.venv and cluster.container:
        text = (
            f"cluster.venv ({cluster.venv}) and cluster.container are both set, and ranks run in one of them. Leave "
            "one out; of an environment in the image, give the interpreter as cluster.container.python."
        )
        yield text, ("cluster.venv", "cluster.container.image")


def rule_signal(cluster: ClusterConfig) -> Iterator[Broken]:
    """The warning comes before the limit, and not at the very beginning."""
    warning, limit = cluster.signal_before_limit, cluster.time_limit
    if warning > LONGEST_WARNING_SECONDS:
        text = (
            f"cluster.signal_before_limit ({warning:g} s) is above {LONGEST_WARNING_SECONDS} s, which is as early as "
            "Slurm sends a signal. Use at most 18h."
        )
        yield text, ("cluster.signal_before_limit",)
    elif limit is not None and warning > limit / 2:
        text = (
            f"cluster.signal_before_limit ({warning:g} s) is more than half of cluster.time_limit ({limit:g} s). Use "
            f"at most {limit / 2:g}, or a longer time limit."
        )
        yield text, ("cluster.signal_before_limit", "cluster.time_limit")


def rule_sbatch_options(cluster: ClusterConfig) -> Iterator[Broken]:
    """What has a setting of its own is set there, and what the job's script relies on is not changed."""
    for number, option in enumerate(cluster.sbatch_options):
        name = option.removeprefix("--").partition("=")[0]
        if name in OURS:
            text = (
                f"cluster.sbatch_options[{number}] is --{name}, which the job's script sets itself. Leave it out; see "
                "the settings of the section cluster."
            )
            yield text, ("cluster.sbatch_options",)


def rule_env(cluster: ClusterConfig) -> Iterator[Broken]:
    """Names that a shell can export, and not those by which ranks learn who they are."""
    for name in cluster.env:
        key = f"cluster.env.{name}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"{key} is no name of an environment variable: letters, digits and _.", (key,)
        elif re.fullmatch(r"SLURM_.*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|PATH|PYTHONPATH", name):
            yield f"{key} is set by Slurm or by gptdist for each job. Leave it out.", (key,)


RULES: tuple[Callable[[ClusterConfig], Iterator[Broken]], ...] = (
    rule_ranks,
    rule_one_python,
    rule_signal,
    rule_sbatch_options,
    rule_env,
)


@dataclass(frozen=True)
class LoadedCluster:
    """A cluster's file and, for each setting, where it was written."""

    file: ClusterFile
    origins: dict[str, str]

    @property
    def config(self) -> ClusterConfig:
        return self.file.cluster


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> LoadedCluster:
    """Read a cluster's file and `cluster.key=value` overrides. Raises ConfigError listing all mistakes."""
    problems: list[Problem] = []
    tree, complete = read_layers(path, without_secret_overrides(overrides, problems), CLUSTER, problems)
    tree = without_secrets(tree, problems)
    try:
        file = ClusterFile.model_validate(tree.plain(), strict=True)
    except ValidationError as error:
        problems.extend(explain(error, tree, CLUSTER, skip_missing=not complete))
    else:
        origins = origins_of(file, tree)
        problems.extend(Problem(text, places_of(keys, origins)) for rule in RULES for text, keys in rule(file.cluster))
    raise_problems(problems, str(path))
    return LoadedCluster(file, origins)
