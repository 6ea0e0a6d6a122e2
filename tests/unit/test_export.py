"""`gptdist export` and `import` without their proof: files, tokenizers, memory, and the message of every refusal."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from gptdist.checkpoint.read import Checkpoint
from gptdist.config.sections import ModelConfig
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import ExchangeError, GptdistError, NotConformant
from gptdist.exchange.conformance import BOUND, compare, kept_positions, probe_lengths, random_probes
from gptdist.exchange.hf_tokenizer import bytes_tokenizer_json, is_of_bytes, tokenizer_files
from gptdist.exchange.read_hf import HuggingFaceSource
from launch.arguments.command import parse_arguments
from launch.models import export, import_model, proof
from launch.models.card import begin_card
from launch.new_folder import new_folder
from tests.stored_models import random_weight, write_run

ROOT = Path(__file__).resolve().parents[2]
CLASSIC = ModelConfig(num_layers=2, hidden_size=24, num_heads=3, vocab_size=259, sequence_length=16, dropout=0.25)
MODERN = CLASSIC.model_copy(
    update={"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False, "num_kv_heads": 1}
)


def run(handler: Callable[[argparse.Namespace], int | None], *words: object) -> None:
    assert handler(parse_arguments([str(word) for word in words])) in (0, None)


def run_export(*words: object) -> None:
    run(export.main, "export", *words, "--no-proof")


def refusal(function: Callable[..., Any], *words: object) -> str:
    """The message of the error."""
    with pytest.raises(GptdistError) as error:
        function(*words)
    return str(error.value)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("which", ("run", "checkpoints", "step"))
def test_what_an_export_is_made_of(tmp_path: Path, which: str) -> None:
    step = write_run(tmp_path / "run", CLASSIC)
    source = {"run": tmp_path / "run", "checkpoints": step.parent, "step": step}[which]
    run_export(source, "--out", tmp_path / "out")
    files = "config.json conformance.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert left_in(tmp_path / "out") == files.split()
    assert left_in(tmp_path) == ["out", "run"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["n_positions"], config["eos_token_id"]) == (259, 16, 256)
    card = json.loads((tmp_path / "out" / "conformance.json").read_text())
    assert card["proof"] is None
    assert card["checkpoint"]["step"] == 7
    assert card["files"]["model.safetensors"]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == card["tensors"].keys()
    assert tensors["transformer.wte.weight"].shape == (259, 24), "the vocabulary is not padded"
    up = random_weight("layers.1.mlp.up.weight", (96, 24))
    assert np.array_equal(tensors["transformer.h.1.mlp.c_fc.weight"], up.T)


@pytest.mark.parametrize("model", (CLASSIC, MODERN, MODERN.model_copy(update={"tie_embeddings": False, "bias": True})))
def test_shards_hold_the_same_tensors(tmp_path: Path, model: ModelConfig) -> None:
    write_run(tmp_path / "run", model)
    run_export(tmp_path / "run", "--out", tmp_path / "whole")
    run_export(tmp_path / "run", "--out", tmp_path / "cut", "--max-shard-size", "10KB")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert list(index["weight_map"]) != []
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        cut = load_file(tmp_path / "cut" / file)
        assert set(cut) == {name for name, where in index["weight_map"].items() if where == file}
        assert all(np.array_equal(cut[name], whole[name]) for name in cut)
        assert len(cut) == 1 or sum(tensor.nbytes for tensor in cut.values()) <= 10_000


@pytest.mark.parametrize("model", (CLASSIC, CLASSIC.model_copy(update={"bias": False}), MODERN))
def test_out_and_in_again_is_bitwise(tmp_path: Path, model: ModelConfig) -> None:
    """Settings too that config.json has no place for: they are in the card."""
    step = write_run(tmp_path / "run", model)
    run_export(step, "--out", tmp_path / "hf")
    run(import_model.main, "import", tmp_path / "hf", "--out", tmp_path / "back")
    back_path = tmp_path / "back" / "checkpoints" / "step-00000000"
    with Checkpoint.open(step, verify=True) as first, Checkpoint.open(back_path, verify=True) as back:
        assert back.names() == first.names()
        assert {name: back.digest(name) for name in back.names()} == {name: first.digest(name) for name in back.names()}
        assert all(np.array_equal(back.read(name), first.read(name)) for name in back.names())
        kept = {**model.model_dump(), "num_kv_heads": model.kv_heads, "ffn_hidden_size": model.ffn_size}
        found = ModelConfig.model_validate(back.state["config"]["model"])
        assert {**found.model_dump(), "num_kv_heads": found.kv_heads, "ffn_hidden_size": found.ffn_size} == kept
        assert back.state["imported_from"]["folder"] == "hf"
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == CorpusTokenizer.of_bytes().content
    run_export(tmp_path / "back", "--out", tmp_path / "again")
    first_file, again = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert all(np.array_equal(first_file[name], again[name]) for name in first_file)


def test_a_card_is_believed_only_where_config_agrees(tmp_path: Path) -> None:
    write_run(tmp_path / "run", CLASSIC.model_copy(update={"bias": False}))
    run_export(tmp_path / "run", "--out", tmp_path / "hf")
    with HuggingFaceSource(tmp_path / "hf") as source:
        assert not source.model.bias
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    with HuggingFaceSource(tmp_path / "hf") as source:
        assert source.model.bias
        assert source.model.norm_epsilon == 1e-3


def test_what_an_import_leaves(tmp_path: Path) -> None:
    write_run(tmp_path / "run", MODERN)
    run_export(tmp_path / "run", "--out", tmp_path / "hf", "--dtype", "bf16")
    run(import_model.main, "import", tmp_path / "hf", "--out", tmp_path / "in", "--sequence-length", 8)
    assert left_in(tmp_path / "in") == ["checkpoints", "config.yaml", "tokenizer.json"]
    text = (tmp_path / "in" / "config.yaml").read_text()
    assert f'start_from: "{tmp_path / "in" / "checkpoints" / "step-00000000"}"' in text
    assert "sequence_length: 8" in text


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_narrow_exports_are_our_weights_rounded(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    write_run(tmp_path / "run", CLASSIC)
    run_export(tmp_path / "run", "--out", tmp_path / "out", "--dtype", dtype)
    name = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    found = load_torch(tmp_path / "out" / "model.safetensors")["transformer.wpe.weight"]
    ours = torch.from_numpy(random_weight("embedding.position.weight", (16, 24)))
    assert torch.equal(found, ours.to(getattr(torch, name)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == name


def test_export_refuses_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", CLASSIC)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert "exists and is not an empty folder" in refusal(run_export, tmp_path / "run", "--out", out)
    assert "there is no checkpoint at" in refusal(run_export, tmp_path / "nowhere", "--out", tmp_path / "a")
    write_run(tmp_path / "odd", CLASSIC.model_copy(update={"norm": "rmsnorm"}))
    assert "GPT2LMHeadModel needs model.norm layernorm" in refusal(
        run_export, tmp_path / "odd", "--out", tmp_path / "a"
    )
    (tmp_path / "odd" / "tokenizer.json").unlink()
    assert "the tokenizer that" in refusal(run_export, tmp_path / "odd", "--out", tmp_path / "a")
    monkeypatch.setattr("launch.new_folder.free_bytes", lambda path: 1000)
    assert "are free on its disk" in refusal(run_export, tmp_path / "run", "--out", tmp_path / "a")
    monkeypatch.setattr(proof, "find_spec", lambda name: None)
    wanted = "pip install 'gptdist[export]'"
    assert wanted in refusal(run, export.main, "export", tmp_path / "run", "--out", tmp_path / "a")
    assert left_in(tmp_path) == ["odd", "out", "run"]


def test_term_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Slurm and service managers end what they end with TERM, which alone would skip every `finally`."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 128 + signal.SIGTERM
    assert left_in(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_proof_meets_is_told_and_its_process_ends() -> None:
    """An OSError of transformers' must not read as a full disk; nor may the process stay when the export is ended."""
    with pytest.raises(NotConformant, match="transformers could not compute: OSError: no such file"):
        proof.alone(_fail, "OSError")
    with pytest.raises(ExchangeError, match="ours"):
        proof.alone(_fail, "ours")
    with pytest.raises(NotConformant, match="transformers was killed"):
        proof.alone(_fail, "killed")


def _fail(how: str) -> dict[str, Any]:
    """transformers"""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError("no such file") if how == "OSError" else ExchangeError("ours")


def test_a_card_names_corpora_and_not_where_they_are(tmp_path: Path) -> None:
    """A card is published with the weights; paths of a machine tell of its users."""
    places = ("/home/somebody/corpora/books", "s3://bucket/web", "https://somebody:secret@host/code?token=secret")
    data = {"seed": 1, "phases": [{"from_sample": 0, "blend": [{"corpus": place, "weight": 1} for place in places]}]}
    with Checkpoint.open(write_run(tmp_path / "run", CLASSIC), verify=False) as checkpoint:
        state = {**checkpoint.state, "data": data}
        card = begin_card(cast(Checkpoint, _Stated(checkpoint, state)), CorpusTokenizer.of_bytes())
    found = [entry["corpus"] for entry in card["data"]["phases"][0]["blend"]]
    assert found[:2] == ["books", "s3://bucket/web"]
    assert card["data"]["seed"] == 1 and "somebody" not in json.dumps(card) and "secret" not in json.dumps(card)


class _Stated:
    """A checkpoint with another run state."""

    def __init__(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        self.step, self.created, self.manifest, self.state = 1, checkpoint.created, checkpoint.manifest, state


def test_bytes_are_known_again(tmp_path: Path) -> None:
    """Else an export of a run on bytes could not be evaluated on the run's own corpus."""
    for name, content in tokenizer_files(CorpusTokenizer.of_bytes(), 16).files.items():
        (tmp_path / name).write_bytes(content)
    assert is_of_bytes(tmp_path / "tokenizer.json")
    assert not is_of_bytes(tmp_path / "tokenizer_config.json") and not is_of_bytes(tmp_path / "none")


def test_weights_that_cannot_be_exported(tmp_path: Path) -> None:
    weights = {name: np.array(value) for name, value in _weights(CLASSIC).items()}
    weights["layers.1.mlp.down.weight"][3, 4] = 70000.0
    write_run(tmp_path / "large", CLASSIC, weights=weights)
    words = refusal(run_export, tmp_path / "large", "--out", tmp_path / "a", "--dtype", "fp16")
    assert "transformer.h.1.mlp.c_proj.weight reach 70000, which float16 cannot hold" in words
    run_export(tmp_path / "large", "--out", tmp_path / "ok", "--dtype", "bf16")
    for number, bad in enumerate((np.nan, np.inf)):
        weights["layers.1.mlp.down.weight"][3, 4] = bad
        write_run(tmp_path / f"bad{number}", CLASSIC, weights=weights)
        for dtype in ("fp32", "bf16", "fp16"):
            words = refusal(run_export, tmp_path / f"bad{number}", "--out", tmp_path / "a", "--dtype", dtype)
            assert "are not all finite: this checkpoint is of a run that diverged" in words
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".tmp*"))


def test_damage_is_noticed_while_exporting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = write_run(tmp_path / "run", CLASSIC, step=3)
    newer = write_run(tmp_path / "run", CLASSIC, step=4)
    file = newer / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    words = refusal(run_export, newer, "--out", tmp_path / "a")
    assert "a file of the checkpoint is damaged" in words
    assert "weight/" in words
    run_export(tmp_path / "run", "--out", tmp_path / "a")
    assert "passed over a checkpoint: step-00000004" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "conformance.json").read_text())["checkpoint"]["step"] == 3
    shutil.rmtree(older)
    write_run(tmp_path / "run", CLASSIC, step=2)
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-00000.safetensors").unlink()
    words = refusal(run_export, tmp_path / "run", "--out", tmp_path / "b")
    assert "has 2 checkpoint(s), but none of them can be exported" in words
    assert left_in(tmp_path) == ["a", "run"]


def test_imports_that_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", CLASSIC)
    run_export(tmp_path / "run", "--out", tmp_path / "hf")

    def again(*words: object) -> str:
        return refusal(run, import_model.main, "import", tmp_path / "hf", "--out", tmp_path / "in", *words)

    (tmp_path / "hf" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "nothing says what the model's ids mean" in again()
    _bpe(300).save(str(tmp_path / "large.json"))
    assert "ids up to 300, and the model knows 259" in again("--tokenizer", tmp_path / "large.json")
    weights = {**load_file(tmp_path / "hf" / "model.safetensors")}
    weights["transformer.ln_f.bias"][2] = np.nan
    from safetensors.numpy import save_file

    save_file(weights, tmp_path / "hf" / "model.safetensors")
    assert "that become weight/final_norm.bias are not all finite" in again("--tokenizer", "bytes")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine").touch()
    assert "exists and is not an empty folder" in again("--tokenizer", "bytes")
    assert left_in(tmp_path / "in") == ["mine"]
    assert not list(tmp_path.glob(".tmp*"))


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_bytes_tokenizer_in_other_words(text: str) -> None:
    try:
        expected = list(text.encode())
    except UnicodeEncodeError:
        return
    theirs = Tokenizer.from_buffer(bytes_tokenizer_json())
    theirs.encode_special_tokens = True
    assert theirs.encode(text).ids == expected
    assert theirs.decode(expected) == text


def test_a_tokenizer_that_adds_ids_is_exported_without_them() -> None:
    plain = _bpe(300)
    content = plain.to_str().encode()
    tokenizer = CorpusTokenizer.parse(content, "x")
    written = tokenizer_files(tokenizer, 16)
    assert written.files["tokenizer.json"] == content, "as it is"
    assert written.notes == ()
    assert json.loads(written.files["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"
    plain.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 300)]
    )
    plain.enable_truncation(3)
    tokenizer = CorpusTokenizer.parse(plain.to_str().encode(), "x")
    written = tokenizer_files(tokenizer, 16)
    assert "without truncation, post_processor" in written.notes[0]
    again = Tokenizer.from_buffer(written.files["tokenizer.json"])
    assert again.encode("four words of text").ids == tokenizer.encode("four words of text")


def test_probes() -> None:
    assert probe_lengths(1024, 50257) == [1, 5, 33, 512, 1024]
    assert probe_lengths(2, 259) == [1, 2]
    assert probe_lengths(131072, 128256)[-1] == 2092
    for length, vocab in ((1, 300), (1000, 300), (4000, 128256), (7, 10**9)):
        kept = kept_positions(length, vocab)
        assert kept[-1] == length - 1
        assert kept[0] >= 0
        assert len(kept) * vocab <= 1 << 25 or len(kept) == 1
    probes = random_probes([1, 50], 259, 5)
    assert all(probe.tokens[-1] == 258 and probe.tokens.max() < 259 for probe in probes)
    assert np.array_equal(probes[1].tokens, random_probes([1, 50], 259, 5)[1].tokens)


def test_the_bound_is_relative_to_large_logits() -> None:
    logits = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32)
    for scale in (1.0, 100.0):
        ours = logits / np.abs(logits).max() * np.float32(scale)
        nearly = ours.copy()
        nearly[4, 3] += 0.9 * BOUND * scale
        assert compare(ours, nearly).holds
        nearly[4, 3] += 0.3 * BOUND * scale
        found = compare(ours, nearly)
        assert not found.holds
        assert found.positions == 9
        assert found.greedy_agreement == 1.0
    small = np.float32(0.01) * logits
    assert compare(small, small + np.float32(0.9e-5)).holds, "absolute below 1"
    broken = ours.copy()
    broken[0, 0] = np.nan
    assert not compare(broken, broken).holds


def test_conversion_takes_one_tensor_of_memory_and_no_torch(tmp_path: Path) -> None:
    """The largest tensor is 64 of 151 MB, and lies transposed in GPT-2, which is the hardest case."""
    sizes = {"hidden_size": 1024, "ffn_hidden_size": 16384, "num_heads": 8, "num_layers": 1, "sequence_length": 64}
    model = CLASSIC.model_copy(update=sizes)
    step = write_run(tmp_path / "run", model)
    script = (
        "import sys, resource\nfrom launch.cli import main\nimport launch.models.export\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"code = main(['export', {str(step)!r}, '--out', {str(tmp_path / 'out')!r}, '--no-proof'])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)\n"
        "print(code, before, after)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, before, after = map(int, done.stdout.split()[-3:])
    assert code == 0
    assert (after - before) * 1024 <= 4 * 1024 * 16384 + 100e6, (before, after)


def _weights(model: ModelConfig) -> dict[str, np.ndarray]:
    from gptdist.model.parameters import logical_shapes

    return {name: random_weight(name, shape) for name, shape in logical_shapes(model).items()}


def _bpe(size: int) -> Tokenizer:
    """A byte-level BPE of `size` ids and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    merges = []
    for first in alphabet[:size]:
        if len(vocab) == size:
            break
        merges.append((first, "a"))
        vocab[first + "a"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
