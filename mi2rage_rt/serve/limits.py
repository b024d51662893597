"""What a request may ask for, all in one place."""

from __future__ import annotations

import dataclasses
import math

from mi2rage_engines.errors import InputError

__all__ = ["Limits"]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds; what exceeds them is refused before it is decoded or computed.

    Attributes:
        max_body_bytes: of an HTTP body, or a gRPC message.
        max_header_bytes: of an HTTP request's line and headers.
        max_connections: HTTP connections, and gRPC calls, at once.
        body_timeout_s: from a connection, or a request's first byte, to the end of its headers; and from there to the
            end of its body.
        max_rows: rows of one protocol request.
        max_pixels: of an image that is sent.
        max_made_pixels: of an image that is to be made; the model's own size is always allowed.
        max_aspect: longer side of an image by the shorter one: models that resize the shorter side blow up the other.
        max_text_chars: of a sentence, a prompt or a prefix.
        max_tokens: words of a sentence.
        max_steps: denoising steps.
        max_new_tokens, max_beams: of a caption.
        max_timeout_ms: how long a request may wait for its turn; also where it does not say.

    Raises:
        InputError: a bound is not above 0.
    """

    max_body_bytes: int = 16 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_connections: int = 4096
    body_timeout_s: float = 30.0
    max_rows: int = 32
    max_pixels: int = 24_000_000
    max_made_pixels: int = 2**20
    max_aspect: int = 20
    max_text_chars: int = 10_000
    max_tokens: int = 512
    max_steps: int = 100
    max_new_tokens: int = 256
    max_beams: int = 8
    max_timeout_ms: float = 60_000.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{field.name} {value}: expected a number above 0; give one")
