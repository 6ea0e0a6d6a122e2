"""The peer of the CPU benchmarks: a GPT of the same shape in plain PyTorch, as one would write it for one device.

Knows torch and a ModelConfig; must not know the engine it is compared with. Pre-norm blocks with biases, learned
positions, tanh GELU, tied embeddings: the classic GPT-2, and nothing else. It is meant to be fast: fused attention,
fused AdamW, biases inside the matrix products.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptdist.config.sections import ModelConfig, OptimizerConfig


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.hidden_size
        self.num_heads = model.num_heads
        self.attention_norm = nn.LayerNorm(width, model.norm_epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, model.norm_epsilon)
        self.up = nn.Linear(width, model.ffn_size)
        self.down = nn.Linear(model.ffn_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_output(context.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden)), approximate="tanh"))


class ReferenceGPT(nn.Module):
    """Tokens in, mean loss out. Raises ValueError for a model that is not the classic one."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        classic = {
            "norm": "layernorm",
            "position": "learned",
            "activation": "gelu_tanh",
            "bias": True,
            "tie_embeddings": True,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
        other = {name: getattr(model, name) for name, value in classic.items() if getattr(model, name) != value}
        if other or model.kv_heads != model.num_heads:
            raise ValueError(f"the reference is the classic GPT-2, without dropout; not {other or 'grouped heads'}")
        self.word = nn.Embedding(model.vocab_size, model.hidden_size)
        self.position = nn.Embedding(model.sequence_length, model.hidden_size)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.final_norm = nn.LayerNorm(model.hidden_size, model.norm_epsilon)
        self._draw_weights(model)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [batch, sequence + 1] int64 -> mean next-token loss, nats per token."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        hidden = self.word(inputs) + self.position(torch.arange(inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = F.linear(self.final_norm(hidden), self.word.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def _draw_weights(self, model: ModelConfig) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                residual = name.endswith(("attention_output.weight", "down.weight"))
                parameter.normal_(0.0, model.init_std / math.sqrt(2 * model.num_layers if residual else 1))


def build_adamw(network: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; matrices and embeddings are decayed, biases and norms are not."""
    parameters = list(network.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )
