"""The diet of every expert by kind of token: words, pieces of words, numbers, punctuation, white space.

Kinds are read off the text of a token alone, so that they mean the same for every tokenizer and language with letters.

Shapes: T tokens, E experts, K experts per token, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeviz.inspection.findings import ROUNDS, expert_value, layer_value
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import LayerReading
from moeviz.metrics import specialization
from moeviz.records import AnalysisValue

CLASSES = (
    "line end",
    "white space",
    "number",
    "punctuation",
    "word, capitalised",
    "word",
    "piece of a word",
    "mixed",
    "other",
)
"""Names of the classes; `class_of` gives a place among them."""
_PLACE = {name: at for at, name in enumerate(CLASSES)}


def class_of(text: str) -> int:
    """Place in CLASSES of a token's text.

    A word begins with a space (or its mark in a vocabulary: Ġ, ▁); a piece goes on where a token before it ended.
    """
    bare = text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    word = bare.strip()
    if not word:
        return _PLACE["line end" if "\n" in bare else "white space" if bare else "other"]
    if word.isalpha():
        if not bare[0].isspace():
            return _PLACE["piece of a word"]
        return _PLACE["word, capitalised" if word[0].isupper() else "word"]
    if word.isnumeric():
        return _PLACE["number"]
    if not any(letter.isalnum() for letter in word):
        return _PLACE["punctuation" if word.isascii() else "other"]
    return _PLACE["mixed"]


def diets(layer: int, reading: LayerReading, probe: ProbeBatch, texts: Sequence[str]) -> list[AnalysisValue]:
    """`expert_token_entropy` of every expert and its mean over them, against tokens in random order.

    The largest class of an expert is its label. Nothing where the text of the tokens is not known.
    """
    if not texts:
        return []
    num_experts, types_T = reading.probs_TE.shape[1], probe.token_ids_NS.ravel()
    class_of_type = np.array([class_of(text) for text in texts])
    classes_T = class_of_type[np.minimum(types_T, len(texts) - 1)]

    def entropies(classes_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cells = classes_T[:, None] * num_experts + reading.ids_TK
        table_CE = np.bincount(cells.ravel(), minlength=len(CLASSES) * num_experts)
        table_CE = table_CE.reshape(len(CLASSES), num_experts)
        return specialization.expert_token_entropy(table_CE), table_CE

    value_E, table_CE = entropies(classes_T)
    rng = np.random.default_rng(0)
    null_RE = np.stack([entropies(rng.permutation(classes_T))[0] for _ in range(ROUNDS)])
    used_E = np.flatnonzero(table_CE.sum(axis=0))
    null_R = null_RE[:, used_E].mean(axis=1)
    found = [layer_value(layer, "expert_token_entropy", value_E[used_E].mean(), null_R.mean(), null_R.std())]
    for expert in used_E:
        null = null_RE[:, expert]
        label = CLASSES[int(table_CE[:, expert].argmax())]
        value = value_E[expert]
        found.append(
            expert_value(layer, expert, "expert_token_entropy", value, null.mean(), null.std(), label)
        )
    return found
