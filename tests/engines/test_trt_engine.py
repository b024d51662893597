from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.cuda import Cuda, CudaArray
from mi2rage_engines.engine import HostArray
from mi2rage_engines.errors import BundleError, EngineError
from mi2rage_engines.plan import PLAN_SCHEMA_VERSION, PlanRecord, Present, record_path, request_for
from mi2rage_engines.profiles import profile_from_text
from mi2rage_engines.spec import GraphSpec, TensorSpec
from mi2rage_engines.trt_api import Device
from mi2rage_engines.trt_attest import Attestation
from mi2rage_engines.trt_build import BuildOptions
from mi2rage_engines.trt_engine import TrtEngine
from tests.engines.fake_gpu import Driver, Engine, module_parts
from tests.engines.trt_graphs import fake_api

WIDTH = 20_000  # a row of 80 kB: larger than what has a place of the engine's own
GRAPH = GraphSpec(
    file="g.onnx",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", WIDTH)),
        TensorSpec(name="unused", dtype="int64", shape=("batch",)),
        TensorSpec(name="scale", dtype="float32", shape=(1,)),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=("batch", WIDTH)),
        TensorSpec(name="count", dtype="int64", shape=("batch",)),
    ),
    opset=20,
)
HERE = Present("tensorrt", "11.4.0", "sm90", "a" * 64)
PROFILES = ("batch=1:2:4", "batch=1")

Open = Callable[..., TrtEngine]


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def cuda(driver: Driver) -> Cuda:
    return Cuda(driver)


@pytest.fixture
def fake(driver: Driver) -> Engine:
    return Engine(driver, [(1, 4), (1, 1)], WIDTH)


@pytest.fixture
def opened(tmp_path: Path, cuda: Cuda) -> Open:
    def make(fake: Engine | None, present: Present = HERE, cuda_graphs: bool = True, **parts: Any) -> TrtEngine:
        api = fake_api("11.4.0", **module_parts(fake, **parts))
        plan = tmp_path / "plans" / "sm90" / "generator-unet.plan"
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_bytes(b"a plan")
        options = BuildOptions(tuple(map(profile_from_text, PROFILES)), ("sm90",))
        record = PlanRecord(
            schema_version=PLAN_SCHEMA_VERSION,
            graph="generator/unet",
            request=request_for(api, Device("NVIDIA H100", "sm90"), GRAPH, "a" * 64, options),
            plan_sha256=hashlib.sha256(b"a plan").hexdigest(),
            plan_bytes=6,
            attestation=Attestation(
                source="network", asked="fp32", layers={}, heavy_layers={}, network_heavy_layers={}, share=1.0
            ),
            build_seconds=1.0,
            tool_versions={},
        )
        record_path(plan).write_text(record.model_dump_json())
        return TrtEngine(plan, GRAPH, api, cuda, present=present, cuda_graphs=cuda_graphs)

    return make


def inputs(batch: int = 2, scale: float = 2.0, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((batch, WIDTH)).astype(np.float32)
    return {"x": x, "unused": np.zeros(batch, np.int64), "scale": np.array([scale], np.float32)}


def check(outputs: dict[str, Any], given: dict[str, np.ndarray]) -> None:
    found = {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in outputs.items()}
    np.testing.assert_allclose(found["y"], given["x"] * given["scale"] + 1, rtol=1e-6)
    np.testing.assert_array_equal(found["count"], (given["x"] > 0).sum(1))


def test_runs_and_describes(opened: Open, fake: Engine) -> None:
    engine = opened(fake)
    for seed, batch in enumerate((2, 4, 2, 3)):
        given = inputs(batch, seed=seed)
        check(engine.run(given), given)
    assert engine.device == "cuda" and engine.name.endswith("generator-unet.plan")
    assert (engine.inputs, engine.outputs) == (GRAPH.inputs, GRAPH.outputs)


def test_the_narrowest_profile_that_fits_has_a_context_of_its_own(opened: Open, fake: Engine) -> None:
    engine = opened(fake, cuda_graphs=False)
    for batch in (1, 3, 1, 2):
        given = inputs(batch)
        check(engine.run(given), given)
    assert [profile for profile, _ in fake.runs] == [1, 0, 1, 0] and len(fake.contexts) == 2
    with pytest.raises(EngineError, match=r"axis batch of input x is 5, outside of 1 to 4.*wider --profile"):
        engine.run(inputs(5))


def loop(engine: TrtEngine, steps: int, batch: int = 2) -> np.ndarray:
    """Two buffers in turn, another scale each step, as a denoising loop has it."""
    given = inputs(batch)
    here, there = engine.put(given["x"], "x"), engine.put(np.zeros_like(given["x"]), "x")
    for step in range(steps):
        scale = engine.put(np.array([0.5 + step / 10], np.float32), "scale")
        engine.call({"x": here, "unused": given["unused"], "scale": scale}, {"y": there})
        here, there = there, here
    return here.numpy()


def expected_loop(steps: int, batch: int = 2) -> np.ndarray:
    x = inputs(batch)["x"]
    for step in range(steps):
        x = x * np.float32(0.5 + step / 10) + 1
    return x


def test_a_loop_is_recorded_and_gives_what_it_gives_without(opened: Open, fake: Engine, driver: Driver) -> None:
    plain = loop(opened(fake, cuda_graphs=False), 12)
    assert driver.launches == 0
    recorded = loop(opened(fake), 12)
    np.testing.assert_array_equal(recorded, plain)
    np.testing.assert_allclose(recorded, expected_loop(12), rtol=1e-5)
    assert driver.launches >= 8  # two recorded, each launched once to be checked, and from the fifth step on
    # Each graph has a context that nothing else changes.
    assert len(fake.contexts) == 4


def test_graphs_of_several_shapes_and_engines_do_not_mix(opened: Open, fake: Engine, driver: Driver) -> None:
    engine, other = opened(fake), opened(Engine(driver, [(1, 4), (1, 1)], WIDTH))
    for batch in (2, 3, 2, 1, 3, 4, 2):
        for each in (engine, other):
            np.testing.assert_allclose(loop(each, 7, batch), expected_loop(7, batch), rtol=1e-5)
    assert driver.launches > 20


def test_the_scratch_memory_is_shared_and_when_it_moves_old_graphs_are_not_replayed(
    opened: Open, fake: Engine, driver: Driver, cuda: Cuda
) -> None:
    engine = opened(fake)
    loop(engine, 8)
    with cuda.turn():
        first = cuda.scratch(0)
        assert cuda.scratch(16 * WIDTH) is first  # what the largest profile needs, from the start
        address = first.address
        large = cuda.scratch(32 * WIDTH)
        del first
        hold = cuda.put(np.full(4 * WIDTH, 5, np.float32))  # takes the place that the old one had
    assert hold.address == address != large.address
    np.testing.assert_allclose(loop(engine, 8), expected_loop(8), rtol=1e-5)
    np.testing.assert_array_equal(hold.numpy(), np.full(4 * WIDTH, 5))


def test_a_graph_that_gives_another_result_is_dropped_with_a_warning(
    opened: Open, fake: Engine, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    fake.replay_error = 0.5
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(loop(opened(fake), 12), expected_loop(12), rtol=1e-5)
    # One warning for each of the two buffers' turns, and no launch but those that were compared.
    assert [record.getMessage().count("its CUDA graph gives another y") for record in caplog.records] == [1, 1]
    assert driver.launches == 2


def test_what_cannot_be_recorded_goes_on_without(
    opened: Open, fake: Engine, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    fake.is_recordable = False
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(loop(opened(fake), 12), expected_loop(12), rtol=1e-5)
    assert "cannot be recorded" in caplog.text and driver.launches == 0 and driver.recording is None


def test_growing_inputs_record_nothing_and_keep_little(opened: Open, fake: Engine, driver: Driver) -> None:
    engine = opened(fake)
    held: list[Any] = []
    for _ in range(300):  # addresses that never come again
        given = inputs(1)
        held.append(engine.put(given["x"], "x"))
        check(engine.call({**given, "x": held[-1]}), given)
    assert len(engine._once) == 256 and not engine._graphs and not driver.launches
    for array in held[:40]:  # and some that do
        for _ in range(3):
            engine.call({**inputs(1), "x": array}, {"y": held[-1]})
    assert len(engine._graphs) == 16 and len(driver.graphs) <= 17


def test_rtx_records_itself(opened: Open, fake: Engine, driver: Driver) -> None:
    engine = opened(fake, CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE"))
    np.testing.assert_allclose(loop(engine, 8), expected_loop(8), rtol=1e-5)
    assert driver.launches == 0 and fake.config.cuda_graph_strategy == "WHOLE"


def test_marks_take_the_time_of_calls_that_return_before_their_work_is_done(
    opened: Open, fake: Engine, driver: Driver
) -> None:
    engine, given = opened(fake, cuda_graphs=False), inputs()
    engine.run(given)
    before = engine.mark()
    outputs = engine.call(given)
    behind = engine.mark()
    assert driver.queue, "the work is still to be done"
    assert behind.ms_since(before) > 0.5
    assert not driver.queue
    check(outputs, given)


def test_results_go_on_from_where_they_are(opened: Open, fake: Engine) -> None:
    engine, given = opened(fake), inputs()
    once = engine.call(given)
    twice = engine.call({**given, "x": once["y"]})
    check(once, given)
    np.testing.assert_allclose(twice["y"].numpy(), (given["x"] * 2 + 1) * 2 + 1, rtol=1e-5)
    assert isinstance(once["count"], CudaArray) and once["count"].shape == (2,)


def test_buffers_of_the_host_are_written_too(opened: Open, fake: Engine) -> None:
    given, buffer = inputs(), np.zeros((2, WIDTH), np.float32)
    outputs = opened(fake).call(given, {"y": HostArray(buffer)})
    np.testing.assert_allclose(buffer, given["x"] * 2 + 1, rtol=1e-6)
    assert outputs["y"].numpy() is buffer


def test_buffers_that_do_not_fit_are_refused(opened: Open, fake: Engine) -> None:
    engine, given = opened(fake), inputs()
    x, longer = engine.put(given["x"], "x"), engine.put(inputs(3)["x"], "x")
    for wrong in (longer, HostArray(np.zeros((2, WIDTH)))):
        with pytest.raises(EngineError, match="the buffer for output y is"):
            engine.call(given, {"y": wrong})
    with pytest.raises(EngineError, match="the buffer of output y is an input of the same call"):
        engine.call({**given, "x": x}, {"y": x})
    with pytest.raises(EngineError, match="has no input z"):
        engine.put(given["x"], "z")


def test_memory_stays_flat(opened: Open, fake: Engine, driver: Driver) -> None:
    engine, given = opened(fake), inputs()
    sizes = []
    for _ in range(200):
        engine.run(given)
        sizes.append(sum(driver.sizes.values()))
    assert max(sizes[10:]) == sizes[10] and len(engine._graphs) <= 16


def test_plans_that_do_not_belong_here(opened: Open, fake: Engine) -> None:
    with pytest.raises(BundleError, match="the GPU here is sm89"):
        opened(fake, Present("tensorrt", "11.4.0", "sm89", "a" * 64))
    with pytest.raises(EngineError, match=r"cannot load it \(no such GPU\).*another --backend"):
        opened(None)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda fake: fake.kinds.update(x="HALF"), "its tensor x is float16; expected float32"),
        (lambda fake: fake.kinds.update(x="FP8"), "its tensor x is FP8; expected float32"),
        (lambda fake: fake.kinds.pop("count"), "its tensor count is missing; expected int64"),
        (lambda fake: fake.kinds.update(more="FLOAT"), "its tensor more is float32; expected no such tensor"),
        (lambda fake: fake.locations.update(scale="HOST"), "reads the values of scale on the host"),
        (lambda fake: setattr(fake, "num_optimization_profiles", 1), "has 1 profiles; expected 2"),
    ],
)
def test_plans_that_are_not_what_the_bundle_says(
    opened: Open, fake: Engine, break_it: Callable[[Engine], None], words: str
) -> None:
    break_it(fake)
    with pytest.raises(EngineError, match=words):
        opened(fake)


def test_failures_while_running(opened: Open, fake: Engine) -> None:
    engine = opened(fake)
    fake.fails = True
    with pytest.raises(EngineError, match=r"tensorrt 11\.4\.0 failed; expected it to run; try a smaller batch"):
        engine.run(inputs())
    fake.fails = False
    check(engine.run(inputs()), inputs())
    fake.is_open = True
    with pytest.raises(EngineError, match="the shape of output count depends on the values"):
        engine.run(inputs(3))
