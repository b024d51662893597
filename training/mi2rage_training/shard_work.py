"""One shard made and written, again where that fails, and at last without the samples that cannot be made."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence

from mi2rage_engines.bundle import FileRecord
from mi2rage_engines.errors import InputError
from mi2rage_training.chain_links import Links
from mi2rage_training.pairs import Pair
from mi2rage_training.store import Candidate, StoreWriter
from mi2rage_training.store_files import Files
from mi2rage_training.store_manifest import NOTE_SUFFIX, note_name, shard_name
from mi2rage_training.tally import Tally

__all__ = ["LeftOut", "MadeShard", "Shard", "ShardWork", "explain_left_out", "left_out_of"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
    """A real sample of which nothing could be made, and why."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """What a shard is made of.

    Attributes:
        index: its number in the store.
        pairs: all its real samples.
        left_out: those of them that are known to kill the process they are made in.
        proven: the models have made something in this store already: where all of the shard fails, that is then the
            samples' fault.
    """

    index: int
    pairs: tuple[Pair, ...]
    left_out: tuple[LeftOut, ...] = ()
    proven: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class MadeShard:
    """What came of a shard.

    Attributes:
        record: of its file.
        shown: some of its candidates, for people to look at.
    """

    index: int
    record: FileRecord
    tally: Tally
    left_out: tuple[LeftOut, ...] = ()
    shown: tuple[Candidate, ...] = ()


class ShardWork:
    """Makes shards with models that are loaded.

    A shard whose making raises is tried again, `tries` times in all. Then each of its samples is made alone, as often;
    those that fail are left out, and the shard is made of the others in one batch. So its other candidates are what a
    shard without these samples would have (a batch's shape can change an image's last bits). Nothing random decides
    any of this: a sample that fails always is left out by every run.

    Args:
        links: make the candidates.
        writer: of the store.
        tries: 1 or more; 0 raises every error as it is.
        given_up: whether the run is over, and an error but a sign of that.
        showing: whether candidates to show are wanted.
    """

    def __init__(
        self,
        links: Links,
        writer: StoreWriter,
        tries: int = 0,
        given_up: Callable[[], bool] = lambda: False,
        showing: bool = False,
    ) -> None:
        if tries < 0:
            raise InputError(f"tries: came {tries}; expected 1 or more, or 0 to stop at the first error")
        self.links = links
        self.writer = writer
        self.tries = tries
        self.given_up = given_up
        self.showing = showing

    def make(self, shard: Shard) -> MadeShard:
        """Make a shard and write it.

        Raises:
            what making it raised, where no sample alone is at fault, or all are and nothing was ever made.
        """
        known = {sample.id for sample in shard.left_out}
        pairs = [pair for pair in shard.pairs if pair.sample.id not in known]
        left_out = list(shard.left_out)
        try:
            candidates = self._tried(pairs)
        except Exception as error:
            if not self.tries or self.given_up():
                raise
            logger.info("shard %d fails (%s); making its samples one by one", shard.index, error)
            bad = self._that_fail(pairs)
            if self.given_up() or not bad or (len(bad) == len(pairs) and not shard.proven):
                raise
            left_out += bad
            known |= {sample.id for sample in bad}
            candidates = self._tried([pair for pair in pairs if pair.sample.id not in known])
        order = [pair.sample.id for pair in shard.pairs]
        left_out.sort(key=lambda sample: order.index(sample.id))
        write_left_out(self.writer.files, shard.index, left_out)
        self.writer.write(shard.index, candidates)
        record = self.writer.record(shard.index)
        assert record is not None  # it was written right now
        made = len(shard.pairs) - len(left_out)
        shown = [row for row in candidates if row.provenance.parent == candidates[0].provenance.parent]
        return MadeShard(
            shard.index,
            record,
            Tally.of(candidates, made, self.links.config),
            tuple(left_out),
            tuple(shown) if self.showing else (),
        )

    def try_out(self, pair: Pair) -> LeftOut | None:
        """Make a sample alone, and throw it away; why it is to be left out, if so."""
        try:
            self._tried([pair])
        except Exception as error:
            if self.given_up():
                raise
            return LeftOut(pair.sample.id, f"{type(error).__name__}: {error}")
        return None

    def _that_fail(self, pairs: Sequence[Pair]) -> list[LeftOut]:
        return [found for pair in pairs if (found := self.try_out(pair)) is not None]

    def _tried(self, pairs: Sequence[Pair]) -> list[Candidate]:
        if not pairs:
            return []
        for _ in range(self.tries - 1):
            try:
                return self.links.make(pairs)
            except Exception:
                if self.given_up():
                    raise
                logger.debug("making %d samples failed; once more", len(pairs), exc_info=True)
        return self.links.make(pairs)


def write_left_out(files: Files, index: int, left_out: Sequence[LeftOut]) -> None:
    """Note what a shard lacks; before the shard itself is written, so that none is there without its note."""
    if not left_out:
        files.remove(note_name(shard_name(index)))
        return
    lines = (json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n" for sample in left_out)
    files.write(note_name(shard_name(index)), "".join(lines).encode())


def left_out_of(files: Files) -> list[LeftOut]:
    """All samples that a store lacks, in the order of its shards."""
    notes = sorted(name for name in files.names() if name.endswith(NOTE_SUFFIX) and not name.startswith("."))
    # Not `splitlines`, which breaks at characters that JSON leaves as they are.
    lines = (line for name in notes for line in files.read(name).decode().split("\n"))
    return [LeftOut(**json.loads(line)) for line in lines if line]


def explain_left_out(store: object, left_out: Sequence[LeftOut]) -> str:
    """A message on samples that a store lacks."""
    names = ", ".join(sample.id for sample in left_out[:5])
    more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
    return (
        f"{store}: nothing could be made of {len(left_out)} samples, which were left out: {names}{more} "
        f"({left_out[0].reason}); the store holds all others and can be used; the files *{NOTE_SUFFIX} in it name each "
        "with its reason; delete such a file's shard to have it tried again, or give --skip-bad where this is expected"
    )
