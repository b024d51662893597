from __future__ import annotations

import math

import pytest

from mi2rage_engines.errors import InputError
from mi2rage_rt.batch_queue import BatchOptions, BatchQueue, Ticket


def queue_of(*tickets: Ticket[str], max_batch: int = 8, max_wait_ms: float = 5000) -> BatchQueue[str]:
    queue: BatchQueue[str] = BatchQueue(BatchOptions(max_batch, max_wait_ms))
    for ticket in tickets:
        queue.add(ticket)
    return queue


def ticket(item: str, key: str = "k", arrived_s: float = 0.0, deadline_s: float = math.inf) -> Ticket[str]:
    return Ticket(item, key, arrived_s, deadline_s)


def items(batch: list[Ticket[str]]) -> str:
    return "".join(one.item for one in batch)


def test_batches_are_of_one_key_the_oldest_first() -> None:
    queue = queue_of(*(ticket(item, item.lower()) for item in "aBbAaab"), max_batch=3)
    assert len(queue) == 7
    assert [items(queue.pop_batch()) for _ in range(3)] == ["aAa", "Bbb", "a"]
    assert len(queue) == 0 and queue.due_s(0) is None


def test_a_lone_client_never_waits() -> None:
    queue = queue_of()
    for now_s in (1.0, 2.0, 3.0):
        queue.add(ticket("a", arrived_s=now_s))
        assert queue.due_s(idle_since_s=0.5) == now_s
        queue.pop_batch()


def test_a_batch_waits_for_as_many_as_came_lately() -> None:
    queue = queue_of(*map(ticket, "abc"))
    assert queue.due_s(0) == 0  # nothing is known yet: at once
    queue.pop_batch()
    queue.add(ticket("d", arrived_s=2))
    assert queue.due_s(idle_since_s=1) == 7  # from the arrival
    assert queue.due_s(idle_since_s=3) == 8  # or from when the worker was free
    queue.add(ticket("e", arrived_s=4))
    assert queue.due_s(idle_since_s=3) == 8
    queue.add(ticket("f", arrived_s=5))
    assert queue.due_s(idle_since_s=3) == 3
    assert items(queue.pop_batch()) == "def"


def test_waiting_in_vain_is_unlearnt_after_two_batches() -> None:
    queue = queue_of(*map(ticket, "abc"))
    queue.pop_batch()
    waits = []
    for _ in range(3):
        queue.add(ticket("a"))
        waits.append(queue.due_s(0))
        queue.pop_batch()
    assert waits == [5, 5, 0]


def test_a_full_batch_waits_for_nothing() -> None:
    queue = queue_of(*map(ticket, "ab"), max_batch=2)
    queue.pop_batch()
    queue.add(ticket("a"))
    assert queue.due_s(0) == 5
    queue.add(ticket("b"))
    assert queue.due_s(0) == 0


def test_nothing_is_waited_for_where_another_key_waits_or_one_would_be_late() -> None:
    queue = queue_of(*map(ticket, "abc"))
    queue.pop_batch()
    queue.add(ticket("a"))
    assert queue.due_s(0) == 5
    other = ticket("b", key="other")
    queue.add(other)
    assert queue.due_s(0) == 0
    assert queue.remove(other.key, other.number) and queue.due_s(0) == 5
    queue.add(ticket("c", deadline_s=4))
    assert queue.due_s(0) == 0


def test_late_requests_are_taken_out() -> None:
    queue = queue_of(ticket("a", deadline_s=3), ticket("b"), ticket("c", "other", deadline_s=2))
    assert queue.pop_late(1.9) == []
    assert items(queue.pop_late(2)) == "c"
    assert items(queue.pop_late(9)) == "a"
    assert queue.pop_late(1e9) == [] and len(queue) == 1


def test_a_request_is_removed_once() -> None:
    first, second = ticket("a"), ticket("b")
    queue = queue_of(first, second)
    assert queue.remove("k", first.number)
    assert not queue.remove("k", first.number) and not queue.remove("unknown", 0)
    assert items(queue.pop_all()) == "b" and len(queue) == 0
    assert not queue.remove("k", second.number)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch 0: expected 1 or more"),
        ({"max_queue": 0}, "max_queue 0: expected 1 or more"),
        ({"max_wait_ms": -1.0}, "max_wait_ms -1.0: expected 0 or more"),
        ({"max_wait_ms": math.inf}, "max_wait_ms inf"),
        ({"max_wait_ms": math.nan}, "max_wait_ms nan"),
    ],
)
def test_options_out_of_range(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchOptions(**wrong)  # type: ignore[arg-type]
