"""The page of a run: it grows, is bounded, needs no other file, and overwrites nothing of anyone else's."""

import re
from pathlib import Path

import pytest

from mi2rage_engines.errors import InputError
from mi2rage_rt.images import encode_image
from mi2rage_training.chain import ChainConfig, Given
from mi2rage_training.chain_links import Links
from mi2rage_training.gallery import Gallery
from mi2rage_training.pairs import Pair
from mi2rage_training.store import Candidate
from mi2rage_training.tally import Tally
from tests.training.fakes import MeanCaptioner, NoiseGenerator, samples

CONFIG = ChainConfig(links=2, width=2)


def made(count: int, config: ChainConfig = CONFIG, image: bytes | None = None) -> list[list[Candidate]]:
    links = Links(NoiseGenerator(), MeanCaptioner(), config)
    return [links.make([Pair(sample, image)]) for sample in samples(count)]


def test_the_page_grows_and_is_bounded(tmp_path: Path) -> None:
    path, tally = tmp_path / "page.html", Tally()
    gallery = Gallery(path, samples=6, every_s=0.0)
    shown = []
    for rows in made(20):
        tally += Tally.of(rows, 1, CONFIG)
        gallery.add(rows, tally)
        page = path.read_text()
        shown.append(page.count('<section class="parent">'))
        assert page.count("<img") == 4 * shown[-1]
        assert f'<div class="soft">{rows[0].provenance.parent}:' in page  # the newest is there
        assert 'http-equiv="refresh"' in page
    assert shown[:6] == [1, 2, 3, 4, 5, 6]
    assert max(shown) == 6
    gallery.write(tally)
    page = path.read_text()
    assert 'http-equiv="refresh"' not in page
    assert "<b>80</b> candidates are made of 20 real samples" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    parents = [int(number) for number in re.findall(r'"soft">s(\d+):', page)]
    assert parents == sorted(parents, reverse=True)
    assert parents[-1] < 10  # the page spans the run


def test_it_is_not_written_for_every_shard(tmp_path: Path) -> None:
    gallery, rows = Gallery(tmp_path / "page.html", every_s=3600.0), made(2)
    gallery.add(rows[0], Tally.of(rows[0], 1, CONFIG))
    first = (tmp_path / "page.html").read_text()
    gallery.add(rows[1], Tally.of(rows[1], 1, CONFIG))
    assert (tmp_path / "page.html").read_text() == first


def test_a_judge_s_verdicts_are_shown(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "page.html", judged=True, every_s=0.0)
    rows = made(1)[0]
    gallery.add(rows, Tally(1, 4, 1, 0, 0, {"<peer>": (1, 4)}), [True, False, False, False])
    page = (tmp_path / "page.html").read_text()
    assert page.count('<li class="kept">') == 1
    assert page.count('<li class="dropped">') == 3
    assert "<b>1</b> of them kept by the judge" in page
    assert "&lt;peer&gt;" in page
    assert "<peer>" not in page


def test_made_texts_and_shards_of_nothing(tmp_path: Path) -> None:
    image = encode_image(NoiseGenerator().generate(["x"], [1])[0])
    gallery = Gallery(tmp_path / "page.html", every_s=0.0)
    gallery.add(made(1, ChainConfig(given=Given.IMAGE, links=2), image)[0], Tally())
    gallery.add([], Tally())
    assert (tmp_path / "page.html").read_text().count('<section class="parent">') == 1


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    Gallery(tmp_path / "page.html").write(Tally())
    Gallery(tmp_path / "page.html").write(Tally())  # an earlier gallery is replaced
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    with pytest.raises(InputError, match="is no gallery of an earlier run"):
        Gallery(tmp_path / "mine.html")
    with pytest.raises(InputError, match="is no gallery"):
        Gallery(tmp_path)
