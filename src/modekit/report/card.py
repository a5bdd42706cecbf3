"""The model card of a mixture: OUT/README.md as the hub reads it.

Metadata in front, then what it is, how it was made, how to use it, what it is worth, its sources and their licences, its
limits. Where the sources' licences do not say one and the same, LICENSE.md lists them and the metadata says `other`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import Record
from modekit.errors import OutputError
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results import Results
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.evaluation.translation.results import TranslationResults, score_table
from modekit.files.change import change_together
from modekit.files.read import UNREADABLE, read_text
from modekit.members.licences import Source, facts, sources_of
from modekit.members.taught import teachers_of
from modekit.planning.summary import backbone_label
from modekit.recipes.strict import BASE
from modekit.sources.tokenizer import chat_template
from modekit.text.documents import is_local

CARD_FILE, LICENCE_FILE = "README.md", "LICENSE.md"
_MARK = re.compile(r"\n<!-- modekit card ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Card:
    """What was written, and what the card could not say."""

    files: Sequence[Path]
    licence: str
    notes: Sequence[str]


def write_card(checkpoint: Checkpoint, *, overwrite: bool = False, ask_hub: bool = True) -> Card:
    """Write OUT/README.md, and OUT/LICENSE.md where one licence does not say it all.

    Licences of hub models whose README is not at hand are asked for with `ask_hub`. Raises OutputError when there is a file
    that modekit did not write, or that was changed since, unless `overwrite`.
    """
    made = make_card(checkpoint, ask_hub=ask_hub)
    files = {checkpoint.folder / name: content for name, content in made.contents.items()}
    for path in files:
        if not overwrite and not is_ours(path):
            raise OutputError(
                "a file that modekit did not write, or that was changed since, would be lost",
                where=str(path),
                remedy="move it away, or pass --overwrite",
            )
    change_together(checkpoint.folder, made.contents)
    return Card(list(files), made.licence, made.notes)


@dataclass(frozen=True)
class CardText:
    """A card that is not written yet: files by name, and what it could not say."""

    contents: Mapping[str, bytes]
    licence: str
    notes: Sequence[str]


def make_card(checkpoint: Checkpoint, *, ask_hub: bool = True, shown: Record | None = None) -> CardText:
    """The card's files. `shown` is the record as it is shown to others, by default the checkpoint's own."""
    sources = sources_of(checkpoint, ask_hub=ask_hub)
    measured = _measured(checkpoint)
    data = _metadata(checkpoint, sources)
    if shown is not None:
        sources = [replace(source, spec=said.spec) for source, said in zip(sources, shown.sources, strict=True)]
    known = facts(sources)
    notes = [*measured.problems, *known]
    if data.base_model is None:
        notes.append("base_model is left out: the sources are folders, and none of them says what it was made from")
    body = _body(Checkpoint(checkpoint.folder, shown or checkpoint.record), sources, known, measured)
    contents = {CARD_FILE: f"---\n{data.to_yaml()}\n---\n\n{body}"}
    if data.license_link == LICENCE_FILE:
        contents[LICENCE_FILE] = _licence_page(sources, known)
    return CardText({name: _marked(text).encode() for name, text in contents.items()}, str(data.license), notes)


def _marked(content: str) -> str:
    return f"{content}\n<!-- modekit card {hashlib.sha256(content.encode()).hexdigest()} -->\n"


def is_ours(path: Path) -> bool:
    """Whether nothing is there, or what modekit wrote and nobody changed."""
    if not os.path.lexists(path):
        return True
    try:
        text = read_text(path).replace("\r\n", "\n")
    except UNREADABLE:
        return False
    mark = _MARK.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]


@dataclass(frozen=True)
class _Measured:
    """What eval and eval-translation found of this mixture, and `problems`: why some of it cannot be shown."""

    results: Results | None
    translations: TranslationResults | None
    problems: Sequence[str]


def _measured(checkpoint: Checkpoint) -> _Measured:
    results, problem = _results(checkpoint)
    problems = [problem] if problem else []
    return _Measured(results, TranslationResults.find(checkpoint, problems), problems)


def _results(checkpoint: Checkpoint) -> tuple[Results | None, str | None]:
    """The table if it is this checkpoint's, else why there is none."""
    try:
        results = Results.read(checkpoint)
    except FileNotFoundError:
        return None, "not evaluated yet: `modekit eval` makes the table"
    except UNREADABLE:
        return None, f"{RESULTS_FOLDER}/{Results.file} cannot be read: `modekit eval` makes it anew"
    if results.belongs_to(checkpoint):
        return results, None
    return None, f"{RESULTS_FOLDER}/{Results.file} is of another state of this mixture: `modekit eval` makes it anew"


def _metadata(checkpoint: Checkpoint, sources: Sequence[Source]) -> ModelCardData:
    """The front matter. A mixture of fine-tunes is a `merge` in the hub's words (adapter, finetune, merge, quantized)."""
    bases = list(dict.fromkeys(name for s in sources for name in ([s.hub_id] if s.hub_id else s.base_models)))
    recipe, root = checkpoint.record.recipe, checkpoint.recipe_root
    texts = [spec for expert in recipe.experts for spec in expert.text or []]
    languages = list(dict.fromkeys(language for source in sources for language in source.languages))
    data_sets = list(dict.fromkeys(spec for spec in texts if not is_local(spec, root)))
    licence, name, link = _licence(sources)
    return ModelCardData(
        base_model=bases or None,
        base_model_relation="merge" if bases else None,
        datasets=data_sets or None,
        language=languages or None,
        license=licence,
        license_name=name,
        license_link=link,
        library_name="transformers",
        pipeline_tag="translation" if checkpoint.shape.family.pair else "text-generation",
        tags=["modekit", "moe", "merge", "mixture-of-domain-experts"],
    )


def _licence(sources: Sequence[Source]) -> tuple[str, str | None, str | None]:
    """The one licence of all sources; else `other`, by the name of a page that lists them."""
    said = {(source.licence, source.licence_name, source.licence_link) for source in sources}
    licence, name, link = next(iter(said))
    if len({source.licence for source in sources}) == 1 and licence not in {None, "other"}:
        return str(licence), None, None
    if len(said) == 1 and licence == "other" and name and link and "://" in link:
        return "other", name, link
    return "other", "of-the-sources", LICENCE_FILE


def _body(checkpoint: Checkpoint, sources: Sequence[Source], known: Sequence[str], measured: _Measured) -> str:
    title = _plain(checkpoint.folder.name) or "mixture"
    parts = [
        f"# {title}",
        _what(checkpoint),
        "## Use",
        _use(checkpoint),
        "## How it was made",
        _made(checkpoint),
        "## What it is worth",
        _worth(measured),
        "## Sources and licences",
        _source_table(sources),
        _notes(known),
        "## Limits",
        _limits(checkpoint, measured.results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(checkpoint: Checkpoint) -> str:
    recipe = checkpoint.record.recipe
    total, active = checkpoint.parameters.total, checkpoint.parameters.active
    layout = "plain transformers opens it" if checkpoint.shape.plain else "it brings the code that opens it"
    architecture, dtype = _plain(str(checkpoint.config["architectures"][0])), _plain(str(checkpoint.config["dtype"]))
    return (
        f"A Mixture of Domain Experts, made with modekit from one base model and {len(checkpoint.names)} experts "
        f"({', '.join(map(_plain, checkpoint.names))}): {_decides(checkpoint)}. Architecture {architecture} ({layout}), "
        f"{_count(total)} parameters, {_count(active)} active per token, {dtype}; everything that is no expert is from "
        f"{_plain(_backbone(backbone_label(recipe)))}."
    )


def _backbone(label: str) -> str:
    return "the base model" if label == BASE else label if label.startswith("expert ") else f"the models merged by {label}"


def _decides(checkpoint: Checkpoint) -> str:
    mixture = checkpoint.record.recipe.mixture
    if mixture.method == "linear":
        return "every expert takes part in every token with a fixed weight"
    if mixture.top_p is not None:
        return f"per token the fewest experts whose probabilities reach {mixture.top_p}"
    chosen = checkpoint.record.recipe.top_k
    said = "a router weighs all experts" if mixture.method == "gating" else f"a router chooses {chosen} of them"
    if not checkpoint.shape.routing.runs_common or mixture.always_on is None:
        return said
    return f"{said}, and the base model reads every text beside them (weight {mixture.always_on.weight:g})"


def _use(checkpoint: Checkpoint) -> str:
    name = json.dumps(checkpoint.folder.name)
    pair = checkpoint.shape.family.pair
    auto_class = "AutoModelForSeq2SeqLM" if pair else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto_class}, AutoTokenizer"]
    if not checkpoint.shape.plain:
        lines = ["import modekit  # or, without it: from_pretrained(..., trust_remote_code=True)", *lines]
    lines += [
        "",
        f"folder = {name}  # or this model's name on the hub",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto_class}.from_pretrained(folder)",
        *(_TRANSLATED if pair else _ASKED if chat_template(checkpoint.folder) else _CONTINUED),
        f"print(tokenizer.decode(output[0]{', skip_special_tokens=True' if pair else ''}))",
    ]
    return _fenced("\n".join(lines), "python")


_CONTINUED = ('inputs = tokenizer("The", return_tensors="pt")', "output = model.generate(**inputs, max_new_tokens=20)")
_TRANSLATED = ('inputs = tokenizer("What is to be translated", return_tensors="pt")', "output = model.generate(**inputs)")
_ASKED = (
    'messages = [{"role": "user", "content": "What can you tell me about your field?"}]',
    'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
    "output = model.generate(**inputs, max_new_tokens=100)",
)


def _made(checkpoint: Checkpoint) -> str:
    record = checkpoint.record
    router = record.router
    recipe = yaml.safe_dump(record.model_dump(mode="json")["recipe"], sort_keys=False, allow_unicode=True, width=120)
    text = [
        [domain, *(str(used.get(key, "-"))[:16] for key in ("documents", "tokens", "sha256"))]
        for domain, used in router.text.items()
    ]
    parts = [
        f"`modekit build` from this recipe (sha256 `{record.recipe_digest[:16]}`, modekit {_plain(record.modekit_version)}); "
        f"router {router.status}" + (f", {len(record.training)} training(s) since." if record.training else "."),
        _fenced(recipe.rstrip(), "yaml"),
    ]
    if router.choice is not None:
        parts.append(f"Its router is a classifier of the first tokens of a text: {_plain(router.choice.said)}.")
    taught = [(name, teacher) for name, teacher in zip(checkpoint.names, teachers_of(checkpoint), strict=True) if teacher]
    if taught:
        said = ", ".join(f"{_plain(name)} by {_plain(teacher)}" for name, teacher in taught)
        parts.append(f"Experts that learned from a teacher's predictions (`modekit specialize --teacher`): {said}.")
    if text:
        parts += ["Text that set the router:", markdown_table(["domain", "documents", "tokens", "sha256"], text, _plain)]
    if record.training:
        parts.append("\n".join(_training(training.settings, training.steps, training.tokens) for training in record.training))
    return "\n\n".join(parts)


def _training(settings: dict[str, Any], steps: int, tokens: int) -> str:
    moved = ", ".join(map(str, settings.get("what", [])))
    losses = ", ".join(map(str, settings.get("losses", {})))
    one = ", one domain a step, whose own expert alone learned of all experts" if settings.get("regime") == "joint" else ""
    teacher = f", the teacher being {_plain(Path(str(settings['teacher'])).name)}" if settings.get("teacher") else ""
    return f"* trained: {_plain(moved)} towards {_plain(losses)}, {steps} steps, {tokens:,} tokens{one}{teacher}"


def _worth(measured: _Measured) -> str:
    parts = [f"{problem}." for problem in measured.problems]
    if measured.results is not None:
        parts += _losses(measured.results)
    if measured.translations is not None:
        parts += _translations(measured.translations)
    return "\n\n".join(part for part in parts if part)


def _losses(results: Results) -> list[str]:
    explained = (
        "Held-out loss in nats per token / perplexity; the same tokens in every row. Gap closed: 0 is the base model, 1 is as "
        "good as each domain's own expert. The oracle gives every text to its domain's own expert; a mixture can pass it."
    )
    return [explained, markdown_table(*results.table(), _plain), _notes(results.notes)]


def _translations(found: TranslationResults) -> list[str]:
    """BLEU and chrF of every model, as eval-translation draws them."""
    way = "greedily" if found.settings.beams == 1 else f"with {found.settings.beams} beams"
    explained = (
        f"BLEU / chrF of held-out sources, translated {way}; a domain's whole corpus at once, the mean over the domains that "
        f"have an expert. BLEU {_plain(found.signatures.bleu)}; chrF {_plain(found.signatures.chrf)}."
    )
    table = score_table(found.rows, found.domains, found.unseen)
    return [explained, markdown_table(*table, _plain), _notes(found.notes)]


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(f"* {_plain(note)}" for note in notes)


def _source_table(sources: Sequence[Source]) -> str:
    header = ["used as", "model", "revision", "licence", "said by"]
    body = [[", ".join(each.used_as), each.spec, each.revision or "-", each.said, each.said_by] for each in sources]
    return markdown_table(header, body, _plain)


def _limits(checkpoint: Checkpoint, results: Results | None) -> str:
    lines = [
        "It knows what its experts know, with their faults; nothing here makes it safer than they are.",
        "The router was set for the domains above. Other text is mixed as it comes.",
    ]
    if results is not None:
        lines.append("Loss was measured on held-out text like that of the experts; it says little about tasks.")
    if checkpoint.record.router.status == "unfitted" and checkpoint.record.recipe.mixture.method != "linear":
        lines.append("Its router is not fitted to text: which expert takes part says nothing about the domain.")
    return "\n".join(f"* {line}" for line in lines)


def _licence_page(sources: Sequence[Source], known: Sequence[str]) -> str:
    return (
        "# Licences of the sources\n\nThis model was made from the models below, and each keeps its licence. What that "
        f"means together is for you to judge; these are the facts.\n\n{_source_table(sources)}\n\n{_notes(known)}\n"
    )


def _fenced(text: str, kind: str) -> str:
    """A code block, with a fence that is longer than any inside."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{fence}{kind}\n{text}\n{fence}"


def _plain(text: str) -> str:
    """Text of others as text: no markup, no links, one line, nothing that cannot be seen."""
    one_line = "".join(character for character in " ".join(text.split()) if character.isprintable())
    return re.sub(r"([\\`*_{}\[\]<>()#|!~&])", lambda found: _ENTITY.get(found[1], "\\" + found[1]), one_line)


_ENTITY = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"
