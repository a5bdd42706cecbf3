"""How generated text is scored. Copied beside the task files, where lm-evaluation-harness calls it: no import of modekit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def process_results(doc: Mapping[str, str | int], results: Sequence[str]) -> dict[str, float | tuple[str, str]]:
    """ChrF and ROUGE-L of one text, 0 to 100, and the pair (reference, text) that corpus BLEU is made of."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_chrf

    words = int(doc.get("words") or 0)
    reference, text = str(doc["reference"]).strip(), results[0].strip()
    if words:
        text = " ".join(text.split()[:words])
        reference = " ".join(reference.split())
    else:
        reference, text = reference.removesuffix("."), text.removesuffix(".")
    return {
        "chrf": sentence_chrf(text, [reference]).score,
        "bleu": (reference, text),
        "rougeL": 100 * RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure,
    }
