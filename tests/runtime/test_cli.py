"""The command line as a user meets it; in this process where that tells the same, to be quick."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mi2rage_engines.errors import EngineError
from mi2rage_rt import cli, progress
from mi2rage_rt.images import load_image
from tests.runtime.test_captioner import BRIGHT, DARK
from tests.runtime.test_images import encode_image, noise

ROWS = [
    {"id": "a", "tokens": ["Tim", "leads", "Apple"], "head": [0, 1], "tail": [2, 3], "label": "/per/org/leads"},
    {"id": "b", "tokens": ["Apple", "in", "Rome"], "head": [0, 1], "tail": [2, 3], "image": "white.png"},
]
MNRE = "{'token': ['Tim', 'in', 'Rome'], 'h': {'name': 'Tim', 'pos': [0, 1]}, 't': {'name': 'Rome', 'pos': [2, 3]}, 'img_id': 'white.png', 'relation': 'None'}\n"  # noqa: E501


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: object) -> Answer:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Answer(int(caught.value.code or 0), captured.out, captured.err)

    yield run
    progress.be_quiet(False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "white.png").write_bytes(encode_image(BRIGHT))
    (tmp_path / "dark.png").write_bytes(encode_image(DARK))
    return tmp_path


def assert_refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1, answer.err
    assert all(word in answer.err for word in words), answer.err


# -- the frame ---------------------------------------------------------------------------------


def test_help_lists_every_command(call: Any) -> None:
    answer = call("--help")
    assert answer.code == 0
    for name in cli.command_points():
        assert f"\n  {name.partition('.')[0]} " in answer.out
    assert "Predict the relation" in answer.out
    assert "Look after stores of candidates" in answer.out


@pytest.mark.parametrize("name", sorted(cli.command_points()))
def test_each_command_has_help(call: Any, name: str) -> None:
    answer = call(*name.split("."), "--help")
    assert answer.code == 0, answer.err
    assert "--quiet" in answer.out and "--help" in answer.out


def test_a_group_lists_its_commands_and_proposes_one(call: Any) -> None:
    answer = call("store", "--help")
    assert answer.code == 0
    assert [line.split()[0] for line in answer.out.splitlines() if line.startswith("  ") and "  " in line.strip()] == [
        *("--help", "merge", "stats", "verify")
    ]
    assert call("store").code == 2
    wrong = call("store", "verfy")
    assert wrong.code == 2
    assert "Did you mean 'verify'?" in wrong.err


def test_version_and_wrong_usage(call: Any) -> None:
    assert call("--version").out == "mi2rage-rt 0.1.0\n"
    assert call().code == 2
    assert "Did you mean" in call("predicd").err
    for args in (["nothing"], ["predict"], ["predict", "--no-such"], ["generate", "x", "--steps", "many"]):
        answer = call(*args)
        assert answer.code == 2 and "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("the graph broke"), 1, "error: the graph broke\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept\n"),
        (OSError(28, "No space left on device", "/x"), 1, "error: /x: No space left on device"),
        (MemoryError(), 1, "error: out of memory"),
        (ModuleNotFoundError("no torch", name="torch"), 2, "pip install 'mi2rage-rt[train]'"),
    ],
)
def test_errors_become_messages(
    call: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("mi2rage_rt.doctor.examine", fail)
    answer = call("doctor")
    assert answer.code == code and message in answer.err and "Traceback" not in answer.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MI2RAGE_DEBUG", "1")
    with pytest.raises(Exception, match="no such folder"):
        cli.main(["caption", str(tmp_path / "none"), "x.png"])


@pytest.mark.parametrize(
    ("tail", "codes", "message"),
    [("| true", (0, 1), ""), ("| head -1 > /dev/null", (0, 1), ""), ("> /dev/full", (1,), "error: No space left")],
)
@pytest.mark.parametrize("command", ["--help", "doctor"])
def test_output_that_cannot_be_written(command: str, tail: str, codes: tuple[int, ...], message: str) -> None:
    line = f"{sys.executable} -m mi2rage_rt.cli {command} {tail}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode in codes and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.startswith(message)


@pytest.mark.parametrize("code", ["import mi2rage_rt", "HELP", "import mi2rage_rt.bundle, mi2rage_rt.jobs"])
def test_the_runtime_loads_no_torch(code: str) -> None:
    if code == "HELP":
        code = "from mi2rage_rt.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    heavy = {"torch", "transformers", "diffusers", "onnx", "tensorrt", "sklearn", "pandas"}
    if "Usage" in done.stdout:
        heavy |= {"numpy", "onnxruntime", "tokenizers", "PIL", "pyarrow"}
    assert "mi2rage_rt" in loaded and not loaded & heavy


def test_the_commands_need_no_torch(bundle_folder: Path, data: Path) -> None:
    script = """
import sys, json
for name in ("torch", "transformers", "diffusers", "onnx", "sklearn", "pandas", "scipy"):
    sys.modules[name] = None  # what is not installed
from mi2rage_rt.cli import main
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as end:
        assert end.code in (None, 0), (args, end.code)
"""
    bundle = str(bundle_folder)
    calls = [
        ["generate", bundle, "a red car", "--out", str(data / "out")],
        ["caption", bundle, str(data / "out" / "000000.png")],
        ["predict", bundle, str(data / "rows.jsonl")],
        ["doctor", bundle],
    ]
    subprocess.run([sys.executable, "-c", script, json.dumps(calls)], check=True, capture_output=True)


# -- the commands ------------------------------------------------------------------------------


def test_generate(call: Any, bundle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the sea\n\na dog\n")
    out = tmp_path / "out"
    args = ("generate", bundle_folder, "a red car", "--prompts-file", tmp_path / "prompts.txt", "--out", out, "--json")
    answer = call(*args, "--seed", 3, "--batch-size", 2)
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert answer.document["images"] == rows
    assert [row["prompt"] for row in rows] == ["a red car", "the sea", "a dog"]
    assert {path.name for path in out.iterdir()} == {"manifest.jsonl", *(row["file"] for row in rows)}
    first = load_image(out / "000000.png")
    assert_refused(call(*args), "exists and is not empty", "--force")
    assert call(*args, "--force", "--seed", 3).code == 0
    assert (load_image(out / "000000.png") == first).all()
    assert call(*args, "--force", "--seed", 4).code == 0
    assert (load_image(out / "000000.png") != first).any()


def test_generate_guides_part_of_the_steps(call: Any, bundle_folder: Path, tmp_path: Path) -> None:
    base = ("generate", bundle_folder, "a red car", "the sea", "--steps", 5, "--json", "--out")
    whole = call(*base, tmp_path / "whole").document["images"]
    half = call(*base, tmp_path / "half", "--guidance-interval", "0:0.5").document["images"]
    same = call(*base, tmp_path / "same", "--guidance-interval", "0:1").document["images"]
    never = call(*base, tmp_path / "never", "--guidance", 1).document["images"]
    assert [row["guidance_interval"] for row in half] == [[0.0, 0.5]] * 2
    assert not any("guidance_interval" in row for row in whole + never) and same == whole
    assert len({rows[0]["sha256"] for rows in (whole, half, never)}) == 3
    for text, words in {"0.5": "FIRST:LAST", "0.5:0.2": "rising order", "nan:1": "rising order"}.items():
        assert_refused(call(*base, tmp_path / "refused", "--guidance-interval", text), text, words)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ((), [8, 3]),
        (("--batch-size", 4), [4, 4, 3]),
        (("--memory", "64TB"), [11]),
        (("--memory", "64TB", "--batch-size", 6), [6, 5]),
        (("--memory", "64TB", "--batch-size", "auto"), None),
        (("--batch-size", "auto"), None),
    ],
    ids=str,
)
def test_generate_makes_batches(
    call: Any,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[Any, ...],
    sizes: list[int] | None,
) -> None:
    from mi2rage_rt.generator import GenerateOptions, RuntimeGenerator

    original: Any = RuntimeGenerator.generate
    calls: list[tuple[int, GenerateOptions]] = []

    def generate(self: Any, prompts: list[str], seeds: list[int], options: GenerateOptions) -> Any:
        calls.append((len(prompts), options))
        return original(self, prompts, seeds, options)

    monkeypatch.setattr(RuntimeGenerator, "generate", generate)
    prompts = [str(number) for number in range(11)]
    answer = call("generate", bundle_folder, *prompts, "--out", tmp_path / "out", *given, "--json")
    assert answer.code == 0, answer.err
    assert sum(size for size, _ in calls) == 11 == len(answer.document["images"])
    if sizes is not None:
        assert [size for size, _ in calls] == sizes
    assert {options.memory_bytes for _, options in calls} == {64 * 10**12 if "--memory" in given else None}
    assert all((options.batch_size == "auto") == ("auto" in given) for _, options in calls)


def test_generate_refuses_unusable_batches(call: Any, bundle_folder: Path, tmp_path: Path) -> None:
    base = ("generate", bundle_folder, *"abcd", "--out", tmp_path / "out")
    for text in ("0", "-1", "many", "1.5", ""):
        assert_refused(call(*base, "--batch-size", text), f"batch size '{text}'", "or auto")
    assert_refused(call(*base, "--memory", "much"), "size 'much'", "20GB")
    assert_refused(call(*base, "--memory", "1MB"), "memory limit 0.001 GB", "one row takes")
    assert not (tmp_path / "out").exists()


def test_generate_refuses_before_it_writes(call: Any, bundle_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ("generate", bundle_folder, "--out", out)
    assert_refused(call(*base), "no prompt")
    assert_refused(call(*base, "a", "--steps", 4), "expected one of 3, 5")
    assert_refused(call(*base, "a", "--width", 5), "multiple of 4")
    assert_refused(call(*base, "--prompts-file", tmp_path / "none"), "cannot be read")
    assert not out.exists()


def test_an_interrupted_generation_keeps_whole_files(
    call: Any, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mi2rage_rt.generator import RuntimeGenerator

    original, calls = RuntimeGenerator.generate, []

    def generate(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(RuntimeGenerator, "generate", generate)
    answer = call("generate", bundle_folder, *"abcde", "--out", tmp_path / "out", "--batch-size", 1)
    assert answer.code == 130
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png", "manifest.jsonl"]
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 2


def test_caption(call: Any, bundle_folder: Path, data: Path) -> None:
    args = ("caption", bundle_folder, data / "white.png", data / "dark.png")
    answer = call(*args, "--json")
    assert [row["caption"] for row in answer.document["captions"]] == [
        "tim cook leads apple in",
        "rome a red car by the sea",
    ]
    assert "rome a red car by the sea" in call(*args).out
    assert call(*args, "--prefix", "the", "--json").document["captions"][0]["caption"].startswith("the")
    sampled = [call(*args, "--sample", "--top-p", 1, "--seed", seed, "--json").out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_caption_with_beams(call: Any, bundle_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mi2rage_rt.captioner import BeamSearch

    original, searches = BeamSearch.__init__, []

    def search(self: Any, images: int, settings: Any, *args: Any) -> None:
        searches.append((images, settings.beams))
        original(self, images, settings, *args)

    monkeypatch.setattr(BeamSearch, "__init__", search)
    args = ("caption", bundle_folder, data / "white.png", data / "dark.png", "--json")
    # In the hand-made bundle the next word is the likeliest by far: beams find what greedy decoding finds.
    assert call(*args, "--beams", 3).out == call(*args).out == call(*args, "--beams", 1).out
    assert searches == [(2, 3)]
    assert_refused(call(*args, "--beams", 2, "--sample"), "--beams 2", "--sample", "leave one out")
    assert call(*args, "--beams", 1, "--sample").code == 0
    assert_refused(call(*args, "--beams", 12), "beams 12", "knows 23 tokens")
    assert call(*args, "--beams", 0).code == 2


def test_fast_jpeg(call: Any, bundle_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mi2rage_rt import jobs

    enough = []

    def load(path: Path, at_least: tuple[int, int] | None = None) -> Any:
        enough.append(at_least)
        return load_image(path, at_least)

    monkeypatch.setattr(jobs, "load_image", load)
    for args in (("caption", bundle_folder, data / "white.png"), ("predict", bundle_folder, data / "rows.jsonl")):
        assert call(*args, "--json").out == call(*args, "--fast-jpeg", "--json").out
        assert enough == [None, (12, 12)]  # twice the 6 px that both models take
        enough.clear()


def test_caption_refuses_bad_images(call: Any, bundle_folder: Path, data: Path) -> None:
    (data / "cut.png").write_bytes(encode_image(noise(64, 64))[:600])
    assert_refused(call("caption", bundle_folder, data / "white.png", data / "cut.png"), "cut.png")
    assert_refused(call("caption", bundle_folder, data / "none.png"), "none.png", "no such file")
    assert_refused(call("caption", bundle_folder, data / "white.png", "--top-p", 2), "top_p 2.0")


def test_predict(call: Any, bundle_folder: Path, data: Path) -> None:
    args = ("predict", bundle_folder, data / "rows.jsonl")
    rows = call(*args, "--json").document["predictions"]
    assert rows[0] == {
        "id": "a",
        "head": "Tim",
        "tail": "Apple",
        "relation": "/per/org/leads",
        "probability": 0.786986,
        "label": "/per/org/leads",
    }
    assert rows[1]["relation"] == "/per/loc/in" and "label" not in rows[1]
    assert "/per/org/leads" in call(*args).out
    assert call(*args, "--text-only", "--json").document["predictions"][1]["relation"] == "None"
    answer = call(*args, "--out", data / "p.jsonl")
    assert answer.out.startswith("2 predictions in")
    assert [json.loads(line) for line in (data / "p.jsonl").read_text().splitlines()] == rows
    assert_refused(call(*args, "--out", data / "p.jsonl"), "exists", "--force")


def test_predict_reads_mnre_with_images_by_split(call: Any, bundle_folder: Path, data: Path) -> None:
    (data / "images" / "test").mkdir(parents=True)
    shutil.move(data / "white.png", data / "images" / "test" / "white.png")
    (data / "test.txt").write_text(MNRE)
    answer = call("predict", bundle_folder, data / "test.txt", "--json")
    assert answer.document["predictions"][0]["relation"] == "/per/loc/in"


def test_predict_refuses_bad_data(call: Any, bundle_folder: Path, data: Path) -> None:
    args = ("predict", bundle_folder, data / "bad.jsonl", "--out", data / "p.jsonl")
    good = json.dumps(ROWS[0]) + "\n"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"label": "/unknown"}, ["/unknown", "does not know", "/per/loc/in"]),
        ({"head": [2, 9]}, ["line 2", "[2, 9]"]),
        ({"image": "none.png"}, ["sample b", "none.png", "--images"]),
        ({"image": "rows.jsonl"}, ["sample b", "not an image"]),
    ]
    for change, words in cases:
        (data / "bad.jsonl").write_text(good + json.dumps({**ROWS[1], **change}) + "\n")
        assert_refused(call(*args), *words)
        assert not (data / "p.jsonl").exists()
        answer = call(*args[:3], "--skip-bad", "--json")
        assert answer.code == 0 and len(answer.document["predictions"]) == 1
        assert len(answer.document["skipped"]) == 1
        assert "skipped" in answer.err
        assert call(*args[:3], "--skip-bad", "--quiet", "--json").err == ""
    (data / "bad.jsonl").write_text("")
    assert_refused(call(*args), "no samples")
    assert_refused(call("predict", bundle_folder, data / "none.jsonl"), "none.jsonl", "cannot be read")


def test_bundles_that_are_not_whole(call: Any, bundle_folder: Path, data: Path) -> None:
    bundle = data / "bundle"
    shutil.copytree(bundle_folder, bundle)
    (bundle / "classifier" / "model.onnx").write_bytes(b"")
    assert_refused(call("predict", bundle, data / "rows.jsonl"), "classifier/model.onnx", "0 bytes")
    assert_refused(call("predict", data, data / "rows.jsonl"), "bundle.json")
    answer = call("doctor", bundle, "--json")
    assert answer.code == 2 and answer.document["bundle"]["whole"] is False and "model.onnx" in answer.err


def test_doctor(call: Any, bundle_folder: Path) -> None:
    document = call("doctor", bundle_folder, "--json").document
    assert document["packages"]["mi2rage-rt"] == "0.1.0"
    assert "CPUExecutionProvider" in document["onnxruntime_providers"]
    assert document["extras"]["cpu"] == {"missing": [], "install": None}
    assert "torch" not in document["extras"]["tensorrt"]["missing"]
    assert document["bundle"]["whole"] and document["bundle"]["components"] == ["generator", "captioner", "classifier"]
    text = call("doctor", bundle_folder).out
    assert "extras" in text and "parity    classifier max_abs 1e-06" in text


def test_doctor_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    from mi2rage_rt import doctor

    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0")
    monkeypatch.setattr(doctor, "_gpus", lambda: [{"name": "H200"}])
    monkeypatch.setattr(doctor, "_providers", lambda: ["CPUExecutionProvider"])
    warnings = doctor.examine()["warnings"]
    assert any("both installed" in warning for warning in warnings)
    assert any("no CUDA provider" in warning for warning in warnings)
