from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

from mi2rage_engines import cuda as cuda_module
from mi2rage_engines.cuda import Cuda
from mi2rage_engines.errors import EngineError
from tests.engines.fake_gpu import Driver

BYTE, FLOAT = np.dtype(np.uint8), np.dtype(np.float32)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def cuda(driver: Driver) -> Cuda:
    return Cuda(driver)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 400)])
def test_there_and_back(cuda: Cuda, driver: Driver, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), dtype=np.float32)
    expected = array.copy()
    with cuda.turn():
        placed = cuda.put(array)
        array[...] = -1  # may change right after
        second = cuda.empty(shape, FLOAT)
        cuda.copy(second, placed)
        cuda.fill(placed, 0)
    assert (placed.shape, placed.dtype, placed.nbytes) == (shape, FLOAT, expected.nbytes)
    np.testing.assert_array_equal(second.numpy(), expected)
    np.testing.assert_array_equal(placed.numpy(), np.zeros_like(expected))
    assert driver.depth == 0 and not cuda._sources


def test_views_are_written_in_their_order(cuda: Cuda) -> None:
    for size in (4, 300):
        array = np.arange(size * size, dtype=np.float32).reshape(size, size).T
        with cuda.turn():
            placed = cuda.put(array)
        np.testing.assert_array_equal(placed.numpy(), array)


def test_host_copies_do_not_pile_up(cuda: Cuda) -> None:
    with cuda.turn():
        placed = cuda.empty((1,), FLOAT)
        for value in range(3000):
            cuda.write(placed, np.full(1, value, np.float32))
            assert len(cuda._sources) <= 1024
    assert placed.numpy() == 2999


def test_memory_is_given_back_and_used_again(cuda: Cuda, driver: Driver) -> None:
    with cuda.turn():
        first = cuda.empty((1000,), FLOAT).address
        for _ in range(20_000):  # more than there is, if none came back
            assert cuda.empty((1000,), FLOAT).address == first
    with cuda.turn(), pytest.raises(EngineError, match=r"memory is full.*smaller --batch-size"):
        cuda.empty((1 << 30,), BYTE)
    assert len(driver.sizes) <= 1 and driver.depth == 0


def test_the_scratch_memory_is_one_and_grows(cuda: Cuda) -> None:
    with cuda.turn():
        small = cuda.scratch(1000)
        assert cuda.scratch(10) is small
        large = cuda.scratch(5000)
        assert large is not small and large.nbytes == 5000 and cuda.scratch(1000) is large


def test_a_graph_records_and_launches(cuda: Cuda, driver: Driver) -> None:
    with cuda.turn():
        source, target = cuda.put(np.arange(4, dtype=np.float32)), cuda.put(np.zeros(4, np.float32))

        def work() -> None:
            cuda.copy(target, source)

        graph = cuda.capture(work)
        np.testing.assert_array_equal(target.numpy(), np.zeros(4))
        graph.launch()
        np.testing.assert_array_equal(target.numpy(), np.arange(4))
        cuda.write(source, np.ones(4, np.float32))
        graph.launch()
        np.testing.assert_array_equal(target.numpy(), np.ones(4))
        del graph
        cuda.synchronize()
    assert not driver.graphs


def test_garbage_of_a_capture_waits_for_its_end(cuda: Cuda, driver: Driver) -> None:
    holder = [cuda_array(cuda)]
    with cuda.turn():
        target = cuda.put(np.zeros(4, np.float32))

        def work() -> None:
            holder.clear()
            gc.collect()
            cuda.fill(target, 1)

        cuda.capture(work).launch()
        assert len(driver.sizes) == 2
        cuda.synchronize()
    assert len(driver.sizes) == 1


def cuda_array(cuda: Cuda) -> object:
    with cuda.turn():
        return cuda.put(np.zeros(1000, np.float32))


def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda: Cuda, driver: Driver) -> None:
    with cuda.turn():
        target = cuda.put(np.zeros(4, np.uint8))

        def work() -> None:
            cuda.fill(target, 1)
            cuda.synchronize()

        with pytest.raises(EngineError, match="CUDA_ERROR_900"):
            cuda.capture(work)
        driver.fail = {"cuGraphInstantiateWithFlags": 801}
        with pytest.raises(EngineError, match="cuGraphInstantiateWithFlags failed with CUDA_ERROR_801"):
            cuda.capture(lambda: cuda.fill(target, 1))
        cuda.fill(target, 3)
        np.testing.assert_array_equal(target.numpy(), np.full(4, 3))
    assert not driver.graphs and driver.recording is None


def test_marks_tell_the_time_between_them(cuda: Cuda, driver: Driver) -> None:
    with cuda.turn():
        target = cuda.put(np.zeros(4, np.float32))
        cuda.synchronize()
        before = cuda.mark()
        cuda.fill(target, 1)
        cuda.fill(target, 2)
        behind = cuda.mark()
    assert behind.ms_since(before) == pytest.approx(1.5)  # the first mark and two fills, half a millisecond each
    assert not driver.queue, "it waits for what it is asked about"
    del before, behind
    gc.collect()
    with cuda.turn():
        cuda.synchronize()
        assert not driver.events
        driver.fail = {"cuEventCreate": 2}
        with pytest.raises(EngineError, match="memory is full"):
            cuda.mark()


def test_drivers_that_refuse(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.fail = {"cuInit": 100}
    with pytest.raises(EngineError, match=r"cuInit failed with CUDA_ERROR_100 \(100\).*nvidia-smi"):
        Cuda(driver)

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(EngineError, match=r"CUDA: no driver .*give --backend ort-cpu"):
        cuda_module.Cuda()
