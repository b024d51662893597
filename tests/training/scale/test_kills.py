"""A few SIGKILLs of a run; `kills` spends hundreds, on workers too and over S3."""

from pathlib import Path

import numpy as np
import pytest

from tests.training.scale.kills import Figures, Material, compare, disturb, make_material


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("kills"), 48)


def test_a_killed_run_ends_with_the_same_bytes(material: Material, tmp_path: Path) -> None:
    figures = Figures(workers=1)
    disturb(material, str(tmp_path / "store"), figures, 3, np.random.default_rng(3))
    assert figures.killed >= 1
    assert figures.runs == 1 + figures.killed
    assert (figures.rows, figures.lost, figures.doubled, figures.different) == (96, 0, 0, 0)


def test_the_comparison_sees_what_is_lost_doubled_or_different(material: Material) -> None:
    first, second = "shard-00000.parquet", "shard-00001.parquet"
    for name, store in {
        "lost": {name: content for name, content in material.reference.items() if name != first},
        "doubled": {**material.reference, "shard-00099.parquet": material.reference[first]},
        "both": {**material.reference, first: material.reference[second]},
    }.items():
        figures = Figures(workers=1)
        with pytest.raises(AssertionError):
            compare(material, store, figures)
        assert (figures.lost > 0) is (name != "doubled")
        assert (figures.doubled > 0) is (name != "lost")
