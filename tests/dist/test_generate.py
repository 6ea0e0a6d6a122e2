"""Generation: memory changes nothing, any number of ranks give one text, and transformers gives the same."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gptdist.comms import Comms
from gptdist.engine.decoding import Decoding
from gptdist.engine.engine import InferenceEngine
from gptdist.model.beam import BeamSettings
from gptdist.model.sampling import Sampling
from gptdist.train.sample import continue_text, generate, generate_by_beams
from gptdist.world import World
from tests.dist.cases import MODELS, NEWLINE, Case, RandomWeights, engine_of, text
from tests.dist.commands import Commands
from tests.dist.ranks import RankPool

ROUNDING = 1e-5  # of a logit, fp32: matrices of other heights are added up in another order
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}


def ranks_of(layout: str) -> int:
    return 1 if layout == "TP1" else 2


@contextmanager
def inference(world: World, case: Case) -> Iterator[InferenceEngine]:
    engine = InferenceEngine(case.model, case.train_config, case.layout, world, case.end_of_text)
    try:
        engine.load_weights(RandomWeights(case.model, 0.05))
        yield engine
    finally:
        engine.close()


def read_piecemeal(world: World, case: Case, tokens: Tensor, sizes: list[int]) -> tuple[list[Any], list[Any], int]:
    """Logits after each piece of `tokens`: remembering and from the whole window; how many tokens are remembered."""
    with inference(world, case) as engine:
        decoding, read = Decoding(engine), 0
        remembering, whole = [], []
        for size in sizes:
            remembering.append(decoding.read(tokens[:, read : read + size]).numpy())
            read += size
            window = tokens[:, max(0, read - case.model.sequence_length) : read]
            whole.append(engine.logits(window)[:, -1].numpy())
        return remembering, whole, 0 if decoding._past is None else decoding._past.length


@pytest.mark.parametrize("end_of_text", (None, NEWLINE))
@pytest.mark.parametrize("layout", ("TP1", "TP2"))
@pytest.mark.parametrize("name", ("classic", "modern"))
def test_logits_are_those_without_memory(pool: RankPool, name: str, layout: str, end_of_text: int | None) -> None:
    """A batch of several texts; documents ending anywhere; one token at a time, and several."""
    case = Case(MODELS[name], ranks_of(layout), LAYOUTS[layout], end_of_text=end_of_text)
    tokens = text(MODELS[name].sequence_length)[:4]
    sizes = [9, *[1] * 10, 4, 1, 1, 7]
    assert sum(sizes) == tokens.shape[1]
    for remembering, whole, remembered in pool.run(read_piecemeal, ranks_of(layout), case, tokens, sizes):
        assert remembered == sum(sizes)
        for one, other in zip(remembering, whole, strict=True):
            assert one.std() > 0.1
            assert abs(one - other).max() <= ROUNDING


@pytest.mark.parametrize("layout", ("TP1", "TP2+SP", "PP2"))
def test_past_the_context_the_window_slides(pool: RankPool, layout: str) -> None:
    """And layouts that cannot remember compute anew from the start."""
    case = Case(MODELS["modern"], ranks_of(layout), LAYOUTS[layout])
    sizes = [30, 1, 1, 1, 1]
    for remembering, whole, remembered in pool.run(read_piecemeal, ranks_of(layout), case, text(34)[:2], sizes):
        assert remembered == 0
        for one, other in zip(remembering, whole, strict=True):
            assert abs(one - other).max() <= ROUNDING


def select_and_read(world: World, case: Case, tokens: Tensor, rows: list[int], more: Tensor) -> tuple[Any, Any]:
    with inference(world, case) as engine:
        decoding = Decoding(engine)
        decoding.read(tokens)
        decoding.select(torch.tensor(rows))
        return decoding.read(more).numpy(), engine.logits(torch.cat([tokens[rows], more], 1))[:, -1].numpy()


def test_beams_take_their_memory_along(pool: RankPool) -> None:
    case = Case(MODELS["modern"], 1, end_of_text=NEWLINE)
    ((one, other),) = pool.run(select_and_read, 1, case, text(20)[:3], [2, 0, 2, 2], text(1)[:4])
    assert abs(one - other).max() <= ROUNDING
    assert abs(one[0] - one[1]).max() > 0.1


def generate_all_ways(world: World, case: Case, prompt: list[int], count: int) -> list[list[int]]:
    comms = Comms(world, dist.group.WORLD)
    with inference(world, case) as engine:
        told = continue_text(engine, comms, prompt, count, Sampling(0.0), likeliest=2)
        return [
            generate(engine, comms, prompt, count, Sampling(0.0)),
            [token.likeliest[0][0] for token in told],
            generate(engine, comms, prompt, count, Sampling(0.9, top_k=50, top_p=0.95, seed=5)),
            generate(engine, comms, prompt, count, Sampling(1.0, seed=5), vocab_size=3),
            generate_by_beams(engine, comms, prompt, count, BeamSettings(3)),
        ]


def test_every_layout_generates_the_same(pool: RankPool) -> None:
    """Also past the context."""
    prompt = text(20)[1].tolist()
    found: dict[str, list[list[int]]] = {}
    for layout in LAYOUTS:
        case = Case(MODELS["modern"], ranks_of(layout), LAYOUTS[layout])
        answers = pool.run(generate_all_ways, ranks_of(layout), case, prompt, 16)
        assert all(answer == answers[0] for answer in answers), "every rank has the same"
        found[layout] = answers[0]
    assert all(answer == found["TP1"] for answer in found.values())
    greedy, likeliest, drawn, small, _ = found["TP1"]
    assert greedy == likeliest != drawn
    assert len(small) == 16 and set(small) <= {0, 1, 2}


def sample_while_training(world: World, case: Case, prompt: list[int]) -> tuple[list[int], bool]:
    """Greedy text of a training engine, and whether it is the engine's own choice token by token."""
    with engine_of(case, world) as engine:
        found = generate(engine, Comms(world, dist.group.WORLD), prompt, 5, Sampling(0.0))
        tokens = [*prompt, *found]
        logits = engine.logits(torch.tensor([tokens[:-1]]))[0, len(prompt) - 1 :]
        return found, logits.argmax(-1).tolist() == found


@pytest.mark.parametrize(("world_size", "parallel"), [(2, {"zero_stage": 3}), (2, {"pipeline": 2}), (1, {})])
def test_a_training_engine_generates(pool: RankPool, world_size: int, parallel: dict[str, Any]) -> None:
    case = Case(MODELS["modern"], world_size, parallel)
    for _, same in pool.run(sample_while_training, world_size, case, text(9)[0].tolist()):
        assert same


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with a byte-level tokenizer that opens every text with a token of its own."""
    transformers = pytest.importorskip("transformers", reason="the oracle; install extra `test`")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=257,
        eos_token_id=256,
    )
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {**{letter: index for index, letter in enumerate(alphabet)}, "</s>": 256, "<s>": 257}
    library = Tokenizer(models.BPE(vocab=words, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["</s>", "<s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    library.save(str(folder / "tokenizer.json"))
    return folder


def oracle_text(folder: Path, prompt: str, **how: Any) -> str:
    """What transformers continues `prompt` with, the tokenizer's ids only."""
    import transformers
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    network = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([library.encode(prompt).ids])
    with torch.no_grad():
        found = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=256,
            suppress_tokens=list(range(258, 300)),
            **how,
        )
    return str(library.decode(found[0, ids.shape[1] :].tolist(), skip_special_tokens=True))


def test_a_hugging_face_folder_gives_the_text_of_transformers(commands: Commands, hf_folder: Path) -> None:
    """200 greedy tokens, and four beams."""
    prompt = "Call me Ishmael."
    said = commands.run("generate", hf_folder, "--prompt", prompt, "--temperature", 0, "--tokens", 200).expect(0)
    assert said.out == prompt + oracle_text(hf_folder, prompt, max_new_tokens=200) + "\n"
    assert len(said.out) > 60
    beams = commands.run("generate", hf_folder, "--prompt", prompt, "--beams", 4, "--tokens", 12).expect(0)
    expected = oracle_text(hf_folder, prompt, max_new_tokens=12, num_beams=4, early_stopping="never")
    assert beams.out == prompt + expected + "\n"


def test_two_ranks_give_the_text_of_one(commands: Commands, hf_folder: Path) -> None:
    """Greedy and drawn; of several prompts, one of them empty."""
    prompts = ["--prompt", "one", "--prompt", ""]
    for drawing in (["--temperature", 0], ["--top-p", 0.9, "--seed", 4]):
        words = ["generate", hf_folder, *prompts, *drawing, "--tokens", 24]
        one, two = (commands.run(*words, "--tensor", ranks).expect(0) for ranks in (1, 2))
        assert one.out == two.out
        assert one.out.startswith("one")


def test_what_cannot_be_generated_is_one_error(commands: Commands, hf_folder: Path, tmp_path: Path) -> None:
    too_long = "x" * 256  # and the tokenizer's opening: 257
    commands.run("generate", hf_folder, "--prompt", too_long).one_error("257 tokens", "context is 256", "Shorten")
    commands.run("generate", hf_folder, "--tensor", 3).one_error("--tensor 3", "num_heads (4)", "1 or 2")
    commands.run("generate", tmp_path / "nothing").one_error("no checkpoint at")
    words = ["generate", hf_folder, "--beams", 2, "--temperature", 1]
    commands.run(*words).one_error("--beams", "--temperature", "Leave them out")
    mixed = Path(shutil.copytree(hf_folder, tmp_path / "mixed"))
    tokenizer = json.loads((mixed / "tokenizer.json").read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**first, "id": index, "content": f"<{index}>"} for index in range(258, 301)]
    (mixed / "tokenizer.json").write_text(json.dumps(tokenizer))
    commands.run("generate", mixed).one_error("ids up to", "knows 300", "another model's")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "bert"}))
    commands.run("generate", broken).one_error("bert")


def test_standard_output_is_for_text(commands: Commands, tmp_path: Path) -> None:
    """A checkpoint that was passed over is told of elsewhere."""
    run = tmp_path / "run"
    commands.train(run, 1).expect(0)
    newest = max((run / "checkpoints").glob("step-*"))
    (newest / "manifest.json").write_text("{}")
    said = commands.run("generate", run, "--prompt", "def", "--tokens", 1).expect(0)
    assert said.out.startswith("def") and "warning" not in said.out
    assert f"passed over a checkpoint: {newest.name}" in said.err
