"""Reading run configs: values, bases, overrides, origins, and every mistake reported at once with its line."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.config.load import LoadedRun, load_run, render_config, resolved_dict
from gptdist.config.marked import read_yaml, render_scalar
from gptdist.config.problems import Problem
from gptdist.config.sections import RunConfig
from gptdist.errors import EXIT_USER_MISTAKE, ConfigError

MINIMAL = "data:\n  corpus: corpora/x\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert caught.value.exit_code == EXIT_USER_MISTAKE
    return str(caught.value)


def test_defaults_and_origins(write) -> None:
    path = write(MINIMAL + "train:\n  steps: 7\n")
    loaded = load_run(path, ["train.seed=9"])
    assert loaded.config.train.steps == 7
    assert loaded.config.train.seed == 9
    assert loaded.config.model.num_layers == 12
    assert loaded.origins["train.steps"] == f"{path}:4"
    assert loaded.origins["data.corpus"] == f"{path}:2"
    assert loaded.origins["train.seed"] == "command line"
    assert loaded.origins["model.num_layers"] == "default"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("6E-5", 6e-5), ("1", 1.0), (".5", 0.5), ("1_000.5", 1000.5), ("+2.e1", 20.0)],
)
def test_numbers_are_numbers(write, written: str, value: float) -> None:
    rate = load_run(write(MINIMAL + f"optimizer: {{learning_rate: {written}}}")).config.optimizer.learning_rate
    assert rate == value and isinstance(rate, float)


def test_whole_numbers_take_underscores_and_no_octal(write) -> None:
    assert load_run(write(MINIMAL + "train: {steps: 1_000_000, seed: 010}")).config.train.steps == 1_000_000
    assert load_run(write(MINIMAL + "train: {seed: 010}")).config.train.seed == 10


@pytest.mark.parametrize(("written", "seconds"), [("10m", 600), ("90s", 90), ("2h", 7200), ("500ms", 0.5), ("45", 45)])
def test_times_take_units(write, written: str, seconds: float) -> None:
    assert load_run(write(MINIMAL + f"launch: {{timeout: {written}}}")).config.launch.timeout == seconds


@pytest.mark.parametrize("written", ["1:30", "ten", "10x", "-5s", "0", "true", ".inf", "[1]"])
def test_bad_times_are_told_the_rule(write, written: str) -> None:
    assert "launch.timeout is" in (text := error_of(write(MINIMAL + f"launch: {{timeout: {written}}}")))
    assert "must be a time such as" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {num_layer: 3}", "model.num_layer is not a setting. Did you mean model.num_layers?"),
        ("model: {steps: 3}", "Did you mean train.steps?"),
        ("modle: {num_layers: 3}", "modle is not a setting. Did you mean model?"),
        ("num_layers: 3", "Did you mean model.num_layers?"),
        ("model.num_layers: 3", "put `num_layers:` on a line of its own under `model:`"),
        ("schedule: {zzz: 3}", "The keys here are: kind, warmup_steps"),
        ("model: {num_layers: '12'}", 'model.num_layers is "12"; it must be a whole number. The default is 12.'),
        ("model: {num_layers: 12.0}", "it must be a whole number. Write 12."),
        ("train: {steps: 1e6}", "Write 1000000."),
        ("model: {num_layers: true}", "model.num_layers is true; it must be a whole number"),
        ("model: {num_layers: 0}", "model.num_layers is 0; it must be at least 1"),
        ("model: {dropout: 1}", "model.dropout is 1; it must be less than 1.0"),
        ("model: {bias: yes}", "model.bias is yes; it must be true or false"),
        ("model: {norm: RMSnorm}", "it must be one of layernorm, rmsnorm. Did you mean rmsnorm?"),
        ("launch: {run_dir: 2024}", "launch.run_dir is 2024; it must be text (put it in quotes)"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate is nan; it must be"),
        ("optimizer: {learning_rate: 1e999}", "it must be a finite number"),
        ("train: 5", "train is a section and was given 5"),
        ("schedule: {batch_ramp: [1, 2]}", "schedule.batch_ramp is a section and was given [1, 2]"),
        ("schedule: {batch_ramp: {start: 4, increment: 4}}", "schedule.batch_ramp.samples is not set"),
        ("model: {num_layers: !!python/name:os.system x}", "The tag !!python/name:os.system is not read here"),
        ("model: &m {num_layers: 3}", "anchors and aliases are not read"),
        ("model: {num_layers: 3", "This is not YAML"),
        ("base: [3]", "base must be a file, or a list of files"),
    ],
)
def test_one_mistake_is_one_message_with_its_line(write, text: str, expected: str) -> None:
    path = write(MINIMAL + text + "\n")
    message = error_of(path)
    assert expected in message
    assert f"[{path}:3]" in message or f"[{path}:4]" in message  # a bracket left open is noticed a line later
    assert "problems in" not in message


def test_all_mistakes_at_once_each_with_its_line(write) -> None:
    path = write("model:\n  num_layer: 3\n  bias: 1\ntrain:\n  steps: 0\n  steps: 4\n")
    message = error_of(path, "train.stepz=3", "nonsense", "model={a: 1}")
    assert message.startswith(f"8 problems in {path}:")
    for part in (
        f"Did you mean model.num_layers?  [{path}:2]",
        f"model.bias is 1; it must be true or false. The default is true.  [{path}:3]",
        f"train.steps is 0; it must be at least 1. The default is 1000.  [{path}:5]",
        f"The key steps is here a second time; the first is at {path}:5. Keep one.  [{path}:6]",
        "data.corpus is not set and has no default",
        "train.stepz is not a setting. Did you mean train.steps?  [command line]",
        "model is a section; set its keys one by one",
        "'nonsense' is no override. Write section.key=value: train.steps=100.  [command line]",
    ):
        assert part in message, part
    assert message.count("data.corpus") == 2  # named once, with the remedy


def test_bases_merge_later_over_earlier_and_keep_their_lines(write) -> None:
    write("model:\n  num_layers: 2\n  hidden_size: 64\n  num_heads: 4\n", "models/small.yaml")
    write("model: {num_heads: 8}\ntrain: {steps: 5}\n", "runs/second.yaml")
    path = write(MINIMAL + "base: [../models/small.yaml, second.yaml]\nmodel:\n  hidden_size: 128\n", "runs/run.yaml")
    loaded = load_run(path)
    model = loaded.config.model
    assert (model.num_layers, model.hidden_size, model.num_heads) == (2, 128, 8)
    folder = path.parent.parent
    assert loaded.origins["model.num_layers"] == f"{folder}/models/small.yaml:2"
    assert loaded.origins["model.num_heads"] == f"{folder}/runs/second.yaml:1"
    assert loaded.origins["model.hidden_size"] == f"{path}:5"


def test_base_mistakes(write) -> None:
    write("base: b.yaml\n", "a.yaml")
    write("base: a.yaml\n", "b.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in error_of(write("base: a.yaml\n" + MINIMAL, "run.yaml"))
    message = error_of(path := write("base: modern.yaml\nmodel: {num_layers: x}\n", "run2.yaml"))
    assert f"[{path}:1]" in message and "cannot be read: No such file" in message
    assert f"model.num_layers is x; it must be a whole number. The default is 12.  [{path}:2]" in message
    assert "data.corpus" not in message  # it may stand in the file that could not be read


def test_the_same_base_twice_is_no_circle(write) -> None:
    write("model: {num_layers: 2}\n", "c.yaml")
    write("base: c.yaml\n", "a.yaml")
    assert load_run(write("base: [a.yaml, c.yaml]\n" + MINIMAL)).config.model.num_layers == 2


def test_null_removes_an_optional_section(write) -> None:
    write(MINIMAL + "schedule: {batch_ramp: {start: 2, increment: 2, samples: 9}}\n", "base.yaml")
    path = write("base: base.yaml\n")
    assert load_run(path).config.schedule.batch_ramp is not None
    assert load_run(path, ["schedule.batch_ramp=null"]).config.schedule.batch_ramp is None
    assert (
        load_run(write("base: base.yaml\nschedule: {batch_ramp: null}\n", "two.yaml")).config.schedule.batch_ramp
        is None
    )


def test_an_empty_section_is_all_defaults(write) -> None:
    assert load_run(write(MINIMAL + "train:\noptimizer:\n")).config.train.steps == 1000


def test_overrides(write) -> None:
    path = write(MINIMAL)
    ramp = [f"schedule.batch_ramp.{key}" for key in ("start=4", "increment=2", "samples=100")]
    loaded = load_run(path, [*ramp, "optimizer.learning_rate=1e-3", "monitor.sample_prompt=a=b", "train.steps=3"])
    assert loaded.config.schedule.batch_ramp is not None and loaded.config.schedule.batch_ramp.start == 4
    assert loaded.config.optimizer.learning_rate == 1e-3
    assert loaded.config.monitor.sample_prompt == "a=b"
    assert loaded.origins["schedule.batch_ramp.start"] == "command line"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model={num_layers: 3}", "model is a section; set its keys one by one: model.num_layers=VALUE"),
        ("model=null", "model is a section; set its keys one by one"),
        ("schedule.batch_ramp=4", "set its keys one by one: schedule.batch_ramp.start=VALUE"),
        ("steps=4", "Did you mean train.steps?"),
        ("train.steps.x=4", "train.steps is one value: write train.steps=VALUE"),
        ("train..steps=4", "is no override"),
        ("=4", "is no override"),
        ("train.steps", "is no override"),
        ("monitor.sample_prompt=a: b", "quote it twice"),
        ("monitor.sample_prompt=[", "quote it twice"),
        ("train.steps=ten", "train.steps is ten; it must be a whole number"),
        ("train.steps=", "train.steps is null; it must be a whole number"),
    ],
)
def test_override_mistakes(write, override: str, expected: str) -> None:
    message = error_of(write(MINIMAL), override)
    assert expected in message and message.endswith("[command line]")


def test_an_override_does_not_hide_a_mistake_of_the_file(write) -> None:
    assert "train is a section and was given 5" in error_of(write(MINIMAL + "train: 5\n"), "train.steps=3")


def test_unreadable_files(write, tmp_path: Path) -> None:
    write(MINIMAL, "quickstart.yaml")
    assert "there are: quickstart.yaml" in error_of(tmp_path / "quickstrt")
    assert "Is a directory" in error_of(tmp_path)
    assert f"There is no folder {tmp_path}/none" in error_of(tmp_path / "none" / "x.yaml")
    (tmp_path / "latin").write_bytes(b"data: {corpus: caf\xe9}")
    assert "is not UTF-8 text (byte 18)" in error_of(tmp_path / "latin")
    (tmp_path / "large").write_bytes(b"#" * 2_000_000)
    assert "a page of YAML" in error_of(tmp_path / "large")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "cannot be read" in error_of(tmp_path / "loop.yaml")
    assert "mapping of sections" in error_of(write("- 1\n", "list.yaml"))
    assert "data.corpus is not set" in error_of(write("", "empty.yaml"))
    assert "nested far too deeply" in error_of(write("a: " + "[" * 5000 + "]" * 5000, "deep.yaml"))


def test_sections_are_frozen(write) -> None:
    config = load_run(write(MINIMAL)).config
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_resolved_dict_goes_back(write) -> None:
    config = load_run(write(MINIMAL + "launch: {timeout: 2h}\n"), ["schedule.kind=wsd"]).config
    resolved = resolved_dict(config)
    assert resolved["launch"]["timeout"] == 7200.0
    assert RunConfig.model_validate(resolved) == config


@given(st.text())
def test_any_text_survives_rendering(text: str) -> None:
    problems: list[Problem] = []
    found = read_yaml(render_scalar(text) + "  # comment", str, problems)
    assert found is not None and not problems
    assert found.value == text and isinstance(found.value, str)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none())
def test_any_scalar_survives_rendering(value: float | int | bool | None) -> None:
    found = read_yaml(render_scalar(value), str, [])
    assert found is not None and found.value == value and type(found.value) is type(value)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.text(max_size=20),
    corpus=st.text(min_size=1, max_size=8),
    rate=st.floats(min_value=1e-9, max_value=1.0),
    timeout=st.floats(min_value=0.001, max_value=1e6),
    ramp=st.none() | st.fixed_dictionaries({key: st.integers(1, 9) for key in ("start", "increment", "samples")}),
)
def test_printed_config_loads_to_the_same(
    tmp_path_factory, prompt: str, corpus: str, rate: float, timeout: float, ramp: dict[str, int] | None
) -> None:
    config = RunConfig.model_validate(
        {
            "data": {"corpus": corpus},
            "monitor": {"sample_prompt": prompt},
            "optimizer": {"learning_rate": rate},
            "launch": {"timeout": timeout},
            "schedule": {"batch_ramp": ramp},
        }
    )
    origins = dict.fromkeys(_leaf_keys(resolved_dict(config)), "odd\nname # x.yaml:3")
    path = tmp_path_factory.mktemp("printed") / "run.yaml"
    path.write_text(render_config(LoadedRun(config, origins)), encoding="utf-8")
    assert load_run(path).config == config


def test_printed_config_shows_each_origin(write) -> None:
    path = write(MINIMAL + "train:\n  steps: 7\n")
    lines = render_config(load_run(path, ["model.bias=false"])).splitlines()
    shown = {line.split(":")[0].strip(): line.split("  # ")[-1] for line in lines}
    assert shown["steps"] == f"{path}:4"
    assert shown["bias"] == "command line"
    assert shown["hidden_size"] == "default"
    assert math.isclose(len({line.index("  # ") for line in lines if "  # " in line}), 1)


def _leaf_keys(resolved: dict, above: str = "") -> list[str]:
    keys = []
    for key, value in resolved.items():
        keys += _leaf_keys(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]
    return keys


BLEND = """data:
  blend:
    - corpus: data/a
      weight: 0.7
    - {corpus: data/b, weight: 1e-1}
  phases:
    - from_sample: 1_000
      blend:
        - {corpus: data/a, weight: 1}
"""


def test_blends_keep_their_lines_and_print_as_they_load(write) -> None:
    path = write(BLEND)
    loaded = load_run(path)
    blend, phases = loaded.config.data.blend, loaded.config.data.phases
    assert blend is not None
    assert [(part.corpus, part.weight) for part in blend] == [("data/a", 0.7), ("data/b", 0.1)]
    assert (phases[0].from_sample, phases[0].blend[0].weight) == (1000, 1.0)
    assert loaded.origins["data.blend"] == f"{path}:2"
    assert loaded.origins["data.blend[1].weight"] == f"{path}:5"
    assert loaded.origins["data.phases[0].blend[0].corpus"] == f"{path}:9"
    printed = render_config(loaded)
    assert "    - corpus: data/a" in printed and f"# {path}:9" in printed
    assert load_run(write(printed, "printed.yaml")).config == loaded.config
    assert RunConfig.model_validate(resolved_dict(loaded.config)) == loaded.config


def test_blends_are_replaced_whole(write) -> None:
    path = write(BLEND)
    blend = load_run(path, ["data.blend=[{corpus: x, weight: 2}]", "data.phases=[]"]).config.data.blend
    assert blend is not None and [part.corpus for part in blend] == ["x"]
    one = load_run(path, ["data.blend=null", "data.phases=[]", "data.corpus=y"]).config.data
    assert (one.blend, one.phases, one.corpus) == (None, (), "y")
    message = error_of(path, "data.blend.0.weight=3", "data.phases.0.from_sample=9", "data.blend.corpus=x")
    assert "data.blend.0.weight is inside a list, which is given whole: data.blend=[{...}, {...}]." in message
    assert "data.phases.0.from_sample is inside a list" in message
    assert "data.blend is one value: write data.blend=VALUE." in message


def test_mistakes_in_lists_have_their_line(write) -> None:
    path = write(
        "data:\n  blend:\n    - corpus: a\n      weight: -1\n    - corpsu: b\n      weight: 2\n    - 7\n"
        "  phases: x\ntrain: {steps: [1, 2]}\n"
    )
    message = error_of(path)
    for part in (
        f"data.blend[0].weight is -1; it must be more than 0.0.  [{path}:4]",
        f"data.blend[1].corpsu is not a setting. Did you mean data.blend[1].corpus?  [{path}:5]",
        "data.blend[1].corpus is not set and has no default (Folder or URL of the corpus). Add it.",
        f"data.blend[2] is a section and was given 7. Put its keys on lines of their own under it: corpus, weight.  "
        f"[{path}:7]",
        f"data.phases is x; it must be a list.  [{path}:8]",
        f"train.steps is [1, 2]; it must be a whole number. The default is 1000.  [{path}:9]",
    ):
        assert part in message, message
    assert "data.corpus is not set" not in message
