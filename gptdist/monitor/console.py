"""What a run prints: its header, a line each log interval, and numbers as people read them.

Knows the names of the values that the console shows; any other value is for the other sinks. The `render_` functions
are pure; only `ConsoleSink` writes.

Names: `train/loss` (nats per token), `train/learning_rate`, `train/grad_norm`, `train/skipped_steps` (in all),
`train/loss_scale` (fp16), `speed/tokens_per_second`, `speed/model_flops` (per second, all devices), `speed/mfu`
(0 to 1), `speed/eta_seconds`, `memory/bytes` (one device or process), `eval/loss`, `eval/perplexity`,
`eval/bits_per_byte`. Other sinks also get `data/epoch`, or `data/epoch/NAME` and `eval/loss/NAME` of each corpus of
a blend; `train/spikes`, `train/rollbacks` and `data/left_out_samples`, once there are any.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass


class ConsoleSink:
    """Prints the values it knows, through `write_line` where a progress bar owns the terminal."""

    name = "console"

    def __init__(self, steps: int, write_line: Callable[[str], None] | None = None) -> None:
        self._steps = steps
        self._write_line = write_line or _print_line

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._write_line(render_step(step, self._steps, values))
        if "eval/loss" in values:
            self._write_line(render_evaluation(step, self._steps, values))

    def text(self, step: int, tag: str, text: str) -> None:
        self._write_line(render_text(step, self._steps, tag, text))

    def close(self) -> None:
        """Nothing is held open."""


@dataclass(frozen=True)
class CorpusUse:
    """A corpus in a run: its size, the share of the run's samples that come from it, and how often it is read."""

    name: str
    tokens: int
    documents: int
    share: float
    epochs: float


@dataclass(frozen=True)
class RunHeader:
    """What is worth knowing before the first step. `devices`: `2 x cpu`; `resumed_from`: None for a new run, whose
    weights came from `begun_with`, or were drawn."""

    parameters: int
    layout: str
    devices: str
    precision: str
    global_batch_size: int
    sequence_length: int
    steps: int
    total_samples: int
    run_dir: str
    resumed_from: str | None = None
    begun_with: str | None = None
    start_step: int = 0
    start_sample: int = 0
    corpora: tuple[CorpusUse, ...] = ()


def render_run_header(header: RunHeader) -> str:
    """The first lines of a run."""
    tokens_per_step = f"{header.global_batch_size * header.sequence_length:,} tokens a step"
    total = f"{header.steps:,} steps, {render_count(header.total_samples * header.sequence_length)} tokens in all"
    if header.begun_with is not None:
        start = f"step 0, with the weights of {header.begun_with}"
    elif header.resumed_from is None:
        start = "fresh, from step 0"
    else:
        start = (
            f"resumed from {header.resumed_from} (step {header.start_step:,}, {header.start_sample:,} samples consumed)"
        )
    rows = {
        "model": f"{render_count(header.parameters)} parameters ({header.parameters:,})",
        "layout": f"{header.layout}, on {header.devices}, {header.precision}",
        "data": "\n        ".join(render_corpus_use(use, len(header.corpora)) for use in header.corpora) or None,
        "batch": f"{header.global_batch_size:,} x {header.sequence_length:,} = {tokens_per_step}; {total}",
        "run": header.run_dir,
        "start": start,
    }
    return "\n".join(f"{label:<8}{value}" for label, value in rows.items() if value is not None)


def render_corpus_use(use: CorpusUse, corpora: int) -> str:
    """`data/a: 1,234 tokens in 56 documents, 70 % of the samples, 0.31 epochs`; one corpus alone has no share."""
    share = f", {100 * use.share:.3g} % of the samples" if corpora > 1 else ""
    return f"{use.name}: {use.tokens:,} tokens in {use.documents:,} documents{share}, {use.epochs:.3g} epochs"


def render_step(step: int, steps: int, values: Mapping[str, float]) -> str:
    """`step  400/2000  loss 3.2141  lr 3.00e-04  |g| 0.83  12.4k tok/s  31.0 GFLOP/s  mfu 41%  mem 1.20 GiB  eta 2m10s`

    Fields have their usual width, so that the columns of following lines stand below each other; a value that is not
    there has no field.
    """
    shown: list[tuple[str, int, Callable[[float], str]]] = [
        ("train/loss", 11, lambda v: f"loss {v:.4f}"),
        ("train/learning_rate", 11, lambda v: f"lr {v:.2e}"),
        ("train/grad_norm", 8, lambda v: f"|g| {_render_norm(v)}"),
        ("speed/tokens_per_second", 11, lambda v: f"{render_count(v)} tok/s"),
        ("speed/model_flops", 12, _render_flops),
        ("speed/mfu", 7, _render_mfu),
        ("memory/bytes", 12, lambda v: f"mem {render_bytes(v)}"),
        ("train/loss_scale", 11, lambda v: f"scale {render_count(v)}"),
        ("train/skipped_steps", 10, lambda v: f"skipped {v:.0f}" if v else ""),
        ("speed/eta_seconds", 0, lambda v: f"eta {render_duration(v)}"),
    ]
    fields = [_render_position(step, steps)]
    for name, width, render in shown:
        if name in values and (field := render(values[name])):
            fields.append(field.ljust(width))
    return "  ".join(fields).rstrip()


def render_evaluation(step: int, steps: int, values: Mapping[str, float]) -> str:
    """`eval  400/2000  loss 3.2141  perplexity 24.88  bits/byte 1.4512`."""
    fields = [_render_position(step, steps, "eval"), f"loss {values['eval/loss']:.4f}"]
    if "eval/perplexity" in values:
        fields.append(f"perplexity {values['eval/perplexity']:.2f}")
    if "eval/bits_per_byte" in values:
        fields.append(f"bits/byte {values['eval/bits_per_byte']:.4f}")
    return "  ".join(fields)


def render_text(step: int, steps: int, tag: str, text: str) -> str:
    """The step and tag on one line, the text indented below. Control characters from a model are shown, not obeyed."""
    lines = [f"    {''.join(c if c.isprintable() else repr(c)[1:-1] for c in line)}" for line in text.split("\n")]
    return "\n".join([f"{_render_position(step, steps, 'text')}  {tag}", *lines])


def render_count(value: float) -> str:
    """Three significant digits and k, M, G, T, P or E: 12400 -> `12.4k`; counts below 1000 as they are."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1000 and value == int(value):
        return f"{value:.0f}"
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T", "P", "E"))


def render_bytes(value: float) -> str:
    """Three significant digits and KiB to PiB: 1.2 * 2**30 -> `1.20 GiB`."""
    if abs(value) < 1024:
        return f"{value:.0f} B"
    return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def render_duration(seconds: float) -> str:
    """The two largest units: `45s`, `2m10s`, `3h07m`, `2d04h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    if minutes:
        return f"{minutes}m{whole % 60:02}s"
    return f"{whole}s"


def _print_line(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # The reader is gone (`| head`). What is still buffered would fail again at exit and change the exit code of a
        # run that is fine, so let it go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _render_position(step: int, steps: int, label: str = "step") -> str:
    return f"{label} {step:>{len(str(steps))}}/{steps}"


def _render_norm(value: float) -> str:
    plain = value == 0 or 0.01 <= value < 1000 or not math.isfinite(value)
    return _three_digits(value) if plain else f"{value:.1e}"


def _render_flops(value: float) -> str:
    count = render_count(value)
    prefix = count[-1] if count[-1].isalpha() and math.isfinite(value) else ""
    return f"{count.removesuffix(prefix)} {prefix}FLOP/s"


def _render_mfu(fraction: float) -> str:
    percent = 100 * fraction
    return f"mfu {percent:.0f}%" if percent >= 10 else f"mfu {percent:.1f}%"


def _scaled(value: float, base: float, suffixes: tuple[str, ...]) -> str:
    exponent = 0
    # 999.5 would print as 1000 of the smaller unit: it belongs to the next one.
    while abs(value) >= 999.5 and exponent < len(suffixes) - 1:
        value /= base
        exponent += 1
    return _three_digits(value) + suffixes[exponent]


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{decimals}f}"
