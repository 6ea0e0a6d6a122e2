"""Which checkpoints a config goes on from or begins with: every refusal by its words, and what may change freely."""

import json
from typing import Any

import pytest

from gptdist.config.load import resolved_dict
from gptdist.config.sections import ModelConfig, RunConfig
from gptdist.errors import CheckpointError
from gptdist.model.parameters import logical_shapes
from gptdist.train.compatible import (
    check_can_begin,
    check_resumable,
    check_same_model,
    check_same_network,
    resume_notes,
)

NAMES = ("weight/w", "exp_avg/w", "exp_avg_sq/w")
WHERE = "runs/a/checkpoints/step-00000007"


def config_of(**settings: Any) -> RunConfig:
    """A RunConfig from model__num_layers=4 and the like."""
    sections: dict[str, dict[str, Any]] = {"data": {"corpus": "x"}}
    for key, value in settings.items():
        section, setting = key.split("__")
        sections.setdefault(section, {})[setting] = value
    return RunConfig.model_validate(sections)


def state_of(config: RunConfig, **more: Any) -> dict[str, Any]:
    """What a checkpoint of a run of `config` says, after a way through JSON."""
    state = {
        "step": 7,
        "samples": 56,
        "layout": "DP 1 x TP 1 x PP 1, ZeRO 1",
        "engine": {"optimizer": "adamw", "optimizer_steps": 7, "loss_scaler": {}},
        "data": {"tokenizer": "ab" * 32},
        "config": resolved_dict(config),
    }
    found: dict[str, Any] = json.loads(json.dumps(state | more))
    return found


def test_the_same_run_goes_on_and_says_nothing() -> None:
    config = config_of()
    state = state_of(config)
    check_resumable(NAMES, state, config, WHERE)
    assert resume_notes(state, config, state["layout"]) == []


MODERN = {"model__position": "rotary", "model__activation": "swiglu", "model__norm": "rmsnorm"}


@pytest.mark.parametrize(
    ("then", "now", "says"),
    [
        ({}, {"model__num_heads": 6}, ["model.num_heads is 12 there, 6 here"]),
        ({}, {"model__norm_epsilon": 1e-6}, ["model.norm_epsilon is 1e-05 there, 1e-06 here"]),
        ({}, {"model__activation": "gelu"}, ["model.activation is 'gelu_tanh' there, 'gelu' here"]),
        (
            {"model__num_layers": 3, "model__hidden_size": 96, "model__bias": False},
            {},
            [
                "model.num_layers is 3 there, 12",
                "model.hidden_size is 96 there, 768",
                "model.bias is False there, True",
            ],
        ),
        (MODERN, {**MODERN, "model__rotary_base": 500000.0}, ["model.rotary_base is 10000.0 there, 500000.0 here"]),
        ({"model__num_kv_heads": 4}, {}, ["model.num_kv_heads is 4 there, 12 here"]),
        ({}, {"model__ffn_hidden_size": 1024}, ["model.ffn_hidden_size is 3072 there, 1024 here"]),
        ({}, {"model__tie_embeddings": False}, ["model.tie_embeddings is True there, False here"]),
    ],
)
def test_another_model_is_refused_by_each_field(then: dict[str, Any], now: dict[str, Any], says: list[str]) -> None:
    """Also where every shape is the same, and the weights would load and mean something else."""
    with pytest.raises(CheckpointError) as caught:
        check_resumable(NAMES, state_of(config_of(**then)), config_of(**now), WHERE)
    message = str(caught.value)
    assert all(word in message for word in [*says, WHERE, "another model", "Set the model section", "--fresh"]), message
    assert message.count(" there, ") == len([word for word in says if "there" in word])


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"model__num_kv_heads": 12}, {}),
        ({"model__ffn_hidden_size": 3072}, {}),
        ({"model__rotary_base": 5.0}, {}),  # positions are learned
        ({"model__dropout": 0.1}, {"model__attention_dropout": 0.1}),
        ({"model__init_std": 0.1}, {}),
    ],
)
def test_the_same_network_in_other_words(then: dict[str, Any], now: dict[str, Any]) -> None:
    check_resumable(NAMES, state_of(config_of(**then)), config_of(**now), WHERE)


def test_a_field_from_the_future_is_not_passed_over() -> None:
    state = state_of(config_of())
    state["config"]["model"]["experts"] = 8
    with pytest.raises(CheckpointError, match=r"model\.experts \(8\) is nothing this version knows"):
        check_resumable(NAMES, state, config_of(), WHERE)
    del state["config"]["model"]["experts"], state["config"]["model"]["init_std"]  # a field that came later
    check_resumable(NAMES, state, config_of(), WHERE)


@pytest.mark.parametrize("state", [{}, state_of(config_of()), {"averaged_from": [{}, {}], "config": {}}])
def test_weights_alone_are_begun_with_not_resumed(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_resumable(("weight/w",), state, config_of(), WHERE)
    words = [WHERE, "cannot be resumed", "without optimizer state", f"checkpoint.start_from: {WHERE}", "launch.run_dir"]
    assert all(word in str(caught.value) for word in words), caught.value
    assert ("the mean of 2 checkpoints' weights" in str(caught.value)) is ("averaged_from" in state)


def test_run_state_that_is_not_all_there() -> None:
    state = state_of(config_of())
    del state["data"], state["samples"]
    with pytest.raises(CheckpointError, match=r"does not say samples, data in its run state.*checkpoint\.start_from"):
        check_resumable(NAMES, state, config_of(), WHERE)


def test_another_optimizers_state_means_nothing() -> None:
    state = state_of(config_of(), engine={"optimizer": "lion", "optimizer_steps": 7, "loss_scaler": {}})
    with pytest.raises(CheckpointError, match=r"optimizer 'lion', which means nothing to 'adamw'.*start_from"):
        check_resumable(NAMES, state, config_of(), WHERE)
    check_resumable(NAMES, state_of(config_of(), engine={"optimizer_steps": 7}), config_of(), WHERE)


@pytest.mark.parametrize(("then", "now"), [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "fp32")])
def test_another_precision_is_taken_on_purpose(then: str, now: str) -> None:
    state, config = state_of(config_of(train__precision=then)), config_of(train__precision=now)
    with pytest.raises(CheckpointError) as caught:
        check_resumable(NAMES, state, config, WHERE)
    words = [WHERE, f"train.precision {then}", f"says {now}", "checkpoint.allow_precision_change: true"]
    assert all(word in str(caught.value) for word in words), caught.value

    allowed = config_of(train__precision=now, checkpoint__allow_precision_change=True)
    check_resumable(NAMES, state, allowed, WHERE)
    (note,) = resume_notes(state, allowed, state["layout"])
    assert f"was {then}, is {now} from here on" in note and "exact" in note
    assert ("loss scale begins at train.loss_scale (65536)" in note) is (now == "fp16")


def test_what_changed_is_said() -> None:
    state = state_of(config_of(optimizer__learning_rate=3e-3))
    settings = {"train__steps": 2000, "train__eval_samples": 8, "train__micro_batch_size": 4, "model__dropout": 0.1}
    layout, changed = resume_notes(state, config_of(**settings), "DP 2 x TP 1 x PP 1, ZeRO 3")
    assert layout == "saved under DP 1 x TP 1 x PP 1, ZeRO 1; every layout goes on from it alike"
    assert changed == (
        "changed since the checkpoint: model.dropout 0.0 -> 0.1, optimizer.learning_rate 0.003 -> 0.0003, "
        "train.steps 1000 -> 2000"
    )


# -- beginning with another's weights ----------------------------------------------------------------------------------


def test_what_weights_can_begin_a_run() -> None:
    model = config_of().model
    for state in (state_of(config_of()), {}, {"config": None, "data": None}, {"data": {"tokenizer": "ab" * 32}}):
        check_can_begin(state, model, "ab" * 32, WHERE)
    with pytest.raises(CheckpointError, match=r"abababababab\.\.\.\).*\(sha256 cdcdcdcdcdcd\.\.\.\).*other text"):
        check_can_begin(state_of(config_of()), model, "cd" * 32, WHERE)
    with pytest.raises(
        CheckpointError, match=r"model\.num_layers is 12 there, 6 here.*leave out checkpoint\.start_from"
    ):
        check_can_begin(state_of(config_of()), config_of(model__num_layers=6).model, "ab" * 32, WHERE)


def test_a_longer_context_can_begin_where_positions_are_not_learned() -> None:
    rotary = state_of(config_of(**MODERN))
    check_can_begin(rotary, config_of(**MODERN, model__sequence_length=4096).model, "ab" * 32, WHERE)
    with pytest.raises(CheckpointError, match=r"model\.sequence_length is 1024 there, 4096 here"):
        check_can_begin(state_of(config_of()), config_of(model__sequence_length=4096).model, "ab" * 32, WHERE)


def test_shapes_are_compared_where_nothing_is_said() -> None:
    model = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, vocab_size=64)
    check_same_network({}, model, WHERE, "or not")
    shapes = logical_shapes(model)
    check_same_model(shapes, model, WHERE)
    wide = {**shapes, "final_norm.weight": (64,)}
    with pytest.raises(CheckpointError, match=r"its final_norm\.weight is \[64\], the configured model's is \[32\]"):
        check_same_model(wide, model, WHERE)
    with pytest.raises(CheckpointError, match=r"it has no final_norm\.weight.*Set the model section.*or not"):
        check_same_model({k: v for k, v in shapes.items() if k != "final_norm.weight"}, model, WHERE, "or not")
    with pytest.raises(CheckpointError, match=r"it has extra\.weight, which the configured model has not"):
        check_same_model({**shapes, "extra.weight": (1,)}, model, WHERE)
