from __future__ import annotations

import threading

import pytest

from mi2rage_rt.prefetch import prefetch


def threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_items_come_in_order_though_the_first_takes_longest() -> None:
    later = threading.Event()

    def load(number: int) -> int:
        if number == 0:
            assert later.wait(10)  # the second is loaded while the first is waited for
        else:
            later.set()
        return number * number

    with prefetch(range(9), load, ahead=4, workers=2) as loaded:
        assert [(item.item, item.get()) for item in loaded] == [(number, number * number) for number in range(9)]
    assert threads() == 0


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_never_more_than_so_many_ahead(ahead: int) -> None:
    begun: list[int] = []

    def items() -> object:
        for number in range(20):
            begun.append(number)
            yield number

    with prefetch(items(), str, ahead=ahead, workers=2) as loaded:
        for place, item in enumerate(loaded):
            assert item.get() == str(place)
            assert len(begun) <= place + 1 + ahead


def test_an_error_belongs_to_its_item() -> None:
    def load(number: int) -> int:
        if number == 1:
            raise ValueError("one")
        return number

    found: list[object] = []
    with prefetch(range(4), load, ahead=2, workers=2) as loaded:
        for item in loaded:
            try:
                found.append(item.get())
            except ValueError as error:
                found.append(str(error))
    assert found == [0, "one", 2, 3]


def test_equal_items_near_each_other_are_loaded_once() -> None:
    calls: list[str] = []

    def load(name: str) -> list[str]:
        calls.append(name)
        return [name]

    with prefetch(["a", "a", "b", "a", "c", "d", "a"], load, ahead=2, workers=1) as loaded:
        found = [item.get() for item in loaded]
    assert [name for (name,) in found] == ["a", "a", "b", "a", "c", "d", "a"]
    assert found[0] is found[1] and found[0] is found[3] and found[3] is not found[6]
    assert calls == ["a", "b", "c", "d", "a"]


@pytest.mark.parametrize("cause", [KeyboardInterrupt, RuntimeError])
def test_leaving_early_drops_what_has_not_begun(cause: type[BaseException]) -> None:
    begun: list[int] = []
    first, go_on = threading.Event(), threading.Event()

    def load(number: int) -> int:
        begun.append(number)
        first.set()
        assert go_on.wait(10)
        return number

    with pytest.raises(cause), prefetch(range(100), load, ahead=50, workers=1) as loaded:
        next(loaded)
        assert first.wait(10)
        threading.Timer(0.05, go_on.set).start()  # the one that runs is waited for
        raise cause
    assert begun == [0]
    assert threads() == 0
