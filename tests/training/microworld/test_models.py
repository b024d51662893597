"""The committed models load through their own libraries, and the pretraining makes the same layout."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from mi2rage_engines.errors import InputError, ModelFolderError
from mi2rage_training.microworld import corpus, models_folder
from mi2rage_training.microworld.probe import AttributeProbe

torch = pytest.importorskip("torch")
TEXTS = ["a person in red near a heart on the beach", "", "RT @stal9 : café ♥ <3 #LOVE it's 12:30!!", "word " * 80]


def test_tokenizer_json_gives_clips_ids_padding_and_truncation_included():
    from transformers import CLIPTokenizer

    folder = models_folder() / "generator" / "tokenizer"
    slow = CLIPTokenizer.from_pretrained(folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = slow(TEXTS, padding="max_length", max_length=slow.model_max_length, truncation=True).input_ids
    assert [encoding.ids for encoding in fast.encode_batch(TEXTS)] == expected
    assert len(slow("Zürich").input_ids) > 3


def test_bert_tokenizers_agree_with_their_json():
    from transformers import BertTokenizer

    for part in ("captioner", "text_encoder"):
        folder = models_folder() / part
        slow, fast = BertTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert [fast.encode(text).ids for text in TEXTS[:3]] == [slow(text).input_ids for text in TEXTS[:3]]
        assert slow.unk_token_id not in slow("RT @zqxj77 : #unheardof words !?").input_ids


def test_generator_loads_and_draws():
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(models_folder() / "generator")
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    made = pipeline(
        ["a heart on the beach", "a cake in a room"], num_inference_steps=4, guidance_scale=2.5, generator=noise
    )
    assert [image.size for image in made.images] == [(24, 24), (24, 24)]
    assert np.asarray(made.images[0]).std() > 5


def test_captioner_loads_and_says_something_that_ends():
    from transformers import BertTokenizer, BlipForConditionalGeneration

    folder = models_folder() / "captioner"
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.from_numpy(corpus(2, 8).images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        ids = model.generate(pixel_values=pixels, max_new_tokens=24)
    tokenizer = BertTokenizer.from_pretrained(folder)
    assert all(len(text.split()) >= 2 for text in tokenizer.batch_decode(ids, skip_special_tokens=True))
    assert (ids == tokenizer.sep_token_id).any(dim=1).all()


def test_encoders_load():
    from transformers import BertModel, CLIPVisionModel

    vision = CLIPVisionModel.from_pretrained(models_folder() / "image_encoder").eval()
    config = json.loads((models_folder() / "image_encoder" / "preprocessor_config.json").read_text())
    assert config["size"] == {"height": 24, "width": 24} and config["image_mean"] == [0.5] * 3
    assert torch.isfinite(vision(torch.zeros(1, 3, 24, 24)).pooler_output).all()
    text = BertModel.from_pretrained(models_folder() / "text_encoder").eval()
    assert torch.isfinite(text(torch.tensor([[2, 5, 3]])).last_hidden_state).all()


def test_probe_sees_what_was_drawn():
    drawn = corpus(3, 100)
    found = AttributeProbe.load().present(drawn.images)
    hits = sum(len(seen & scene.attributes) for seen, scene in zip(found, drawn.scenes, strict=True))
    assert hits / sum(len(scene.attributes) for scene in drawn.scenes) > 0.9


def test_all_weights_fit_in_twelve_megabytes():
    assert sum(path.stat().st_size for path in models_folder().rglob("*") if path.is_file()) <= 12_000_000


def test_a_tiny_pretraining_makes_the_same_layout_twice(tmp_path):
    from mi2rage_training.pretrain import PretrainSettings, pretrain
    from mi2rage_training.pretrain_loop import Budget

    torch.set_num_threads(1)
    short = Budget(steps=2, batch=4, rate=1e-3)
    settings = PretrainSettings(scenes=128, clip=short, unet=short, captioner=short, text=short, probe=short)
    for name in ("one", "two"):
        pretrain(tmp_path / name, seed=5, settings=settings)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    kept = {path.relative_to(models_folder()) for path in models_folder().rglob("*") if path.is_file()}
    assert set(files) <= kept
    for name in (path for path in files if path.suffix == ".safetensors" or path.name == "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_wrong_requests_are_refused(tmp_path):
    from mi2rage_training.pretrain import measure_models, pretrain

    with pytest.raises(InputError, match="scale 0"):
        pretrain(tmp_path / "x", scale=0)
    with pytest.raises(ModelFolderError, match="generator"):
        measure_models(tmp_path)
