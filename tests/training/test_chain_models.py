"""`synthesize --bundle`: the bundle's models, how the store knows them, and that no PyTorch is needed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi2rage_engines import open_engine
from mi2rage_engines.bundle import record_files
from mi2rage_engines.errors import BundleError, InputError
from mi2rage_rt.bundle import Bundle
from mi2rage_rt.captioner import CaptionOptions
from mi2rage_rt.cli import main
from mi2rage_rt.generator import GenerateOptions
from mi2rage_rt.images import encode_image
from mi2rage_rt.samples import write_samples
from mi2rage_training import chain_models
from mi2rage_training.chain import ChainConfig, ImageFormat, synthesize
from mi2rage_training.chain_models import Sampling, models_from, models_from_bundle
from mi2rage_training.pairs import Pair
from mi2rage_training.pytorch_captioner import CaptionDecoding
from mi2rage_training.stages import Overlap
from mi2rage_training.store import read_store
from tests.runtime.tiny_bundle import build_bundle
from tests.training.fakes import samples

FAST = ("--links", "2", "--shard-size", "4", "--image-format", "jpeg", "--jpeg-quality", "70", "--json")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("models") / "bundle")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_samples(path, samples(10))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `mi2rage-rt words...`."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def shards(store: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(store.glob("*.parquet"))]


def changed(bundle: Path, folder: Path, change: Any) -> Path:
    """A whole copy of the bundle, of the same name, with another manifest."""
    copy = folder / bundle.name
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "bundle.json").read_text())
    change(copy, document)
    document["files"] = {name: record.model_dump() for name, record in record_files(copy).items()}
    (copy / "bundle.json").write_text(json.dumps(document))
    return copy


def test_a_bundle_makes_what_its_models_make_one_after_the_other(
    bundle: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("synthesize", rows, tmp_path / "store", "--bundle", bundle, *FAST, "--steps", 5, "--guidance", 2)
    code, out, err = run(capsys, *words)
    summary = json.loads(out)
    assert (code, summary["candidates"], summary["shards"]) == (0, 20, 3), err
    opened = Bundle.open(bundle)
    models = opened.generator(GenerateOptions(steps=5, guidance_scale=2)), opened.captioner(CaptionOptions())
    config = ChainConfig(links=2, shard_size=4, image_format=ImageFormat.JPEG, jpeg_quality=70)
    synthesize([Pair(sample) for sample in samples(10)], tmp_path / "slow", *models, config, overlap=Overlap())
    assert len(shards(tmp_path / "store")) == 3
    assert shards(tmp_path / "store") == shards(tmp_path / "slow")
    first = next(read_store(tmp_path / "store"))
    assert first.provenance.models == {"generator": "tiny-generator", "captioner": "tiny-captioner"}


@pytest.mark.parametrize("in_flight", [1, 3])
def test_in_flight_changes_no_byte(
    in_flight: int, bundle: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("usual", ()), ("other", ("--in-flight", in_flight))):
        code, _, err = run(capsys, "synthesize", rows, tmp_path / name, "--bundle", bundle, *FAST, *more)
        assert code == 0, err
    for file in sorted((tmp_path / "usual").iterdir()):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name


def _other_weights(copy: Path, document: dict[str, Any]) -> None:
    (copy / "generator" / "unet" / "model.onnx.data").write_bytes(b"other weights")


def _other_schedule(copy: Path, document: dict[str, Any]) -> None:
    document["generator"]["schedules"][0]["sample_coefficient"][0] += 0.25


def _other_captions(copy: Path, document: dict[str, Any]) -> None:
    document["captioner"]["max_new_tokens"] += 1


def test_a_store_begun_with_another_bundle_is_refused(
    bundle: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("synthesize", rows, tmp_path / "store", *FAST, "--bundle")
    assert run(capsys, *words, bundle)[0] == 0
    moved = changed(bundle, tmp_path / "moved", lambda copy, document: None)
    assert run(capsys, *words, moved)[0] == 0  # where it lies makes nothing another
    for number, change in enumerate((_other_weights, _other_schedule, _other_captions)):
        other = changed(bundle, tmp_path / f"{number}", change)
        code, _, err = run(capsys, *words, other)
        component = "captioner" if change is _other_captions else "generator"
        assert (code, "was begun with other settings" in err) == (2, True), err
        assert models_from_bundle(other, Sampling(), "cpu").described[f"{component}_sha256"] in "".join(err.split())
    code, _, err = run(capsys, *words, bundle, "--steps", 5)
    assert (code, "was begun with other settings" in err) == (2, True), err


def _with_prefixes(copy: Path, document: dict[str, Any]) -> None:
    document["captioner"]["text_prefixes"] = ["{head} by {tail} ,"]


def test_texts_begin_as_the_bundles_captioner_proposes(
    bundle: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictured = [dataclasses.replace(sample, image="a.png") for sample in samples(2)]
    write_samples(tmp_path / "pictured.jsonl", pictured)
    (tmp_path / "a.png").write_bytes(encode_image(np.zeros((4, 4, 3), np.uint8)))
    given = ("--given", "image", "--links", 1)
    for name, source in (("usual", bundle), ("own", changed(bundle, tmp_path / "moved", _with_prefixes))):
        code, _, err = run(
            capsys, "synthesize", tmp_path / "pictured.jsonl", tmp_path / name, "--bundle", source, *given
        )
        assert code == 0, err
    usual, own = (next(read_store(tmp_path / name)).prompt for name in ("usual", "own"))
    assert " by " not in usual and " by " in own


def test_options_reach_the_bundles_models(bundle: Path) -> None:
    models = models_from_bundle(bundle, Sampling(5, 1.0, CaptionDecoding(3, 0.5, 2.0)), "auto")
    assert models.generator.options == GenerateOptions(steps=5, guidance_scale=1.0)  # type: ignore[attr-defined]
    written = CaptionOptions(beams=3, top_p=0.5, temperature=2.0)
    assert models.captioner.options == written  # type: ignore[attr-defined]
    described = models.described
    assert (described["bundle"], described["steps"], described["guidance_scale"]) == ("bundle", 5, 1.0)
    assert described["decoding"] == {"beams": 3, "top_p": 0.5, "temperature": 2.0}
    usual = models_from_bundle(bundle, Sampling(), "cpu").described
    assert (usual["steps"], usual["guidance_scale"], usual["height"], usual["width"]) == (3, 3.0, 4, 4)


def test_small_models_on_a_cpu_have_a_thread_and_a_shard_for_each_core(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    load = open_engine.OrtEngine.__init__

    def loaded(self: Any, *args: Any, threads: int | None = None, **kwargs: Any) -> None:
        asked.append(threads)
        load(self, *args, threads=threads, **kwargs)

    monkeypatch.setattr(open_engine.OrtEngine, "__init__", loaded)
    small = models_from_bundle(bundle, Sampling(), "cpu", threads=3)
    assert (small.overlap, set(asked)) == (Overlap(3, models_free=True), {1})
    asked.clear()
    monkeypatch.setattr(chain_models, "_SMALL_BYTES", 10)
    large = models_from_bundle(bundle, Sampling(), "cpu", threads=3)
    assert (large.overlap, set(asked)) == (Overlap(2, models_apart=True), {3})
    assert large.described == small.described


@pytest.mark.parametrize("part", ["generator", "captioner"])
def test_a_bundle_without_one_of_the_models_is_refused(
    part: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_bundle(tmp_path / "bundle", parts=(part,))
    missing = "captioner" if part == "generator" else "generator"
    code, _, err = run(capsys, "synthesize", rows, tmp_path / "store", "--bundle", folder)
    assert (code, f"this bundle has no {missing}; it has {part}" in " ".join(err.split())) == (2, True), err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("sampling", "device", "error", "said"),
    [
        (Sampling(steps=4), "auto", InputError, "steps 4: this bundle has no schedule of that length"),
        (Sampling(feature_cache=2), "auto", InputError, "feature cache 2: tiny-generator has no graphs for it"),
        (Sampling(), "cuda:1", InputError, "device 'cuda:1': a bundle runs on one of: auto, cpu, cuda"),
        (Sampling(), "cuda", InputError, "provider CUDAExecutionProvider: is not in this onnxruntime"),
    ],
)
def test_what_a_bundle_cannot_do_is_said_before_anything_is_made(
    sampling: Sampling, device: str, error: type[Exception], said: str, bundle: Path
) -> None:
    if device == "cuda" and _has_cuda():
        pytest.skip("ONNX Runtime has CUDA here")
    with pytest.raises(error, match=said):
        models_from_bundle(bundle, sampling, device)


def _has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def test_a_bundle_and_other_models_are_one_too_many(bundle: Path) -> None:
    with pytest.raises(InputError, match="came with --generator a and --captioner b; expected a bundle alone"):
        models_from(bundle, "a", "b", Sampling(), "cpu")
    with pytest.raises(BundleError, match="no such folder"):
        models_from(bundle / "nowhere", None, None, Sampling(), "cpu")
    with pytest.raises(InputError, match="--feature-cache 2: came without --bundle; expected an exported bundle"):
        models_from(None, None, None, Sampling(feature_cache=2), "cpu")


def test_a_bundle_needs_no_pytorch(bundle: Path, rows: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'diffusers'):\n"
        "    sys.modules[name] = None\n"
        "from mi2rage_rt.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["synthesize", str(rows), str(tmp_path / "store"), "--bundle", str(bundle), *FAST]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["candidates"] == 20
