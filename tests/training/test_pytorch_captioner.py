"""Captioners of transformers' `VisionEncoderDecoderModel`: what `generate` says, by our seeds and prefixes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from mi2rage_engines.errors import DataError, ModelFolderError
from mi2rage_rt.images import pixel_values
from mi2rage_rt.protocols import ImageToText
from mi2rage_training.pytorch_captioner import CaptionDecoding, TorchCaptioner
from tests.models.tiny_captioner import MAX_NEW_TOKENS, random_images
from tests.models.tiny_encoder_decoder import POSITIONS, build_encoder_decoder, check_encoder_decoder

KINDS = (("vit", "gpt2"), ("deit", "bert"), ("beit", "roberta"), ("swin", "trocr"))
IMAGES = list(random_images(5, seed=3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder for each decoder's kind."""
    root = tmp_path_factory.mktemp("captioners")
    made = {decoder: build_encoder_decoder(root / decoder, encoder, decoder) for encoder, decoder in KINDS}
    for folder in made.values():
        check_encoder_decoder(folder)
    return made


@pytest.fixture(scope="module")
def captioner(folders) -> TorchCaptioner:
    return TorchCaptioner.from_folder(folders["gpt2"], device="cpu")


def changed(folder: Path, target: Path, name: str, **values: object) -> Path:
    """A copy with keys of `name` replaced, at the top or (as `decoder__key`) one below."""
    shutil.copytree(folder, target)
    config = json.loads((target / name).read_text(encoding="utf-8"))
    for key, value in values.items():
        *above, last = key.split("__")
        place = config[above[0]] if above else config
        place[last] = value
    (target / name).write_text(json.dumps(config), encoding="utf-8")
    return target


@pytest.mark.parametrize("decoder", [decoder for _, decoder in KINDS])
@pytest.mark.parametrize("prefix", ["", "a photo of"])
def test_captions_are_those_of_transformers(folders, decoder, prefix):
    """Greedy and with three beams, against `generate` called as its documentation does, token for token."""
    from transformers import VisionEncoderDecoderModel

    captioner = TorchCaptioner.from_folder(folders[decoder], device="cpu")
    module = VisionEncoderDecoderModel.from_pretrained(folders[decoder]).eval()
    assert isinstance(captioner, ImageToText) and captioner.max_new_tokens == MAX_NEW_TOKENS
    pixels = torch.from_numpy(pixel_values(IMAGES, captioner.preprocessing))
    prompt = captioner.prompt_ids(prefix)
    begun = {"decoder_input_ids": torch.tensor([prompt] * len(IMAGES))} if prefix else {}
    for beams in (1, 3):
        captioner.decoding = CaptionDecoding(beams=beams)
        with torch.inference_mode():
            expected = module.generate(pixels, num_beams=beams, max_new_tokens=MAX_NEW_TOKENS, **begun)
        found = captioner.generate_ids(IMAGES, [prompt] * len(IMAGES))
        for ids, row in zip(found, expected.tolist(), strict=True):
            written = row[1:]
            end = written.index(captioner.eos_id) if captioner.eos_id in written else len(written)
            assert ids == written[:end]


def test_bytes_become_text_with_their_spaces(captioner):
    captions = captioner.caption(IMAGES[:3], ["a photo of", "", "a dog"])
    assert captions[0].startswith("a photo of") and captions[2].startswith("a dog")
    assert captions[1] == captioner.caption(IMAGES[1:2])[0]
    rest = captioner.caption(IMAGES[:1], ["a photo of"], with_prefix=False)[0]
    assert captions[0].removeprefix("a photo of").strip() == rest
    assert captioner.tokenizer.decode(captioner.prompt_ids("a red car near the house")) == "a red car near the house"


def test_a_sampled_caption_depends_on_its_image_and_seed_alone(captioner):
    together = captioner.caption(IMAGES[:4], seeds=[1, 2, 3, 4])
    assert captioner.caption(IMAGES[2:4], seeds=[3, 4]) == together[2:]
    assert len({captioner.caption(IMAGES[:1], ["a"], seeds=[seed])[0] for seed in range(6)}) > 2


def test_positions_bound_a_caption(folders, captioner):
    """RoBERTa counts from behind its padding id, 1: two positions fewer."""
    assert captioner.max_length == POSITIONS
    roberta = TorchCaptioner.from_folder(folders["roberta"], device="cpu", max_new_tokens=100)
    assert roberta.max_length == POSITIONS - 2
    prompt = roberta.prompt_ids("dog " * 4)
    assert max(map(len, roberta.generate_ids(IMAGES, [prompt] * len(IMAGES)))) <= POSITIONS - 2
    with pytest.raises(DataError, match="leaves no room"):
        roberta.generate_ids(IMAGES[:1], [[0] * (POSITIONS - 2)])


def test_what_bends_logits_is_left_out_and_said(folders, captioner, tmp_path, caplog):
    folder = changed(
        folders["gpt2"], tmp_path / "c", "generation_config.json", no_repeat_ngram_size=1, num_beams=4, max_length=9,
        max_new_tokens=None,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="mi2rage_training"):
        bent = TorchCaptioner.from_folder(folder, device="cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "c: its generation config sets no_repeat_ngram_size; captions are written without"
    ]
    assert bent.max_new_tokens == 8  # max_length counts the start
    bent.max_new_tokens = MAX_NEW_TOKENS
    assert bent.caption(IMAGES) == captioner.caption(IMAGES)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("config.json", {"encoder__model_type": "resnet"}, "encoder is of the kind resnet; expected one of vit, deit"),
        ("config.json", {"decoder__model_type": "llama"}, "decoder is of the kind llama; expected one of gpt2, bert"),
        ("config.json", {"decoder__add_cross_attention": False}, "no cross-attention"),
        ("config.json", {"architectures": ["BertModel"]}, "expected a BLIP captioner .* VisionEncoderDecoderModel"),
        ("preprocessor_config.json", {"size": 48}, "makes images of 48 x 48 px, its encoder takes 24 x 24"),
        ("generation_config.json", {"eos_token_id": [0, 5]}, r"eos_token_id is \[0, 5\]; expected one id"),
    ],
)
def test_kinds_that_cannot_be_run_are_refused_early(folders, tmp_path, name, values, words):
    with pytest.raises(ModelFolderError, match=words):
        TorchCaptioner.from_folder(changed(folders["gpt2"], tmp_path / "c", name, **values), device="cpu")


def test_bf16_weights_make_captions_too(folders):
    half = TorchCaptioner.from_folder(folders["bert"], device="cpu", dtype=torch.bfloat16)
    assert next(half.module.parameters()).dtype == torch.bfloat16
    assert all(caption.startswith("a dog") for caption in half.caption(IMAGES[:2], ["a dog"] * 2))
