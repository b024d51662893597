"""The model card beside the embedded models, written from the recipe and the measurements in their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["write_card"]

_FRONT_MATTER = """\
---
license: apache-2.0
---
"""
"""As the hub's model cards have it; an export takes the licence from here."""

_PARTS = """\
| folder | class | what for |
| --- | --- | --- |
| `generator/` | `StableDiffusionPipeline`: CLIP text tower, UNet, `AutoencoderTiny`, DDIM | text to 24 px |
| `captioner/` | `BlipForConditionalGeneration` | picture to plain caption, or to a post about two entities |
| `image_encoder/` | `CLIPVisionModel`, the other tower of the same tiny CLIP | the classifier's eye |
| `text_encoder/` | `BertModel`, by masked words on unlabelled posts | the classifier's reader |
| `probe/` | a small convolutional net | measures which attributes are visible; trains nothing |
"""

_LIMITS = """\
They know the micro-world and nothing else: 24 px, eight objects, five settings, six shirt colours. The generator's
autoencoder is written down from principal components, not trained (`pretrain_vae.py`), and its decoder counts cells
from the border: it holds for 24 px only. `BlipForConditionalGeneration.generate` does not read `max_new_tokens` from
`generation_config.json`: pass `max_new_tokens=40`. The rates are what the probe sees; its own misses are in its row.
One seed, one machine; other thread counts change the last digits.
"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _measured(measured: dict[str, Any]) -> str:
    lines = ["| what | all | cue | setting | shirt |", "| --- | --- | --- | --- | --- |"]
    kinds = ("all", "cue", "setting", "shirt")
    for setting, rates in measured["generator"].items():
        cells = " | ".join(_percent(rates[kind]) for kind in kinds)
        lines.append(f"| generator, {setting}: asked-for attributes present | {cells} |")
    rows = {f"captioner, {name}": rates for name, rates in measured["captioner"].items()}
    for name, rates in (rows | {"probe, on rendered scenes": measured["probe"]}).items():
        for figure in ("recall", "precision"):
            cells = " | ".join(_percent(rates[kind][figure]) for kind in kinds)
            lines.append(f"| {name}: {figure} | {cells} |")
    return "\n".join(lines) + "\n"


def write_card(folder: Path) -> None:
    """Write `folder/README.md` from its `pretrain.json`, `pretrain_log.jsonl` and, if there, `measured.json`."""
    recipe = json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))
    last = json.loads((folder / "pretrain_log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    budgets = ", ".join(
        f"{name} {budget['steps']} x {budget['batch']}"
        for name, budget in recipe["settings"].items()
        if isinstance(budget, dict)
    )
    made = (
        f"`{recipe['command']}` ({recipe['settings']['scenes']} scenes; steps x batch: {budgets}); "
        f"{last['seconds'] / 60:.0f} minutes of training on the machine that made these, log in `pretrain_log.jsonl`; "
        f"torch {recipe['torch']}, transformers {recipe['transformers']}, diffusers {recipe['diffusers']}. "
        "Nothing is downloaded; the corpus is drawn by the package and has no relation labels.\n"
    )
    parts = [_FRONT_MATTER, "# Embedded models\n", _PARTS, "## How made\n", made]
    path = folder / "measured.json"
    if path.is_file():
        measured = json.loads(path.read_text(encoding="utf-8"))
        command = f"mi2rage-rt pretrain --measure-only FOLDER --seed {measured['seed']}"
        how = f"`{command}`: {measured['scenes']} fresh scenes.\n"
        parts += ["## How good\n", how, _measured(measured)]
    parts += ["## Limits\n", _LIMITS, "## Licence\n", "Apache-2.0, as the package; all data are synthetic.\n"]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
