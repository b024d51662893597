"""Look after stores of candidates: verify, merge, stats."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["merge", "stats", "verify"]

_Store = Annotated[str, typer.Argument(help="Store from 'synthesize', 'select' or 'store merge': a folder or address.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def verify(store: _Store, as_json: _Json = False) -> None:
    """Read all of a store and name each shard that is damaged, missing or too many; exit code 1 if any is."""
    import dataclasses
    import json

    from mi2rage_training.store_check import check_store

    found = check_store(store)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(found), "whole": found.whole}, indent=2))
    else:
        typer.echo(found.described())
    if not found.whole:
        raise typer.Exit(1)


def merge(
    stores: Annotated[list[str], typer.Argument(help="Finished stores of the same settings and different samples.")],
    out: Annotated[str, typer.Option("--out", help="Store to write; an unfinished one of the same stores goes on.")],
    as_json: _Json = False,
) -> None:
    """Join finished stores into one, shard by shard; no image is decoded."""
    from mi2rage_training.commands import print_summary
    from mi2rage_training.store_merge import merge_stores

    manifest = merge_stores(stores, out)
    summary = {"store": out, "stores": len(stores), "candidates": manifest.rows, "shards": len(manifest.shards)}
    print_summary(summary, as_json)


def stats(store: _Store, as_json: _Json = False) -> None:
    """Count what a finished store holds: labels, links, images, bytes, duplicates, scores."""
    import json

    from mi2rage_training.store_stats import stats_of_store

    found = stats_of_store(store)
    typer.echo(json.dumps(found.document(), indent=2) if as_json else found.described())
