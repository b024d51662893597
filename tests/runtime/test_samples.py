"""Files of samples as people have them: both forms, marks at their beginning, and rows that are neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from mi2rage_engines.errors import DataError
from mi2rage_rt.samples import BadRow, read_samples

JSON_ROW = '{"id": "a", "tokens": ["Tim", "leads"], "head": [0, 1], "tail": [1, 2]}'
MNRE_ROW = "{'token': ['Tim', 'leads'], 'h': {'name': 'Tim', 'pos': [0, 1]}, 't': {'name': 'leads', 'pos': [1, 2]}}"


@pytest.mark.parametrize("before", ["", "\ufeff", "  ", "\ufeff \n"])
@pytest.mark.parametrize("row", [JSON_ROW, JSON_ROW.replace("{", "{ ", 1), MNRE_ROW, MNRE_ROW.replace("{", "{ ", 1)])
def test_rows_are_told_apart_whatever_stands_before_them(row: str, before: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text(before + row + "\n", encoding="utf-8")
    (sample,) = read_samples(path)
    assert sample.tokens == ("Tim", "leads")


@pytest.mark.parametrize("row", ["{{'token': ['a']}}", "{['a']: 1}", "{'a': ", "[]", '{"id": 1}', "x"])
def test_rows_that_are_neither_are_named_and_can_be_left_out(row: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text(f"{JSON_ROW}\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: "):
        read_samples(path)
    bad: list[BadRow] = []
    assert len(read_samples(path, skip_bad=True, bad_rows=bad)) == 1
    assert [row.line for row in bad] == [2]
