"""A whole bundle of hand-made ONNX graphs, a few kilobytes, whose answers can be worked out by hand.

- generator: 2 x 2 cells of 12 latent channels, 4 x 4 px images; `out_sample = 0.1 sample + mean(states) + t / 1000`.
- captioner: the next token is the last one + 1, until `[SEP]` at the table's end; dark images begin at another word.
- classifier: `logits = A[id behind the head's marker] + image_mask * mean(pixels) * [0, 0, 1]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mi2rage_engines.bundle import SCHEMA_VERSION, Manifest, ParityRecord, record_files
from mi2rage_engines.spec import (
    CaptionerSpec,
    ClassifierSpec,
    GeneratorSpec,
    GraphSpec,
    ImagePreprocessing,
    LatentSpec,
    ScheduleTable,
    TensorSpec,
    TokenizerSpec,
)

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"]
NAMES = ["tim", "cook", "leads", "apple", "in", "rome"]
THINGS = ["a", "red", "car", "by", "the", "sea", "##s", "##ide", "of", "and", "with", "dog"]
WORDS = [*SPECIALS, *NAMES, *THINGS]
LABELS = ("None", "/per/org/leads", "/per/loc/in")
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
_DTYPES = {FLOAT: "float32", INT: "int64"}


def wordpiece() -> tokenizers.Tokenizer:
    """A BERT-like tokenizer of `WORDS`."""
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def graph(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    constants: dict[str, np.ndarray] | None = None,
) -> GraphSpec:
    """Write an ONNX file and describe it; `file` is relative to the bundle, two folders up at most."""
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)

    def specs(tensors: dict[str, tuple[int, list[Any]]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype=_DTYPES[kind], shape=shape) for name, (kind, shape) in tensors.items())

    return GraphSpec(file=path.name, inputs=specs(inputs), outputs=specs(outputs), opset=20)


def _placed(spec: GraphSpec, folder: Path, path: Path) -> GraphSpec:
    return spec.model_copy(update={"file": path.relative_to(folder).as_posix()})


def schedule(steps: int, noise: float = 0.0) -> ScheduleTable:
    return ScheduleTable(
        scheduler="TinyScheduler",
        steps=steps,
        init_noise_sigma=1.0,
        timesteps=tuple(float(1000 - 100 * step) for step in range(steps)),
        input_scale=(1.0,) * steps,
        sample_coefficient=(0.5,) * steps,
        output_coefficient=(0.25,) * steps,
        noise_coefficient=(noise,) * (steps - 1) + (0.0,),
    )


def add_generator(folder: Path) -> GeneratorSpec:
    node = helper.make_node
    states = np.linspace(-1, 1, len(WORDS) * 4, dtype=np.float32).reshape(-1, 4)
    text, unet, vae = (folder / "generator" / name / "model.onnx" for name in ("text_encoder", "unet", "vae_decoder"))
    text_spec = graph(
        text,
        [node("Gather", ["table", "input_ids"], ["last_hidden_state"])],
        {"input_ids": (INT, ["batch", "sequence"])},
        {"last_hidden_state": (FLOAT, ["batch", "sequence", 4])},
        {"table": states},
    )
    unet_spec = graph(
        unet,
        [
            node("Mul", ["sample", "tenth"], ["scaled"]),
            node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"], keepdims=1),
            node("Unsqueeze", ["mean", "last"], ["context"]),
            node("Div", ["timestep", "thousand"], ["time"]),
            node("Add", ["scaled", "context"], ["sum"]),
            node("Add", ["sum", "time"], ["out_sample"]),
        ],
        {
            "sample": (FLOAT, ["batch", 12, "height", "width"]),
            "timestep": (FLOAT, []),
            "encoder_hidden_states": (FLOAT, ["batch", "sequence", 4]),
        },
        {"out_sample": (FLOAT, ["batch", 12, "height", "width"])},
        {
            "tenth": np.float32(0.1),
            "axes": np.array([1, 2]),
            "last": np.array([3]),
            "thousand": np.float32(1000),
        },
    )
    vae_spec = graph(
        vae,
        [node("DepthToSpace", ["latent_sample"], ["sample"], blocksize=2)],
        {"latent_sample": (FLOAT, ["batch", 12, "height", "width"])},
        {"sample": (FLOAT, ["batch", 3, "image_height", "image_width"])},
    )
    wordpiece().save(str(folder / "generator" / "tokenizer.json"))
    return GeneratorSpec(
        name="tiny-generator",
        graphs={
            "text_encoder": _placed(text_spec, folder, text),
            "unet": _placed(unet_spec, folder, unet),
            "vae_decoder": _placed(vae_spec, folder, vae),
        },
        tokenizer=TokenizerSpec(file="generator/tokenizer.json", max_length=8, pad_id=0),
        schedules=(schedule(3), schedule(5, noise=0.5)),
        latents=LatentSpec(channels=12, downsampling=2, multiple=2, scaling_factor=2.0),
        height=4,
        width=4,
        steps=3,
        guidance_scale=3.0,
    )


def next_word_table() -> np.ndarray:
    """Logits (V, V): after each word, the next one of `WORDS`; the last ones are followed by `[SEP]`."""
    table = np.zeros((len(WORDS), len(WORDS)), dtype=np.float32)
    for index in range(len(WORDS)):
        table[index, index + 1 if 4 <= index < 9 or 10 <= index < 16 else 3] = 5.0
    return table


def add_captioner(folder: Path) -> CaptionerSpec:
    node = helper.make_node
    vision, decoder = (folder / "captioner" / name / "model.onnx" for name in ("vision", "decoder"))
    vision_spec = graph(
        vision,
        [
            node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
            node("Reshape", ["mean", "shape"], ["cross_keys"]),
            node("Identity", ["cross_keys"], ["cross_values"]),
        ],
        {"pixel_values": (FLOAT, ["batch", 3, 6, 6])},
        {name: (FLOAT, [1, "batch", 1, 1, 1]) for name in ("cross_keys", "cross_values")},
        {"axes": np.array([1, 2, 3]), "shape": np.array([1, -1, 1, 1, 1])},
    )
    # A dark image (negative mean) puts weight on id 10 at the first position only: what is past tells where we are.
    nudge = np.zeros(len(WORDS), dtype=np.float32)
    nudge[10] = 10.0
    state = [1, "batch", 1, "past", 1]
    decoder_spec = graph(
        decoder,
        [
            node("Gather", ["table", "input_ids"], ["next"]),
            node("Cast", ["input_ids"], ["values"], to=FLOAT),
            node("Unsqueeze", ["values", "state_axes"], ["rows"]),
            node("Concat", ["past_keys", "rows"], ["present_keys"], axis=3),
            node("Concat", ["past_values", "rows"], ["present_values"], axis=3),
            node("ReduceSum", ["past_keys", "all"], ["past_sum"], keepdims=0),
            node("Equal", ["past_sum", "zero"], ["at_start"]),
            node("Cast", ["at_start"], ["start"], to=FLOAT),
            node("ReduceSum", ["cross_keys", "all"], ["brightness"], keepdims=0),
            node("Less", ["brightness", "zero"], ["is_dark"]),
            node("Cast", ["is_dark"], ["dark"], to=FLOAT),
            node("Mul", ["start", "dark"], ["weight"]),
            node("Reshape", ["weight", "weight_shape"], ["column"]),
            node("Mul", ["column", "nudge"], ["extra"]),
            node("Add", ["next", "extra"], ["logits"]),
        ],
        {
            "input_ids": (INT, ["batch", "sequence"]),
            "past_keys": (FLOAT, state),
            "past_values": (FLOAT, state),
            "cross_keys": (FLOAT, [1, "batch", 1, 1, 1]),
            "cross_values": (FLOAT, [1, "batch", 1, 1, 1]),
        },
        {
            "logits": (FLOAT, ["batch", "sequence", len(WORDS)]),
            "present_keys": (FLOAT, [1, "batch", 1, "present", 1]),
            "present_values": (FLOAT, [1, "batch", 1, "present", 1]),
        },
        {
            "table": next_word_table(),
            "nudge": nudge,
            "zero": np.float32(0),
            "all": np.array([0, 2, 3, 4]),
            "state_axes": np.array([0, 2, 4]),
            "weight_shape": np.array([-1, 1, 1]),
        },
    )
    wordpiece().save(str(folder / "captioner" / "tokenizer.json"))
    return CaptionerSpec(
        name="tiny-captioner",
        graphs={"vision": _placed(vision_spec, folder, vision), "decoder": _placed(decoder_spec, folder, decoder)},
        tokenizer=TokenizerSpec(file="captioner/tokenizer.json", max_length=16, pad_id=0),
        preprocessing=ImagePreprocessing(height=6, width=6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        bos_id=4,
        eos_id=3,
        layers=1,
        heads=1,
        head_size=1,
        max_new_tokens=10,
    )


def add_classifier(folder: Path) -> ClassifierSpec:
    node = helper.make_node
    path = folder / "classifier" / "model.onnx"
    from mi2rage_rt.text import EntityMarkedTokenizer

    tokenizer = EntityMarkedTokenizer(wordpiece(), max_length=24)
    (folder / "classifier").mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "classifier" / "tokenizer.json")
    table = np.zeros((tokenizer.vocabulary_size, len(LABELS)), dtype=np.float32)
    table[WORDS.index("tim"), 1] = 2.0
    table[WORDS.index("apple"), 0] = 2.0
    spec = graph(
        path,
        [
            node("Add", ["head_index", "one"], ["behind"]),
            node("Unsqueeze", ["behind", "one_axis"], ["place"]),
            node("GatherElements", ["input_ids", "place"], ["word"], axis=1),
            node("Squeeze", ["word", "one_axis"], ["id"]),
            node("Gather", ["table", "id"], ["text"]),
            node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
            node("Mul", ["mean", "image_mask"], ["seen"]),
            node("Unsqueeze", ["seen", "one_axis"], ["column"]),
            node("Mul", ["column", "last"], ["picture"]),
            node("Add", ["text", "picture"], ["logits"]),
        ],
        {
            "input_ids": (INT, ["batch", "sequence"]),
            "attention_mask": (INT, ["batch", "sequence"]),
            "head_index": (INT, ["batch"]),
            "tail_index": (INT, ["batch"]),
            "pixel_values": (FLOAT, ["batch", 3, 6, 6]),
            "image_mask": (FLOAT, ["batch"]),
        },
        {"logits": (FLOAT, ["batch", len(LABELS)])},
        {
            "table": table,
            "one": np.array(1),
            "one_axis": np.array([1]),
            "axes": np.array([1, 2, 3]),
            "last": np.array([0, 0, 4], dtype=np.float32),
        },
    )
    return ClassifierSpec(
        name="tiny-classifier",
        graphs={"classifier": _placed(spec, folder, path)},
        tokenizer=TokenizerSpec(file="classifier/tokenizer.json", max_length=24, pad_id=0),
        preprocessing=ImagePreprocessing(height=6, width=6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        labels=LABELS,
    )


def build_bundle(folder: Path, parts: tuple[str, ...] = ("generator", "captioner", "classifier")) -> Path:
    """Write a whole bundle with the components named."""
    adders: dict[str, Any] = {
        "generator": add_generator,
        "captioner": add_captioner,
        "classifier": add_classifier,
    }
    components = {name: adders[name](folder) for name in parts}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        **components,
        source={"generator": "hand-made"},
        tool_versions={"onnx": onnx.__version__},
        parity=(
            ParityRecord(subject="classifier", measure="max_abs", value=1e-6, threshold=1e-4, passed=True, cases=4),
        ),
        files=record_files(folder),
    )
    (folder / "bundle.json").write_text(json.dumps(manifest.model_dump(mode="json")), encoding="utf-8")
    return folder
