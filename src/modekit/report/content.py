"""Everything a report shows, as plain data. report.json is this; page and plots are made from it and nothing else.

Losses in nats per token, shares and weights between 0 and 1, numbers to 6 significant digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import yaml

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.evaluation.chat import ChatResults
from modekit.evaluation.results import Results
from modekit.evaluation.tasks.results import TaskResults
from modekit.evaluation.translation.results import TranslationResults
from modekit.members.licences import Source, facts, sources_of
from modekit.members.listing import members_of
from modekit.planning.summary import backbone_label
from modekit.report.result_files import (
    Curve,
    Search,
    TrainingTables,
    find_inspection,
    find_search,
    find_training,
)
from modekit.report.routing import routing_of, samples_of

_Each = TypeVar("_Each")
_VARIANTS = 12  # of a search that are shown for their loss alone
_CHARACTERS = 400_000  # of translations that are shown as examples, all together
_POINTS = 400  # of a curve; more are thinned


def make_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read what is there about a checkpoint; what is missing is null, and `missing` says why and what to run."""
    missing: list[str] = []
    results = Results.find(checkpoint, missing)
    if results is not None and not results.domains:
        missing.append(f"{results.file} has no domain with an expert of its own")
    inspection = find_inspection(checkpoint, missing)
    trained, tasks = find_training(checkpoint, missing), TaskResults.find(checkpoint, missing)
    chat, search = ChatResults.find(checkpoint, missing), find_search(checkpoint, missing)
    translation = TranslationResults.find(checkpoint, missing)
    sources = sources_of(checkpoint)
    content: dict[str, Any] = rounded(
        {
            "format": 1,
            "name": checkpoint.folder.name,
            "modekit_version": checkpoint.record.modekit_version,
            "mixture": _mixture(checkpoint),
            "sizes": _sizes(checkpoint),
            "results": _results(results) if results is not None else None,
            "routing": routing_of(inspection) if inspection is not None else None,
            "samples": samples_of(inspection, checkpoint.shape.family) if inspection is not None else None,
            "training": _training(checkpoint, trained),
            "tasks": tasks.as_data() if tasks is not None and tasks.tasks else None,
            "chat": chat.as_data() if chat is not None and chat.rows else None,
            "translation": _translation(translation) if translation is not None and translation.rows else None,
            "search": _search(search) if search is not None else None,
            "members": _members(checkpoint),
            "provenance": _provenance(checkpoint, results),
            "licences": {"sources": [_licence(source) for source in sources], "facts": facts(sources)},
            "missing": missing,
        }
    )
    return content


def rounded(value: Any) -> Any:
    """The same data with floats to 6 significant digits, and null for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _mixture(checkpoint: Checkpoint) -> dict[str, Any]:
    record, recipe = checkpoint.record, checkpoint.record.recipe
    linear = recipe.mixture.method == "linear"
    return {
        "architecture": str(checkpoint.config["architectures"][0]),
        "native": checkpoint.shape.plain,
        "experts": checkpoint.names,
        "method": recipe.mixture.method,
        "top_k": recipe.top_k,
        "top_p": recipe.mixture.top_p,
        "router": "fixed weights" if linear else recipe.mixture.router.said,
        "granularity": "none" if linear else recipe.mixture.router.granularity,
        "chosen_per": _chosen_per(checkpoint),
        "status": record.router.status,
        "backbone": backbone_label(recipe),
        "layers": checkpoint.layers,
        "stacks": checkpoint.shape.family.sizes(checkpoint.config) if checkpoint.shape.family.pair else None,
        "dtype": str(checkpoint.config["dtype"]),
        "trainings": len(record.training),
    }


def _chosen_per(checkpoint: Checkpoint) -> str:
    """What a router decides on at once."""
    mixture, pair = checkpoint.record.recipe.mixture, checkpoint.shape.family.pair
    if mixture.fit is None:
        return "none"
    whole = mixture.router.granularity == "sequence" or mixture.fit.stays
    if pair and (whole or mixture.fit.decides_once):
        return "source"
    return "text" if whole else "token"


def _sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    parameters = checkpoint.parameters
    files = sorted({ref.file for ref in checkpoint.tensors.values()})
    statistics = checkpoint.folder / STATISTICS_FOLDER
    kept = sum(path.stat().st_size for path in statistics.glob("*.safetensors") if path.is_file())
    gates = sum(checkpoint.tensors[slot.name].numel for slot in checkpoint.slots)
    return {
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "dense": parameters.dense,
            "gates": gates,
            "total_of_dense": parameters.total / parameters.dense,
            "active_of_dense": parameters.active / parameters.dense,
        },
        "bytes": {"weights": sum(file.stat().st_size for file in files), "statistics": kept},
        "routers": len(checkpoint.slots),
    }


def _results(results: Results) -> dict[str, Any]:
    """The table, and for every row means with their standard errors (domains' texts are independent)."""
    rows = []
    for row in results.rows:
        scores = {
            name: {key: value for key, value in vars(score).items() if key != "blocks"} for name, score in row.scores.items()
        }
        with_gap = [score for name, score in row.scores.items() if name in results.domains and score.gap_closed is not None]
        rows.append(
            {
                "name": row.name,
                "kind": row.kind,
                "domains": scores,
                "total_parameters": row.total_parameters,
                "active_parameters": row.active_parameters,
                "mean": {
                    "loss": row.mean_loss(results.domains) if results.domains else None,
                    "gap_closed": row.mean_gap(results.domains),
                    "gap_error": _mean_error([score.gap_error for score in with_gap]),
                },
            }
        )
    every = [*results.domains, *results.unseen]
    lowest = {name: _best([(row.name, row.scores[name].loss) for row in results.rows if name in row.scores]) for name in every}
    text = {name: vars(results.text[name]) for name in every if name in results.text}
    return {
        "domains": list(results.domains),
        "unseen": list(results.unseen),
        "rows": rows,
        "text": text,
        "lowest": lowest,
        "against_base": _against_base(results),
        "notes": list(results.notes),
    }


def _against_base(results: Results) -> dict[str, dict[str, float]]:
    """Loss less the base's, by row and domain; empty without a base."""
    base = next((row for row in results.rows if row.kind == "base"), None)
    if base is None:
        return {}
    return {
        row.name: {name: score.loss - base.scores[name].loss for name, score in row.scores.items() if name in base.scores}
        for row in results.rows
    }


def _best(losses: Sequence[tuple[str, float]]) -> str | None:
    return min(losses, key=lambda pair: pair[1])[0] if losses else None


def _mean_error(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error * error for error in known)) / len(known) if known and len(known) == len(errors) else None


def _translation(found: TranslationResults) -> dict[str, Any]:
    """The table, and the examples of each domain; texts are cut where there are so many that a page has no room for them."""
    room = _CHARACTERS // (5 * len(found.examples) or 1)  # of a text: an example has five
    examples: dict[str, list[dict[str, Any]]] = {}
    for example in found.examples:
        said = vars(example)
        texts = {name: text if len(text) <= room else f"{text[:room]}…" for name, text in said.items() if isinstance(text, str)}
        examples.setdefault(example.domain, []).append({**said, **texts, "domain": example.domain})
    return {**found.as_data(), "examples": examples}


def _search(search: Search) -> dict[str, Any]:
    """The first variants of a search, the fixed ones and the front; all that were scored in full as [active, loss] points."""
    keys = {"name", "description", "mean_loss", "report", "active", "native", "best", "pareto"}
    shown = [
        # What a dropped one came to is of a part of the text, and no figure to stand beside the others'.
        variant.model_dump(include=keys) | ({} if variant.status == "scored" else {"mean_loss": None})
        for place, variant in enumerate(search.candidates)
        if variant.status != "refused"
        and (variant.name or variant.pareto or variant.best or (variant.status == "scored" and place < _VARIANTS))
    ]
    scored = [variant for variant in search.candidates if variant.status == "scored" and variant.mean_loss is not None]
    front = sorted((variant for variant in scored if variant.pareto), key=lambda variant: variant.active)
    return {
        "variants": shown,
        "tried": len(search.candidates),
        "dropped": sum(variant.status == "dropped" for variant in search.candidates),
        "seconds": search.seconds,
        "points": [[variant.active, variant.mean_loss] for variant in scored],
        "front": [[variant.active, variant.mean_loss] for variant in front],
    }


def _training(checkpoint: Checkpoint, trained: TrainingTables | None) -> dict[str, Any] | None:
    records = checkpoint.record.training
    if not records:
        return None
    return {
        "runs": [
            {
                "what": record.settings.get("what"),
                "losses": record.settings.get("losses"),
                "speed": record.settings.get("speed"),
                "steps": record.steps,
                "tokens": record.tokens,
                "parameters": record.parameters,
                "select_loss": _in_order(record.select_loss, checkpoint.names),
                "notes": record.notes,
            }
            for record in records
        ],
        "results": _results(trained.results) if trained is not None and trained.results is not None else None,
        "curve": _curve(trained.curve, list(_in_order(records[-1].select_loss, checkpoint.names)))
        if trained is not None and trained.curve is not None
        else None,
    }


def _curve(curve: Curve, domains: Sequence[str]) -> dict[str, Any]:
    """Losses as [step, loss] points: of the training text, and held-out by domain and their mean."""

    def points(*names: str) -> list[list[float]]:
        values = next((curve.columns[name] for name in names if name in curve.columns), [])
        found = [[step, value] for step, value in zip(curve.steps, values, strict=False) if value is not None]
        return found[:: math.ceil(len(found) / _POINTS) or 1]

    held_out = {name: points(f"eval_{name}_loss", f"eval_{name}") for name in domains}
    return {
        "training": points("loss"),
        "mean": points("eval_loss"),
        "domains": {name: each for name, each in held_out.items() if each},
    }


def _members(checkpoint: Checkpoint) -> dict[str, Any]:
    experts = [
        {
            "name": member.name,
            "kind": member.kind,
            "since": member.since,
            "bytes": member.nbytes,
            "gain": member.gain,
            "gap_closed": member.gap_closed,
            "licence": member.licence,
        }
        for member in members_of(checkpoint)
    ]
    return {"experts": experts, "history": [{"on": each.on, "said": each.said} for each in checkpoint.record.history]}


def _provenance(checkpoint: Checkpoint, results: Results | None) -> dict[str, Any]:
    record = checkpoint.record
    recipe = yaml.safe_dump(record.model_dump(mode="json")["recipe"], sort_keys=False, allow_unicode=True, width=100)
    scored = {name: vars(results.text[name]) for name in [*results.domains, *results.unseen]} if results is not None else {}
    return {
        "recipe": recipe,
        "recipe_digest": record.recipe_digest,
        "router_sha256": record.router.sha256,
        "sources": [
            {
                "label": source.label,
                "spec": source.spec,
                "revision": source.revision,
                "files": [{"name": name, "size": file.size, "blake3": file.blake3} for name, file in source.files.items()],
            }
            for source in record.sources
        ],
        "texts": {"fit": _texts(_in_order(record.router.text, checkpoint.names)), "scored": _texts(scored)},
        "trained_tensors": len(record.trained),
    }


def _in_order(texts: dict[str, _Each], names: Sequence[str]) -> dict[str, _Each]:
    return {name: texts[name] for name in [*names, *sorted(texts.keys() - set(names))] if name in texts}


def _texts(texts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys: Sequence[tuple[str, Callable[[Any], bool]]] = (
        ("documents", lambda value: isinstance(value, int)),
        ("tokens", lambda value: isinstance(value, int)),
        ("sha256", lambda value: isinstance(value, str)),
    )
    return {
        name: {key: text[key] if key in text and is_kind(text[key]) else None for key, is_kind in keys}
        for name, text in texts.items()
    }


def _licence(source: Source) -> dict[str, Any]:
    return {
        "used_as": list(source.used_as),
        "spec": source.spec,
        "revision": source.revision,
        "licence": source.said,
        "link": source.licence_link,
        "found": source.said_by,
        "known": source.licence is not None,
    }
