"""Where a fit runs: its accelerator, and what is seeded there."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs

from mi2rage_engines.errors import InputError
from mi2rage_rt.noise import seed_from
from mi2rage_training.fit_config import FitConfig, MixedPrecision

__all__ = ["accelerator_for", "is_main_process", "seed_device"]


def accelerator_for(config: FitConfig, device: str) -> Accelerator:
    """The accelerator of one fit; a process that `accelerate launch` or `torchrun` started joins the others.

    Raises:
        InputError: fp16 is asked for on the CPU.
    """
    kind = torch.device(device).type
    if config.mixed_precision == MixedPrecision.FP16 and kind == "cpu":
        raise InputError("mixed precision fp16: came with the device cpu; expected a GPU; give bf16 or no")
    if is_initialized():
        state = AcceleratorState()
        if (state.mixed_precision, state.device.type) != (config.mixed_precision, kind):
            # Accelerate takes one precision and device a process; one process of ours fits several classifiers.
            AcceleratorState._reset_state(reset_partial_state=not state.use_distributed)
    return Accelerator(
        cpu=kind == "cpu",
        device_placement=False,  # a single process may be told to use cuda:1
        mixed_precision=str(config.mixed_precision),
        gradient_accumulation_steps=config.gradient_accumulation,
        # Poolers, and a tower that sees no image, get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def is_main_process() -> bool:
    """Whether this process is the only one, or the one of several that writes and prints."""
    return bool(PartialState().is_main_process)


def seed_device(device: torch.device, *key: str | int) -> None:
    """Seed what dropout draws from on `device`, by a key.

    `torch.manual_seed` does the same, but takes a millisecond to note down the call for GPUs that are not in use.
    """
    seed = seed_from(*key)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
