"""Candidates as vectors, for diversity, and how alike sentence and image are, for the similarity policy."""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mi2rage_engines.errors import DataError
from mi2rage_engines.spec import TokenizerSpec
from mi2rage_rt.images import decode_image, pixel_values, preprocessing_from_folder
from mi2rage_rt.protocols import Image
from mi2rage_rt.text import PlainTokenizer
from mi2rage_training.coverage import unit_rows
from mi2rage_training.encoders import image_encoder_from, text_encoder_from
from mi2rage_training.fit_config import FitConfig
from mi2rage_training.pytorch_sources import loading, resolve, small_files
from mi2rage_training.store import Candidate, Candidates

__all__ = ["caption_similarity", "clip_similarity", "image_embeddings", "made_embeddings", "text_embeddings"]

T = TypeVar("T")

_BATCH = 64


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch


def _images(candidates: Sequence[Candidate]) -> list[Image]:
    return [decode_image(candidate.image, f"image of candidate {candidate.sample.id}") for candidate in candidates]


def made_kind(candidates: Candidates) -> str:
    """What was made of all candidates, `image` or `text`.

    Raises:
        DataError: of some an image, of others a text.
    """
    kinds = sorted({candidate.made for candidate in candidates})
    if len(kinds) != 1:
        raise DataError(f"candidates: came with made {' and '.join(kinds)}; expected one kind; select from them apart")
    return kinds[0]


def made_embeddings(candidates: Candidates, fit: FitConfig, device: str = "cpu") -> NDArray[np.float32]:
    """Vectors of what was made, images or texts, by the encoders that `fit` names, float32 (N, D).

    Raises: as `image_embeddings`, `text_embeddings` and `made_kind`.
    """
    if made_kind(candidates) == "image":
        return image_embeddings(candidates, fit.image_encoder, device)
    sentences = [candidate.sample.text for candidate in candidates]
    return _centred(text_embeddings(sentences, fit.text_encoder, fit.max_length, device))


def _centred(states: NDArray[np.float32]) -> NDArray[np.float32]:
    # The states of one encoder share a large part that tells nothing apart.
    result: NDArray[np.float32] = states - states.mean(0)
    return result


@torch.inference_mode()
def image_embeddings(candidates: Candidates, encoder: str, device: str = "cpu") -> NDArray[np.float32]:
    """The mean of each image's states in a vision tower, less their mean over all candidates, float32 (N, D).

    Raises:
        DataError: an image cannot be decoded.
        ModelFolderError: the encoder cannot be loaded.
    """
    module, preprocessing = image_encoder_from(encoder)
    module.to(device).eval()
    parts = []
    for batch in _batches(candidates):
        pixels = torch.from_numpy(pixel_values(_images(batch), preprocessing)).to(device)
        parts.append(module(pixel_values=pixels).last_hidden_state.mean(1).float().cpu().numpy())
    return _centred(np.concatenate(parts))


def text_embeddings(
    texts: Sequence[str], encoder: str, max_length: int = 64, device: str = "cpu"
) -> NDArray[np.float32]:
    """The mean of each text's states in a transformers text encoder, padding left out, float32 (N, D).

    Raises:
        ModelFolderError: the encoder cannot be loaded.
    """
    embed = _text_embedder(encoder, max_length, device)
    return np.concatenate([embed(batch) for batch in _batches(texts)])


def _text_embedder(encoder: str, max_length: int, device: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """What embeds the texts of one batch."""
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        module, marked = text_encoder_from(encoder, max_length)
        marked.save(Path(folder) / "tokenizer.json")
        spec = TokenizerSpec(file="tokenizer.json", max_length=max_length, pad_id=marked.pad_id)
        tokenizer = PlainTokenizer(spec, folder)
    module.to(device).eval()

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        ids = torch.from_numpy(tokenizer.encode(texts)).to(device)
        mask = (ids != tokenizer.pad_id).flip(1).cummax(1).values.flip(1)  # a pad id inside the text is text
        states = module(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        means: NDArray[np.float32] = (states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)).float().cpu().numpy()
        return means

    return embed


def _cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (unit_rows(left) * unit_rows(right)).sum(1, dtype=np.float64)
    return result


def caption_similarity(
    candidates: Candidates, encoder: str, max_length: int = 64, device: str = "cpu"
) -> NDArray[np.float64]:
    """Cosine (-1 to 1) of text and image, told by the image's caption, by a text encoder, float64 (N,).

    The caption of a made image is compared with the real sentence. The captions of a real image are its texts of the
    first link: each made text is compared with their mean, itself left out where there are others; for that the
    vectors of all captions are held, float32 (N, D). The images are not looked at.

    Raises:
        DataError: a candidate has no caption, or made images and made texts are mixed.
        ModelFolderError: the encoder cannot be loaded.
    """
    kind, embed = made_kind(candidates), _text_embedder(encoder, max_length, device)
    if kind == "text":
        described = np.concatenate([embed(_captions(batch)) for batch in _batches(candidates)])
        return _cosines(described, _of_real_image(candidates, described))
    pairs = (
        (embed([candidate.sample.text for candidate in batch]), embed(_captions(batch)))
        for batch in _batches(candidates)
    )
    return np.concatenate([_cosines(sentences, captions) for sentences, captions in pairs])


def _captions(candidates: Sequence[Candidate]) -> list[str]:
    captions = []
    for candidate in candidates:
        if candidate.caption is None:
            raise DataError(
                f"candidate {candidate.sample.id}: has no caption; expected one, for the similarity policy compares "
                "the sentence with the caption of each image; give --similarity-model with a CLIP model, which "
                "compares it with the image itself, or another policy"
            )
        captions.append(candidate.caption)
    return captions


def _of_real_image(candidates: Candidates, captions: NDArray[np.float32]) -> NDArray[np.float32]:
    """For each candidate the mean over the captions of its real image: its siblings of the first link that is there."""
    links = np.array([candidate.provenance.link for candidate in candidates])
    siblings: dict[str, list[int]] = defaultdict(list)
    for row, candidate in enumerate(candidates):
        siblings[candidate.provenance.parent].append(row)
    means = np.empty_like(captions)
    for rows in siblings.values():
        first = [row for row in rows if links[row] == links[rows].min()]
        for row in rows:
            means[row] = captions[[other for other in first if other != row] or [row]].mean(0)
    return means


@torch.inference_mode()
def clip_similarity(candidates: Candidates, model: str, device: str = "cpu") -> NDArray[np.float64]:
    """Cosine (-1 to 1) of sentence and image by a whole CLIP model, float64 (N,) (Radford et al., 2021).

    Args:
        model: a folder or hub id of a `CLIPModel` with its tokenizer and preprocessor.

    Raises:
        ModelFolderError: it cannot be loaded.
    """
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    source = resolve(model, "similarity model")
    expected = "a whole CLIP model (config.json with the model type clip)"
    with loading(source, expected):
        config = CLIPConfig.from_pretrained(source)
        module: Any = CLIPModel.from_pretrained(source, dtype="float32").to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        preprocessing = preprocessing_from_folder(small_files(source))
    length = config.text_config.max_position_embeddings
    parts = []
    for batch in _batches(candidates):
        texts = [candidate.sample.text for candidate in batch]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        pixels = torch.from_numpy(pixel_values(_images(batch), preprocessing)).to(device)
        output = module(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=pixels)
        parts.append(_cosines(output.image_embeds.cpu().numpy(), output.text_embeds.cpu().numpy()))
    return np.concatenate(parts)
