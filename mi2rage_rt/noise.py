"""Counter-based random numbers: what is drawn depends on its key alone, never on order or process.

Philox4x64-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011) as NumPy has it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["gumbel", "normal", "normal_into", "rng", "seed_from"]


def seed_from(*key: str | int) -> int:
    """A 63-bit seed from the parts of a key, e.g. `(run seed, sample id, link, child)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rng(seed: int, stream: int = 0) -> np.random.Generator:
    """The generator of one `(seed, stream)`; streams of one seed are independent."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def normal(seed: int, shape: tuple[int, ...], stream: int = 0) -> NDArray[np.float32]:
    """Standard normal noise of one `(seed, stream)`, float32."""
    return rng(seed, stream).standard_normal(shape, dtype=np.float32)


def normal_into(out: NDArray[np.float32], seed: int, stream: int = 0) -> None:
    """What `normal` gives for the shape of `out`, written there; `out` is float32 and contiguous."""
    rng(seed, stream).standard_normal(dtype=np.float32, out=out)


def gumbel(seed: int, size: int, stream: int = 0) -> NDArray[np.float32]:
    """Standard Gumbel noise, float32 `(size,)`: `argmax(logits + gumbel)` samples from softmax(logits)."""
    return rng(seed, stream).gumbel(size=size).astype(np.float32)
