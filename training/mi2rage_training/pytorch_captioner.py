"""transformers' captioners behind the runtime's protocol; draws are keyed as in `mi2rage_rt.decoding`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi2rage_engines.errors import DataError, InputError, ModelFolderError, require
from mi2rage_training.captioner_kinds import EXPECTED, check_kind, frame_of
from mi2rage_training.pytorch_sources import (
    default_device,
    dtype_for,
    loading,
    quiet_loading,
    resolve,
    same_length,
    small_files,
)

if TYPE_CHECKING:
    import torch

    from mi2rage_engines.spec import ImagePreprocessing
    from mi2rage_rt.protocols import Image
    from mi2rage_rt.text import PlainTokenizer

__all__ = ["CaptionDecoding", "TorchCaptioner"]

DEFAULT_NEW_TOKENS = 20

SETTINGS_NAME = "mi2rage.json"
"""Optional file of a captioner's folder: `{"text_prefixes": [..]}`."""


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionDecoding:
    """How captions are decoded.

    Attributes:
        beams: of the beam search where no seeds are given; 1 is greedy.
        top_p, temperature: of nucleus sampling, see `mi2rage_rt.decoding.choose_tokens`.
    """

    beams: int = 1
    top_p: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise InputError(f"beams: came {self.beams}; expected 1 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: came {self.top_p}; expected a share above 0 and at most 1, e.g. 0.9")
        if self.temperature <= 0:
            raise InputError(f"temperature: came {self.temperature}; expected a number above 0, e.g. 1.0")


def _text_prefixes(folder: Path) -> tuple[str, ...]:
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["text_prefixes"]
        if not isinstance(found, list) or not all(isinstance(prefix, str) for prefix in found):
            raise TypeError(f"text_prefixes is {found!r}")
    except (ValueError, LookupError, TypeError) as error:
        raise ModelFolderError(
            f'{path}: not a captioner\'s settings ({error}); expected {{"text_prefixes": [...]}}; correct or remove it'
        ) from error
    return tuple(found)


class TorchCaptioner:
    """transformers' `BlipForConditionalGeneration` or `VisionEncoderDecoderModel` as `ImageToText`.

    Attributes:
        name: the hub id, or the folder's name.
        module: the model, in evaluation mode.
        tokenizer: as the runtime reads it.
        tokenizer_file: its `tokenizer.json`.
        preprocessing: how images become `pixel_values`.
        bos_id, eos_id, pad_id: BLIP's `[DEC]`, `[SEP]` and `[PAD]`, or the decoder's start, end and padding.
        max_length: ids that a caption may hold, the first one included.
        max_new_tokens: tokens written after the prefix, at most.
        decoding: how captions are decoded.
        text_prefixes: the prefixes that the folder's own `mi2rage.json` proposes for texts about entity pairs, if any.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        tokenizer_file: Path,
        preprocessing: ImagePreprocessing,
        max_new_tokens: int | None = None,
        decoding: CaptionDecoding | None = None,
    ) -> None:
        from mi2rage_engines.spec import TokenizerSpec
        from mi2rage_rt.text import PlainTokenizer

        self.name = name
        self.module = module.eval()
        self.tokenizer_file = tokenizer_file
        self.preprocessing = preprocessing
        frame = frame_of(name, self.module, preprocessing)
        self.bos_id, self.eos_id, self.pad_id = frame.bos_id, frame.eos_id, frame.pad_id
        self.max_length = frame.positions
        self.max_new_tokens = max_new_tokens or frame.max_new_tokens or DEFAULT_NEW_TOKENS
        self.decoding = decoding or CaptionDecoding()
        self.text_prefixes = _text_prefixes(tokenizer_file.parent)
        spec = TokenizerSpec(file=tokenizer_file.name, max_length=self.max_length, pad_id=self.pad_id)
        self.tokenizer: PlainTokenizer = PlainTokenizer(spec, tokenizer_file.parent)

    @classmethod
    def from_folder(
        cls,
        name_or_folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_new_tokens: int | None = None,
        decoding: CaptionDecoding | None = None,
    ) -> TorchCaptioner:
        """Load a captioner from a folder, the hub, or (`embedded`) from the package.

        Args:
            device, dtype: default CUDA and float16 where there is a GPU, else the CPU and float32.
            max_new_tokens: default what the folder's generation config says, else 20.
            decoding: default greedy without seeds, the nucleus of 0.9 with them.

        Raises:
            ModelFolderError: nothing there, not a kind of captioner that can be loaded (the message names those that
                can), or a file of it cannot be read.
        """
        transformers = require("transformers", "train")

        from mi2rage_rt.images import preprocessing_from_folder

        source = resolve(name_or_folder, "captioner")
        device = device or default_device()
        with loading(source, EXPECTED):
            config = transformers.PretrainedConfig.get_config_dict(source)[0]
        architecture = check_kind(source, config)
        with loading(source, EXPECTED):
            module = getattr(transformers, architecture).from_pretrained(source, dtype=dtype or dtype_for(device))
            module = module.to(device)
            files = small_files(source)
        name = Path(source).name if Path(source).is_dir() else source
        preprocessing = preprocessing_from_folder(files)
        return cls(name, module, files / "tokenizer.json", preprocessing, max_new_tokens, decoding)

    def prompt_ids(self, prefix: str) -> list[int]:
        """The ids that decoding starts from: `bos_id`, then the prefix's ids."""
        return [self.bos_id, *self.tokenizer.bare_ids(prefix)]

    def caption(
        self,
        images: Sequence[Image],
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        with_prefix: bool = True,
    ) -> list[str]:
        """Captions: the beam's best (greedy for one beam) without seeds, nucleus-sampled with them.

        Rows of equal prefix length run together.

        Args:
            images: uint8 `(H, W, 3)` each.
            prefixes: what each caption begins with; by default nothing.
            seeds: one an image for sampling.
            with_prefix: off leaves the prefix out of what is returned.
        """
        prompts = [self.prompt_ids(prefix) for prefix in (prefixes if prefixes is not None else [""] * len(images))]
        same_length("images", images, "prefixes", prompts)
        if seeds is not None:
            same_length("images", images, "seeds", seeds)
        captions = [""] * len(images)
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            ids = self.generate_ids(
                [images[row] for row in rows],
                [prompts[row] for row in rows],
                None if seeds is None else [seeds[row] for row in rows],
            )
            for row, sequence in zip(rows, ids, strict=True):
                captions[row] = self.tokenizer.decode(sequence if with_prefix else sequence[length - 1 :])
        return captions

    def generate_ids(
        self, images: Sequence[Image], prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The ids after `bos_id` and before `eos_id`, prefix included, of each row.

        Args:
            images: uint8 `(H, W, 3)` each.
            prompts: what `prompt_ids` gave, all of one length.
            seeds: None for greedy decoding.
        """
        import torch

        from mi2rage_rt.images import pixel_values

        pixels = torch.from_numpy(pixel_values(images, self.preprocessing))
        start = torch.tensor(prompts, dtype=torch.int64, device=self.module.device)
        room = self.max_length - start.shape[1]
        if room < 1:
            raise DataError(
                f"{self.name}: a prefix of {start.shape[1]} tokens leaves no room; expected a shorter one "
                f"(the model has {self.max_length} positions)"
            )
        with torch.inference_mode(), quiet_loading():
            output = self.module.generate(
                pixel_values=pixels.to(self.module.device, self.module.dtype),
                **self._begun(start),
                num_beams=self.decoding.beams if seeds is None else 1,
                do_sample=False,
                max_new_tokens=min(self.max_new_tokens, room),
                logits_processor=None if seeds is None else [self._sampler(seeds, start.shape[1])],
            )
        return [_between(row, self.eos_id) for row in output.tolist()]

    def _begun(self, start: torch.Tensor) -> dict[str, torch.Tensor]:
        """`start` int64 `(B, L)`, as the model's `generate` wants to be told what captions begin with."""
        import torch

        if self.module.config.model_type != "blip":
            return {"decoder_input_ids": start}
        # BLIP's generate drops the last column of what it is given (the tokenizer's [SEP]) and sets the first.
        padded = torch.nn.functional.pad(start, (0, 1), value=self.eos_id)
        return {"input_ids": padded, "attention_mask": torch.ones_like(padded)}

    def _sampler(self, seeds: Sequence[int], start: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A logits processor that leaves only the token which the runtime's own sampling chooses."""
        import torch

        from mi2rage_rt.decoding import choose_tokens

        def choose(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            chosen = choose_tokens(
                scores.float().cpu().numpy(),
                seeds,
                input_ids.shape[1] - start,
                top_p=self.decoding.top_p,
                temperature=self.decoding.temperature,
            )
            only = torch.full_like(scores, float("-inf"))
            return only.scatter_(1, torch.from_numpy(chosen).to(scores.device)[:, None], 0.0)

        return choose


def _between(ids: list[int], eos_id: int) -> list[int]:
    """What stands after the first id and before the first `eos_id` behind it."""
    body = ids[1:]
    return body[: body.index(eos_id)] if eos_id in body else body
