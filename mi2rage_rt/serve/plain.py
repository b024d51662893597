"""The plain routes' requests and answers: one sentence, image or prompt each, as JSON, or a form with an image file."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mi2rage_engines.errors import DataError
from mi2rage_engines.validation import first_problem
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.rows import CaptionRow, RelationRow, relation_row, relation_row_from_text, short_text

__all__ = [
    "CaptionAnswer",
    "CaptionRequest",
    "ErrorAnswer",
    "ImageAnswer",
    "ImageRequest",
    "RelationAnswer",
    "RelationRequest",
    "caption_row_from_request",
    "model_parameters",
    "read_plain",
    "relation_row_from_request",
]

B = TypeVar("B", bound="_Request")

_Span = Annotated[list[int], Field(min_length=2, max_length=2, examples=[[0, 3]])]
_Seed = Annotated[int, Field(ge=0, lt=2**64)]
_Image = Annotated[str, Field(description="an image file (JPEG, PNG, WebP) in base64")]
_FORM_FIELD = "request"
_LARGEST_FIELD = 2**20


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    timeout_ms: Annotated[float, Field(gt=0, description="given up where it has not begun by then")] | None = None


class RelationRequest(_Request):
    """A sentence, as text or as words, with the places of its two mentions, and an image or none."""

    text: str | None = Field(None, description="the sentence; head and tail count its characters", max_length=2**20)
    tokens: list[str] | None = Field(None, description="its words, in place of text; head and tail count them")
    head: _Span = Field(description="[start, end) of the head mention")
    tail: _Span = Field(description="[start, end) of the tail mention")
    image: _Image | None = None


class CaptionRequest(_Request):
    """An image, and how its caption is written."""

    image: _Image | None = None
    prefix: str = Field("", description="what the caption begins with")
    seed: _Seed | None = Field(None, description="of nucleus sampling; greedy without it")
    max_new_tokens: int | None = Field(None, ge=1)
    beams: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    temperature: float | None = Field(None, gt=0)


class ImageRequest(_Request):
    """A prompt, and how its image is made."""

    prompt: str
    seed: _Seed = Field(0, description="the noise is drawn from it alone")
    steps: int | None = Field(None, ge=1)
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)


class RelationAnswer(BaseModel):
    """The most probable relation, and all of them."""

    relation: str
    probability: float
    probabilities: dict[str, float]
    head: str
    tail: str


class CaptionAnswer(BaseModel):
    """A caption, its prefix included."""

    caption: str


class ImageAnswer(BaseModel):
    """A PNG file in base64, and the seed it was made from."""

    image: str
    seed: int


class ErrorAnswer(BaseModel):
    """What went wrong, what was expected, and what to do."""

    error: str


async def read_plain(request: Request, kind: type[B]) -> tuple[B, bytes | None]:
    """A request's document and its image file.

    Args:
        request: JSON, or a form with the fields `request` (the JSON) and `image` (the file).
        kind: of the document.

    Raises:
        DataError: it is neither, or a field is wrong.
    """
    upload = None
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        body, upload = await _read_form(request)
    else:
        body = await request.body()
    try:
        document = kind.model_validate_json(body)
    except ValidationError as error:
        raise DataError(f"body: {first_problem(error)}; see /openapi.json for what is expected") from error
    inline = getattr(document, "image", None)
    if inline is not None and upload is not None:
        raise DataError("image: came both as a file and in base64; expected one of them; leave one out")
    return document, _from_base64(inline) if inline is not None else upload


async def _read_form(request: Request) -> tuple[bytes, bytes | None]:
    try:
        form = await request.form(max_files=1, max_fields=1, max_part_size=_LARGEST_FIELD)
    except Exception as error:  # whatever the parser raises, the form is at fault
        said = error.detail if isinstance(error, HTTPException) else type(error).__name__
        raise DataError(
            f"form: cannot be read ({said}); expected the field 'request' as text, and 'image' as a file; send them so"
        ) from error
    try:
        text, file = form.get(_FORM_FIELD, "{}"), form.get("image")
        if not isinstance(text, str) or (file is not None and not isinstance(file, UploadFile)):
            raise DataError("form: expected the field 'request' as text, and 'image' as a file; send them so")
        return text.encode("utf-8", "replace"), None if file is None else await file.read()
    finally:
        await form.close()


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"image: not base64 ({error}); expected an image file in base64; encode it again") from error


def relation_row_from_request(request: RelationRequest, image: bytes | None, limits: Limits) -> RelationRow:
    """The row that a request means.

    Raises:
        DataError: it has text and words or neither, or a mention does not fit.
    """
    if (request.text is None) == (request.tokens is None):
        raise DataError("body: expected either text or tokens; give one of them")
    if request.text is not None:
        return relation_row_from_text(request.text, request.head, request.tail, image, limits)
    return relation_row(request.tokens or [], request.head, request.tail, image, limits)


def caption_row_from_request(request: CaptionRequest, image: bytes | None, limits: Limits) -> CaptionRow:
    """The row that a request means. Raises DataError where it has no image, or too long a prefix."""
    if not image:
        raise DataError("image: missing; expected an image file, in base64 or as the form's field 'image'; send one")
    return CaptionRow(image, short_text("prefix", request.prefix, limits), request.seed)


def model_parameters(request: BaseModel, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of a request's fields that are parameters of its model, and given."""
    return {name: value for name in names if (value := getattr(request, name)) is not None}


def form_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The form that stands for a JSON document with an image, as OpenAPI describes it."""
    return {
        "type": "object",
        "properties": {
            _FORM_FIELD: {"type": "string", "description": "the JSON document", "example": json.dumps({})},
            "image": {"type": "string", "format": "binary"},
        },
        "description": f"{schema.get('title', 'the document')} in one text field, and the image as a file",
    }
