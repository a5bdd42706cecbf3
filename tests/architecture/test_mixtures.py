"""The promises of the design over random recipes, families and inputs, against a reference that is written down here.

The reference is the base model of transformers with hooks: at every mixed module a loop over the experts' own modules, in
full, with weights computed anew from the gates. It shares no code with src/modekit, only the table of families.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import VOCAB, save, tiny_model
from modekit.architecture.modekit_router import causal_average
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.fits import FITS
from modekit.recipes.read import parse_recipe
from modekit.sources.families import FAMILIES
from modekit.sources.family import Family
from rounding import assert_close
from sources.test_families import GRANITE, QWEN3_5

pytestmark = pytest.mark.filterwarnings("ignore")
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "granite": GRANITE,
    "cohere2": {**WINDOWS, "logit_scale": 0.3},
    "ernie4_5": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "qwen3_5_text": QWEN3_5,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **WINDOWS},
    "gemma3_text": {"head_dim": 8, **WINDOWS},
    "olmo3": WINDOWS,
    "glm4": {"head_dim": 8},
    "starcoder2": {"use_bias": True},
}
NO_ALL = {"qwen3_5_text"}  # has a convolution, which modules: all refuses
BY_TYPE = {family.model_type: family for family in FAMILIES if not family.pair}
TYPES = [*BY_TYPE]
_FOLDER = tempfile.TemporaryDirectory()
PROMPTS = ["fever artery lesion", "licence clause party", "def return self", "salt pepper onion"]

BASE, ONE, TWO, ALIKE = {"model": "base"}, {"model": "./one"}, {"model": "./two"}, {"model": "./base"}
PLAIN, UNEVEN, DORA = {"adapter": "./plain"}, {"adapter": "./uneven"}, {"adapter": "./dora"}
PART = {"model": "./two", "as": "lora", "rank": 5}
KINDS: list[dict[str, Any]] = [BASE, ONE, TWO, ALIKE, PLAIN, UNEVEN, DORA, PART]
FULL = [ONE, TWO, ALIKE]
LOW_RANK: list[dict[str, Any]] = [BASE, PLAIN, UNEVEN, PART]


# --- models


def named(family: Family, *parts: str) -> list[str]:
    """Last names of the modules that hold these parts."""
    return sorted({family.decoder.parts[part].rpartition(".")[2] for part in parts if part in family.decoder.parts})


@dataclass(frozen=True)
class Bench:
    """A folder with a base, two full models and three adapters of one family, and the same as dense models in memory."""

    family: Family
    root: Path
    made: dict[str, PreTrainedModel]

    def dense(self, expert: dict[str, Any]) -> PreTrainedModel:
        """What an expert is by itself: a plain model of the family."""
        if expert.get("as") == "lora":
            return self._low_rank_part(expert["rank"])
        return self.made[(expert.get("model") or expert["adapter"]).removeprefix("./")]

    def _low_rank_part(self, rank: int) -> PreTrainedModel:
        """The base with the best rank-R approximation of its difference to `two` on every linear layer."""
        model = copy.deepcopy(self.made["base"])
        other = self.made["two"]
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    delta = other.get_submodule(name).weight.double() - module.weight.double()
                    left, singular, right = torch.linalg.svd(delta, full_matrices=False)
                    module.weight.add_((left[:, :rank] * singular[:rank] @ right[:rank]).float())
        return model


@functools.cache
def bench_of(model_type: str) -> Bench:
    """The bench of a family, made once."""
    family, overrides = BY_TYPE[model_type], OVERRIDES.get(model_type, {})
    root = Path(_FOLDER.name) / model_type
    made = {}
    for seed, name in enumerate(("base", "one", "two")):
        save(tiny_model(model_type, seed=seed, **overrides), root / name)
        made[name] = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval()
    every = named(family, *family.decoder.parts)
    adapters: dict[str, dict[str, Any]] = {
        "plain": {"r": 3, "lora_alpha": 7, "target_modules": every},
        "uneven": {
            "r": 2,
            "use_rslora": True,
            "rank_pattern": dict.fromkeys(named(family, "down", "v"), 4),
            "alpha_pattern": dict.fromkeys(named(family, "q"), 5),
            "target_modules": named(family, "q", "v", "down"),
        },
        "dora": {"r": 2, "use_dora": True, "target_modules": named(family, "o", "gate", "up")},
    }
    for name, config in adapters.items():
        made[name] = train(root / "base", LoraConfig(**config), root / name)
    return Bench(family, root, made)


def train(base: Path, config: LoraConfig, folder: Path) -> PreTrainedModel:
    """Write an adapter with random parameters; returns the model that PEFT merges it to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(folder)
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(fresh, folder).merge_and_unload().eval()


# --- what a recipe means, written down anew


def expert_list(kinds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Experts of a recipe, each with a name and a text of its own."""
    return [{"name": f"e{place}", "prompts": [PROMPTS[place % 4]], **kind} for place, kind in enumerate(kinds)]


def kinds_of(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's experts without names and texts."""
    return [{key: value for key, value in expert.items() if key not in {"name", "prompts"}} for expert in recipe["experts"]]


def mixed_modules(bench: Bench, recipe: dict[str, Any]) -> dict[str, str]:
    """Module of the base that is mixed -> the decision that it takes part in, in the order of execution."""
    mixture, family, base, kinds = recipe["mixture"], bench.family, bench.made["base"], kinds_of(recipe)
    per, modules = mixture.get("router", {}).get("per", "layer"), mixture.get("modules", "auto")
    dense = [bench.dense(kind) for kind in kinds]

    def is_changed(name: str) -> bool:
        return any(kind in FULL or differs(base, other, name) for kind, other in zip(kinds, dense, strict=True))

    if modules == "all":
        names = [name for name, module in base.named_modules() if list(module.parameters(recurse=False))]
        return dict.fromkeys(["model.embed_tokens", *filter(is_changed, names)], "model")
    if modules == "decoder":
        names = [name for name, module in base.named_modules() if list(module.parameters(recurse=False))]
        first = "model.layers.0.input_layernorm"
        first = first if first in names else f"model.layers.0.{family.decoder.parts['q']}"
        within = [name for name in names if name not in {"model.embed_tokens", "lm_head"}]
        return dict.fromkeys([first, *filter(is_changed, within)], "model")
    if modules == "auto":
        low = [other for kind, other in zip(kinds, dense, strict=True) if kind not in FULL]
        changed = [
            part
            for part in family.decoder.parts
            if any(differs(base, each, n) for each in low for n in paths(base, family, part))
        ]
        modules = [*changed, *(["mlp"] if not changed or any(kind in FULL for kind in kinds) else [])]
    if "mlp" in modules and (per in {"projection", "feature"} or any("adapter" in kind or "as" in kind for kind in kinds)):
        modules = [*(part for part in modules if part != "mlp"), "gate", "up", "down"]
    found: dict[str, str] = {}
    for layer in mixture.get("layers", range(3)):
        for part in ("q", "k", "v", "o", "mlp", "gate", "up", "down"):
            path = "mlp" if part == "mlp" else family.decoder.parts.get(part)
            name = f"model.layers.{layer}.{path}"
            if part in modules and path is not None and has(base, name) and is_changed(name):
                block = "attention" if part in "qkvo" else "ffn"
                found.setdefault(name, {"layer": f"{layer} {block}", "model": "model"}.get(per, name))
    return found


def changed_modules(bench: Bench, recipe: dict[str, Any]) -> set[str]:
    """Those of the mixed modules in which experts differ; where the router of whole decoders stands, none may."""
    kinds = kinds_of(recipe)
    if any(kind in FULL for kind in kinds):
        return {*mixed_modules(bench, recipe)}
    dense = [bench.dense(kind) for kind in kinds]
    names = mixed_modules(bench, recipe)
    return {name for name in names if any(differs(bench.made["base"], each, name) for each in dense)}


def has(model: PreTrainedModel, name: str) -> bool:
    return any(name == other for other, _ in model.named_modules())


def paths(base: PreTrainedModel, family: Family, part: str) -> list[str]:
    return [name for layer in range(3) if has(base, name := f"model.layers.{layer}.{family.decoder.parts[part]}")]


def differs(base: PreTrainedModel, other: PreTrainedModel, name: str) -> bool:
    """Whether a module of two models has other values."""
    ours, theirs = base.get_submodule(name).state_dict(), other.get_submodule(name).state_dict()
    return any(not torch.equal(ours[key], theirs[key]) for key in ours)


def expected_model(bench: Bench, recipe: dict[str, Any], expert: dict[str, Any], backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone with one expert's modules at every mixed place."""
    model, own = copy.deepcopy(backbone), bench.dense(expert)
    for name in changed_modules(bench, recipe):
        model.set_submodule(name, copy.deepcopy(own.get_submodule(name)))
    return model


def backbone_of(bench: Bench, recipe: dict[str, Any]) -> PreTrainedModel:
    """Where everything comes from that is not mixed."""
    wanted = recipe["mixture"].get("backbone", "base")
    sources = {
        expert["name"]: bench.made[(expert.get("model") or expert["adapter"]).removeprefix("./")]
        for expert in recipe["experts"]
    }
    if wanted == "base":
        return copy.deepcopy(bench.made["base"])
    if wanted != "average":
        return copy.deepcopy(sources[wanted["expert"]])
    model = copy.deepcopy(bench.made["base"])
    merged = [dict(sources[expert["name"]].named_parameters()) for expert in recipe["experts"] if expert.get("model") != "base"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.stack([other[name].double() for other in merged]).mean(0))
    return model


def chosen(logits: torch.Tensor, recipe: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., E) of the experts by their logits, in float64, and whether the choice (...) is as good as a tie."""
    mixture = recipe["mixture"]
    names = [expert["name"] for expert in recipe["experts"]]
    always = mixture.get("always_on") or {}
    own = names.index(always["expert"]) if always.get("expert") in names else None
    method = mixture.get("method", "routing")
    flat = logits.double().reshape(-1, len(names))
    weights, ties = torch.zeros_like(flat), torch.zeros(len(flat), dtype=torch.bool)
    for row, (token, shares) in enumerate(zip(flat.tolist(), flat.softmax(-1).tolist(), strict=True)):
        order, largest = sorted(range(len(names)), key=lambda expert: -token[expert]), max(map(abs, token))
        if own is not None and always.get("weight") is None:
            order.remove(own)
            order.insert(0, own)
        taken = order
        if method == "routing" and "top_p" in mixture:
            taken, reached = [], 0.0
            for expert in order:
                if reached < mixture["top_p"]:
                    taken.append(expert)
                    reached += shares[expert]
                    ties[row] |= abs(reached - mixture["top_p"]) < 1e-5 * max(1.0, largest)
        elif method == "routing":
            taken = order[: mixture.get("top_k", min(2, len(names)))]
        if len(taken) < len(names):
            ties[row] |= abs(token[taken[-1]] - token[order[len(taken)]]) < 1e-5 * largest
        weights[row, taken] = flat[row, taken].softmax(-1)
    if always.get("weight") is not None and not always.get("apart"):
        weights *= 1 - always["weight"]
        if own is not None:
            weights[:, own] += always["weight"]
    return weights.reshape(logits.shape), ties.reshape(logits.shape[:-1])


def so_far(values: torch.Tensor, mask: torch.Tensor, decay: float, prefix: int | None) -> torch.Tensor:
    """The causal average of values (B, S, G) over real tokens, at every token, summed one by one."""
    result = torch.zeros_like(values)
    for row in range(len(values)):
        total, weight, seen = torch.zeros(values.shape[-1], dtype=values.dtype), 0.0, 0
        for token in range(values.shape[1]):
            if mask[row, token] and (prefix is None or seen < prefix):
                total, weight = decay * total + values[row, token], decay * weight + 1
            seen += int(mask[row, token])
            result[row, token] = total / max(weight, 1e-12)
    return result


class Reference:
    """The backbone with hooks that sum the experts' modules by their weights.

    `theirs` are the weights that the mixture decided, one decision after the other. Each is compared with the reference's
    own, but where two choices are as good as a tie, which rounding may break either way. Then it is taken, so that what a
    sharp gate makes of rounding is not fed to the next one: at a temperature of 0.01 three of them in a row make 1e-2 of 1e-7.
    """

    def __init__(self, bench: Bench, recipe: dict[str, Any], checkpoint: Checkpoint, theirs: list[torch.Tensor]) -> None:
        self.recipe, self.groups, self.theirs = recipe, mixed_modules(bench, recipe), theirs
        self.gates = read_gates(checkpoint)
        self.model = backbone_of(bench, recipe)
        self.weights: dict[str, torch.Tensor] = {}
        self.base = bench.made["base"]
        self.mask = torch.ones(0)
        experts = [bench.dense(kind) for kind in kinds_of(recipe)]
        self.changed = changed_modules(bench, recipe)
        for name in self.groups:
            modules = [expert.get_submodule(name) for expert in experts]
            self.model.get_submodule(name).register_forward_hook(self._hook(name, modules))

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.weights, self.mask = {}, mask
        always_on = self.recipe["mixture"].get("always_on", {})
        with torch.inference_mode():
            if not always_on.get("apart"):
                return self.model(input_ids=ids, attention_mask=mask).logits
            # The common expert: another pass, of the base alone; the head reads the mean of both.
            common = self.base.model(input_ids=ids, attention_mask=mask)[0]
            share = always_on["weight"]
            hook = self.model.model.register_forward_hook(lambda _m, _a, output: mean_with(output, common, share))
            try:
                return self.model(input_ids=ids, attention_mask=mask).logits
            finally:
                hook.remove()

    def _hook(self, name: str, modules: list[nn.Module]) -> Callable[..., torch.Tensor]:
        def mix(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
            weights = self._decide(name, args[0])
            if name not in self.changed:  # the router of whole decoders stands here, whether experts differ or not
                return _output
            heads_first = args[0].ndim == 4 and args[0].shape[2] == self.mask.shape[1]
            total = torch.zeros(())
            parts = [*zip(modules, weights.unbind(-1), strict=True), (self.base.get_submodule(name), 1 - weights.sum(-1))]
            for module, weight in parts:
                y = module(args[0])
                weight = weight[:, None] if heads_first else weight
                total = total + weight.reshape(*weight.shape, *[1] * (y.ndim - weight.ndim)).to(y) * y
            return total

        return mix

    def _decide(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Weights (B, S, E) or (B, S, O, E); the first module of a decision takes it for all."""
        group, mixture = self.groups[name], self.recipe["mixture"]
        if group in self.weights:
            return self.weights[group]
        experts = self.recipe["experts"]
        if mixture.get("method") == "linear":
            given = torch.tensor([mixture.get("weights", {}).get(expert["name"], 1.0) for expert in experts])
            self.weights[group] = (given / given.sum()).expand(*self.mask.shape, -1)
            return self.weights[group]
        router = mixture["router"]
        x = (self.base.get_submodule(name)(x) if x.ndim == 2 else x).double()
        granularity = router.get("granularity", "token")
        decays = {"token": [0.0], "sequence": [1.0]}.get(granularity, router.get("decay", [0.9]))
        prefix = router.get("prefix", 64) if granularity == "sequence" else None
        logits = torch.zeros(())
        for decay, part in zip(decays, self.gates[name].chunk(len(decays), dim=1), strict=True):
            scores = (x @ part.T).abs() if router["fit"] == "arrow" else x @ part.T
            logits = logits + (so_far(scores, self.mask, decay, prefix) if decay else scores)
        if router.get("per") == "feature":
            logits = logits.unflatten(-1, (-1, len(experts)))
        weights, ties = chosen(logits, self.recipe)
        if self.theirs:
            if router["fit"] == "random":  # gates of adapters tie wherever two experts have the same change, or none
                assert ties[self.mask.bool()].float().mean() < 0.05
            decided = self.theirs[len(self.weights)].double()
            sharp = max(1.0, 0.1 / router.get("temperature", 1.0))
            counted = self.mask.bool().view(*self.mask.shape, *[1] * (ties.ndim - 2)) & ~ties
            torch.testing.assert_close(decided[counted], weights[counted], atol=1e-4 * sharp, rtol=0)
            weights = decided
        self.weights[group] = weights
        return weights


def mean_with(output: Any, common: torch.Tensor, share: float) -> Any:
    """A decoder's output whose last hidden states are averaged with others."""
    output["last_hidden_state"] = (1 - share) * output["last_hidden_state"] + share * common
    return output


def read_gates(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Module that decides -> gate in float64."""
    found = {}
    for slot in checkpoint.slots:
        with safe_open(checkpoint.tensors[slot.name].file, framework="pt") as file:
            place = slot.name.removesuffix(".router.gate")
            if checkpoint.shape.plain:
                place = f"model.layers.{slot.name.split('.')[2]}.mlp"
            found[place] = file.get_tensor(slot.name).double()
    return found


# --- one mixture and everything that must hold of it


@contextmanager
def built(bench: Bench, recipe: dict[str, Any]) -> Iterator[tuple[Checkpoint, PreTrainedModel]]:
    with tempfile.TemporaryDirectory(dir=bench.root) as folder:
        out = Path(folder) / "OUT"
        build(make_plan(parse_recipe(recipe), bench.root), out)
        yield open_checkpoint(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def a_batch(seed: int = 5, length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences, two of them padded on the left."""
    ids = torch.randint(3, VOCAB, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :1] = 0
    return ids.masked_fill(mask == 0, 0), mask


def logits_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask).logits


def close(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The same logits at every real token."""
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=tolerance, rtol=0)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The weights that the modekit routers of a model decide."""
    seen: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, nn.Module) and type(module).__name__ == "Router"]
    handles = [router.register_forward_hook(lambda _m, _args, output: seen.append(output)) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_weights(seen: list[torch.Tensor], recipe: dict[str, Any], mask: torch.Tensor) -> None:
    """They sum to one, less what an always-on base takes, and as many are taken as the recipe says."""
    mixture, experts = recipe["mixture"], recipe["experts"]
    always = mixture.get("always_on") or {}
    whole = 1 - always["weight"] if always.get("expert") == "base" and not always.get("apart") else 1.0
    for weights in seen:
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.full(weights.shape[:-1], whole), atol=1e-5, rtol=0)
        most = len(experts) if mixture.get("method", "routing") != "routing" or "top_p" in mixture else mixture.get("top_k", 2)
        assert int((weights > 0).sum(-1).max()) <= most + (always.get("expert") in {e["name"] for e in experts})


def check_mixture(bench: Bench, recipe: dict[str, Any], seed: int = 5) -> None:
    """The built mixture is the reference, and forced on each expert it is the backbone with that expert's parts."""
    ids, mask = a_batch(seed)
    with built(bench, recipe) as (checkpoint, model):
        with watched(model) as seen:
            free = logits_of(model, ids, mask)
        if recipe["mixture"].get("always_on", {}).get("apart"):  # the other half of the batch is the common expert's
            assert all(not weights[len(mask) :].any() for weights in seen)
            seen = [weights[: len(mask)] for weights in seen]
        assert checkpoint.shape.plain or seen
        reference = Reference(bench, recipe, checkpoint, seen)
        check_weights(seen, recipe, mask)
        close(free, reference.logits(ids, mask), mask)
        backbone = backbone_of(bench, recipe)
        for place, kind in enumerate(kinds_of(recipe)):
            with mixture_of(model, checkpoint).forced(place):
                forced = logits_of(model, ids, mask)
            close(forced, logits_of(expected_model(bench, recipe, kind, backbone), ids, mask), mask)
        assert_close(logits_of(model, ids, mask)[mask.bool()], free[mask.bool()])


# --- random recipes


@st.composite
def recipes(draw: st.DrawFn, kinds: list[dict[str, Any]] = KINDS, fits: tuple[str, ...] = ("random",)) -> dict[str, Any]:
    """A family and a recipe of two to four experts that says something."""
    model_type = draw(st.sampled_from(TYPES))
    taken = draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=4))
    experts = expert_list(taken if any(kind != BASE for kind in taken) else [kinds[1], *taken[1:]])
    return {
        "family": model_type,
        "recipe": {"base_model": "./base", "experts": experts, "mixture": draw_mixture(draw, model_type, experts, fits)},
    }


def draw_mixture(draw: st.DrawFn, model_type: str, experts: list[dict[str, Any]], fits: tuple[str, ...]) -> dict[str, Any]:
    parts, names = BY_TYPE[model_type].decoder.parts, [expert["name"] for expert in experts]
    modules = draw(
        st.sampled_from(
            ["auto", "auto", *(["some"] * 3 if parts else []), *(["all", "decoder"] if model_type not in NO_ALL else [])]
        )
    )
    whole = modules in {"all", "decoder"}
    if modules == "some":
        wanted = draw(st.lists(st.sampled_from([*parts]), min_size=1, max_size=4, unique=True))
        shared = {parts[part] for part in wanted}
        modules = [part for part in parts if parts[part] in shared]
        if draw(st.booleans()) or not {"q", "v", "down"} & set(modules) or not {"o", "gate", "up"} & set(modules):
            modules = ["mlp", *(part for part in modules if part in "qkvo"), *(["o"] if "o" not in modules else [])]
    mixture: dict[str, Any] = {
        "modules": modules,
        "method": draw(st.sampled_from(["routing", "routing", "routing", "gating", "linear"])),
    }
    if not whole and draw(st.integers(0, 3)) == 0:
        mixture["layers"] = draw(st.sampled_from([[1], [0, 2], [1, 2]])) if model_type not in NO_ALL else [0, 1]
    if modules != "all" and draw(st.integers(0, 3)) == 0:
        mixture["backbone"] = draw(st.sampled_from(["average", {"expert": names[0]}]))
    if mixture["method"] == "linear":
        if draw(st.booleans()):
            mixture["weights"] = {name: draw(st.sampled_from([0.5, 1.0, 3.0])) for name in names}
        return mixture
    if whole:
        fits = tuple(fit for fit in fits if fit != "arrow")  # they read no embedding
    router: dict[str, Any] = {"fit": draw(st.sampled_from(fits))}
    drawn = {
        "temperature": draw(st.sampled_from([1.0, 0.1, 0.01])),
        "seed": draw(st.integers(0, 99)),
        "tokens_per_domain": 32,
        "steps": 1,
    }
    router |= {key: value for key, value in drawn.items() if key in FITS[router["fit"]].settings}
    router["granularity"] = "sequence" if whole else draw(st.sampled_from(["token", "token", "context", "sequence"]))
    if router["granularity"] == "context" and draw(st.booleans()):
        router["decay"] = draw(st.sampled_from([[1.0], [0.5], [0, 0.9, 1.0]]))
    if router["granularity"] == "sequence" and draw(st.booleans()):
        router["prefix"] = draw(st.sampled_from([1, 4]))
    pers = ["layer", "layer", "model", "projection", "feature"]
    pers = pers[:-1] if router["fit"] == "arrow" else pers
    router["per"] = "model" if whole else draw(st.sampled_from(pers))
    mixture["router"] = router
    if mixture["method"] == "routing":
        key = draw(st.sampled_from(["top_k", "top_k", "top_p", None]))
        if key is not None:
            mixture[key] = draw(st.integers(1, len(names)) if key == "top_k" else st.sampled_from([0.1, 0.5, 0.9]))
    leaves_a_choice = mixture["method"] == "routing" and mixture.get("top_k") != 1
    always = draw(st.sampled_from([None, None, None, "base", "share", *(["own"] if leaves_a_choice else [])]))
    if always is not None:
        mixture["always_on"] = {"expert": "base" if always == "base" else names[-1]}
        mixture["always_on"] |= {"weight": draw(st.sampled_from([0.25, 0.6]))} if always != "own" else {}
        if always == "base" and modules != "all" and "backbone" not in mixture and draw(st.booleans()):
            mixture["always_on"]["apart"] = True
    return mixture


FEW = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FEW
@given(drawn=recipes(LOW_RANK, ("arrow",)), seed=st.integers(0, 99))
def test_a_mixture_of_adapters_is_routed_by_what_its_gates_say(drawn: dict[str, Any], seed: int) -> None:
    check_mixture(bench_of(drawn["family"]), drawn["recipe"], seed)


@FEW
@given(drawn=recipes(), seed=st.integers(0, 99))
def test_a_mixture_is_the_weighted_sum_of_its_experts(drawn: dict[str, Any], seed: int) -> None:
    check_mixture(bench_of(drawn["family"]), drawn["recipe"], seed)


@pytest.mark.slow
@MANY
@given(drawn=recipes(), seed=st.integers(0, 99))
def test_many_mixtures_are_the_weighted_sums_of_their_experts(drawn: dict[str, Any], seed: int) -> None:
    check_mixture(bench_of(drawn["family"]), drawn["recipe"], seed)


EVERY_FAMILY: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "default": ([BASE, ONE, TWO], {"router": {"fit": "random", "temperature": 0.1}}),
    "all kinds": (
        [BASE, ONE, PLAIN, DORA, PART],
        {
            "modules": ["mlp", "q", "k", "v", "o"],
            "top_k": 3,
            "always_on": {"expert": "base", "weight": 0.25},
            "router": {"fit": "random", "temperature": 0.1, "granularity": "context", "decay": [0, 0.9]},
        },
    ),
    "everything": (
        [ONE, UNEVEN, TWO, BASE, PART],
        {
            "modules": "all",
            "router": {"fit": "random", "granularity": "sequence", "prefix": 4, "per": "model"},
        },
    ),
    "decoder": (
        [ONE, UNEVEN, TWO, BASE, PART],
        {
            "modules": "decoder",
            "always_on": {"expert": "base", "weight": 0.4, "apart": True},
            "router": {"fit": "random", "granularity": "sequence", "prefix": 4, "per": "model"},
        },
    ),
    "deep": (
        [BASE, TWO, UNEVEN, PLAIN],
        {
            "top_p": 0.6,
            "backbone": "average",
            "layers": [1],
            "router": {"fit": "random", "temperature": 0.1, "per": "feature"},
        },
    ),
}


ROWS_AND_KINDS = [*((row, "all kinds") for row in TYPES), *(("llama", name) for name in EVERY_FAMILY if name != "all kinds")]


@pytest.mark.parametrize(("model_type", "name"), ROWS_AND_KINDS)
def test_every_family_mixes_every_kind_of_expert(model_type: str, name: str) -> None:
    kinds, mixture = EVERY_FAMILY[name]
    recipe = {"base_model": "./base", "experts": expert_list(kinds), "mixture": mixture}
    check_mixture(bench_of(model_type), recipe)


# --- promise 1: copies of one expert are that expert, whatever the router says

TEXT_FITS = ("centroid", "logistic")
ADAPTER_FITS = ("arrow",)


@st.composite
def copies(draw: st.DrawFn) -> dict[str, Any]:
    """A family and a recipe of one expert two to four times, with any router."""
    model_type, kind = draw(st.sampled_from(TYPES)), draw(st.sampled_from([ONE, ONE, PLAIN, UNEVEN, DORA, PART]))
    experts = expert_list([kind] * draw(st.integers(2, 4)))
    fits = ("random", *TEXT_FITS, *(ADAPTER_FITS if kind in LOW_RANK else ()))
    mixture = draw_mixture(draw, model_type, experts, fits)
    if mixture.get("always_on", {}).get("expert") == "base":
        del mixture["always_on"]
    base = draw(st.sampled_from(["./base", "./one"])) if kind == ONE else "./base"
    return {"family": model_type, "recipe": {"base_model": base, "experts": experts, "mixture": mixture}}


@FEW
@given(drawn=copies(), seed=st.integers(0, 99))
def test_copies_of_one_expert_are_that_expert(drawn: dict[str, Any], seed: int) -> None:
    bench, recipe = bench_of(drawn["family"]), drawn["recipe"]
    ids, mask = a_batch(seed)
    if recipe["base_model"] == "./one":
        expected = bench.made["one"]
    else:
        expected = expected_model(bench, recipe, kinds_of(recipe)[0], backbone_of(bench, recipe))
    with built(bench, recipe) as (_, model):
        close(logits_of(model, ids, mask), logits_of(expected, ids, mask), mask)


# --- routers


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 300),
    decay=st.sampled_from([0.3, 0.9, 1.0]),
    prefix=st.none() | st.integers(1, 200),
    pads=st.sampled_from([0.0, 0.3]),
    cuts=st.lists(st.integers(1, 299), max_size=3),
    seed=st.integers(0, 9),
)
def test_causal_averages_are_the_sums_one_by_one(
    length: int, decay: float, prefix: int | None, pads: float, cuts: list[int], seed: int
) -> None:
    """Also when the tokens come in pieces, and with pads anywhere."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, length, 3, generator=generator)
    mask = (torch.rand(2, length, generator=generator) >= pads).float()
    expected = so_far(values.double(), mask, decay, prefix)
    state, parts = None, []
    ends = [0, *sorted({cut for cut in cuts if cut < length}), length]
    for start, end in pairwise(ends):
        part, state = causal_average(values[:, start:end], mask[:, start:end], decay, state, prefix=prefix)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected, atol=1e-5, rtol=1e-4)
