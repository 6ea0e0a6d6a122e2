"""Our tensors as Hugging Face's and back: bitwise over many shapes, any box, every architecture; and every refusal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gptdist.checkpoint.logical import Box
from gptdist.config.sections import ModelConfig
from gptdist.errors import ExchangeError
from gptdist.exchange.architecture import exported_dialect, hf_config, imported_model
from gptdist.exchange.numbers import in_rows, narrow, rounded
from gptdist.exchange.read_hf import HuggingFaceSource
from gptdist.exchange.tensors import hf_tensors, stream_hf_tensors
from gptdist.model.parameters import logical_shapes

CLASSIC = ModelConfig(num_layers=2, hidden_size=24, num_heads=3, vocab_size=37, sequence_length=11)
MODERN = CLASSIC.model_copy(
    update={"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False, "ffn_hidden_size": 40}
)
MODELS = {
    "gpt2": CLASSIC,
    "gpt2 untied, no biases": CLASSIC.model_copy(update={"tie_embeddings": False, "bias": False}),
    "gpt2 narrow": CLASSIC.model_copy(update={"activation": "gelu", "ffn_hidden_size": 5, "num_heads": 1}),
    "llama": MODERN.model_copy(update={"tie_embeddings": False}),
    "llama grouped": MODERN.model_copy(update={"num_heads": 6, "num_kv_heads": 2}),
    "llama one key, biases": MODERN.model_copy(update={"num_heads": 6, "num_kv_heads": 1, "bias": True}),
    "gpt_neox": CLASSIC.model_copy(update={"position": "rotary", "tie_embeddings": False}),
    "gpt_neox no biases": CLASSIC.model_copy(update={"position": "rotary", "bias": False, "activation": "gelu"}),
}
GPT_NEO = {"model_type": "gpt_neo", "vocab_size": 37, "max_position_embeddings": 16, "hidden_size": 32, "num_layers": 2}
GPT_NEO |= {"num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16}
LLAMA = {"model_type": "llama", "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 11}
NEOX = {"model_type": "gpt_neox", "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "rotary_pct": 1.0}
NEOX |= {"num_attention_heads": 3, "intermediate_size": 40, "use_parallel_residual": False}
GPT2 = {"model_type": "gpt2", "vocab_size": 37, "n_positions": 11, "n_embd": 24, "n_layer": 2, "n_head": 3}


class Arrays:
    """A source of random logical tensors."""

    def __init__(self, model: ModelConfig, dtype: str = "float32") -> None:
        generator = np.random.default_rng(7)
        self.tensors = {
            f"weight/{name}": rounded(generator.standard_normal(shape).astype(np.float32), dtype)
            for name, shape in logical_shapes(model).items()
        }

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        tensor = self.tensors[name]
        return tensor if box is None else tensor[box.slices()]


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], files: int = 1) -> Path:
    """A folder of a Hugging Face model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{number % files}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def exported(folder: Path, model: ModelConfig, source: Arrays, files: int = 1) -> Path:
    return write_folder(folder, hf_config(model, "float32", 36), dict(stream_hf_tensors(source, model)), files)


def random_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random tensors of a foreign config, by their names."""
    model, dialect = imported_model(config)
    generator = np.random.default_rng(3)
    return {t.name: generator.standard_normal(t.shape).astype(np.float32) for t in hf_tensors(model, dialect)}


def boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    generator = np.random.default_rng(5)
    for _ in range(6):
        pairs = [sorted(generator.integers(0, size + 1, 2).tolist()) for size in shape]
        yield Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


@pytest.mark.parametrize("files", (1, 3))
@pytest.mark.parametrize("name", MODELS)
def test_ours_to_theirs_to_ours_is_bitwise(tmp_path: Path, name: str, files: int) -> None:
    model = MODELS[name]
    source = Arrays(model)
    with HuggingFaceSource(exported(tmp_path, model, source, files)) as back:
        kept = {"norm", "position", "activation", "tie_embeddings", "kv_heads", "ffn_size", "head_size", "norm_epsilon"}
        assert {key: getattr(back.model, key) for key in kept} == {key: getattr(model, key) for key in kept}
        assert set(back.names("weight/")) >= set(source.tensors)
        for tensor in back.names():
            found = back.read(tensor)
            wanted = source.tensors.get(tensor, np.zeros(back.shape(tensor), np.float32))
            assert np.array_equal(found, wanted), tensor
            for box in boxes(back.shape(tensor)):
                assert np.array_equal(back.read(tensor, box), wanted[box.slices()]), (tensor, box)
                out = np.full(wanted.shape, np.nan, np.float32)
                back.read(tensor, box, out[box.slices()])
                assert np.array_equal(out[box.slices()], wanted[box.slices()])


@pytest.mark.parametrize("config", (GPT2, LLAMA, NEOX, {**LLAMA, "attention_bias": True, "mlp_bias": True}), ids=str)
def test_theirs_to_ours_to_theirs_is_bitwise(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = random_of(config)
    with HuggingFaceSource(write_folder(tmp_path, config, theirs, files=2)) as source:
        back = dict(stream_hf_tensors(source, source.model))
        again, _ = imported_model(hf_config(source.model, "float32", 0))
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[name], theirs[name]) for name in theirs)
    assert again == source.model


def test_rows_of_each_architecture(tmp_path: Path) -> None:
    """Written out by hand for one layer: which rows of ours are whose query, key and value."""
    model = MODELS["llama grouped"]
    source = Arrays(model)
    qkv = source.tensors["weight/layers.1.attention.qkv.weight"]  # group: 3 queries, key, value, of 4 rows each
    llama = dict(stream_hf_tensors(source, model))
    prefix = "model.layers.1.self_attn"
    assert np.array_equal(llama[f"{prefix}.q_proj.weight"], np.concatenate([qkv[0:12], qkv[20:32]]))
    assert np.array_equal(llama[f"{prefix}.k_proj.weight"], np.concatenate([qkv[12:16], qkv[32:36]]))
    assert np.array_equal(llama[f"{prefix}.v_proj.weight"], np.concatenate([qkv[16:20], qkv[36:40]]))
    model = MODELS["gpt2"]
    source = Arrays(model)
    gpt2 = dict(stream_hf_tensors(source, model))
    bias = source.tensors["weight/layers.0.attention.qkv.bias"]  # head: query, key, value, of 8 rows each
    heads = bias.reshape(3, 3, 8)
    assert np.array_equal(gpt2["transformer.h.0.attn.c_attn.bias"], heads.swapaxes(0, 1).reshape(-1))
    up = source.tensors["weight/layers.0.mlp.up.weight"]
    assert np.array_equal(gpt2["transformer.h.0.mlp.c_fc.weight"], up.T)
    assert "lm_head.weight" not in gpt2


def test_gpt_neo_becomes_ours_exactly(tmp_path: Path) -> None:
    theirs = random_of(GPT_NEO)
    with HuggingFaceSource(write_folder(tmp_path, GPT_NEO, theirs)) as source:
        qkv = source.read("weight/layers.1.attention.qkv.weight")
        query = theirs["transformer.h.1.attn.attention.q_proj.weight"]
        assert np.array_equal(qkv[:16], 4 * query[:16]), "the root of the head size, 16, is made up for"
        assert np.array_equal(qkv[48:64], 4 * query[16:])
        assert np.array_equal(qkv[16:32], theirs["transformer.h.1.attn.attention.k_proj.weight"][:16])
        assert not source.read("weight/layers.1.attention.qkv.bias").any()


def test_qwen2_has_some_biases_and_ours_all(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "qwen2"}
    theirs = random_of(config)
    with HuggingFaceSource(write_folder(tmp_path, config, theirs)) as source:
        assert source.model.bias
        bias = source.read("weight/layers.0.attention.qkv.bias")
        assert np.array_equal(bias[:12], theirs["model.layers.0.self_attn.q_proj.bias"][:12])
        assert not source.read("weight/layers.0.mlp.up.bias").any()


def test_a_shorter_context_takes_the_first_positions(tmp_path: Path) -> None:
    theirs = random_of(GPT2)
    with HuggingFaceSource(write_folder(tmp_path, GPT2, theirs), sequence_length=5) as source:
        assert source.model.sequence_length == 5
        found = source.read("weight/embedding.position.weight")
        assert np.array_equal(found, theirs["transformer.wpe.weight"][:5])
    with pytest.raises(ExchangeError, match="--sequence-length 12 is longer than the 11 positions"):
        HuggingFaceSource(tmp_path, sequence_length=12)


def test_folders_of_other_habits(tmp_path: Path) -> None:
    """Names without the base, buffers that hold nothing, a tied head that is stored too."""
    theirs = random_of(GPT2)
    plain = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    plain |= {"h.0.attn.bias": np.ones((1, 1, 11, 11), np.float32), "lm_head.weight": plain["wte.weight"]}
    with HuggingFaceSource(write_folder(tmp_path / "a", GPT2, plain)) as source:
        assert np.array_equal(source.read("weight/embedding.word.weight"), theirs["transformer.wte.weight"])
    plain["lm_head.weight"] = plain["lm_head.weight"] + 1
    with pytest.raises(ExchangeError, match="tie_word_embeddings"):
        HuggingFaceSource(write_folder(tmp_path / "b", GPT2, plain))
    neox = random_of(NEOX)
    neox["lm_head.weight"] = neox.pop("embed_out.weight")
    with HuggingFaceSource(write_folder(tmp_path / "c", NEOX, neox)) as source:
        assert np.array_equal(source.read("weight/output.weight"), neox["lm_head.weight"])


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_narrow_numbers_become_fp32_exactly(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    theirs = {name: torch.from_numpy(tensor).to(getattr(torch, dtype)) for name, tensor in random_of(LLAMA).items()}
    write_folder(tmp_path, LLAMA, {})
    save_torch(theirs, tmp_path / "model.safetensors")
    with HuggingFaceSource(tmp_path) as source:
        for name, array in stream_hf_tensors(source, source.model):
            assert np.array_equal(array, theirs[name].float().numpy())
            assert np.array_equal(narrow(array, dtype).view(np.int16), theirs[name].view(torch.int16).numpy())


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from(("bfloat16", "float16")))
@settings(max_examples=200, deadline=None)
def test_numbers_are_narrowed_as_torch_does(bits: list[int], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    values = np.array(bits, np.uint32).view(np.float32)
    wanted = torch.from_numpy(values.copy()).to(getattr(torch, dtype))
    found = torch.from_numpy(narrow(values, dtype).view(np.int16)).view(getattr(torch, dtype))
    assert torch.equal(torch.isnan(found), torch.isnan(wanted))
    assert torch.equal(torch.nan_to_num(found).view(torch.int16), torch.nan_to_num(wanted).view(torch.int16))
    again = torch.nan_to_num(wanted).float().numpy()
    assert np.array_equal(
        rounded(np.nan_to_num(values, posinf=np.inf, neginf=-np.inf), dtype)[np.isfinite(values)],
        wanted.float().numpy()[np.isfinite(values)],
    ), again


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"norm": "rmsnorm"}, "GPT2LMHeadModel needs model.norm layernorm (here rmsnorm)"),
        ({"activation": "swiglu"}, "model.activation gelu or gelu_tanh (here swiglu)"),
        ({"num_kv_heads": 1}, "as many model.num_kv_heads as model.num_heads (here 1 for 3)"),
        ({"position": "rotary", "rotary_base": 10000.5}, "model.rotary_base (10000.5) is no whole number"),
    ],
)
def test_models_that_no_architecture_holds(update: dict[str, Any], words: str) -> None:
    with pytest.raises(ExchangeError) as error:
        exported_dialect(CLASSIC.model_copy(update=update))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
        ({**GPT2, "architectures": ["GPT2ForTokenClassification"]}, "only GPT2LMHeadModel"),
        ({**GPT2, "quantization_config": {"bits": 4}}, "quantized weights"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "divides scores by the layer's number"),
        ({**GPT2, "scale_attn_weights": False}, "leaves scores unscaled"),
        ({**GPT2, "add_cross_attention": True}, "attends to another network"),
        ({**GPT2, "activation_function": "relu"}, "activation_function is 'relu'"),
        ({**GPT2, "n_layer": "two"}, "n_layer is 'two', not a whole number"),
        ({**GPT2, "n_head": 5}, "5 heads and 5 key/value heads for a width of 24"),
        ({**GPT2, "layer_norm_epsilon": "small"}, "norm_epsilon is 'small'"),
        ({**GPT_NEO, "window_size": 8}, "window_size (8) is shorter than the context (16)"),
        ({**GPT_NEO, "num_heads": 4}, "head size (8)"),
        ({**GPT_NEO, "attention_types": [[["sliding"], 2]]}, "attention_types has ['sliding']"),
        ({**GPT_NEO, "attention_types": 3}, "not understood"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, "scaled (llama3)"),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn"}}, "scaled (yarn)"),
        ({**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "several bases"),
        ({**LLAMA, "rope_theta": 10000.25}, "must be a whole number"),
        ({**LLAMA, "head_dim": 8}, "head_dim (8) is not hidden_size / num_attention_heads (4)"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {**LLAMA, "model_type": "mistral", "sliding_window": 8},
            "sliding_window (8) is shorter than the context (11)",
        ),
        ({**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "--sequence-length 8"),
        ({**NEOX, "use_parallel_residual": True}, "use_parallel_residual is true"),
        ({**NEOX, "rotary_pct": 0.25}, "only 0.25 of each head is rotated"),
        ({k: v for k, v in NEOX.items() if k != "rotary_pct"}, "only 0.25 of each head is rotated"),
    ],
)
def test_architectures_that_ours_are_not(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ExchangeError) as error:
        imported_model(config)
    assert words in str(error.value)


@pytest.mark.parametrize("window", (None, 11, 4096))
def test_a_window_that_covers_the_context_is_none(window: int | None) -> None:
    model, _ = imported_model({**LLAMA, "model_type": "mistral", "sliding_window": window})
    assert model.sequence_length == 11


def break_folder(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    match how:
        case "truncated":
            file.write_bytes(content[:-4])
        case "no header":
            file.write_bytes(b"\xff" * 64)
        case "empty":
            file.write_bytes(b"")
        case "escape":
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
        case "pickle":
            file.rename(folder / "pytorch_model.bin")
        case "no weights":
            file.unlink()
        case "no config":
            (folder / "config.json").unlink()
        case "many layers":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2**39}))
        case "not JSON":
            (folder / "config.json").write_text("{")
        case "a list":
            (folder / "config.json").write_text("[]")
        case "no map":
            (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "would end at byte"),
        ("no header", "no whole safetensors file"),
        ("empty", "no whole safetensors file"),
        ("escape", "only plain *.safetensors names"),
        ("pickle", "a pickle, which can run code"),
        ("no weights", "there are no weights"),
        ("no config", "is no folder of a Hugging Face model"),
        ("many layers", "too few for the 549,755,813,888 layers"),
        ("not JSON", "is not JSON"),
        ("a list", "is not a JSON object"),
        ("no map", "has no weight_map"),
    ],
)
def test_folders_that_are_not_whole(tmp_path: Path, how: str, words: str) -> None:
    write_folder(tmp_path, GPT2, random_of(GPT2))
    break_folder(tmp_path, how)
    with pytest.raises(ExchangeError) as error:
        HuggingFaceSource(tmp_path)
    assert words in str(error.value)


def test_tensors_that_config_does_not_mean(tmp_path: Path) -> None:
    theirs = random_of(GPT2)
    lacking = {name: tensor for name, tensor in theirs.items() if "h.1.mlp.c_fc.weight" not in name}
    with pytest.raises(ExchangeError, match=r"no tensor transformer.h.1.mlp.c_fc.weight"):
        HuggingFaceSource(write_folder(tmp_path / "a", GPT2, lacking))
    with pytest.raises(ExchangeError, match=r"holds transformer.h.0.adapter.weight, which the architecture"):
        HuggingFaceSource(write_folder(tmp_path / "b", GPT2, theirs | {"transformer.h.0.adapter.weight": np.ones(3)}))
    with pytest.raises(ExchangeError, match=r"wpe.weight is \[11, 24\], but by config.json it is \[12, 24\]"):
        HuggingFaceSource(write_folder(tmp_path / "c", {**GPT2, "n_positions": 12}, theirs))
    integers = theirs | {"transformer.ln_f.bias": np.zeros(24, np.int32)}
    with pytest.raises(ExchangeError, match=r"ln_f.bias is of I32; weights can be F32, BF16, F16"):
        HuggingFaceSource(write_folder(tmp_path / "d", GPT2, integers))
    write_folder(tmp_path / "e", GPT2, theirs, files=2)
    save_file({"transformer.ln_f.bias": np.zeros(24, np.float32)}, tmp_path / "e" / "model-0.safetensors")
    with pytest.raises(ExchangeError, match=r"is in model-0.safetensors and model-1.safetensors|has no tensor"):
        HuggingFaceSource(tmp_path / "e")


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (128, 128), (127, 300), (257, 1), (130, 129), (7,), ()])
def test_transposed_rows_are_copied_by_tiles(shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape[::-1]).T
    rows = in_rows(values)
    assert rows.flags.c_contiguous
    assert rows.shape == values.shape
    assert np.array_equal(rows, values)
    assert in_rows(rows) is rows
