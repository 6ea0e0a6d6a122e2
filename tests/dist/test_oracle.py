"""The same weights in Hugging Face transformers give the same logits: an oracle that nobody here wrote.

Every weight is random, norms and biases too. They are taken from the engine as a checkpoint would take them, so the
names, shapes and row orders of the logical model are judged as well.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptdist.checkpoint.logical import Box
from gptdist.config.sections import ModelConfig
from gptdist.engine.engine import InferenceEngine
from gptdist.model.parameters import logical_shapes
from gptdist.world import World
from tests.dist.cases import (
    MODELS,
    NEWLINE,
    Case,
    RandomWeights,
    assemble,
    batch_of,
    engine_of,
    held,
    text,
)
from tests.dist.ranks import RankPool

transformers = pytest.importorskip(
    "transformers", reason="Hugging Face transformers is the oracle; install extra `test`"
)

BOUND = 1e-5  # largest absolute difference of a logit, fp32
STD = 0.05
ORACLE_MODELS = {
    "gpt2": MODELS["classic"],
    "gpt2 untied, exact gelu": MODELS["classic untied"].model_copy(update={"activation": "gelu", "norm_epsilon": 1e-3}),
    "llama": MODELS["modern"].model_copy(update={"rotary_base": 50000.0, "norm_epsilon": 1e-3}),
    "llama tied, no groups": MODELS["modern tied"].model_copy(update={"num_kv_heads": None}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"zero_stage": 1}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True, "zero_stage": 1}),
    "PP2": (2, {"pipeline": 2, "zero_stage": 2}),
    "DP2, ZeRO 3": (2, {"zero_stage": 3}),
}


def in_engine(world: World, case: Case, tokens: Tensor) -> tuple[list[Any], Any, float]:
    """What this rank holds of the random weights; the logits and the held-out loss of `tokens`."""
    with engine_of(case, world) as engine:
        engine.read(RandomWeights(case.model, STD), {"optimizer_steps": 0, "loss_scaler": {}})
        engine.refresh()
        logits = engine.logits(tokens[:, :-1])
        loss = engine.evaluate([(tokens, torch.ones(len(tokens)))]).loss
        return held(engine), logits.numpy(), loss


def in_inference_engine(world: World, case: Case, tokens: Tensor) -> Any:
    engine = InferenceEngine(case.model, case.train_config, case.layout, world)
    try:
        engine.load_weights(RandomWeights(case.model, STD))
        return engine.logits(tokens).numpy()
    finally:
        engine.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ORACLE_MODELS)
def test_logits_equal_those_of_transformers(pool: RankPool, name: str, layout: str) -> None:
    model = ORACLE_MODELS[name]
    world_size, parallel = LAYOUTS[layout]
    tokens = text(model.sequence_length + 1)[:4]
    answers = pool.run(in_engine, world_size, Case(model, world_size, parallel), tokens)
    expected = oracle_logits(model, assemble([held for held, _, _ in answers]), tokens[:, :-1])
    assert expected.std() > 0.1, "logits that are all alike would prove nothing"
    loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten()).item()
    for _, logits, evaluated in answers:
        assert (torch.from_numpy(logits) - expected).abs().max() <= BOUND
        assert evaluated == pytest.approx(loss, rel=BOUND)


@pytest.mark.parametrize("layout", ("one rank", "TP2+SP", "PP2"))
@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_documents_kept_apart_equal_those_of_transformers(pool: RankPool, name: str, layout: str) -> None:
    """In logits, in the held-out loss and in the loss trained on."""
    model = ORACLE_MODELS[name]
    world_size, parallel = LAYOUTS[layout]
    tokens = text(model.sequence_length + 1)[:8]
    case = Case(model, world_size, parallel, end_of_text=NEWLINE)
    answers = pool.run(in_engine, world_size, case, tokens)
    weights = assemble([held for held, _, _ in answers])
    expected = oracle_logits(model, weights, tokens[:, :-1], **documents_apart(tokens[:, :-1]))
    assert (expected - oracle_logits(model, weights, tokens[:, :-1])).abs().max() > 0.1, "it makes a difference"
    loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten()).item()
    for _, logits, evaluated in answers:
        assert (torch.from_numpy(logits) - expected).abs().max() <= BOUND
        assert evaluated == pytest.approx(loss, rel=BOUND)
    for trained in pool.run(first_loss, world_size, case):
        assert trained == pytest.approx(loss, rel=BOUND)


def first_loss(world: World, case: Case) -> float:
    """The loss that the first step trains on, of random weights."""
    with engine_of(case, world) as engine:
        engine.read(RandomWeights(case.model, STD), {"optimizer_steps": 0, "loss_scaler": {}})
        engine.refresh()
        return engine.train_step(batch_of(case, world, step=1), 0.0, 1).loss


def documents_apart(tokens: Tensor) -> dict[str, Tensor]:
    """What transformers needs to keep lines apart: a mask added to the scores, and positions; counted one by one."""
    batch, length = tokens.shape
    mask = torch.full((batch, 1, length, length), torch.finfo(torch.float32).min)
    positions = torch.zeros(batch, length, dtype=torch.int64)
    for row, ids in enumerate(tokens.tolist()):
        first = 0
        for place in range(length):
            mask[row, 0, place, first : place + 1] = 0.0
            positions[row, place] = place - first
            if ids[place] == NEWLINE:
                first = place + 1
    return {"attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("layout", ("TP2+SP", "PP2"))
def test_an_engine_without_optimizer_gives_them_too(pool: RankPool, layout: str) -> None:
    model = ORACLE_MODELS["llama"]
    world_size, parallel = LAYOUTS[layout]
    tokens = text(model.sequence_length)[:2, :23]  # shorter than the context, and odd
    source = RandomWeights(model, STD)
    weights = {name: source.read(f"weight/{name}", Box.whole(shape)) for name, shape in logical_shapes(model).items()}
    expected = oracle_logits(model, weights, tokens)
    for logits in pool.run(in_inference_engine, world_size, Case(model, world_size, parallel), tokens):
        assert (torch.from_numpy(logits) - expected).abs().max() <= BOUND


@torch.no_grad()
def oracle_logits(model: ModelConfig, weights: dict[str, Tensor], tokens: Tensor, **inputs: Tensor) -> Tensor:
    """Logits of transformers' GPT-2 or Llama with our logical weights: fp32 [batch, length, vocab_size]."""
    network, state = (_gpt2 if model.position == "learned" else _llama)(model, weights)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    network.tie_weights()
    logits: Tensor = network.eval()(tokens, **inputs).logits
    return logits


def _gpt2(model: ModelConfig, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.sequence_length,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.ffn_size,
        activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[model.activation],
        layer_norm_epsilon=model.norm_epsilon,
        tie_word_embeddings=model.tie_embeddings,
    )
    names = {"input_norm": "ln_1", "mlp_norm": "ln_2", "attention.output": "attn.c_proj"}
    names |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    state = {
        "transformer.wte.weight": weights["embedding.word.weight"],
        "transformer.wpe.weight": weights["embedding.position.weight"],
        "transformer.ln_f.weight": weights["final_norm.weight"],
        "transformer.ln_f.bias": weights["final_norm.bias"],
    }
    if not model.tie_embeddings:
        state["lm_head.weight"] = weights["output.weight"]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            parts = {their: weights[f"{ours}.{our}.{kind}"] for our, their in names.items()}
            parts["attn.c_attn"] = torch.cat(_query_key_value(model, weights[f"{ours}.attention.qkv.{kind}"]))
            for their, tensor in parts.items():
                # GPT-2's linear weights in transformers are (inputs, outputs).
                is_linear = kind == "weight" and not their.startswith("ln_")
                state[f"{theirs}.{their}.{kind}"] = tensor.T if is_linear else tensor
    return transformers.GPT2LMHeadModel(config), state


def _llama(model: ModelConfig, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        max_position_embeddings=model.sequence_length,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        intermediate_size=model.ffn_size,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        tie_word_embeddings=model.tie_embeddings,
    )
    names = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"attention.output": "self_attn.o_proj", "mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj"}
    names |= {"mlp.down": "mlp.down_proj"}
    state = {
        "model.embed_tokens.weight": weights["embedding.word.weight"],
        "model.norm.weight": weights["final_norm.weight"],
    }
    if not model.tie_embeddings:
        state["lm_head.weight"] = weights["output.weight"]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for our, their in names.items():
            state[f"{theirs}.{their}.weight"] = weights[f"{ours}.{our}.weight"]
        split = _query_key_value(model, weights[f"{ours}.attention.qkv.weight"])
        for letter, tensor in zip("qkv", split, strict=True):
            state[f"{theirs}.self_attn.{letter}_proj.weight"] = tensor
    return transformers.LlamaForCausalLM(config), state


def _query_key_value(model: ModelConfig, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows grouped by kv head (its query heads, key, value) -> all queries, all keys, all values."""
    rest = qkv.shape[1:]
    queries = model.num_heads // model.kv_heads
    grouped = qkv.view(model.kv_heads, queries + 2, model.head_size, *rest)
    query, key, value = grouped.split([queries, 1, 1], dim=1)
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)
