"""A real `tritonserver` over a written repository, as far as the one in the `nvidia-pytriton` wheel goes.

That server (Triton 24.10, of nvidia-pytriton 0.7.0) has no ONNX Runtime backend. So each graph's model is served by its
Python backend, with the tensors, batching and warm-up of its `config.pbtxt`; everything else is the repository as it
was written. Its stub crashes on NumPy 2, which Triton takes from 24.11 on, reads no PYTHONPATH, and belongs to no
environment: models are given the packages of ENV, which is one of its own.

    python3.11 -m venv ENV && ENV/bin/pip install nvidia-pytriton 'numpy<2' onnxruntime tokenizers pillow pyarrow
    MI2RAGE_PYTRITON=ENV python -m pytest tests/runtime/test_triton_server.py
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mi2rage_rt

_GRAPH_PY = """
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from pathlib import Path


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        feeds = {}
        for node in self.session.get_inputs():
            array = pb_utils.get_input_tensor_by_name(request, node.name).as_numpy()
            feeds[node.name] = array.reshape(()) if not node.shape else array
        try:
            found = self.session.run(None, feeds)
        except Exception as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)[:200]))
        names = [node.name for node in self.session.get_outputs()]
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in zip(names, found)]
        )
"""


def with_python_graphs(repository: Path, copy: Path, environment: Path) -> Path:
    """A copy of a repository whose graphs run in Python models."""
    packages = next((environment / "lib").glob("python*/site-packages"))
    root = Path(mi2rage_rt.__file__).parents[1]
    paths = [str(path) for path in (packages, root, root / "engines")]
    shutil.copytree(repository, copy)
    for graph in copy.glob("*/*/model.onnx"):
        (graph.parent / "model.py").write_text(_GRAPH_PY)
    for model in copy.glob("*/*/model.py"):
        model.write_text(f"import sys\n\nsys.path[:0] = {paths!r}\n{model.read_text()}")
    for graph in copy.glob("*/*/model.onnx"):
        config = graph.parents[1] / "config.pbtxt"
        text = config.read_text()
        # The parameters and the optimization are ONNX Runtime's own.
        text = re.sub(r"^(optimization|parameters) \{\n(?:  .*\n)*\}\n", "", text, flags=re.MULTILINE)
        config.write_text(text.replace('platform: "onnxruntime_onnx"', 'backend: "python"'))
    return copy


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextlib.contextmanager
def serving(repository: Path, environment: Path, log: Path) -> Iterator[tuple[int, int]]:
    """The HTTP and gRPC ports of a server that is ready."""
    version = next((environment / "lib").glob("python*")).name.removeprefix("python")
    packages = next((environment / "lib").glob("python*/site-packages"))
    server = packages / "pytriton" / "tritonserver"
    with tempfile.TemporaryDirectory() as place:
        backends = Path(place) / "backends"
        shutil.copytree(server / "backends", backends)
        stub = backends / "python" / "triton_python_backend_stub"
        shutil.copy(server / "python_backend_stubs" / version / stub.name, stub)
        http, grpc = _free_ports(2)
        # The stub's libraries lie beside it in the wheel, and it is run from elsewhere.
        paths = [str(packages / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--http-port={http}",
            f"--grpc-port={grpc}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--allow-metrics=false",
            "--disable-auto-complete-config",  # the configurations are whole
            "--exit-timeout-secs=10",
            f"--backend-config=python,shm-region-prefix-name=mi2rage{os.getpid()}",
        ]
        variables = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }
        with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=variables) as process:
            try:
                _wait(process, http, log)
                yield http, grpc
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"tritonserver ended with {process.returncode}: {log.read_text()[-3000:]}")
        try:
            if client.is_server_ready():
                return
        except Exception:  # not listening yet
            pass
        time.sleep(0.5)
    raise RuntimeError(f"tritonserver is not ready after 300 s: {log.read_text()[-3000:]}")
