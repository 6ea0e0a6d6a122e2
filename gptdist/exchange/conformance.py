"""What proves an export: the same tokens through our model and through another, and how near the logits must be.

Pure numpy: which tokens, which positions, and the comparison. Who computes is elsewhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CARD = "conformance.json"
BOUND = 1e-5
RULE = (
    "the largest difference of a logit, both models computing in fp32 with the exported weights, is at most "
    f"{BOUND:g} x max(1, the largest logit's absolute value)"
)
_LARGEST_LOGITS = 1 << 28  # numbers a probe's forward pass may make
_LARGEST_KEPT = 1 << 25  # numbers kept of them
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Probe:
    """Tokens to compute with. `kind`: text, or random ids."""

    kind: str
    tokens: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """How two models' logits of some positions compare."""

    positions: int
    max_difference: float
    max_logit: float
    greedy_agreement: float  # share of positions with the same likeliest token

    @property
    def bound(self) -> float:
        return BOUND * max(1.0, self.max_logit)

    @property
    def holds(self) -> bool:
        """NaN is not within any bound."""
        return self.max_difference <= self.bound


def probe_lengths(sequence_length: int, vocab_size: int) -> list[int]:
    """Lengths up to the whole context, or to what keeps one probe's logits within 1 GiB."""
    longest = min(sequence_length, max(1, _LARGEST_LOGITS // vocab_size))
    return sorted({min(length, longest) for length in (1, 5, 33, longest // 2, longest) if length})


def random_probes(lengths: Iterable[int], vocab_size: int, seed: int) -> list[Probe]:
    """Ids drawn evenly from the vocabulary; the last id is among them."""
    generator = np.random.default_rng(seed)
    probes = []
    for length in lengths:
        tokens = generator.integers(0, vocab_size, length)
        tokens[-1] = vocab_size - 1
        probes.append(Probe("random", tokens))
    return probes


def kept_positions(length: int, vocab_size: int) -> np.ndarray:
    """Which positions' logits to keep: all, or evenly many with the last among them."""
    count = min(length, max(1, _LARGEST_KEPT // vocab_size))
    return length - 1 - np.arange(count)[::-1] * (length // count)


def compare(ours: np.ndarray, theirs: np.ndarray) -> Agreement:
    """Logits [positions, vocabulary] of two models."""
    if ours.shape != theirs.shape:
        raise ValueError(f"logits of shape {ours.shape} and {theirs.shape}")
    rows = max(1, _BLOCK // ours.shape[1])
    parts = [_compare(ours[row : row + rows], theirs[row : row + rows]) for row in range(0, len(ours), rows)]
    return together(parts)


def together(parts: Sequence[Agreement]) -> Agreement:
    """Of several sets of positions."""
    positions = sum(part.positions for part in parts)
    same = sum(part.greedy_agreement * part.positions for part in parts)
    return Agreement(
        positions,
        float(np.max([part.max_difference for part in parts])),  # numpy's, of NaN, is NaN
        float(np.max([part.max_logit for part in parts])),
        same / positions,
    )


def _compare(ours: np.ndarray, theirs: np.ndarray) -> Agreement:
    with np.errstate(invalid="ignore"):
        difference = np.abs(ours - theirs).max()
    same = float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))
    return Agreement(len(ours), float(difference), float(np.abs(ours).max()), same)
