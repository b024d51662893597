"""The bundle in processes of its own: right answers, and no PyTorch in them."""

from pathlib import Path

import numpy as np
import pytest

from mi2rage_benchmarks.standalone import run_standalone
from mi2rage_engines.errors import Mi2rageError
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import Sample, Span, write_samples
from mi2rage_training.classifier_model import load_classifier
from mi2rage_training.evaluation import evaluate_pairs
from mi2rage_training.pairs import load_pairs


def test_the_runtime_answers_as_pytorch_does(exported_bundle: Path, tiny_classifier: Path, tmp_path: Path) -> None:
    reference = load_classifier(tiny_classifier)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encode_image(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)))
        label = reference.labels[i % len(reference.labels)]
        rows.append(Sample(f"s{i}", ("Ana", "met", f"Bo{i}"), Span(0, 1), Span(2, 3), label, f"{i}.png"))
    write_samples(tmp_path / "rows.jsonl", rows)
    run = run_standalone(exported_bundle, tmp_path / "rows.jsonl", tmp_path / "out")
    assert not run.torch_loaded
    assert "onnxruntime" in run.modules
    assert len(run.images) == len(run.captions) == 2
    assert run.metrics == evaluate_pairs(reference, load_pairs(tmp_path / "rows.jsonl"))


def test_a_failing_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(Mi2rageError, match="exit code 2"):
        run_standalone(tmp_path / "nothing", tmp_path / "rows.jsonl", tmp_path / "out")
