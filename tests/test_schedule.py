"""The bookkeeping of executors, without any worker."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schedule import STRAGGLER_MIN_S, Schedule


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_task_is_handed_out_once_and_in_order() -> None:
    schedule = Schedule(3, retries=1)
    assert [schedule.take() for _ in range(4)] == [0, 1, 2, None]
    assert all(schedule.answered(number) for number in (2, 0, 1))
    assert schedule.finished


def test_a_task_is_lost_after_its_last_try() -> None:
    schedule = Schedule(2, retries=2)
    assert schedule.take() == 0
    assert schedule.came_to_nothing(0) is None
    assert schedule.take() == 1
    for tries in (None, 3):
        assert schedule.take() == 0
        assert schedule.came_to_nothing(0) == tries
    assert not schedule.finished
    assert schedule.answered(1)
    assert schedule.finished


def test_a_straggler_goes_to_a_second_worker_and_the_first_answer_counts() -> None:
    clock = Clock()
    schedule = Schedule(3, retries=0, clock=clock)
    assert [schedule.take(), schedule.take(), schedule.take()] == [0, 1, 2]
    clock.now = 1.0
    assert schedule.answered(1)
    assert schedule.take() is None
    clock.now = STRAGGLER_MIN_S + 1
    assert schedule.take() == 0
    assert schedule.take() == 2
    assert schedule.take() is None
    assert schedule.answered(0)
    assert not schedule.answered(0)
    # a second worker that dies takes nothing with it while the first is still at work
    assert schedule.came_to_nothing(2) is None
    assert schedule.answered(2)
    assert schedule.finished


def test_without_a_finished_task_nothing_is_called_slow() -> None:
    clock = Clock()
    schedule = Schedule(1, retries=0, clock=clock)
    schedule.take()
    clock.now = 1e6
    assert schedule.take() is None


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data(), st.integers(0, 8), st.integers(1, 4), st.integers(0, 2))
def test_whatever_happens_each_task_is_answered_once_or_lost(data, count: int, workers: int, retries: int) -> None:
    clock = Clock()
    schedule = Schedule(count, retries=retries, clock=clock)
    flying: list[int] = []
    answers: list[int] = []
    lost: list[int] = []
    while not schedule.finished:
        while len(flying) < workers and (number := schedule.take()) is not None:
            flying.append(number)
        number = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        clock.now += data.draw(st.sampled_from([0.1, 5.0, 100.0]))
        if data.draw(st.booleans()):
            answers += [number] if schedule.answered(number) else []
        elif tries := schedule.came_to_nothing(number):
            assert tries == retries + 1
            lost.append(number)
    assert sorted(answers + lost) == list(range(count))
