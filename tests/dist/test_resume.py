"""A run that was killed and resumed is the run that was never touched: bitwise; under another layout, to fp32 rounding.

Through the command. Each case trains once undisturbed, once until a SIGKILL of the launcher at a random step, and on
from there; losses of every step and every byte of the final state must agree.
"""

import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.dist.commands import Commands, checkpoint_names, curve, last_step, metrics, open_last, state_bytes

SAME = 2e-5  # relative: other layouts sum in another order
STEPS = 16
FIRST_SAVE = 4

# Several micro-batches a rank, so that the order of sums could show; sizes that 3 ranks divide.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank, dropout": (1, {"model__dropout": 0.1, "model__attention_dropout": 0.1}),
    "TP2+SP, dropout": (2, {"parallel__tensor": 2, "parallel__sequence": True, "model__dropout": 0.1}),
    "PP2, ZeRO 3, untied": (2, {"parallel__pipeline": 2, "parallel__zero_stage": 3, "model__tie_embeddings": False}),
    "DP2, ZeRO 1, fp16": (2, {"train__precision": "fp16", "train__loss_scale": 65536, "train__loss_scale_window": 4}),
    "DP3, ZeRO 2, bf16": (3, {"parallel__zero_stage": 2, "train__precision": "bf16"}),
    "DP4, ZeRO 0": (4, {"parallel__zero_stage": 0}),
    "DP4, ZeRO 3, bf16": (4, {"parallel__zero_stage": 3, "train__precision": "bf16"}),
    "DP2 x PP2, ZeRO 1, ramp": (
        4,
        {
            "parallel__pipeline": 2,
            "schedule__batch_ramp.start": 4,
            "schedule__batch_ramp.increment": 4,
            "schedule__batch_ramp.samples": 100,
        },
    ),
}

OTHER_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "DP3, ZeRO 3": (3, {"parallel__zero_stage": 3}),
    "DP4, ZeRO 2, micro-batch 3": (4, {"parallel__zero_stage": 2, "train__micro_batch_size": 3}),
    "TP2+SP": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "TP2 x PP2, ZeRO 0": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__zero_stage": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(case: str, commands: Commands, tmp_path: Path) -> None:
    nproc, settings = CASES[case]
    settings = {"train__steps": STEPS, "checkpoint__interval": FIRST_SAVE, **settings}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    commands.train(undisturbed, nproc, **settings).expect(0)

    kill_at = random.randint(FIRST_SAVE + 1, STEPS - 4)
    run = commands.start_train(killed, nproc, **settings)
    reached = run.wait_until(lambda: last_step(killed) >= kill_at and len(checkpoint_names(killed)) > 0)
    assert reached, run.wait().err
    assert run.kill().code == -signal.SIGKILL, f"it was over before step {kill_at} could be seen"
    resumed = commands.train(killed, nproc, **settings).expect(0)

    saved = re.search(r"resumed from .*step-(\d+) \(step (\d+),", resumed.out)
    assert saved and int(saved[1]) == int(saved[2]) and FIRST_SAVE <= int(saved[1]) < STEPS, resumed.out
    assert curve(killed) == curve(undisturbed), f"killed at step {kill_at} or soon after, resumed from {saved[1]}"
    assert sorted(curve(killed)) == list(range(1, STEPS + 1))
    assert_same_state(killed, undisturbed)
    assert open_last(killed).state["samples"] == open_last(undisturbed).state["samples"]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """(a run of 12 steps on two ranks, the same run stopped after 6)."""
    folder = tmp_path_factory.mktemp("half-way")
    commands = Commands(folder, corpus)
    commands.train(folder / "whole", 2, train__steps=12).expect(0)
    commands.train(folder / "half", 2, train__steps=12, train__stop_after=6).expect(75)
    return folder / "whole", folder / "half"


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_resumed_under_another_layout(
    layout: str, half_way: tuple[Path, Path], commands: Commands, tmp_path: Path
) -> None:
    nproc, settings = OTHER_LAYOUTS[layout]
    whole, half = half_way
    resumed = tmp_path / "resumed"
    shutil.copytree(half, resumed)
    commands.train(resumed, nproc, train__steps=12, **settings).expect(0)

    expected, found = curve(whole), curve(resumed)
    assert sorted(found) == list(range(1, 13))
    assert {step: found[step] for step in range(1, 7)} == {step: expected[step] for step in range(1, 7)}
    for step in range(7, 13):
        loss, norm, samples = found[step]
        assert samples == expected[step][2] == 12 * step
        # Other samples would give another loss: those of neighbouring steps differ by over a hundred times this.
        assert loss == pytest.approx(expected[step][0], rel=SAME), f"step {step}"
        assert norm == pytest.approx(expected[step][1], rel=SAME), f"step {step}"
    last_evaluation = [[row["eval/loss"] for row in metrics(run) if "eval/loss" in row][-1] for run in (whole, resumed)]
    assert last_evaluation[1] == pytest.approx(last_evaluation[0], rel=SAME)


def test_the_bound_tells_other_samples_apart(half_way: tuple[Path, Path], commands: Commands, tmp_path: Path) -> None:
    """With another order of samples the same run is far outside the bound: the test above could fail."""
    other = tmp_path / "other-order"
    commands.train(other, 1, train__steps=12, train__stop_after=3, data__seed=99).expect(75)
    expected = curve(half_way[0])
    away = [abs(curve(other)[step][0] - expected[step][0]) / (SAME * expected[step][0]) for step in (1, 2, 3)]
    assert min(away) > 10
    assert max(away) > 50


def assert_same_state(one: Path, other: Path) -> None:
    """Weights and both moments, bit for bit; name what differs."""
    left, right = state_bytes(one), state_bytes(other)
    assert sorted(left) == sorted(right)
    kinds = {name.partition("/")[0] for name in left}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
    different = [name for name in left if left[name] != right[name]]
    assert not different, f"{len(different)} of {len(left)} tensors differ: {different[:5]}"
