"""What follows a failure, over histories of attempts."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.ranks.rules import REQUEUE, RESTART, STOP, Decision, Failure, decide, restarts_without_progress
from launch.runs.attempts import Attempt

KILLED = Failure("rank 1 was killed", culprits=("node2",))


def attempt(start: int = 0, last: int | None = None, saved: int | None = None, **fields: object) -> Attempt:
    """One that failed and was followed by another without anybody's doing."""
    values: dict[str, object] = {"ended": 2.0, "failed": True, "exit_code": 1, "action": RESTART, **fields}
    return Attempt("slurm 7", 0, 0, ("node1", "node2"), 4, 1.0, start, last_step=last, saved_step=saved, **values)  # type: ignore[arg-type]


def asked(attempts: list[Attempt], failure: Failure = KILLED, restart: bool = True, requeue: bool = True) -> Decision:
    return decide(attempts, failure, can_restart=restart, can_requeue=requeue)


def test_healthy_nodes_start_again_in_place() -> None:
    assert asked([attempt(last=5)]) == Decision(RESTART, 1)
    assert asked([attempt(last=5)], requeue=False).action == RESTART


def test_where_nothing_ever_worked_nothing_is_tried_again() -> None:
    assert asked([attempt()]) == Decision(STOP, 1)
    assert asked([attempt(last=5), attempt(start=0)]).action == RESTART


def test_steps_of_an_attempt_that_was_killed_without_a_word_are_steps_too() -> None:
    silent = attempt(ended=None, failed=False, exit_code=None, action=None)
    assert asked([silent, attempt()]) == Decision(STOP, 1)
    assert asked([silent, attempt(start=40)]).action == RESTART, "the first one had saved step 40"
    assert asked([attempt(saved=40, action=REQUEUE), attempt(start=40)]).action == RESTART
    assert asked([attempt(start=40, saved=40)]) == Decision(STOP, 1), "it only began there"


@pytest.mark.parametrize("code", [1, 2, 93])
def test_what_gptdist_decided_is_not_tried_again(code: int) -> None:
    failure = Failure("the loss was not finite", code, deliberate=True)
    for history in ([attempt(last=5)], [attempt(last=5)] * 5):
        assert asked(history, failure) == Decision(STOP, code)


def test_a_lost_node_is_left_out() -> None:
    lost = Failure("lost node2", culprits=("node2",), node_lost=True)
    for history in ([attempt(last=5)], [attempt()]):
        assert asked(history, lost) == Decision(REQUEUE, 75, ("node2",))
        assert asked(history, lost, requeue=False) == Decision(STOP, 75, ("node2",))


def test_an_unfit_node_is_left_out_though_nothing_ever_worked() -> None:
    unfit = Failure("node2 cannot take part", culprits=("node2",), unfit=True)
    for history in ([attempt(last=5)], [attempt()]):
        assert asked(history, unfit) == Decision(REQUEUE, 75, ("node2",))
        assert asked(history, unfit, requeue=False) == Decision(STOP, 1)
    assert asked([attempt()] * 5, unfit).exit_code == 93, "not for ever"


def test_a_node_at_fault_twice_in_one_allocation_is_left_out() -> None:
    before = attempt(last=5, saved=4, culprits=("node2",))
    again = attempt(start=4, last=9, saved=8, culprits=("node2",))
    decision = asked([before, again])
    assert (decision.action, decision.exit_code, decision.exclude) == (REQUEUE, 75, ("node2",))
    assert "node2 failed twice" in decision.why
    assert asked([before, again], requeue=False).action == RESTART
    assert asked([dataclasses.replace(before, restart=1), again]).action == RESTART, "in another allocation"
    assert asked([dataclasses.replace(before, culprits=("node1",)), again]).action == RESTART, "another node"


def test_a_failure_while_stopping_is_no_reason_to_start_here() -> None:
    failure = dataclasses.replace(KILLED, stopping=True)
    assert asked([attempt(last=5)], failure) == Decision(REQUEUE, 75)
    assert asked([attempt(last=5)], failure, requeue=False) == Decision(STOP, 1)


def test_allocations_too_short_for_a_step_are_not_asked_for_for_ever() -> None:
    failure = dataclasses.replace(KILLED, stopping=True)
    stopped = attempt(start=10, failed=False, exit_code=75, action=REQUEUE)
    now = dataclasses.replace(stopped, action=None, exit_code=None)
    assert asked([*[stopped] * 8, now], failure) == Decision(REQUEUE, 75)
    decision = asked([attempt(last=15, saved=10), *[stopped] * 9, now], failure)
    assert (decision.action, decision.exit_code) == (STOP, 93)
    assert "10 allocations in a row" in decision.why
    with_a_step = dataclasses.replace(stopped, last_step=11, saved_step=11)
    assert asked([*[stopped] * 8, with_a_step, now], failure) == Decision(REQUEUE, 75)
    by_hand = dataclasses.replace(stopped, action=STOP)
    assert asked([*[stopped] * 8, by_hand, now], failure) == Decision(REQUEUE, 75)


def test_no_restart_where_the_config_forbids_it() -> None:
    assert asked([attempt(last=5)], restart=False) == Decision(STOP, 1)


def test_three_restarts_without_progress_are_the_end() -> None:
    first = attempt(last=15, saved=10)
    stuck = attempt(start=10, last=15, saved=10)
    for count in range(3):
        history = [first, *[stuck] * count]
        assert restarts_without_progress(history) == count
        assert asked(history).action == RESTART
    decision = asked([first, stuck, stuck, stuck])
    assert (decision.action, decision.exit_code) == (STOP, 93)
    assert "saved no step after 10" in decision.why
    lost = Failure("lost node2", culprits=("node2",), node_lost=True)
    assert asked([first, stuck, stuck, stuck], lost).exit_code == 93, "across allocations too"


def test_progress_is_what_counts_not_restarts() -> None:
    history = [attempt(start=10 * number, last=10 * number + 15, saved=10 * number + 10) for number in range(50)]
    assert restarts_without_progress(history) == 0
    assert asked(history).action == RESTART


def test_killed_without_a_word_counts_as_a_failure() -> None:
    silent = attempt(start=10, ended=None, failed=False, exit_code=None, action=None)
    assert restarts_without_progress([attempt(last=15, saved=10), silent, silent, silent]) == 3
    further = dataclasses.replace(silent, start_step=20)
    history = [attempt(last=15, saved=10), silent, silent, further]
    assert restarts_without_progress(history) == 1, "the one before it had saved step 20"


def test_a_wished_stop_neither_counts_nor_hides() -> None:
    first, stuck = attempt(last=15, saved=10), attempt(start=10, last=15, saved=10)
    stopped = attempt(start=10, last=12, saved=10, failed=False, exit_code=75, action=REQUEUE)
    assert restarts_without_progress([first, stuck, stopped, stuck]) == 2


def test_whoever_starts_it_by_hand_has_seen_why_it_stopped() -> None:
    first, stuck = attempt(last=15, saved=10), attempt(start=10, last=15, saved=10)
    given_up = dataclasses.replace(stuck, action=STOP, exit_code=93)
    assert restarts_without_progress([first, stuck, stuck, given_up]) == 3
    assert restarts_without_progress([first, stuck, stuck, given_up, stuck]) == 0
    assert asked([first, stuck, stuck, given_up, stuck]).action == RESTART


steps = st.integers(0, 40)


@given(
    st.lists(st.tuples(steps, steps, st.booleans(), st.sampled_from([RESTART, REQUEUE, STOP, None])), max_size=12),
    st.tuples(*[st.booleans()] * 6),
)
def test_every_history_has_an_answer(rows: list[tuple[int, int, bool, str | None]], flags: tuple[bool, ...]) -> None:
    restart, requeue, lost, deliberate, stopping, unfit = flags
    history = [
        attempt(a, a + b, a + b if b % 3 else None, failed=failed, action=action) for a, b, failed, action in rows
    ]
    failure = Failure("x", 1, ("node1",), lost, deliberate, stopping, unfit)
    decision = asked([*history, attempt(last=1)], failure, restart, requeue)
    assert decision.exit_code != 0
    assert decision.action != RESTART or (restart and not (lost or deliberate or stopping or unfit))
    assert decision.action != REQUEUE or (requeue and decision.exit_code == 75)
