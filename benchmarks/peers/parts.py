"""Domains that are hard to tell apart: the demo's, cut by what their documents say, or by how they say it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

import numpy
from sklearn.feature_extraction.text import TfidfVectorizer

from modekit.demo.text import DOMAINS
from modekit.text.shipped import ENGLISH, QUESTION_FRAMES
from modekit.text.splits import split_of

_ENTRY = re.compile(r"(?:(?<=\. )|^)([A-Z][^.:;\n]{1,60}): ")
"""A term of a glossary. Its synonyms stand behind commas."""
_FRAMES = [frame for frame in QUESTION_FRAMES[ENGLISH] if frame.count("{}") == 1][:6]
"""Those that ask for a definition."""
_LEAST_ENTRIES = 3
Documents = Mapping[str, Sequence[str]]


def halves(documents: Sequence[str]) -> list[list[str]]:
    """Documents on either side of the median of the first principal direction of their words."""
    weights_NW = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(documents).toarray()
    weights_NW -= weights_NW.mean(0)
    _, vectors_NN = numpy.linalg.eigh(weights_NW @ weights_NW.T)
    side_N = vectors_NN[:, -1] * (1 if vectors_NN[0, -1] > 0 else -1)
    above = {*numpy.argsort(side_N, kind="stable")[(len(documents) + 1) // 2 :].tolist()}
    return [[each for place, each in enumerate(documents) if (place in above) == which] for which in (True, False)]


def cut(documents: Documents, times: int) -> dict[str, list[str]]:
    """Every domain in 2^times parts of one size."""
    found = {}
    for name in DOMAINS:
        parts = [list(documents[name])]
        for _ in range(times):
            parts = [half for part in parts for half in halves(part)]
        found |= {f"{name}-{place + 1}": part for place, part in enumerate(parts)}
    return found


def asked(document: str) -> str:
    """Every entry of a glossary as a question and its answer; the document stays in its split."""

    def question(found: re.Match[str]) -> str:
        return f"{draw.choice(_FRAMES).format(found[1].partition(',')[0].lower())} "

    draw = random.Random(document)
    while True:
        text = _ENTRY.sub(question, document)
        if text == document or split_of(text) == split_of(document):
            return text


def styles(documents: Documents) -> dict[str, list[str]]:
    """Two styles each of medicine (glossary, questions), law (licences, glossary) and code (functions, classes)."""
    medicine, law, code = (documents[name] for name in ("medicine", "law", "code"))
    return {
        "medicine-entry": list(medicine[::2]),
        "medicine-question": [asked(each) for each in medicine[1::2]],
        "law-licence": [each for each in law if not is_glossary(each)],
        "law-entry": [each for each in law if is_glossary(each)],
        "code-function": [each for each in code if not each.startswith("class ")],
        "code-class": [each for each in code if each.startswith("class ")],
    }


def is_glossary(document: str) -> bool:
    """Whether a document is entries."""
    return len(_ENTRY.findall(document)) >= _LEAST_ENTRIES


PARTS: dict[str, Callable[[Documents], dict[str, list[str]]]] = {
    "styles": styles,
    "eight": lambda documents: cut(documents, 1),
    "sixteen": lambda documents: cut(documents, 2),
}
"""How the demo's domains are cut -> the domains of the pool."""
