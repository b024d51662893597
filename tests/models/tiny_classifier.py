"""A relation classifier of the package's own class in about 0.05 M parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mi2rage_rt.samples import Sample, Span
from tests.models.vocabularies import save_bert_tokenizer

PIXELS = 24
MAX_LENGTH = 40
LABELS = ("None", "/per/per/peer", "/per/org/member_of", "/loc/loc/contain")


def build_classifier(folder: Path, *, seed: int = 0) -> Path:
    """Write a random classifier: one BERT layer, one CLIP vision layer on 24 px images."""
    import torch

    from mi2rage_engines.spec import ImagePreprocessing
    from mi2rage_rt.text import EntityMarkedTokenizer
    from mi2rage_training.classifier_model import ClassifierConfig, LoadedClassifier, module_from_config

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_bert_tokenizer(folder / "raw")
    tokenizer = EntityMarkedTokenizer.from_file(folder / "raw" / "tokenizer.json", MAX_LENGTH)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = ClassifierConfig(
        name="tiny",
        labels=LABELS,
        text_encoder=tower
        | {"model_type": "bert", "vocab_size": tokenizer.vocabulary_size, "max_position_embeddings": MAX_LENGTH},
        image_encoder=tower | {"model_type": "clip_vision_model", "image_size": PIXELS, "patch_size": 8},
        sources={"text_encoder": "random", "image_encoder": "random"},
        preprocessing=ImagePreprocessing(
            height=PIXELS,
            width=PIXELS,
            resize="shortest_edge",
            shortest_edge=PIXELS,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        ),
        width=32,
        heads=4,
        dropout=0.1,
        max_length=MAX_LENGTH,
    )
    module = module_from_config(config)
    with torch.no_grad():
        torch.nn.init.normal_(module.missing_image, std=1.0)
        for parameter in module.text_encoder.parameters():
            parameter.mul_(3)  # BERT's own 0.02 makes every sentence look alike
    LoadedClassifier(config, module.eval(), tokenizer).save(folder)
    return folder


def random_samples(count: int, *, seed: int = 0) -> list[Sample]:
    """Sentences of 4 to 19 words with two mentions of one word each."""
    from tests.models.vocabularies import WORDS

    rng = np.random.default_rng(seed)
    samples = []
    for row in range(count):
        length = int(rng.integers(4, 20))
        first, second = (int(place) for place in rng.choice(length, 2, replace=False))
        tokens = tuple(WORDS[index] for index in rng.integers(0, len(WORDS), length))
        head, tail = Span(first, first + 1), Span(second, second + 1)
        samples.append(Sample(f"s{row}", tokens, head, tail, label=LABELS[row % len(LABELS)]))
    return samples


def check_classifier(folder: Path) -> None:
    """Text, image and the lack of an image must each change the logits."""
    from mi2rage_training.classifier_model import load_classifier
    from tests.models.tiny_captioner import random_images

    classifier = load_classifier(folder)
    samples, images = random_samples(2), list(random_images(2))
    logits = classifier.logits(
        [samples[0], samples[1], samples[0], samples[0]], [images[0], images[0], images[1], None]
    )
    for other in (1, 2, 3):
        assert np.abs(logits[0] - logits[other]).max() > 1e-3, logits
