"""What is installed, what the machine has, and what is missing, for people and bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mi2rage_engines.bundle import Manifest
from mi2rage_engines.errors import BundleError, InputError, MissingExtraError, require
from mi2rage_engines.open_engine import EngineOpener
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_rt.extras import extras, version_of

__all__ = ["examine", "examine_bundle", "text_from_findings"]

_PACKAGES = (
    "mi2rage-rt",
    "numpy",
    "pillow",
    "tokenizers",
    "pydantic",
    "pyarrow",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "diffusers",
    "onnx",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx",
    "kserve",
    "ray",
)


def examine() -> dict[str, Any]:
    """Versions, devices, ONNX Runtime's providers, extras and warnings, ready for JSON."""
    packages = {name: version_of(name) for name in _PACKAGES}
    gpus = _gpus()
    providers = _providers()
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": packages,
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": usable_cores()},
        "memory_bytes": _memory_bytes(),
        "gpus": gpus,
        "onnxruntime_providers": providers,
        "extras": {
            extra.name: {"missing": list(extra.missing), "install": extra.install if extra.missing else None}
            for extra in extras()
        },
        "warnings": _warnings(packages, gpus, providers),
    }


def examine_bundle(folder: Path) -> dict[str, Any]:
    """Whether a bundle is whole, what is in it, and the parity it was written with."""
    from mi2rage_rt.bundle import Bundle

    try:
        bundle = Bundle.open(folder)
    except BundleError as error:
        return {"path": str(folder), "whole": False, "error": str(error)}
    manifest = bundle.manifest
    return {
        "path": str(folder),
        "whole": True,
        "components": list(bundle.components),
        "precision": manifest.precision,
        "files": len(manifest.files),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "tool_versions": dict(manifest.tool_versions),
        "parity": [record.model_dump() for record in manifest.parity],
        "backends": _backends(folder, manifest),
    }


def _backends(folder: Path, manifest: Manifest) -> dict[str, str]:
    """For each graph what `--backend auto` would run it on, and why."""
    opener = EngineOpener(folder, manifest)
    sentences = {}
    for name in manifest.graphs:
        try:
            sentences[name] = opener.choice(name).sentence
        except InputError as error:
            sentences[name] = str(error)
    return sentences


def _warnings(packages: dict[str, str | None], gpus: list[dict[str, str]], providers: list[str]) -> list[str]:
    warnings = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall both, then install one of the extras 'cpu' and 'gpu'"
        )
    if not providers:
        warnings.append("no onnxruntime: a bundle cannot be run; pip install 'mi2rage-rt[cpu]' (or [gpu])")
    elif gpus and "CUDAExecutionProvider" not in providers:
        warnings.append(
            "there is an NVIDIA GPU, but this onnxruntime has no CUDA provider: "
            "pip uninstall onnxruntime, then pip install 'mi2rage-rt[gpu]'"
        )
    return warnings


def _providers() -> list[str]:
    try:
        return list(require("onnxruntime", "cpu").get_available_providers())
    except (MissingExtraError, ImportError):  # the second: a build whose libraries do not load
        return []


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "memory.total", "driver_version", "compute_cap")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        dict(zip(fields, (cell.strip() for cell in line.split(",")), strict=False))
        for line in answer.stdout.splitlines()
        if line.strip()
    ]


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def text_from_findings(findings: dict[str, Any]) -> str:
    """What `examine` (and `examine_bundle`) found, as lines for people."""
    cpu, memory = findings["cpu"], findings["memory_bytes"]
    size = f", {memory / 2**30:.1f} GiB" if memory else ""
    lines = [
        f"python      {findings['python']['version']}  {findings['python']['executable']}",
        f"platform    {findings['platform']}",
        f"cpu         {cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable{size}",
    ]
    for gpu in findings["gpus"] or [{}]:
        lines.append(f"gpu         {', '.join(gpu.values()) or 'none found (nvidia-smi)'}")
    lines.append(f"providers   {', '.join(findings['onnxruntime_providers']) or 'none: onnxruntime is missing'}")
    lines += ["", "packages"]
    lines += [f"  {name:<16} {version or '-'}" for name, version in findings["packages"].items()]
    lines += ["", "extras"]
    for name, extra in findings["extras"].items():
        state = f"missing {', '.join(extra['missing'])}: {extra['install']}" if extra["missing"] else "complete"
        lines.append(f"  {name:<16} {state}")
    lines += [f"\nwarning: {warning}" for warning in findings["warnings"]]
    if findings.get("bundle", {}).get("whole"):
        lines += ["", *_bundle_lines(findings["bundle"])]
    return "\n".join(lines)


def _bundle_lines(bundle: dict[str, Any]) -> list[str]:
    lines = [
        f"bundle      {bundle['path']}: whole, {bundle['files']} files, {bundle['bytes'] / 1e6:.1f} MB, "
        f"{bundle['precision']}, {', '.join(bundle['components'])}"
    ]
    by_sentence: dict[str, list[str]] = {}
    for name, sentence in bundle["backends"].items():
        by_sentence.setdefault(sentence, []).append(name)
    lines += [f"  backend   {', '.join(names)}: {sentence}" for sentence, names in by_sentence.items()]
    for record in bundle["parity"]:
        if record["threshold"] is None:
            continue
        state = "passed" if record["passed"] else "FAILED"
        lines.append(
            f"  parity    {record['subject']} {record['measure']} {record['value']:.3g} "
            f"(bound {record['threshold']:g}, {record['cases']} cases): {state}"
        )
    return lines
