"""A fit that is stopped, however, goes on and ends with the very weights of one that was not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mi2rage_engines.errors import InputError
from mi2rage_rt.cli import main
from mi2rage_rt.samples import write_samples
from mi2rage_training.fit import Fit, FitConfig, discard_checkpoint, fit_classifier
from mi2rage_training.fit_loop import Trainer
from tests.training.fakes import samples
from tests.training.fit_fakes import fit_without_dropout, largest_difference, pairs, same_weights, weights_of

ROOT = Path(__file__).parents[2]
CONFIG = FitConfig(epochs=3, batch_size=4, seed=2, image_dropout=0.2, text_dropout=0.2, checkpoint_steps=2)


def fit(checkpoint: Path | None, config: FitConfig = CONFIG, count: int = 10) -> Fit:
    return fit_classifier(pairs(count), config, validation=pairs(6), checkpoint=checkpoint)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Raise in place of the step after `step` steps were done."""
    original = Trainer.train_step

    def train_step(trainer: Trainer) -> None:
        if trainer.state.step == step:
            raise KeyboardInterrupt
        original(trainer)

    patch.setattr(Trainer, "train_step", train_step)


@pytest.fixture(scope="module")
def whole() -> Fit:
    return fit(None)


@pytest.mark.parametrize(("stopped", "resumed"), [(1, 0), (2, 2), (5, 4), (8, 8)])
def test_a_stopped_fit_ends_with_the_same_weights(stopped: int, resumed: int, whole: Fit, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "c")
    again = fit(tmp_path / "c")
    assert again.resumed_at == resumed
    assert same_weights(weights_of(again), weights_of(whole))
    assert (again.losses, again.validation_f1, again.best_epoch) == (
        whole.losses,
        whole.validation_f1,
        whole.best_epoch,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation": 2, "mixed_precision": "bf16"},
        {"train_image_encoder": True},
        {"patience": 1, "epochs": 9},
    ],
)
def test_other_settings_go_on_too(settings: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, config)
    assert same_weights(weights_of(fit(tmp_path, config)), weights_of(fit(None, config)))


def test_a_finished_fit_is_returned_and_discarded(whole: Fit, tmp_path: Path) -> None:
    fit(tmp_path / "c")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 0)
        again = fit(tmp_path / "c")
    assert again.resumed_at == again.steps == 9
    assert same_weights(weights_of(again), weights_of(whole))
    discard_checkpoint(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, dataclasses.replace(CONFIG, epochs=1))
    with pytest.raises(InputError, match="epochs: was 1, came 2") as refused:
        fit(tmp_path, dataclasses.replace(CONFIG, epochs=2))
    assert "training pairs" not in str(refused.value)
    with pytest.raises(InputError, match="training pairs: was"):
        fit(tmp_path, dataclasses.replace(CONFIG, epochs=1), count=9)
    with pytest.raises(InputError, match="training pairs: was"):
        fit_classifier(
            pairs(10, [(1, 2, 3), (30, 220, 30), (30, 30, 220)]),
            dataclasses.replace(CONFIG, epochs=1),
            validation=pairs(6),
            checkpoint=tmp_path,
        )
    fit(tmp_path, dataclasses.replace(CONFIG, epochs=1, checkpoint_steps=None))  # how often is no matter
    with pytest.raises(InputError, match="is a file"):
        fit(tmp_path / "fit.pt", CONFIG)
    content = (tmp_path / "fit.pt").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no checkpoint"):
        (tmp_path / "fit.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as a checkpoint"):
            fit(tmp_path, CONFIG)


KILLED = """
import os, signal, sys
from mi2rage_training.fit_loop import Trainer

original = Trainer.train_step

def train_step(trainer):
    if trainer.state.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    original(trainer)

Trainer.train_step = train_step
from mi2rage_rt.cli import main
main(sys.argv[1:])
"""

LAUNCHED = """
import sys
sys.path.insert(0, sys.argv[1])
from mi2rage_rt.cli import main
from mi2rage_training.fit import is_main_process
from safetensors.torch import save_file
from tests.training import test_fit_checkpoint as test
from tests.training.fit_fakes import fit_without_dropout, weights_of

fit = fit_without_dropout(test.pairs(11), test.SHARED, validation=test.pairs(7))
if is_main_process():
    print(fit.losses, fit.validation_f1, file=sys.stderr)
    save_file(weights_of(fit), sys.argv[2])
main(sys.argv[3:])
"""

SHARED = FitConfig(epochs=2, batch_size=5, learning_rate=1e-4, image_dropout=0.2, gradient_accumulation=2, patience=5)


def python(*words: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with as many threads as here: their number may change sums."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | threads,
        timeout=240,
    )


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    summary: dict[str, Any] = json.loads(out)
    return summary


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    made = [dataclasses.replace(sample, image=f"{sample.id}.png") for sample in samples(13)]
    for row, pair in zip(made, pairs(13), strict=True):
        (folder / str(row.image)).write_bytes(pair.image if isinstance(pair.image, bytes) else b"")
    write_samples(folder / "rows.jsonl", made)
    return folder / "rows.jsonl"


def test_the_command_goes_on_after_a_kill(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the very weights; and its checkpoint is gone once the classifier is written."""
    words = ["--epochs", 2, "--batch-size", 4, "--validation", rows, "--device", "cpu"]
    kept = ["--checkpoint", tmp_path / "c", "--checkpoint-steps", 2]
    killed = python("-c", KILLED, "train", rows, tmp_path / "one", *words, *kept)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "one").exists()
    assert run(capsys, "train", rows, tmp_path / "one", *words, *kept)["resumed_at_step"] == 4
    assert not (tmp_path / "c").exists()
    assert run(capsys, "train", rows, tmp_path / "two", *words)["resumed_at_step"] == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_two_processes_fit_as_one_does(rows: Path, tmp_path: Path) -> None:
    """Up to dropout, which each process draws for itself, and 1e-5 for the order of sums after 6 steps of 1e-4."""
    (tmp_path / "launched.py").write_text(LAUNCHED)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    words = ["train", rows, tmp_path / "out", "--epochs", 1, "--batch-size", 5, "--device", "cpu", "--json"]
    two = python(
        *(*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0),
        *(tmp_path / "launched.py", ROOT, tmp_path / "two.safetensors", *words),
    )
    assert two.returncode == 0, two.stderr
    one = fit_without_dropout(pairs(11), SHARED, validation=pairs(7))
    assert largest_difference(load_file(tmp_path / "two.safetensors"), weights_of(one)) < 1e-5
    assert str(one.validation_f1) in two.stderr
    assert json.loads(two.stdout)["steps"] == 3  # one document: a single process prints
    assert (tmp_path / "out" / "model.safetensors").is_file()
