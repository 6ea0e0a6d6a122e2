"""The rules across sections: each one broken alone gives its one message; what they allow really fits."""

import importlib
import itertools
import pkgutil
from typing import Any

import pytest

from gptdist.config import rules
from gptdist.config.check import RULES, check_run
from gptdist.config.sections import RunConfig
from gptdist.errors import ConfigError
from gptdist.layout import Layout
from gptdist.train.schedule import batch_ramp_levels


def run_config(**settings: Any) -> RunConfig:
    """A RunConfig from model__num_layers=4 and the like."""
    sections: dict[str, dict[str, Any]] = {"data": {"corpus": "x"}}
    for key, value in settings.items():
        section, setting = key.split("__")
        sections.setdefault(section, {})[setting] = value
    return RunConfig.model_validate(sections)


def parts(**weights: float) -> list[dict[str, Any]]:
    """Parts of a blend."""
    return [{"corpus": name, "weight": weight} for name, weight in weights.items()]


BLEND = {"data__corpus": None, "data__blend": parts(a=1, b=2)}
RAMP = {"start": 4, "increment": 2, "samples": 100}


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({"data__blend": parts(a=1)}, 1, "data.corpus (x) and data.blend are both set"),
        ({"data__corpus": None}, 1, "data.corpus is not set. Set it to a corpus, or data.blend to several"),
        ({"data__corpus": None, "data__blend": []}, 1, "data.blend is empty. Name at least one corpus"),
        (
            BLEND | {"data__phases": [{"from_sample": 5, "blend": []}]},
            1,
            "data.phases[0].blend is empty.",
        ),
        (
            {"data__corpus": None, "data__blend": [*parts(a=1, b=1), *parts(a=2)]},
            1,
            "data.blend[2].corpus names a a second time; the first is data.blend[0].corpus.",
        ),
        (
            {"data__corpus": None, "data__blend": parts(a=0.123457, b=0.876543)},
            1,
            "(0.123457, 0.876543) repeat only after 1,000,000 samples, the sum of the smallest whole numbers in their "
            "proportions; it can be at most 65,536. Use rounder ones: 247, 1753.",
        ),
        (
            {"data__phases": [{"from_sample": 5, "blend": parts(b=1)}]},
            1,
            "Write the corpus of the first phase as a blend: data.blend: [{corpus: x, weight: 1}].",
        ),
        (
            BLEND | {"data__phases": [{"from_sample": at, "blend": parts(b=1)} for at in (9, 9)]},
            1,
            "data.phases[1].from_sample (9) is not above that of the phase before it (9).",
        ),
        ({"data__shuffle_blocks": 4}, 1, "data.shuffle_blocks (4) is about blocks, and data.shuffle is global"),
        ({"data__shuffle_block_tokens": 9}, 1, "data.shuffle_block_tokens (9) is about blocks"),
        (
            {"launch__run_dir": "runs/a", "checkpoint__start_from": "runs/a/"},
            1,
            "checkpoint.start_from (runs/a/) is where this run keeps its own checkpoints, which it resumes by itself.",
        ),
        (
            {"checkpoint__dir": "/c", "checkpoint__start_from": "/x/../c"},
            1,
            "begin a run elsewhere: set launch.run_dir",
        ),
        ({"parallel__tensor": 4, "parallel__pipeline": 2}, 12, "does not divide the world size 12. Use 8 or 16 ranks"),
        ({"parallel__tensor": 4}, 2, "= 4 does not divide the world size 2. Use 4 ranks"),
        (
            {"parallel__tensor": 8},
            8,
            "parallel.tensor (8) does not divide model.num_heads (12). With this model it can be",
        ),
        ({"parallel__tensor": 4, "model__num_kv_heads": 2}, 4, "does not divide model.num_kv_heads (2)"),
        ({"parallel__tensor": 4, "model__ffn_hidden_size": 1002}, 4, "does not divide model.ffn_hidden_size (1002)"),
        ({"model__num_kv_heads": 5}, 1, "(5) does not divide model.num_heads (12). It can be 1, 2, 3, 4, 6 or 12."),
        (
            {"model__hidden_size": 770},
            1,
            "is not a multiple of model.num_heads (12). Use model.hidden_size 768 or 780.",
        ),
        ({"model__hidden_size": 36, "model__position": "rotary"}, 1, "needs an even head size"),
        ({"model__num_layers": 7, "parallel__pipeline": 2}, 2, "Use 6 or 8 layers, or a product among 1 or 7."),
        (
            {"model__num_layers": 6, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
            2,
            "= 4. Use 4 or 8 layers",
        ),
        ({"parallel__virtual_pipeline": 2}, 1, "parallel.virtual_pipeline (2) needs parallel.pipeline above 1"),
        ({"parallel__sequence": True}, 1, "parallel.sequence (true) needs parallel.tensor above 1"),
        (
            {"parallel__sequence": True, "parallel__tensor": 2, "model__sequence_length": 1023},
            2,
            "Use model.sequence_length 1022 or 1024",
        ),
        ({"train__global_batch_size": 9, "train__micro_batch_size": 2}, 2, "data parallel (2) = 4. Use 8 or 12."),
        ({"train__global_batch_size": 12, "train__micro_batch_size": 12}, 2, "Use 24, or train.micro_batch_size 6."),
        ({"train__global_batch_size": 1}, 2, "train.global_batch_size (1) is not a multiple"),
        (
            {"parallel__pipeline": 4, "parallel__virtual_pipeline": 3, "train__global_batch_size": 6},
            4,
            "(4; with parallel.virtual_pipeline above 1 it counts too) = 4. Use 4 or 8.",
        ),
        (
            {"schedule__batch_ramp": RAMP | {"start": 3, "increment": 5}},
            2,
            "schedule.batch_ramp.start (3) is not a multiple",
        ),
        ({"schedule__batch_ramp": RAMP | {"increment": 1}}, 2, "schedule.batch_ramp.increment (1) is not a multiple"),
        ({"schedule__batch_ramp": RAMP | {"start": 9}}, 1, "(9) is above train.global_batch_size (8)"),
        ({"schedule__batch_ramp": RAMP | {"increment": 3}}, 1, "to train.global_batch_size (8), 4. Use 2."),
        ({"parallel__offload_optimizer": True, "parallel__zero_stage": 0}, 1, "needs parallel.zero_stage 1, 2 or 3"),
        ({"train__loss_scale": 1000}, 1, "train.loss_scale (1000) is not a power of two. Use 512 or 1024."),
        ({"schedule__decay_steps": 1001}, 1, "schedule.decay_steps (1001) is above train.steps (1000)"),
        ({"schedule__warmup_steps": 1000}, 1, "must be less than train.steps (1000)"),
        (
            {"schedule__warmup_steps": 500, "schedule__decay_steps": 400},
            1,
            "must be less than schedule.decay_steps (400)",
        ),
        ({"schedule__kind": "wsd", "schedule__warmup_steps": 801}, 1, "reaches into the decay"),
        ({"schedule__min_learning_rate": 1e-3}, 1, "is above optimizer.learning_rate (0.0003), the peak"),
        ({"train__stop_after": 1001}, 1, "train.stop_after (1001) is above train.steps (1000)"),
        (
            {"train__spike_action": "rollback", "checkpoint__interval": 0},
            1,
            "rollback goes back to a checkpoint, and with checkpoint.interval (0) the run saves only at its end. Set",
        ),
        (
            {"checkpoint__interval": "auto", "checkpoint__interval_minutes": 5.0},
            1,
            "checkpoint.interval auto chooses the time between saves, and checkpoint.interval_minutes (5) sets it.",
        ),
        ({"checkpoint__node_mtbf": "10d"}, 1, "checkpoint.node_mtbf (864000 s) is for checkpoint.interval: auto"),
        (
            {"checkpoint__keep_best": 2},
            1,
            "(500) must be a multiple of train.eval_interval (200). Use checkpoint.interval 400 or 600, or",
        ),
        (
            {"checkpoint__keep_best": 2, "train__eval_interval": 0},
            1,
            "a multiple of train.eval_interval (0). Use train.eval_interval: 500",
        ),
        ({"checkpoint__keep_best": 2, "checkpoint__interval": "auto"}, 1, "and checkpoint.interval saves by the clock"),
        (
            {"checkpoint__keep_best": 2, "checkpoint__interval_minutes": 9.0},
            1,
            "and checkpoint.interval_minutes saves by the clock",
        ),
        (
            {"checkpoint__staging_dir": "a/b/", "checkpoint__dir": "a/b"},
            1,
            "checkpoint.staging_dir (a/b/) is checkpoint.dir.",
        ),
        ({"checkpoint__upload": "bucket/runs"}, 1, "checkpoint.upload (bucket/runs) is no URL. Write s3://"),
    ],
)
def test_each_rule_alone(settings: dict[str, Any], world_size: int, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(run_config(**settings), world_size)
    message = str(caught.value)
    assert expected in message
    if "batch_ramp" not in next(iter(settings)):  # one ramp setting may break two rules
        assert "problems in" not in message


def test_all_broken_rules_at_once_with_their_lines() -> None:
    config = run_config(train__global_batch_size=9, train__stop_after=2000, parallel__sequence=True)
    origins = {
        "train.global_batch_size": "a.yaml:3",
        "train.micro_batch_size": "default",
        "train.stop_after": "b.yaml:1",
    }
    with pytest.raises(ConfigError) as caught:
        check_run(config, 2, origins)
    message = str(caught.value)
    assert message.startswith("3 problems in this run on 2 ranks:")
    assert "= 2. Use 8 or 10.  [a.yaml:3]" in message
    assert "[b.yaml:1]" in message
    assert "[default]" in message


def test_the_layout_it_returns() -> None:
    config = run_config(
        parallel__tensor=2,
        parallel__pipeline=2,
        parallel__virtual_pipeline=3,
        parallel__sequence=True,
        parallel__zero_stage=3,
    )
    assert check_run(config, 8) == Layout(8, 2, 2, 3, True, 3)


def test_whatever_passes_fits() -> None:
    """Over a grid: a run passes exactly where every division comes out even, worked out here by hand."""
    grid = itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4), (1, 2, 3), (1, 2), (4, 6, 8), (4, 6, 8))
    passed = 0
    for world_size, tensor, pipeline, virtual, batch, layers in grid:
        config = run_config(
            parallel__tensor=tensor,
            parallel__pipeline=pipeline,
            parallel__virtual_pipeline=virtual,
            train__global_batch_size=batch,
            model__num_layers=layers,
            model__num_heads=4,
        )
        fits = world_size % (tensor * pipeline) == 0 and 4 % tensor == 0 and layers % (pipeline * virtual) == 0
        data = world_size // (tensor * pipeline)
        fits = fits and batch % data == 0 and (virtual == 1 or (pipeline > 1 and batch // data % pipeline == 0))
        try:
            layout = check_run(config, world_size)
        except ConfigError:
            assert not fits
        else:
            assert fits and layout.data == data
            passed += 1
    assert passed > 50


def test_ramp_levels() -> None:
    config = run_config(schedule__batch_ramp=RAMP)
    assert batch_ramp_levels(config.train, config.schedule) == [4, 6, 8]
    assert batch_ramp_levels(run_config().train, run_config().schedule) == [8]
    flat = run_config(schedule__batch_ramp=RAMP | {"start": 8})
    assert batch_ramp_levels(flat.train, flat.schedule) == [8]


def test_every_rule_is_listed() -> None:
    files = [
        importlib.import_module(f"{rules.__name__}.{found.name}") for found in pkgutil.iter_modules(rules.__path__)
    ]
    written = {name for file in files for name in vars(file) if name.startswith("rule_")}
    assert {rule.__name__ for rule in RULES} == written and len(RULES) == len(written) > 20
