"""The relation classifier as a PyTorch module, and its folder.

Text: any transformers encoder, the sentence carrying entity markers; the states at the markers before the head and
the tail stand for the pair (Baldini Soares et al., *Matching the Blanks*, ACL 2019, "entity start"). Image: the patch
states of a vision tower of CLIP's family. A missing image is a learnt vector.

Fusion: the pair attends to the patches, to which the image as a whole is added (first state, which is CLIP's class
state, mean and maximum of all states); the head sees pair p, image v and their product p * v. Why so:

- The same cue means different relations for different pairs: a ball beside two persons speaks for team mates, beside a
  person and a club for membership. That is an interaction of p and v. A head on the concatenation (p, v) is a sum of
  both before its first nonlinearity, and must make up products from it; given p * v, a linear function of the features
  is bilinear in pair and image already (low-rank bilinear pooling: Kim et al., *Hadamard Product for Low-rank Bilinear
  Pooling*, ICLR 2017, with the two projections being `pair` and `values`). p and v stand beside it so that what only
  one of them says is not multiplied by noise of the other.
- The pair asks with one query. Cross-attention of all words over all patches (LXMERT: Tan and Bansal, EMNLP 2019) takes
  T times the products and brings several layers of new weights, to be fitted on some thousand pairs.
- The text encoder never sees the image: a hidden or missing image leaves q(y | text) untouched, which the teacher's
  added information needs, and patch states of a frozen tower can be computed once for all epochs.

These are the reasons for the choice; the three were not measured against each other here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from mi2rage_engines.errors import DataError, ModelFolderError
from mi2rage_engines.spec import ImagePreprocessing
from mi2rage_engines.validation import first_problem
from mi2rage_rt.images import pixel_values
from mi2rage_rt.text import EntityMarkedTokenizer

if TYPE_CHECKING:
    from mi2rage_rt.protocols import Image
    from mi2rage_rt.samples import Sample

__all__ = ["ClassifierConfig", "LoadedClassifier", "RelationModule", "load_classifier"]

CONFIG_NAME = "classifier.json"
WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"


class ClassifierConfig(BaseModel):
    """`classifier.json`: everything but the weights and the vocabulary.

    Attributes:
        text_encoder, image_encoder: transformers' own config dictionaries of the two towers.
        sources: the folders or hub ids the towers were taken from.
        width: of the fusion; heads: of its attention.
        dropout: of the head, 0 to 1.
        max_length: ids a sentence may hold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    labels: tuple[str, ...]
    text_encoder: dict[str, Any]
    image_encoder: dict[str, Any]
    sources: dict[str, str]
    preprocessing: ImagePreprocessing
    width: int
    heads: int
    dropout: float
    max_length: int


class RelationModule(nn.Module):
    """Fusion of a text encoder and a vision tower into relation logits.

    Args:
        text_encoder: gives `.last_hidden_state` (B, T, text width) for `input_ids`, `attention_mask`.
        image_encoder: gives `.last_hidden_state` (B, P, image width) for `pixel_values`.
        labels: number of labels; width, heads, dropout: of the fusion.
    """

    def __init__(
        self, text_encoder: nn.Module, image_encoder: nn.Module, labels: int, *, width: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        text_config: Any = text_encoder.config
        image_config: Any = image_encoder.config
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.heads = heads
        self.pair = nn.Linear(2 * text_config.hidden_size, width)
        self.keys = nn.Linear(image_config.hidden_size, width)
        self.values = nn.Linear(image_config.hidden_size, width)
        self.summary = nn.Linear(3 * image_config.hidden_size, width)
        self.missing_image = nn.Parameter(torch.zeros(width))
        self.pair_norm = nn.LayerNorm(width)
        self.image_norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, labels))

    def patches(self, pixels: Tensor) -> Tensor:
        """Patch states of images: float32 (B, 3, H, W) -> (B, P, image width)."""
        states: Tensor = self.image_encoder(pixel_values=pixels).last_hidden_state
        return states

    def fuse(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        head_index: Tensor,
        tail_index: Tensor,
        patches: Tensor,
        image_mask: Tensor,
    ) -> Tensor:
        """Logits (B, labels) from text inputs and patch states that are computed already."""
        return self.fuse_features(
            input_ids, attention_mask, head_index, tail_index, self.image_features(patches), image_mask
        )

    def image_features(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the fusion takes of images, whatever the pair.

        Args:
            patches: (B, P, image width).

        Returns:
            Keys and values (B, heads, P, width / heads), and the image as a whole (B, width).
        """
        keys, values = self._by_head(self.keys(patches)), self._by_head(self.values(patches))
        pooled = torch.cat((patches[:, 0], patches.mean(1), patches.amax(1)), -1)
        return keys, values, self.summary(pooled)

    def fuse_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        head_index: Tensor,
        tail_index: Tensor,
        image: tuple[Tensor, Tensor, Tensor],
        image_mask: Tensor,
    ) -> Tensor:
        """Logits (B, labels) from text inputs and what `image_features` gave."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        index = torch.stack((head_index, tail_index), 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        pair = self.pair_norm(self.pair(torch.gather(states, 1, index).flatten(1)))
        keys, values, summary = image
        queries = self._by_head(pair.unsqueeze(1))
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values).squeeze(2).flatten(1)
        present = image_mask.unsqueeze(-1).to(attended.dtype)
        seen = self.image_norm(present * (attended + summary) + (1 - present) * self.missing_image)
        logits: Tensor = self.head(torch.cat((pair, seen, pair * seen), -1))
        return logits

    def _by_head(self, states: Tensor) -> Tensor:
        """(B, P, width) -> (B, heads, P, width / heads)."""
        return states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        head_index: Tensor,
        tail_index: Tensor,
        pixel_values: Tensor,
        image_mask: Tensor,
    ) -> Tensor:
        """Relation logits.

        Args:
            input_ids, attention_mask: int64 (B, T).
            head_index, tail_index: int64 (B,), positions of the markers before head and tail.
            pixel_values: float32 (B, 3, H, W), normalised.
            image_mask: float32 (B,), 1 with an image, 0 without.

        Returns:
            float32 (B, labels).
        """
        return self.fuse(input_ids, attention_mask, head_index, tail_index, self.patches(pixel_values), image_mask)


class LoadedClassifier:
    """A module with its tokenizer, preprocessing and labels; fulfils `RelationClassifier`."""

    def __init__(self, config: ClassifierConfig, module: RelationModule, tokenizer: EntityMarkedTokenizer) -> None:
        self.config = config
        self.module = module
        self.tokenizer = tokenizer
        self.name = config.name
        self.labels = config.labels
        self.preprocessing = config.preprocessing
        self.max_length = config.max_length
        self.pad_id = tokenizer.pad_id
        self.tokenizer_file: Path | None = None

    def text_inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `head_index`, `tail_index` as int64 tensors on the module's device."""
        device = self.module.missing_image.device
        return {name: torch.from_numpy(array).to(device) for name, array in self.tokenizer.encode(samples).items()}

    def image_inputs(self, images: Sequence[Image | None]) -> tuple[Tensor, Tensor]:
        """`pixel_values` (B, 3, H, W), zeros where there is no image, and `image_mask` (B,), of the module's dtype."""
        spec = self.preprocessing
        pixels = np.zeros((len(images), 3, spec.height, spec.width), np.float32)
        mask = np.array([image is not None for image in images], np.float32)
        present = [image for image in images if image is not None]
        if present:
            pixels[mask == 1] = pixel_values(present, spec)
        like = self.module.missing_image
        return torch.from_numpy(pixels).to(like), torch.from_numpy(mask).to(like)

    @torch.inference_mode()
    def logits(
        self, samples: Sequence[Sample], images: Sequence[Image | None], batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Unnormalised log-probabilities, float32 (B, labels), in the order given."""
        self.module.eval()
        parts = []
        for start in range(0, len(samples), batch_size):
            pixels, mask = self.image_inputs(images[start : start + batch_size])
            text = self.text_inputs(samples[start : start + batch_size])
            parts.append(self.module(**text, pixel_values=pixels, image_mask=mask).float().cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self.labels)), np.float32)

    def label_ids(self, samples: Sequence[Sample]) -> NDArray[np.int64]:
        """Indices of the samples' labels, int64 (B,).

        Raises:
            DataError: a sample has no label, or one that the classifier does not know.
        """
        known = {label: index for index, label in enumerate(self.labels)}
        for sample in samples:
            if sample.label not in known:
                raise DataError(
                    f"sample {sample.id}: its label is {sample.label!r}, which the classifier does not know; "
                    f"expected one of: {', '.join(self.labels)}"
                )
        return np.array([known[str(sample.label)] for sample in samples], np.int64)

    def save(self, folder: Path) -> None:
        """Write config, weights and tokenizer into `folder`, which exists and is empty."""
        from safetensors.torch import save_file

        (folder / CONFIG_NAME).write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        state = {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}
        save_file(state, folder / WEIGHTS_NAME)
        self.tokenizer.save(folder / TOKENIZER_NAME)


def _encoder_from_config(config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    module: nn.Module = AutoModel.from_config(AutoConfig.for_model(**config))
    return module


def module_from_config(config: ClassifierConfig) -> RelationModule:
    """The module of a config, its weights not loaded."""
    return RelationModule(
        _encoder_from_config(config.text_encoder),
        _encoder_from_config(config.image_encoder),
        len(config.labels),
        width=config.width,
        heads=config.heads,
        dropout=config.dropout,
    )


def load_classifier(folder: Path | str) -> LoadedClassifier:
    """Load a classifier that `mi2rage-rt train` wrote, in evaluation mode on the CPU.

    Raises:
        ModelFolderError: the folder or one of its files is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    wanted = "expected a folder written by 'mi2rage-rt train'"
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder; {wanted}")
    try:
        config = ClassifierConfig.model_validate_json((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        tokenizer = EntityMarkedTokenizer.from_file(folder / TOKENIZER_NAME, config.max_length)
        module = module_from_config(config)
        module.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except FileNotFoundError as error:
        raise ModelFolderError(f"{folder}: {Path(str(error.filename)).name} is missing; {wanted}") from error
    except ValidationError as error:
        raise ModelFolderError(f"{folder / CONFIG_NAME}: {first_problem(error)}; {wanted}") from error
    except (SafetensorError, RuntimeError) as error:
        raise ModelFolderError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); {wanted}") from error
    loaded = LoadedClassifier(config, module.eval(), tokenizer)
    loaded.tokenizer_file = folder / TOKENIZER_NAME
    return loaded
