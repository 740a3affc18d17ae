"""A corpus that needs no download: made and found on the user's machine, kept in the cache, shipped as code.

Three layers: *generated* domains from seeded grammars (byte-identical everywhere; the tests use these alone),
domains *found* in the Python standard library, and domains found beside torch. `domains.DOMAINS` is the
table, `build` makes the files and their manifest.

    build_corpus(config=CorpusConfig(), quiet=False) -> Corpus
    Corpus.documents() -> Iterator[Document]      in the table's order, each with its split
    Corpus.manifest, Corpus.path, Corpus.domains
"""

from trainer.corpus.build import Corpus, CorpusConfig, build_corpus
from trainer.corpus.documents import SPLITS, Document, Split
from trainer.corpus.domains import DOMAINS, Domain

__all__ = ["DOMAINS", "SPLITS", "Corpus", "CorpusConfig", "Document", "Domain", "Split", "build_corpus"]
