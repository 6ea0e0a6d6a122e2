"""GGUF files: every number and name of them, the vocabulary in them, and the message of every refusal."""

import argparse
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import Manifest
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.config.sections import DataConfig, LaunchConfig, ModelConfig, RunConfig
from gptdist.data.tokenizer import BYTE_LETTERS, CorpusTokenizer
from gptdist.errors import CorpusError, ExchangeError, NotConformant, StorageError
from gptdist.exchange.gguf import check_gguf, gguf_architecture, gguf_fields, gguf_view, stored_dtypes, write_gguf
from gptdist.exchange.gguf_file import DTYPES, GgufFile, decode, encode
from gptdist.exchange.gguf_vocabulary import Vocabulary, gguf_vocabulary
from gptdist.model.parameters import logical_shapes
from gptdist.world import World
from launch.models import export, export_gguf

CLASSIC = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, vocab_size=300, sequence_length=32)
MODERN = CLASSIC.model_copy(
    update={"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False, "ffn_hidden_size": 96}
)
MODELS = {
    "gpt2": CLASSIC,
    "gpt2 grouped, untied, no biases": CLASSIC.model_copy(
        update={"tie_embeddings": False, "bias": False, "num_kv_heads": 2}
    ),
    "gptneox": CLASSIC.model_copy(update={"position": "rotary", "bias": False}),
    "gptneox untied": CLASSIC.model_copy(update={"position": "rotary", "tie_embeddings": False}),
    "llama": MODERN.model_copy(update={"tie_embeddings": False, "num_kv_heads": 2}),
    "llama tied, biases": MODERN.model_copy(update={"bias": True}),
}
BYTES_VOCABULARY = gguf_vocabulary(CorpusTokenizer.of_bytes(), CLASSIC.vocab_size)
ABOUT: dict[str, str | int | float | bool] = {"general.name": "a run", "gptdist.step": 2**33}


class Arrays:
    """A source of random logical tensors."""

    def __init__(self, model: ModelConfig, scale: float = 0.05) -> None:
        generator = np.random.default_rng(7)
        self.tensors = {
            f"weight/{name}": generator.normal(0, scale, shape).astype(np.float32)
            for name, shape in logical_shapes(model).items()
        }

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        tensor = self.tensors[name]
        return tensor if box is None else tensor[box.slices()]


def written(path: Path, model: ModelConfig, dtype: str = "fp32") -> Arrays:
    source = Arrays(model)
    write_gguf(path, source, model, BYTES_VOCABULARY, dtype, ABOUT)
    return source


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_holds_the_weights(tmp_path: Path, name: str, dtype: str) -> None:
    model, path = MODELS[name], tmp_path / "m.gguf"
    source = written(path, model, dtype)
    check_gguf(path, source, model, dtype, ABOUT)
    with GgufFile(path) as file:
        assert file.field("general.architecture") == gguf_architecture(model)
        assert {file.dtype(tensor) for tensor in file.names()} == {"fp32", dtype}
        view = gguf_view(file, model)
        for key, array in source.tensors.items():
            matrix = array.ndim == 2 and "position" not in key
            expected = decode(encode(array, dtype), dtype) if matrix else array
            assert view.read(key).tobytes() == expected.tobytes(), key
            box = Box(tuple(size // 3 for size in array.shape), tuple(size - size // 5 for size in array.shape))
            assert (view.read(key, box) == expected[box.slices()]).all()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])
def test_rows_lie_as_the_formulas_say(tmp_path: Path, name: str) -> None:
    """Written out row by row: groups of query heads, a key and a value; of llama, halves of a head interleaved."""
    model, path = MODELS[name], tmp_path / "m.gguf"
    source = written(path, model)
    ours = source.tensors["weight/layers.1.attention.qkv.weight"]
    head, per_key = model.head_size, model.num_heads // model.kv_heads
    rows: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for group in range(model.kv_heads):
        first = group * (per_key + 2) * head
        for place in range(per_key + 2):
            kind = "q" if place < per_key else "k" if place == per_key else "v"
            of_head = ours[first + place * head : first + (place + 1) * head]
            if name.startswith("llama") and kind != "v":
                of_head = np.stack([of_head[part * head // 2 + row] for row in range(head // 2) for part in range(2)])
            rows[kind].extend(of_head)
    with GgufFile(path) as file:
        if name.startswith("llama"):
            for kind, expected in rows.items():
                assert (file.read(f"blk.1.attn_{kind}.weight") == np.stack(expected)).all()
        else:
            assert (file.read("blk.1.attn_qkv.weight") == np.stack(rows["q"] + rows["k"] + rows["v"])).all()


def test_sizes_and_metadata(tmp_path: Path) -> None:
    model = MODELS["llama"].model_copy(update={"rotary_base": 5e5, "norm_epsilon": 1e-6})
    written(tmp_path / "m.gguf", model)
    with GgufFile(tmp_path / "m.gguf") as file:
        fields = {key: file.field(key) for key in gguf_fields(model)}
        assert fields == {
            "llama.vocab_size": 300,
            "llama.context_length": 32,
            "llama.embedding_length": 64,
            "llama.feed_forward_length": 96,
            "llama.block_count": 2,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
            "llama.rope.dimension_count": 16,
            "llama.rope.freq_base": 5e5,
        }
        assert (file.field("general.name"), file.field("gptdist.step")) == ("a run", 2**33)
        assert (file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
        assert file.field("tokenizer.ggml.eos_token_id") == file.field("tokenizer.ggml.bos_token_id") == 256
        assert file.field("tokenizer.ggml.add_bos_token") is False
        assert file.field("tokenizer.ggml.tokens")[:256] == BYTE_LETTERS
        assert "output.weight" in file.names()
    fields = gguf_fields(MODELS["gptneox"])
    assert fields["gptneox.use_parallel_residual"] is False
    assert fields["gptneox.attention.layer_norm_epsilon"] == 1e-5


def test_q8_0_is_within_half_a_step() -> None:
    rows = np.random.default_rng(1).normal(0, 1, (50, 96)).astype(np.float32)
    rows[3, :32] = 0.0
    rows[4, :32] = 1e-44  # not even a scale of it is a number of 16 bits
    stored = encode(rows, "q8_0")
    assert stored.nbytes == rows.size * 34 // 32
    step = np.abs(rows.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
    error = np.abs(decode(stored, "q8_0") - rows).reshape(-1, 32)
    assert (error <= step * 0.5 + 127 * step * 2**-11 + 1e-9).all()
    assert error.max() > 0


def test_without_a_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, Arrays(CLASSIC), CLASSIC, Vocabulary(0, problem="no reason"))
    with GgufFile(path) as file:
        assert file.field("tokenizer.ggml.model") == "no_vocab"
        assert file.field("tokenizer.ggml.tokens") is None
        assert file.field("gpt2.vocab_size") == 300


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"activation": "gelu"}, "gpt2 needs model.activation gelu_tanh (here gelu)"),
        ({"activation": "swiglu"}, "llama needs model.norm rmsnorm (here layernorm) and model.position rotary (here"),
        ({"norm": "rmsnorm"}, "a model to be exported has to be trained with settings that one of them has"),
    ],
)
def test_a_model_that_llama_cpp_does_not_compute(update: dict[str, Any], message: str) -> None:
    with pytest.raises(ExchangeError) as raised:
        gguf_architecture(CLASSIC.model_copy(update=update))
    assert str(raised.value).startswith("No architecture of llama.cpp computes what this model does: gpt2 needs ")
    assert message in str(raised.value)


def test_dtypes_that_cannot_be() -> None:
    with pytest.raises(ExchangeError, match=r"cannot have weights of int4\. Use --dtype fp32, fp16, bf16, q8_0"):
        stored_dtypes(CLASSIC, "int4")
    narrow = CLASSIC.model_copy(update={"hidden_size": 72})
    with pytest.raises(ExchangeError, match=r"the rows of embedding.word.weight have 72. Export with --dtype fp16 or"):
        stored_dtypes(narrow, "q8_0")
    assert set(stored_dtypes(narrow, "fp16").values()) == {"fp16", "fp32"}


@pytest.mark.parametrize(("dtype", "number"), [("fp16", 1e5), ("q8_0", 1e7)])
def test_numbers_that_do_not_fit(tmp_path: Path, dtype: str, number: float) -> None:
    source, path = Arrays(CLASSIC), tmp_path / "m.gguf"
    source.tensors["weight/layers.0.mlp.up.weight"][5, 7] = -number
    with pytest.raises(ExchangeError) as raised:
        write_gguf(path, source, CLASSIC, BYTES_VOCABULARY, dtype)
    assert str(raised.value) == (
        f"blk.0.ffn_up.weight cannot be exported as it is: its largest number is {number:g}, which {dtype} cannot "
        "hold. Export with --dtype fp32 or bf16."
    )
    assert list(tmp_path.iterdir()) == []
    write_gguf(path, source, CLASSIC, BYTES_VOCABULARY, "bf16")


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    source = Arrays(CLASSIC)
    source.tensors["weight/final_norm.bias"][3] = np.nan
    with pytest.raises(
        ExchangeError, match=r"output_norm.bias .* its numbers are not all finite: this checkpoint is of a"
    ):
        write_gguf(tmp_path / "m.gguf", source, CLASSIC, BYTES_VOCABULARY)


def test_a_file_that_is_not_the_checkpoints(tmp_path: Path) -> None:
    path, model = tmp_path / "m.gguf", MODELS["llama"]
    source = written(path, model)
    source.tensors["weight/layers.1.attention.qkv.weight"][40, 3] += 1e-4
    with pytest.raises(NotConformant, match=r"layers.1.attention.qkv.weight is not what the checkpoint has: the first"):
        check_gguf(path, source, model, "fp32", ABOUT)
    with pytest.raises(NotConformant, match=r"gptdist.step is 8589934592, and should be 5"):
        check_gguf(path, source, model, "fp32", {"gptdist.step": 5})
    with pytest.raises(NotConformant, match=r"tensor blk.0.attn_k.weight is .*'fp32'\), and should be .*'fp16'\)"):
        check_gguf(path, source, model, "fp16", ABOUT)
    grouped = MODELS["gpt2 grouped, untied, no biases"]
    written(path, grouped.model_copy(update={"bias": True}))
    with pytest.raises(NotConformant, match=r"blk.0.attn_qkv.bias is not zero, and the model has no such bias"):
        check_gguf(path, Arrays(grouped), grouped, "fp32", ABOUT)
    path.write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(ExchangeError, match="is no GGUF file that can be read"):
        GgufFile(path)


def test_every_flipped_byte_of_the_weights_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    source = written(path, CLASSIC, "q8_0")
    whole = path.read_bytes()
    with GgufFile(path) as file:
        data = file.data_ranges()
    generator = np.random.default_rng(3)
    for start, stop in data:
        place = int(generator.integers(start, stop))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(NotConformant):
            check_gguf(path, source, CLASSIC, "q8_0", ABOUT)


# Vocabularies.


def bpe(**changes: Any) -> CorpusTokenizer:
    """A byte-level BPE of 260 ids: bytes, "ab", a word that its merges do not make, and two added tokens."""
    vocab = {letter: index for index, letter in enumerate(BYTE_LETTERS)} | {"ab": 256, "abc": 257}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    fields: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": 258, "content": "<|endoftext|>", "special": True, **flags},
            {"id": 259, "content": "<tool>", "special": False, **flags, **changes.pop("added", {})},
        ],
        "normalizer": changes.pop("normalizer", None),
        "pre_tokenizer": changes.pop(
            "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        ),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "ignore_merges": False, **changes},
    }
    return CorpusTokenizer.parse(json.dumps(fields).encode(), "a tokenizer")


def split(pattern: str) -> dict[str, Any]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [part, letters]}


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"


def test_a_byte_level_bpe() -> None:
    found = gguf_vocabulary(bpe(), 262)
    assert (found.end_of_text, found.pre_tokenizer, found.merges) == (258, "gpt-2", ("a b",))
    assert found.tokens == (*BYTE_LETTERS, "ab", "abc", "<|endoftext|>", "<tool>", "[unused0]", "[unused1]")
    assert found.types == (1,) * 258 + (3, 4, 5, 5)


def test_plain_bytes_are_a_bpe_that_merges_nothing() -> None:
    found = gguf_vocabulary(CorpusTokenizer.of_bytes(), 257)
    assert found.tokens == (*BYTE_LETTERS, "<|endoftext|>")
    assert (found.types[255:], found.merges) == ((1, 3), ("<|endoftext|> <|endoftext|>",))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pre_tokenizer": split(GPT2)}, "gpt-2"),
        ({"pre_tokenizer": split(QWEN2)}, "qwen2"),
        ({"pre_tokenizer": split(LLAMA3), "ignore_merges": True}, "llama-bpe"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Digits", "individual_digits": True},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
                    ],
                }
            },
            "smollm",
        ),
    ],
)
def test_ways_to_split_that_llama_cpp_knows(changes: dict[str, Any], name: str) -> None:
    found = gguf_vocabulary(bpe(**changes), 260)
    assert (found.pre_tokenizer, found.problem) == (name, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"end_of_word_suffix": "</w>"}, "its BPE sets end_of_word_suffix, as no byte-level BPE does"),
        ({"byte_fallback": True}, "its BPE sets byte_fallback, as no byte-level BPE does"),
        ({"normalizer": {"type": "NFC"}}, "it changes text before splitting it (NFC); llama.cpp does not"),
        ({"pre_tokenizer": None}, "it splits text by nothing, which llama.cpp has no name for"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it splits text by Whitespace, which llama.cpp has no name for"),
        ({"pre_tokenizer": split(r"\w+")}, r"it splits text by a pattern that llama.cpp has no name for: '\\w+'"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "it puts a space before text",
        ),
        (
            {"ignore_merges": True},
            "its token 'abc' does not come of its merges, which llama.cpp would go by",
        ),
        ({"added": {"lstrip": True}}, "its added token '<tool>' takes more than its own characters, or not always"),
        ({"vocab": {"a": 0, "b": 1}, "merges": []}, "its BPE is not byte-level: it has no token 'Ā'"),
    ],
)
def test_why_there_is_no_vocabulary(changes: dict[str, Any], reason: str) -> None:
    found = gguf_vocabulary(bpe(**changes), 260)
    assert found == Vocabulary(found.end_of_text, problem=reason)


def test_other_kinds_of_model() -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 1}, "unk_token": "a"}
    tokenizer = CorpusTokenizer.parse(json.dumps({"version": "1.0", "model": words}).encode(), "words")
    reason = "its model is 'WordLevel', and only a byte-level BPE is known to split alike"
    assert gguf_vocabulary(tokenizer, 2).problem == reason
    with pytest.raises(CorpusError, match="The tokenizer has 257 ids and the model only 200, so they do not belong"):
        gguf_vocabulary(CorpusTokenizer.of_bytes(), 200)


# The command.


def saved(
    folder: Path, model: ModelConfig = CLASSIC, tokenizer: CorpusTokenizer | None = None, scale: float = 0.05
) -> Path:
    """A run's folder with one checkpoint of `model`, random weights."""
    tokenizer = tokenizer or CorpusTokenizer.of_bytes()
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "tokenizer.json").write_bytes(tokenizer.content)
    config = RunConfig(
        model=model, data=DataConfig(corpus=str(folder / "corpus")), launch=LaunchConfig(run_dir=str(run))
    )
    fragments = [
        HostFragment(name, array.shape, Box.whole(array.shape), "float32", array)
        for name, array in Arrays(model, scale).tensors.items()
    ]
    state = {"config": config.model_dump(mode="json"), "tokens": 640, "versions": {}}
    state["data"] = {"tokenizer": tokenizer.sha256, "end_of_text": tokenizer.end_of_text}
    save_checkpoint(run / "checkpoints", 5, fragments, state, Comms(World()))
    return run


def run_export(run: Path, out: Path, **changes: Any) -> int:
    settings = {"format": "gguf", "dtype": "fp32", "trust_others": False, "corpus": None, "samples": None}
    return export.main(argparse.Namespace(path=run, out=out, **{**settings, **changes}))


def test_the_command_writes_a_file_and_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = saved(tmp_path, MODELS["llama"]), tmp_path / "out" / "model.gguf"
    assert run_export(run, out, dtype="bf16") == 0
    said = capsys.readouterr().out
    assert "as llama, bf16" in said and "all read back and compared" in said
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.conformance.json", "model.gguf"]
    card = json.loads((out.parent / "model.conformance.json").read_text())
    assert card["files"]["model.gguf"]["bytes"] == out.stat().st_size
    assert card["tensors"]["blk.0.attn_q.weight"] == "bf16" and card["tensors"]["output_norm.weight"] == "fp32"
    assert (card["checkpoint"]["step"], card["checkpoint"]["tokens"]) == (5, 640)
    assert card["tokenizer"]["pre_tokenizer"] == "gpt-2"
    with GgufFile(out) as file:
        assert file.field("gptdist.step") == 5
        assert file.field("gptdist.manifest_sha256") == card["checkpoint"]["manifest_sha256"]


def test_a_tokenizer_without_equal_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    run_export(saved(tmp_path, tokenizer=bpe(normalizer={"type": "NFC"})), out)
    said = capsys.readouterr().out
    assert (
        f"note    {out} has no vocabulary, so that llama.cpp takes and gives ids and no text: of the tokenizer" in said
    )
    assert "llama.cpp knows no equal, since it changes text before splitting it (NFC); llama.cpp does not" in said
    card = json.loads((tmp_path / "model.conformance.json").read_text())
    assert card["tokenizer"]["left_out_because"].startswith("it changes text")


def test_refusals_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = saved(tmp_path), tmp_path / "new" / "model.gguf"
    with pytest.raises(ExchangeError, match=r"--out .*/model must end in .gguf: --format gguf makes one file"):
        run_export(run, tmp_path / "model")
    with pytest.raises(ExchangeError, match="--dtype q8_0 is a format of GGUF files alone"):
        run_export(run, tmp_path / "folder", format="hf", dtype="q8_0")
    (tmp_path / "model.conformance.json").touch()
    with pytest.raises(ExchangeError, match=r"model.conformance.json exists; nothing is ever replaced. Name another"):
        run_export(run, tmp_path / "model.gguf")
    with monkeypatch.context() as patched:
        patched.setattr(export_gguf, "find_spec", lambda name: None)
        with pytest.raises(ExchangeError, match=r"needs the package gguf. Install it: pip install 'gptdist\[gguf\]'"):
            run_export(run, out)
    with monkeypatch.context() as patched:
        patched.setattr("launch.new_folder.free_bytes", lambda folder: 1000)
        with pytest.raises(StorageError, match=r"model.gguf needs [0-9,]+ bytes, and 1,000 are free on its disk"):
            run_export(run, out)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("gptdist.exchange.gguf_file.os.fsync", full)
        with pytest.raises(StorageError, match=r"cannot write .*model.gguf: No space left on device. Name another"):
            run_export(run, out)
    with monkeypatch.context() as patched:
        patched.setattr("gptdist.exchange.gguf.check_gguf", mismatch)
        with pytest.raises(NotConformant, match="not the same"):
            run_export(run, out)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def mismatch(*args: Any) -> None:
    raise NotConformant("not the same")


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    run, out = saved(tmp_path), tmp_path / "model.gguf"
    (file,) = run.glob("checkpoints/*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with Checkpoint.open(file.parent, verify=False) as checkpoint:
        assert isinstance(checkpoint.manifest, Manifest)
    with pytest.raises(Exception, match="a file of the checkpoint is damaged"):
        run_export(run, out)
    assert not out.exists()
