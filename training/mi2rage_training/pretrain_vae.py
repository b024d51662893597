"""The embedded autoencoder: an `AutoencoderTiny` whose weights are written down, not searched for.

The best linear code of a 4x4 patch is its principal components, and a convolution can take them. The way back is
harder: the decoder grows its map by repeating each cell, after which a convolution cannot tell the four copies apart,
and by gradient descent it learns them slowly and blurred. Here the decoder counts its cells from the border inwards
(zero padding shows where the border is), so that after each doubling a gate `relu(value - 2 * misplaced)` keeps the
value that belongs to a place. What is lost is what the components leave out. It holds for 6x6 maps, that is for 24 px.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LATENT_CHANNELS", "vae_from_patches"]

LATENT_CHANNELS = 24
_PATCH = 48
_SMALL = 0.15
"""Latents are kept small, where the decoder's `3 tanh(x / 3)` is nearly x."""
_DECODER_WIDTH = 54
_ONE = 48
_EVEN_ODD_X, _EVEN_ODD_Y = 49, 50
_ODD_X, _ODD_Y = 51, 52
_HERE, _BEFORE, _AFTER = 1, 0, 2
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _components(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Mean `(48,)`, axes `(24, 48)` and their deviations `(24,)` of 4x4 patches in [0, 1], ordered as the encoder."""
    count = len(images)
    pixels = images.astype(np.float64) / 255
    # rows, columns -> cell, corner of the cell (halves), corner of the half
    parts = pixels.reshape(count, 6, 2, 2, 6, 2, 2, 3).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, _PATCH)
    mean = parts.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov((parts - mean).T))
    kept = axes[:, ::-1][:, :LATENT_CHANNELS].T
    kept = kept * np.sign(kept[np.arange(LATENT_CHANNELS), np.abs(kept).argmax(axis=1)])[:, None]
    deviations = np.sqrt(variances[::-1][:LATENT_CHANNELS])
    return mean.astype(np.float32), kept.astype(np.float32), deviations.astype(np.float32)


def _write_encoder(layers: Any, mean: NDArray[np.float32], code: NDArray[np.float32]) -> None:
    import torch

    for channel in range(3):
        layers[0].weight[channel, channel, _HERE, _HERE] = 1
    for layer, before in ((layers[1], 3), (layers[2], 12)):
        for number, (down, right) in enumerate(_CORNERS):
            for channel in range(before):
                # the finer corner varies fastest: the second halving's corners are the outer ones
                layer.weight[number * before + channel, channel, _HERE + down, _HERE + right] = 1
    layers[3].weight[:, :, _HERE, _HERE] = torch.from_numpy(code)
    layers[3].bias[:] = torch.from_numpy(-code @ mean)


def _write_counting(block: Any) -> None:
    """Channels `_EVEN_ODD_X` and `_Y` become 0, 1, 0, 1, 0, 1 along x and y, told from the border of a map of ones."""
    first, second, third = block.conv[0], block.conv[2], block.conv[4]
    for base, out, axis in ((0, _EVEN_ODD_X, 1), (3, _EVEN_ODD_Y, 0)):
        before, after = ((_HERE, _BEFORE), (_HERE, _AFTER)) if axis else ((_BEFORE, _HERE), (_AFTER, _HERE))
        first.weight[(base, _ONE, *before)] = -1
        first.weight[(base + 1, _ONE, *after)] = -1
        first.bias[base : base + 2] = 1  # 1 at the first cell, and at the last
        second.weight[(base, base, *before)] = 1  # at cell 1
        second.weight[(base + 1, base + 1, *after)] = 1  # at cell 4
        second.weight[base + 2, base + 1, _HERE, _HERE] = 1  # at cell 5
        third.weight[out, base, _HERE, _HERE] = 1
        third.weight[(out, base + 1, *after)] = 1  # at cell 3
        third.weight[out, base + 2, _HERE, _HERE] = 1


def _write_spread(layer: Any, size: int, sources: tuple[int, int]) -> None:
    """After a doubling: `size` means of four corners, then the first three corners less the mean, then the counts."""
    for channel in range(size):
        for corner in range(4):
            layer.weight[channel, corner * size + channel, _HERE, _HERE] = 0.25
            for kept in range(3):
                share = 0.75 if kept == corner else -0.25
                layer.weight[(kept + 1) * size + channel, corner * size + channel, _HERE, _HERE] = share
    layer.weight[_EVEN_ODD_X, sources[0], _HERE, _HERE] = 1
    layer.weight[_EVEN_ODD_Y, sources[1], _HERE, _HERE] = 1


def _write_gates(block: Any, size: int) -> None:
    """Channels 0 to `size`: the value of the corner that each place is, from the mean and the differences."""
    first, second, third = block.conv[0], block.conv[2], block.conv[4]
    odd = 3 * size
    for channel in range(odd):
        first.weight[channel, size + channel, _HERE, _HERE] = 1
        first.bias[channel] = 1
    for number, (source, after) in enumerate(((_EVEN_ODD_X, (_HERE, _AFTER)), (_EVEN_ODD_Y, (_AFTER, _HERE)))):
        for sign, row in ((1, odd + 2 * number), (-1, odd + 2 * number + 1)):
            # a place is odd where its right (lower) neighbour is of another cell
            first.weight[(row, source, *after)] = sign
            first.weight[row, source, _HERE, _HERE] = -sign
        second.weight[4 * size + number, odd + 2 * number : odd + 2 * number + 2, _HERE, _HERE] = 1
        third.weight[_ODD_X + number, 4 * size + number, _HERE, _HERE] = 1
    for corner, (down, right) in enumerate(_CORNERS):
        for channel in range(size):
            row = corner * size + channel
            for kept in range(3):
                share = 1.0 if kept == corner else -1.0 if corner == 3 else 0.0
                second.weight[row, kept * size + channel, _HERE, _HERE] = share
            second.bias[row] = (0 if corner < 3 else 4) - 2 * (down + right)
            for number, wanted in enumerate((right, down)):
                columns = slice(odd + 2 * number, odd + 2 * number + 2)
                second.weight[row, columns, _HERE, _HERE] = 2.0 if wanted else -2.0
            third.weight[channel, row, _HERE, _HERE] = 1
    third.bias[:size] = -1


def _write_decoder(layers: Any, mean: NDArray[np.float32], decode: NDArray[np.float32]) -> None:
    import torch

    layers[0].weight[:_PATCH, :, _HERE, _HERE] = torch.from_numpy(decode)
    layers[0].bias[:_PATCH] = torch.from_numpy(mean)
    layers[0].bias[_ONE] = 1
    _write_counting(layers[2])
    _write_spread(layers[4], 12, (_EVEN_ODD_X, _EVEN_ODD_Y))
    _write_gates(layers[5], 12)
    _write_spread(layers[7], 3, (_ODD_X, _ODD_Y))
    _write_gates(layers[8], 3)
    for channel in range(3):
        layers[9].weight[channel, channel, _HERE, _HERE] = 1


def vae_from_patches(images: NDArray[np.uint8]) -> Any:
    """An `AutoencoderTiny`, 24 px to latents `(B, 24, 6, 6)`, from the principal components of the images' patches.

    Scaled latents have mean 0 and mean variance 1. A component's deviation is the root of what it is in the picture:
    kept as it is, the light of the scene would drown the details; made equal, the grain would count as much as shapes.

    Args:
        images: uint8 `(N, 24, 24, 3)`.
    """
    import torch
    from diffusers import AutoencoderTiny

    mean, axes, deviations = _components(images)
    scales = (_SMALL / np.sqrt(deviations)).astype(np.float32)[:, None]
    code, decode = axes * scales, (axes / scales).T
    vae = AutoencoderTiny(
        encoder_block_out_channels=(_PATCH,) * 3,
        decoder_block_out_channels=(_DECODER_WIDTH,) * 3,
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=float(1 / (_SMALL * np.sqrt(deviations.mean()))),
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        _write_encoder(vae.encoder.layers, mean, code)
        _write_decoder(vae.decoder.layers, mean, decode)
    return vae.eval()
