"""The model card of a mixture, as the hub reads it: `modekit push` makes it.

Metadata in front, then what it is, how it was made, how to use it, what it is worth, its sources and their licences, its
limits. Where the sources' licences do not say one and the same, LICENSE.md lists them and the metadata says `other`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from modekit.building.preview import backbone_label
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import MixtureRecord, TrainingRecord
from modekit.evaluation.forced_results import ForcedExperts
from modekit.evaluation.results import Results
from modekit.evaluation.tables import ResultTable, as_markdown, plain
from modekit.evaluation.translation.results import TranslationResults
from modekit.files.figures import count_of
from modekit.members.licences import Source, facts, is_licence_id, sources_of
from modekit.recipes.choices import why_chosen
from modekit.recipes.paths import locate
from modekit.recipes.strict import BASE
from modekit.report.sections import licence_table
from modekit.sources.config import architecture_of
from modekit.sources.tokenizer_choice import chat_template
from modekit.text.documents import is_local
from modekit.text.written import texts_of

CARD_FILE = "README.md"
LICENCE_FILE = "LICENSE.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Card:
    """The card's files by name, and what it could not say."""

    contents: Mapping[str, bytes]
    notes: Sequence[str]


def make_card(checkpoint: Checkpoint, *, shown: MixtureRecord | None = None) -> Card:
    """The card's files. `shown` is the record as it is shown to others, by default the checkpoint's own."""
    sources = sources_of(checkpoint)
    data = _metadata(checkpoint, sources)
    if shown is not None:
        sources = [replace(source, spec=said.spec) for source, said in zip(sources, shown.sources, strict=True)]
    known = facts(sources)
    table = as_markdown(licence_table(sources), plain)
    problems = list[str]()
    values = {**_measured(checkpoint, problems), **_made_of(Checkpoint(checkpoint.folder, shown or checkpoint.record))}
    template = files("modekit.report").joinpath("card.md.jinja").read_text(encoding="utf-8")
    values |= {"source_table": table, "facts": [plain(fact) for fact in known]}
    card = ModelCard.from_template(data, None, template, **values)
    notes = [*problems, *known]
    if data.base_model is None:
        notes.append("base_model is left out: the sources are folders, not models of the hub")
    contents = {CARD_FILE: f"{card.content}\n"}
    if data.license_link == LICENCE_FILE:
        contents[LICENCE_FILE] = _licence_page(table, known)
    return Card({name: text.encode() for name, text in contents.items()}, notes)


def _metadata(checkpoint: Checkpoint, sources: Sequence[Source]) -> ModelCardData:
    """The front matter. A mixture of fine-tunes is a `merge` in the hub's words (adapter, finetune, merge, quantized)."""
    recipe = checkpoint.record.recipe
    root = checkpoint.recipe_root
    specs = dict.fromkeys(source.spec for source in sources)
    bases = [spec for spec in specs if _HUB_ID.fullmatch(spec) and locate(spec, root) is None]
    texts = [spec for expert in recipe.experts for spec in texts_of(expert)]
    data_sets = list(dict.fromkeys(spec for spec in texts if not is_local(spec, root)))
    licences = {source.licence for source in sources}
    licence = licences.pop()
    is_one = not licences and is_licence_id(licence)
    return ModelCardData(
        base_model=bases or None,
        base_model_relation="merge" if bases else None,
        datasets=data_sets or None,
        license=licence if is_one else "other",
        license_name=None if is_one else "of-the-sources",
        license_link=None if is_one else LICENCE_FILE,
        library_name="transformers",
        pipeline_tag="translation" if checkpoint.shape.family.pair else "text-generation",
        tags=["modekit", "moe", "merge", "mixture-of-domain-experts"],
    )


def _backbone(record: MixtureRecord) -> str:
    """Whose the rest is, and what of that the experts change nevertheless."""
    label = backbone_label(record.recipe)
    whose = "the base model" if label == BASE else label if label.startswith("expert ") else f"the models merged by {label}"
    return whose if record.carry is None else f"{whose}; what experts change of {record.carry.parts} goes through channels"


def _decides(checkpoint: Checkpoint) -> str:
    mixture = checkpoint.record.recipe.mixture
    always = mixture.always_on
    if mixture.method == "linear":
        return "every expert takes part in every token with a fixed weight"
    if mixture.top_p is not None:
        said = f"per token the fewest experts whose probabilities reach {mixture.top_p}"
    elif mixture.threshold is not None:
        said = f"per token every expert whose probability reaches {mixture.threshold}, or the best"
    elif mixture.method == "gating":
        said = "a router weighs all experts"
    else:
        said = f"a router chooses {checkpoint.record.recipe.top_k} of them"
    if always is None:
        return said
    who = "the base model" if always.expert == BASE else always.expert
    does = "reads every text beside them" if checkpoint.shape.routing.runs_common else "takes part in every token"
    return f"{said}, and {who} {does}{'' if always.weight is None else f' (weight {always.weight:g})'}"


def facts_of(checkpoint: Checkpoint) -> dict[str, object]:
    """What it is, in a few words, as page and card say it."""
    record = checkpoint.record
    return {
        "title": checkpoint.folder.name,
        "architecture": architecture_of(checkpoint.config),
        "dtype": str(checkpoint.config["dtype"]),
        "native": checkpoint.shape.plain,
        "backbone": _backbone(record),
        "decides": _decides(checkpoint),
        "status": record.router.status,
        "version": record.modekit_version,
    }


def _made_of(checkpoint: Checkpoint) -> dict[str, object]:
    """What the template says of the mixture and of how it was made."""
    record = checkpoint.record
    recipe = record.recipe
    router = record.router
    dumped = yaml.safe_dump(record.model_dump(mode="json")["recipe"], sort_keys=False, allow_unicode=True, width=120).rstrip()
    text = [
        [domain, *(str(used.get(key, "-"))[:16] for key in ("documents", "tokens", "sha256"))]
        for domain, used in router.text.items()
    ]
    of_others = {key: plain(value) if isinstance(value, str) else value for key, value in facts_of(checkpoint).items()}
    return {
        **of_others,
        "why": plain(why_chosen(recipe, plain=checkpoint.shape.plain)),
        "experts": [plain(name) for name in checkpoint.names],
        "total": count_of(checkpoint.parameters.total),
        "active": count_of(checkpoint.parameters.active),
        "folder": json.dumps(checkpoint.folder.name).replace("`", "\\u0060"),
        "pair": checkpoint.shape.family.pair,
        "chats": chat_template(checkpoint.folder) is not None,
        "recipe_digest": record.recipe_digest[:16],
        "fixed_weights": recipe.mixture.method == "linear",
        "recipe": dumped,
        "fence": "`" * max(3, *(len(run) + 1 for run in re.findall("`+", dumped) or [""])),  # longer than any inside
        "packed": [plain(f"{source.label} (from {source.packed})") for source in record.sources if source.packed],
        "text_table": as_markdown(ResultTable("", ["domain", "documents", "tokens", "sha256"], text), plain) if text else "",
        "trainings": [_training(each) for each in record.training],
    }


def _training(training: TrainingRecord) -> dict[str, object]:
    settings = training.settings
    return {
        "what": plain(", ".join(map(str, settings.get("what", [])))),
        "losses": plain(", ".join(map(str, settings.get("losses", {})))),
        "steps": training.steps,
        "tokens": f"{training.tokens:,}",
        "joint": settings.get("regime") == "joint",
        "teacher": plain(Path(str(settings["teacher"])).name) if settings.get("teacher") else "",
    }


def _measured(checkpoint: Checkpoint, problems: list[str]) -> dict[str, object]:
    """What was measured of this mixture, in Markdown; why some of it cannot be shown goes to `problems`."""
    parts = []
    for kind in (Results, ForcedExperts, TranslationResults):
        found = kind.find(checkpoint, problems)
        for table in [] if found is None else found.tables()[:1]:
            parts += [plain(table.caption), as_markdown(table, plain)]
            parts += ["\n".join(f"* {plain(note)}" for note in found.notes)] if found is not None and found.notes else []
    return {"problems": [plain(each) for each in problems], "measured": "\n\n".join(parts)}


def _licence_page(source_table: str, known: Sequence[str]) -> str:
    return (
        "# Licences of the sources\n\nThis model was made from the models below, and each keeps its licence. What that "
        f"means together is for you to judge; these are the facts.\n\n{source_table}\n\n"
        + "".join(f"* {plain(fact)}\n" for fact in known)
    )
