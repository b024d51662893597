"""`python -m tests.packaging.kserve_fields FILE`: an InferenceService held against the KServe SDK's own classes.

Prints what they do not know: fields by their path, values of another type, required fields that lack. A process of its
own, since KServe's messages and Triton's client cannot live in one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kserve
import kubernetes.client
import yaml

_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "object": (object,),
    "datetime": (str,),
    "IntOrString": (int, str),
}


def faults(value: Any, kind: str, path: str) -> Iterator[str]:
    """What is wrong with a value that should be of a kind, in the words of the SDK's `openapi_types`."""
    container = re.fullmatch(r"(list|dict)[\[(](?:str, ?)?(.+)[\])]", kind, re.IGNORECASE)
    if container is not None:
        wanted = list if container[1].lower() == "list" else dict
        if not isinstance(value, wanted):
            yield f"{path}: is no {container[1]}"
            return
        pairs = enumerate(value) if isinstance(value, list) else value.items()
        for key, item in pairs:
            yield from faults(item, container[2], f"{path}[{key}]")
    elif kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]):
            yield f"{path}: {value!r} is no {kind}"
    else:
        known = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
        fields = {name: known.openapi_types[attribute] for attribute, name in known.attribute_map.items()}
        if not isinstance(value, dict):
            yield f"{path}: is no {kind}"
            return
        for name, inside in value.items():
            if name in fields:
                yield from faults(inside, fields[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}: is no field of {kind}"
        try:
            known(**{attribute: value.get(name) for attribute, name in known.attribute_map.items()})
        except ValueError as error:
            yield f"{path}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    document = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for fault in faults(document, "V1beta1InferenceService", "InferenceService"):
        print(fault)
