"""What draws follow, checked against exact probabilities, and that they are keyed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptdist.errors import GptdistError
from gptdist.model.sampling import Sampling, draw, log_probabilities, probabilities

CHANCES = [0.4, 0.1, 0.25, 0.05, 0.2]
LOGITS = torch.tensor([math.log(chance) + 3.0 for chance in CHANCES])


def as_list(logits: Tensor, **fields: object) -> list[float]:
    return probabilities(logits, Sampling(**fields)).tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 1.0}, CHANCES),
        ({"temperature": 0.5}, [chance**2 / 0.275 for chance in CHANCES]),
        ({"temperature": 2.0}, [math.sqrt(chance) / sum(map(math.sqrt, CHANCES)) for chance in CHANCES]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0.4 / 0.65, 0, 0.25 / 0.65, 0, 0]),
        ({"temperature": 1.0, "top_k": 1}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, CHANCES),
        ({"temperature": 1.0, "top_p": 0.39}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.41}, [0.4 / 0.65, 0, 0.25 / 0.65, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.9}, [0.4 / 0.95, 0.1 / 0.95, 0.25 / 0.95, 0, 0.2 / 0.95]),
        ({"temperature": 1.0, "top_p": 1e-9}, [1, 0, 0, 0, 0]),
        # The nucleus is of what the top k leaves, at the temperature asked for.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.7}, [0.16 / 0.2225, 0, 0.0625 / 0.2225, 0, 0]),
        # Nothing overflows at the ends of the scale.
        ({"temperature": 1e-320}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e300}, [0.2] * 5),
    ],
)
def test_probabilities_are_the_exact_ones(fields: dict[str, object], expected: list[float]) -> None:
    assert as_list(LOGITS, **fields) == pytest.approx(expected, abs=1e-6)


def test_of_equals_the_smaller_ids_stay() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert as_list(logits, temperature=0.0) == [0, 1, 0, 0]
    assert as_list(logits, temperature=1.0, top_k=2) == pytest.approx([0, 0.5, 0.5, 0])
    assert as_list(logits, temperature=1.0, top_p=0.3) == pytest.approx([0, 0.5, 0.5, 0])


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    temperature=st.floats(0.01, 10),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.floats(0.001, 1.0),
)
def test_what_is_kept_is_the_smallest_set_that_reaches_p(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    values = torch.tensor(logits)
    found = probabilities(values, Sampling(temperature, top_k, top_p))
    assert float(found.sum()) == pytest.approx(1.0)
    kept = found > 0
    among = min(top_k or len(logits), len(logits))
    assert 1 <= int(kept.sum()) <= among
    all_of_k = probabilities(values, Sampling(temperature, top_k))
    covered = float(all_of_k[kept].sum())
    assert covered >= min(top_p, 1.0) - 1e-9
    assert covered - float(all_of_k[kept].min()) < top_p + 1e-9 or int(kept.sum()) == 1


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8)])
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    """Pearson's chi-square over 4,000 positions stays under its 99.99 % point; nothing of probability 0 is drawn."""
    count = 4000
    drawn = torch.bincount(torch.tensor([draw(LOGITS, sampling, place) for place in range(count)]), minlength=5)
    expected = probabilities(LOGITS, sampling) * count
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    assert float(((drawn - expected)[possible] ** 2 / expected[possible]).sum()) < 23.5


def test_a_draw_is_keyed_by_seed_and_position() -> None:
    def drawn(seed: int, first: int = 0) -> list[int]:
        return [draw(LOGITS, Sampling(1.0, seed=seed), first + place) for place in range(40)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1)[5:] == drawn(1, first=5)[:35]


def test_the_models_own_log_probabilities() -> None:
    assert log_probabilities(LOGITS).exp().tolist() == pytest.approx(CHANCES)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(wrong: float) -> None:
    with pytest.raises(GptdistError, match="not finite"):
        draw(torch.tensor([0.0, wrong]), Sampling(), 0)
