"""Progress on stderr: a bar with rate, elapsed time and time left; silent where nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

__all__ = ["Steps", "be_quiet", "is_shown", "steps", "track"]

T = TypeVar("T")


class _Settings:
    quiet = False
    live: Progress | None = None


def be_quiet(quiet: bool = True) -> None:
    """Turn every bar of this process off (or on again); the command line's `--quiet` calls it."""
    _Settings.quiet = quiet


def is_shown() -> bool:
    """Whether bars are drawn: stderr is a terminal and quiet was not asked for."""
    return not _Settings.quiet and sys.stderr.isatty()


class Steps:
    """A handle on one bar, moved on by hand; it does nothing where bars are not shown."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: float = 1) -> None:
        """Move on by `count` steps."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        """Show a short figure at the bar's right end, e.g. a loss."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, note=text)


def _new_bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _rate_column(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    return Progress(*columns, console=Console(stderr=True), refresh_per_second=5, speed_estimate_period=60)


def _rate_column() -> ProgressColumn:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            if not speed:
                return Text("--/s", style="progress.data.speed")
            rate = f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
            return Text(rate, style="progress.data.speed")

    return RateColumn()


@contextlib.contextmanager
def steps(description: str, total: int | None = None) -> Iterator[Steps]:
    """A bar that the block moves on with `advance()`.

    Bars nest: one inside another is drawn below it and goes when its block ends.

    Args:
        description: what is being done, e.g. `training`.
        total: the number of steps, where it is known.
    """
    if not is_shown():
        yield Steps(None, None)
        return
    outer = _Settings.live
    # rich draws one live display a terminal, so an inner bar is a further line of the outer one.
    with contextlib.ExitStack() as stack:
        if outer is None:
            _Settings.live = stack.enter_context(_new_bar())
            stack.callback(setattr, _Settings, "live", None)
        progress = outer or _Settings.live
        assert progress is not None
        task = progress.add_task(description, total=total, note="")
        try:
            yield Steps(progress, task)
        finally:
            if outer is not None:
                progress.remove_task(task)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items of `iterable`, with a bar that moves on after each.

    Args:
        iterable: what is gone through.
        description: what is being done, e.g. `images`.
        total: the number of items; by default its length, where it has one.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with steps(description, total) as bar:
        for item in iterable:
            yield item
            bar.advance()
