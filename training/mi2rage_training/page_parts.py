"""Candidates as parts of an HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image as PilImage

from mi2rage_rt.images import decode_image
from mi2rage_rt.samples import Sample
from mi2rage_training.store import Candidate

__all__ = ["given_part", "made_part"]

_THUMBNAIL_PX = 256
_PIXEL_ART_PX = 64


def _picture(content: bytes, words: str) -> str:
    """An encoded image as `<img>`: its own bytes where it is small, else a thumbnail."""
    image = decode_image(content, f"image of {words!r}")
    side = max(image.shape[:2])
    if side > _THUMBNAIL_PX:
        picture, buffer = PilImage.fromarray(image), io.BytesIO()
        picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        picture.save(buffer, format="JPEG", quality=85)
        content = buffer.getvalue()
    kind = "jpeg" if content.startswith(b"\xff\xd8") else "png"
    pixels = ' class="pixels"' if side <= _PIXEL_ART_PX else ""
    data = base64.b64encode(content).decode()
    return f'<img{pixels} alt="{html.escape(words)}" src="data:image/{kind};base64,{data}">'


def _sentence(sample: Sample) -> str:
    """The sentence, head and tail marked; where they overlap the words count as the head's."""
    parts: list[tuple[str, list[str]]] = []
    for index, token in enumerate(sample.tokens):
        in_head, in_tail = (span.start <= index < span.end for span in (sample.head, sample.tail))
        role = "head" if in_head else "tail" if in_tail else ""
        if not parts or parts[-1][0] != role:
            parts.append((role, []))
        parts[-1][1].append(html.escape(token))
    marked = (f'<mark class="{role}">{" ".join(words)}</mark>' if role else " ".join(words) for role, words in parts)
    return " ".join(marked)


def made_part(candidate: Candidate) -> tuple[str, str]:
    """What was made, as the picture and the words of a child: an image and its caption, or a text."""
    caption = candidate.caption or ""
    if candidate.made == "image":
        said = f"&ldquo;{html.escape(caption)}&rdquo;" if caption else '<span class="soft">no caption</span>'
        return _picture(candidate.image, caption or candidate.prompt), said
    nothing = '<span class="none">no image between</span>'
    return _picture(candidate.via, candidate.prompt) if candidate.via else nothing, _sentence(candidate.sample)


def given_part(candidate: Candidate) -> str:
    """The real modality: the sentence, or the image with the entity pair."""
    sample = candidate.sample
    if candidate.made == "image":
        return _sentence(sample)
    pair = (
        f'<mark class="{role}">{html.escape(sample.mention(span))}</mark>'
        for role, span in (("head", sample.head), ("tail", sample.tail))
    )
    return f"{_picture(candidate.image, 'the real image')} {' '.join(pair)}"
