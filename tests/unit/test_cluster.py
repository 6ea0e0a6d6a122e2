"""Files of clusters: the shipped ones, their rules, mistakes with their lines; no secret is in them or shown."""

from pathlib import Path
from typing import Any

import pytest

from gptdist.config.load import render_sections
from gptdist.errors import ConfigError
from launch.cluster.secret_values import is_secret_name, is_secret_value
from launch.cluster.settings import CLUSTER, ClusterConfig, load_cluster

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "clusters").glob("*.yaml"))
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> Path:
        path = tmp_path / "site.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_cluster(path, overrides)
    return str(caught.value)


def test_there_are_four_kinds_of_clusters() -> None:
    assert {path.stem for path in SHIPPED} == {"gpu", "dgx_h100", "cpu", "lab"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_clusters_load_and_what_is_kept_of_them_loads_again(path: Path, tmp_path: Path) -> None:
    loaded = load_cluster(path)
    assert loaded.config.ranks_of_node >= 1 and loaded.config.time_limit
    kept = tmp_path / "cluster.yaml"
    kept.write_text(render_sections(loaded.file, loaded.origins))
    assert load_cluster(kept).file == loaded.file


def test_every_setting_says_what_it_is() -> None:
    for path in CLUSTER.paths():
        field = CLUSTER.field_at(path)
        assert field is not None and field.description, path


def test_overrides_and_origins(write: Any) -> None:
    path = write("cluster:\n  gpus_per_node: 4\n  env:\n    NCCL_DEBUG: INFO\n")
    loaded = load_cluster(path, ["cluster.nodes=3", "cluster.env.NCCL_DEBUG=WARN", "cluster.env.UCX_TLS=rc"])
    assert loaded.config.nodes == 3
    assert loaded.config.env == {"NCCL_DEBUG": "WARN", "UCX_TLS": "rc"}
    assert loaded.origins["cluster.gpus_per_node"] == f"{path}:2"
    assert loaded.origins["cluster.nodes"] == "command line"


@pytest.mark.parametrize(
    ("written", "seconds"), [("12h", 43200), ('"1-12:00:00"', 129600), ("24:00:00", 86400), ("90", 90), ("2d", 172800)]
)
def test_time_limits(write: Any, written: str, seconds: float) -> None:
    text = f"cluster: {{gpus_per_node: 1, signal_before_limit: 10, time_limit: {written}}}"
    assert load_cluster(write(text)).config.time_limit == seconds


@pytest.mark.parametrize(("written", "size"), [("500GiB", 500 << 30), ("all", "all"), ("1MiB", 1 << 20)])
def test_memory(write: Any, written: str, size: int | str) -> None:
    assert load_cluster(write(f"cluster: {{gpus_per_node: 1, memory: {written}}}")).config.memory == size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodez: 3", "cluster.nodez is not a setting. Did you mean cluster.nodes?"),
        ("nodes: 0", "cluster.nodes is 0; it must be at least 1. The default is 1."),
        ("partition: a b", 'cluster.partition is "a b"; it must be a name of Slurm\'s'),
        ("partition: '$(reboot)'", "must be a name of Slurm's"),
        ("time_limit: tomorrow", 'must be a time such as "12h", "2d" or Slurm\'s 1-12:00:00'),
        ("memory: 5", "must be at least 1MiB"),
        ("memory: much", 'must be a size such as 4096, "5GB" or "512MiB"'),
        ("container: {kind: docker, image: x}", "must be one of pyxis, apptainer"),
        ("container: {kind: pyxis}", "cluster.container.image is not set and has no default"),
        ("env: {OMP_NUM_THREADS: 3}", "cluster.env.OMP_NUM_THREADS is 3; it must be text (put it in quotes)"),
        ("env: {A-B: x}", "cluster.env.A-B is no name of an environment variable"),
        ("env: {SLURM_NTASKS: '3'}", "cluster.env.SLURM_NTASKS is set by Slurm"),
        ('env: {A: "x\\ny"}', "must be one line of text"),
        ("sbatch_options: [-p main]", "must be one long option of sbatch"),
        ("sbatch_options: [--partition=x]", "cluster.sbatch_options[0] is --partition, which the job's script sets"),
        ("sbatch_options: [--wrap=x]", "is --wrap, which"),
        ("gpus_per_node: 0", "a node has no rank. Set cluster.gpus_per_node, or for ranks on CPUs"),
        ("ranks_per_node: 9", "(9) is above cluster.gpus_per_node (8): two ranks cannot share a GPU"),
        ("gpus_per_node: 0\nranks_per_node: 2\ngpu_type: a", "cluster.gpu_type (a) is set"),
        ("venv: /v\ncontainer: {kind: pyxis, image: x}", "are both set, and ranks run in one of them"),
        ("time_limit: 5m\nsignal_before_limit: 4m", "(240 s) is more than half of cluster.time_limit (300 s)"),
        ("signal_before_limit: 2d", "as early as Slurm sends a signal"),
        ("venv: /a:b", "a path without colons"),
    ],
)
def test_one_mistake_is_one_message_with_its_line(write: Any, text: str, expected: str) -> None:
    lines = text.splitlines() if "gpus_per_node" in text else ["gpus_per_node: 8", *text.splitlines()]
    path = write("cluster:\n" + "".join(f"  {line}\n" for line in lines))
    message = error_of(path)
    assert expected in message, message
    assert f"{path}:" in message and "problems in" not in message


def test_all_mistakes_at_once(write: Any) -> None:
    path = write("cluster:\n  nodez: 3\n  nodes: 0\n")
    message = error_of(path, "cluster.tiem_limit=3", "train.steps=4")
    assert message.startswith(f"4 problems in {path}:")
    assert "Did you mean cluster.time_limit?  [command line]" in message
    assert f"[{path}:2]" in message and f"[{path}:3]" in message


def test_a_run_config_is_no_cluster_file(write: Any) -> None:
    assert "train is not a setting" in error_of(write("train: {steps: 3}\n"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"  env:\n    WANDB_API_KEY: {SECRET}\n", "cluster.env.WANDB_API_KEY"),
        ("  env:\n    MY_TOKEN: 12\n", "cluster.env.MY_TOKEN"),
        ("  env:\n    HARMLESS: hf_abcdefghijklmnop\n", "cluster.env.HARMLESS"),
        ("  env:\n    PROXY: http://me:geheim99@proxy\n", "cluster.env.PROXY"),
        ("  sbatch_options: [--comment=sk-abcdefghijkl]\n", "cluster.sbatch_options[0]"),
        ("  container: {kind: pyxis, image: 'docker://me:geheim99@registry/x'}\n", "cluster.container.image"),
    ],
)
def test_secrets_are_refused_and_not_shown(write: Any, text: str, key: str) -> None:
    path = write("cluster:\n  gpus_per_node: 8\n" + text)
    message = error_of(path)
    assert f"{key} is a secret by" in message and "cluster.secrets_file" in message and f"{path}:" in message
    assert not any(part in message for part in (SECRET, "geheim99", "abcdefgh", " 12"))


def test_secrets_on_the_command_line_are_refused_and_not_shown(write: Any) -> None:
    path = write("cluster: {gpus_per_node: 8}")
    message = error_of(path, f"cluster.env.WANDB_API_KEY={SECRET}")
    assert "cluster.env.WANDB_API_KEY is a secret by its name" in message and SECRET not in message


def test_what_is_no_secret() -> None:
    names = ("TOKENIZERS_PARALLELISM", "NCCL_IB_HCA", "GOOGLE_APPLICATION_CREDENTIALS", "SSL_KEY_FILE", "KEYS_PATH")
    assert not any(map(is_secret_name, names))
    assert all(map(is_secret_name, ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "wandb_api_key", "DB_PASSWORD")))
    assert all(map(is_secret_name, ("PGPASSWORD", "MYTOKEN", "GITHUB_PAT", "OPENAI_APIKEY")))
    assert is_secret_value("nvapi-" + "a1" * 20)
    assert not any(map(is_secret_value, ("mlx5_0,mlx5_3", "/shared/x.sqsh", "https://host/x", "docker://host:5000/x")))


def test_ranks_of_a_node() -> None:
    assert ClusterConfig(gpus_per_node=8).ranks_of_node == 8
    assert ClusterConfig(gpus_per_node=8, ranks_per_node=4).ranks_of_node == 4
    assert ClusterConfig(ranks_per_node=3).ranks_of_node == 3
