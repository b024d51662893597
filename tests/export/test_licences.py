"""Licences as models' cards state them."""

from __future__ import annotations

import pytest

from mi2rage_export.licences import licence_of


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"),
        ('license: "openrail++"  # comment', "openrail++"),
        ("tags:\n- x\nlicense:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        ("license: other\nlicense_name: sai-nc-community", "other (sai-nc-community)"),
        (
            "license: other\nlicense_name: own\nlicense_link: https://example.org/own",
            "other (own, https://example.org/own)",
        ),
        ("license:", "unknown"),
        ("tags: x", "unknown"),
        ("license: [mit", "unknown"),
        ("- license", "unknown"),
    ],
)
def test_what_the_front_matter_says(tmp_path, front, licence):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    assert licence_of(tmp_path) == licence


def test_no_card_and_no_front_matter(tmp_path):
    assert licence_of(None) == licence_of(tmp_path) == "unknown"
    (tmp_path / "README.md").write_text("license: mit\n")
    assert licence_of(tmp_path) == "unknown"
