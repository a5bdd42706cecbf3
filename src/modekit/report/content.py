"""Everything a report shows. report.json is its plain data; page and pictures are made from it and nothing else.

Losses in nats per token, shares and weights between 0 and 1, numbers to 6 significant digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import TypeVar

import yaml
from pydantic import BaseModel, JsonValue

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.evaluation.forced import ForcedExperts
from modekit.evaluation.results import Results, Row
from modekit.evaluation.tasks.results import TaskResults
from modekit.evaluation.translation.results import TranslationResults
from modekit.members.licences import Source, facts, sources_of
from modekit.members.listing import members_of
from modekit.planning.summary import backbone_label
from modekit.recipes.auto import why_chosen
from modekit.report.result_files import TrainingTables, find_inspection, find_search, find_training
from modekit.report.routing import routing_of, samples_of
from modekit.search.results import TuneResults
from modekit.sources.config import architecture_of

Points = list[list[float]]
_Each = TypeVar("_Each")
_VARIANTS = 32  # of a search that are shown
_CHARACTERS = 400_000  # of translations that are shown as examples, all together
_POINTS = 400  # of a curve; more are thinned


@dataclass(frozen=True)
class LossCurves:
    """Losses as [step, loss] points: of the training text, and held-out by domain and their mean."""

    training: Points
    mean: Points
    domains: dict[str, Points]


@dataclass(frozen=True)
class SearchPoints:
    """All variants that were scored in full, and the front among them: [active parameters, mean loss]."""

    points: Points
    front: Points


@dataclass(frozen=True)
class Content:
    """What a report shows. `data` is report.json, of which the page is made; pictures are drawn from the rest."""

    data: dict[str, JsonValue]
    experts: list[str]
    results: Results | None
    curves: LossCurves | None
    search: SearchPoints | None
    notes: list[str]


def make_content(checkpoint: Checkpoint) -> Content:
    """Read what is there about a checkpoint; what is missing is null, and `missing` says why and what to run."""
    missing: list[str] = []
    results = Results.find(checkpoint, missing)
    if results is not None and not results.domains:
        missing.append(f"{results.file} has no domain with an expert of its own")
    inspection = find_inspection(checkpoint, missing)
    trained, tasks = find_training(checkpoint, missing), TaskResults.find(checkpoint, missing)
    search = find_search(checkpoint, missing)
    translation, forced = TranslationResults.find(checkpoint, missing), ForcedExperts.find(checkpoint, missing)
    sources = sources_of(checkpoint)
    curves, points = _curves(checkpoint, trained), _points(search)
    data = {
        "format": 1,
        "name": checkpoint.folder.name,
        "modekit_version": checkpoint.record.modekit_version,
        "mixture": _mixture(checkpoint),
        "sizes": _sizes(checkpoint),
        "results": _results(results),
        "routing": routing_of(inspection) if inspection is not None else None,
        "samples": samples_of(inspection, checkpoint.shape.family) if inspection is not None else None,
        "forced": _forced(forced) if forced is not None else None,
        "training": _training(checkpoint, trained, curves),
        "tasks": tasks if tasks is not None and tasks.tasks else None,
        "translation": _translation(translation) if translation is not None and translation.rows else None,
        "search": _search(search, points) if search is not None and points is not None else None,
        "members": _members(checkpoint),
        "provenance": _provenance(checkpoint, results),
        "licences": {"sources": [_licence(source) for source in sources], "facts": facts(sources)},
        "missing": missing,
    }
    shown = {key: rounded(value) for key, value in data.items()}
    return Content(shown, checkpoint.names, results, curves, points, missing)


def rounded(value: object) -> JsonValue:
    """Plain data of models, dataclasses and collections: floats to 6 significant digits, null for what is not finite."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    elif is_dataclass(value):
        value = vars(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"{type(value).__name__} is no JSON")


def _mixture(checkpoint: Checkpoint) -> dict[str, object]:
    record, recipe = checkpoint.record, checkpoint.record.recipe
    linear = recipe.mixture.method == "linear"
    return {
        "architecture": architecture_of(checkpoint.config),
        "native": checkpoint.shape.plain,
        "experts": checkpoint.names,
        "method": recipe.mixture.method,
        "top_k": recipe.top_k,
        "top_p": recipe.mixture.top_p,
        "by_threshold": recipe.mixture.threshold is not None,
        "router": "fixed weights" if linear else recipe.mixture.router.said,
        "router_why": why_chosen(recipe, native=checkpoint.shape.plain),
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
    whole = mixture.router.granularity == "sequence" or mixture.fit.decides.once
    if pair and (whole or mixture.fit.decides.for_model):
        return "source"
    return "text" if whole else "segment" if mixture.router.granularity == "segment" else "token"


def _sizes(checkpoint: Checkpoint) -> dict[str, object]:
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


def _results(results: Results | None) -> dict[str, object] | None:
    """The table, and for every row means with their standard errors."""
    if results is None:
        return None
    every, rows = [*results.domains, *results.unseen], []
    for row in results.rows:
        loss = row.mean_loss(results.domains) if results.domains else None
        gap, error = gap_of(results, row, None)
        rows.append(
            {
                **_fields(row, "scores", "identity"),
                "domains": {name: _fields(score, "blocks") for name, score in row.scores.items()},
                "mean": {"loss": loss, "gap_closed": gap, "gap_error": error},
            }
        )
    return {
        "domains": results.domains,
        "unseen": results.unseen,
        "rows": rows,
        "text": {name: vars(results.text[name]) for name in every if name in results.text},
        "lowest": {
            name: _best([(row.name, row.scores[name].loss) for row in results.rows if name in row.scores]) for name in every
        },
        "against_base": _against_base(results),
        "notes": results.notes,
    }


def _forced(found: ForcedExperts) -> dict[str, object]:
    """What of every expert the mixture carries, on its own text and on all others."""
    rows = [{**vars(row), "not_carried": row.not_carried} for row in found.by_expert()]
    return {"rows": rows, "said": found.said, "notes": found.notes}


def _fields(value: object, *left_out: str) -> dict[str, object]:
    """Of a dataclass, but for those left out."""
    return {name: each for name, each in vars(value).items() if name not in left_out}


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


def gap_of(results: Results, row: Row, domain: str | None) -> tuple[float | None, float | None]:
    """The gap that a row closes on a domain, or their mean, and its standard error (domains' texts are independent)."""
    if domain is not None:
        score = row.scores.get(domain)
        return (None, None) if score is None else (score.gap_closed, score.gap_error)
    with_gap = [score for name, score in row.scores.items() if name in results.domains and score.gap_closed is not None]
    errors = [score.gap_error for score in with_gap if score.gap_error is not None]
    whole = errors and len(errors) == len(with_gap)
    return row.mean_gap(results.domains), math.sqrt(sum(error * error for error in errors)) / len(errors) if whole else None


def _translation(found: TranslationResults) -> dict[str, object]:
    """The table, and the examples of each domain; texts are cut where there are so many that a page has no room for them."""
    room = _CHARACTERS // (5 * len(found.examples) or 1)  # of a text: an example has five
    examples: dict[str, list[object]] = {}
    for example in found.examples:
        said = vars(example)
        texts = {name: text if len(text) <= room else f"{text[:room]}…" for name, text in said.items() if isinstance(text, str)}
        examples.setdefault(example.domain, []).append({**said, **texts, "domain": example.domain})
    return {**found.as_data(), "examples": examples}


def _search(search: TuneResults, points: SearchPoints) -> dict[str, object]:
    """The variants of a search, those that were scored as points, too."""
    keys = {"name", "active", "native", "best", "pareto"}
    scored = [each for each in search.candidates if each.losses]
    variants = [{**each.model_dump(include=keys), "mean_loss": each.mean_loss} for each in scored[:_VARIANTS]]
    return {"variants": variants, "tried": len(scored), "seconds": search.seconds, **vars(points)}


def _points(search: TuneResults | None) -> SearchPoints | None:
    if search is None:
        return None
    scored = [(each.pareto, [each.active, each.mean_loss]) for each in search.candidates if each.mean_loss is not None]
    front = sorted((point for pareto, point in scored if pareto), key=lambda point: point[0])
    return SearchPoints([point for _, point in scored], front)


def _training(checkpoint: Checkpoint, trained: TrainingTables | None, curves: LossCurves | None) -> dict[str, object] | None:
    records = checkpoint.record.training
    if not records:
        return None
    return {
        "runs": [
            {
                "what": record.settings.get("what"),
                "losses": record.settings.get("losses"),
                "steps": record.steps,
                "tokens": record.tokens,
                "parameters": record.parameters,
                "select_loss": _in_order(record.select_loss, checkpoint.names),
                "notes": record.notes,
            }
            for record in records
        ],
        "results": _results(trained.results) if trained is not None else None,
        "curve": curves,
    }


def _curves(checkpoint: Checkpoint, trained: TrainingTables | None) -> LossCurves | None:
    """Of the last training."""
    if trained is None or trained.curve is None:
        return None
    curve = trained.curve

    def points(*names: str) -> list[list[float]]:
        values = next((curve.columns[name] for name in names if name in curve.columns), [])
        found = [[step, value] for step, value in zip(curve.steps, values, strict=False) if value is not None]
        return [*found[: -1 : math.ceil(len(found) / _POINTS) or 1], *found[-1:]]

    domains = _in_order(checkpoint.record.training[-1].select_loss, checkpoint.names)
    held_out = {name: points(f"eval_{name}_loss", f"eval_{name}") for name in domains}
    return LossCurves(points("loss"), points("eval_loss"), {name: each for name, each in held_out.items() if each})


def _members(checkpoint: Checkpoint) -> dict[str, object]:
    experts = [{"bytes": each.nbytes, **_fields(each, "nbytes", "source")} for each in members_of(checkpoint)]
    return {"experts": experts, "history": [{"on": each.on, "said": each.said} for each in checkpoint.record.history]}


def _provenance(checkpoint: Checkpoint, results: Results | None) -> dict[str, object]:
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


def _texts(texts: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    kinds = {"documents": int, "tokens": int, "sha256": str}
    return {
        name: {key: text[key] if isinstance(text.get(key), kind) else None for key, kind in kinds.items()}
        for name, text in texts.items()
    }


def _licence(source: Source) -> dict[str, object]:
    return {
        "used_as": list(source.used_as),
        "spec": source.spec,
        "revision": source.revision,
        "licence": source.said,
        "link": source.licence_link,
        "found": source.said_by,
        "known": source.licence is not None,
    }
