"""What a search may vary, and the mixture that one choice of it gives.

A choice is a flat dict of labels, one per axis that counts under the choices before it: `order` means nothing to a ridge
fit. Labels are strings, so that a sampler of any library can handle them; `Space.mixture` turns them into a recipe's mixture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from modekit.errors import RecipeError
from modekit.files.typed import as_kind
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.recipes.edit import as_written, settings_with_effect, unseen_with_effect, with_mixture
from modekit.recipes.fits import FITS, RECIPE, known_fit
from modekit.recipes.mixture import CHOICES, AlwaysOn, Backbone, BackboneMerge, Part
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.recipes.strict_yaml import read_yaml
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.weights.stored import same_bytes

Choice = dict[str, str]
Ask = Callable[[str, Sequence[str]], str]
"""Axis and its labels -> the label that is tried."""

LINEAR = "linear"
_WHOLE: dict[str, dict[str, str]] = {
    LINEAR: {},
    "ngram": {},
    "lexical": {},
    "classifier": {},
    "logistic": {"granularity": "sequence", "per": "model"},
}
"""Routers that are tried where whole models are mixed -> settings with which they decide before the first layer."""


RouterKind = Annotated[str, BeforeValidator(lambda value: value if value == LINEAR else known_fit(value))]
"""linear, or the name of a fit."""
_SEARCHED = {"method", *CHOICES, "combine", "modules", "layers", "always_on", "backbone", "weights"}
_SEARCHED_OF_ROUTERS = {"fit", "granularity", "temperature", "decay", "order", "prefix", "per"}


class Space(BaseModel):
    """The axes of a search; each is a list of what may be tried.

    `layers` and `always_on` hold None for what a recipe means that does not name them; a number under `always_on` is the share
    of the base in every token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    router: list[RouterKind] = Field(min_length=1, description="linear (no gate), or how the gate is set.")
    granularity: list[Literal["token", "context", "sequence"]] = Field(["token", "context"], min_length=1)
    top_k: list[int] = Field(min_length=1, description="Experts per token.")
    temperature: list[float] = Field([0.5, 1.0, 2.0], min_length=1)
    decay: list[float] = Field([0.8, 0.9, 0.97], min_length=1, description="Of context routers.")
    ngram_decay: list[float] = Field([0.95, 0.98, 0.99, 1.0], min_length=1, description="Of n-gram and lexical routers.")
    order: list[int] = Field([1, 2, 3], min_length=1, description="Of n-gram routers.")
    modules: list[Literal["auto", "all"] | list[Part]] = Field(["auto"], min_length=1)
    layers: list[list[int | str] | None] = Field([None], min_length=1)
    always_on: list[float | AlwaysOn | None] = Field([None, 0.1], min_length=1)
    backbone: list[Backbone] = Field(["base"], min_length=1)

    def averages(self) -> list[float | None]:
        """Decays of what fitted gates may read; None is the token itself."""
        token: list[float | None] = [None] if "token" in self.granularity else []
        return token + (list(self.decay) if "context" in self.granularity else [])

    def choose(self, ask: Ask) -> Choice:
        """A choice, axis by axis, each asked only where it counts."""
        choice: Choice = {}

        def pick(axis: str, values: Sequence[object], name: str = "") -> str:
            labels = list(dict.fromkeys(label(value) for value in values))
            choice[name or axis] = ask(name or axis, labels)
            return choice[name or axis]

        whole = pick("modules", self.modules) == "all"
        # Whole models decide before the first layer: other routers are no choice there, and backbone and layers mean nothing.
        routers = [kind for kind in self.router if not whole or kind in _WHOLE] or ["ngram"]
        router = pick("router", routers, "router_of_whole" if whole else "router")
        fit = FITS.get(router)
        if fit is not None and fit.reads.hidden and not whole and pick("granularity", self.granularity) == "context":
            pick("decay", self.decay)
        if fit is not None and "order" in fit.settings:
            pick("order", self.order)
        if fit is not None and fit.decides.fading is not None:
            pick("ngram_decay", self.ngram_decay)
        if fit is not None and fit.reads is not RECIPE and "temperature" in fit.settings:
            pick("temperature", self.temperature)
        if fit is not None:
            pick("top_k", self.top_k)
            pick("always_on", self.always_on)
        if not whole:
            pick("layers", self.layers)
            pick("backbone", self.backbone)
        return choice

    def mixture(self, choice: Choice, recipe: Recipe) -> dict[str, JsonValue]:
        """The recipe's mixture under a choice; what is not searched stays as the recipe has it."""
        kept = recipe.mixture.model_dump(mode="json", exclude_unset=True)
        settings = {key: value for key, value in kept.pop("router", {}).items() if key not in _SEARCHED_OF_ROUTERS}
        mixture: dict[str, Any] = {key: value for key, value in kept.items() if key not in _SEARCHED}
        whole = choice["modules"] == "all"
        router = choice["router_of_whole" if whole else "router"]
        said = {key: value_of(choice[key]) for key in ("modules", "layers", "backbone", "always_on") if key in choice}
        unsaid = {"modules": "auto", "layers": None, "backbone": BASE, "always_on": None}
        mixture |= {key: value for key, value in said.items() if value != unsaid[key]}
        if router == LINEAR:
            return unseen_with_effect({**mixture, "method": "linear"})
        settings["fit"] = router
        settings |= _WHOLE[router] if whole else {}
        settings |= {"granularity": choice["granularity"]} if choice.get("granularity", "token") != "token" else {}
        settings = settings_with_effect(settings)
        settings |= {"temperature": float(choice["temperature"])} if "temperature" in choice else {}
        decay = choice.get("decay", choice.get("ngram_decay"))
        settings |= {"decay": [float(decay)]} if decay is not None else {}
        settings |= {"order": int(choice["order"])} if "order" in choice else {}
        mixture |= {"method": "routing", "top_k": int(choice["top_k"]), "router": settings}
        if isinstance(mixture.get("always_on"), float):
            mixture["always_on"] = {"expert": BASE, "weight": mixture["always_on"]}
        return unseen_with_effect(mixture)

    def named(self) -> dict[str, Choice]:
        """Name -> choice of the variants that a table should have: the paper's and the fixed ones of this project."""
        plain = {"modules": label(self.modules[0]), "layers": "null", "always_on": "null", "temperature": "1.0"}
        found: dict[str, Choice] = {}
        for backbone in (name for name in map(label, self.backbone) if name in {"base", "average"}):
            behind = "" if backbone == "base" else f", backbone {backbone}"
            for name, says in _NAMED.items():
                wanted = {**plain, "backbone": backbone, "top_k": "2", **says}
                choice = self._choice_of(wanted)
                if choice is not None:
                    found[name + behind] = choice
        if "all" in self.modules:
            of_whole = {"n-gram": "ngram", "lexical": "lexical", "sequence": "logistic"}
            for name, router in ((f"whole models, {kind}", router) for kind, router in of_whole.items()):
                ngram = {"order": "2", "ngram_decay": "0.98"}
                choice = self._choice_of({**plain, **ngram, "modules": "all", "router_of_whole": router, "top_k": "2"})
                if choice is not None:
                    found[name] = choice
        return found

    def _choice_of(self, labels: Mapping[str, str]) -> Choice | None:
        """The choice that takes these labels; None when an axis does not hold one."""

        def ask(axis: str, possible: Sequence[str]) -> str:
            if labels.get(axis) not in possible:
                raise LookupError(axis)
            return labels[axis]

        try:
            return self.choose(ask)
        except LookupError:
            return None


_NAMED: dict[str, Choice] = {
    "n-gram": {"router": "ngram", "order": "2", "ngram_decay": "0.98"},
    "lexical": {"router": "lexical", "ngram_decay": "0.98"},
    "routing, context": {"router": "logistic", "granularity": "context", "decay": "0.9"},
    "logistic": {"router": "logistic", "granularity": "token"},
    "ridge": {"router": "ridge", "granularity": "token"},
    "centroid": {"router": "centroid", "granularity": "token"},
    "gate-less (linear)": {"router": "linear"},
    "noisy": {"router": "random"},
}
"""What is usually better comes first, so that the rest is soon dropped; all of them are reported."""


def label(value: object) -> str:
    """A value of an axis as a string."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    return json.dumps(value, sort_keys=True)


def value_of(text: str) -> JsonValue:
    """What a label stands for."""
    try:
        value: JsonValue = json.loads(text)
    except ValueError:  # a word
        return text
    return value


def short_backbone(backbone: str) -> str:
    """A backbone in a few words."""
    if not backbone.startswith("{"):
        return backbone.replace("_", " ")
    data = json.loads(backbone)
    if "expert" in data:
        return f"of {data['expert']}"
    settings = (f"{value:g}" for key, value in sorted(data.items()) if key != "method")
    return " ".join([data["method"].replace("_", " "), *settings])


def default_space(recipe: Recipe, root: Path, plan: Plan, *, native: bool) -> Space:
    """What is searched unless a file says otherwise.

    Backbones only where experts differ from the base outside of what is mixed; whole models only where there are whole experts.
    `plan`: of the plain recipe; `native`: only what a native architecture can express.
    """
    experts, count = recipe.experts, len(recipe.experts)
    only_adapters = all(each.adapter is not None or each.is_low_rank or each.is_base for each in experts)
    differ = not only_adapters and backbones_differ(recipe, root, run=Run(trust_remote_code=plan.trust_remote_code))
    fitted = all(each.text or each.prompts for each in experts)
    routers: list[RouterKind] = ["linear", "random", *(["centroid", "ridge", "logistic", "lexical"] if fitted else [])]
    backbone: list[Backbone] = ["base"]
    if differ:
        backbone += ["average", *(BackboneMerge(method="task_arithmetic", scale=scale) for scale in (0.4, 0.7)), "ties"]
    counts = sorted({1, min(2, count), count})
    if native:
        return Space(router=routers, granularity=["token"], top_k=counts, always_on=[None], backbone=backbone)
    routers += [*(["ngram"] if fitted else []), *(["arrow", "spectr"] if only_adapters else [])]
    layers: list[list[int | str] | None] = [None, [f"{plan.layers // 2}-{plan.layers - 1}"]] if plan.layers > 1 else [None]
    return Space(
        router=routers, top_k=counts, backbone=backbone, layers=layers, modules=["auto", "all"] if differ else ["auto"]
    )


def backbones_differ(recipe: Recipe, root: Path, *, run: Run = QUIET) -> bool:
    """Whether an expert differs from the base outside of what is mixed: whether merging backbones can change anything."""
    if all(expert.is_base for expert in recipe.experts):
        return False
    merged = make_plan(plain_recipe(recipe, backbone="average"), root, run=run)
    with OpenFiles() as opened:
        for tensor in merged.tensors:
            if tensor.operation == "merge":
                base, *others = (piece.ref for piece in tensor.pieces)
                same = all(base.dtype == other.dtype and same_bytes(opened, base, other) for other in others)
                if not same or any(piece.change for piece in tensor.pieces):
                    return True
        return False


def plain_recipe(recipe: Recipe, backbone: str = BASE) -> Recipe:
    """The recipe's experts in the plainest mixture, in whatever architecture suits them."""
    mixture = {"method": "linear", **({"backbone": backbone} if backbone != BASE else {})}
    return Recipe.model_validate({**with_mixture(as_written(recipe), mixture), "output": {}})


def read_space(path: Path, default: Space) -> Space:
    """Axes from a YAML file; those that it does not name stay as they are. Raises RecipeError."""
    try:
        raw = read_yaml(path)
        if not isinstance(raw, dict):
            raise ValueError("not a mapping of axes")
        return as_kind({**{name: getattr(default, name) for name in Space.model_fields}, **raw}, Space)
    except (OSError, ValueError) as error:
        raise RecipeError(
            "the space of the search cannot be read",
            where=str(path),
            found=getattr(error, "strerror", None) or error,
            expected=None if isinstance(error, OSError) else f"lists under {', '.join(Space.model_fields)}",
            remedy="correct the path" if isinstance(error, OSError) else "correct it",
        ) from None
