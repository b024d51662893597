"""Pairs whose label stands in the image's colour and nowhere in the text, and how two fits are compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mi2rage_rt.images import encode_image
from mi2rage_training.fit import Fit, FitConfig, fit_classifier
from mi2rage_training.pairs import Pair
from tests.training.fakes import samples

COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220))
attention = torch.nn.functional.scaled_dot_product_attention


def pairs(count: int, colours: Sequence[tuple[int, int, int]] = COLOURS) -> list[Pair]:
    """Labels in turn, and colours with them."""
    images = [encode_image(np.full((24, 24, 3), colour, np.uint8)) for colour in colours]
    return [Pair(sample, images[i % 3]) for i, sample in enumerate(samples(count))]


def weights_of(fit: Fit) -> dict[str, torch.Tensor]:
    return fit.classifier.module.state_dict()


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Of two states, bit by bit 0; biases of keys apart.

    Softmax does not see a key's bias: its gradient is rounding noise, to which AdamW gives a full step's length.
    """
    assert one.keys() == two.keys()
    compared = [name for name in one if not name.endswith(("key.bias", "keys.bias"))]
    return max(float((one[name] - two[name]).abs().max()) for name in compared)


def same_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def fit_without_dropout(rows: Sequence[Pair], config: FitConfig, **options: Any) -> Fit:
    """A fit in which the encoder's dropout is off too, so that it depends on no draw but order and hidden rows."""

    def undropped(*args: Any, **given: Any) -> torch.Tensor:
        return attention(*args, **given | {"dropout_p": 0.0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", lambda _, states: states)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", undropped)
        return fit_classifier(rows, config, **options)
