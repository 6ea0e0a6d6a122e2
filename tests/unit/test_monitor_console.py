"""Every rendering against its exact text, and the progress bar on a pretended terminal."""

import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gptdist.monitor.console import (
    ConsoleSink,
    CorpusUse,
    RunHeader,
    render_bytes,
    render_count,
    render_duration,
    render_evaluation,
    render_run_header,
    render_step,
    render_text,
)
from gptdist.monitor.progress import ProgressBar

VALUES = {
    "train/loss": 3.21409,
    "train/learning_rate": 3e-4,
    "train/grad_norm": 0.8312,
    "speed/tokens_per_second": 12431.0,
    "speed/model_flops": 31.04e9,
    "speed/mfu": 0.413,
    "memory/bytes": 1.2 * 2**30,
    "speed/eta_seconds": 130.2,
}


def test_a_line_has_every_value_in_reading_order() -> None:
    assert render_step(400, 2000, VALUES) == (
        "step  400/2000  loss 3.2141  lr 3.00e-04  |g| 0.83  12.4k tok/s  31.0 GFLOP/s  mfu 41%  "
        "mem 1.20 GiB  eta 2m10s"
    )


def test_a_value_that_is_not_there_has_no_field() -> None:
    assert render_step(3, 10, {"train/loss": 1.0, "speed/eta_seconds": 7}) == "step  3/10  loss 1.0000  eta 7s"


def test_rare_values_show_when_they_say_something() -> None:
    rare = {"train/loss": 2.5, "train/loss_scale": 65536.0, "train/skipped_steps": 0.0}
    assert render_step(5, 10, rare) == "step  5/10  loss 2.5000  scale 65.5k"
    assert render_step(5, 10, {**rare, "train/skipped_steps": 3.0}).endswith("scale 65.5k  skipped 3")


def test_columns_of_following_lines_stand_below_each_other() -> None:
    later = {"train/loss": 10.84, "train/grad_norm": 11.04, "speed/tokens_per_second": 998.0, "speed/model_flops": 1e12}
    first, second = (render_step(step, 2000, values) for step, values in ((1990, VALUES), (10, {**VALUES, **later})))
    assert second == (
        "step   10/2000  loss 10.8400  lr 3.00e-04  |g| 11.0  998 tok/s    1.00 TFLOP/s  mfu 41%  "
        "mem 1.20 GiB  eta 2m10s"
    )
    for field in ("lr", "|g|", "mfu", "mem", "eta"):
        assert second.index(field) - first.index(field) == 1  # only the loss of two digits is wider


def test_a_diverged_step_is_readable() -> None:
    values = {"train/loss": float("nan"), "train/grad_norm": float("inf"), "speed/eta_seconds": float("inf")}
    assert render_step(1, 9, values) == "step 1/9  loss nan     |g| inf   eta ?"


@pytest.mark.parametrize(
    ("norm", "text"), [(0.0, "0.00"), (0.004, "4.0e-03"), (0.01, "0.01"), (999.0, "999"), (12345.0, "1.2e+04")]
)
def test_gradient_norms_of_any_size(norm: float, text: str) -> None:
    assert render_step(1, 9, {"train/grad_norm": norm}) == f"step 1/9  |g| {text}"


def test_an_evaluation_line() -> None:
    values = {"eval/loss": 3.2141, "eval/perplexity": 24.881, "eval/bits_per_byte": 1.45119}
    assert render_evaluation(400, 2000, values) == "eval  400/2000  loss 3.2141  perplexity 24.88  bits/byte 1.4512"
    assert render_evaluation(4, 20, {"eval/loss": 1.0}) == "eval  4/20  loss 1.0000"


def test_generated_text_cannot_command_the_terminal() -> None:
    assert render_text(7, 10, "sample", "a\x1b[2Jb\nc\td") == "text  7/10  sample\n    a\\x1b[2Jb\n    c\\td"


HEADER = RunHeader(
    parameters=4_321_024,
    layout="DP 2 x TP 1 x PP 1, ZeRO 1",
    devices="2 x cpu",
    precision="fp32",
    global_batch_size=16,
    sequence_length=256,
    steps=600,
    total_samples=9600,
    run_dir="runs/quickstart",
    corpora=(CorpusUse("corpora/a", 2_100_000, 1234, 0.75, 0.3125), CorpusUse("corpora/b", 99, 1, 0.25, 2.5)),
)


def test_the_header_of_a_fresh_run() -> None:
    assert render_run_header(HEADER) == (
        "model   4.32M parameters (4,321,024)\n"
        "layout  DP 2 x TP 1 x PP 1, ZeRO 1, on 2 x cpu, fp32\n"
        "data    corpora/a: 2,100,000 tokens in 1,234 documents, 75 % of the samples, 0.312 epochs\n"
        "        corpora/b: 99 tokens in 1 documents, 25 % of the samples, 2.5 epochs\n"
        "batch   16 x 256 = 4,096 tokens a step; 600 steps, 2.46M tokens in all\n"
        "run     runs/quickstart\n"
        "start   fresh, from step 0"
    )


def test_the_header_of_a_resumed_run() -> None:
    resumed = replace(
        HEADER, resumed_from="runs/quickstart/checkpoints/step-00000300", start_step=300, start_sample=4800
    )
    assert render_run_header(resumed).splitlines()[-1] == (
        "start   resumed from runs/quickstart/checkpoints/step-00000300 (step 300, 4,800 samples consumed)"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (12.34, "12.3"),
        (999.7, "1.00k"),
        (1000, "1.00k"),
        (12431, "12.4k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (124_439_808, "124M"),
        (3.1e13, "31.0T"),
        (4.2e19, "42.0E"),
        (-1500, "-1.50k"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert render_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1023 * 1024, "1.00 MiB"),
        (80 * 2**30, "80.0 GiB"),
        (2**50, "1.00 PiB"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert render_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (130, "2m10s"),
        (3599.6, "1h00m"),
        (11_220, "3h07m"),
        (187_200, "2d04h"),
        (-3, "0s"),
        (float("nan"), "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert render_duration(seconds) == text


@given(st.floats(0.001, 1e20))
def test_a_count_is_right_to_half_a_percent_and_short(value: float) -> None:
    text = render_count(value)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    shown = float(text[:-1]) * scale[text[-1]] if text[-1] in scale else float(text)
    assert shown == pytest.approx(value, rel=0.00501, abs=0.00501)
    assert len(text) <= 5


def test_the_sink_prints_the_lines_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(steps=10)
    sink.log(1, {"train/loss": 2.0})
    sink.log(1, {"eval/loss": 3.0})
    sink.log(1, {"speed/other": 3.0})
    sink.text(1, "sample", "hello")
    assert capsys.readouterr().out == (
        "step  1/10  loss 2.0000\neval  1/10  loss 3.0000\ntext  1/10  sample\n    hello\n"
    )


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    code = (
        "from gptdist.monitor.console import ConsoleSink\n"
        "sink = ConsoleSink(9)\n"
        "for step in (1, 2):\n"
        "    try: sink.log(step, {'train/loss': 1.0})\n"
        "    except BrokenPipeError: print('noticed')\n"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, timeout=30)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_lines_print_above_the_bar() -> None:
    screen = io.StringIO()
    bar = ProgressBar(0, 40, Console(file=screen, force_terminal=True, width=60, color_system=None))
    bar.advance(10, eta_seconds=130)
    bar.write_line("step  10/40  loss [bold]3.2[/bold] :smile:")
    bar.advance(40)
    bar.close()
    shown = screen.getvalue()
    assert "10/40" in shown
    assert "eta 2m10s" in shown
    assert "step  10/40  loss [bold]3.2[/bold] :smile:\n" in shown
    assert shown.rindex("40/40") > shown.index("loss")
    assert shown.endswith("\x1b[?25h"), "the cursor must come back"
