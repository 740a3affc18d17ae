"""One small file per family of models; each is asked only when the library it is for is loaded.

The order decides: the first adapter that recognises a module takes it. Add a family by adding a file and a
row.
"""

from __future__ import annotations

import sys

from moeviz.capture.adapters import deepspeed_gate, huggingface, jetmoe, llama4, named_tuple
from moeviz.capture.reading import Adapter

ADAPTERS: tuple[tuple[str, Adapter], ...] = (
    ("torch", named_tuple),
    ("transformers", jetmoe),
    ("transformers", llama4),
    ("transformers", huggingface),
    ("deepspeed", deepspeed_gate),
)
"""(library, adapter). A library that is not loaded cannot have made the model."""


def active_adapters() -> list[Adapter]:
    """The adapters whose library is loaded in this process."""
    return [adapter for library, adapter in ADAPTERS if library in sys.modules]
