"""The cost of a data set: a measured piece of the chain, a store's own times, the command."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mi2rage_benchmarks import cost_store
from mi2rage_benchmarks.cost import CostReport, read_figures
from mi2rage_benchmarks.cost_run import STAGES, Piece, figures_of, run_piece
from mi2rage_benchmarks.cost_store import figures_of_store, kept_share_of
from mi2rage_engines.errors import DataError, EngineError, InputError
from mi2rage_rt import cli, progress
from mi2rage_rt.samples import write_samples
from mi2rage_training.chain import ChainConfig, Overlap, synthesize
from mi2rage_training.chain_models import ChainModels
from mi2rage_training.pairs import Pair
from mi2rage_training.selection import SCORES_NAME
from mi2rage_training.store import StoreWriter
from tests.runtime.tiny_bundle import build_bundle
from tests.training.fakes import MeanCaptioner, NoiseGenerator, candidates, samples

CONFIG = ChainConfig(links=2, shard_size=3)
PAIRS = [Pair(sample) for sample in samples(12)]


class SlowGenerator(NoiseGenerator):
    def generate(self, prompts, seeds):
        time.sleep(0.02)
        return super().generate(prompts, seeds)


class SlowCaptioner(MeanCaptioner):
    def caption(self, *args, **kwargs):
        time.sleep(0.01)
        return super().caption(*args, **kwargs)


def models(generator=None, captioner=None):
    return ChainModels(generator or NoiseGenerator(), captioner or MeanCaptioner(), {})


@pytest.mark.parametrize("overlap", [Overlap(), Overlap(2, models_apart=True)])
def test_a_piece_makes_what_synthesize_makes(tmp_path, overlap):
    measured, plain = NoiseGenerator(), NoiseGenerator()
    piece = run_piece(PAIRS, models(measured), CONFIG, overlap)
    manifest = synthesize(PAIRS, tmp_path / "store", plain, MeanCaptioner(), CONFIG)
    assert (piece.texts, piece.candidates, piece.held) == (12, manifest.rows, (6, 6, 6, 6))
    assert sorted(measured.calls) == sorted(plain.calls)
    assert piece.energy is None


def test_each_stage_is_clocked_by_itself():
    piece = run_piece(PAIRS, models(SlowGenerator(), SlowCaptioner()), CONFIG, Overlap())
    assert tuple(piece.stages_s) == STAGES
    # Four shards of two links: eight calls of each model.
    assert piece.stages_s["generate"] >= 8 * 0.02
    assert 8 * 0.01 <= piece.stages_s["caption"] < piece.stages_s["generate"]
    assert piece.stages_s["encode"] > 0
    assert piece.stages_s["write"] > 0
    assert sum(piece.stages_s.values()) <= piece.ends_s[-1], "one after the other, they cannot take longer than all"
    assert list(piece.ends_s) == sorted(piece.ends_s)


def test_side_by_side_stages_take_less_than_one_after_the_other():
    slow = models(SlowGenerator(), SlowCaptioner())
    piece = run_piece(PAIRS, slow, CONFIG, Overlap(2, models_apart=True))
    assert piece.stages_s["generate"] >= 8 * 0.02
    assert piece.ends_s[-1] >= 8 * 0.02


def test_an_error_of_a_model_comes_out_as_it_was_and_leaves_no_thread():
    class Broken(MeanCaptioner):
        def caption(self, *args, **kwargs):
            raise EngineError("broken")

    before = threading.active_count()
    with pytest.raises(EngineError, match="broken"):
        run_piece(PAIRS, models(captioner=Broken()), CONFIG, Overlap(2, models_apart=True), power=True)
    assert threading.active_count() == before


def piece_of(ends_s, held):
    return Piece(40, tuple(ends_s), tuple(held), dict.fromkeys(STAGES, 1.0), None)


def test_figures_leave_the_first_shards_out_of_the_pace():
    found = figures_of(piece_of((5.0, 6.0, 8.0, 10.0, 12.0), (10,) * 5), {}, Overlap(2), 7.0, "a device")
    assert found.shards_s == (2.0, 2.0, 2.0)
    assert found.candidate_s == pytest.approx(0.2)
    # Two shards at that pace would have taken 4 s, and took 6.
    assert (found.fill_s, found.load_s, found.candidates) == (2.0, 7.0, 50)


@pytest.mark.parametrize("held", [(10, 10), (10, 10, 0, 10)])
def test_too_few_shards_are_refused(held):
    with pytest.raises(InputError, match=r"--run|--shard-size"):
        figures_of(piece_of(range(1, len(held) + 1), held), {}, Overlap(2), 7.0, "a device")


@pytest.fixture
def store(tmp_path):
    synthesize(PAIRS, tmp_path / "store", NoiseGenerator(), MeanCaptioner(), CONFIG, {"steps": 4})
    return tmp_path / "store"


def dated(store, begun, shards, ended):
    for name, moment in {"settings.json": begun, "manifest.json": ended}.items():
        os.utime(store / name, (moment, moment))
    for number, moment in enumerate(shards):
        os.utime(store / f"shard-{number:05d}.parquet", (moment, moment))


def test_a_store_tells_by_its_files_what_it_took(store):
    dated(store, 100.0, (110.0, 113.0, 116.0, 119.0), 119.5)
    found = figures_of_store(store)
    assert found.shards_s == (3.0, 3.0, 3.0)
    assert found.candidate_s == pytest.approx(0.5)
    assert (found.fill_s, found.pauses, found.texts, found.candidates) == (7.0, 0, 12, 24)
    assert found.chain == {"links": 2, "width": 1, "shard_size": 3, "image_format": "png", "steps": 4}


def test_of_a_store_that_a_budget_ended_only_the_texts_that_were_begun_count(store):
    manifest = json.loads((store / "manifest.json").read_text())
    dropped = sorted(manifest["shards"])[2:]
    manifest["shards"] = {name: record for name, record in manifest["shards"].items() if name not in dropped}
    manifest["rows"] = 12
    for name in dropped:
        (store / name).unlink()
    (store / "manifest.json").write_text(json.dumps(manifest))
    dated(store, 100.0, (110.0, 113.0), 119.5)
    found = figures_of_store(store)
    assert (found.texts, found.candidates) == (6, 12)


def test_a_pause_of_the_run_is_left_out(store):
    dated(store, 100.0, (103.0, 106.0, 5000.0, 5003.0), 5003.0)
    found = figures_of_store(store)
    assert (found.shards_s, found.pauses, found.fill_s) == ((3.0, 3.0), 1, 0.0)


@pytest.mark.parametrize(
    ("begun", "shards", "ended"),
    [
        (100.0, (100.001, 100.002, 100.003, 100.004), 100.005),
        (200.0, (110.0, 113.0, 116.0, 119.0), 120.0),
        (100.0, (110.0, 113.0, 116.0, 119.0), 90.0),
    ],
)
def test_a_copied_store_is_refused(store, begun, shards, ended):
    dated(store, begun, shards, ended)
    with pytest.raises(DataError, match="copied"):
        figures_of_store(store)


@pytest.fixture
def selected(tmp_path):
    writer = StoreWriter(tmp_path / "selected", {"step": "select"})
    writer.write(0, candidates(3, 2))
    writer.finish(1)
    pq.write_table(pa.table({"id": [str(row) for row in range(24)]}), tmp_path / "selected" / SCORES_NAME)
    return tmp_path / "selected"


def test_a_selected_store_tells_the_share_that_is_kept(store, selected):
    assert SCORES_NAME == cost_store._SCORES
    assert kept_share_of(selected) == pytest.approx(6 / 24)
    with pytest.raises(InputError, match="--selected"):
        figures_of_store(selected)
    with pytest.raises(InputError, match="select"):
        kept_share_of(store)
    with pytest.raises(DataError, match="store"):
        kept_share_of(selected / "nowhere")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build_bundle(tmp_path_factory.mktemp("bundle"), ("generator", "captioner"))


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main(["cost", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    yield run
    progress.be_quiet(False)


def test_the_command_measures_plans_and_checks(call, bundle, tmp_path):
    out = tmp_path / "figures.json"
    piece = ("--run", 30, "--shard-size", 5, "--links", 2, "--device", "cpu", "--check", 40)
    wanted = ("--samples", 1_000_000, "--devices", 8, "--price-per-hour", 2.5, "--kept-share", 0.5, "--power")
    code, text, err = call(bundle, *piece, *wanted, "--out", out)
    assert (code, err) == (0, "")
    report = CostReport.model_validate_json(out.read_text(encoding="utf-8"))
    assert (report.figures.candidates, len(report.figures.shards_s)) == (60, 4)
    assert (report.plan.candidates, report.plan.devices) == (2_000_000, 8)
    assert report.plan.hours_low < report.plan.hours < report.plan.hours_high
    assert report.kept_per_hour == pytest.approx(0.5 * 3600 / report.figures.candidate_s)
    assert (report.check.texts, report.check.candidates) == (40, 80)
    assert report.figures.chain["links"] == 2
    assert report.figures.energy is not None
    for words in ("generate", "caption", "encode", "write", "1,000,000 kept samples", "50%", "check with 40 texts"):
        assert words in text
    code, text, err = call("--figures", out, "--samples", 500, "--json")
    assert (code, err) == (0, "")
    again = CostReport.model_validate_json(text)
    assert again.figures == report.figures == read_figures(out)
    assert (again.plan.candidates, again.check, again.kept_share) == (500, None, 1.0)


def test_the_command_reads_a_store_and_what_was_kept_of_it(call, store, selected):
    dated(store, 100.0, (110.0, 113.0, 116.0, 119.0), 119.5)
    code, text, err = call(store, "--selected", selected)
    assert (code, err) == (0, "")
    # Half a second a candidate, a quarter of them kept.
    assert "1,800 kept samples per device-hour" in text
    assert "25%" in text


def test_wrong_input_is_refused_with_2(call, bundle, store, tmp_path):
    write_samples(tmp_path / "few.jsonl", samples(4))
    (tmp_path / "other.json").write_text(json.dumps({"figures": 1}), encoding="utf-8")
    (tmp_path / "damaged.json").write_text("{", encoding="utf-8")
    only = build_bundle(tmp_path / "only", ("generator",))
    for arguments, words in (
        ((), ("neither",)),
        ((bundle, "--figures", "x.json"), ("--figures x.json",)),
        (("--figures", tmp_path / "none.json"), ("cannot be read",)),
        (("--figures", tmp_path / "damaged.json"), ("is no JSON",)),
        (("--figures", tmp_path / "other.json"), ("is no report of 'cost'",)),
        ((store, "--check", 5), ("--check", "bundle")),
        ((store, "--power"), ("--power", "bundle")),
        ((bundle, "--texts", tmp_path / "few.jsonl"), ("holds 4 texts", "128")),
        ((bundle, "--kept-share", 0), ("--kept-share", "above 0")),
        ((bundle, "--kept-share", 0.5, "--selected", store), ("--selected", "--kept-share")),
        ((bundle, "--device", "tpu"), ("tpu",)),
        ((bundle, "--run", 8, "--device", "cpu"), ("--run", "--shard-size")),
        ((only,), ("captioner",)),
        ((tmp_path / "nowhere",), ("nowhere",)),
    ):
        code, text, err = call(*arguments)
        assert (code, text) == (2, ""), (arguments, err)
        assert all(word in err for word in words), err


def test_figures_of_a_copied_bundle_are_those_of_a_run(call, bundle, tmp_path):
    """A texts file is read, and its first rows are what is measured with."""
    write_samples(tmp_path / "texts.jsonl", samples(40))
    moved = shutil.copytree(bundle, tmp_path / "moved")
    code, text, err = call(
        moved, "--texts", tmp_path / "texts.jsonl", "--run", 24, "--device", "cpu", "--links", 1, "--json"
    )
    assert (code, err) == (0, "")
    report = CostReport.model_validate_json(text)
    assert (report.figures.texts, report.figures.candidates, report.plan) == (24, 24, None)
