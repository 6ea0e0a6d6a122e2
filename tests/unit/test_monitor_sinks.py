"""What sinks write, and that no failing sink reaches the caller."""

import errno
import io
import json
import math
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gptdist.config.sections import MonitorConfig
from gptdist.errors import ConfigError
from gptdist.monitor import append
from gptdist.monitor.append import append_whole
from gptdist.monitor.jsonl import JsonlSink
from gptdist.monitor.sinks import Sinks, build_sinks, check_sinks
from gptdist.monitor.tensorboard_sink import TensorBoardSink


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class FakeSink:
    name = "fake"

    def __init__(self) -> None:
        self.failing = False
        self.calls: list[tuple[Any, ...]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._do("log", step, dict(values))

    def text(self, step: int, tag: str, text: str) -> None:
        self._do("text", step, tag, text)

    def close(self) -> None:
        self._do("close")

    def _do(self, *call: Any) -> None:
        self.calls.append(call)
        if self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_record_goes_to_every_sink() -> None:
    first, second = FakeSink(), FakeSink()
    with Sinks([first, second]) as sinks:
        sinks.log(1, {"a": 1.0})
        sinks.text(1, "tag", "words")
        sinks.advance(1)
    assert first.calls == second.calls == [("log", 1, {"a": 1.0}), ("text", 1, "tag", "words"), ("close",)]


def test_a_failing_sink_is_reported_once_rested_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    clock, bad, good = FakeClock(), FakeSink(), FakeSink()
    sinks = Sinks([bad, good], clock=clock)
    bad.failing = True
    for step in range(5):
        sinks.log(step, {})
    assert len(bad.calls) == 1
    assert len(good.calls) == 5
    clock.now = 61
    sinks.log(5, {})
    assert len(bad.calls) == 2
    report = capsys.readouterr().err
    assert report.count("\n") == 1
    assert "fake failed (OSError: [Errno 28] No space left on device); training goes on" in report
    clock.now, bad.failing = 122, False
    sinks.log(6, {})
    assert "fake works again; 6 records are missing" in capsys.readouterr().err
    sinks.log(7, {})
    assert len(bad.calls) == 4


def test_a_sink_that_stays_dead_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    clock, bad = FakeClock(), FakeSink()
    bad.failing = True
    sinks = Sinks([bad], max_failures=3, clock=clock)
    for step in range(10):
        clock.now += 61
        sinks.log(step, {})
    sinks.close()
    assert len(bad.calls) == 4  # three tries and the close
    report = capsys.readouterr().err
    assert "failed 3 times and is dropped" in report
    assert "fake did not close" in report


def test_a_dead_stderr_is_not_an_error_either(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = FakeSink()
    bad.failing = True
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    Sinks([bad]).log(1, {})
    assert len(bad.calls) == 1


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(FakeSink):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([Interrupted()]).log(1, {})


def test_jsonl_lines_survive_a_restart_and_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    JsonlSink(path).log(1, {"train/loss": 2.5, "train/grad_norm": math.inf})
    with path.open("ab") as file:
        file.write(b'{"time": 1, "st')  # killed in the middle of a line
    sink = JsonlSink(path)
    sink.log(2, {"train/loss": math.nan})
    sink.text(2, "sample", "two\nlines é")
    lines = path.read_text().splitlines()
    assert lines.pop(1) == '{"time": 1, "st'
    path.write_text("\n".join(lines))
    first, second, third = read_lines(path)
    assert (first["step"], first["train/loss"], first["train/grad_norm"]) == (1, 2.5, None)
    assert (second["step"], second["train/loss"]) == (2, None)
    assert (third["tag"], third["text"]) == ("sample", "two\nlines é")
    assert first["time"] <= second["time"] <= third["time"]


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    append_whole(path, b"first\n")
    real_write = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if len(data) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[:7])

    monkeypatch.setattr(append.os, "write", half_then_full)
    with pytest.raises(OSError, match="No space left"):
        append_whole(path, b"second record\n")
    monkeypatch.undo()
    assert path.read_bytes() == b"first\n"
    append_whole(path, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"


def test_a_full_device_does_not_stop_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, which this system does not have")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sinks = build_sinks(MonitorConfig(tensorboard=False), tmp_path, start_step=0, steps=10)
    sinks.log(1, {"train/loss": 1.0})
    sinks.close()
    captured = capsys.readouterr()
    assert captured.out == "step  1/10  loss 1.0000\n"
    assert "jsonl failed" in captured.err
    assert "training goes on" in captured.err


def scalars_of(log_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(log_dir), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_the_curves_and_the_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, start_step=0)
    for step in (1, 2, 3):
        sink.log(step, {"train/loss": 4.0 - step, "train/grad_norm": math.nan})
    sink.text(3, "sample", "To be\nor not")
    sink.close()
    assert scalars_of(tmp_path, "train/loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (event,) = accumulator.Tensors("sample")
    assert event.tensor_proto.string_val[0] == b"    To be\n    or not"


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    before = TensorBoardSink(tmp_path, start_step=0)
    for step in range(1, 8):
        before.log(step, {"train/loss": 10.0})
    after = TensorBoardSink(tmp_path, start_step=4)
    for step in range(6, 9):
        after.log(step, {"train/loss": 20.0})
    expected = [(step, 10.0) for step in (1, 2, 3, 4)] + [(step, 20.0) for step in (6, 7, 8)]
    assert scalars_of(tmp_path, "train/loss") == expected


def test_a_run_that_goes_back_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, start_step=0)
    for step in range(1, 8):
        sink.log(step, {"train/loss": 10.0})
    sink.text(4, "rollback", "back from step 7 to step 4")
    for step in (6, 7, 8):
        sink.log(step, {"train/loss": 20.0})
    expected = [(step, 10.0) for step in (1, 2, 3, 4)] + [(step, 20.0) for step in (6, 7, 8)]
    assert scalars_of(tmp_path, "train/loss") == expected


def test_a_fresh_run_in_an_old_folder_starts_its_curves_anew(tmp_path: Path) -> None:
    TensorBoardSink(tmp_path, start_step=0).log(9, {"train/loss": 10.0})
    TensorBoardSink(tmp_path, start_step=0).log(1, {"train/loss": 20.0})
    assert scalars_of(tmp_path, "train/loss") == [(1, 20.0)]


def test_the_config_chooses_the_sinks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with build_sinks(MonitorConfig(), tmp_path, start_step=0, steps=10) as sinks:
        assert list(tmp_path.iterdir()) == [], "nothing is written before the first value"
        sinks.log(1, {"train/loss": 1.5})
    assert capsys.readouterr().out == "step  1/10  loss 1.5000\n"
    assert read_lines(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.5
    assert scalars_of(tmp_path / "tensorboard", "train/loss") == [(1, 1.5)]
    with build_sinks(MonitorConfig(tensorboard=False), tmp_path / "other", start_step=0, steps=10) as sinks:
        sinks.log(1, {"train/loss": 1.5})
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["metrics.jsonl"]


def test_a_missing_package_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_sinks(MonitorConfig(tensorboard=False))
    with pytest.raises(
        ConfigError, match=r"monitor\.wandb_project \(mine\) needs the package wandb.*wandb_project=null"
    ):
        check_sinks(MonitorConfig(tensorboard=False, wandb_project="mine"))
    with pytest.raises(ConfigError, match=r"tensorboard=false"):
        check_sinks(MonitorConfig())


class FakeWandb(types.ModuleType):
    """As much of wandb as the sink uses."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "FakeWandb":
        self.inits.append(arguments)
        return self

    def Settings(self, **arguments: Any) -> dict[str, Any]:
        return arguments

    def Html(self, text: str) -> str:
        return text

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_with_the_same_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monitor = MonitorConfig(tensorboard=False, wandb_project="mine")
    for start_step in (0, 5, 0):
        with build_sinks(monitor, tmp_path, start_step, steps=10) as sinks:
            sinks.log(start_step + 1, {"train/loss": 1.0})
            sinks.text(start_step + 1, "sample", "<b>")
    fresh, resumed, anew = (arguments["id"] for arguments in wandb.inits)
    assert fresh == resumed != anew
    assert wandb.inits[0]["project"] == "mine"
    assert wandb.logged[:2] == [{"train/loss": 1.0, "step": 1}, {"sample": "<pre>&lt;b&gt;</pre>", "step": 1}]
    assert wandb.finished == 3


def test_a_wandb_that_cannot_connect_leaves_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    with build_sinks(MonitorConfig(tensorboard=False, wandb_project="mine"), tmp_path, 0, steps=10) as sinks:
        sinks.log(1, {"train/loss": 1.0})
    assert "wandb failed" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
