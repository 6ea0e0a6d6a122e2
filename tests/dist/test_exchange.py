"""Exports and imports against transformers itself: logits, 200 greedy tokens, perplexity; a broken export is refused.

Our model runs in a rank, transformers here. Shapes are odd on purpose: a vocabulary that is no multiple of 64, groups
of key/value heads, biases that one side has and the other has not.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gptdist.checkpoint.read import Checkpoint
from gptdist.comms import Comms
from gptdist.config.sections import ModelConfig, RunConfig, TrainConfig
from gptdist.engine.engine import InferenceEngine
from gptdist.engine.partition import TensorSource
from gptdist.errors import ExchangeError, NotConformant
from gptdist.exchange.conformance import BOUND, random_probes
from gptdist.layout import Layout
from gptdist.model.sampling import Sampling
from gptdist.train.sample import generate
from gptdist.world import World
from launch.arguments.command import parse_arguments
from launch.models import export, import_model
from launch.models.proof import Proof, prove
from tests.dist.cases import text
from tests.dist.commands import Commands
from tests.dist.ranks import RankPool
from tests.stored_models import write_run

transformers = pytest.importorskip(
    "transformers", reason="Hugging Face transformers loads what is exported; install extra `test`"
)

LENGTH = 224  # context enough for a prompt and 200 tokens
CLASSIC = ModelConfig(num_layers=2, hidden_size=48, num_heads=3, vocab_size=259, sequence_length=LENGTH)
MODERN = CLASSIC.model_copy(
    update={
        "num_heads": 6,
        "num_kv_heads": 2,
        "ffn_hidden_size": 100,
        "vocab_size": 301,
        "norm": "rmsnorm",
        "position": "rotary",
        "rotary_base": 50000.0,
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    }
)
MODELS = {
    "gpt2": CLASSIC,
    "gpt2 untied, exact gelu, no biases": CLASSIC.model_copy(
        update={"tie_embeddings": False, "activation": "gelu", "bias": False, "norm_epsilon": 1e-3, "vocab_size": 300}
    ),
    "llama": MODERN,
    "llama tied, one key head, biases": MODERN.model_copy(
        update={"tie_embeddings": True, "num_kv_heads": 1, "bias": True, "norm_epsilon": 1e-3}
    ),
    "gpt_neox": CLASSIC.model_copy(update={"position": "rotary", "tie_embeddings": False}),
}
SMALL = {"vocab_size": 301, "hidden_size": 48, "max_position_embeddings": LENGTH, "bos_token_id": 256}
SMALL |= {"eos_token_id": 256}
LLAMA_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 100}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": LENGTH, "vocab_size": 301}),
    "gpt_neo": ("GPTNeo", SMALL | {"num_layers": 2, "num_heads": 3, "attention_types": [[["global", "local"], 1]]}),
    "llama": ("Llama", SMALL | LLAMA_SIZES | {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", SMALL | LLAMA_SIZES | {"sliding_window": LENGTH}),
    "qwen2": ("Qwen2", SMALL | LLAMA_SIZES),
    "gpt_neox": ("GPTNeoX", SMALL | {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 100}),
}
THEIRS["gpt2"][1].update({"bos_token_id": 256, "eos_token_id": 256})
THEIRS["gpt_neo"][1].update({"window_size": LENGTH})
THEIRS["gpt_neox"][1].update({"use_parallel_residual": False, "rotary_pct": 1.0})


def run_command(handler: Any, *words: object) -> None:
    handler(parse_arguments([str(word) for word in words]))


def in_engine(world: World, checkpoint: Path, model: ModelConfig, tokens: Tensor, prompt: list[int], more: int) -> Any:
    """Logits of `tokens` but the last column, their loss, and `more` greedy tokens after `prompt`."""
    engine = InferenceEngine(model, TrainConfig(), Layout(), world)
    try:
        with Checkpoint.open(checkpoint, verify=True) as opened:
            engine.load_weights(TensorSource(opened))
        loss = engine.evaluate([(tokens, torch.ones(len(tokens)))]).loss
        greedy = generate(engine, Comms(World()), prompt, more, Sampling(temperature=0))
        return engine.logits(tokens[:, :-1]).numpy(), loss, greedy
    finally:
        engine.close()


@torch.no_grad()
def in_transformers(folder: Path, tokens: Tensor, prompt: list[int], more: int) -> tuple[Tensor, float, list[int]]:
    """The same of a folder; text is generated with transformers' own cache of keys and values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    given = torch.tensor([prompt])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=more, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return logits, loss, out[0, len(prompt) :].tolist()


def agree(pool: RankPool, checkpoint: Path, model: ModelConfig, folder: Path, more: int) -> None:
    tokens = text(LENGTH + 1)[:3]
    prompt = tokens[0, :20].tolist()
    (ours,) = pool.run(in_engine, 1, checkpoint, model, tokens, prompt, more)
    logits, loss, greedy = in_transformers(folder, tokens, prompt, more)
    assert logits.std() > 0.1, "logits that are all alike would prove nothing"
    assert (torch.from_numpy(ours[0]) - logits).abs().max() <= BOUND
    assert f"{math.exp(ours[1]):.4g}" == f"{math.exp(loss):.4g}"
    assert ours[2] == greedy
    assert len(greedy) == more


@pytest.mark.parametrize("name", MODELS)
def test_an_export_computes_the_same(pool: RankPool, tmp_path: Path, name: str) -> None:
    step = write_run(tmp_path / "run", MODELS[name])
    run_command(export.main, "export", step, "--out", tmp_path / "hf", "--no-proof", "--max-shard-size", "40KB")
    agree(pool, step, MODELS[name], tmp_path / "hf", 200)


@pytest.mark.parametrize("name", THEIRS)
def test_an_import_computes_the_same(pool: RankPool, tmp_path: Path, name: str) -> None:
    save_random(name, tmp_path / "hf")
    run_command(import_model.main, "import", tmp_path / "hf", "--out", tmp_path / "run", "--tokenizer", "bytes")
    step = tmp_path / "run" / "checkpoints" / "step-00000000"
    with Checkpoint.open(step, verify=False) as opened:
        model = ModelConfig.model_validate(opened.state["config"]["model"])
    agree(pool, step, model, tmp_path / "hf", 32)


def test_theirs_out_and_in_again_is_bitwise(tmp_path: Path) -> None:
    """The families that are exported, from folders that transformers wrote."""
    for name in ("gpt2", "llama", "gpt_neox"):
        save_random(name, tmp_path / name)
        run_command(
            import_model.main, "import", tmp_path / name, "--out", tmp_path / f"{name} run", "--tokenizer", "bytes"
        )
        run_command(export.main, "export", tmp_path / f"{name} run", "--out", tmp_path / f"{name} out", "--no-proof")
        before = load_file(tmp_path / name / "model.safetensors")
        after = load_file(tmp_path / f"{name} out" / "model.safetensors")
        assert all(np.array_equal(before[key], after[key]) for key in before)
        added = after.keys() - before.keys()
        assert all(key.endswith(".bias") and not after[key].any() for key in added), "biases theirs has not"


def save_random(name: str, folder: Path) -> None:
    kind, settings = THEIRS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**settings)
    end = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{end}")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter_name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
            parameter.normal_(1.0 if is_norm else 0.0, 0.05)
    model.save_pretrained(folder)


def test_the_command_proves_and_says_so(commands: Commands, corpus: Path) -> None:
    run_dir = commands.folder / "run"
    write_run(run_dir, MODERN.model_copy(update={"sequence_length": 64}), corpus=corpus)
    out = commands.folder / "out"
    done = commands.run("export", run_dir, "--out", out, "--dtype", "bf16").expect(0)
    assert "proven: of " in done.out
    card = json.loads((out / "conformance.json").read_text())["proof"]
    assert card["max_difference"] <= card["bound"] <= 1e-4
    assert card["greedy_agreement"] == 1.0
    assert [(probe["kind"], probe["tokens"]) for probe in card["probes"]] == [
        ("random", 64), ("text", 1), ("text", 5), ("text", 32), ("text", 33), ("text", 64)
    ]  # fmt: skip
    assert card["tokenizer_texts"] == 5
    assert card["theirs"]["architecture"] == "LlamaForCausalLM"
    done = commands.run("generate", out.parent / "run", "--prompt", "def ", "--tokens", "5", "--temperature", "0")
    assert done.expect(0).out.startswith("def ")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A checkpoint, a folder exported of it, and the folder's tensors to break."""
    folder = tmp_path_factory.mktemp("broken")
    step = write_run(folder / "run", MODELS["gpt2"].model_copy(update={"sequence_length": 40}))
    run_command(export.main, "export", step, "--out", folder / "hf", "--no-proof")
    return step, folder / "hf", load_file(folder / "hf" / "model.safetensors")


def prove_with(broken: tuple[Path, Path, dict[str, np.ndarray]], tensors: dict[str, np.ndarray]) -> Proof:
    step, folder, _ = broken
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(step, verify=False) as opened:
        config = RunConfig.model_validate(opened.state["config"])
    return prove(step, folder, config, "float32", None, random_probes([40], 259, 1))


def test_a_transposed_matrix_is_refused(broken: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    name = "transformer.h.1.attn.c_proj.weight"  # square: its shape says nothing
    tensors = broken[2]
    with pytest.raises(NotConformant, match=r"does not compute what ours does: a logit differs by \d"):
        prove_with(broken, tensors | {name: tensors[name].T})


def test_swapped_queries_and_keys_are_refused(broken: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    query, key, value = np.split(broken[2][name], 3, axis=1)
    with pytest.raises(NotConformant, match="No folder was left"):
        prove_with(broken, broken[2] | {name: np.concatenate([key, query, value], axis=1)})


def test_a_tensor_of_another_name_is_refused(broken: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    tensors = dict(broken[2])
    tensors["transformer.h.0.ln_9.weight"] = tensors.pop("transformer.h.0.ln_1.weight")
    with pytest.raises(ExchangeError, match="transformers does not find in the folder"):
        prove_with(broken, tensors)


def test_a_refused_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", MODELS["llama"])

    def refuse(*_: object) -> Proof:
        raise NotConformant("does not compute what ours does")

    monkeypatch.setattr(export, "prove", refuse)
    args = parse_arguments(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert isinstance(args, argparse.Namespace)
    with pytest.raises(NotConformant):
        export.main(args)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
