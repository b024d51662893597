"""The Open Inference Protocol, version 2, without a transport: what a request computes, and a model's metadata.

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mi2rage_engines.errors import DataError, InputError
from mi2rage_rt.classifier import softmax
from mi2rage_rt.serve.limits import Limits
from mi2rage_rt.serve.rows import (
    CaptionRow,
    RelationRow,
    caption_options,
    checked_parameters,
    generate_options,
    prompt_row,
    relation_row,
    short_text,
    words_from_json,
)
from mi2rage_rt.serve.service import Service
from mi2rage_rt.serve.tensors import MODELS
from mi2rage_rt.serve.wire import Inputs, Output

__all__ = ["EXTENSIONS", "VERSION", "infer", "metadata_tensors", "milliseconds", "wanted_outputs"]

VERSION = "1"
EXTENSIONS = ("binary_tensor_data",)

_TIMES = ("timeout", "timeout_ms")


async def infer(
    service: Service, model: str, inputs: Inputs, parameters: Mapping[str, Any], timeout_ms: float | None
) -> list[Output]:
    """Compute a request.

    Args:
        service: has the model, loaded.
        model: its name.
        inputs: as `rows_by_name` gives them.
        parameters: the request's own, without those of its transport.
        timeout_ms: what the transport says.

    Raises:
        InputError: a value is wrong.
        Mi2rageError: it could not be computed.
    """
    limits = service.limits
    wanted = [milliseconds(name, parameters[name]) for name in _TIMES if name in parameters]
    time_ms = service.timeout_ms(timeout_ms, *wanted)
    given = checked_parameters(model, {name: value for name, value in parameters.items() if name not in _TIMES})
    if model == "classifier":
        found = _relation_rows(inputs, limits)
        return _relation_outputs(service, await service.classify(found, time_ms))
    if model == "captioner":
        assert service.captioner is not None
        options = caption_options(service.captioner.model.options, given, limits)
        captions = await service.caption(_caption_rows(inputs, limits), options, time_ms)
        return [_texts(model, "caption", [caption.encode("utf-8") for caption in captions])]
    assert service.generator is not None
    spec = service.generator.model.spec
    making = generate_options(service.generator.model.options, given, (spec.height, spec.width), limits)
    rows = [
        prompt_row(_text("prompt", prompt), seed[0], limits)
        for prompt, seed in zip(inputs["prompt"], inputs["seed"], strict=True)
    ]
    return [_texts(model, "image", await service.generate(rows, making, time_ms))]


def milliseconds(name: str, value: Any) -> float:
    """A time limit in milliseconds; Triton's `timeout` comes in microseconds.

    Raises:
        InputError: it is no number above 0.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if isinstance(value, bool) or not 0 < number < 1e15:
        raise InputError(f"parameter {name} {str(value)[:40]!r}: expected a number above 0; give one")
    return number / 1e3 if name == "timeout" else number


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); expected text in UTF-8") from error


def _relation_rows(inputs: Inputs, limits: Limits) -> list[RelationRow]:
    images = inputs.get("image") or [b""] * len(inputs["tokens"])
    columns = (inputs["tokens"], inputs["head"], inputs["tail"], images)
    return [
        relation_row(words_from_json(words), head, tail, image, limits)
        for words, head, tail, image in zip(*columns, strict=True)
    ]


def _caption_rows(inputs: Inputs, limits: Limits) -> list[CaptionRow]:
    rows = []
    for place, image in enumerate(inputs["image"]):
        prefix = _text("prefix", inputs["prefix"][place]) if "prefix" in inputs else ""
        seed = inputs["seed"][place][0] if "seed" in inputs else None
        rows.append(CaptionRow(image, short_text("prefix", prefix, limits), seed))
    return rows


def _relation_outputs(service: Service, logits: np.ndarray[Any, Any]) -> list[Output]:
    assert service.classifier is not None
    shares = softmax(logits)
    labels = [service.classifier.model.labels[best].encode("utf-8") for best in shares.argmax(axis=-1)]
    rows = len(logits)
    outputs = {tensor.name: tensor for tensor in MODELS["classifier"].outputs}
    return [
        Output(outputs["relation"], (rows, 1), labels),
        Output(outputs["probability"], (rows, 1), shares.max(axis=-1)),
        Output(outputs["logits"], logits.shape, logits),
    ]


def _texts(model: str, name: str, values: Sequence[bytes]) -> Output:
    tensor = next(tensor for tensor in MODELS[model].outputs if tensor.name == name)
    return Output(tensor, (len(values), 1), values)


def metadata_tensors(model: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A model's inputs and outputs as its metadata lists them; -1 is any length."""
    tables = MODELS[model].inputs, MODELS[model].outputs
    inputs, outputs = (
        [{"name": tensor.name, "datatype": tensor.datatype, "shape": [-1, *tensor.shape]} for tensor in table]
        for table in tables
    )
    return inputs, outputs


def wanted_outputs(model: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the outputs asked for; all, where none is.

    Raises:
        InputError: one is unknown, or asked for twice.
    """
    known = [tensor.name for tensor in MODELS[model].outputs]
    for place, name in enumerate(names):
        if name not in known or name in names[:place]:
            fault = "asked for twice" if name in known else f"no output of the {model}"
            raise InputError(f"output {name[:60]!r}: {fault}; expected {', '.join(known)}, once each")
    return tuple(names) or tuple(known)
