"""`gptdist submit`: a run and a cluster -> a run's folder with a batch script in it, and a job or a chain of jobs.

All that can be wrong is looked for before anything is written. The pieces are in `cluster.py`, `refusals.py`,
`job_script.py`, `run_folder.py` and `slurm.py`.
"""

import argparse
import os
import shlex
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptdist.config.check import check_run
from gptdist.config.load import LoadedRun, load_run, render_config, render_sections
from gptdist.config.problems import places_of, raise_problems
from gptdist.errors import ConfigError, LaunchError, SlurmRefused, SlurmUnavailable
from gptdist.layout import Layout
from launch.cluster.job_script import JOB_CONFIG, Job, check_paths, job_name, render_job_script
from launch.cluster.refusals import closed, explain_refusal, misfits
from launch.cluster.run_folder import SCRIPT, new_job_folder
from launch.cluster.settings import LoadedCluster, load_cluster
from launch.cluster.slurm import find_partitions, render_time, submit, test_only
from launch.cluster.slurm_queue import cancel, read_queue
from launch.elastic import fit_layout

CLUSTER_PREFIX = "cluster."


@dataclass(frozen=True)
class Submission:
    """A run that fits a cluster; nothing is written yet."""

    run: LoadedRun
    cluster: LoadedCluster
    layout: Layout
    job: Job

    @property
    def script(self) -> Path:
        return self.job.run_dir / SCRIPT

    def files(self) -> dict[str, str]:
        """What the run's folder holds of it."""
        return {
            JOB_CONFIG: render_config(self.run),
            "cluster.yaml": render_sections(self.cluster.file, self.cluster.origins),
            SCRIPT: render_job_script(self.cluster.config, self.job),
        }


def main(args: argparse.Namespace) -> int:
    """Submit, or with --dry-run only show."""
    submission = prepare(args.config, args.cluster, args.overrides, args.run_dir, args.name)
    _warn(warnings(submission))
    if args.dry_run:
        return _show(submission)
    _warn(check_with_slurm(submission))
    with new_job_folder(submission.job.run_dir, submission.files()):
        job_ids = submit_chain(submission, args.chain)
    print(f"run     {submission.job.run_dir}")
    print(f"ranks   {_describe(submission)}")
    print(f"job     {' then '.join(job_ids)}")
    print(f"again   sbatch {shlex.quote(str(submission.script))}")
    return 0


def prepare(
    config: Path, cluster: Path, overrides: Sequence[str], run_dir: Path | None = None, name: str | None = None
) -> Submission:
    """Read and check both files. Raises ConfigError with all mistakes of both, or LaunchError for the folder."""
    of_cluster = [override for override in overrides if override.startswith(CLUSTER_PREFIX)]
    of_run = [override for override in overrides if not override.startswith(CLUSTER_PREFIX)]
    run, loaded_cluster = _load_both(config, of_run, cluster, of_cluster)
    settings = loaded_cluster.config
    layout = _check_layouts(run, loaded_cluster)
    folder = Path(os.path.abspath(run_dir or run.config.launch.run_dir))
    job = Job(name or job_name(folder), folder, Path.cwd(), sys.executable, run.config.launch.min_nodes)
    for text in check_paths((job.run_dir, job.work_dir), settings.container is not None):
        raise LaunchError(text)
    _check_secrets_file(settings.secrets_file)
    return Submission(_in_folder(run, folder), loaded_cluster, layout, job)


def check_with_slurm(submission: Submission) -> list[str]:
    """What to warn of. Raises ConfigError for what no partition gives, and LaunchError where the run has a job."""
    cluster = submission.cluster
    partitions = find_partitions()
    raise_problems(misfits(cluster.config, partitions, cluster.origins), "what is asked of the cluster")
    jobs = [job for job in read_queue() or () if job.is_of(submission.job.run_dir)]
    if jobs:
        listed = ", ".join(f"{job.id} ({job.state})" for job in jobs)
        raise LaunchError(
            f"the run in {submission.job.run_dir} has a job already: {listed}. End it first (`gptdist stop` saves; "
            "`scancel` does not), or name another folder with --run-dir."
        )
    return closed(cluster.config, partitions)


def submit_chain(submission: Submission, length: int) -> list[str]:
    """`length` jobs, each of which waits until the one before has ended, however. All are submitted or none."""
    job_ids: list[str] = []
    try:
        for _ in range(length):
            after = [f"--dependency=afterany:{job_ids[-1]}"] if job_ids else []
            job_ids.append(submit(submission.script, after))
    except SlurmRefused as refusal:
        cancel(job_ids)
        raise explain_refusal(str(refusal), submission.cluster.config, submission.cluster.origins) from None
    except BaseException:
        cancel(job_ids)
        raise
    return job_ids


def warnings(submission: Submission) -> Iterator[str]:
    """What may be as it should be, if nodes see other disks than this machine does."""
    data, cluster = submission.run.config.data, submission.cluster.config
    corpora = [part.corpus for part in data.blend] if data.blend else [data.corpus] if data.corpus else []
    for corpus in corpora:
        if "://" not in corpus and not Path(corpus).exists():
            yield f"there is no corpus {corpus} on this machine; is it on the nodes?"
    if cluster.venv and not (Path(cluster.venv).expanduser() / "bin" / "python").exists():
        yield f"there is no {cluster.venv}/bin/python on this machine; is it on the nodes?"


def _warn(texts: Iterable[str]) -> None:
    for text in texts:
        print(f"warning: {text}", file=sys.stderr)


def _load_both(
    config: Path, of_run: Sequence[str], cluster: Path, of_cluster: Sequence[str]
) -> tuple[LoadedRun, LoadedCluster]:
    try:
        run = load_run(config, of_run)
    except ConfigError as error:
        try:
            load_cluster(cluster, of_cluster)
        except ConfigError as other:
            raise ConfigError(f"{error}\n{other}") from None
        raise
    return run, load_cluster(cluster, of_cluster)


def _check_layouts(run: LoadedRun, cluster: LoadedCluster) -> Layout:
    """The layout on all nodes, once there is a good one for the fewest as well. Raises ConfigError."""
    settings, least = cluster.config, run.config.launch.min_nodes
    if least is not None and least > settings.nodes:
        places = places_of(("launch.min_nodes", "cluster.nodes"), {**cluster.origins, **run.origins})
        raise ConfigError(
            f"launch.min_nodes ({least}) is above cluster.nodes ({settings.nodes}), the most that are asked for. Use "
            f"at most {settings.nodes}, or more nodes.  [{places}]"
        )
    layouts = []
    for nodes in (settings.nodes, least or settings.nodes):
        fit = fit_layout(run.config, nodes * settings.ranks_of_node, nodes)
        layouts.append(check_run(fit.config, fit.ranks, run.origins))
    return layouts[0]


def _in_folder(run: LoadedRun, folder: Path) -> LoadedRun:
    """The run with the absolute path of its folder."""
    launch = run.config.launch.model_copy(update={"run_dir": str(folder)})
    return replace(run, config=run.config.model_copy(update={"launch": launch}))


def _check_secrets_file(name: str | None) -> None:
    if name is None:
        return
    path = Path(name).expanduser()
    try:
        state = path.stat()
    except OSError as error:
        raise LaunchError(f"cluster.secrets_file ({name}) cannot be read: {error.strerror}.") from error
    if stat.S_IMODE(state.st_mode) & 0o077 or state.st_uid != os.getuid():
        raise LaunchError(
            f"cluster.secrets_file ({name}) must be yours and readable by nobody else; its mode is "
            f"{stat.S_IMODE(state.st_mode):04o}. Run: chmod 600 {name}"
        )


def _show(submission: Submission) -> int:
    """The script on stdout; what Slurm says of it, and what is wrong, on stderr."""
    script = submission.files()[SCRIPT]
    print(script, end="", flush=True)
    print(f"{submission.job.run_dir}: {_describe(submission)}; nothing was submitted or written", file=sys.stderr)
    try:
        _warn(check_with_slurm(submission))
        print(f"sbatch --test-only says: {test_only(script)}", file=sys.stderr)
    except SlurmUnavailable as error:
        print(f"Slurm was not asked: {error}", file=sys.stderr)
    except SlurmRefused as refusal:
        raise explain_refusal(str(refusal), submission.cluster.config, submission.cluster.origins) from None
    return 0


def _describe(submission: Submission) -> str:
    cluster, layout = submission.cluster.config, submission.layout
    limit = f", {render_time(cluster.time_limit)}" if cluster.time_limit else ""
    kind = "GPU" if cluster.gpus_per_node else "CPU"
    least = submission.job.min_nodes
    fewest = f"{least} to " if least and least < cluster.nodes else ""
    return (
        f"{fewest}{cluster.nodes} nodes x {cluster.ranks_of_node} {kind} ranks: {layout.describe()}; partition "
        f"{cluster.partition or '(default)'}{limit}"
    )
