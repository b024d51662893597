"""What a TensorRT build says while it runs, messages and progress; and Ctrl-C in the middle of one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from mi2rage_engines.trt_api import TrtApi

__all__ = ["LogLine", "OnProgress", "collected_log", "interruptible", "new_monitor"]

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share of the build that is done, from 0 to 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class LogLine:
    """One message of the library; `severity` is its own name for it (`ERROR`, `WARNING`, `INFO`, `VERBOSE`)."""

    severity: str
    text: str


_LAYERS = ("Layers:", "Engine Layer Information")
_one_at_a_time = threading.RLock()


@functools.cache
def _collector(module: ModuleType) -> Any:
    """The library's logger. It keeps the first one it is given for the whole process, so there is one for all."""

    class Collector(module.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.lines: list[LogLine] = []

        def log(self, severity: Any, message: str) -> None:
            # Verbose lines run to tens of megabytes; of these only the list of what was built is worth keeping.
            if severity.name != "VERBOSE" or message.startswith(_LAYERS):
                self.lines.append(LogLine(severity.name, message))

    return Collector()


@contextlib.contextmanager
def collected_log(api: TrtApi) -> Iterator[tuple[Any, list[LogLine]]]:
    """The library's logger, and the list that its messages go to during the block.

    Threads wait for one another here: the library has one logger a process, and two builds would mix their messages.
    """
    with _one_at_a_time:
        collector = _collector(api.module)
        lines: list[LogLine] = []
        outer, collector.lines = collector.lines, lines
        try:
            yield collector, lines
        finally:
            collector.lines = outer


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event during the block, and takes its usual course after it.

    Raised inside one of the library's callbacks, it would be printed and swallowed.
    """
    asked = threading.Event()
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield asked
        return
    signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)
        if asked.is_set():
            usual(signal.SIGINT, None)


def new_monitor(api: TrtApi, on_progress: OnProgress | None, stop: threading.Event) -> Any | None:
    """The library's progress monitor, where it has one."""
    if not api.has_progress_monitor:
        return None
    base = api.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.failure: BaseException | None = None
            self._phases: dict[str, tuple[str | None, int, int]] = {}
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, max(num_steps, 1), 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, total, _ = self._phases.get(phase_name, (None, 1, 0))
            self._phases[phase_name] = (parent, total, step + 1)
            return self._report(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _report(self, phase_name: str) -> bool:
            if on_progress is not None and self.failure is None and not stop.is_set():
                try:
                    on_progress(phase_name, self._share_done(phase_name))
                except BaseException as error:  # the library would swallow it; raised again after the build
                    self.failure = error
            return self.failure is None and not stop.is_set()

        def _share_done(self, phase_name: str) -> float:
            share, phase = 0.0, phase_name
            while phase in self._phases:
                parent, total, done = self._phases[phase]
                share = min((done + share) / total, 1.0)
                if parent is None:
                    break
                phase = parent
            self._share = max(self._share, share)  # phases are begun again now and then; a bar only grows
            return self._share

    return Monitor()
