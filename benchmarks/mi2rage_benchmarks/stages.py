"""Where PyTorch spends a whole call: the networks of a generator, a captioner or a classifier, by hooks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi2rage_benchmarks.work import Work

__all__ = ["stages_of_torch"]

_OF_GENERATORS = {"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "unet": "unet"}
_OF_CAPTIONERS = {"vision_model": "vision", "encoder": "vision", "text_decoder": "decoder", "decoder": "decoder"}
"""The runtime's names of the graphs, by the modules' attributes."""


def stages_of_torch(models: Mapping[str, Any], work: Work) -> dict[str, float]:
    """Milliseconds by network of one call more, whose own time does not count.

    Args:
        models: `TorchGenerator`, `TorchCaptioner` and `LoadedClassifier` by role.
    """
    call = work.on_torch(models)
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for role, model in models.items():
            for name, network in _networks(role, model):
                stack.enter_context(_hooked(name, network, seconds))
            if role == "generator":
                stack.enter_context(_decoding(model.pipeline.vae, seconds))
        call()
    return {name: 1000 * taken for name, taken in seconds.items()}


def _networks(role: str, model: Any) -> list[tuple[str, Any]]:
    if role == "classifier":
        return [("classifier", model.module)]
    owner, names = (model.pipeline, _OF_GENERATORS) if role == "generator" else (model.module, _OF_CAPTIONERS)
    found = [(stage, getattr(owner, name, None)) for name, stage in names.items()]
    return [(stage, network) for stage, network in found if network is not None]


@contextlib.contextmanager
def _hooked(name: str, network: Any, seconds: dict[str, float]) -> Iterator[None]:
    starts: list[float] = []
    before = network.register_forward_pre_hook(lambda *_: starts.append(_now()))
    after = network.register_forward_hook(lambda *_: _add(seconds, name, starts.pop()))
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextlib.contextmanager
def _decoding(vae: Any, seconds: dict[str, float]) -> Iterator[None]:
    # `decode` is no forward, so that it has no hooks.
    decode: Callable[..., Any] = vae.decode

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        answer = decode(*args, **kwargs)
        _add(seconds, "vae_decoder", start)
        return answer

    vae.decode = timed
    try:
        yield
    finally:
        del vae.decode


def _add(seconds: dict[str, float], name: str, start: float) -> None:
    seconds[name] = seconds.get(name, 0.0) + _now() - start


def _now() -> float:
    """Seconds, once a GPU has done what it was asked to."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
