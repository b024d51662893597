"""Reports made up of drawn times, for what is done with reports."""

from __future__ import annotations

import numpy as np

from mi2rage_benchmarks.probes import Timing, ratio_of
from mi2rage_benchmarks.report import EAGER, BenchCell, BenchReport, SideResult, held_against
from mi2rage_benchmarks.watch import Conditions
from mi2rage_engines.bundle import ParityRecord

RUNTIME = "ONNX Runtime fp32"
SIDES = {EAGER: 1.0, "torch.compile": 0.85, RUNTIME: 0.5, "ONNX Runtime int8": 0.35}
"""Each side's time over eager's."""

WORKS = {
    "text encoder": ("text-encoder", "graph", 6.0, 0.4e9, 0.02e9),
    "generator step (UNet)": ("unet", "graph", 40.0, 3.1e9, 0.06e9),
    "classification": ("classify", "whole", 9.0, 0.9e9, 0.05e9),
    "generation, 4 steps": ("generate", "whole", 210.0, 15.0e9, 0.3e9),
}
"""Title: subject, kind, eager's ms at batch 1, operations, bytes."""


def _timing(milliseconds: float, draws: np.random.Generator, count: int) -> Timing:
    slow = np.repeat(draws.lognormal(0, 0.02, count // 5), 5)
    return Timing.from_samples(list(milliseconds * slow * (1 + draws.gamma(1, 0.02, count))), [milliseconds], 5)


def _side(name: str, work: str, eager: Timing, timing: Timing) -> SideResult:
    whole = WORKS[work][1] == "whole"
    stages = {"unet": 0.8, "vae_decoder": 0.1} if work.startswith("generation") else {"classifier": 0.9}
    check = ParityRecord(subject=work, measure="max_abs_scaled", value=1e-6, threshold=1e-4, passed=True, cases=1)
    return SideResult(
        name=name,
        checks=() if name == EAGER else (check,),
        first_ms=None if name == EAGER else 3 * timing.median_ms,
        timing=timing,
        ratio=None if name == EAGER else ratio_of(eager, timing),
        stages_ms={stage: share * timing.median_ms for stage, share in stages.items()} if whole else {},
    )


def made_report(*, seed: int = 0, machine: float = 1.0, slower: dict[str, float] | None = None) -> BenchReport:
    """A report of four works at two batch sizes.

    Args:
        machine: what all times are multiplied by; slower: the same for sides, by name.
    """
    draws = np.random.default_rng(seed)
    cells = []
    for title, (subject, kind, base, flop, moved) in WORKS.items():
        for size in (1, 8):
            scale = machine * base * size**0.85
            factors = {name: share * (slower or {}).get(name, 1.0) for name, share in SIDES.items()}
            timings = {name: _timing(scale * factor, draws, 60) for name, factor in factors.items()}
            cells.append(
                BenchCell(
                    subject=subject,
                    title=title,
                    kind=kind,
                    batch_size=size,
                    sizes={"batch": size},
                    items=size,
                    flop=int(flop * size),
                    moved_bytes=int(moved * size**0.5),
                    sides=tuple(_side(name, title, timings[EAGER], timing) for name, timing in timings.items()),
                    conditions=Conditions(looks=9, foreign_cores=0.1, foreign_cores_max=0.2),
                )
            )
    return BenchReport(
        cells=tuple(held_against(cell, 160.0, 18.0) for cell in cells),
        environment={"cpu": "made up", "cores": "2", "threads": "2", "torch": "2.9", "date": str(seed)},
        seed=0,
        gemm_gflops=160.0,
        copy_gbps=18.0,
        command="mi2rage-rt bench bundle --recipe micro",
        isolated=True,
        seconds=240.0,
    )
