"""The kinds of captioners that can be loaded, and where each keeps the ids that a caption begins and ends with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mi2rage_engines.errors import ModelFolderError

if TYPE_CHECKING:
    from mi2rage_engines.spec import ImagePreprocessing

__all__ = ["DECODERS", "ENCODERS", "EXPECTED", "CaptionFrame", "check_kind", "frame_of"]

logger = logging.getLogger(__name__)

ENCODERS = ("vit", "deit", "beit", "swin")
DECODERS = ("gpt2", "bert", "roberta", "trocr")
"""Model types of a `VisionEncoderDecoderModel`'s two halves."""

EXPECTED = (
    "a BLIP captioner (config.json with the architecture BlipForConditionalGeneration) or a VisionEncoderDecoderModel "
    f"with an encoder of {', '.join(ENCODERS)} and a decoder of {', '.join(DECODERS)}"
)

_KEPT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("num_beams", "length_penalty", "early_stopping", "do_sample", "use_cache", "transformers_version"),
    *("temperature", "top_p", "top_k"),
}
"""Of a generation config: what is used, and what has no effect because captions are decoded in our own way."""


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionFrame:
    """What stands around a caption.

    Attributes:
        bos_id: its first id: BLIP's `[DEC]`, or the decoder's start.
        eos_id: ends it.
        pad_id: fills up the rows that ended.
        positions: ids that a caption may hold, the first one included.
        max_new_tokens: what the model's own configuration says, if anything.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    positions: int
    max_new_tokens: int | None


def check_kind(source: str, config: Mapping[str, Any]) -> str:
    """The architecture that a `config.json` names.

    Raises:
        ModelFolderError: no kind that can be loaded.
    """
    architecture = str((config.get("architectures") or ["unknown"])[0])
    if architecture == "VisionEncoderDecoderModel":
        _check_halves(source, config.get("encoder") or {}, config.get("decoder") or {})
    elif architecture != "BlipForConditionalGeneration":
        raise ModelFolderError(f"{source}: its class is {architecture}; expected {EXPECTED}; give another captioner")
    return architecture


def _check_halves(source: str, encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
    for half, found, known in (("encoder", encoder, ENCODERS), ("decoder", decoder, DECODERS)):
        kind = found.get("model_type", "unknown")
        if kind not in known:
            raise ModelFolderError(
                f"{source}: its {half} is of the kind {kind}; expected one of {', '.join(known)}; "
                "give another captioner"
            )
    # TrOCR's decoder has cross-attention in any case.
    if decoder["model_type"] != "trocr" and not decoder.get("add_cross_attention", False):
        raise ModelFolderError(
            f"{source}: its decoder has no cross-attention and cannot see the image; expected add_cross_attention "
            "in its config.json; give a captioner that was trained as one"
        )


def frame_of(name: str, module: Any, preprocessing: ImagePreprocessing) -> CaptionFrame:
    """The frame of a loaded model; its generation config is reduced to what the runtime does too.

    Raises:
        ModelFolderError: the model says nowhere what a caption starts or ends with, or its images' size differs from
            what the preprocessing makes.
    """
    if module.config.model_type == "blip":
        text = module.config.text_config
        return CaptionFrame(
            bos_id=int(text.bos_token_id),
            eos_id=int(text.sep_token_id),
            pad_id=int(text.pad_token_id),
            positions=int(text.max_position_embeddings),
            max_new_tokens=module.generation_config.max_new_tokens,
        )
    _check_size(name, module.config.encoder, preprocessing)
    return _encoder_decoder_frame(name, module)


def _check_size(name: str, encoder: Any, preprocessing: ImagePreprocessing) -> None:
    size = encoder.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if (height, width) != (preprocessing.height, preprocessing.width):
        raise ModelFolderError(
            f"{name}: its preprocessor makes images of {preprocessing.height} x {preprocessing.width} px, its encoder "
            f"takes {height} x {width}; expected the same; correct the size in preprocessor_config.json"
        )


def _encoder_decoder_frame(name: str, module: Any) -> CaptionFrame:
    own, text = module.generation_config, module.config.decoder
    places = (own, module.config, text)
    eos_id = _one_id(name, "eos_token_id", (getattr(place, "eos_token_id", None) for place in places))
    start = [getattr(place, key, None) for key in ("decoder_start_token_id", "bos_token_id") for place in places]
    bos_id = _one_id(name, "decoder_start_token_id", start)
    pads = [getattr(place, "pad_token_id", None) for place in places]
    limit = own.max_new_tokens or (own.max_length and own.max_length - 1)
    positions = int(text.max_position_embeddings)
    if text.model_type == "roberta":  # counts positions from the one behind its padding id
        positions -= int(text.pad_token_id) + 1
    frame = CaptionFrame(bos_id, eos_id, _one_id(name, "pad_token_id", [*pads, eos_id]), positions, limit)
    _reduce_generation_config(name, module, frame)
    return frame


def _one_id(name: str, key: str, found: Iterable[Any]) -> int:
    """The first id that is set."""
    first = next((value for value in found if value is not None), None)
    if isinstance(first, list) and len(first) == 1:
        first = first[0]
    if not isinstance(first, int):
        raise ModelFolderError(
            f"{name}: {key} is {first}; expected one id in generation_config.json or config.json; set it there"
        )
    return first


def _reduce_generation_config(name: str, module: Any, frame: CaptionFrame) -> None:
    """The runtime chooses by logits alone: what would bend them (no_repeat_ngram_size, ...) is left out, and said."""
    from transformers import GenerationConfig

    own = module.generation_config
    # Old folders spell out what has no effect: lengths of 0, penalties of 1.0.
    bending = {
        key for key, value in own.to_diff_dict().items() if value and not (type(value) is float and value == 1.0)
    }
    dropped = sorted(key for key in bending - _KEPT if not key.startswith("_"))
    if dropped:
        logger.warning("%s: its generation config sets %s; captions are written without", name, ", ".join(dropped))
    module.generation_config = GenerationConfig(
        decoder_start_token_id=frame.bos_id,
        eos_token_id=frame.eos_id,
        pad_token_id=frame.pad_id,
        length_penalty=own.length_penalty,
        early_stopping=own.early_stopping,
    )
