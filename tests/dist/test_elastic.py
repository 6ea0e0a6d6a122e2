"""What may change when a run goes on, and what needs a word; runs that begin with another's weights.

Through the command.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools.build import build_corpus
from tests.dist.commands import Commands, checkpoint_names, curve, metrics, open_last, tree

SAME = 2e-5  # relative: other layouts sum in another order


@pytest.fixture(scope="module")
def second_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, of the same tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "text.txt").write_text("".join(f"{number} squared is {number * number}.\n" for number in range(3000)))
    build_corpus([folder / "text.txt"], folder / "corpus", "bytes", validation_fraction=0.1)
    return folder / "corpus"


def test_every_leg_of_a_run_has_another_layout(commands: Commands, second_corpus: Path, tmp_path: Path) -> None:
    """Ranks, TP, PP, ZeRO stage, offload, micro-batch: stopped before a phase of the blend, and in the middle of it."""
    parts = [{"corpus": str(commands.corpus), "weight": 3}, {"corpus": str(second_corpus), "weight": 1}]
    later = [{"corpus": str(commands.corpus), "weight": 1}, {"corpus": str(second_corpus), "weight": 2}]
    blend = {"data__corpus": None, "data__blend": parts, "data__phases": [{"from_sample": 67, "blend": later}]}
    settings = {**blend, "train__steps": 12, "schedule__kind": "wsd", "model__num_kv_heads": 2}
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    commands.train(whole, 2, **settings).expect(0)

    commands.train(legs, 1, **settings, train__stop_after=4, train__micro_batch_size=6).expect(75)
    second = {"parallel__zero_stage": 3, "parallel__offload_optimizer": True, "train__micro_batch_size": 2}
    again = commands.train(legs, 3, **settings, **second, train__stop_after=8).expect(75)
    assert "note    saved under DP 1 x TP 1 x PP 1, ZeRO 1; every layout goes on from it alike" in again.out
    assert "changed since" not in again.out
    third = {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2, "train__micro_batch_size": 3}
    commands.train(legs, 4, **settings, **third).expect(0)

    expected, found = curve(whole), curve(legs)
    assert sorted(found) == list(range(1, 13))
    for step, (loss, norm, samples) in found.items():
        assert samples == expected[step][2] == 12 * step
        assert loss == pytest.approx(expected[step][0], rel=SAME), f"step {step}"
        assert norm == pytest.approx(expected[step][1], rel=SAME), f"step {step}"
    with open_last(whole) as one, open_last(legs) as other:
        counters = ("step", "samples", "tokens", "skipped_total", "skipped_in_a_row", "random", "data")
        assert {key: one.state[key] for key in counters} == {key: other.state[key] for key in counters}
        assert one.state["engine"] == other.state["engine"]
        # Where the legs began, and what of the blend they were in, is in no state but the count of samples.
        assert one.state["samples"] == 144 and one.state["data"]["phases"][1]["from_sample"] == 67


def test_a_run_shrinks_and_grows_back_on_the_ranks_there_are(commands: Commands, tmp_path: Path) -> None:
    settings = {"train__steps": 12, "train__micro_batch_size": 4, "launch__min_nodes": 1}
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    commands.train(whole, 3, **settings).expect(0)
    first = commands.train(legs, 3, **settings, train__stop_after=4).expect(75)
    assert "to fit" not in first.out
    second = commands.train(legs, 2, **settings, train__stop_after=8).expect(75)
    assert "note    to fit 2 ranks: train.micro_batch_size 4 -> 3\n" in second.out and "DP 2" in second.out
    written = (legs / "config.yaml").read_text()
    assert "micro_batch_size: 4 " in written, "the run's own, to grow back to"
    third = commands.run("train", legs / "config.yaml", "--nproc", 3, "train.stop_after=null").expect(0)
    assert "to fit" not in third.out and "DP 3" in third.out

    expected, found = curve(whole), curve(legs)
    assert sorted(found) == list(range(1, 13))
    for step, (loss, norm, samples) in found.items():
        assert samples == expected[step][2] == 12 * step
        assert loss == pytest.approx(expected[step][0], rel=SAME), f"step {step}"
        assert norm == pytest.approx(expected[step][1], rel=SAME), f"step {step}"
    with open_last(whole) as one, open_last(legs) as other:
        same = ("step", "samples", "tokens", "skipped_total", "skipped_in_a_row", "random", "data", "engine")
        assert {key: one.state[key] for key in same} == {key: other.state[key] for key in same}


def test_ranks_that_find_nothing_to_do(commands: Commands, tmp_path: Path) -> None:
    settings = {"train__steps": 2, "schedule__warmup_steps": 1, "train__global_batch_size": 2}
    commands.train(tmp_path / "strict", 3, **settings).one_error("train.global_batch_size (2) is not a multiple")
    ended = commands.train(tmp_path / "run", 3, **settings, launch__min_nodes=1).expect(0)
    assert "note    rank 2 stays idle: of 3 ranks, 2 share the global batch evenly" in ended.out
    assert "on 2 x cpu" in ended.out
    refused = commands.train(tmp_path / "two", 3, **settings, launch__min_nodes=2)
    refused.one_error("There is 1 node", "launch.min_nodes")


def test_tasks_of_srun_that_find_nothing_to_do(commands: Commands, tmp_path: Path) -> None:
    step = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 3, "SLURM_STEP_TASKS_PER_NODE": 3}
    step |= {"SLURM_NODEID": 0, "SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_NODELIST": "localhost"}
    settings = {"train__steps": 2, "schedule__warmup_steps": 1, "train__global_batch_size": 2, "launch__min_nodes": 1}
    words = commands.train_words(tmp_path / "run", 1, **settings)
    tasks = []
    for task in range(3):
        env = {**step, "SLURM_PROCID": task, "SLURM_LOCALID": task}
        tasks.append(commands.start(*words, **{name: str(value) for name, value in env.items()}))
    ends = [task.wait().expect(0) for task in tasks]
    assert "note    rank 2 stays idle: of 3 ranks, 2 share the global batch evenly" in ends[0].out
    assert "on 2 x cpu" in ends[0].out and "done. Step 2" in ends[0].out
    assert not ends[2].out and not any(end.errors for end in ends)


def test_another_precision_needs_a_word(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    commands.train(run_dir, train__steps=4, train__stop_after=2).expect(75)
    before = tree(run_dir)
    says = ("train.precision fp32", "says bf16", "train.precision: fp32", "checkpoint.allow_precision_change: true")
    commands.train(run_dir, 2, train__steps=4, train__precision="bf16").one_error("step-00000002", *says)
    assert tree(run_dir) == before

    allowed = {"train__precision": "fp16", "checkpoint__allow_precision_change": True, "train__loss_scale": 1024}
    resumed = commands.train(run_dir, 2, train__steps=4, train__stop_after=3, **allowed).expect(75)
    assert "note    train.precision was fp32, is fp16 from here on" in resumed.out
    assert "the loss scale begins at train.loss_scale (1024)" in resumed.out
    with open_last(run_dir) as checkpoint:
        assert checkpoint.state["engine"]["loss_scaler"]["cur_scale"] == 1024
        assert checkpoint.state["engine"]["optimizer_steps"] == 3
    on = commands.train(run_dir, train__steps=4, train__precision="fp16").expect(0)
    assert "train.precision was" not in on.out, "it is the run's precision now"


# -- beginning with another's weights ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of four steps, the last two saved; it evaluates at the end."""
    folder = tmp_path_factory.mktemp("elastic")
    commands = Commands(folder, corpus)
    commands.train(folder / "run", 2, train__steps=4, checkpoint__interval=1, checkpoint__keep=2).expect(0)
    return folder / "run"


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval/loss"]) for row in metrics(run_dir) if "eval/loss" in row]


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [(2, {}), (4, {"parallel__tensor": 2, "parallel__pipeline": 2}), (3, {"parallel__zero_stage": 3})],
    ids=("the same layout", "TP2 x PP2", "DP3 ZeRO 3"),
)
def test_a_run_begins_at_the_loss_that_another_ended_with(
    nproc: int, layout: dict[str, Any], trained: Path, commands: Commands, tmp_path: Path
) -> None:
    new, source = tmp_path / "new", tmp_path / "source"
    shutil.copytree(trained, source)
    settings = {"train__steps": 3, "train__stop_after": 2, "checkpoint__start_from": source, **layout}
    begun = commands.train(new, nproc, **settings).expect(75)
    assert f"start   step 0, with the weights of {source}/checkpoints/step-00000004" in begun.out
    (step, ended_with), (first, begins_with) = evaluations(source)[-1], evaluations(new)[0]
    assert (step, first) == (4, 0)
    assert begins_with == (ended_with if not layout else pytest.approx(ended_with, rel=SAME))
    assert curve(new)[1][2] == 12, "the data begins anew"
    with open_last(new) as checkpoint:
        assert checkpoint.state["engine"]["optimizer_steps"] == checkpoint.step == 2

    shutil.rmtree(source)  # a run that has checkpoints of its own does not ask for where it came from
    resumed = commands.train(new, nproc, **{**settings, "train__stop_after": None}).expect(0)
    assert f"resumed from {new}/checkpoints/step-00000002 (step 2, 24 samples consumed)" in resumed.out


def test_weights_alone_are_begun_with_and_not_resumed(trained: Path, commands: Commands, tmp_path: Path) -> None:
    mean, run_dir = tmp_path / "mean", tmp_path / "run"
    checkpoints = [trained / "checkpoints" / name for name in checkpoint_names(trained)]
    commands.run("ckpt", "average", *checkpoints, "--out", mean).expect(0)
    shutil.copytree(mean, run_dir / "checkpoints" / "step-00000004")
    before = tree(run_dir)
    says = ("step-00000004 cannot be resumed", "without optimizer state", "checkpoint.start_from")
    commands.train(run_dir, 2, train__steps=6).one_error(*says)
    assert tree(run_dir) == before
    sources = tree(mean)
    short = {"train__steps": 1, "schedule__warmup_steps": 0}
    begun = commands.train(tmp_path / "new", **short, checkpoint__start_from=mean).expect(0)
    assert f"with the weights of {mean}" in begun.out and evaluations(tmp_path / "new")[0][0] == 0
    assert tree(mean) == sources, "a source is only read"


def test_what_a_run_cannot_begin_with(trained: Path, commands: Commands, tmp_path: Path) -> None:
    new = tmp_path / "new"

    def refused(*says: str, **settings: Any) -> None:
        commands.train(new, 2, checkpoint__start_from=settings.pop("source", trained), **settings).one_error(*says)
        assert not new.exists()

    refused("no checkpoint at", "nowhere", "launch.run_dir", source=tmp_path / "nowhere")
    refused("model.num_heads is 4 there, 2 here", "checkpoint.start_from", model__num_heads=2)
    refused("model.num_layers is 2 there, 4 here", "model.bias is True there", model__num_layers=4, model__bias=False)
    refused("checkpoint.start_from", "keeps its own checkpoints", "launch.run_dir", source=new / "checkpoints")
    (tmp_path / "text.txt").write_text("Other words for another tokenizer, over and over again. " * 200)
    commands.corpus = tmp_path / "tokens"
    build_corpus([tmp_path / "text.txt"], commands.corpus, "train:257", validation_fraction=0.1)
    refused("step-00000004 was trained with another tokenizer (sha256", "than the corpus was built with (sha256")
