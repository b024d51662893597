"""The command `serve`: wrong usage is told in one line with exit code 2, and its help loads nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mi2rage_rt import cli


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*args: object) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve", *map(str, args)])
        captured = capsys.readouterr()
        assert caught.value.code == 2, captured
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


def test_wrong_usage(refused: Callable[..., str], bundle_folder: Path, tmp_path: Path) -> None:
    assert "names among" in refused(bundle_folder, "--models", "classifier,nothing")
    assert "bundle" in refused(tmp_path, "--port", 0, "--no-grpc")
    assert "no-such-host" in refused(bundle_folder, "--host", "no-such-host.invalid", "--port", 0)
    (tmp_path / "short").write_text("abc")
    assert "at least 16" in refused(bundle_folder, "--token-file", tmp_path / "short")
    assert "cannot be read" in refused(bundle_folder, "--token-file", tmp_path / "none")


def test_a_port_in_use(refused: Callable[..., str], bundle_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in refused(bundle_folder, "--port", taken.getsockname()[1], "--no-grpc")


def test_a_grpc_port_in_use_ends_the_process(bundle_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = ["--port", "0", "--grpc-port", str(taken.getsockname()[1])]
        command = [sys.executable, "-m", "mi2rage_rt.cli", "serve", str(bundle_folder), *ports]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2, done
    assert "gRPC cannot listen there" in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra(refused: Callable[..., str], bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "kserve" else original(name))
    assert "pip install 'mi2rage-rt[serve]'" in refused(bundle_folder)


def test_help_loads_neither_the_sdk_nor_numpy() -> None:
    code = (
        "import sys\nfrom mi2rage_rt import cli\n"
        "try:\n    cli.main(['serve', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'kserve', 'numpy', 'fastapi', 'uvicorn', 'grpc', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
