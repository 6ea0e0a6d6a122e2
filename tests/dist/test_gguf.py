"""Exported GGUF files compute what our model computes: in llama.cpp where its Python binding is, Q8_0 in our engine."""

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.tokenizing.hard_texts import hard_texts
from gptdist.model.sampling import Sampling
from gptdist.train.sample import generate
from launch.models.trained import Trained, open_trained
from tests.dist.commands import Commands
from tests.unit.test_export_gguf import MODELS, run_export, saved

with_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python, which no extra installs"
)
LEARNING = {"model__hidden_size": 64, "model__sequence_length": 256, "train__steps": 60, "checkpoint__interval": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "classic": LEARNING,
    "modern": LEARNING
    | {"model__norm": "rmsnorm", "model__position": "rotary", "model__activation": "swiglu", "model__bias": False}
    | {"model__num_kv_heads": 2, "model__tie_embeddings": False, "model__ffn_hidden_size": 192},
}
PROMPTS = ("def ", "The", "import os\n\nclass Name:\n    def __init__(self, x):\n", "    return ", "naïve\t🙂 1234")
NEW_TOKENS = 200
# Of max(1, the largest logit). llama.cpp looks GELU up in a table of 16-bit floats; all else is fp32 in both.
BOUNDS = {"gpt2": 5e-4, "gptneox": 5e-4, "llama": 1e-5}


@contextmanager
def llama(path: Path) -> Iterator[Any]:
    """The file in llama.cpp, keys and values in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import llama_cpp

        settings = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
        model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **settings)
        try:
            yield model
        finally:
            model.close()


def likeliest(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation in llama.cpp."""
    model.reset()
    model.eval(prompt)
    found: list[int] = []
    while len(found) < count:
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(found[-1:])
    return found


def check_logits(model: Any, trained: Trained, ids: list[int], bound: float) -> None:
    model.reset()
    model.eval(ids)
    theirs = np.array(model.scores[: len(ids)])
    ours = trained.engine.logits(torch.tensor([ids]))[0].numpy()
    assert np.abs(ours - theirs).max() <= bound * max(1.0, np.abs(ours).max())


@with_llama_cpp
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SETTINGS)
def test_llama_cpp_generates_the_same(kind: str, commands: Commands, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "model.gguf"
    commands.train(run, 1, **SETTINGS[kind]).expect(0)
    commands.run("export", run, "--format", "gguf", "--out", file).expect(0)
    with open_trained(run) as trained, llama(file) as model:
        bound = BOUNDS[model.metadata["general.architecture"]]
        texts = [text for text in hard_texts(["<|endoftext|>"]) if text]
        for text in texts:
            assert model.tokenize(text.encode(), add_bos=False, special=False) == trained.tokenizer.encode(text)
        for prompt in PROMPTS:
            ids = trained.tokenizer.encode(prompt)
            check_logits(model, trained, ids, bound)
            ours = generate(trained.engine, trained.comms, ids, NEW_TOKENS, Sampling(temperature=0))
            assert likeliest(model, ids, NEW_TOKENS) == ours
        check_logits(model, trained, trained.tokenizer.encode("".join(texts[:40]))[:256], bound)


@with_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_the_same(name: str, tmp_path: Path) -> None:
    run, file = saved(tmp_path, MODELS[name], scale=0.3), tmp_path / "model.gguf"
    run_export(run, file)
    with open_trained(run) as trained, llama(file) as model:
        ids = np.random.default_rng(5).integers(0, 300, 32).tolist()
        check_logits(model, trained, ids, BOUNDS[model.metadata["general.architecture"]])


def test_q8_0_says_what_it_costs(commands: Commands, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "model.gguf"
    commands.train(run, 1).expect(0)
    for folder in (run / "checkpoints").glob("step-*"):
        folder.chmod(0o777)  # refused, but for those who say so
    trusting = ("--trust-others",)
    said = commands.run("export", run, "--format", "gguf", "--dtype", "q8_0", "--out", file, *trusting).expect(0).out
    card = (tmp_path / "model.conformance.json").read_text()
    measured = json.loads(card)["perplexity"]
    assert "/" not in measured["corpus"] and "/" not in json.loads(card)["data"]["phases"][0]["blend"][0]["corpus"]
    evaluated = commands.run("eval", run, "--samples", measured["windows"], *trusting).expect(0).out
    found = re.search(r"perplexity ([0-9.]+),", evaluated)
    assert found and float(found[1]) == pytest.approx(measured["checkpoint"], abs=0.006)
    assert 0 < abs(measured["change"]) < 1e-3
    assert measured["exported"] == pytest.approx(measured["checkpoint"] * (1 + measured["change"]))
    assert f"perplexity on {measured['windows']} held-out windows of {Path(commands.corpus).name}: " in said
    assert f"{measured['exported']:.4f} of the file ({measured['change']:+.4%})" in said

    other = tmp_path / "other.gguf"
    nowhere = ["--corpus", tmp_path / "nowhere", *trusting]
    commands.run("export", run, "--format", "gguf", "--dtype", "q8_0", "--out", other, *nowhere).one_error("nowhere")
    assert not other.exists() and not list(tmp_path.glob(".tmp-*gguf")) and not list(tmp_path.glob("other*"))
