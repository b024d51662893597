"""What feature caching costs in quality and brings in time, on the micro-world: the tables of benchmarks/NOTES.md.

```sh
mi2rage-rt export --out bundle --generator embedded --captioner embedded --feature-cache
OMP_NUM_THREADS=1 python -m tests.benchmarks.feature_cache_quality bundle
```

For each number of steps and each N (every N-th step runs the whole UNet; 1 is no caching), of `--scenes` fresh scenes,
the same prompts and seeds throughout:

- PSNR of the images against those without caching;
- recall in the images: the share of the attributes asked for that the probe finds;
- recall in the captions: the share of them that the bundle's captioner then names;
- time: without caching over with it, of whole generations on one thread, the settings taking turns `--rounds` times;
  the processor's time, which other processes disturb less than the clock's.

`--operations` prints the share of a whole step's operations that a shallow step has, counted by torch on the meta
device, and needs no bundle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mi2rage_export.parity import psnr_db
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator
from mi2rage_rt.noise import seed_from
from mi2rage_training.microworld import attributes_in, corpus
from mi2rage_training.microworld.probe import AttributeProbe

SCENES_SEED = 2_000_003  # no pretraining seed in use
BATCH = 8
TIMED = 32
"""Images of a timed call."""


def recall(asked: Sequence[frozenset[str]], found: Sequence[frozenset[str]]) -> float:
    wanted = sum(map(len, asked))
    return 100 * sum(len(one & other) for one, other in zip(asked, found, strict=True)) / wanted


def quality(bundle: Bundle, steps: Sequence[int], intervals: Sequence[int], scenes: int) -> list[list[str]]:
    """Rows of steps, N, PSNR, recall in the images and recall in the captions."""
    drawn = corpus(SCENES_SEED, scenes)
    asked = [attributes_in(caption) for caption in drawn.captions]
    seeds = [seed_from("feature cache", row) for row in range(scenes)]
    probe, captioner = AttributeProbe.load(), bundle.captioner()
    generator = bundle.generator(GenerateOptions(feature_cache=2, batch_size=BATCH))
    rows = []
    for count in steps:
        uncached = None
        for interval in intervals:
            options = GenerateOptions(steps=count, batch_size=BATCH, feature_cache=interval)
            images = generator.generate(drawn.captions, seeds, options)
            uncached = images if uncached is None else uncached
            said = [attributes_in(caption) for caption in captioner.caption(list(images))]
            figures = recall(asked, probe.present(images)), recall(asked, said)
            psnr = "" if interval == 1 else f"{psnr_db(images, uncached):.1f}"
            rows.append([str(count), str(interval), psnr, *(f"{figure:.1f}" for figure in figures)])
    return rows


def gains(bundle: Bundle, steps: int, intervals: Sequence[int], rounds: int) -> dict[int, np.ndarray]:
    """For each N the ratios of time without caching to time with it, one a round."""
    prompts = corpus(SCENES_SEED, TIMED).captions
    plain = bundle.generator()
    cached = bundle.generator(GenerateOptions(feature_cache=2))
    taken: dict[int, list[float]] = {interval: [] for interval in intervals}
    for turn in range(rounds + 1):
        # Each round another is first, so that none always follows the longest.
        for interval in [*intervals[turn % len(intervals) :], *intervals[: turn % len(intervals)]]:
            model: RuntimeGenerator = plain if interval == 1 else cached
            options = GenerateOptions(steps=steps, batch_size=BATCH, feature_cache=interval)
            begin = time.process_time()
            model.generate(prompts, range(TIMED), options)
            if turn:  # the first round warms up
                taken[interval].append(time.process_time() - begin)
    return {interval: np.array(taken[1]) / np.array(taken[interval]) for interval in intervals}


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---:"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def operations(name: str) -> tuple[float, float]:
    """TFLOP of a whole step of one sample, and the share of it that is outside of the cut."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mi2rage_training import random_architectures
    from mi2rage_training.pytorch_models import TorchGenerator

    unet: Any
    if name == "embedded":
        unet = TorchGenerator.from_folder(name, device="cpu").pipeline.unet.to("meta")
    else:
        with torch.device("meta"):
            unet = random_architectures.unet(name)
    size, width = int(unet.config.sample_size), int(unet.config.cross_attention_dim)
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if name == "sdxl" else {}
    added = {key: value.to("meta") for key, value in added.items()}
    sample = torch.zeros(1, int(unet.config.in_channels), size, size, device="meta")
    states = torch.zeros(1, 40 if name == "embedded" else 77, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False, depth=6) as counter:
        unet(sample, torch.zeros((), device="meta"), states, added_cond_kwargs=added)
    counted = {part: sum(kinds.values()) for part, kinds in counter.get_flop_counts().items()}
    last = len(unet.up_blocks) - 1
    layers = len(unet.up_blocks[-1].resnets)
    outside = ["conv_in", "conv_out", "time_embedding", "add_embedding"]
    outside += [f"down_blocks.0.{kind}.0" for kind in ("resnets", "attentions")]
    outside += [
        f"up_blocks.{last}.{kind}.{at}" for kind in ("resnets", "attentions") for at in (layers - 2, layers - 1)
    ]
    kept = sum(counted.get(f"{type(unet).__name__}.{part}", 0) for part in outside)
    return counter.get_total_flops() / 1e12, kept / counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--operations", action="store_true")
    given = parser.parse_args()
    if given.operations:
        rows = []
        for name in ("sd15", "sdxl", "embedded"):
            whole, share = operations(name)
            limits = [f"{n / (1 + (n - 1) * share):.2f}" for n in (2, 3, 5)]
            rows.append([name, f"{whole:.3g}", f"{100 * share:.1f}%", *limits])
        print(table(["UNet", "TFLOP a step", "shallow", "N = 2", "N = 3", "N = 5"], rows))
        return
    if given.bundle is None:
        parser.error("no bundle: expected one that was exported with --feature-cache, or --operations")
    bundle = Bundle.open(given.bundle, threads=1)
    titles = ["steps", "N", "PSNR, dB", "recall in images, %", "recall in captions, %"]
    print(table(titles, quality(bundle, given.steps, given.intervals, given.scenes)))
    for steps in given.steps:
        for interval, ratios in gains(bundle, steps, given.intervals, given.rounds).items():
            if interval == 1:
                continue
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            print(f"{steps} steps, N = {interval}: {middle:.2f} times as fast (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
