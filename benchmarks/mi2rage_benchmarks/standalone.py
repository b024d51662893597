"""Running a bundle in a process of its own that never loads PyTorch, through the command line a user has."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from mi2rage_engines.errors import Mi2rageError
from mi2rage_rt.samples import read_samples
from mi2rage_training.metrics import RelationMetrics, relation_metrics

__all__ = ["StandaloneRun", "run_standalone"]

_PROMPTS = ("a heart beside a person", "a ball on grass")

_RUN = """
import json, sys
from mi2rage_rt.cli import main
try:
    main(json.loads(sys.argv[1]))
finally:
    print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@dataclasses.dataclass(frozen=True, slots=True)
class StandaloneRun:
    """What the runtime answered.

    Attributes:
        metrics: of its predictions on the test pairs.
        commands: the command lines that were run.
        images: the generated images' files; captions: what the captioner says of them.
        modules: every top-level module that was loaded.
    """

    metrics: RelationMetrics
    commands: tuple[str, ...]
    prompts: tuple[str, ...]
    images: tuple[Path, ...]
    captions: tuple[str, ...]
    modules: frozenset[str]

    @property
    def torch_loaded(self) -> bool:
        """Whether PyTorch or one of its model libraries was loaded."""
        return bool(self.modules & {"torch", "transformers", "diffusers"})


def _call(arguments: list[str], modules: set[str]) -> str:
    process = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    lines = process.stderr.strip().splitlines()
    if process.returncode != 0:
        raise Mi2rageError(f"mi2rage-rt {' '.join(arguments)}: exit code {process.returncode}: {' '.join(lines[:-1])}")
    modules.update(json.loads(lines[-1]))
    return process.stdout


def run_standalone(bundle: Path, samples: Path, out: Path) -> StandaloneRun:
    """Generate, caption and predict with a bundle by `mi2rage-rt`, each in a fresh process.

    Args:
        samples: labelled rows with images.

    Raises:
        Mi2rageError: a command failed.
    """
    modules: set[str] = set()
    images = out / "images"
    predictions = out / "predictions.jsonl"
    generate = ["generate", str(bundle), *_PROMPTS, "--out", str(images), "--json"]
    _call(generate, modules)
    pictures = sorted(images.glob("*.png"))
    caption = ["caption", str(bundle), *map(str, pictures), "--json"]
    captions = json.loads(_call(caption, modules))
    predict = ["predict", str(bundle), str(samples), "--out", str(predictions), "--json"]
    _call(predict, modules)
    gold = [str(sample.label) for sample in read_samples(samples)]
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    return StandaloneRun(
        metrics=relation_metrics(gold, [row["relation"] for row in rows]),
        commands=tuple("mi2rage-rt " + " ".join(words) for words in (generate, caption, predict)),
        prompts=_PROMPTS,
        images=tuple(pictures),
        captions=tuple(row["caption"] for row in captions["captions"]),
        modules=frozenset(modules),
    )
