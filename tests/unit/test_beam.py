"""Beam search against looking at every text there is."""

import itertools

import pytest
import torch
from torch import Tensor

from gptdist.model.beam import BeamSearch, BeamSettings, Continued, as_rows

VOCABULARY, TOKENS, END = 5, 4, 4


def model(ids: tuple[int, ...], seed: int) -> Tensor:
    """Log-probabilities after `ids`, of a random model: another table for every text."""
    generator = torch.Generator().manual_seed(hash((seed, ids)) % 2**31)
    return torch.log_softmax(2 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64), dim=0)


def search(settings: BeamSettings, seed: int, end: int | None = None, tokens: int = TOKENS) -> BeamSearch:
    found = BeamSearch(settings, tokens, end)
    texts: list[tuple[int, ...]] = [()]
    while True:
        going_on = found.step(torch.stack([model(ids, seed) for ids in texts]))
        if not going_on:
            return found
        rows, ids = as_rows(going_on)
        texts = [(*texts[row], int(new)) for row, new in zip(rows.tolist(), ids[:, 0].tolist(), strict=True)]
        assert texts == [beam.ids for beam in found.beams], "the engine's rows are the search's beams"
        assert len(set(texts)) == len(texts), "no two beams are the same text"


def every_text(seed: int, end: int | None) -> list[Continued]:
    """All that may come out: of TOKENS tokens, or ended earlier."""
    found = []
    for length in range(1, TOKENS + 1):
        for ids in itertools.product(range(VOCABULARY), repeat=length):
            ended = ids[-1] == end
            if (length < TOKENS and not ended) or end in ids[:-1]:
                continue
            total = sum(float(model(ids[:place], seed)[ids[place]]) for place in range(length))
            found.append(Continued(ids[:-1] if ended else ids, total, ended))
    return found


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_search_wide_enough_finds_the_best_of_all_texts(seed: int, penalty: float, end: int | None) -> None:
    best = max(every_text(seed, end), key=lambda text: text.score(penalty))
    found = search(BeamSettings(VOCABULARY**TOKENS, penalty), seed, end).best()
    assert found.ids == best.ids and found.ended == best.ended
    assert found.log_probability == pytest.approx(best.log_probability)


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_is_greedy(seed: int) -> None:
    ids: tuple[int, ...] = ()
    for _ in range(TOKENS):
        ids = (*ids, int(model(ids, seed).argmax()))
    assert search(BeamSettings(1), seed).best().ids == ids


def test_more_beams_find_better_texts() -> None:
    greedy, wide = (
        sum(search(BeamSettings(width, 0.0), seed).best().log_probability for seed in range(20)) for width in (1, 4)
    )
    assert wide > greedy + 1


def test_the_score_is_the_log_probability_over_a_power_of_the_length() -> None:
    assert Continued((1, 2, 3), -6.0).score(1.0) == -2.0
    assert Continued((1, 2, 3), -6.0, ended=True).score(1.0) == -1.5  # the end counts as a token
    assert Continued((1, 2, 3), -6.0).score(0.0) == -6.0
    assert Continued((1, 2, 3), -6.0).score(2.0) == pytest.approx(-6 / 9)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_repeated_where_that_is_asked_for(seed: int, size: int) -> None:
    found = search(BeamSettings(3, no_repeat=size), seed, tokens=9 if size == 2 else VOCABULARY).best().ids
    runs = [found[place : place + size] for place in range(len(found) - size + 1)]
    assert len(runs) > 3 and len(set(runs)) == len(runs)


def test_a_search_that_can_only_repeat_ends() -> None:
    found = search(BeamSettings(3, no_repeat=1), 0, tokens=50)
    assert not found.beams or len(found.best().ids) <= VOCABULARY
