"""Build the embedded corpus once, and say exactly what is in it.

A corpus is a folder of `DOMAIN.jsonl` (one document a line: id, split, text) and `manifest.json` with the
bytes, documents and sha256 of each domain, the versions it was found in and the seed. Its key covers all of
these and the source of this package, so an upgrade of Python or of a grammar makes a new corpus and never a
silent mixture.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from moeviz.errors import MoevizError
from trainer.corpus.documents import Document, choose_held_out, without_copies
from trainer.corpus.domains import DOMAINS, Domain
from trainer.corpus.overlap import fingerprints, near_copies
from trainer.data_cache import cached, digest
from trainer.data_progress import progress

_FORMAT = 1
_PACKAGES = ("torch", "sympy", "mpmath", "networkx")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What the embedded corpus holds."""

    bytes_per_domain: int = 560_000
    """Quota of UTF-8 bytes of each domain; a found domain may have less."""
    seed: int = 0
    """Seed of the generated domains."""
    generated_only: bool = False
    """Leave out what is found on the machine: the corpus is then byte-identical everywhere."""
    validation_fraction: float = 0.05
    """Share of the documents held out, by the hash of their content."""

    def __post_init__(self) -> None:
        if self.bytes_per_domain < 1:
            raise MoevizError(
                f"bytes_per_domain={self.bytes_per_domain} must be positive; 560000 is the default"
            )
        check_fraction(self.validation_fraction)
        if self.seed < 0:
            raise MoevizError(f"seed={self.seed} must not be negative; use 0 or more")


def check_fraction(fraction: float) -> None:
    """Raises MoevizError unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        raise MoevizError(
            f"validation_fraction={fraction} must be at least 0 and below 1; 0.05 holds out a twentieth"
        )


class Corpus:
    """A finished corpus folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest: dict[str, Any] = orjson.loads((path / "manifest.json").read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise MoevizError(
                f"the corpus in {path} is damaged ({error}); delete that folder to rebuild"
            ) from error

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.manifest["domains"])

    @property
    def key(self) -> str:
        """Changes when any byte of any domain changes."""
        return digest({name: entry["sha256"] for name, entry in self.manifest["domains"].items()})

    @property
    def num_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["domains"].values())

    def documents(self) -> Iterator[Document]:
        """Every document in the order of the table, with its split."""
        for domain in self.domains:
            with (self.path / f"{domain}.jsonl").open("rb") as lines:
                for line in lines:
                    entry = orjson.loads(line)
                    yield Document(domain, entry["text"], entry["split"])


def build_corpus(
    config: CorpusConfig | None = None, *, quiet: bool = False, root: Path | None = None
) -> Corpus:
    """The embedded corpus of this machine, from the cache when it is there.

    Raises:
        MoevizError: the cache cannot be written.
    """
    config = config or CorpusConfig()
    identity = {"format": _FORMAT, **asdict(config), **_versions(config), "source": _source_digest()}
    path = cached("corpus", digest(identity), lambda folder: _build(folder, config, quiet), root=root)
    return Corpus(path)


def _build(folder: Path, config: CorpusConfig, quiet: bool) -> None:
    domains = [domain for domain in DOMAINS if domain.layer == "generated" or not config.generated_only]
    where = f"building the corpus in {folder.parents[1]}"
    with progress(where, total=len(domains) * config.bytes_per_domain, quiet=quiet) as advance:
        documents = []
        for document in without_copies(_all_texts(domains, config)):
            documents.append(document)
            advance(document.num_bytes)
    kept = _split(documents, config.validation_fraction)
    entries = {}
    for domain in domains:
        rows = [document for document in kept if document.domain == domain.name]
        if rows:
            entries[domain.name] = _write_domain(folder, domain, rows)
    manifest = {
        "format": _FORMAT,
        **asdict(config),
        **_versions(config),
        "domains": entries,
        "absent": [domain.name for domain in domains if domain.name not in entries],
        "near_copies_dropped": len(documents) - len(kept),
    }
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


def _all_texts(domains: list[Domain], config: CorpusConfig) -> Iterator[Document]:
    for domain in domains:
        room = config.bytes_per_domain
        for text in domain.texts(config.seed):
            text = text.encode("utf-8", "replace").decode()
            room -= len(text.encode())
            if room < 0:
                break
            yield Document(domain.name, text)


def _split(documents: list[Document], fraction: float) -> list[Document]:
    """Give each document its side and drop the validation documents that are near-copies of training text."""
    held_out = choose_held_out(documents, fraction)
    prints = {d.id: fingerprints(d.text) for d in documents if d.id in held_out}
    copies = near_copies(prints, (fingerprints(d.text) for d in documents if d.id not in held_out))
    return [
        replace(document, split="validation" if document.id in held_out else "train")
        for document in documents
        if document.id not in copies
    ]


def _write_domain(folder: Path, domain: Domain, documents: list[Document]) -> dict[str, Any]:
    content = hashlib.sha256()
    with (folder / f"{domain.name}.jsonl").open("wb") as out:
        for document in documents:
            line = orjson.dumps({"id": document.id, "split": document.split, "text": document.text}) + b"\n"
            content.update(line)
            out.write(line)
    return {
        "layer": domain.layer,
        "description": domain.description,
        "documents": len(documents),
        "validation_documents": sum(document.split == "validation" for document in documents),
        "bytes": sum(document.num_bytes for document in documents),
        "sha256": content.hexdigest(),
    }


def _versions(config: CorpusConfig) -> dict[str, Any]:
    """What the found domains depend on; nothing for a corpus of generated domains."""
    if config.generated_only:
        return {}
    return {
        "python": platform.python_version(),
        "packages": {name: _package_version(name) for name in _PACKAGES},
    }


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _source_digest() -> str:
    """Hash of this package's code: a changed grammar is another corpus."""
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()
