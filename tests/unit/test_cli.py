"""The command's grammar, its answers to mistakes, and its exit codes; no training, no engine."""

import argparse
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gptdist.errors import CheckpointError, TrainingDiverged
from launch import cli
from launch.arguments.command import parse_arguments

RUN = "configs/runs/quickstart.yaml"


def answer(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def install(monkeypatch: pytest.MonkeyPatch, command: str, handler: Any) -> None:
    module = types.ModuleType("launch_stand_in")
    module.main = handler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "launch_stand_in", module)
    monkeypatch.setitem(cli.HANDLERS, command, "launch_stand_in:main")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: COMMAND"),
        (["trian", RUN], "Did you mean train?"),
        (["data", "buidl"], "Did you mean build?"),
        (["ckpt"], "required: COMMAND"),
        (["train"], "required: CONFIG\n"),
        (["train", RUN, "--nprocs", "2"], "Did you mean --nproc?"),
        (["train", RUN, "--nproc", "0"], "'0' must be a whole number of at least 1"),
        (["train", RUN, "--nproc", "two"], "'two' must be a whole number"),
        (["data", "build", "a.txt", "--out", "d"], "required: --tokenizer"),
        (["data", "build", "a.txt", "--out", "d", "--tokenizer", "bytes", "--max-bytes", "lots"], "50MB"),
        (["generate", "run", "--temperature", "-1"], "at least 0"),
        (["data", "order", RUN], "--step --document --check is required"),
        (["data", "order", RUN, "--step", "1", "--check"], "not allowed with"),
        (["data", "order", RUN, "--check", "--epoch", "-1"], "at least 0"),
        (["generate", "run", "extra"], "does not know extra"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = answer(argv, capsys)
    assert code == 2
    assert says in err and err.startswith("error: ")


@pytest.mark.parametrize(
    "argv",
    [
        [RUN, "a.b=1", "c.d=-2", "--nproc", "2", "--fresh"],
        ["--nproc", "2", RUN, "a.b=1", "c.d=-2", "--fresh"],
        [RUN, "a.b=1", "--nproc", "2", "c.d=-2", "--fresh"],
        ["--fresh", RUN, "--nproc=2", "a.b=1", "c.d=-2"],
    ],
)
def test_overrides_stand_anywhere(argv: list[str]) -> None:
    args = parse_arguments(["train", *argv])
    assert (args.config, args.overrides, args.nproc, args.fresh) == (Path(RUN), ["a.b=1", "c.d=-2"], 2, True)


def test_every_command_has_a_handler() -> None:
    for argv in (
        ["train", RUN],
        ["data", "build", "a", "--out", "b", "--tokenizer", "bytes"],
        ["data", "verify", "a"],
        ["data", "show", "a"],
        ["data", "order", RUN, "--step", "3", "train.steps=4"],
        ["data", "order", RUN, "train.steps=4", "--check", "--epoch", "0"],
        ["generate", "run", "--prompt", "x", "--prompt", "y", "--top-k", "5"],
        ["eval", "run", "--corpus", "c", "--samples", "3"],
        ["ckpt", "list", "run"],
        ["doctor"],
    ):
        assert parse_arguments(argv).command in cli.HANDLERS


@pytest.mark.parametrize(
    ("outcome", "code"), [(None, 0), (0, 0), (75, 75), (CheckpointError("x"), 2), (TrainingDiverged("x"), 1)]
)
def test_exit_codes(
    outcome: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def handler(args: argparse.Namespace) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    install(monkeypatch, "doctor", handler)
    found, err = answer(["doctor"], capsys)
    assert found == code
    assert err == ("error: x\n" if isinstance(outcome, Exception) else "")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def handler(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    install(monkeypatch, "doctor", handler)
    assert answer(["doctor"], capsys) == (130, "interrupted\n")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def handler(args: argparse.Namespace) -> None:
        raise CheckpointError("gone")

    install(monkeypatch, "doctor", handler)
    monkeypatch.setenv("GPTDIST_DEBUG", "1")
    code, err = answer(["doctor"], capsys)
    assert code == 2 and "Traceback" in err and err.endswith("error: gone\n")


def test_a_missing_config_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = answer(["train", str(tmp_path / "none.yaml"), "--nproc", "2"], capsys)
    assert code == 2
    assert err.startswith("error: ") and "none.yaml" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_rank_of_a_node_tells_of_a_bad_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if "RANK" in name else "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    bad = ["train", str(tmp_path / "none.yaml")]
    assert answer(bad, capsys) == (2, "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, err = answer(bad, capsys)
    assert code == 2 and "none.yaml" in err


def test_help_and_config_errors_load_no_torch() -> None:
    program = (
        "import sys\nfrom launch import cli\n"
        "for argv in (['--help'], ['train', 'none.yaml'], ['trian']):\n"
        "    try: cli.main(argv)\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
