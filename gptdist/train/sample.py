"""Generated text: one token after the other, the same on every rank and for the same seed."""

from collections.abc import Sequence

import torch

from gptdist.comms import Comms
from gptdist.engine.engine import InferenceEngine
from gptdist.model.initial import keyed_seed


def generate(
    engine: InferenceEngine,
    comms: Comms,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    end_of_text: int | None = None,
) -> list[int]:
    """Ids that continue `prompt` (not empty); stops before `end_of_text`. `temperature` 0: always the likeliest.

    The draw of each position is keyed by (seed, position). Every rank must call it with the same arguments.
    """
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits = engine.next_token_logits(torch.tensor(tokens, dtype=torch.int64))
        # One rank draws: a last bit that differs between machines must not send ranks different ways.
        drawn = comms.broadcast(draw_token(logits, temperature, top_k, keyed_seed("sample", seed, len(tokens))))
        if drawn == end_of_text:
            break
        tokens.append(drawn)
    return tokens[len(prompt) :]


def draw_token(logits: torch.Tensor, temperature: float, top_k: int | None, seed: int) -> int:
    """One id from logits [vocab_size] fp32."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        threshold = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    generator = torch.Generator().manual_seed(seed)
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
