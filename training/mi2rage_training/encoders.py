"""Text and image encoders of a new classifier: embedded, from a local folder, or from the hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.images import preprocessing_from_folder
from mi2rage_rt.text import EntityMarkedTokenizer
from mi2rage_training.pytorch_sources import EMBEDDED, loading, quiet_loading, resolve

__all__ = ["image_encoder_from", "text_encoder_from"]

_BARE_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*")
_TEXT = f"a text encoder as transformers saves it, a hub id that can be reached, or '{EMBEDDED}'"
_IMAGE = f"a CLIP or SigLIP model as transformers saves it, a hub id that can be reached, or '{EMBEDDED}'"

_PREPROCESSING = ["preprocessor_config.json", "processor_config.json"]


def _source(name: str, role: str) -> str:
    # Unlike generators and captioners, encoders have hub ids without an owner: bert-base-uncased.
    return name if _BARE_HUB_ID.fullmatch(name) and name != EMBEDDED else resolve(name, role)


def text_encoder_from(name: str, max_length: int) -> tuple[nn.Module, EntityMarkedTokenizer]:
    """A transformers text encoder (BERT, RoBERTa, DeBERTa, DistilBERT, ...) and its tokenizer, markers added to both.

    New embedding rows are drawn from torch's global generator: seed it first.

    Raises:
        ModelFolderError: it cannot be loaded, is no encoder of text alone, or has no fast tokenizer.
    """
    from transformers import AutoModel

    source = _source(name, "text_encoder")
    with loading(f"text encoder {name!r}", _TEXT):
        module: Any = AutoModel.from_pretrained(source, dtype="float32")
        tokenizer = _tokenizer_from(source, name, max_length)
    positions = _positions(module)
    if positions is not None and max_length > positions:
        raise ModelFolderError(
            f"text encoder {name!r}: takes {positions} positions, {max_length} were asked for; "
            "give a smaller --max-length"
        )
    with loading(f"text encoder {name!r}", _TEXT):
        module.resize_token_embeddings(tokenizer.vocabulary_size)
        ids = torch.full((1, 4), tokenizer.vocabulary_size - 1)
        _check_states(module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, f"text encoder {name!r}")
    return module, tokenizer


def _tokenizer_from(source: str, name: str, max_length: int) -> EntityMarkedTokenizer:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ModelFolderError(
                f"text encoder {name!r}: has no fast tokenizer; expected a tokenizer.json; convert its tokenizer, or "
                "take another encoder"
            )
        return EntityMarkedTokenizer.from_file(file, max_length)


def _positions(module: Any) -> int | None:
    """The longest row that the encoder takes, None where nothing bounds it."""
    positions = getattr(module.config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    for part_name, part in module.named_modules():
        # RoBERTa's family counts positions from the one after the padding's.
        if part_name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return int(positions - part.padding_idx - 1)
    return int(positions)


def image_encoder_from(name: str) -> tuple[nn.Module, ImagePreprocessing]:
    """A vision tower of CLIP's family (CLIP, SigLIP, Chinese CLIP, ...) and how its images are prepared.

    Of a checkpoint with two towers, as `CLIPModel` and `SiglipModel` are, the vision tower is taken.

    Raises:
        ModelFolderError: it cannot be loaded, or has no tower that gives patch states for images of its size.
    """
    from huggingface_hub import snapshot_download
    from transformers import MODEL_MAPPING, AutoConfig

    source = _source(name, "image_encoder")
    with loading(f"image encoder {name!r}", _IMAGE):
        whole = AutoConfig.from_pretrained(source)
        config = getattr(whole, "vision_config", whole)
        kind: Any = MODEL_MAPPING[type(config)]
        if kind.main_input_name != "pixel_values":
            raise ModelFolderError(
                f"image encoder {name!r}: a {kind.__name__} takes {kind.main_input_name}; expected {_IMAGE}; "
                "take another encoder"
            )
        module: nn.Module = kind.from_pretrained(source, config=config, dtype="float32")
        folder = source if Path(source).is_dir() else snapshot_download(source, allow_patterns=_PREPROCESSING)
        preprocessing = preprocessing_from_folder(Path(folder))
        pixels = torch.zeros(1, 3, preprocessing.height, preprocessing.width)
        _check_states(module, {"pixel_values": pixels}, f"image encoder {name!r}")
    return module, preprocessing


def _check_states(module: nn.Module, inputs: dict[str, torch.Tensor], subject: str) -> None:
    with quiet_loading(), torch.no_grad():
        states = getattr(module.eval()(**inputs), "last_hidden_state", None)
    if states is None or states.ndim != 3:
        came = "none" if states is None else f"{states.ndim} axes"
        raise ModelFolderError(
            f"{subject}: its hidden states have {came}; expected (rows, positions, width); take another encoder"
        )
