from __future__ import annotations

import numpy as np
import pytest

from mi2rage_rt.classifier_batches import distinct_images, image_groups, length_batches


def noise(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_same_object_and_equal_pixels_are_one_image() -> None:
    first, second = noise(0), noise(1)
    hardly = first.copy()
    hardly[3, 1, 2] ^= 1  # not among the pixels that are looked at first
    turned = first.reshape(30, 40, 3)
    images = [first, None, second, first, first.copy(), hardly, turned, hardly.copy(), first[:, ::-1], None]
    assert distinct_images(images) == [0, None, 2, 0, 0, 5, 6, 5, 8, None]
    assert distinct_images([]) == []


def test_views_of_one_array_are_told_apart() -> None:
    batch = np.stack([noise(0), noise(1), noise(0)])
    assert distinct_images(list(batch)) == [0, 1, 0]
    assert distinct_images(batch) == [0, 1, 0]  # type: ignore[arg-type]


def _check_groups(lengths: list[int], firsts: list[int | None], most: int) -> int:
    groups = image_groups(lengths, firsts, most)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(lengths)))
    encoded = [image for group in groups for image in group.images]
    assert len(encoded) == len(set(encoded)) == len({first for first in firsts if first is not None})
    for group in groups:
        assert len(group.images) <= most
        assert [lengths[row] for row in group.rows] == sorted(lengths[row] for row in group.rows)
        for row, index in zip(group.rows, group.index, strict=True):
            assert (None if index < 0 else group.images[index]) == firsts[row]
    return len(groups)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 3, 32])
def test_every_image_is_in_one_group(seed: int, most: int) -> None:
    draws = np.random.default_rng(seed)
    firsts: list[int | None] = []
    for place in range(25):
        seen = [first for first in firsts if first is not None]
        firsts.append((place, None, seen[int(draws.integers(len(seen)))] if seen else place)[int(draws.integers(3))])
    count = _check_groups([int(length) for length in draws.integers(8, 60, 25)], firsts, most)
    assert count == max(1, -(-len({first for first in firsts if first is not None}) // most))


def test_samples_without_images_and_none_at_all() -> None:
    assert _check_groups([9, 8, 12], [None, None, None], 2) == 1
    assert _check_groups([9, 8, 12, 7], [0, 1, 2, None], 1) == 3
    assert image_groups([], [], 4) == []


def test_groups_follow_the_lengths() -> None:
    lengths = [40, 8, 41, 9, 42, 10]
    groups = image_groups(lengths, [0, 1, 2, 3, 4, 5], 3)
    assert [[lengths[row] for row in group.rows] for group in groups] == [[8, 9, 10], [40, 41, 42]]


def test_batches_are_bounded_in_rows_and_ids() -> None:
    def cut(lengths: list[int], most: int, ids: int, padding: int = 1000) -> list[list[int]]:
        return [lengths[batch] for batch in length_batches(lengths, most, ids, padding)]

    assert cut([8, 8, 9, 9, 9], 2, 1000) == [[8, 8], [9, 9], [9]]
    assert cut([8, 9, 10, 20, 21, 99, 100], 32, 40) == [[8, 9, 10], [20], [21], [99], [100]]
    assert cut([10, 10, 10, 10], 32, 40) == [[10, 10, 10, 10]]
    assert cut([8, 8, 10, 11, 30, 31], 32, 1000, padding=5) == [[8, 8, 10], [11], [30, 31]]
    assert cut([], 4, 40) == []


def test_long_sentences_do_not_widen_short_ones() -> None:
    """Ids that are run, padding included, over ids that are there: tweets and a few long sentences in one call."""
    draws = np.random.default_rng(0)
    lengths = sorted(int(length) for length in np.clip(draws.lognormal(3.4, 0.45, 64), 8, 128))

    def run(batches: list[slice]) -> float:
        widths = [(len(lengths[batch]), lengths[batch][-1]) for batch in batches]
        return sum(count * longest for count, longest in widths) / sum(lengths)

    assert run([slice(0, 32), slice(32, 64)]) > 1.3
    assert run(length_batches(lengths, 32, 32 * 64, 64)) < 1.15
