"""The relation classifier's two graphs are, together, the PyTorch module."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi2rage_export.families import family_of
from mi2rage_export.precision import lower
from mi2rage_rt.bundle import Bundle
from mi2rage_training.classifier_model import load_classifier
from tests.models.tiny_captioner import random_images
from tests.models.tiny_classifier import random_samples


@pytest.mark.parametrize("batch_size", [2, 32])
def test_shared_and_missing_images_give_pytorchs_logits(exported_bundle, classifier, batch_size):
    """Within 1e-5: the two graphs compute what the module computes."""
    first, second, third = random_images(3)
    images = [first, second, first, None, first.copy(), third, None, second, first]
    samples = random_samples(len(images))
    runtime = Bundle.open(exported_bundle, threads=1).classifier(batch_size)
    assert set(runtime.spec.graphs) == {"image", "classifier"}
    np.testing.assert_allclose(runtime.logits(samples, images), classifier.logits(samples, images), rtol=0, atol=1e-5)


def test_the_parts_share_no_weight(tiny_classifier):
    """Lowering the first part must not touch the second, which is exported after it."""
    loaded = load_classifier(tiny_classifier)
    image, pairs = family_of("classifier", loaded).graphs(loaded)
    names = {id(weight) for graph in (image, pairs) for weight in graph.module.parameters()}
    assert names == {id(weight) for weight in loaded.module.parameters()}
    lower(image, "fp16")
    assert {weight.dtype for weight in image.module.parameters()} == {torch.float16}
    assert {weight.dtype for weight in pairs.module.parameters()} == {torch.float32}
