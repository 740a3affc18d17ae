"""Sources made of sources: several as one, one under a label, one on a side of the split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from trainer.corpus import Document, Split
from trainer.data_cache import digest
from trainer.data_sources import Source


@dataclass(frozen=True)
class JoinedSource:
    """One source after the other."""

    members: tuple[Source, ...]

    @property
    def vetted(self) -> bool:
        """Held-out text of one may be training text of another."""
        return len(self.members) == 1 and self.members[0].vetted

    @cached_property
    def key(self) -> str:
        return digest([member.key for member in self.members])

    @property
    def num_bytes(self) -> int:
        return sum(member.num_bytes for member in self.members)

    def documents(self) -> Iterator[Document]:
        for member in self.members:
            yield from member.documents()


@dataclass(frozen=True)
class LabelledSource:
    """A source whose documents are all of one domain."""

    source: Source
    domain: str

    @property
    def vetted(self) -> bool:
        return self.source.vetted

    @cached_property
    def key(self) -> str:
        return digest([self.source.key, "domain", self.domain])

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes

    def documents(self) -> Iterator[Document]:
        return (replace(document, domain=self.domain) for document in self.source.documents())


@dataclass(frozen=True)
class SidedSource:
    """A source that is all trained on, or all held out."""

    source: Source
    side: Split
    vetted: bool = False

    @cached_property
    def key(self) -> str:
        return digest([self.source.key, "side", self.side])

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes

    def documents(self) -> Iterator[Document]:
        return (replace(document, split=self.side) for document in self.source.documents())
