"""Encoders of several families, tiny and random: taken from a folder, fitted, saved and loaded again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mi2rage_engines.errors import ModelFolderError
from mi2rage_rt.images import encode_image
from mi2rage_rt.noise import rng
from mi2rage_training.classifier_model import load_classifier
from mi2rage_training.encoders import image_encoder_from, text_encoder_from
from mi2rage_training.fit import FitConfig, fit_classifier
from mi2rage_training.pairs import Pair
from tests.models.vocabularies import bert_vocabulary, save_bert_tokenizer
from tests.training.fakes import samples

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 16, "patch_size": 8}
POSITIONS = 48


def save_bpe_tokenizer(folder: Path) -> int:
    """A byte-level BPE of single bytes with RoBERTa's special tokens, and its size."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return len(pieces)


def build_text(folder: Path, family: str) -> Path:
    import transformers

    torch.manual_seed(0)
    kind = {"bert": "Bert", "distilbert": "DistilBert", "deberta": "DebertaV2", "roberta": "Roberta", "t5": "T5"}[
        family
    ]
    if family == "roberta":
        settings: dict[str, Any] = TOWER | {"vocab_size": save_bpe_tokenizer(folder), "pad_token_id": 1}
    else:
        save_bert_tokenizer(folder)
        settings = TOWER | {"vocab_size": len(bert_vocabulary())}
    if family == "distilbert":
        settings = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": settings["vocab_size"]}
    if family == "t5":
        settings = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    settings["max_position_embeddings"] = POSITIONS
    if family == "deberta":
        settings |= {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    config = getattr(transformers, f"{kind}Config")(**settings)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return folder


def build_vision(folder: Path, family: str, *, pixels: int = 16) -> Path:
    import transformers

    torch.manual_seed(0)
    kind, whole = family.removesuffix("-whole"), family.endswith("-whole")
    name = {"clip": "CLIP", "siglip": "Siglip", "vit": "ViT", "resnet": "ResNet"}[kind]
    if whole:
        text = TOWER | {"vocab_size": 20, "max_position_embeddings": 8}
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=VISION)
        model = getattr(transformers, f"{name}Model")(config)
    elif kind == "resnet":
        model = transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1]))
    else:
        suffix = "" if kind == "vit" else "Vision"
        config = getattr(transformers, f"{name}{suffix}Config")(**VISION)
        model = getattr(transformers, f"{name}{suffix}Model")(config)
    model.save_pretrained(folder)
    processor = transformers.CLIPImageProcessor if kind == "clip" else transformers.SiglipImageProcessor
    size = {"shortest_edge": pixels} if kind == "clip" else {"height": pixels, "width": pixels}
    crop = {"crop_size": {"height": pixels, "width": pixels}} if kind == "clip" else {}
    processor(size=size, **crop).save_pretrained(folder)
    return folder


def pairs(count: int) -> list[Pair]:
    images = [rng(row).integers(0, 256, (16, 16, 3), dtype=np.uint8) for row in range(count)]
    return [Pair(sample, encode_image(image)) for sample, image in zip(samples(count), images, strict=True)]


def check_fit_and_folder(tmp_path: Path, **encoders: str) -> None:
    rows = pairs(6)
    config = FitConfig(width=16, heads=2, max_length=32, epochs=1, batch_size=3, **encoders)
    fitted = fit_classifier(rows, config).classifier
    (tmp_path / "classifier").mkdir()
    fitted.save(tmp_path / "classifier")
    loaded = load_classifier(tmp_path / "classifier")
    given = [pair.sample for pair in rows], [pair.load() for pair in rows]
    expected = fitted.logits(*given)
    np.testing.assert_allclose(loaded.logits(*given), expected, atol=1e-6)
    mine, other = (fitted.logits([rows[0].sample], [image]) for image in given[1][:2])
    assert np.abs(mine - other).max() > 0


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "distilbert"])
def test_text_encoders(family: str, tmp_path: Path) -> None:
    check_fit_and_folder(tmp_path, text_encoder=str(build_text(tmp_path / "text", family)))


@pytest.mark.parametrize("family", ["clip", "siglip", "clip-whole", "siglip-whole"])
def test_image_encoders(family: str, tmp_path: Path) -> None:
    check_fit_and_folder(tmp_path, image_encoder=str(build_vision(tmp_path / "vision", family)))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tower_of_a_whole_checkpoint_is_the_checkpoints_own(family: str, tmp_path: Path) -> None:
    import transformers

    folder = build_vision(tmp_path / "vision", f"{family}-whole")
    module, _ = image_encoder_from(str(folder))
    whole = transformers.AutoModel.from_pretrained(folder).eval()
    pixels = torch.from_numpy(rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32))
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(module(pixel_values=pixels).last_hidden_state, expected, rtol=0, atol=1e-6)


def test_roberta_has_two_positions_less_than_its_table(tmp_path: Path) -> None:
    folder = str(build_text(tmp_path / "text", "roberta"))
    with pytest.raises(ModelFolderError, match=f"takes {POSITIONS - 2} positions"):
        text_encoder_from(folder, POSITIONS)
    module, _ = text_encoder_from(folder, POSITIONS - 2)
    ids = torch.full((1, POSITIONS - 2), 5)
    assert module(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape == (1, POSITIONS - 2, 16)


def _two_sizes(folder: Path) -> Path:
    return build_vision(folder, "clip", pixels=24)


def _text(folder: Path) -> Path:
    return build_text(folder, "bert")


def _cells(folder: Path) -> Path:
    return build_vision(folder, "resnet")


@pytest.mark.parametrize(("make", "said"), [(_two_sizes, "16"), (_text, "takes input_ids"), (_cells, "4 axes")])
def test_what_is_no_vision_tower_is_named(make: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=f"image encoder .*{said}"):
        image_encoder_from(str(make(tmp_path / "model")))


def test_what_is_no_text_encoder_is_named(tmp_path: Path) -> None:
    for name, folder in {
        "clip": build_vision(tmp_path / "clip", "clip-whole"),
        "t5": build_text(tmp_path / "t5", "t5"),
    }.items():
        if name == "clip":
            save_bert_tokenizer(folder)
        with pytest.raises(ModelFolderError, match=r"text encoder .*expected a text encoder"):
            text_encoder_from(str(folder), 32)
