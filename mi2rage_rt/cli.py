"""`mi2rage-rt`: finds the commands by entry points, loads the one that is called, and turns errors into messages.

A command is a plain typed function (a Typer signature), registered in the entry-point group
`mi2rage_rt.commands`; the first line of its docstring is its summary. Its module imports only typer at the top.
Commands whose names share a first part (`store.verify`, `store.merge`) are a group, called as `store verify`; the first
line of their module's docstring is the group's summary.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from mi2rage_engines.errors import Mi2rageError, MissingExtraError

__all__ = ["GROUP", "command_points", "main"]

GROUP = "mi2rage_rt.commands"
DISTRIBUTION = "mi2rage-rt"


@functools.cache
def command_points() -> dict[str, importlib.metadata.EntryPoint]:
    """The registered commands by name, in alphabetical order.

    Only our own distribution is asked: going through every installed one costs a tenth of a second.
    """
    try:
        points = importlib.metadata.distribution(DISTRIBUTION).entry_points
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {point.name: point for point in sorted(points, key=lambda point: point.name) if point.group == GROUP}


def _load(name: str, point: importlib.metadata.EntryPoint) -> Callable[..., Any]:
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        raise Mi2rageError(f"the command '{name}' cannot be loaded: {error}; install mi2rage-rt again") from error
    if not callable(function):
        raise Mi2rageError(f"the command '{name}' is no function ({point.value}); install mi2rage-rt again")
    return typing.cast(Callable[..., Any], function)


def _summary(point: importlib.metadata.EntryPoint, *, of_module: bool = False) -> str:
    """The first line of the command's docstring, read off its source: importing the packages is slow.

    Args:
        of_module: the first line of its module's in place of that.
    """
    package, *inner = point.module.split(".")
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found else ():
        path = Path(folder, *inner).with_suffix(".py")
        if path.is_file():
            module = ast.parse(path.read_text(encoding="utf-8"))
            functions = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == point.attr)
            described = module if of_module else next(functions, None)
            if described is not None:
                return (ast.get_docstring(described) or "").partition("\n")[0]
    return "(not installed)"


def _set_manners(verbose: bool, quiet: bool) -> None:
    from mi2rage_rt import progress

    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # The level is that of our own packages: other people's debug lines would drown ours.
    for package in ("mi2rage_engines", "mi2rage_rt", "mi2rage_training", "mi2rage_export", "mi2rage_benchmarks"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    progress.be_quiet(quiet)


def _with_manners(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the options that every command has, `--verbose` and `--quiet`."""
    verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
    quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no warnings.")]
    hints = typing.get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints.get(parameter.name, parameter.annotation))
        for parameter in inspect.signature(function).parameters.values()
    ]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("verbose", verbose), ("quiet", quiet))
    ]

    @functools.wraps(function)
    def command(*args: Any, verbose: bool, quiet: bool, **kwargs: Any) -> Any:
        _set_manners(verbose, quiet)
        return function(*args, **kwargs)

    del command.__wrapped__  # typer would look through it at the original signature
    command.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    command.__annotations__ = {**hints, "verbose": verbose, "quiet": quiet}
    return command


class _Commands(typer.core.TyperGroup):
    """The root command or a group; a subcommand's module is imported when its name is asked for."""

    _prefix = ""  # of a group: its name and a dot
    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        inside = [name.removeprefix(self._prefix) for name in command_points() if name.startswith(self._prefix)]
        return list(dict.fromkeys(name.partition(".")[0] for name in inside))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        points, name = command_points(), self._prefix + cmd_name
        if name not in points:
            return self._group(cmd_name)
        point = points[name]
        if self._listing:  # the list needs a line, not the parsed signature
            return typer.core.TyperCommand(cmd_name, short_help=_summary(point), callback=lambda: None)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(cmd_name)(_with_manners(_load(name, point)))
        return typer.main.get_command(app)

    def _group(self, name: str) -> Any:
        inside = [point for known, point in command_points().items() if known.startswith(f"{self._prefix}{name}.")]
        if not inside:
            return None
        summary = _summary(inside[0], of_module=True)
        group = _Commands(name=name, help=summary, short_help=summary, no_args_is_help=True, rich_markup_mode=None)
        group._prefix = f"{self._prefix}{name}."
        return group

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self.commands = dict.fromkeys(self.list_commands(ctx))  # type: ignore[assignment]  # for "Did you mean ...?"
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        # Inside typer, which would answer an interruption and a closed pipe in its own way.
        with _reported():
            return super().invoke(ctx)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn what goes wrong in the block into one message and an exit code."""
    try:
        yield
        sys.stdout.flush()  # here, where a full disk or a closed pipe still becomes a message
    except KeyboardInterrupt as error:
        typer.echo("interrupted; what was finished is kept", err=True)
        raise SystemExit(130) from error
    except BrokenPipeError as error:
        # The reader of our output went away (`| head`): no error, and nothing more to flush.
        _drop_output()
        raise SystemExit(0) from error
    except (Mi2rageError, OSError, MemoryError, ModuleNotFoundError) as error:
        known = _known(error)
        if known is None or os.environ.get("MI2RAGE_DEBUG"):
            raise
        typer.echo(f"error: {known}", err=True)
        if isinstance(error, OSError):
            _drop_output()
        raise SystemExit(known.exit_code) from error


def _drop_output() -> None:
    """Keep the interpreter from failing once more on a stdout that takes nothing, when it flushes it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _known(error: BaseException) -> Mi2rageError | None:
    """The error as one of ours, with a message for the user; None where it is a fault of the program."""
    if isinstance(error, Mi2rageError):
        return error
    if isinstance(error, MemoryError):
        return Mi2rageError("out of memory; give a smaller --batch-size, or use a machine with more")
    if isinstance(error, ModuleNotFoundError):
        from mi2rage_rt.extras import EXTRA_BY_IMPORT

        package = (error.name or "").partition(".")[0]
        return MissingExtraError(package, EXTRA_BY_IMPORT[package]) if package in EXTRA_BY_IMPORT else None
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Mi2rageError(f"{where}{error.strerror or error}; nothing half-written was left behind")
    return None


def _show_version(value: bool) -> None:
    if value:
        from mi2rage_rt import __version__

        typer.echo(f"mi2rage-rt {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train a multimodal relation extractor from one modality, export it, and run it without PyTorch."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.

    Args:
        args: the arguments without the program's name; by default the process's own.
    """
    app = typer.Typer(
        name=DISTRIBUTION,
        cls=_Commands,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    # Typer's own help for a bare call goes to stderr with exit code 2, as a usage error should.
    with _reported():
        typer.main.get_command(app)(args=args, prog_name=DISTRIBUTION)


if __name__ == "__main__":
    main()
