from __future__ import annotations

import io
import subprocess
import sys

import pytest

from mi2rage_rt import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def new_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test's body: pytest puts its own stderr back after the fixtures."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return screen


def test_bars_show_on_a_terminal_and_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = new_terminal(monkeypatch)
    for _ in progress.track(range(3), "outer"):
        with progress.steps("inner", 2) as bar:
            bar.advance()
            bar.note("loss 0.5")
            bar.advance()
    text = terminal.getvalue()
    assert "outer" in text and "3/3" in text and "ETA" in text
    assert progress._Settings.live is None


def test_a_bar_ends_when_its_loop_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = new_terminal(monkeypatch)
    with pytest.raises(ValueError, match="stop"), progress.steps("work", 5):
        raise ValueError("stop")
    assert progress._Settings.live is None and "0/5" in terminal.getvalue()


def test_silent_when_quiet_or_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = new_terminal(monkeypatch)
    monkeypatch.setattr(progress._Settings, "quiet", True)
    assert list(progress.track(iter("abc"), "work")) == list("abc")
    monkeypatch.setattr(progress._Settings, "quiet", False)
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with progress.steps("work", 3) as bar:
        bar.advance()
        bar.note("x")
    assert terminal.getvalue() == ""


def test_rich_is_loaded_only_when_drawn() -> None:
    script = "import sys; from mi2rage_rt.progress import track; list(track([1], 'x')); print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and done.stderr == ""
