"""The models of a chain, from PyTorch's folders or from an exported bundle, and what the store says of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.errors import InputError
from mi2rage_engines.ort_engine import usable_cores
from mi2rage_rt.protocols import ImageToText, TextToImage
from mi2rage_training.pytorch_captioner import CaptionDecoding
from mi2rage_training.pytorch_sources import EMBEDDED
from mi2rage_training.stages import Overlap, usual_overlap

if TYPE_CHECKING:
    from mi2rage_engines.bundle import Manifest
    from mi2rage_engines.spec import ComponentSpec
    from mi2rage_training.judge import Judge

__all__ = [
    "ChainModels",
    "ModelChoice",
    "Sampling",
    "check_sources",
    "models_from",
    "models_from_bundle",
    "models_from_folders",
]

_SMALL_BYTES = 128_000_000
"""Models of less do more on a CPU with a thread an operator and as many shards at a time as there are cores."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How images are drawn and captions decoded; None takes the generator's own.

    Attributes:
        steps: of denoising.
        guidance_scale: 1 is off.
        decoding: of captions.
        feature_cache: a bundle's alone: see `GenerateOptions`; 1 is off.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    decoding: CaptionDecoding = dataclasses.field(default_factory=CaptionDecoding)
    feature_cache: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class ChainModels:
    """The models of a run.

    Attributes:
        described: what decides what they make, JSON values, see `chain.synthesize`.
        text_prefixes: what the captioner proposes that texts for given images begin with; empty where it has none.
        overlap: what suits the models, see `stages`.
    """

    generator: TextToImage
    captioner: ImageToText
    described: dict[str, Any]
    text_prefixes: tuple[str, ...] = ()
    overlap: Overlap = dataclasses.field(default_factory=Overlap)

    def overlap_of(self, in_flight: int) -> Overlap:
        """`overlap` with so many shards in the making; 0 is what suits.

        Raises:
            InputError: `in_flight` is below 0.
        """
        if in_flight < 0:
            raise InputError(f"in flight: came {in_flight}; expected 1 or more shards at a time, or 0 for what suits")
        return dataclasses.replace(self.overlap, in_flight=in_flight) if in_flight else self.overlap


@dataclasses.dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which models to load, in this process or in any other; see `models_from`.

    Attributes:
        judge: folder of teachers.
        threads: of the models on a CPU; None leaves it to them.
    """

    bundle: Path | None = None
    generator: str | None = None
    captioner: str | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    judge: Path | None = None
    device: str = "auto"
    threads: int | None = None

    def load(self) -> ChainModels:
        """Raises as `models_from`."""
        return models_from(self.bundle, self.generator, self.captioner, self.sampling, self.device, self.threads)

    def load_judge(self) -> Judge | None:
        """The teachers, None where there are none; raises as `load_teachers`."""
        if self.judge is None:
            return None
        from mi2rage_training.devices import device_from
        from mi2rage_training.teacher_folder import load_teachers

        return load_teachers(self.judge, device_from(self.device))


def check_sources(bundle: Path | None, generator: str | None, captioner: str | None, feature_cache: int = 1) -> None:
    """Refuse a bundle beside models that stand in place of its own, and feature caching without one.

    Raises:
        InputError: there are both, or there is no bundle to cache with.
    """
    names = {"--generator": generator, "--captioner": captioner}
    others = [f"{option} {name}" for option, name in names.items() if name is not None]
    if bundle is not None and others:
        raise InputError(
            f"--bundle {bundle}: came with {' and '.join(others)}; expected a bundle alone, which holds both models; "
            "leave one or the other out"
        )
    if bundle is None and feature_cache != 1:
        raise InputError(
            f"--feature-cache {feature_cache}: came without --bundle; expected an exported bundle, for PyTorch's "
            "generators run every step whole; give one that was exported with --feature-cache, or leave it out"
        )


def models_from(
    bundle: Path | None,
    generator: str | None,
    captioner: str | None,
    sampling: Sampling,
    device: str,
    threads: int | None = None,
) -> ChainModels:
    """The bundle's models where there is one, else PyTorch's, of which `embedded` is the default; raises as they do.

    Args:
        threads: that a bundle on a CPU may use; by default as many as this process has cores. PyTorch has its own.
    """
    check_sources(bundle, generator, captioner, sampling.feature_cache)
    if bundle is not None:
        return models_from_bundle(bundle, sampling, device, threads)
    return models_from_folders(generator or EMBEDDED, captioner or EMBEDDED, sampling, device)


def models_from_folders(generator: str, captioner: str, sampling: Sampling, device: str) -> ChainModels:
    """PyTorch's models: `embedded`, folders or hub ids.

    Raises:
        InputError: there is no such device.
        ModelFolderError: a model cannot be loaded.
        MissingExtraError: PyTorch is not installed.
    """
    from mi2rage_training.devices import device_from
    from mi2rage_training.pytorch_captioner import TorchCaptioner
    from mi2rage_training.pytorch_models import TorchGenerator

    place = device_from(device)
    text_to_image = TorchGenerator.from_folder(
        generator, device=place, steps=sampling.steps, guidance_scale=sampling.guidance_scale
    )
    image_to_text = TorchCaptioner.from_folder(captioner, device=place, decoding=sampling.decoding)
    described = {
        "generator_source": generator,
        "captioner_source": captioner,
        **dataclasses.asdict(text_to_image.settings),
        "decoding": dataclasses.asdict(sampling.decoding),
    }
    return ChainModels(text_to_image, image_to_text, described, image_to_text.text_prefixes)


def models_from_bundle(folder: Path, sampling: Sampling, device: str, threads: int | None = None) -> ChainModels:
    """The generator and the captioner of a bundle, run without PyTorch.

    What is described names the bundle's folder and holds a hash of each component: of its settings (schedules,
    preprocessing, ...) and of every file it has, graphs, weights and tokenizers.

    Args:
        device: `auto` (CUDA where ONNX Runtime has it), `cpu` or `cuda`.
        threads: see `models_from`.

    Raises:
        InputError: the device is none of these, or the bundle has no schedule of so many steps, or no graphs for
            feature caching.
        BundleError: the bundle is not whole, or lacks a generator or a captioner.
        MissingExtraError: ONNX Runtime is not installed.
        EngineError: a graph cannot be loaded, or ONNX Runtime has no CUDA.
    """
    from mi2rage_engines.bundle import open_manifest
    from mi2rage_engines.open_engine import EngineOpener
    from mi2rage_rt.bundle import Bundle
    from mi2rage_rt.captioner import CaptionOptions
    from mi2rage_rt.generator import GenerateOptions

    providers = _providers(device)
    manifest, threads = open_manifest(folder), threads or usable_cores()
    small = _bytes_of(manifest, ("generator", "captioner")) <= _SMALL_BYTES
    opener = EngineOpener(folder, manifest, providers=providers, threads=1 if small else threads)
    bundle = Bundle(folder, manifest, opener)
    decoding = dataclasses.asdict(sampling.decoding)
    captioner = bundle.captioner(CaptionOptions(**decoding))
    drawing = GenerateOptions(sampling.steps, sampling.guidance_scale, feature_cache=sampling.feature_cache)
    generator = bundle.generator(drawing)
    generator.batch_size(1)  # refuses steps without a schedule here rather than in the middle of a run
    spec, written = generator.spec, captioner.spec
    described = {
        "bundle": folder.resolve().name,
        "generator_sha256": _digest(bundle.manifest, spec),
        "captioner_sha256": _digest(bundle.manifest, written),
        "steps": spec.steps if sampling.steps is None else sampling.steps,
        "guidance_scale": spec.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale,
        "height": spec.height,
        "width": spec.width,
        "decoding": decoding,
        # Only where it is on: stores of earlier releases go on.
        **({} if sampling.feature_cache == 1 else {"feature_cache": sampling.feature_cache}),
    }
    overlap = usual_overlap(generator, captioner)
    if small and generator.on_host and captioner.on_host:
        overlap = Overlap(threads, models_free=True)
    return ChainModels(generator, captioner, described, written.text_prefixes, overlap)


def _providers(device: str) -> tuple[str, ...] | None:
    allowed = {
        "auto": None,
        "cpu": ("CPUExecutionProvider",),
        "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    }
    if device not in allowed:
        raise InputError(
            f"device {device!r}: a bundle runs on one of: {', '.join(allowed)}; choose one; which GPU it is "
            "CUDA_VISIBLE_DEVICES says"
        )
    return allowed[device]


def _bytes_of(manifest: Manifest, components: tuple[str, ...]) -> int:
    return sum(file.bytes for name, file in manifest.files.items() if name.partition("/")[0] in components)


def _digest(manifest: Manifest, component: ComponentSpec) -> str:
    """Hex SHA-256 of all that decides what a component makes; the prefixes used stand in the chain's settings."""
    files = {name: file.sha256 for name, file in manifest.files.items() if name.startswith(f"{component.kind}/")}
    whole = {"spec": component.model_dump(mode="json", exclude={"text_prefixes"}), "files": files}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
