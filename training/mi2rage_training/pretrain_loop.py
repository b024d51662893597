"""The training loop that all embedded models share, and what they share with each other."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.noise import rng as keyed_rng
from mi2rage_rt.noise import seed_from
from mi2rage_rt.progress import steps as progress_steps

if TYPE_CHECKING:
    import torch

__all__ = ["Budget", "Log", "batches", "clip_pixels", "fit"]


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """How long one model is trained: optimiser steps, batch size, peak learning rate."""

    steps: int
    batch: int
    rate: float

    def scaled(self, scale: float) -> Budget:
        """The same with `scale` times the steps, two at least."""
        return dataclasses.replace(self, steps=max(2, round(self.steps * scale)))


class Log:
    """The pretraining's log, one JSON object a line: model, step, loss, seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    def add(self, model: str, step: int, loss: float) -> None:
        """Note a mean loss."""
        seconds = round(time.perf_counter() - self._start, 1)
        self.rows.append({"model": model, "step": step, "loss": round(loss, 5), "seconds": seconds})

    def write(self, path: Path) -> None:
        """Write the rows as JSONL."""
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")


def batches(count: int, budget: Budget, *key: str | int) -> Iterator[NDArray[np.int64]]:
    """Row numbers of each step's batch: shuffled epochs of `count` rows, drawn from `key` alone."""
    rng = keyed_rng(seed_from("pretrain-batches", *key))
    size = min(budget.batch, count)
    left = np.zeros(0, dtype=np.int64)
    for _ in range(budget.steps):
        while len(left) < size:
            left = np.concatenate([left, rng.permutation(count)])
        yield left[:size]
        left = left[size:]


def clip_pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    """float32 `(B, 3, H, W)` in [-1, 1] from uint8 `(B, H, W, 3)`."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    budget: Budget,
    rows: Iterator[NDArray[np.int64]],
    loss_of: Callable[[NDArray[np.int64]], torch.Tensor],
    log: Log,
    after: Callable[[int], None] | None = None,
) -> None:
    """AdamW with a short warm-up and cosine decay to zero.

    Args:
        name: what the log and the progress bar call it.
        parameters: what is trained.
        budget: steps and peak rate.
        rows: the row numbers of each step's batch.
        loss_of: the scalar loss of a batch.
        log: takes the mean loss, twenty times or so.
        after: called with the number of steps done, after each.
    """
    import torch

    kept = list(parameters)
    optimizer = torch.optim.AdamW(kept, lr=budget.rate, weight_decay=0.01, betas=(0.9, 0.99))
    warm = max(1, min(100, budget.steps // 10))

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + np.cos(np.pi * step / budget.steps))
        return float(min(1.0, (step + 1) / warm) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    every, recent = max(1, budget.steps // 20), []
    with progress_steps(f"pretrain {name}", budget.steps) as bar:
        for step, chosen in enumerate(rows, start=1):
            loss = loss_of(chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(kept, 1.0)
            optimizer.step()
            schedule.step()
            recent.append(float(loss.detach()))
            if after is not None:
                after(step)
            if step % every == 0 or step == budget.steps:
                log.add(name, step, float(np.mean(recent)))
                bar.note(f"loss {np.mean(recent):.4f}")
                recent.clear()
            bar.advance()
