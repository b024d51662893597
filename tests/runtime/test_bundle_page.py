"""What `inspect` says of a bundle."""

from __future__ import annotations

import json

import pytest

from mi2rage_engines.bundle import open_manifest
from mi2rage_rt.bundle_page import page_from_manifest, size_text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (3_440_000_000, "3.4 GB")])
def test_sizes(count, text):
    assert size_text(count) == text


def test_the_page_has_components_graphs_axes_parity_and_plans(bundle_folder, tmp_path):
    manifest = open_manifest(bundle_folder)
    page = page_from_manifest(bundle_folder, manifest)
    for name, graph in manifest.graphs.items():
        line = next(line for line in page.splitlines() if line.strip().startswith(f"{name}  "))
        assert f"{graph.precision}, opset {graph.opset}" in line
    assert "in   input_ids int64[batch, sequence]" in page
    assert "plans: none; 'mi2rage-rt build' makes them" in page
    assert "classifier               max_abs             1e-06  (bound 0.0001)" in page
    (tmp_path / "plans" / "sm89").mkdir(parents=True)
    (tmp_path / "plans" / "sm89" / "generator-unet.plan").write_bytes(b"x" * 2_000)
    assert "plans/sm89/generator-unet.plan  2.0 kB" in page_from_manifest(tmp_path, manifest)


def test_the_command_prints_the_page_or_the_manifest(bundle_folder, capsys):
    from mi2rage_rt.commands import inspect

    inspect(bundle_folder)
    assert str(bundle_folder) in capsys.readouterr().out
    inspect(bundle_folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["schema_version"] == 2
