"""The command `serve`. Heavy imports stand inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]

_MODELS = ("classifier", "captioner", "generator")


def serve(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'mi2rage-rt export' wrote.")],
    models: Annotated[
        str | None,
        typer.Option(help="What to serve, of classifier,captioner,generator; by default all that the bundle has."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of HTTP; 0 takes a free one.")] = 8080,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Of gRPC; 0 takes a free one.")] = 8081,
    no_grpc: Annotated[bool, typer.Option("--no-grpc", help="Leave gRPC out.")] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that requests must show; by default none is asked.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Requests of a batch; by default 32 relations, 16 captions, 8 images.")
    ] = None,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long a batch waits for more requests.")] = 5.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait, per model; more get 429.")] = 128,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="How long a request may wait for its turn.")] = 60.0,
    stall_s: Annotated[float, typer.Option(min=1, help="A batch that takes longer makes the server not live.")] = 300.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, max=2047, help="Of a request.")] = 16.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of an image that is sent.")] = 24_000_000,
    max_made_pixels: Annotated[
        int, typer.Option(min=1, help="Of an image that is made; the model's own size is always allowed.")
    ] = 2**20,
    max_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 100,
    max_connections: Annotated[
        int, typer.Option(min=1, help="HTTP connections, and gRPC calls, at once; more get 503, but for the probes.")
    ] = 4096,
    drain_s: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, how long requests are still taken while readiness says no.")
    ] = 1.0,
    grace_s: Annotated[float, typer.Option(min=1, help="How long requests that were taken may run after that.")] = 25.0,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="ONNX Runtime provider, in order of preference; repeatable.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; by default all this process may use.")
    ] = None,
) -> None:
    """Answer requests over HTTP and gRPC (Open Inference Protocol V2, plain JSON) from a bundle."""
    import importlib.util
    import logging

    from mi2rage_engines.errors import MissingExtraError

    # Not imported here: the SDK takes seconds, which the server spends beside the loading of its models.
    for package in ("kserve", "fastapi", "uvicorn", "httptools", "multipart"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "serve")

    from mi2rage_rt.serve.auth import token_from_file
    from mi2rage_rt.serve.lifecycle import ServerOptions
    from mi2rage_rt.serve.lifecycle import serve as serve_bundle
    from mi2rage_rt.serve.limits import Limits
    from mi2rage_rt.serve.options import ServiceOptions

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every malformed request
    limits = Limits(
        max_body_bytes=round(max_body_mb * 2**20),
        max_pixels=max_pixels,
        max_made_pixels=max_made_pixels,
        max_steps=max_steps,
        max_connections=max_connections,
        max_timeout_ms=timeout_s * 1e3,
    )
    what = ServiceOptions(
        models=_names(models),
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        stall_s=stall_s,
        limits=limits,
    )
    where = ServerOptions(
        host=host,
        port=port,
        grpc_port=None if no_grpc else grpc_port,
        token=None if token_file is None else token_from_file(token_file),
        drain_s=drain_s,
        grace_s=grace_s,
        tell=typer.echo,
    )
    serve_bundle(bundle, where, what, providers=provider, threads=threads)


def _names(text: str | None) -> tuple[str, ...]:
    """The models named, in their own order; none means all that there are."""
    from mi2rage_engines.errors import InputError

    named = [name.strip() for name in (text or "").split(",") if name.strip()]
    unknown = [name for name in named if name not in _MODELS]
    if unknown or (text is not None and not named):
        raise InputError(f"--models {text!r}: expected names among {', '.join(_MODELS)}, with commas between them")
    return tuple(name for name in _MODELS if name in named)
