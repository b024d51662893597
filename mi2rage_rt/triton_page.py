"""The README of a Triton model repository: what is in it, the container that serves it, what it takes and gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mi2rage_engines.plan import PlanRecord
from mi2rage_rt.extras import version_of
from mi2rage_rt.serve.tensors import MODELS, ModelTensors
from mi2rage_rt.triton_config import TritonOptions

__all__ = ["CONTAINER", "WrittenModel", "page_from_models"]

CONTAINER = "nvcr.io/nvidia/tritonserver:26.07-py3"
"""A release with ONNX Runtime's, TensorRT's and the Python backend."""


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenModel:
    """One model of the repository.

    Attributes:
        name: the folder's.
        runs_on: `onnxruntime`, `tensorrt` or `python`.
        max_batch: 0 where Triton does not batch it.
        source: the bundle's file, or the component.
    """

    name: str
    runs_on: str
    max_batch: int
    source: str


def page_from_models(
    models: Sequence[WrittenModel], options: TritonOptions, plans: Sequence[PlanRecord], folder: str
) -> str:
    """The page, in Markdown.

    Args:
        models: of the repository.
        options: it was written with.
        plans: the records of the TensorRT plans in it.
        folder: the repository's name.
    """
    services = [model.name for model in models if model.runs_on == "python"]
    parts = [
        f"# {folder}: a Triton model repository",
        f"Written by mi2rage-rt {version_of('mi2rage-rt') or 'unknown'}. Ask {_listed(services)}: they run the loops "
        "and call the graphs, which are models of their own.",
        _table(
            ("model", "runs on", "max_batch_size", "from"),
            ((f"`{m.name}`", m.runs_on, str(m.max_batch), f"`{m.source}`") for m in models),
        ),
        "## Serve",
        _serve_text(options, plans),
        "## Ask",
        "Shapes are those of one row; a request has a batch axis before them. BYTES are UTF-8 texts and whole image "
        "files.",
        *[_service_text(name, MODELS[name]) for name in services],
        "## Change",
        _change_text(options),
    ]
    return "\n\n".join(parts) + "\n"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _serve_text(options: TritonOptions, plans: Sequence[PlanRecord]) -> str:
    version = version_of("mi2rage-rt")
    package = f"mi2rage-rt=={version}" if version else "mi2rage-rt"
    gpus = "--gpus=all " if options.kind == "gpu" else ""
    text = f"""```sh
docker run --rm {gpus}--shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD:/models:ro" {CONTAINER} \\
  sh -c 'pip install {package} && exec tritonserver --model-repository=/models'
```

The Python models need the runtime package alone: no extra, no PyTorch; Triton from 24.11 on, whose Python backend takes
NumPy 2. For production put `RUN pip install {package}`
into an image of your own. Where the package is on no index, mount its wheel and install that. The server is ready
(`GET /v2/health/ready`) when every graph has run once. `/dev/shm` holds what goes between models; large images and
batches want more of it."""
    if plans:
        targets = sorted({"+".join(plan.request.capabilities) for plan in plans})
        text += (
            f"\n\nThe plans were built by TensorRT {plans[0].request.version} for {', '.join(targets)}. Another "
            "version refuses them: take the container whose TensorRT it is (NVIDIA's framework support matrix), or "
            "build the plans with the container's."
        )
    return text


def _service_text(name: str, tensors: ModelTensors) -> str:
    rows = [
        *(("in" + (", optional" if tensor.optional else ""), tensor) for tensor in tensors.inputs),
        *(("out", tensor) for tensor in tensors.outputs),
    ]
    table = _table(
        ("`" + name + "`", "tensor", "type", "shape", "what"),
        ((way, f"`{t.name}`", t.datatype, str(list(t.shape)), t.meaning) for way, t in rows),
    )
    if not tensors.parameters:
        return table
    listed = "; ".join(f"`{parameter.name}`, {parameter.meaning}" for parameter in tensors.parameters)
    return f"{table}\n\nParameters of a request: {listed}. Triton's HTTP clients may send them as texts."


def _change_text(options: TritonOptions) -> str:
    return f"""`config.pbtxt` is plain text: queue, batch, instances and warm-up are there to be tuned; `perf_analyzer`
measures. Of the Python models' `parameters`, `batch_size` is how many rows the graphs are called with, at most their
`max_batch_size`, and `tensors_on_device` keeps what one graph gives the next on the GPU. A new release goes into a
folder `{options.version + 1}` beside `{options.version}`; graphs and Python model are one release, so renew them
together."""
