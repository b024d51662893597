"""The first layer that makes NaN or Inf is named, with its weights where they are the cause."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mi2rage_engines.errors import ParityError
from mi2rage_engines.spec import TensorSpec
from mi2rage_export.finite import NonFiniteError, demand_finite, find_non_finite
from mi2rage_export.graphs import NORMAL, Graph, Input, random_inputs

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.fc(x))


class Logarithm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x - x.abs())


class MinusInfinityMask(nn.Module):
    """-Inf goes in and out of layers on purpose; the answers are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.hide, self.fc = nn.Hardtanh(-float("inf"), 0.0), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.hide(torch.where(x > x.mean(-1, keepdim=True), 0.0, -float("inf")))
        return torch.softmax(self.fc(x) + mask, -1)


def graph_of(module: nn.Module) -> Graph:
    shape = ("batch", WIDTH)
    return Graph(
        name="test/graph",
        module=module.eval(),
        inputs=(Input("x", "float32", shape, NORMAL),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=shape),),
        reference=lambda x: (module(x),),
        traced={"batch": 2},
        checked=({"batch": 3},),
    )


def blocks(number: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(number)])


def samples(graph: Graph) -> list[dict[str, np.ndarray]]:
    return [random_inputs(graph, sizes, 0) for sizes in graph.checked]


def test_finite_graphs_pass() -> None:
    for module in (blocks(), MinusInfinityMask()):
        graph = graph_of(module)
        demand_finite(graph, samples(graph))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_a_broken_weight_is_named(value: float, word: str) -> None:
    graph = graph_of(blocks())
    with torch.no_grad():
        graph.module[1].fc.bias[2] = value  # type: ignore[index, union-attr]
    with pytest.raises(NonFiniteError) as caught:
        demand_finite(graph, samples(graph))
    message = str(caught.value)
    assert message.startswith(f"test/graph: its layer 1.fc (Linear) is the first to give {word}, in 3 of 18 values")
    assert "its weights bias hold NaN or Inf themselves; get the model again" in message
    assert isinstance(caught.value, ParityError)
    assert caught.value.found.weights == ("bias",)


def test_a_layer_without_broken_weights_is_named_for_what_it_computes() -> None:
    graph = graph_of(nn.Sequential(Block(), Logarithm(), Block()))
    found = find_non_finite(graph, samples(graph)[0])
    assert found is not None
    assert (found.layer, found.kind, found.weights) == ("1", "Logarithm", ())
    with pytest.raises(NonFiniteError, match="in float32, expected finite answers; its weights are finite"):
        demand_finite(graph, samples(graph))


def test_an_overflow_in_fp16_is_named_and_told_from_bad_weights() -> None:
    module = blocks()
    with torch.no_grad():
        module[1].fc.weight.mul_(1e5)  # type: ignore[operator, union-attr]
    graph = graph_of(module)
    demand_finite(graph, samples(graph))
    module.half()
    lowered = Graph(**{**vars(graph), "inputs": (Input("x", "float16", ("batch", WIDTH), NORMAL),)})
    with pytest.raises(NonFiniteError, match=r"its layer 1\.fc \(Linear\).* in float16, .* keep that layer in fp32"):
        demand_finite(lowered, [{"x": np.ones((1, WIDTH), np.float32)}, *samples(graph)])


def test_code_between_layers_is_blamed_on_the_module_it_stands_in() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) / torch.zeros(())

    found = find_non_finite(graph_of(nn.Sequential(Block(), Divides())), {"x": np.ones((1, WIDTH), np.float32)})
    assert found is not None
    assert (found.layer, found.what) == ("1", "Inf")


def test_broken_inputs_are_no_layers_fault() -> None:
    found = find_non_finite(graph_of(blocks()), {"x": np.full((1, WIDTH), np.nan, np.float32)})
    assert found is not None
    assert (found.layer, found.count, found.size) == ("", WIDTH, WIDTH)


def test_fp16_convolutions_on_the_cpu_answer_as_fp32_rounded() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, 3).half().eval()
    nn.init.ones_(module.weight)
    shape = ("batch", 3, 5, 5)
    graph = Graph(
        name="test/conv",
        module=module,
        inputs=(Input("x", "float16", shape, NORMAL),),
        outputs=(TensorSpec(name="y", dtype="float16", shape=("batch", 4, 3, 3)),),
        reference=lambda x: (module(x),),
        traced={"batch": 2},
        checked=({"batch": 3},),
    )
    demand_finite(graph, samples(graph))
    demand_finite(graph, [{"x": np.full((1, 3, 5, 5), 100, np.float32)}])
    with pytest.raises(NonFiniteError, match=r"its own code \(Conv2d\) is the first to give"):
        demand_finite(graph, [{"x": np.full((1, 3, 5, 5), 6.5e4, np.float32)}])
