"""How captions are written, and which of a bundle's graphs that takes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mi2rage_engines.errors import InputError
from mi2rage_engines.spec import CaptionerSpec, GraphSpec

__all__ = ["CaptionOptions", "check_options", "graphs_to_load"]


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionOptions:
    """How captions are written.

    Attributes:
        max_new_tokens: tokens after the prefix at most; None takes the bundle's default.
        top_p, temperature: of nucleus sampling, see `choose_tokens`.
        batch_size: captions decoded together at most; each beam of an image is one.
        beams: of the beam search where no seeds are given; 1 is greedy.
        length_penalty, early_stopping: of the beam search, see `BeamSettings`.
        static_cache: whether the graph `decoder_static` is used, whose steps all have the same shapes; None where the
            bundle has it and the engine is not the CPU's, which gains nothing by it, and for no beam search. On the
            CPU the bundle loads that graph only for a captioner that is opened with True.
    """

    max_new_tokens: int | None = None
    top_p: float = 0.9
    temperature: float = 1.0
    batch_size: int = 16
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    static_cache: bool | None = None


def graphs_to_load(spec: CaptionerSpec, options: CaptionOptions | None, *, on_host: bool) -> dict[str, GraphSpec]:
    """The graphs that a `RuntimeCaptioner` uses: a second decoder is as many weights again.

    Args:
        spec: the component's part of the manifest.
        options: the captioner's own.
        on_host: the engines compute in the host's memory.
    """
    wanted = None if options is None else options.static_cache
    static = not on_host if wanted is None else wanted
    return {
        str(name): graph
        for name, graph in spec.graphs.items()
        if name != "decoder_static" or static or "decoder" not in spec.graphs
    }


def check_options(options: CaptionOptions) -> None:
    """Refuse what nothing can be written with.

    Raises:
        InputError: an option is out of range.
    """
    if not 0 < options.top_p <= 1:
        raise InputError(f"top_p {options.top_p}: expected a share above 0 and at most 1, e.g. 0.9")
    if options.temperature <= 0:
        raise InputError(f"temperature {options.temperature}: expected a number above 0, e.g. 1.0")
    if options.batch_size < 1:
        raise InputError(f"batch size {options.batch_size}: expected 1 or more")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise InputError(f"max_new_tokens {options.max_new_tokens}: expected 1 or more, or none for the bundle's own")
    if options.beams < 1:
        raise InputError(f"beams {options.beams}: expected 1 (greedy) or more")
