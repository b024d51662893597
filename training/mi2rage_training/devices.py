"""Which device PyTorch works on."""

from __future__ import annotations

from mi2rage_engines.errors import InputError, require

__all__ = ["device_from"]


def device_from(name: str) -> str:
    """The torch device of a name; `auto` takes the first GPU where there is one.

    Raises:
        InputError: there is no such device.
        MissingExtraError: torch is not installed.
    """
    torch = require("torch", "train")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}: not a torch device; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs; give another, or cpu")
    return name
