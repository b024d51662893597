"""Counted operations against hand-made figures and against the table in PERFORMANCE.md, without weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mi2rage_benchmarks import limits
from mi2rage_benchmarks.limits import Ceilings, CopyRate, GemmRate, OperationCounter, attainable_gflops, counted
from mi2rage_training import random_architectures as architectures


def test_products_convolutions_and_attention_are_counted():
    left, image, heads = torch.randn(2, 16, 64), torch.randn(1, 3, 8, 8), torch.randn(2, 4, 16, 8)

    def work():
        with torch.inference_mode():
            functional.linear(left, torch.ones(32, 64))
            functional.conv2d(image, torch.ones(4, 3, 3, 3))
            return functional.scaled_dot_product_attention(heads, heads, heads)

    answer, counter = counted(work)
    assert answer.shape == heads.shape
    products, convolution, attention = 2 * 32 * 64 * 32, 2 * 36 * 27 * 4, 2 * 2 * (2 * 4 * 16 * 16 * 8)
    assert counter.flop == products + convolution + attention
    assert counter.largest_bytes == 4 * 32 * 64
    # Each operand and each result once; the attention's three operands are one tensor, read three times.
    moved = (32 * 64 + 32 * 64 + 32 * 32) + (3 * 64 + 4 * 27 + 36 * 4) + 4 * (2 * 4 * 16 * 8)
    assert counter.moved_bytes == 4 * moved


def test_a_counter_adds_up():
    counter = OperationCounter()
    for _ in range(2):
        with counter.counting():
            torch.ones(2, 3) @ torch.ones(3, 4)
    assert counter.flop == 2 * 2 * 2 * 3 * 4


def _meta_call(name):
    """One call of a published architecture at the table's size, without memory for it."""
    if name == "unet":
        inputs = (torch.empty(1, 4, 64, 64), torch.empty(()), torch.empty(1, 77, 768))
        return architectures.unet("sd15"), inputs
    if name == "text":
        return architectures.text_encoders("sd15")[0], (torch.zeros(1, 77, dtype=torch.int64),)
    if name.startswith("vae"):
        vae = architectures.vae("sd15", tiny=name == "vae-tiny")
        return vae.decode, (torch.empty(1, 4, 64, 64),)
    text, image = architectures.classifier_towers(30522)
    return (
        (text, (torch.zeros(1, 128, dtype=torch.int64),)) if name == "bert" else (image, (torch.empty(1, 3, 224, 224),))
    )


@pytest.mark.parametrize(
    ("name", "tflop"),
    [("unet", 0.803), ("vae", 2.51), ("vae-tiny", 0.141), ("text", 0.0133), ("image", 0.0088), ("bert", 0.0224)],
)
def test_the_table_of_the_limits(name, tflop):
    with torch.device("meta"), torch.no_grad():
        call, inputs = _meta_call(name)
        _, counter = counted(lambda: call(*inputs))
    assert counter.flop / 1e12 == pytest.approx(tflop, rel=0.01)
    # At least the weights were read: a network's operations are near all of what uses them, embeddings aside.
    assert counter.moved_bytes > 0


def test_the_rate_is_the_best_seen():
    rate = GemmRate(64)
    rate.sample()
    first = rate.gflops
    rate.sample()
    assert rate.gflops >= first > 0
    assert rate.gflops == max(rate.samples_gflops)


def test_ceilings_are_not_measured_at_every_turn(monkeypatch):
    now = iter([0.0, 0.1, 0.4, 0.6, 0.7])
    monkeypatch.setattr(limits.time, "monotonic", lambda: next(now))
    ceilings = Ceilings(GemmRate(16), CopyRate(4096))
    for _ in range(3):  # at 0.0, not at 0.1 nor 0.4
        ceilings.sample()
    assert len(ceilings.gemm.samples_gflops) == 1
    ceilings.sample()
    assert len(ceilings.gemm.samples_gflops) == 2
    assert ceilings.copy.gbps > 0


def test_the_roofline_is_memory_below_its_ridge_and_the_product_above():
    assert attainable_gflops(10.0, 10.0, gflops=100.0, gbps=20.0) == 20.0
    assert attainable_gflops(1000.0, 10.0, gflops=100.0, gbps=20.0) == 100.0
    assert attainable_gflops(10.0, 0.0, gflops=100.0, gbps=20.0) == 100.0
