"""What a generator's folder holds beside the graphs, as diffusers lays it out: sampler, tokenizers, configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.errors import ModelFolderError
from mi2rage_engines.spec import LatentSpec, TokenizerSpec
from mi2rage_export.families.diffusion_graphs import down_sampling
from mi2rage_training.pytorch_sources import quiet_loading

if TYPE_CHECKING:
    from mi2rage_engines.spec import ScheduleTable
    from mi2rage_training.pytorch_models import TorchGenerator

__all__ = ["write_pipeline"]

_TEXTS = (
    "",
    "A photo of a cat, 2 dogs & the Eiffel tower!",
    "RT @user: caf\u00e9 \u2615 #Paris http://t.co/x " * 20,
)


def write_pipeline(folder: Path, generator: TorchGenerator) -> dict[str, Any]:
    """Write everything but the graphs into the component's folder; returns the manifest's fields.

    Raises:
        ModelFolderError: the sampler cannot be put into tables, or a tokenizer gives other ids than its file.
    """
    pipeline, settings = generator.pipeline, generator.settings
    schedules = _schedules(generator)
    with quiet_loading():
        pipeline.save_config(folder)
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        pipeline.unet.save_config(folder / "unet")
        pipeline.vae.save_config(folder / "vae_decoder")
        for part in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, part, None) is not None:
                getattr(pipeline, part).config.save_pretrained(folder / part)
        tokenizers = {
            part: _write_tokenizer(folder, generator.name, part, getattr(pipeline, part))
            for part in ("tokenizer", "tokenizer_2")
            if getattr(pipeline, part, None) is not None
        }
    _drop_local_paths(folder)
    latents = LatentSpec(
        channels=int(pipeline.unet.config.in_channels),
        downsampling=int(pipeline.vae_scale_factor),
        multiple=down_sampling(generator),
        scaling_factor=float(pipeline.vae.config.scaling_factor),
    )
    return {
        "name": generator.name,
        **tokenizers,
        "schedules": schedules,
        "latents": latents,
        "height": settings.height,
        "width": settings.width,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
    }


def _schedules(generator: TorchGenerator) -> tuple[ScheduleTable, ...]:
    from mi2rage_export.schedules import STEP_COUNTS, schedule_tables

    scheduler, steps = generator.pipeline.scheduler, generator.settings.steps
    tables = schedule_tables(scheduler, (*STEP_COUNTS, steps))
    if steps not in {table.steps for table in tables}:
        raise ModelFolderError(
            f"{generator.name}: its scheduler {type(scheduler).__name__} cannot do the {steps} steps that it is set "
            f"to; expected one of {[table.steps for table in tables]}; choose one of them"
        )
    return tables


def _write_tokenizer(folder: Path, name: str, part: str, tokenizer: Any) -> TokenizerSpec:
    """Write one tokenizer, and see that the runtime, which reads its `tokenizer.json` alone, gets the same ids."""
    from mi2rage_rt.text import PlainTokenizer

    tokenizer.save_pretrained(folder / part)
    # Older transformers, which optimum still wants, read CLIP's vocabulary from vocab.json and merges.txt.
    tokenizer.backend_tokenizer.model.save(str(folder / part))
    spec = TokenizerSpec(
        file=f"{folder.name}/{part}/tokenizer.json",
        max_length=int(tokenizer.model_max_length),
        pad_id=int(tokenizer.pad_token_id),
    )
    texts = list(_TEXTS)
    expected = tokenizer(texts, padding="max_length", max_length=spec.max_length, truncation=True).input_ids
    if PlainTokenizer(spec, folder.parent).encode(texts).tolist() != expected:
        raise ModelFolderError(
            f"{name}: the tokenizer.json of its {part} gives other ids than its {type(tokenizer).__name__}; expected a "
            "fast tokenizer; save it anew with transformers and export again"
        )
    return spec


def _drop_local_paths(folder: Path) -> None:
    """diffusers notes in its configs where a model was loaded from; the same model must give the same bundle."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("model_index.json", "config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
