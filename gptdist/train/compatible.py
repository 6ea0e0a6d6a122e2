"""Which checkpoints a config may go on from, or begin with; what to say where they differ without harm.

Knows a checkpoint's run state (JSON) and its tensors' names and shapes. Reads no file. The identity of the data, and
what forbids counting samples on, is in `progress.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from gptdist.checkpoint.average import AVERAGED_FROM
from gptdist.config.load import resolved_dict
from gptdist.config.sections import ModelConfig, RunConfig
from gptdist.engine.zero_config import OPTIMIZER
from gptdist.errors import CheckpointError
from gptdist.model.parameters import logical_shapes

_GO_ON_KEYS = ("step", "samples", "engine", "data", "config")
_ANEW = "or start anew with --fresh or another launch.run_dir"
# What may change without another network: the draw of initial weights, and what is dropped in training.
_FREE_MODEL_KEYS = ("dropout", "attention_dropout", "init_std")
# Of a run's settings, those that change what a step computes and that a run may yet change.
_NOTED_SECTIONS = ("model", "optimizer", "schedule", "train")
_NOT_NOTED = (
    "train.eval_interval",
    "train.eval_samples",
    "train.max_rollbacks",
    "train.max_skipped_steps",
    "train.micro_batch_size",
    "train.precision",  # has a note of its own
    "train.recompute",
    "train.spike_action",
    "train.spike_factor",
    "train.spike_lead",
    "train.spike_window",
    "train.stop_after",
)


def check_resumable(names: Collection[str], state: Mapping[str, Any], config: RunConfig, where: str) -> None:
    """Raises CheckpointError unless a run can go on from the checkpoint `where` of tensors `names` under `config`."""
    if not any(name.startswith("exp_avg/") for name in names):
        what = (
            f"the mean of {len(state[AVERAGED_FROM])} checkpoints' weights"
            if AVERAGED_FROM in state
            else "weights alone"
        )
        raise CheckpointError(
            f"{where} cannot be resumed: it is {what}, without optimizer state to go on from. Begin a new run with it: "
            f"checkpoint.start_from: {where}, and another launch.run_dir."
        )
    missing = [key for key in _GO_ON_KEYS if key not in state]
    if missing:
        raise CheckpointError(
            f"{where} does not say {', '.join(missing)} in its run state, so no run can go on from it. To begin one "
            f"with its weights, set checkpoint.start_from: {where}, and another launch.run_dir."
        )
    optimizer = state["engine"].get("optimizer", OPTIMIZER)
    if optimizer != OPTIMIZER:
        raise CheckpointError(
            f"{where} holds the state of the optimizer {optimizer!r}, which means nothing to {OPTIMIZER!r}, this "
            f"version's only one. To keep the weights alone, set checkpoint.start_from: {where}, and another "
            "launch.run_dir."
        )
    check_same_network(state["config"].get("model", {}), config.model, where, _ANEW)
    _check_precision(_precision(state), config, where)


def check_can_begin(state: Mapping[str, Any], model: ModelConfig, tokenizer_sha256: str, where: str) -> None:
    """Raises CheckpointError unless a new run of `model` can take over the weights of the checkpoint `where`.

    What it does not say of itself is not compared: an import has no data, and perhaps no tokenizer.
    """
    saved = dict((state.get("config") or {}).get("model") or {})
    if model.position == "rotary":
        saved.pop("sequence_length", None)  # no weight knows it
    check_same_network(saved, model, where, "or leave out checkpoint.start_from")
    known = known_tokenizer(state)
    if known is not None and known != tokenizer_sha256:
        raise CheckpointError(
            f"{where} was trained with another tokenizer (sha256 {known[:12]}...) than the corpus was built with "
            f"(sha256 {tokenizer_sha256[:12]}...): its ids mean other text. Build the corpus with the tokenizer.json "
            "of the checkpoint's run (gptdist data build --tokenizer), or begin with other weights."
        )


def known_tokenizer(state: Mapping[str, Any]) -> str | None:
    """The sha256 of the tokenizer a checkpoint was made with, where its run state says so."""
    found = (state.get("data") or {}).get("tokenizer") or state.get("tokenizer")
    return found if isinstance(found, str) else None


def check_same_network(saved: Mapping[str, Any], model: ModelConfig, where: str, otherwise: str) -> None:
    """Raises CheckpointError, naming each field of the model section that makes another network of the same weights.

    Shapes alone would let many pass: another number of heads, another activation, another norm's epsilon.
    """
    written = resolved_model(model)
    then, now = _effective(saved), _effective(written)
    unknown = sorted(set(then) - set(written))
    differ = [
        f"model.{key} is {then[key]!r} there, {now[key]!r} here"
        for key in now
        # Of two that follow another field, that field is named, not they.
        if key in then and then[key] != now[key] and saved[key] != written[key]
    ]
    differ += [f"model.{key} ({then[key]!r}) is nothing this version knows" for key in unknown]
    if differ:
        raise CheckpointError(
            f"{where} is a checkpoint of another model: {'; '.join(differ)}. Set the model section to the "
            f"checkpoint's, {otherwise}."
        )


def check_same_model(
    shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, where: str, otherwise: str = _ANEW
) -> None:
    """Raises CheckpointError unless a checkpoint's `weight/` tensors (names without the prefix) are those of
    `model`."""
    wanted = logical_shapes(model)
    remedy = f"Set the model section to the checkpoint's, {otherwise}."
    for name in wanted:
        if name not in shapes:
            raise CheckpointError(
                f"{where} is a checkpoint of another model: it has no {name}, which the configured model has. {remedy}"
            )
        if tuple(shapes[name]) != wanted[name]:
            raise CheckpointError(
                f"{where} is a checkpoint of another model: its {name} is {list(shapes[name])}, the configured model's "
                f"is {list(wanted[name])}. {remedy}"
            )
    extra = sorted(set(shapes) - set(wanted))
    if extra:
        raise CheckpointError(
            f"{where} is a checkpoint of another model: it has {extra[0]}, which the configured model has not. {remedy}"
        )


def resume_notes(state: Mapping[str, Any], config: RunConfig, layout: str) -> list[str]:
    """What is not as it was when the checkpoint was saved, and may be otherwise."""
    notes = []
    if state.get("layout") not in (None, layout):
        notes.append(f"saved under {state['layout']}; every layout goes on from it alike")
    saved, now = _precision(state), config.train.precision
    if saved != now:
        scale = f"; the loss scale begins at train.loss_scale ({config.train.loss_scale})" if now == "fp16" else ""
        notes.append(f"train.precision was {saved}, is {now} from here on: weights and moments are exact{scale}")
    changed = _changed_settings(state["config"], config)
    if changed:
        notes.append(f"changed since the checkpoint: {', '.join(changed)}")
    return notes


def resolved_model(model: ModelConfig) -> dict[str, Any]:
    """Every field of the model section as JSON-able values."""
    resolved: dict[str, Any] = model.model_dump(mode="json")
    return resolved


def _effective(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make a network, with what null stands for."""
    fields = {key: value for key, value in model.items() if key not in _FREE_MODEL_KEYS}
    if fields.get("num_kv_heads", 0) is None:
        fields["num_kv_heads"] = fields.get("num_heads")
    if fields.get("ffn_hidden_size", 0) is None:
        fields["ffn_hidden_size"] = 4 * fields["hidden_size"]
    if fields.get("position") != "rotary":
        fields.pop("rotary_base", None)
    return fields


def _precision(state: Mapping[str, Any]) -> str:
    return str(state["config"].get("train", {}).get("precision", "fp32"))


def _check_precision(saved: str, config: RunConfig, where: str) -> None:
    now = config.train.precision
    if saved != now and not config.checkpoint.allow_precision_change:
        raise CheckpointError(
            f"{where} was saved by a run with train.precision {saved}, and the config says {now}. Set train.precision: "
            f"{saved}; or, to go on in {now} on purpose, checkpoint.allow_precision_change: true. Weights and moments "
            "are kept in fp32 and loaded exactly, but the steps from there on round otherwise."
        )


def _changed_settings(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """`optimizer.learning_rate 0.003 -> 0.001`, for what changes the numbers of a step."""
    now = resolved_dict(config)
    return [
        f"{section}.{key} {saved[section][key]} -> {value}"
        for section in _NOTED_SECTIONS
        for key, value in now[section].items()
        if f"{section}.{key}" not in _NOT_NOTED and key in saved.get(section, {}) and saved[section][key] != value
    ]
