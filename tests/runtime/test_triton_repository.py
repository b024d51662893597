"""The repository on disk: configurations by Triton's own schema, files, plans, refusals, the command."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("tritonclient.grpc")

from tritonclient.grpc import model_config_pb2

from mi2rage_engines.bundle import open_manifest, record_files
from mi2rage_engines.errors import BundleError, InputError
from mi2rage_engines.plan import PlanRecord, PlanRequest, graph_sha256_from_manifest
from mi2rage_engines.spec import AxisRange
from mi2rage_engines.trt_attest import Attestation
from mi2rage_rt import cli, triton_repository
from mi2rage_rt.serve.tensors import MODELS
from mi2rage_rt.triton_config import TritonOptions, text_from_config
from mi2rage_rt.triton_repository import write_repository
from tests.runtime.fake_triton import read_config

TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "INT32": "TYPE_INT32", "UINT64": "TYPE_UINT64"}


def configs(repository: Path) -> dict[str, Any]:
    found = {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}
    assert all(name == config.name for name, config in found.items())
    return found


@pytest.fixture(scope="session")
def exported_repository(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(exported_bundle, place, TritonOptions(max_batch=5, threads=3, instances=2))
    return place


def test_configurations_say_what_the_graphs_take(exported_repository: Path, exported_bundle: Path) -> None:
    found = configs(exported_repository)
    graphs = open_manifest(exported_bundle).graphs
    del graphs["generator/unet"]  # `denoise_step` holds it
    assert set(found) == {name.replace("/", "_") for name in graphs} | set(MODELS)
    for name, graph in graphs.items():
        config = found[name.replace("/", "_")]
        for specs, tensors in ((graph.inputs, config.input), (graph.outputs, config.output)):
            assert [tensor.name for tensor in tensors] == [spec.name for spec in specs]
            for spec, tensor in zip(specs, tensors, strict=True):
                full = [axis if isinstance(axis, int) else -1 for axis in spec.shape] or [1]
                assert list(tensor.dims) == full[1 if config.max_batch_size else 0 :]
        assert config.platform == "onnxruntime_onnx"
        assert config.parameters["intra_op_thread_count"].string_value == "3"
        assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    batched = {name for name, config in found.items() if config.HasField("dynamic_batching")}
    graphs_batched = {"generator_text_encoder", "generator_vae_decoder", "classifier_image", "captioner_vision"}
    assert batched == graphs_batched | set(MODELS)
    assert all(found[name].max_batch_size == (5 if name in batched else 0) for name in found)


def test_every_graph_is_run_once_before_it_counts_as_ready(exported_repository: Path, exported_bundle: Path) -> None:
    """The warm-up's own inputs, given to the graph: shapes that it takes."""
    import onnxruntime

    for name in open_manifest(exported_bundle).graphs:
        folder = exported_repository / name.replace("/", "_")
        if not folder.is_dir():
            continue
        config = read_config(folder / "config.pbtxt")
        (warmup,) = config.model_warmup
        assert warmup.batch_size == 1 and set(warmup.inputs) == {tensor.name for tensor in config.input}
        session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
        feeds = {}
        for node in session.get_inputs():
            dims = [1] * bool(config.max_batch_size) + list(warmup.inputs[node.name].dims)
            kind = {"tensor(float)": np.float32, "tensor(int64)": np.int64}[node.type]
            feeds[node.name] = np.zeros(dims if node.shape else (), kind)
        session.run(None, feeds)


def test_services_have_the_tensors_of_the_server(exported_repository: Path, exported_bundle: Path) -> None:
    found = configs(exported_repository)
    classifier = open_manifest(exported_bundle).classifier
    assert classifier is not None
    for name, tensors in MODELS.items():
        config = found[name]
        assert config.backend == "python" and config.instance_group[0].count == 2
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 128
        for wanted, given in ((tensors.inputs, config.input), (tensors.outputs, config.output)):
            assert [(tensor.name, TYPES[tensor.datatype]) for tensor in wanted] == [
                (tensor.name, model_config_pb2.DataType.Name(tensor.data_type)) for tensor in given
            ]
        assert [tensor.optional for tensor in tensors.inputs] == [tensor.optional for tensor in config.input]
    logits = next(tensor for tensor in found["classifier"].output if tensor.name == "logits")
    assert list(logits.dims) == [len(classifier.labels)]


def test_on_a_gpu(bundle_folder: Path, tmp_path: Path) -> None:
    write_repository(bundle_folder, tmp_path / "repository", TritonOptions(kind="gpu"))
    found = configs(tmp_path / "repository")
    for name, config in found.items():
        kind = model_config_pb2.ModelInstanceGroup.KIND_CPU if name in MODELS else None
        assert config.instance_group[0].kind == (kind or model_config_pb2.ModelInstanceGroup.KIND_GPU)
        if name in MODELS:
            assert config.parameters["tensors_on_device"].string_value == "true"
        else:
            (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
            assert cuda.name == "cuda" and cuda.parameters["use_tf32"] == "0"
    # The usual sizes, for which kernels are chosen; the tiny graphs name none, and 4 is the default.
    assert found["captioner_vision"].model_warmup[0].inputs["pixel_values"].dims[0] == 4


def test_files_are_linked_and_whole(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(bundle_folder, tmp_path / "linked", TritonOptions(version=3))
    graph = tmp_path / "linked" / "generator_unet" / "3" / "model.onnx"
    assert graph.samefile(bundle_folder / "generator" / "unet" / "model.onnx")
    assert not (tmp_path / "linked" / "generator_unet" / "1").exists()
    before = record_files(bundle_folder)

    def refuse(*given: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(triton_repository.os, "link", refuse)
    write_repository(bundle_folder, tmp_path / "copied")
    copy = tmp_path / "copied" / "generator_unet" / "1" / "model.onnx"
    assert copy.read_bytes() == graph.read_bytes() and not copy.samefile(graph)
    assert record_files(bundle_folder) == before


def test_weights_outside_a_graph_come_along(bundle_folder: Path, tmp_path: Path) -> None:
    """Its own, and those it shares with another graph; not those of others in the folder."""
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder, bundle)
    folder = bundle / "generator" / "unet"
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    (folder / "other.onnx_data").write_bytes(b"of another graph")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"] = {name: record.model_dump() for name, record in record_files(bundle).items()}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    write_repository(bundle, tmp_path / "repository")
    version = tmp_path / "repository" / "generator_unet" / "1"
    assert sorted(path.name for path in version.iterdir()) == ["model.onnx", "model.onnx_data"]
    onnx.load(version / "model.onnx")  # finds them
    onnx.load(folder / "model.onnx")  # and refuses weights of which there are several links


def test_the_page_names_what_is_needed(bundle_folder: Path, tmp_path: Path) -> None:
    write_repository(bundle_folder, tmp_path / "cpu", TritonOptions(models=("classifier",)))
    page = (tmp_path / "cpu" / "README.md").read_text()
    assert "nvcr.io/nvidia/tritonserver:" in page and "--gpus" not in page and "pip install mi2rage-rt" in page
    assert "| `tokens` | BYTES |" in page.replace("| in ", "") and "`generator`" not in page
    write_repository(bundle_folder, tmp_path / "gpu", TritonOptions(kind="gpu"))
    assert "--gpus=all" in (tmp_path / "gpu" / "README.md").read_text()


def add_plan(bundle: Path, name: str, profiles: tuple[dict[str, AxisRange], ...], version: str = "10.9.0") -> Path:
    """A file that passes for a TensorRT plan, with its record."""
    manifest = open_manifest(bundle)
    content = b"plan of " + name.encode()
    request = PlanRequest(
        graph_sha256=graph_sha256_from_manifest(manifest, manifest.graphs[name].file),
        backend="tensorrt",
        version=version,
        cuda="12",
        capabilities=("sm89",),
        device=None,
        platform="Linux-x86_64",
        profiles=profiles,
        precision="fp32",
        is_mixed=False,
        optimization_level=None,
        workspace_bytes=None,
        tf32=False,
    )
    record = PlanRecord(
        schema_version=1,
        graph=name,
        request=request,
        plan_sha256=hashlib.sha256(content).hexdigest(),
        plan_bytes=len(content),
        attestation=Attestation(
            source="network", asked="fp32", layers={}, heavy_layers={}, network_heavy_layers={}, share=1.0
        ),
        build_seconds=1.0,
        tool_versions={},
    )
    path = bundle / "plans" / "sm89" / f"{name.replace('/', '-')}.plan"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.with_suffix(".json").write_text(record.model_dump_json())
    return path


@pytest.fixture
def planned(bundle_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    return tmp_path / "bundle"


GPU = TritonOptions(platform="tensorrt", kind="gpu")
BATCH = {"batch": AxisRange(min=1, opt=2, max=4), "height": AxisRange(min=2, opt=2, max=2)}


def test_plans_take_the_place_of_graphs(planned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = add_plan(planned, "generator/vae_decoder", (BATCH, {**BATCH, "batch": AxisRange(min=1, opt=1, max=6)}))
    add_plan(planned, "captioner/vision", ({"batch": AxisRange(min=1, opt=2, max=3)},))
    add_plan(planned, "generator/unet", (BATCH,))
    written = {model.name: model for model in write_repository(planned, tmp_path / "repository", GPU)}
    found = configs(tmp_path / "repository")
    vae = found["generator_vae_decoder"]
    assert vae.platform == "tensorrt_plan" and vae.max_batch_size == 6
    assert list(vae.instance_group[0].profile) == ["0", "1"]
    assert (tmp_path / "repository" / "generator_vae_decoder" / "1" / "model.plan").samefile(plan)
    assert not vae.optimization.HasField("execution_accelerators")
    # Triton's TensorRT backend takes no scalar, such as this UNet's timestep.
    assert written["generator_unet"].runs_on == "onnxruntime" and "scalar input" in caplog.text
    assert found["generator"].parameters["batch_size"].string_value == "6"
    assert found["captioner"].parameters["batch_size"].string_value == "3"
    assert found["classifier"].parameters["batch_size"].string_value == "8"
    assert "TensorRT 10.9.0 for sm89" in (tmp_path / "repository" / "README.md").read_text()


def test_plans_that_do_not_fit_are_refused(planned: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="plans for no target"):
        write_repository(planned, tmp_path / "repository", GPU)
    add_plan(planned, "generator/unet", (BATCH,))
    with pytest.raises(BundleError, match="no plan of a graph that is needed"):
        write_repository(planned, tmp_path / "repository", GPU)
    plan = add_plan(planned, "captioner/vision", ())
    add_plan(planned, "generator/vae_decoder", (BATCH,), version="10.8.0")
    with pytest.raises(BundleError, match=r"10\.8\.0 and 10\.9\.0"):
        write_repository(planned, tmp_path / "repository", GPU)
    plan.write_bytes(b"another file")
    with pytest.raises(BundleError, match="build it again"):
        write_repository(planned, tmp_path / "repository", GPU)
    with pytest.raises(BundleError, match="expected sm90"):
        write_repository(planned, tmp_path / "repository", TritonOptions("tensorrt", "sm90", "gpu"))
    with pytest.raises(InputError, match="plans run on GPUs alone"):
        TritonOptions(platform="tensorrt")
    assert not (tmp_path / "repository").exists()


def test_what_is_there_stays(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "repository"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        write_repository(bundle_folder, place)

    def fail(*given: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(triton_repository, "page_from_models", fail)
    with pytest.raises(OSError, match="disk full"):
        write_repository(bundle_folder, place, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["repository"] and (place / "mine.txt").exists()
    monkeypatch.undo()
    write_repository(bundle_folder, place, force=True)
    assert not (place / "mine.txt").exists() and (place / "README.md").exists()


@pytest.mark.parametrize("where", ["", "triton", ".."])
def test_a_repository_lies_beside_the_bundle(bundle_folder: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(bundle_folder, tmp_path / "a" / "bundle")
    with pytest.raises(InputError, match="in the bundle"):
        write_repository(tmp_path / "a" / "bundle", tmp_path / "a" / "bundle" / where, force=True)
    open_manifest(tmp_path / "a" / "bundle")


def test_text_format_keeps_any_text() -> None:
    from google.protobuf import text_format

    name = 'a "b"\n\\ ü'
    text = text_from_config({"name": name, "input": [], "max_batch_size": 3})
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == name and config.max_batch_size == 3


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_command(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "repository"
    code, out, err = run(capsys, "triton", bundle_folder, "--out", place, "--models", "captioner, classifier", "--json")
    assert code == 0, err
    names = [model["name"] for model in json.loads(out)["models"]]
    assert names == ["captioner", "classifier", "captioner_vision", "captioner_decoder", "classifier_classifier"]
    code, _, err = run(capsys, "triton", bundle_folder, "--out", place)
    assert code == 2 and "--force" in err
    code, out, _ = run(capsys, "triton", bundle_folder, "--out", place, "--force")
    assert code == 0 and "generator_vae_decoder" in out
    code, _, err = run(capsys, "triton", bundle_folder, "--out", tmp_path / "b", "--models", "painter")
    assert code == 2 and "'painter'" in err
    code, _, err = run(capsys, "triton", tmp_path, "--out", tmp_path.parent / f"{tmp_path.name}-b")
    assert code == 2 and "bundle.json" in err
    code, _, err = run(capsys, "triton", bundle_folder, "--out", tmp_path / "b", "--platform", "tensorrt")
    assert code == 2 and "--kind gpu" in err
