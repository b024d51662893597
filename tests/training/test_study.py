"""The study's runner: recipes, resuming, and the real benchmark's recipes on tiny random models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import InputError, Mi2rageError
from mi2rage_rt.images import encode_image
from mi2rage_training import study_run
from mi2rage_training.chain_config import Given
from mi2rage_training.study_cells import CELLS, cells_of, comparisons_of
from mi2rage_training.study_material import Material, Place
from mi2rage_training.study_recipe import Recipe, read_recipe, recipe_names
from mi2rage_training.study_run import StudyConfig, run_study
from tests.models.tiny_captioner import build_captioner

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "mnre_sample"
SMALL = (
    "seeds=[0]",
    'given=["text"]',
    "data.world.train=30",
    "data.world.validation=12",
    "data.world.test=12",
    "teacher.steps=3",
    "student.steps=3",
)
FEW = (*SMALL, 'cells=["unimodal", "direct", "ccg-weighted", "mi2rage", "real"]')


def table(out: Path) -> list[Any]:
    """What the students of a finished study said."""
    study = json.loads((out / "study.json").read_text(encoding="utf-8"))
    return [{key: row[key] for key in ("setting", "cell", "seed", "pairs", "predicted")} for row in study["results"]]


def test_the_package_carries_the_four_recipes() -> None:
    assert recipe_names() == ["micro", "micro-quick", "mnre-image", "mnre-text"]
    for name in recipe_names():
        recipe = read_recipe(name)
        assert recipe.name == name
        for given in recipe.given:
            recipe.chain_of(given).config(given, 0, links=2, width=2)
            recipe.teacher.teacher(recipe.models, 0, "cpu")
    assert len(read_recipe("micro").seeds) >= 5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nothing", (), "no such recipe; expected one of micro"),
        ("micro", ("studen.steps=3",), "studen"),
        ("micro", ("student.steps=many",), "steps"),
        ("micro", ("student",), "KEY=VALUE"),
        ("micro", ("title.x=1",), "'title' holds a value"),
        ("micro", ("data.train=x.txt",), "expected either a world, or the files"),
        ("micro", ('cells=["magic"]',), "cell 'magic': is not known"),
        ("micro", ("seeds=[]",), "seeds"),
        ("micro", ("seeds=[0, 0]",), "seeds and given: expected each of them once"),
        ("micro", ('given=["text", "text"]',), "seeds and given: expected each of them once"),
        ("micro", ("given=[]",), "given"),
    ],
)
def test_wrong_recipes_are_refused(name: str, changes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_study(read_recipe(name, changes), StudyConfig(tmp_path / "study"))
    assert not (tmp_path / "study").exists()


def test_a_value_that_is_no_toml_is_a_string() -> None:
    assert read_recipe("micro", ("models.generator=stabilityai/sd-turbo",)).models.generator == "stabilityai/sd-turbo"


def test_every_question_names_rows_of_the_table() -> None:
    assert len(comparisons_of(CELLS, [Given.TEXT])) > 12
    assert [cell.spec.name for cell in cells_of(["real", "direct"])] == ["direct", "real"]
    assert comparisons_of(cells_of(["real", "direct"]), [Given.TEXT]) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "whole"
    run_study(read_recipe("micro-quick", FEW), StudyConfig(out))
    return out


def test_a_study_reports_every_cell(finished: Path) -> None:
    rows = table(finished)
    assert [row["cell"] for row in rows] == ["unimodal", "direct", "ccg-weighted", "mi2rage", "real"]
    assert {row["cell"]: row["pairs"] for row in rows} == {
        "unimodal": 30,
        "direct": 30,
        "ccg-weighted": 120,
        "mi2rage": 120,
        "real": 30,
    }
    report = (finished / "study.md").read_text(encoding="utf-8")
    assert "MI2RAGE" in report
    assert "deciding object" in report
    assert (finished / "report.html").is_file()


def test_a_study_that_was_stopped_ends_with_the_same_table(finished: Path, tmp_path: Path) -> None:
    """Killed in a process of its own, at a moment that the machine chooses, then gone on with."""
    out = tmp_path / "killed"
    changes = [part for change in FEW for part in ("--set", change)]
    command = [sys.executable, "-m", "mi2rage_rt.cli", "study", "--recipe", "micro-quick", "--out", str(out), *changes]
    process = subprocess.Popen([*command, "--jobs", "2"], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/*/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "study.json").exists()
    run_study(read_recipe("micro-quick", FEW), StudyConfig(out))
    assert table(out) == table(finished)


def test_several_students_of_a_row_answer_by_their_mean_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    labels: list[str] = []
    fit = study_run.fit_classifier
    # Two students lean to the second label a little, one is sure of the first: their mean is for it, their votes not.
    logits = iter([[0.0, 0.4], [0.0, 0.4], [5.0, 0.0]])

    def fitted(pairs: Any, config: Any, **kwargs: Any) -> Any:
        seeds.append(config.seed)
        return fit(pairs, config, **kwargs)

    def answers(classifier: Any, *splits: Any) -> list[Any]:
        labels[:] = classifier.labels
        row = np.full(len(labels), -9.0)
        row[:2] = next(logits)
        return [np.tile(row, (len(split), 1)) for split in splits]

    monkeypatch.setattr(study_run, "fit_classifier", fitted)
    monkeypatch.setattr(study_run, "logits_of_pairs", answers)
    changes = (*SMALL, 'cells=["unimodal"]', "students=3")
    result = run_study(read_recipe("micro-quick", changes), StudyConfig(tmp_path / "study"))
    assert len(set(seeds)) == 3
    (row,) = result.results
    assert set(row.predicted) == {labels[0]}


def test_one_store_at_a_time_is_held(tmp_path: Path) -> None:
    read: list[str] = []
    material = Material(read_recipe("micro"), Given.TEXT, 0, Place(tmp_path, Path(), "cpu"))

    def stored(name: str) -> list[Any]:
        read.append(name)
        return [name]

    material._stored = stored  # type: ignore[method-assign]
    for name in ("chain", "chain", "judged", "judged", "chain"):
        assert material.store(name) == [name]
    assert read == ["chain", "judged", "chain"]


def test_a_killed_process_of_a_study_is_said_to_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_run, "_run_job", _die)
    with pytest.raises(Mi2rageError, match=r"one of its processes was killed.*fewer --jobs"):
        run_study(read_recipe("micro-quick"), StudyConfig(tmp_path / "study", jobs=2))


def _die(*_: object) -> None:
    os._exit(9)


def test_a_folder_of_another_study_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"student: was .* is "):
        run_study(read_recipe("micro-quick", (*FEW, "student.steps=4")), StudyConfig(finished))
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="is no study"):
        run_study(read_recipe("micro-quick", FEW), StudyConfig(tmp_path))


def test_every_row_of_the_table_runs_with_images_given(tmp_path: Path) -> None:
    changes = (*SMALL, 'given=["image"]', "data.world.train=20")
    result = run_study(read_recipe("micro-quick", changes), StudyConfig(tmp_path / "study"))
    assert [row.cell for row in result.results] == [cell.spec.name for cell in CELLS]


def build_encoders(folder: Path) -> tuple[Path, Path]:
    """Tiny random BERT and CLIP, as transformers saves them."""
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

    from tests.models.vocabularies import bert_vocabulary, save_bert_tokenizer

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, image = folder / "text", folder / "image"
    save_bert_tokenizer(text)
    BertModel(BertConfig(**tower, vocab_size=len(bert_vocabulary()), max_position_embeddings=128)).save_pretrained(text)
    CLIPVisionModel(CLIPVisionConfig(**tower, image_size=24, patch_size=8)).save_pretrained(image)
    processor = {"size": {"shortest_edge": 24}, "crop_size": 24, "do_center_crop": True, "resample": 3}
    (image / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return text, image


def mnre_recipe(name: str, folder: Path, generator: Path, captioner: Path, **files: str) -> Recipe:
    """One of the real benchmark's recipes with tiny models and few steps."""
    text, image = build_encoders(folder)
    models = {"generator": generator, "captioner": captioner, "text_encoder": text, "image_encoder": image}
    changes = [f"models.{role}={path}" for role, path in models.items()]
    changes += [f"data.{split}={file}" for split, file in files.items()]
    changes += ["seeds=[0]", "teacher.folds=2", "models.steps=2"]
    for part in ("teacher", "student"):
        changes += [f"{part}.steps=2", f"{part}.width=16", f"{part}.heads=2", f"{part}.mixed_precision=no"]
    return read_recipe(name, tuple(changes))


def write_mnre_rows(folder: Path) -> None:
    """Rows in MNRE's format, written for this test, and their images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        (folder / "images" / split).mkdir(parents=True)
        rows = []
        for index in range(count):
            tokens = ["RT", "@x", ":", f"Ana{index}", "meets", "Bo", "Tan"]
            name = f"{split}{index}.jpg"
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            (folder / "images" / split / name).write_bytes(encode_image(pixels, "jpeg"))
            head, tail = {"name": f"Ana{index}", "pos": [3, 4]}, {"name": "Bo Tan", "pos": [5, 7]}
            label = ("None", "/per/per/peer", "/per/org/member_of")[index % 3]
            rows.append(repr({"token": tokens, "h": head, "t": tail, "img_id": name, "relation": label}))
        (folder / f"mnre_{split}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", ["mnre-text", "mnre-image"])
def test_the_real_benchmarks_recipes_run_on_rows_of_its_format(
    name: str, tiny_generator: Path, tiny_captioner: Path, tmp_path: Path
) -> None:
    write_mnre_rows(tmp_path / "data")
    recipe = mnre_recipe(name, tmp_path, tiny_generator, tiny_captioner)
    result = run_study(recipe, StudyConfig(tmp_path / "study", data=tmp_path / "data"))
    assert [row.cell for row in result.results] == [cell.spec.name for cell in CELLS]
    assert all(len(row.gold) == 4 for row in result.results)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"the real MNRE sample is not at {SAMPLE}")
@pytest.mark.parametrize("name", ["mnre-text", "mnre-image"])
def test_the_real_benchmarks_recipes_run_on_the_real_sample(name: str, tiny_generator: Path, tmp_path: Path) -> None:
    files = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
    captioner = build_captioner(tmp_path / "captioner", positions=128)  # real names are long in the tiny vocabulary
    recipe = mnre_recipe(name, tmp_path, tiny_generator, captioner, **files)
    result = run_study(recipe, StudyConfig(tmp_path / "study", data=SAMPLE))
    assert [row.cell for row in result.results] == [cell.spec.name for cell in CELLS]
    assert all(len(row.gold) == 5 for row in result.results)
