"""What is known of an architecture of Hugging Face's: its tensors' names, and how they lie.

Pure data. `architecture.py` chooses a dialect for a config, `tensors.py` follows it.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2"]

CLASSES: dict[str, str] = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# Names of the same formula: GELU's tanh approximation.
TANH_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


@dataclass(frozen=True)
class Dialect:
    """One architecture, with what its config leaves open. A bias it has not is zero in ours, and the reverse.

    `positions`: rows of its position embedding, of which ours are the first. `query_scale`: our queries are theirs
    times this, a power of two.
    """

    kind: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    positions: int
    query_scale: float = 1.0

    @property
    def names(self) -> "Names":
        return _NAMES.get(self.kind, _LLAMA)


@dataclass(frozen=True)
class Names:
    """Theirs for ours. `layer` holds those of a layer, by our module; `qkv` are three, or one that holds all three.

    `transposed`: linear weights are (inputs, outputs). `grouped`: the one holds, as ours, each head's query, key and
    value in turn; else all queries, all keys, all values. `base` may be missing from the front of every name but the
    output's.
    """

    base: str
    word: str
    position: str | None
    final_norm: str
    output: str
    layers: str
    layer: dict[str, str]
    qkv: tuple[str, ...]
    transposed: bool = False
    grouped: bool = False
    ignored: tuple[str, ...] = ()  # endings of tensors that hold nothing trained


_CLASSIC_MLP = {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj", "input_norm": "ln_1", "mlp_norm": "ln_2"}
_LLAMA = Names(
    base="model.",
    word="embed_tokens",
    position=None,
    final_norm="norm",
    output="lm_head",
    layers="layers",
    layer={
        "input_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.output": "self_attn.o_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.down": "mlp.down_proj",
    },
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ignored=("rotary_emb.inv_freq",),
)
_NAMES = {
    "gpt2": Names(
        base="transformer.",
        word="wte",
        position="wpe",
        final_norm="ln_f",
        output="lm_head",
        layers="h",
        layer={**_CLASSIC_MLP, "attention.output": "attn.c_proj"},
        qkv=("attn.c_attn",),
        transposed=True,
        ignored=("attn.bias", "attn.masked_bias"),
    ),
    "gpt_neo": Names(
        base="transformer.",
        word="wte",
        position="wpe",
        final_norm="ln_f",
        output="lm_head",
        layers="h",
        layer={**_CLASSIC_MLP, "attention.output": "attn.attention.out_proj"},
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        ignored=("attn.attention.bias", "attn.attention.masked_bias"),
    ),
    "gpt_neox": Names(
        base="gpt_neox.",
        word="embed_in",
        position=None,
        final_norm="final_layer_norm",
        output="embed_out",  # transformers 5 calls it lm_head inside, not in files
        layers="layers",
        layer={
            "input_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "attention.output": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        qkv=("attention.query_key_value",),
        grouped=True,
        ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    ),
}
