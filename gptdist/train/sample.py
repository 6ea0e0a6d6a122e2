"""Generated text: one token after the other, the same on every rank and for the same seed.

Joins what grows (the engine's decoding) and what chooses (sampling, beams). One rank chooses: a last bit that differs
between machines must not send ranks different ways. Every rank must make the same calls with the same arguments.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from gptdist.comms import Comms
from gptdist.engine.decoding import Decoding
from gptdist.engine.engine import InferenceEngine
from gptdist.model.beam import BeamSearch, BeamSettings, as_rows
from gptdist.model.sampling import Sampling, draw, log_probabilities


@dataclass(frozen=True)
class Token:
    """One token of a continuation, and what the model says of it before any sampling setting."""

    id: int
    log_probability: float | None = None  # natural; None where it was not asked for
    likeliest: tuple[tuple[int, float], ...] = ()  # ids and their log-probabilities, the likeliest first


def continue_text(
    engine: InferenceEngine,
    comms: Comms,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    *,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    likeliest: int | None = None,
) -> Generator[Token, None, None]:
    """Tokens that continue `prompt` (not empty), as they come; stops before `end_of_text`.

    The draw of each position is keyed by (seed, position). `vocab_size`: draw smaller ids only, where the tokenizer
    knows fewer than the model. `likeliest`: tell log-probabilities, also of so many tokens at each position.
    """
    decoding = Decoding(engine)
    unread = list(prompt)
    for position in range(len(prompt), len(prompt) + max_tokens):
        logits = decoding.read(torch.tensor([unread], dtype=torch.int64))[0, :vocab_size]
        token = _describe(logits, comms.broadcast(draw(logits, sampling, position)), likeliest)
        if token.id == end_of_text:
            return
        yield token
        unread = [token.id]


def generate(
    engine: InferenceEngine,
    comms: Comms,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
) -> list[int]:
    """The ids of `continue_text`, all at once."""
    tokens = continue_text(
        engine, comms, prompt, max_tokens, sampling or Sampling(), vocab_size=vocab_size, end_of_text=end_of_text
    )
    return [token.id for token in tokens]


def generate_by_beams(
    engine: InferenceEngine,
    comms: Comms,
    prompt: Sequence[int],
    max_tokens: int,
    beams: BeamSettings,
    *,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
) -> list[int]:
    """Ids of the best continuation of `prompt` (not empty) that a beam search finds."""
    decoding = Decoding(engine)
    search = BeamSearch(beams, max_tokens, end_of_text)
    logits = decoding.read(torch.tensor([list(prompt)], dtype=torch.int64))
    while True:
        chosen = search.step(log_probabilities(logits[:, :vocab_size])) if comms.is_first else None
        going_on = comms.broadcast(chosen)
        if not going_on:
            break
        rows, ids = as_rows(going_on)
        decoding.select(rows)
        logits = decoding.read(ids)
    return [int(index) for index in comms.broadcast(list(search.best().ids))]


def _describe(logits: torch.Tensor, index: int, likeliest: int | None) -> Token:
    if likeliest is None:
        return Token(index)
    told = log_probabilities(logits)
    values, ids = told.topk(min(likeliest, len(told)))
    return Token(index, float(told[index]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
