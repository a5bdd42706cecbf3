"""`config["modekit"]` of a checkpoint, typed: the planner makes it, a checkpoint opens it, nobody else states it.

The modules in architecture/ are copied into checkpoints and read the same data as a plain dict; what each key means to
them says modekit_mixed.py and modekit_router.py. Keys that were not set are not written.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from modekit.planning.shape import RouterSlot
from modekit.recipes.fits import ScoreKind
from modekit.recipes.mixture import Router
from modekit.recipes.recipe import Recipe
from modekit.sources.families import FAMILIES
from modekit.sources.family import PARTS, READ_ALIKE, Family
from modekit.sources.names import LOGITS_BIAS, module_of, split_layer
from modekit.sources.structure import Derived, family_from

FORMAT = 1
GATE = ".router.gate"
_PerExpert = Field(max_length=2**12)  # of lists: what is longer names no experts, and is not made first
_Size = Annotated[int, Field(ge=1, le=2**40)]
_Index = Annotated[int, Field(ge=0, le=2**12)]
_Rank = Annotated[int, Field(ge=0, le=2**40)]


class _Said(BaseModel, extra="forbid", strict=True, frozen=True, allow_inf_nan=False):
    def as_written(self) -> dict[str, Any]:
        """As config.json has it: only the keys that were set."""
        return self.model_dump(exclude_unset=True)


class Average(_Said):
    """What a part of the gate reads: the token itself (None), or a causal average."""

    decay: Annotated[float, Field(ge=0, le=1)] | None


class Ngram(_Said):
    """The table of a router that reads token ids."""

    order: int = Field(ge=1, le=4)
    buckets: int = Field(ge=2, le=2**24)


class AlwaysOnConfig(_Said):
    """What takes part in every token: an expert by its index, or the base (None); its share; whether it runs apart."""

    expert: int | None
    weight: Annotated[float, Field(gt=0, lt=1)] | None
    apart: bool = False


class Routing(_Said):
    """How a router turns what it reads into weights."""

    method: Literal["linear", "gating", "routing"]
    averages: list[Average] = Field(min_length=1, max_length=2**8)
    top_k: _Size | None
    top_p: float | None
    weights: Annotated[list[float], _PerExpert] | None
    always_on: AlwaysOnConfig | None
    score: ScoreKind = "linear"
    jitter: float = 0.0
    noise: float = 0.0
    prefix: _Size | None = None
    ngram: Ngram | None = None
    orders: Annotated[list[Annotated[int, Field(ge=1, le=4)]], Field(min_length=1, max_length=2**8)] | None = None
    groups: _Size | None = None
    threshold: Annotated[list[float], _PerExpert] | None = None
    dimensions: _Size | None = None

    def check(self, count: int) -> None:
        """Raise ValueError where it is not of so many experts."""
        for key in ("top_k", "groups", "dimensions"):
            if (getattr(self, key) or 0) > count:
                raise ValueError(f"routing.{key}: there are only {count} experts")
        for key in ("weights", "threshold"):
            if getattr(self, key) is not None and len(getattr(self, key)) != count:
                raise ValueError(f"routing.{key} must have {count} entries")
        if self.always_on is not None and not 0 <= (self.always_on.expert or 0) < count:
            raise ValueError(f"routing.always_on: there are only {count} experts")

    @property
    def reads_averages(self) -> bool:
        """Whether what the router says of a token depends on those before it."""
        return any(average.decay is not None for average in self.averages)

    @property
    def runs_common(self) -> bool:
        """Whether the base runs beside the experts, all the way to the head."""
        return self.always_on is not None and self.always_on.apart

    @property
    def remembers(self) -> bool:
        """Whether something of the text before a token must be kept for it."""
        return self.reads_averages or self.ngram is not None


class InsidePlace(_Said):
    """Of one tensor of a place that is itself a mixture, by its name there: the rank and the scale of every expert's change."""

    tensor: Annotated[str, Field(max_length=200, pattern=r"^\w+(\.\w+)*$")]
    ranks: Annotated[list[_Rank], _PerExpert]
    scales: Annotated[list[float], _PerExpert]

    @property
    def name(self) -> str:
        """What the change is called under the place: a module's name has no dots."""
        return f"inside.{self.tensor.replace('.', '-')}"


class Place(_Said):
    """What the experts have of one module of the base, and who decides there; only a leader has `width`.

    `inside`: where it is itself a mixture, what experts change of the tensors in it, in the order of the class.
    `calls`: where a layer calls several modules itself that are one place here, their names under the layer, in that order.
    `of_source`: whether a place in a decoder runs on the encoder's output.
    """

    ranks: Annotated[list[_Rank], _PerExpert]
    scales: Annotated[list[float], _PerExpert]
    own: Annotated[list[int], _PerExpert]
    base: bool
    router: str
    bits: Annotated[list[Annotated[int, Field(ge=0, le=8)]], _PerExpert] = []
    biased: Annotated[list[int], _PerExpert] = []
    features: _Rank = 0
    sequence_axis: Literal[1, 2] = 1
    width: _Size | None = None
    calls: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=8)] = []
    of_source: bool = False
    inside: Annotated[list[InsidePlace], Field(max_length=64)] = []

    def tensor(self, module: str, leaf: str) -> str:
        """What a tensor of the place is called in the base: fc1, fc2.weight -> the layer's fc2.weight with `calls`."""
        if leaf == LOGITS_BIAS:
            return leaf
        return f"{module_of(module) if self.calls else module}.{leaf}"

    def has(self, expert: int) -> bool:
        """Whether an expert differs from the base here."""
        return self.is_low_rank(expert) or expert in self.own or bool(self.bits and self.bits[expert])

    def is_low_rank(self, expert: int) -> bool:
        """Whether an expert has a low-rank change here."""
        return bool(self.ranks[expert] or any(each.ranks[expert] for each in self.inside))


class MixtureConfig(_Said):
    """`config["modekit"]`: the experts, how they are routed, and module -> what they have there.

    `labels`: other names under which a text's expert is known -> its place.
    """

    format: int
    dense_type: str
    derived: Derived | None = None
    variant: Annotated[str, Field(max_length=64)] = ""
    experts: list[str] = Field(min_length=1, max_length=2**12)
    labels: Annotated[dict[Annotated[str, Field(max_length=64)], _Index], Field(max_length=2**18)] = {}
    routing: Routing
    places: dict[str, Place] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        count = len(self.experts)
        rows = {(family.model_type, family.variant) for family in FAMILIES}
        if self.derived is None and (self.dense_type, self.variant) not in rows:
            raise ValueError(f"dense_type '{self.dense_type}' is no family of this version of modekit")
        if any(place >= count or label in self.experts for label, place in self.labels.items()):
            raise ValueError(f"labels are other names of {count} experts")
        self.routing.check(count)
        self._check_places(count)
        return self

    def _check_places(self, count: int) -> None:
        for module, place in self.places.items():
            layer, path = split_layer(module)
            stack = None if layer is None else self.family.stack_of(layer)
            if place.calls and (stack is None or (path, tuple(place.calls)) != (stack.ffn, stack.ffn_calls)):
                raise ValueError(f"places.{module}: its layer does not call {', '.join(place.calls)} one after the other")
            leader = self.places.get(place.router)
            if {len(place.ranks), len(place.scales), len(place.bits or place.ranks)} != {count}:
                raise ValueError(f"places.{module}: ranks, scales and bits must have {count} entries")
            if any({len(each.ranks), len(each.scales)} != {count} for each in place.inside):
                raise ValueError(f"places.{module}: ranks and scales of what is inside must have {count} entries")
            for named in (place.own, place.biased):
                if sorted(set(named)) != named or not all(0 <= expert < count for expert in named):
                    raise ValueError(f"places.{module}: own and biased name some of {count} experts, each once, in order")
            if leader is None or leader.width is None:
                raise ValueError(f"places.{module}: there is no router '{place.router}'")

    @cached_property
    def family(self) -> Family:
        """The row of the dense family."""
        if self.derived is not None:
            return family_from(self.dense_type, self.derived)
        return next(row for row in FAMILIES if (row.model_type, row.variant) == (self.dense_type, self.variant))

    @property
    def without_vllm(self) -> str | None:
        """Why vLLM does not serve the mixture; None where it does."""
        routing = self.routing
        places = self.places.values()
        if self.family.head in self.places:
            return "its experts have heads of their own (modules: all), and vLLM computes logits outside the model"
        if any(place.bits for place in places):
            return "it keeps differences in a few bits (experts[].bits), which modekit's plug-in does not read"
        if routing.runs_common:
            return "the base runs beside its experts (always_on, apart), and vLLM keeps one row of keys and values per text"
        if routing.remembers and any(place.features for place in places):
            return "its routers decide per feature over averages, and would keep kilobytes for every token and place"
        return self.family.without_vllm or None

    def readers(self, leader: str) -> list[str]:
        """The places that read the same input as a leader and follow its router: q, k and v, or gate and up, of its layer; else
        itself alone.
        """
        layer, path = split_layer(leader)
        for alike in READ_ALIKE if layer is not None else ():
            assert layer is not None
            parts = self.family.stack_of(layer).parts
            paths = [parts[part] for part in PARTS if part in alike and part in parts]
            if path in paths:
                names = dict.fromkeys(self.family.in_layer(layer, each) for each in paths)
                return [name for name in names if name in self.places and self.places[name].router == leader]
        return [leader] if leader in self.places else []


def leader_of(slot: RouterSlot) -> str:
    """The place that a router belongs to."""
    return slot.name.removesuffix(GATE)


_CONTEXT_DECAYS = (0.9,)
"""One average: several side by side fit what they were fitted on better, and other text worse (benchmarks/routers.md)."""
_PREFIX = 64  # tokens after which a decision stays, unless a recipe says another number


def averages_of(router: Router) -> list[float | None]:
    """The decay of what each part of the gate reads; None: the token itself (architecture/modekit_router.py)."""
    if router.row.fading is not None:
        return [decay for _ in router.orders or [1] for decay in router.decays]
    if router.granularity == "sequence":
        return [1.0]
    if router.granularity == "token":
        return [None]
    return [decay or None for decay in router.decay or _CONTEXT_DECAYS]


def prefix_of(router: Router) -> int | None:
    """Tokens after which the decision stays; None when it never does."""
    return (router.prefix or _PREFIX) if router.granularity == "sequence" else None


def routing_config(recipe: Recipe) -> Routing:
    """`modekit.routing` of config.json; see architecture/modekit_router.py."""
    mixture = recipe.mixture
    router = mixture.router
    always_on = None
    read = dict[str, Any]()
    if mixture.always_on is not None:
        index = recipe.names.index(mixture.always_on.expert) if mixture.always_on.expert in recipe.names else None
        apart = {"apart": True} if mixture.always_on.apart else {}
        always_on = AlwaysOnConfig(expert=index, weight=mixture.always_on.weight, **apart)
    given = mixture.weights or dict.fromkeys(recipe.names, 1.0)
    if mixture.method != "linear":
        read = {"score": router.row.score, "jitter": router.jitter, "noise": router.noise, "prefix": prefix_of(router)}
        if router.hashes and router.orders is not None:
            read["ngram"] = Ngram(order=max(router.orders), buckets=router.buckets)
            read["orders"] = [order for order in router.orders for _ in router.decays]
        if "dimensions" in router.row.settings:
            read["dimensions"] = router.dimensions or len(recipe.experts)
    read |= {} if mixture.groups is None else {"groups": mixture.groups}
    if mixture.threshold is not None:
        by_name = mixture.threshold
        read["threshold"] = [by_name[name] if isinstance(by_name, dict) else by_name for name in recipe.names]
    return Routing(
        method=mixture.method,
        top_k=recipe.top_k if mixture.method == "routing" and not mixture.varies else None,
        top_p=mixture.top_p,
        weights=[given[name] / sum(given.values()) for name in recipe.names] if mixture.method == "linear" else None,
        always_on=always_on,
        **read,
        averages=[Average(decay=decay) for decay in averages_of(router)],
    )
