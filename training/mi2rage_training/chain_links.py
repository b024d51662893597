"""The links of the chains: what is made from what, for the real samples of one shard.

Text given: sentence T0 -> image I1 -> caption C1 -> image I2 -> ...; each (T0, Ik) is a candidate with T0's label.
Image given: image I0 with its entity pair -> text T1 -> image -> text T2 -> ...; each (Tk, I0) is a candidate.
All places of a link run in one batch; the noise of a child is keyed by (run seed, sample id, link, child) alone.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np
from PIL import Image as PilImage

from mi2rage_engines.errors import DataError
from mi2rage_rt.images import encode_image
from mi2rage_rt.noise import seed_from
from mi2rage_rt.protocols import Image, ImageToText, TextToImage
from mi2rage_rt.samples import Provenance, Sample
from mi2rage_training.chain_captions import Request, Written, write_captions
from mi2rage_training.chain_config import ChainConfig, Given, ImageFormat, fill, without_label
from mi2rage_training.chain_places import Child, Place, that_go_on
from mi2rage_training.judge import Judge
from mi2rage_training.pairs import Pair
from mi2rage_training.slots import compose
from mi2rage_training.stages import AtOnce
from mi2rage_training.store import Candidate

__all__ = ["Links"]


class Links:
    """Makes the candidates of some real samples.

    Args:
        generator, captioner: the models.
        config: of the chains.
        judge: scores children before they have children of their own, see `judge`; None lets every child have one.
        encoders: encode images, beside what is done here.
    """

    def __init__(
        self,
        generator: TextToImage,
        captioner: ImageToText,
        config: ChainConfig,
        judge: Judge | None = None,
        encoders: Executor | None = None,
    ) -> None:
        self.generator = generator
        self.captioner = captioner
        self.config = config
        self.judge = judge
        self.encoders = encoders or AtOnce()
        self.models = {"generator": generator.name, "captioner": captioner.name}
        if judge is not None:
            self.models["judge"] = judge.name

    def make(self, pairs: Sequence[Pair]) -> list[Candidate]:
        """At most `links * width` candidates for each real sample, ordered by sample, child and link.

        Args:
            pairs: the real samples; with their images where images are given.

        Raises:
            DataError: images are given, and a sample has none.
        """
        places = [Place(pair, child, pair.sample.id) for pair in pairs for child in range(self.config.width)]
        given = {pair.sample.id: _image_of(pair) for pair in pairs} if self.config.given is Given.IMAGE else {}
        seen: dict[str, set[str]] = {}
        going = places
        for link in range(1, self.config.links + 1):
            children = self._make_texts(going, link, given, seen) if given else self._make_images(going, link)
            for place, child in zip(going, children, strict=True):
                if child is not None:
                    place.chain.append(child)
            if link < self.config.links:
                going = that_go_on(going, children, link, self.config, self.judge)
            if not going:
                break
        return [child.finished() for place in places for child in place.chain]

    def _make_images(self, places: Sequence[Place], link: int) -> list[Child | None]:
        """Text given: an image for each place, and its caption."""
        seeds, prompts = self._image_seeds(places, link), [self._prompt(place) for place in places]
        images = self.generator.generate(prompts, seeds)
        requests = [
            self._request(place, link, image, self._prefix(place, link))
            for place, image in zip(places, images, strict=True)
        ]
        written = write_captions(self.captioner, requests, self.config, {})
        children: list[Child | None] = []
        for row, (place, found) in enumerate(zip(places, written, strict=True)):
            if found is None:
                children.append(None)
                continue
            sample = self._named(place, link, seeds[row])
            sample = dataclasses.replace(sample, image=f"{sample.id.replace('/', '-')}.{self.config.image_format}")
            caption = f"{requests[row].prefix} {found.text}".strip()
            candidate = Candidate(sample, b"", prompts[row], caption or prompts[row])
            children.append(Child(candidate, image=self._encoded(images[row])))
        return children

    def _make_texts(
        self, places: Sequence[Place], link: int, given: dict[str, Image], seen: dict[str, set[str]]
    ) -> list[Child | None]:
        """Image given: a text for each place, of the real image or of one drawn from the text before."""
        shown = [given[place.sample.id] for place in places]
        drawn = [row for row, place in enumerate(places) if place.caption is not None]
        if drawn:
            again = [places[row] for row in drawn]
            images = self.generator.generate([self._prompt(place) for place in again], self._image_seeds(again, link))
            for row, image in zip(drawn, images, strict=True):
                shown[row] = image
        prefixes = [self._prefix(place, link) for place in places]
        requests = [
            self._request(place, link, image, prefix)
            for place, image, prefix in zip(places, shown, prefixes, strict=True)
        ]
        written = write_captions(self.captioner, requests, self.config, seen)
        return [
            None if found is None else self._text_child(place, link, prefix, found, image)
            for place, prefix, found, image in zip(places, prefixes, written, shown, strict=True)
        ]

    def _text_child(self, place: Place, link: int, prefix: str, written: Written, image: Image) -> Child:
        """A child with its text; `image` is what the text describes."""
        composed = compose(without_label(prefix), written.words, place.sample)
        assert composed is not None  # `write_captions` gives up what cannot be composed
        tokens, head, tail = composed
        sample = dataclasses.replace(self._named(place, link, written.seed), tokens=tokens, head=head, tail=tail)
        prompt = fill(prefix, place.sample, self.config.label_words)
        candidate = Candidate(sample, _bytes_of(place.pair), prompt, written.text, made=Given.TEXT.value)
        return Child(candidate, via=None if place.caption is None else self._encoded(image))

    def _request(self, place: Place, link: int, image: Image, prefix: str) -> Request:
        """The caption of a place's image; where images are given, siblings are those of every link."""
        texts = self.config.given is Given.IMAGE

        def seed_of(attempt: int) -> int:
            again = (attempt,) if attempt else ()
            return seed_from(self.config.seed, place.sample.id, link, place.child, "caption", *again)

        def text_of(words: str) -> str | None:
            if not texts:
                return words
            # The label's words stand in what is asked for, never in the text that a student learns from.
            composed = compose(without_label(prefix), words, place.sample)
            return None if composed is None else " ".join(composed[0])

        return Request(image, fill(prefix, place.sample, self.config.label_words), place.sample.id, seed_of, text_of)

    def _prefix(self, place: Place, link: int) -> str:
        """The place's prefix, a template; siblings and links take turns."""
        prefixes = self.config.used_prefixes
        return prefixes[(place.child + link - 1) % len(prefixes)]

    def _prompt(self, place: Place) -> str:
        config = self.config
        if place.caption is None:
            return fill(config.first_prompt, place.sample, config.label_words)
        return fill(config.next_prompt, place.sample, config.label_words, place.caption)

    def _image_seeds(self, places: Sequence[Place], link: int) -> list[int]:
        return [seed_from(self.config.seed, place.sample.id, link, place.child, "image") for place in places]

    def _named(self, place: Place, link: int, seed: int) -> Sample:
        origin = Provenance(place.sample.id, link, place.child, seed, self.models, place.source)
        return dataclasses.replace(place.sample, id=f"{place.sample.id}/{place.child}.{link}", provenance=origin)

    def _encoded(self, image: Image) -> Future[bytes]:
        return self.encoders.submit(_encode, image, self.config)


def _image_of(pair: Pair) -> Image:
    image = pair.load()
    if image is None:
        raise DataError(
            f"sample {pair.sample.id}: has no image; expected one, since images are given; add it to the row"
        )
    return image


def _bytes_of(pair: Pair) -> bytes:
    if isinstance(pair.image, bytes):
        return pair.image
    assert pair.image is not None  # `_image_of` has read it
    return pair.image.read_bytes()


def _encode(image: Image, config: ChainConfig) -> bytes:
    """The image, uint8 `(H, W, 3)`, as it stands in the store; the same image gives the same bytes."""
    if config.image_format is ImageFormat.JPEG:
        return encode_image(image, "jpeg", config.jpeg_quality)
    buffer = io.BytesIO()
    PilImage.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", compress_level=config.png_level)
    return buffer.getvalue()
