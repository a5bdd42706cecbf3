"""What is wrong in a recipe, in the words of who writes recipes."""

from __future__ import annotations

import re

from pydantic import BaseModel

from modekit.files.typed import problem_said
from modekit.recipes.backbone import BackboneExpert, BackboneMerge
from modekit.recipes.mixture import AlwaysOn, Mixture, Router
from modekit.recipes.recipe import Expert, Output, Recipe
from modekit.recipes.strict import NAME_RULE, RecipeData, breaks_name_rule, did_you_mean

_LONGEST_KEY = 64  # characters of a key in a problem
_KINDS: dict[object, type[BaseModel]] = {
    "experts": Expert,
    "mixture": Mixture,
    "router": Router,
    "output": Output,
    "always_on": AlwaysOn,
    "BackboneMerge": BackboneMerge,
    "BackboneExpert": BackboneExpert,
}


def explain(problem: RecipeData) -> list[str]:
    """A problem that pydantic found, by its key: a line, or several."""
    place = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in {"BackboneExpert", "BackboneMerge", "[key]"} and not str(part).startswith(("literal[", "function-")):
            place += "." * bool(place) + str(part)[:_LONGEST_KEY]
    if problem["type"] == "extra_forbidden":
        kind = next((_KINDS[part] for part in reversed(problem["loc"][:-1]) if part in _KINDS), Recipe)
        hint = did_you_mean(problem["loc"][-1], [field.alias or key for key, field in kind.model_fields.items()])
        home = next((name for name in ("mixture", "router", "output") if problem["loc"][-1] in _KINDS[name].model_fields), None)
        return [f"{place}: unknown key; {hint or (f'it belongs in {home}' if home else 'remove it')}"]
    if problem["type"] == "missing":
        return [f"{place}: missing"]
    message = _message(problem)
    shown = problem.get("input")
    tail = f" (found {repr(shown)[:200]})" if isinstance(shown, (str, int, float, bool)) else ""
    return [f"{place}: {line}{tail}" if place else line for line in message.split("\n")]


def _message(problem: RecipeData) -> str:
    """What pydantic found, in the words of who writes recipes."""
    context = problem.get("ctx") or {}
    found = problem.get("input")
    if breaks_name_rule(problem["type"], context):
        return f"not a name; write {NAME_RULE}"
    if problem["type"] == "model_type" and context.get("class_name") == Expert.__name__:
        return "neither a path nor a mapping of keys; write ./law, or {name: law, model: ./law, text: ./law.jsonl}"
    if problem["type"] == "float_type" and isinstance(found, str) and re.fullmatch(r"[-+.\d]+[eE][-+]?\d+", found):
        return "YAML takes such a number for text; write it with a point and a sign, like 1.0e-4"
    if problem["type"] == "list_type":
        entries = "'- ./law' or '- {name: law, model: ./law}' for each" if isinstance(found, dict) else f"[{str(found)[:60]}]"
        return f"must be a list; write {entries}"
    message = problem_said(str(problem["msg"]))
    if problem["type"] == "literal_error" and isinstance(found, str):
        hint = did_you_mean(found, re.findall("'([^']*)'", str(context.get("expected"))))
        return f"{message}; {hint}" if hint else message
    return message
