"""What fp16 cannot hold is found, named, and left in fp32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from mi2rage_engines.errors import InputError
from mi2rage_engines.spec import TensorSpec
from mi2rage_export.finite import arguments_from, demand_finite
from mi2rage_export.graphs import NORMAL, Graph, Input, random_inputs
from mi2rage_export.overflow import WHOLE, find_overflow, outermost
from mi2rage_export.precision import lower

WIDTH = 8


class Residual(nn.Module):
    """x + scale * fc(x); its output leaves fp16 where `scale` is large."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.fc(x)


class Stage(nn.Module):
    """A residual block and the norm that brings it back."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.block = Residual(scale)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.block(x))


class Network(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first = Residual()
        self.stage = Stage(scale)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.stage(self.first(x)))


class Functional(nn.Module):
    """The overflow is in the code of `body`, between two layers that fit."""

    def __init__(self, product: float) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.fc = nn.Linear(WIDTH, WIDTH)
        self.body.forward = lambda x: torch.tanh(self.body.fc(x) * product)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x))


class SmallDivisor(nn.Module):
    """In fp16 the 1e-9 is 0, and 0 / 0 is NaN; nothing here is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        silent = torch.zeros_like(x)
        return x + silent / (silent.abs() + 1e-9)


class Masked(nn.Module):
    """A causal mask made of the smallest number of the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.fc(x) @ x.transpose(-1, -2)
        mask = torch.full_like(scores, torch.finfo(scores.dtype).min).triu(1)
        return torch.softmax(scores + mask, -1) @ x


def graph_of(module: nn.Module, shape: tuple[str | int, ...] = ("batch", WIDTH), name: str = "test/graph") -> Graph:
    module.eval()
    return Graph(
        name=name,
        module=module,
        inputs=(Input("x", "float32", shape, NORMAL),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=shape),),
        reference=lambda x: (module(x),),
        traced={"batch": 2},
        checked=({"batch": 1}, {"batch": 5}),
    )


def seeded(make, *args):
    torch.manual_seed(0)
    return graph_of(make(*args))


def samples(graph: Graph) -> list[dict[str, np.ndarray]]:
    return [random_inputs(graph, sizes, seed) for seed, sizes in enumerate(graph.checked)]


def answer(graph: Graph, arrays) -> torch.Tensor:
    with torch.no_grad():
        return graph.module(*arguments_from(graph, arrays))


def test_nothing_is_kept_where_everything_fits() -> None:
    assert find_overflow(seeded(Network, 1.0), samples(seeded(Network, 1.0))) == ()


def test_an_overflowing_residual_block_is_kept_with_the_norm_that_brings_it_back() -> None:
    graph = seeded(Network, 1e6)
    cases = samples(graph)
    expected = [answer(graph, arrays) for arrays in cases]
    kept = find_overflow(graph, cases)
    assert kept == ("stage",)  # `stage.block` gives what fp16 cannot hold, so it cannot be kept alone

    lowered = lower(graph, "fp16", keep=kept)
    assert lowered.kept == ("stage",)
    assert graph.module.stage.block.fc.weight.dtype == torch.float32
    assert graph.module.last.weight.dtype == torch.float16
    demand_finite(lowered.graph, cases)
    for arrays, truth in zip(cases, expected, strict=True):
        found = answer(lowered.graph, arrays)
        assert found.dtype == torch.float16
        assert (found.float() - truth).abs().max() < 5e-3  # values up to 2, fp16 has 3 digits


def test_an_overflow_between_two_layers_is_found_where_no_layer_shows_it() -> None:
    graph = seeded(Functional, 1e6)
    assert find_overflow(graph, samples(graph)) == ("body",)


def test_the_safe_share_leaves_room_for_other_inputs() -> None:
    graph = seeded(Functional, 2e4)  # reaches about half of 65504
    assert find_overflow(graph, samples(graph)) == ("body",)
    assert find_overflow(graph, samples(graph), share=1.0) == ()


def test_nan_that_only_rounding_makes_is_found() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), SmallDivisor(), nn.Linear(WIDTH, WIDTH))
    assert find_overflow(graph_of(module), samples(graph_of(module))) == ("1",)


def test_masks_are_no_overflow() -> None:
    torch.manual_seed(0)
    graph = graph_of(Masked(), ("batch", 4, WIDTH))
    cases = samples(graph)
    assert find_overflow(graph, cases) == ()
    expected = answer(graph, cases[1])
    lowered = lower(graph, "fp16").graph
    assert (answer(lowered, cases[1]).float() - expected).abs().max() < 5e-3


def test_the_whole_graph_stays_where_its_own_code_overflows(caplog: pytest.LogCaptureFixture) -> None:
    graph = seeded(Residual, 1e6)
    assert find_overflow(graph, samples(graph)) == (WHOLE,)
    assert "whole graph" in caplog.text
    lowered = lower(graph, "fp16", keep=(WHOLE,))
    assert lowered.precision == "fp32"
    assert lowered.kept == (WHOLE,)
    assert lowered.graph.inputs[0].dtype == "float32"
    assert graph.module.fc.weight.dtype == torch.float32


def test_a_weight_above_the_largest_fp16_number_keeps_its_layer() -> None:
    graph = seeded(Network, 1.0)
    with torch.no_grad():
        graph.module.first.fc.weight[0, 0] = 1e5
        graph.module.first.fc.weight[0, 1:] = 0
    cases = [{"x": np.full((1, WIDTH), 1e-3, np.float32)}]
    assert find_overflow(graph, cases) == ("first.fc",)


def test_named_submodules_are_kept_and_unknown_ones_refused() -> None:
    graph = seeded(Network, 1.0)
    assert find_overflow(graph, samples(graph), keep=("last", "first.fc", "first")) == ("first", "last")
    with pytest.raises(InputError, match=r"test/graph: has no submodule lost; it has first, first\.fc"):
        find_overflow(graph, samples(graph), keep=("lost",))


def test_looking_changes_nothing() -> None:
    graph = seeded(Network, 1e6)
    cases = samples(graph)
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    expected = answer(graph, cases[0])
    find_overflow(graph, cases)
    assert all(torch.equal(before[name], value) for name, value in graph.module.state_dict().items())
    assert torch.equal(answer(graph, cases[0]), expected)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in graph.module.modules())


def test_tied_weights_are_untied_where_one_side_is_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.head.weight = self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.inner(x)))

    graph = seeded(Tied)
    cases = samples(graph)
    expected = answer(graph, cases[0])
    lowered = lower(graph, "fp16", keep=("head",)).graph
    assert (graph.module.inner.weight.dtype, graph.module.head.weight.dtype) == (torch.float16, torch.float32)
    assert (answer(lowered, cases[0]).float() - expected).abs().max() < 5e-3

    tied = lower(dataclasses.replace(seeded(Tied)), "fp16").graph.module
    assert tied.inner.weight is tied.head.weight


def test_names_inside_others_are_dropped() -> None:
    assert outermost(["b.c", "a", "a.b", "ab"]) == ("a", "ab", "b.c")
    assert outermost(["a", WHOLE]) == (WHOLE,)
