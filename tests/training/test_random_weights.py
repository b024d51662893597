"""Random weights: the published sizes, weights of sane spread, and every name as a model that runs (shrunk here)."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import TokenizerSpec
from mi2rage_rt.protocols import ImageToText, RelationClassifier, TextToImage
from mi2rage_rt.text import PlainTokenizer
from mi2rage_training import random_architectures as architectures
from mi2rage_training.random_vocabularies import bert_tokenizer, clip_tokenizer, gpt2_tokenizer, save_tokenizer
from mi2rage_training.random_weights import GENERATORS, NAMES, draw_weights, random_model
from tests.models.tiny_captioner import random_images
from tests.models.tiny_classifier import random_samples

_CLIP_L, _OPENCLIP_H, _OPENCLIP_G = 123_060_480, 340_387_840, 694_659_840
_TIED_WORDS = 30_524 * 768
"""BLIP's published totals count the decoder's weights, which are its word embeddings, once more."""


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "unet", "texts"),
    [
        ("sd15", 859_520_964, [_CLIP_L]),
        ("sd21", 865_910_724, [_OPENCLIP_H]),
        ("sd-turbo", 865_910_724, [_OPENCLIP_H]),
        ("sdxl", 2_567_463_684, [_CLIP_L, _OPENCLIP_G]),
        ("sdxl-turbo", 2_567_463_684, [_CLIP_L, _OPENCLIP_G]),
        ("lcm", 859_520_964 + 256 * 320, [_CLIP_L]),
    ],
)
def test_generators_have_the_published_sizes(name, unet, texts):
    with torch.device("meta"):
        assert _count(architectures.unet(name)) == unet
        assert [_count(encoder) for encoder in architectures.text_encoders(name)] == texts
        assert _count(architectures.vae(name)) == 83_653_863
        assert _count(architectures.vae(name, tiny=True)) == 2_445_063


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("blip-base", 247_414_076 - _TIED_WORDS),
        ("blip-large", 469_732_924 - _TIED_WORDS),
        ("vit-gpt2", 239_195_904),
    ],
)
def test_captioners_have_the_published_sizes(name, weights):
    with torch.device("meta"):
        assert _count(architectures.captioner_module(name)) == weights


def test_the_classifiers_towers_have_the_published_sizes():
    with torch.device("meta"):
        text, image = architectures.classifier_towers(30_522)
    assert (_count(text), _count(image)) == (109_482_240, 87_456_000)


def test_samplers_are_those_of_the_publications():
    kinds = {name: type(architectures.scheduler(name)).__name__ for name in GENERATORS}
    assert kinds["sd15"] == "DDIMScheduler"
    assert kinds["sdxl-turbo"] == "EulerAncestralDiscreteScheduler"
    assert kinds["lcm"] == "LCMScheduler"
    assert architectures.scheduler("sd21").config.prediction_type == "v_prediction"
    assert architectures.scheduler("sd-turbo").config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("make", "specials", "entries"),
    [
        (clip_tokenizer, ["!"], 49_408),
        (gpt2_tokenizer, [], 50_257),
        (bert_tokenizer, [], 30_522),
        (bert_tokenizer, ["[DEC]", "[ENC]"], 30_524),
    ],
)
def test_vocabularies_have_the_published_sizes_and_read_any_text(tmp_path, make, specials, entries):
    tokenizer = make(*specials)
    file = save_tokenizer(tokenizer, tmp_path)
    texts = ["A photo of a cat, 2 dogs & the Eiffel tower!", "RT @user: caf\u00e9 #Paris", ""]
    mine = PlainTokenizer(TokenizerSpec(file=file.name, max_length=77, pad_id=0), tmp_path)
    assert mine.vocabulary_size == len(tokenizer) == entries
    for text, row in zip(texts, mine.encode(texts), strict=True):
        expected = tokenizer(text).input_ids
        assert row.tolist() == expected + [0] * (77 - len(expected))
        assert max(row) < entries
    assert tokenizer.decode(mine.bare_ids("two men")).strip() == "two men"


def test_special_ids_are_the_published_ones():
    bert = bert_tokenizer("[DEC]", "[ENC]").convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"])
    assert bert == [0, 100, 101, 102, 30_522]
    assert clip_tokenizer("!")("").input_ids == [49_406, 49_407]
    assert (clip_tokenizer("!").pad_token_id, clip_tokenizer().pad_token_id) == (0, 49_407)
    assert gpt2_tokenizer().eos_token_id == 50_256


def test_weights_are_drawn_by_fan_in_from_the_seed_alone():
    from transformers.pytorch_utils import Conv1D

    def made(seed: int) -> nn.Module:
        module = nn.ModuleDict(
            {
                "linear": nn.Linear(400, 50),
                "conv": nn.Conv2d(16, 64, 5),
                "gpt2": Conv1D(50, 400),  # 400 inputs, 50 outputs
                "words": nn.Embedding(500, 40),
                "norm": nn.LayerNorm(40),
            }
        )
        draw_weights(module, seed)
        return module

    state, again, other = (made(seed).state_dict() for seed in (1, 1, 2))
    # 20,000 draws or more: the deviation is within 2%.
    for name, deviation in (("linear", 1 / 20), ("conv", 1 / 20), ("gpt2", 1 / 20), ("words", 0.02)):
        assert state[f"{name}.weight"].std().item() == pytest.approx(deviation, rel=0.02)
        torch.testing.assert_close(again[f"{name}.weight"], state[f"{name}.weight"], rtol=0, atol=0)
        assert not torch.equal(other[f"{name}.weight"], state[f"{name}.weight"])
    assert (state["norm.weight"] == 1).all()
    assert all((value == 0).all() for key, value in state.items() if key.endswith("bias"))


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The architectures with their vocabularies and image sizes, and 32 channels."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name in ("_CLIP_L", "_OPENCLIP_H", "_OPENCLIP_G"):
        options = getattr(architectures, name)
        monkeypatch.setattr(architectures, name, options | small | {"projection_dim": 32})
    unet = {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
    }
    for name, options in architectures._UNETS.items():
        width = {"cross_attention_dim": 32, "transformer_layers_per_block": 1}
        if name.startswith("sdxl"):
            width |= {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 6 * 256 + 32}
        monkeypatch.setitem(architectures._UNETS, name, options | unet | width)
    monkeypatch.setattr(architectures, "_BLIP_VISION", {"blip-base": small, "blip-large": small})
    monkeypatch.setattr(architectures, "_BLIP_TEXT", small)
    monkeypatch.setattr(architectures, "_VIT", small)
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    monkeypatch.setattr(architectures, "_GPT2", architectures._GPT2 | gpt2)
    monkeypatch.setattr(architectures, "_BERT", small)
    monkeypatch.setattr(architectures, "_CLIP_VISION", small)


@pytest.mark.parametrize("name", ["sdxl-turbo", "sdxl-turbo+taesd", "lcm+taesd"])
def test_a_generators_name_gives_one_whose_images_are_not_flat(shrunk, name):
    role, generator = random_model(name, seed=3)
    assert role == "generator"
    assert isinstance(generator, TextToImage)
    images = generator.generate(["a dog", "a red car", "a dog"], [1, 1, 2]).astype(float)
    assert images.shape == (3, 64, 64, 3)
    assert images.std() > 20
    assert np.abs(images[0] - images[2]).mean() > 1
    assert ((images == 0) | (images == 255)).mean() < 0.5
    if name == "sdxl-turbo":  # the tiny VAE's noise would hide the prompt's share
        assert np.abs(images[0] - images[1]).mean() > 0.1


def test_generators_come_with_usual_settings_and_any_sampler(shrunk):
    _, turbo = random_model("sdxl-turbo+taesd", scheduler="euler")
    assert (turbo.settings.steps, turbo.settings.guidance_scale) == (1, 0.0)
    assert type(turbo.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert not any(module.training for module in (turbo.pipeline.unet, turbo.pipeline.text_encoder_2))


@pytest.mark.parametrize("name", ["blip-base", "vit-gpt2"])
def test_a_captioners_name_gives_one_that_writes(shrunk, name):
    role, captioner = random_model(name, seed=1)
    assert role == "captioner"
    assert isinstance(captioner, ImageToText)
    captions = captioner.caption(list(random_images(2, pixels=48)), ["a photo of", "a photo of"], [1, 2])
    assert captions[0] != captions[1]
    assert all(caption.startswith("a photo of") and len(caption) > 12 for caption in captions)
    folder = captioner.tokenizer_file.parent
    assert folder.is_dir()
    del captioner
    gc.collect()
    assert not folder.exists()


def test_a_classifiers_name_gives_one_for_mnres_labels(shrunk):
    role, classifier = random_model("bert-clip")
    assert role == "classifier"
    assert isinstance(classifier, RelationClassifier)
    assert len(set(classifier.labels)) == 23
    logits = classifier.logits(random_samples(3), [*random_images(2, pixels=48), None])
    assert logits.shape == (3, 23)
    assert np.isfinite(logits).all()
    assert np.ptp(logits, axis=0).max() > 0.05


def test_an_unknown_name_is_refused():
    with pytest.raises(ModelFolderError, match=r"'sd3': not known; expected one of sd15, .*bert-clip.*\+taesd"):
        random_model("sd3")
    with pytest.raises(ModelFolderError, match=r"blip-base\+taesd"):
        random_model("blip-base+taesd")
    assert len(set(NAMES)) == 10
