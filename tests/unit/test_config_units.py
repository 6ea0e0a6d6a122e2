"""Times and sizes with units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.config.units import BYTES_PER_UNIT, SECONDS_PER_UNIT, parse_bytes, parse_duration, parse_save_interval


@given(st.integers(1, 10**6), st.sampled_from(sorted(SECONDS_PER_UNIT)), st.sampled_from(["", " "]))
def test_every_time_unit(count: int, unit: str, space: str) -> None:
    assert parse_duration(f"{count}{space}{unit}") == count * SECONDS_PER_UNIT[unit]
    assert parse_duration(count) == float(count)


@given(st.integers(0, 10**6), st.sampled_from(sorted(BYTES_PER_UNIT)))
def test_every_size_unit(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * BYTES_PER_UNIT[unit]
    assert parse_bytes(count) == count


def test_fractions() -> None:
    assert parse_duration("1.5h") == 5400
    assert parse_bytes("0.5KiB") == 512


@pytest.mark.parametrize("bad", ["", "5", "m", "5 mm", "1e3s", "-1s", "5M", None, True, [], float("nan"), -1, 0])
def test_bad_times_raise_the_rule(bad: object) -> None:
    with pytest.raises(ValueError, match="must be a time such as"):
        parse_duration(bad)


@pytest.mark.parametrize("bad", ["", "5", "5gb", "-5GB", None, True, 1.5, -1])
def test_bad_sizes_raise_the_rule(bad: object) -> None:
    with pytest.raises(ValueError, match="must be a size such as"):
        parse_bytes(bad)


def test_save_intervals() -> None:
    assert [parse_save_interval(value) for value in (0, 500, "auto")] == [0, 500, "auto"]
    for bad in (-1, 2.5, True, "soon", "5", None):
        with pytest.raises(ValueError, match='a whole number of steps, at least 0, or "auto"'):
            parse_save_interval(bad)
