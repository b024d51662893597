"""The tensors of the models as services, the same for `mi2rage-rt serve` and for a Triton repository. Plain data.

Shapes are those of one row, after the batch axis: `(1,)` stands for `[B, 1]` on the wire. Texts and files are BYTES
elements: UTF-8 texts without a length prefix of their own, image files as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["ANY", "MODELS", "Datatype", "ModelTensors", "Parameter", "ServiceTensor"]

Datatype = Literal["BYTES", "FP32", "INT32", "UINT64"]

ANY = -1
"""An axis whose length the bundle decides: the labels."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceTensor:
    """One tensor.

    Attributes:
        name: on the wire.
        datatype: in the protocol's words.
        shape: of one row, without the batch axis.
        meaning: one line for people.
        optional: may be left out of a request.
        file: a file's bytes: in JSON, which has no place for them, base64.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    meaning: str
    optional: bool = False
    file: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """One request parameter; it holds for all rows of a request.

    Attributes:
        name: on the wire.
        kind: what its value must be; a whole number is taken where `float` is asked for.
        meaning: one line for people.
    """

    name: str
    kind: Literal["int", "float"]
    meaning: str


@dataclasses.dataclass(frozen=True, slots=True)
class ModelTensors:
    """What a model takes and gives."""

    inputs: tuple[ServiceTensor, ...]
    outputs: tuple[ServiceTensor, ...]
    parameters: tuple[Parameter, ...] = ()


MODELS: dict[str, ModelTensors] = {
    "classifier": ModelTensors(
        inputs=(
            ServiceTensor("tokens", "BYTES", (1,), 'the words of a sentence, a JSON list: ["Tim", "leads", "Apple"]'),
            ServiceTensor("head", "INT32", (2,), "the head mention's first token, and the one after its last"),
            ServiceTensor("tail", "INT32", (2,), "the tail mention's first token, and the one after its last"),
            ServiceTensor("image", "BYTES", (1,), "an image file; empty for none", optional=True, file=True),
        ),
        outputs=(
            ServiceTensor("relation", "BYTES", (1,), "the most probable relation"),
            ServiceTensor("probability", "FP32", (1,), "its probability, 0 to 1"),
            ServiceTensor("logits", "FP32", (ANY,), "unnormalised log-probabilities in the order of the labels"),
        ),
    ),
    "captioner": ModelTensors(
        inputs=(
            ServiceTensor("image", "BYTES", (1,), "an image file", file=True),
            ServiceTensor("prefix", "BYTES", (1,), "what the caption begins with; by default nothing", optional=True),
            ServiceTensor("seed", "UINT64", (1,), "of nucleus sampling; greedy without it", optional=True),
        ),
        outputs=(ServiceTensor("caption", "BYTES", (1,), "the caption, its prefix included"),),
        parameters=(
            Parameter("max_new_tokens", "int", "tokens after the prefix at most; by default the bundle's own"),
            Parameter("beams", "int", "of a beam search, without seeds; 1 is greedy"),
            Parameter("top_p", "float", "of nucleus sampling, above 0 and at most 1"),
            Parameter("temperature", "float", "of nucleus sampling, above 0"),
        ),
    ),
    "generator": ModelTensors(
        inputs=(
            ServiceTensor("prompt", "BYTES", (1,), "what to draw"),
            ServiceTensor("seed", "UINT64", (1,), "the noise is drawn from it alone"),
        ),
        outputs=(ServiceTensor("image", "BYTES", (1,), "a PNG file", file=True),),
        parameters=(
            Parameter("steps", "int", "denoising steps; the bundle has schedules for some"),
            Parameter("guidance_scale", "float", "of classifier-free guidance; 1 is off"),
            Parameter("height", "int", "pixels; by default the bundle's own"),
            Parameter("width", "int", "pixels; by default the bundle's own"),
        ),
    ),
}
"""By the name that the model is served under."""
