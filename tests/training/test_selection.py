"""Selecting from a store: what is computed for which policy, what is written, the page; the teacher is a stand-in."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from mi2rage_engines.errors import DataError, InputError, ModelFolderError
from mi2rage_rt.images import decode_image, encode_image
from mi2rage_rt.samples import Sample, Span
from mi2rage_training import selection as selection_module
from mi2rage_training.embeddings import caption_similarity, clip_similarity, made_embeddings, text_embeddings
from mi2rage_training.fit import FitConfig, View
from mi2rage_training.microworld import models_folder
from mi2rage_training.pairs import load_pairs
from mi2rage_training.policies import Policy, PolicyConfig
from mi2rage_training.selection import SCORES_NAME, Selection, SelectionConfig, select, table_from_candidates
from mi2rage_training.selection_page import check_page, sampled_parents, write_selection_page
from mi2rage_training.store import Candidate, StoreWriter, read_store
from mi2rage_training.teacher import TeacherConfig, Teachers, TeacherScores
from mi2rage_training.teacher_folder import keep_teachers
from tests.training.fakes import LABELS, candidates


def drawn(parents: int = 12, links: int = 3) -> list[Candidate]:
    """Candidates with images of one colour each, and captions with characters that HTML minds."""
    rng = np.random.default_rng(0)
    return [
        dataclasses.replace(
            row,
            image=encode_image(np.full((24, 24, 3), rng.integers(0, 255, 3), np.uint8)),
            caption=f'a <b>man</b> & {row.provenance.link} "dogs"',
        )
        for row in candidates(parents, links)
    ]


def texts_of(rows: Sequence[Candidate], words: dict[str, str]) -> list[Candidate]:
    """The rows as made texts with a real image; `words` by id."""
    return [
        dataclasses.replace(
            row,
            made="text",
            caption=words[row.sample.id],
            via=row.image if row.provenance.link > 1 else None,
            sample=dataclasses.replace(
                row.sample, tokens=("Ana", "Bo", *words[row.sample.id].split()), head=Span(0, 1), tail=Span(1, 2)
            ),
        )
        for row in rows
    ]


def stored(folder: Path, rows: Sequence[Candidate]) -> Path:
    """A finished store of the rows."""
    writer = StoreWriter(folder, {"step": "test"})
    writer.write(0, rows)
    writer.finish(1)
    return folder


def teacher_scores(count: int) -> TeacherScores:
    """Scores that rise from link to link."""
    added = np.tile([-0.5, 0.0, 1.5], count // 3) + np.arange(count) / 1000
    return TeacherScores(added + 1, added, 1.25, np.ones(count), np.full((count, 3), 1 / 3), LABELS, (1.0,), 0.1, 0.1)


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the teachers; returns how many candidates each call was given."""
    calls: list[int] = []

    def fit(rows: Sequence[Candidate], _: TeacherConfig) -> tuple[None, TeacherScores]:
        calls.append(len(rows))
        return None, teacher_scores(len(rows))

    monkeypatch.setattr(selection_module, "fit_teachers", fit)
    return calls


def configured(policy: Policy, **limits: Any) -> SelectionConfig:
    """A selection with the embedded encoders."""
    return SelectionConfig(PolicyConfig(policy, **limits))


def test_the_best_two_by_added_information(tmp_path: Path, teachers: list[int]) -> None:
    result = select(stored(tmp_path / "c", drawn()), tmp_path / "s", SelectionConfig())
    assert teachers == [36]
    assert result.kept.reshape(-1, 3).tolist() == [[False, True, True]] * 12
    assert result.manifest.rows == 24
    kept = list(read_store(tmp_path / "s"))
    assert [row.provenance.link for row in kept] == [2, 3] * 12
    assert kept[1].added_nats == pytest.approx(1.502)
    assert kept[1].information_nats == pytest.approx(2.502)


def test_scores_have_a_row_for_every_candidate(tmp_path: Path, teachers: list[int]) -> None:
    select(stored(tmp_path / "c", drawn()), tmp_path / "s", SelectionConfig())
    rows = pq.read_table(tmp_path / "s" / SCORES_NAME).to_pylist()
    assert len(rows) == 36
    first = rows[0]
    assert first | {"weight": None, "added_nats": None, "information_nats": None} == {
        "id": "s0/0.1",
        "parent": "s0",
        "link": 1,
        "child": 0,
        "label": "None",
        "information_nats": None,
        "added_nats": None,
        "similarity": None,
        "weight": None,
        "kept": False,
        "reason": "dropped: per-parent limit (rank 3 of 3)",
    }
    assert rows[2]["reason"] == "kept: rank 1 of 3 siblings"
    assert sum(row["weight"] for row in rows[:3]) == pytest.approx(3)


@pytest.mark.parametrize(
    ("policy", "kept"), [(Policy.ALL, 36), (Policy.DIRECT, 12), (Policy.RANDOM, 12), (Policy.K_CENTRE, 12)]
)
def test_no_teacher_is_fitted_where_none_is_asked(
    policy: Policy, kept: int, tmp_path: Path, teachers: list[int]
) -> None:
    limit = None if policy is Policy.ALL else 1
    result = select(stored(tmp_path / "c", drawn()), tmp_path / "s", configured(policy, per_parent=limit))
    assert teachers == []
    assert (result.scores, result.weights, result.manifest.rows) == (None, None, kept)
    rows = pq.read_table(tmp_path / "s" / SCORES_NAME)
    assert rows["added_nats"].null_count == rows["weight"].null_count == rows["similarity"].null_count == 36


def test_diversity_and_similarity_compute_what_they_need(tmp_path: Path, teachers: list[int]) -> None:
    store = stored(tmp_path / "c", drawn())
    diverse = select(store, tmp_path / "d", configured(Policy.ADDED, per_parent=1, diversity=0.9))
    assert (diverse.manifest.rows, teachers) == (12, [36])
    alike = select(store, tmp_path / "s", configured(Policy.SIMILARITY, per_parent=1))
    assert alike.similarity is not None
    assert alike.kept.reshape(-1, 3).sum(1).tolist() == [1] * 12
    best = alike.similarity.reshape(-1, 3).argmax(1)
    assert np.array_equal(alike.kept.reshape(-1, 3).argmax(1), best)
    assert teachers == [36]


def test_a_second_run_with_other_settings_is_refused(tmp_path: Path, teachers: list[int]) -> None:
    store = stored(tmp_path / "c", drawn())
    select(store, tmp_path / "s", configured(Policy.ALL))
    select(store, tmp_path / "s", configured(Policy.ALL))
    with pytest.raises(InputError, match=r"config\.policy\.policy: was"):
        select(store, tmp_path / "s", configured(Policy.DIRECT))


def test_what_cannot_be_selected_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no candidates"):
        select(stored(tmp_path / "c", []), tmp_path / "s", SelectionConfig())
    with pytest.raises(InputError, match="expected it with similarity only"):
        SelectionConfig(similarity_model="x")
    row = drawn(1)[0]
    with pytest.raises(DataError, match="without a label"):
        table_from_candidates([dataclasses.replace(row, sample=dataclasses.replace(row.sample, label=None))])
    with pytest.raises(DataError, match=r"s0/0.1: has no caption.*--similarity-model"):
        caption_similarity([dataclasses.replace(row, caption=None)], "embedded")
    with pytest.raises(DataError, match="made image and text"):
        made_embeddings([row, dataclasses.replace(row, made="text")], FitConfig())


def test_embeddings_ignore_batch_and_padding() -> None:
    texts = ["a man", "a man on a beach with a red flag", "music"] * 30
    together = text_embeddings(texts, "embedded")
    alone = text_embeddings(texts[:1], "embedded", max_length=16)
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    assert together[0] == pytest.approx(together[87], abs=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01
    rows = drawn(3)
    images = made_embeddings(rows, FitConfig())
    assert images.shape[0] == 9
    assert images.mean(0) == pytest.approx(0, abs=1e-5)


def test_a_caption_like_the_sentence_is_more_similar() -> None:
    row = drawn(1)[0]
    same, other = (dataclasses.replace(row, caption=words) for words in (row.sample.text, "a plate of food"))
    found = caption_similarity([same, other], "embedded")
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] < 0.99


def test_made_texts_are_compared_with_the_first_texts_of_their_image() -> None:
    words = {"s0/0.1": "a man on a beach", "s0/0.2": "a man on a beach", "s0/0.3": "a plate of food"}
    found = caption_similarity(texts_of(drawn(1), words), "embedded")
    assert found[:2] == pytest.approx(1, abs=1e-5)
    assert found[2] < 0.99


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP model of random weights around the embedded generator's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = json.loads((Path(models_folder()) / "generator/tokenizer/tokenizer.json").read_text())
    size = max(words["model"]["vocab"].values()) + 1
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, "vocab_size": size, "eos_token_id": size - 1, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 24, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    for file in (Path(models_folder()) / "generator/tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "preprocessor_config.json").write_bytes(
        (Path(models_folder()) / "image_encoder/preprocessor_config.json").read_bytes()
    )
    return folder


def test_clip_scores_sentence_and_image(clip_folder: Path, tmp_path: Path) -> None:
    rows = drawn(30)
    found = clip_similarity(rows, str(clip_folder))
    assert found.shape == (90,)
    assert np.abs(found).max() <= 1 + 1e-6
    assert clip_similarity(rows[70:71], str(clip_folder))[0] == pytest.approx(found[70], abs=1e-5)
    config = SelectionConfig(PolicyConfig(Policy.SIMILARITY, per_parent=1), similarity_model=str(clip_folder))
    uncaptioned = [dataclasses.replace(row, caption=None) for row in rows]
    result = select(stored(tmp_path / "c", uncaptioned), tmp_path / "s", config)
    assert result.similarity == pytest.approx(found)
    with pytest.raises(ModelFolderError, match="no such similarity model folder"):
        clip_similarity(rows, str(tmp_path / "nowhere"))


def page_of(tmp_path: Path, rows: Sequence[Candidate], result: Selection, **settings: Any) -> str:
    """The page's HTML."""
    write_selection_page(tmp_path / "page.html", rows, result, **settings)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_shows_all_children_and_why(tmp_path: Path, teachers: list[int]) -> None:
    rows = drawn()
    result = select(stored(tmp_path / "c", rows), tmp_path / "s", SelectionConfig())
    page = page_of(tmp_path, rows, result, parents=6)
    assert page.count('<section class="parent">') == 6
    assert page.count('<li class="kept">') == 12
    assert page.count('<li class="dropped">') == 6
    assert page.count("per-parent limit (rank 3 of 3)") == 6
    assert page.count("<svg") == 2
    assert page.count('src="data:image/png;base64,') == 18
    assert "+1.50" in page
    assert "<b>24</b> of 36 candidates of 12 real samples" in page
    assert page.rstrip().endswith("</html>")
    assert page == page_of(tmp_path, rows, result, parents=6)


def test_the_page_needs_no_other_file_and_escapes_all(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    rows = [
        dataclasses.replace(
            row,
            caption=evil,
            prompt=f'"{evil}',
            sample=dataclasses.replace(
                row.sample,
                tokens=(evil, *row.sample.tokens[1:]),
                label=f"{evil}{row.sample.label}",
                provenance=dataclasses.replace(row.provenance, parent=f"{evil}{row.provenance.parent}"),
            ),
        )
        for row in drawn()
    ]
    result = select(stored(tmp_path / "c", rows), tmp_path / "s", configured(Policy.ALL))
    page = page_of(tmp_path, rows, result)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"https?://|(src|href)=\"(?!data:)", page)
    assert "<svg" not in page  # nothing was scored


def test_the_page_of_made_texts(tmp_path: Path) -> None:
    rows = drawn(3)
    rows = texts_of(rows, {row.sample.id: f"said {row.sample.id}" for row in rows})
    result = select(stored(tmp_path / "c", rows), tmp_path / "s", configured(Policy.DIRECT))
    page = page_of(tmp_path, rows, result)
    assert page.count('alt="the real image"') == 3
    assert page.count('<span class="none">') == 3  # link 1 describes the real image itself
    assert page.count("<img") == 9
    assert '<mark class="head">Ana</mark> <mark class="tail">Bo</mark> said s1/0.2' in page
    assert "not the first link" in page


def test_large_images_become_thumbnails(tmp_path: Path) -> None:
    big = encode_image(np.random.default_rng(0).integers(0, 255, (600, 400, 3), dtype=np.uint8))
    rows = [dataclasses.replace(row, image=big) for row in drawn(3, 1)]
    result = select(stored(tmp_path / "c", rows), tmp_path / "s", configured(Policy.ALL))
    page = page_of(tmp_path, rows, result)
    assert len(page) < 3 * len(big)
    import base64

    found = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert found is not None
    assert decode_image(base64.b64decode(found[1]), "thumbnail").shape == (256, 171, 3)


def test_parents_are_drawn_from_every_label_and_not_in_order() -> None:
    rows = drawn(60)
    shown = sampled_parents(rows, 9, seed=0)
    labels = [rows[found[0]].sample.label for found in shown.values()]
    assert {label: labels.count(label) for label in LABELS} == dict.fromkeys(LABELS, 3)
    assert all(len(found) == 3 for found in shown.values())
    assert set(shown) == set(sampled_parents(rows, 9, seed=0)) != set(sampled_parents(rows, 9, seed=1))
    assert set(shown) == set(sampled_parents(rows[::-1], 9, seed=0))


def test_overlapping_mentions_stay_whole(tmp_path: Path) -> None:
    row = drawn(1, 1)[0]
    sample = dataclasses.replace(row.sample, tokens=("New", "York", "Times", "x"), head=Span(0, 2), tail=Span(0, 3))
    assert isinstance(sample, Sample)
    rows = [dataclasses.replace(row, sample=sample)]
    result = select(stored(tmp_path / "c", rows), tmp_path / "s", configured(Policy.ALL))
    marked = '<mark class="head">New York</mark> <mark class="tail">Times</mark> x'
    assert marked in page_of(tmp_path, rows, result)


def test_a_page_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    check_page(None)
    check_page(tmp_path / "new.html")
    (tmp_path / "old.html").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        check_page(tmp_path / "old.html")


def test_teachers_are_kept_only_where_the_policy_fits_some(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teachers: to be kept with the policy random"):
        SelectionConfig(PolicyConfig(Policy.RANDOM), keep_teachers=tmp_path / "t")


def test_the_same_selection_again_keeps_its_teachers_and_another_is_refused(tmp_path: Path) -> None:
    def named(name: str) -> Teachers:
        return Teachers(name, (), (), View.TEXT, 0)

    folder = tmp_path / "t"
    folder.mkdir()
    described = {"name": "mine", "single": "text", "fold_seed": 0, "temperatures": [], "members": 1}
    (folder / "teachers.json").write_text(json.dumps(described))
    keep_teachers(named("mine"), folder)
    with pytest.raises(InputError, match=r"holds other teachers \(mine, these are theirs\)"):
        keep_teachers(named("theirs"), folder)
    (folder / "teachers.json").write_text("{")
    with pytest.raises(ModelFolderError, match="is damaged"):
        keep_teachers(named("mine"), folder)


def test_weights_reach_the_store_and_the_pairs(tmp_path: Path, teachers: list[int]) -> None:
    config = SelectionConfig(PolicyConfig(Policy.ADDED), weighted=True)
    result = select(stored(tmp_path / "c", drawn()), tmp_path / "s", config)
    assert result.kept.all()
    assert result.weights is not None
    pairs = load_pairs(tmp_path / "s")
    assert [pair.weight for pair in pairs] == result.weights.tolist()
    assert np.reshape([pair.weight for pair in pairs], (-1, 3)).mean(1) == pytest.approx(1.0)
    with pytest.raises(InputError, match="weights: asked for with the policy all"):
        SelectionConfig(PolicyConfig(Policy.ALL), weighted=True)
