"""What a corpus is made of, and which side of the split each piece falls on.

The split is by document: sixteen hex digits of the content decide, so a document keeps its side when others
come and go, and a copy can never sit on the other side. Near-copies are caught in `overlap`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Split = Literal["train", "validation"]
_ENOUGH = 10
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Document:
    """One self-contained text and the domain it is labelled with."""

    domain: str
    text: str
    split: Split | None = None
    """Set when its source has decided already; None lets the content decide."""

    @cached_property
    def id(self) -> str:
        return document_id(self.text)

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode("utf-8", "surrogatepass"))


def document_id(text: str) -> str:
    """Sixteen hex digits of the sha256 of the text: its name, and what decides its split."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_of(document_id: str, validation_fraction: float) -> Split:
    """Which side a document is on, a function of its content alone."""
    return "validation" if int(document_id, 16) < validation_fraction * 2**64 else "train"


def choose_held_out(documents: Iterable[Document], validation_fraction: float) -> set[str]:
    """Ids of the documents to validate on.

    A domain of at least ten documents of which the fraction would take none gives the one with the smallest id.
    """
    held_out: set[str] = set()
    smallest: dict[str, str] = {}
    count: dict[str, int] = defaultdict(int)
    covered: set[str] = set()
    for document in documents:
        if (document.split or split_of(document.id, validation_fraction)) == "validation":
            held_out.add(document.id)
            covered.add(document.domain)
        elif document.split is None:
            count[document.domain] += 1
            smallest[document.domain] = min(document.id, smallest.get(document.domain, document.id))
    if validation_fraction:
        held_out |= {smallest[name] for name, n in count.items() if n >= _ENOUGH and name not in covered}
    return held_out


def without_copies(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop empty documents and exact copies (of any domain), keeping the first."""
    seen: set[str] = set()
    for document in documents:
        if not document.text.strip():
            continue
        name = document.id
        if name not in seen:
            seen.add(name)
            yield document
