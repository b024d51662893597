"""A BLIP captioner of transformers' classes in about 0.1 M parameters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.models.vocabularies import bert_vocabulary, save_bert_tokenizer

PIXELS = 24
MAX_NEW_TOKENS = 12


def build_captioner(
    folder: Path, *, seed: int = 0, positions: int = 32, vision_width: int = 32, vision_heads: int = 4
) -> Path:
    """Write a random captioner: 24 px images in patches of 8, two text layers of width 32 with 4 heads."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    torch.manual_seed(seed)
    vocabulary = bert_vocabulary()
    save_bert_tokenizer(folder)
    text = BlipTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        encoder_hidden_size=vision_width,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=vocabulary["[DEC]"],
        eos_token_id=vocabulary["[SEP]"],
        sep_token_id=vocabulary["[SEP]"],
        pad_token_id=vocabulary["[PAD]"],
        initializer_range=0.5,  # the usual 0.02 makes every caption the same token over and over
    )
    vision = BlipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=vision_heads,
        image_size=PIXELS,
        patch_size=8,
        initializer_range=0.2,  # the default, 1e-10, leaves the vision tower blind
    )
    model = BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    with torch.no_grad():  # so that some captions end before the limit
        model.text_decoder.cls.predictions.bias[vocabulary["[SEP]"]] += 6.0
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": PIXELS, "width": PIXELS},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def random_images(count: int, *, pixels: int = PIXELS, seed: int = 0) -> NDArray[np.uint8]:
    """Coarse random colour fields, uint8 (count, pixels, pixels, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, pixels // 3, axis=1), pixels // 3, axis=2)


def check_captioner(folder: Path) -> None:
    """Captions must differ between images, hold several different words, and not all run to the limit."""
    from mi2rage_training.pytorch_captioner import TorchCaptioner

    captioner = TorchCaptioner.from_folder(folder, device="cpu")
    ids = captioner.generate_ids(list(random_images(6)), [captioner.prompt_ids("")] * 6)
    assert len({tuple(row) for row in ids}) >= 3, ids
    assert max(len(set(row)) for row in ids) >= 3, ids
