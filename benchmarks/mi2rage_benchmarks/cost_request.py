"""One call of `cost`: figures from a store, a run or a file, and what follows from them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mi2rage_benchmarks.cost import Check, CostFigures, CostReport, read_figures
from mi2rage_benchmarks.planner import checked, plan
from mi2rage_engines.errors import InputError
from mi2rage_rt.samples import Sample, read_samples
from mi2rage_training.chain_config import ChainConfig, Decoding
from mi2rage_training.pairs import Pair
from mi2rage_training.store import is_store

__all__ = ["CostRequest", "cost_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CostRequest:
    """What is asked, see the command's help.

    Attributes:
        place: a store or a bundle; None with figures of another device.
        figures: a report that `cost --out` wrote.
        texts: the real samples; None makes some up.
        run, check: texts that are measured with, and others that are run then; None checks nothing.
        samples: kept ones to plan for; None plans nothing.
        selected, kept_share: what part of the candidates is kept, by a store or a number; none of both is all of them.
        power: whether energy is measured.
        chain: what is made. steps, guidance_scale: of the generator; None for the bundle's own.
        in_flight: shards in the making at a time; 0 is what suits the models.
        device: `auto`, `cpu` or `cuda`.
    """

    place: Path | None = None
    figures: Path | None = None
    texts: Path | None = None
    run: int = 128
    check: int | None = None
    samples: int | None = None
    devices: int = 1
    price_per_hour: float | None = None
    selected: Path | None = None
    kept_share: float | None = None
    power: bool = False
    chain: ChainConfig = dataclasses.field(default_factory=lambda: ChainConfig(shard_size=8))
    steps: int | None = None
    guidance_scale: float | None = None
    in_flight: int = 0
    device: str = "auto"


def cost_of(request: CostRequest) -> CostReport:
    """What a data set costs.

    Raises:
        InputError: options that exclude each other, or a number out of range.
        DataError: a store, samples or figures that cannot be used.
        BundleError: the bundle is not whole, or lacks a generator or a captioner.
        EngineError: a graph failed.
    """
    share, kept_from = _kept(request)
    check: Check | None = None
    if request.figures is not None:
        _refuse_runs(request, f"--figures {request.figures}")
        figures = read_figures(request.figures)
    elif request.place is not None and is_store(request.place):
        from mi2rage_benchmarks.cost_store import figures_of_store

        _refuse_runs(request, f"the store {request.place}")
        figures = figures_of_store(request.place)
    elif request.place is not None:
        figures, check = _measured(request.place, request)
    else:
        raise InputError("cost: came neither a store or bundle nor figures; expected one of them; give one")
    wanted = request.samples
    return CostReport(
        figures=figures,
        kept_share=share,
        kept_from=kept_from,
        kept_per_hour=3600 * share / figures.candidate_s,
        joules_per_kept=None if figures.candidate_j is None else figures.candidate_j / share,
        plan=None
        if wanted is None
        else plan(figures, wanted, kept_share=share, devices=request.devices, price_per_hour=request.price_per_hour),
        check=check,
    )


def _kept(request: CostRequest) -> tuple[float, str]:
    """The share of kept candidates, and where it is from."""
    if request.selected is not None and request.kept_share is not None:
        raise InputError(
            f"--selected {request.selected}: came with --kept-share {request.kept_share}; expected one of them; leave "
            "one out"
        )
    if request.selected is not None:
        from mi2rage_benchmarks.cost_store import kept_share_of

        return kept_share_of(request.selected), str(request.selected)
    if request.kept_share is None:
        return 1.0, "nothing was said of a selection"
    if not 0 < request.kept_share <= 1:
        raise InputError(f"--kept-share: came {request.kept_share}; expected a number above 0 and at most 1, e.g. 0.4")
    return request.kept_share, "as given"


def _refuse_runs(request: CostRequest, source: str) -> None:
    """Nothing is run where the figures are there already."""
    for option, given in (("--check", request.check), ("--power", request.power or None), ("--texts", request.texts)):
        if given is not None:
            raise InputError(
                f"{option}: came with {source}; expected it with a bundle, which the chain is run with; leave it out, "
                "or give a bundle"
            )


def _measured(folder: Path, request: CostRequest) -> tuple[CostFigures, Check | None]:
    from mi2rage_benchmarks.cost_run import device_name, figures_of, run_piece
    from mi2rage_training.chain_models import Sampling, models_from_bundle
    from mi2rage_training.pytorch_captioner import CaptionDecoding

    pairs = _pairs(request)
    beams = 4 if request.chain.decoding is Decoding.BEAM else 1
    sampling = Sampling(request.steps, request.guidance_scale, CaptionDecoding(beams))
    start = time.perf_counter()
    models = models_from_bundle(folder, sampling, request.device)
    load_s = time.perf_counter() - start
    overlap = models.overlap_of(request.in_flight)
    # Untimed: what the first call of each batch size costs is no cost of a large data set.
    run_piece(pairs[: request.chain.shard_size], models, request.chain, overlap)
    piece = run_piece(pairs[: request.run], models, request.chain, overlap, power=request.power)
    described = _described(request.chain, models.described, overlap.in_flight)
    figures = figures_of(piece, described, overlap, load_s, device_name(request.device))
    if request.check is None:
        return figures, None
    again = run_piece(pairs[request.run :], models, request.chain, overlap)
    return figures, checked(figures, again.texts, again.candidates, again.ends_s[-1])


def _described(chain: ChainConfig, models: dict[str, Any], in_flight: int) -> dict[str, Any]:
    """What the cost depends on."""
    size = {"height": models["height"], "width_px": models["width"]} if "height" in models else {}
    kept = ("bundle", "steps", "guidance_scale")
    return {
        **{name: value for name, value in models.items() if name in kept},
        **size,
        "links": chain.links,
        "width": chain.width,
        "shard_size": chain.shard_size,
        "image_format": chain.image_format.value,
        "decoding": chain.decoding.value,
        "in_flight": in_flight,
    }


def _pairs(request: CostRequest) -> Sequence[Pair]:
    """The texts that are measured with, and behind them those of the check."""
    count = request.run + (request.check or 0)
    samples: Sequence[Sample]
    if request.texts is None:
        from mi2rage_benchmarks.whole_calls import sentences

        samples = sentences(count, request.chain.seed, length=None)
    else:
        samples = read_samples(request.texts)
        if len(samples) < count:
            raise InputError(
                f"{request.texts}: holds {len(samples)} texts; expected {count}, {request.run} to measure with and "
                f"{request.check or 0} others to check with; give a smaller --run or --check"
            )
    return [Pair(sample) for sample in samples[:count]]
