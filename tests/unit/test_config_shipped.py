"""Every config in `configs/` loads, fits a machine it is meant for, and says what the README will say of it."""

from pathlib import Path

import pytest

from gptdist.config.check import check_run
from gptdist.config.load import load_run, render_config
from gptdist.config.sections import ModelConfig
from gptdist.model.parameters import parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"

WORLD_SIZES = {
    "quickstart": (1, 2),
    "shakespeare": (1,),
    "gpt2_124m": (1, 2, 4, 8),
    "gpt2_124m_blend": (1, 2, 4, 8),
    "gpt3_1_3b_8gpu": (8,),
    "gpt3_175b": (1024,),
    "modern_7b": (8, 64),
}

PARAMETERS = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
}

NOMINAL = {
    "gpt3_125m": 125e6,
    "gpt3_350m": 350e6,
    "gpt3_760m": 760e6,
    "gpt3_1_3b": 1.3e9,
    "gpt3_2_7b": 2.7e9,
    "gpt3_6_7b": 6.7e9,
    "gpt3_13b": 13e9,
    "gpt3_175b": 175e9,
    "modern_124m": 124e6,
    "modern_1_3b": 1.3e9,
    "modern_7b": 7e9,
}

RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))


def preset(path: Path, tmp_path: Path) -> ModelConfig:
    run_path = tmp_path / "run.yaml"
    run_path.write_text(f"base: {path}\ndata: {{corpus: x}}\n")
    return load_run(run_path).config.model


def test_every_shipped_config_is_in_a_table() -> None:
    assert {path.stem for path in RUNS} == set(WORLD_SIZES)
    assert {path.stem for path in MODELS} == set(PARAMETERS) | set(NOMINAL)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_fit_their_machines(path: Path, tmp_path: Path) -> None:
    loaded = load_run(path)
    for world_size in WORLD_SIZES[path.stem]:
        assert check_run(loaded.config, world_size, loaded.origins).world_size == world_size
    printed = tmp_path / "printed.yaml"
    printed.write_text(render_config(loaded))
    assert load_run(printed).config == loaded.config


def test_quickstart_can_go_on_as_tensor_parallel() -> None:
    loaded = load_run(CONFIGS / "runs" / "quickstart.yaml", ["parallel.tensor=2"])
    assert check_run(loaded.config, 2, loaded.origins).data == 1
    assert 3e6 < parameter_count(loaded.config.model) < 5e6


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_models_have_the_size_in_their_name(path: Path, tmp_path: Path) -> None:
    model = preset(path, tmp_path)
    count = parameter_count(model)
    if path.stem in PARAMETERS:
        assert count == PARAMETERS[path.stem]
    else:
        assert abs(count / NOMINAL[path.stem] - 1) < 0.02
    for word in path.read_text().splitlines()[0].split():
        if word.count(",") > 1:
            assert int(word.replace(",", "")) == count
    assert model.hidden_size % model.num_heads == 0


def test_models_contain_only_a_model() -> None:
    for path in MODELS:
        top_keys = [line for line in path.read_text().splitlines() if line and line[0] not in " #"]
        assert top_keys == ["model:"]
