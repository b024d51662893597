"""Text and image encoders of a new classifier: embedded, from a local folder, or from the hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_rt.images import preprocessing_from_folder
from mi2rage_rt.text import EntityMarkedTokenizer
from mi2rage_training.pytorch_models import EMBEDDED, quiet_loading, resolve

__all__ = ["image_encoder_from", "text_encoder_from"]

_BARE_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*")


def _source(name: str, role: str) -> str:
    # Unlike generators and captioners, encoders have hub ids without an owner: bert-base-uncased.
    return name if _BARE_HUB_ID.fullmatch(name) and name != EMBEDDED else resolve(name, role)


def _refuse(role: str, name: str, error: Exception) -> ModelFolderError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ModelFolderError(
        f"{role} {name!r}: cannot be loaded ({reason}); expected a folder as transformers saves it, a hub id that can "
        f"be reached, or '{EMBEDDED}'"
    )


def text_encoder_from(name: str, max_length: int) -> tuple[nn.Module, EntityMarkedTokenizer]:
    """A transformers text encoder and its tokenizer, the entity markers added to both.

    New embedding rows are drawn from torch's global generator: seed it first.

    Raises:
        ModelFolderError: it cannot be loaded, or has no fast tokenizer.
    """
    from transformers import AutoModel, AutoTokenizer

    source = _source(name, "text_encoder")
    try:
        with quiet_loading():
            module: Any = AutoModel.from_pretrained(source, dtype="float32")
        with quiet_loading(), tempfile.TemporaryDirectory() as folder:
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            tokenizer = EntityMarkedTokenizer.from_file(Path(folder) / "tokenizer.json", max_length)
    except (OSError, ValueError, KeyError) as error:
        raise _refuse("text encoder", name, error) from error
    positions = getattr(module.config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise ModelFolderError(
            f"text encoder {name!r}: takes {positions} positions, {max_length} were asked for; "
            "give a smaller --max-length"
        )
    with quiet_loading():
        module.resize_token_embeddings(tokenizer.vocabulary_size)
    return module, tokenizer


def image_encoder_from(name: str) -> tuple[nn.Module, ImagePreprocessing]:
    """A CLIP vision tower and how its images are prepared.

    Raises:
        ModelFolderError: it cannot be loaded as a CLIP model.
    """
    from huggingface_hub import snapshot_download
    from transformers import CLIPVisionModel

    source = _source(name, "image_encoder")
    try:
        with quiet_loading():
            module: nn.Module = CLIPVisionModel.from_pretrained(source, dtype="float32")
        folder = (
            source if Path(source).is_dir() else snapshot_download(source, allow_patterns="preprocessor_config.json")
        )
        return module, preprocessing_from_folder(Path(folder))
    except (OSError, ValueError, KeyError) as error:
        raise _refuse("image encoder", name, error) from error
