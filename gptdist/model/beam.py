"""Beam search over continuations, as pure bookkeeping: log-probabilities in, beams to go on with out.

Knows no engine: whoever drives it reads the beams and hands in what the model says of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BeamSettings:
    """`width` beams; `length_penalty` and `no_repeat` as `BeamSearch` describes them."""

    width: int = 4
    length_penalty: float = 1.0
    no_repeat: int = 0


@dataclass(frozen=True)
class Continued:
    """A continuation, and the sum of its tokens' log-probabilities."""

    ids: tuple[int, ...]
    log_probability: float
    ended: bool = False  # by the end-of-text token, which counts as a token but is not among `ids`

    def score(self, length_penalty: float) -> float:
        """Log-probability / (number of tokens) ** length_penalty: 0 prefers short texts, 1 takes the mean."""
        return self.log_probability / max(1, len(self.ids) + self.ended) ** length_penalty


class BeamSearch:
    """The best continuation of at most `max_tokens` tokens, among those that stay in the `width` likeliest.

    In each step the `width` likeliest prolongations of the beams go on; those that end with `end_of_text` are set aside
    as finished. Ends when no beam can still beat the best finished one: log-probabilities only fall, so that none can
    score more than what it has now, divided by the longest length's penalty. `no_repeat` n > 0: a beam in which
    n tokens in a row would stand a second time is not prolonged that way (the prompt does not count). No two beams are
    the same text.
    """

    def __init__(self, settings: BeamSettings, max_tokens: int, end_of_text: int | None = None) -> None:
        self.settings = settings
        self.max_tokens = max_tokens
        self.end_of_text = end_of_text
        self.beams = [Continued((), 0.0)]
        self.finished: list[Continued] = []

    def step(self, log_probabilities: Tensor) -> list[tuple[int, int]]:
        """Prolong every beam; `log_probabilities`: fp64 [beams, vocab_size]. Returns (which beam before, new id) of
        each beam that there is now; none: the search is over."""
        totals = log_probabilities.clone()
        for row, beam in enumerate(self.beams):
            totals[row, list(self._repeating(beam.ids))] = float("-inf")
            totals[row] += beam.log_probability
        vocabulary = totals.shape[1]
        # Each beam can end in one way only, so this many hold `width` that go on.
        wanted = min(2 * self.settings.width, totals.numel())
        values, places = totals.flatten().topk(wanted)
        going_on: list[tuple[int, int]] = []
        beams: list[Continued] = []
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            row, index = divmod(place, vocabulary)
            if value == float("-inf") or len(beams) == self.settings.width:
                break
            if index == self.end_of_text:
                self.finished.append(Continued(self.beams[row].ids, value, ended=True))
            else:
                beams.append(Continued((*self.beams[row].ids, index), value))
                going_on.append((row, index))
        self.beams = beams
        return [] if self._is_over() else going_on

    def best(self) -> Continued:
        """The one with the best score, finished or not."""
        return max((*self.finished, *self.beams), key=self._score)

    def _score(self, text: Continued) -> float:
        return text.score(self.settings.length_penalty)

    def _is_over(self) -> bool:
        if not self.beams or len(self.beams[0].ids) >= self.max_tokens:
            return True
        if not self.finished:
            return False
        longest = max(1, self.max_tokens) ** self.settings.length_penalty
        shortest = (len(self.beams[0].ids) + 1) ** self.settings.length_penalty
        reachable = max(beam.log_probability for beam in self.beams) / max(longest, shortest)
        return reachable <= max(map(self._score, self.finished))

    def _repeating(self, ids: tuple[int, ...]) -> set[int]:
        """Tokens after which the last `no_repeat` ones would stand in `ids` a second time."""
        size = self.settings.no_repeat
        if not size or len(ids) < size:
            return set()
        start = ids[len(ids) - size + 1 :]
        return {ids[at + size - 1] for at in range(len(ids) - size + 1) if ids[at : at + size - 1] == start}


def as_rows(going_on: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Which beam each goes on from, [beams], and its new id, [beams, 1]."""
    pairs = torch.tensor(going_on, dtype=torch.int64)
    return pairs[:, 0], pairs[:, 1:]
