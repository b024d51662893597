"""The search for a batch, on made-up seconds and bytes: no test here looks at a clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mi2rage_engines.errors import EngineError, InputError
from mi2rage_rt.batch_search import BatchSearch


class Work:
    """Takes `fixed` seconds and `each` a row, and as many bytes; fails above `largest` rows."""

    def __init__(self, fixed: float, each: float, largest: int = 1000) -> None:
        self.fixed, self.each, self.largest = fixed, each, largest
        self.calls: list[int] = []

    def __call__(self, rows: int) -> float:
        self.calls.append(rows)
        if rows > self.largest:
            raise EngineError(f"{rows} rows: out of memory")
        return self.fixed + self.each * rows

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return int(self.fixed + self.each * self.calls[-1])

    def limit_bytes(self) -> int:
        return 1000


def search(work: Work, least_row_bytes: int = 1) -> BatchSearch:
    return BatchSearch(work, work, least_row_bytes)


# Doubling gains (2 f + 2 e n) / (f + 2 e n): 12.5% from 1 to 2 at f = 1/3 e, and 3% where 2 e n = 32.3 f.
@pytest.mark.parametrize(
    ("fixed", "most", "expected"),
    [(0.0, 64, 1), (1 / 3, 64, 8), (10.0, 64, 64), (10.0, 48, 32), (10.0, 1, 1), (10.0, 3, 2)],
)
def test_a_batch_grows_while_it_pays(fixed: float, most: int, expected: int) -> None:
    assert search(Work(fixed, 1.0)).fastest(most) == expected


def test_what_was_measured_is_not_measured_again() -> None:
    work = Work(10.0, 1.0)
    searching = search(work)
    assert searching.fastest(4) == 4
    assert work.calls == [2, 2, 1, 1, 4, 4]  # each once to warm up
    work.calls.clear()
    assert searching.fastest(2) == 2
    assert searching.fastest(8) == 8
    assert work.calls == [8, 8]


def test_a_batch_that_cannot_be_run_ends_the_search() -> None:
    work = Work(10.0, 1.0, largest=5)
    assert search(work).fastest(64) == 4
    assert max(work.calls) == 8
    with pytest.raises(EngineError, match="1 rows: out of memory"):
        search(Work(10.0, 1.0, largest=0)).fastest(64)


def test_rows_within_a_limit_of_memory() -> None:
    work = Work(100.0, 50.0)
    searching = search(work)
    assert [searching.within(limit) for limit in (150, 199, 200, 400)] == [1, 1, 2, 6]
    assert searching.within() == 16  # 90% of 1000
    assert work.calls == [1, 2]
    with pytest.raises(InputError, match=r"one row takes 1\.5e-07 GB in all.*raise the limit"):
        searching.within(149)


def test_rows_too_small_to_be_seen_are_counted_by_what_goes_in_and_out() -> None:
    assert search(Work(100.0, 0.0), least_row_bytes=30).within(190) == 4
