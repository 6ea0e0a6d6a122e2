"""Our models and Hugging Face's architectures: which holds which, and its config.json.

Pure: settings in, settings out; no tensor and no file. `dialect.py` says what is known of an architecture, `tensors.py`
follows it. Settings that change only training (dropout) do not decide what fits.
"""

import math
from typing import Any

from pydantic import ValidationError

from gptdist.config.sections import ModelConfig
from gptdist.errors import ExchangeError
from gptdist.exchange.dialect import CLASSES, TANH_GELUS, Dialect

# What a model must be for an architecture to compute the same; the activations are its names for ours.
_GELUS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
_FITS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": _GELUS, "grouped": False},
    "llama": {"norm": "rmsnorm", "position": "rotary", "activation": {"swiglu": "silu"}, "grouped": True},
    "gpt_neox": {"norm": "layernorm", "position": "rotary", "activation": _GELUS, "grouped": False},
}
# What a config.json means by leaving a setting out.
_TIED_BY_DEFAULT = {"gpt2": True, "gpt_neo": True, "llama": False, "mistral": False, "qwen2": False, "gpt_neox": False}
_EPSILON_BY_DEFAULT = {"gpt2": 1e-5, "gpt_neo": 1e-5, "gpt_neox": 1e-5, "llama": 1e-6, "mistral": 1e-6, "qwen2": 1e-6}
_SILU = {"silu": "swiglu", "swish": "swiglu"}
_LARGEST_CONTEXT = 2**24


def exported_dialect(model: ModelConfig) -> Dialect:
    """The architecture that `model` becomes. Raises ExchangeError, with what keeps it out of each, where there is
    none."""
    reasons = []
    for kind, needs in _FITS.items():
        misfits = list(_misfits(model, needs))
        if not misfits:
            _check_rotary_base(model)
            biases = model.bias if kind == "llama" else True
            return Dialect(kind, biases, biases, biases, positions=model.sequence_length)
        reasons.append(f"{CLASSES[kind]} needs {' and '.join(misfits)}")
    raise ExchangeError(
        f"No architecture that Hugging Face's tools know computes what this model does: {'; '.join(reasons)}. There is "
        "no export for it; a model to be exported has to be trained with settings that one of them has."
    )


def hf_config(model: ModelConfig, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """config.json for `model` in the architecture of `exported_dialect`. `dtype`: torch's name.

    Settings that transformers 4 and 5 spell differently are there in both spellings.
    """
    dialect = exported_dialect(model)
    common: dict[str, Any] = {
        "architectures": [CLASSES[dialect.kind]],
        "model_type": dialect.kind,
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    return common | {"gpt2": _gpt2, "llama": _llama, "gpt_neox": _gpt_neox}[dialect.kind](model)


def imported_model(config: dict[str, Any], sequence_length: int | None = None) -> tuple[ModelConfig, Dialect]:
    """Our model, and how its tensors are spelt, for a folder's config.json.

    `sequence_length`: a shorter context than the config's; None: all of it. Raises ExchangeError for anything that
    our models do not compute.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ExchangeError(
            f"config.json's model_type is {kind!r}, which is not among those that can be imported: "
            f"{', '.join(CLASSES)}. Other architectures compute what no model of gptdist does."
        )
    named = config.get("architectures")
    if isinstance(named, list) and named and CLASSES[kind] not in named:
        raise ExchangeError(
            f"config.json's architectures are {named}; only {CLASSES[kind]}, a language model, can be imported from "
            f"model_type {kind}."
        )
    read = _Config(config, kind)
    read.refuse_if("quantization_config", lambda value: value is not None, "is of quantized weights", "full weights")
    reader = {"gpt2": _from_gpt2, "gpt_neo": _from_gpt_neo, "gpt_neox": _from_gpt_neox}.get(kind, _from_llama)
    try:
        settings, dialect = reader(read, sequence_length)
        model = ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ExchangeError(
            f"config.json of {kind}: its {'.'.join(map(str, first['loc']))} is {first['input']!r} ({first['msg']})."
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ExchangeError(f"config.json of {kind} is not understood: {error}.") from None
    if model.hidden_size % model.num_heads or model.num_heads % model.kv_heads:
        raise ExchangeError(
            f"config.json has {model.num_heads} heads and {model.kv_heads} key/value heads for a width of "
            f"{model.hidden_size}: heads must divide the width, and key/value heads the heads."
        )
    return model, dialect


class _Config:
    """A config.json's settings, with what to say when one is missing or means what we have not."""

    def __init__(self, values: dict[str, Any], kind: str) -> None:
        self.values = values
        self.kind = kind

    def get(self, key: str, default: Any = None) -> Any:
        """The setting, or what leaving it out (or null) means."""
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """A setting that is a whole number above 0."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 2**40:
            raise ExchangeError(f"config.json of {self.kind}: {key} is {value!r}, not a whole number above 0.")
        return value

    def refuse_if(self, key: str, wrong: Any, what: str, can: str) -> None:
        """Raise for a setting whose value is `wrong`."""
        value = self.values.get(key)
        if wrong(value):
            raise ExchangeError(
                f"config.json of {self.kind}: {key} ({value!r}) {what}, which no model of gptdist does. It can import "
                f"{can}."
            )

    def activation(self, key: str, default: str, known: dict[str, str]) -> str:
        """Our name of the activation."""
        value = self.get(key, default)
        if value not in known:
            raise ExchangeError(
                f"config.json of {self.kind}: {key} is {value!r}; gptdist's models have {', '.join(known)} there."
            )
        return known[value]

    def context(self, key: str, default: int, shorter: int | None) -> int:
        """Tokens of context: the config's, or a shorter one that was asked for."""
        length = self.whole(key, default)
        if shorter is not None and shorter > length:
            raise ExchangeError(
                f"--sequence-length {shorter} is longer than the {length} positions that config.json's {key} says the "
                "model has. It can only be shortened."
            )
        return min(shorter or length, _LARGEST_CONTEXT)

    def check_window(self, key: str, window: Any, context: int) -> None:
        """Attention within a window is attention to all before, where the window covers the context."""
        if window is not None and (type(window) is not int or window < context):
            raise ExchangeError(
                f"config.json of {self.kind}: {key} ({window}) is shorter than the context ({context}), so that late "
                f"tokens do not attend to early ones; every layer of gptdist attends to all. Import it with a context "
                f"that the window covers: --sequence-length {window}."
            )

    def common(self, epsilon_key: str) -> dict[str, Any]:
        """Settings that all architectures have."""
        return {
            "vocab_size": self.whole("vocab_size"),
            "norm_epsilon": self.get(epsilon_key, _EPSILON_BY_DEFAULT[self.kind]),
            "tie_embeddings": self.get("tie_word_embeddings", _TIED_BY_DEFAULT[self.kind]),
            "init_std": self.get("initializer_range", 0.02) or 0.02,
        }


def _misfits(model: ModelConfig, needs: dict[str, Any]) -> list[str]:
    """What of `model` is not as an architecture needs it, for people."""
    found = []
    for key in ("norm", "position", "activation"):
        value, allowed = getattr(model, key), needs[key]
        if value not in ((allowed,) if isinstance(allowed, str) else allowed):
            wanted = allowed if isinstance(allowed, str) else " or ".join(allowed)
            found.append(f"model.{key} {wanted} (here {value})")
    if not needs["grouped"] and model.kv_heads != model.num_heads:
        found.append(f"as many model.num_kv_heads as model.num_heads (here {model.kv_heads} for {model.num_heads})")
    return found


def _check_rotary_base(model: ModelConfig) -> None:
    if model.position == "rotary" and model.rotary_base != int(model.rotary_base):
        raise ExchangeError(
            f"model.rotary_base ({model.rotary_base}) is no whole number, and the engine rotates by whole ones only."
        )


def _gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": model.sequence_length,
        "n_ctx": model.sequence_length,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "activation_function": _GELUS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
    }


def _llama(model: ModelConfig) -> dict[str, Any]:
    return _sizes(model) | {
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.attention_dropout,
    }


def _gpt_neox(model: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": model.rotary_base, "partial_rotary_factor": 1.0}
    return _sizes(model) | {
        "hidden_act": _GELUS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "rotary_emb_base": model.rotary_base,
        "rope_theta": model.rotary_base,
        "rotary_pct": 1.0,
        "rope_parameters": rope,
        "use_parallel_residual": False,
        "attention_bias": True,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
    }


def _sizes(model: ModelConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": model.sequence_length,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
    }


def _from_gpt2(read: _Config, shorter: int | None) -> tuple[dict[str, Any], Dialect]:
    read.refuse_if("scale_attn_by_inverse_layer_idx", bool, "divides scores by the layer's number", "models without it")
    read.refuse_if("scale_attn_weights", lambda value: value is False, "leaves scores unscaled", "models that scale")
    read.refuse_if("add_cross_attention", bool, "attends to another network", "decoders without it")
    positions = read.whole("n_positions", 1024)
    width = read.whole("n_embd", 768)
    settings = read.common("layer_norm_epsilon") | {
        "num_layers": read.whole("n_layer", 12),
        "hidden_size": width,
        "num_heads": read.whole("n_head", 12),
        "ffn_hidden_size": read.whole("n_inner", 4 * width),
        "sequence_length": read.context("n_positions", 1024, shorter),
        "norm": "layernorm",
        "position": "learned",
        "activation": read.activation("activation_function", "gelu_new", TANH_GELUS | {"gelu": "gelu"}),
        "bias": True,
        "dropout": read.get("resid_pdrop", 0.1),
        "attention_dropout": read.get("attn_pdrop", 0.1),
    }
    return settings, Dialect("gpt2", True, True, True, positions=positions)


def _from_gpt_neo(read: _Config, shorter: int | None) -> tuple[dict[str, Any], Dialect]:
    positions = read.whole("max_position_embeddings", 2048)
    width, heads = read.whole("hidden_size", 2048), read.whole("num_heads", 16)
    context = read.context("max_position_embeddings", 2048, shorter)
    types = read.get("attention_types", [[["global", "local"], 12]])
    kinds = {kind for pattern, _ in types for kind in pattern}
    if kinds - {"global", "local"}:
        raise ExchangeError(f"config.json of gpt_neo: attention_types has {sorted(kinds)}, not only global and local.")
    if "local" in kinds:
        read.check_window("window_size", read.get("window_size", 256), context)
    root = math.isqrt(width // heads)
    if root * root != width // heads or root & (root - 1):
        raise ExchangeError(
            f"config.json of gpt_neo: its attention does not divide scores by the root of the head size "
            f"({width // heads}), as gptdist's does. The weights can make up for that exactly only where the root is "
            "a power of two: head sizes 4, 16, 64, 256."
        )
    settings = read.common("layer_norm_epsilon") | {
        "num_layers": read.whole("num_layers", 24),
        "hidden_size": width,
        "num_heads": heads,
        "ffn_hidden_size": read.whole("intermediate_size", 4 * width),
        "sequence_length": context,
        "norm": "layernorm",
        "position": "learned",
        "activation": read.activation("activation_function", "gelu_new", TANH_GELUS | {"gelu": "gelu"}),
        "bias": True,
        "dropout": read.get("resid_dropout", 0.0),
        "attention_dropout": read.get("attention_dropout", 0.0),
    }
    return settings, Dialect("gpt_neo", False, True, True, positions=positions, query_scale=float(root))


def _from_llama(read: _Config, shorter: int | None) -> tuple[dict[str, Any], Dialect]:
    """Llama, and what differs from it by a bias or a window: Mistral, Qwen2."""
    kind = read.kind
    width, heads = read.whole("hidden_size", 4096), read.whole("num_attention_heads", 32)
    if read.get("head_dim", width // heads) != width // heads:
        raise ExchangeError(
            f"config.json of {kind}: head_dim ({read.get('head_dim')}) is not hidden_size / num_attention_heads "
            f"({width // heads}), which it is in every model of gptdist."
        )
    context = read.context("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(kind, 32768), shorter)
    if kind == "mistral":
        # Left out it is 4096; null is no window.
        read.check_window("sliding_window", read.values.get("sliding_window", 4096), context)
    elif kind == "qwen2" and read.get("use_sliding_window", False):
        read.check_window("sliding_window", read.get("sliding_window", 4096), context)
    attention = kind == "qwen2" or bool(kind == "llama" and read.get("attention_bias", False))
    output = attention and kind == "llama"
    mlp = bool(kind == "llama" and read.get("mlp_bias", False))
    groups = {"mistral": 8, "qwen2": 32}.get(kind, heads)
    settings = read.common("rms_norm_eps") | {
        "num_layers": read.whole("num_hidden_layers", 32),
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads", groups),
        "ffn_hidden_size": read.whole("intermediate_size"),
        "sequence_length": context,
        "norm": "rmsnorm",
        "position": "rotary",
        "rotary_base": _rotary_base(read, whole_head=True),
        "activation": read.activation("hidden_act", "silu", _SILU),
        "bias": attention or output or mlp,
        "attention_dropout": read.get("attention_dropout", 0.0),
    }
    return settings, Dialect(kind, attention, output, mlp, positions=context)


def _from_gpt_neox(read: _Config, shorter: int | None) -> tuple[dict[str, Any], Dialect]:
    if read.get("use_parallel_residual", True):
        raise ExchangeError(
            "config.json of gpt_neox: use_parallel_residual is true (attention and MLP side by side), and gptdist's "
            "layers run one after the other. It can import those with use_parallel_residual: false."
        )
    context = read.context("max_position_embeddings", 2048, shorter)
    settings = read.common("layer_norm_eps") | {
        "num_layers": read.whole("num_hidden_layers", 44),
        "hidden_size": read.whole("hidden_size", 6144),
        "num_heads": read.whole("num_attention_heads", 64),
        "ffn_hidden_size": read.whole("intermediate_size", 24576),
        "sequence_length": context,
        "norm": "layernorm",
        "position": "rotary",
        "rotary_base": _rotary_base(read, whole_head=False),
        "activation": read.activation("hidden_act", "gelu", TANH_GELUS | {"gelu": "gelu"}),
        "bias": True,
        "dropout": read.get("hidden_dropout", 0.0),
        "attention_dropout": read.get("attention_dropout", 0.0),
    }
    attention = bool(read.get("attention_bias", True))
    return settings, Dialect("gpt_neox", attention, attention, True, positions=context)


def _rotary_base(read: _Config, *, whole_head: bool) -> float:
    """The base of plain rotary positions over whole heads, which transformers 4 and 5 write in different places."""
    rope = read.get("rope_parameters") or read.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ExchangeError(f"config.json of {read.kind}: rope_parameters is {rope!r}, not an object.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ExchangeError(
            f"config.json of {read.kind}: its rotary positions are scaled ({kind}), and gptdist's are not. It can "
            "import models whose rope_type is default."
        )
    portion = rope.get("partial_rotary_factor", read.get("rotary_pct", 1.0 if whole_head else 0.25))
    if portion != 1:
        raise ExchangeError(
            f"config.json of {read.kind}: only {portion:g} of each head is rotated (rotary_pct), and gptdist rotates "
            "all of it. It can import models whose rotary_pct is 1."
        )
    values = [value for value in (rope.get("rope_theta"), read.get("rope_theta"), read.get("rotary_emb_base")) if value]
    if len({float(value) for value in values}) > 1:
        raise ExchangeError(f"config.json of {read.kind} gives several bases of rotary positions: {values}.")
    base = float(values[0]) if values else 10000.0
    if base != int(base):
        raise ExchangeError(f"config.json of {read.kind}: rope_theta ({base}) must be a whole number here.")
    return base
