from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mi2rage_rt import noise


def test_the_bytes_of_a_seed_stay() -> None:
    """Images of a seed must be the same after an update: this fails where NumPy or we draw otherwise."""
    drawn = noise.normal(12345, (4, 8, 8), stream=3)
    assert drawn.dtype == np.float32
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "2f7a994cf4566932"


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**64 - 1, 1), (7, 50)])
def test_drawn_in_place_is_the_same(seed: int, stream: int) -> None:
    rows = np.full((3, 4, 5, 6), np.nan, dtype=np.float32)
    noise.normal_into(rows[1], seed, stream=stream)
    np.testing.assert_array_equal(rows[1], noise.normal(seed, (4, 5, 6), stream=stream))
    assert np.isnan(rows[[0, 2]]).all()
