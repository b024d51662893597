"""Triton's python-backend models of a bundle: classifier, captioner and generator around graphs that Triton runs.

The loops are the runtime's own (`RuntimeGenerator` and its like); their engines are requests to the graphs' models.
Requests that Triton hands over together are computed together, and a bad one fails alone.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mi2rage_engines.engine import Array
from mi2rage_engines.errors import BundleError, DataError
from mi2rage_engines.validation import first_problem
from mi2rage_rt.serve.refusals import refusal_from_error
from mi2rage_rt.serve.tensors import MODELS
from mi2rage_rt.triton_engine import TritonEngine
from mi2rage_rt.triton_loops import COMPONENT_FILE, ServedComponent, Work, open_loop

__all__ = ["BundleModel"]


class BundleModel:
    """What `TritonPythonModel` in a version folder's `model.py` derives from; Triton calls its methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the component; its graphs are first called by a request, for Triton loads models in any order.

        Raises:
            BundleError: the version folder is damaged, or not of this release.
        """
        import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton brings it

        self._pb = pb_utils
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = {
            key: str(value["string_value"]) for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        served = _served(folder / COMPONENT_FILE)
        on_device = settings.get("tensors_on_device") == "true"
        engines = {
            str(name): TritonEngine(pb_utils, served.graphs[name], graph, on_device=on_device)
            for name, graph in served.component.graphs.items()
            if name in served.graphs
        }
        self.loop = open_loop(served, engines, folder, int(settings["batch_size"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in their order."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[Hashable, dict[int, Work]] = {}
        for place, request in enumerate(requests):
            try:
                work = self._read(request)
            except Exception as error:  # of whatever kind, the request is answered and the others go on
                responses[place] = self._refused(error)
            else:
                groups.setdefault(work.key, {})[place] = work
        for group in groups.values():
            for place, response in self._answered(group).items():
                responses[place] = response
        return responses

    def _read(self, request: Any) -> Work:
        inputs: dict[str, Array] = {}
        for spec in MODELS[self.loop.name].inputs:
            tensor = self._pb.get_input_tensor_by_name(request, spec.name)
            if tensor is not None:
                inputs[spec.name] = tensor.as_numpy()
            elif not spec.optional:
                raise DataError(f"{self.loop.name}: no input {spec.name}; expected {spec.meaning}")
        given = json.loads(request.parameters() or "{}")
        # Triton's own: what it adds to requests, and the timeout that its queue sees to.
        own = {name: value for name, value in given.items() if name != "timeout_ms" and not name.startswith("triton_")}
        work = self.loop.read(inputs, own)
        if not work.rows:
            raise DataError(f"{self.loop.name}: no rows; expected at least one")
        return work

    def _answered(self, group: Mapping[int, Work]) -> dict[int, Any]:
        """The responses of requests that share a key; where their run fails, each is computed alone."""
        every = [row for work in group.values() for row in work.rows]
        key = next(iter(group.values())).key
        try:
            outputs = self.loop.run(Work(every, key))
        except Exception as error:
            if len(group) == 1:
                return dict.fromkeys(group, self._refused(error))
            return {place: self._answered({place: work})[place] for place, work in group.items()}
        responses, start = {}, 0
        for place, work in group.items():
            end = start + len(work.rows)
            tensors = [self._pb.Tensor(name, np.ascontiguousarray(array[start:end])) for name, array in outputs.items()]
            responses[place] = self._pb.InferenceResponse(output_tensors=tensors)
            start = end
        return responses

    def _refused(self, error: Exception) -> Any:
        """An error for the client, without a stack trace."""
        message = str(refusal_from_error(error))
        return self._pb.InferenceResponse(output_tensors=[], error=self._pb.TritonError(message))


def _served(path: Path) -> ServedComponent:
    try:
        return ServedComponent.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); write the repository again") from error
    except ValidationError as error:
        raise BundleError(
            f"{path}: {first_problem(error)}; expected what 'mi2rage-rt triton' of this release writes; write the "
            "repository again"
        ) from error
