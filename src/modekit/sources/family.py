"""What a dense family is: where the parts of its layers live, and what its config.json leaves unsaid.

Most families are one stack of layers, a decoder. Families of *pairs* have two, an encoder that reads a source and a decoder
that writes its target; a layer of theirs is called by its stack, such as `encoder.3`. The rows: families.py and pairs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from modekit.recipes.layers import Layer, layer_at, stack_of
from modekit.sources.config import Config, no_usable, whole, words
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, is_ignored, is_looked_up, weight_of
from modekit.sources.stack import Stack

if TYPE_CHECKING:
    from modekit.sources.source import ModelSource
    from modekit.sources.structure import Derived

Reads = Literal["pairs", "text"]
"""What models read: pairs of source and target, or plain text."""

UNTIE = (
    "give the base a head of its own: m = AutoModelForCausalLM.from_pretrained(BASE); h = m.get_output_embeddings(); "
    "h.weight = torch.nn.Parameter(h.weight.clone()); m.config.tie_word_embeddings = False; m.save_pretrained(NEW)"
)
PARTS = ("q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "gate", "up", "down")
"""Linear parts of a layer in the order in which they run; those of the attention to an encoder's output are `cross`."""
READ_ALIKE = ({"q", "k", "v"}, {"cross_k", "cross_v"}, {"gate", "up"})
"""Parts of a layer that read the same input."""


@dataclass(frozen=True)
class Family:
    """One dense family, known by a row of data; by its class where there is no row (structure.py).

    Attributes:
        model_type: `model_type` of its config.
        stacks: its decoder, or its encoder and its decoder.
        variant: of several rows with one `model_type`, which of them; the row for it says `is_variant`.
        heads_first: modules under the layer that see (B, heads, S, width) and not (B, S, ...).
        head_dim: the default when config.json is silent; None means hidden / heads.
        rope_theta: the default.
        rotary: the share of each head that rotary embeddings turn where config.json is silent.
        layer_types: the kind of attention per layer that the class takes when config.json is silent.
        defaults: other defaults to write out.
        without_vllm: why vLLM does not serve mixtures of it in the modekit architecture; empty where it does.
        width: key of config.json for the width of the residual stream.
        embedding, head: the modules of the tokens' embedding and of the head.
        copies: tensors that files may hold besides the embedding and that are the same parameter.
        shares: whether they are so whatever config.json says of tying, and the head has weights of its own or is the embedding.
        computed: tensors that files may hold and that every model computes for itself.
        optional: tensors that an expert may have and its base may lack, where they are zero.
        same_as: key of config.json -> the key whose value it has where it says none.
        meant: a config with what the class makes of settings that say the same in several ways, for a comparison of two.
        must_match: keys of config.json, besides those of all families, in which experts must equal their base.
        derived: what was found in the class; None of a row. `tensors`, name -> shape of all that a model has, `called`, modules
            in the order in which they run, and `routed`, modules with fused experts whose adapters can be kept low-rank: where
            it was looked for now.
    """

    model_type: str
    stacks: tuple[Stack, ...] = (Stack(),)
    variant: str = ""
    is_variant: Callable[[Config], bool] = lambda config: True
    heads_first: tuple[str, ...] = ()
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rotary: float = 1.0
    layer_types: Callable[[Config], list[str]] | None = None
    defaults: Config = field(default_factory=dict)
    without_vllm: str = ""
    width: str = "hidden_size"
    embedding: str = EMBEDDING
    head: str = HEAD
    copies: tuple[str, ...] = ()
    shares: bool = False
    computed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    same_as: Mapping[str, str] = field(default_factory=dict)
    meant: Callable[[Config], Config] = lambda config: config
    must_match: tuple[str, ...] = ()
    derived: Derived | None = None
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    called: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()

    # --- what a class may say in another way than a row

    @property
    def ties(self) -> Mapping[str, str]:
        """Tensors of a model that ties its head to the embedding -> what they are a second name of."""
        return {weight_of(self.head): weight_of(self.embedding)} if self.derived is None else self.derived.tied

    def is_tied(self, source: ModelSource) -> bool:
        """Whether a model's head is its embedding. A T5 that has a head of its own says so by its weights alone."""
        if self.shares:
            return weight_of(self.head) not in source.tensors
        return bool(source.config.get("tie_word_embeddings", self.defaults.get("tie_word_embeddings")))

    def own_names(self, source: ModelSource) -> list[str]:
        """Names of a model's tensors that are neither buffers nor copies of the embedding: a tied head, and what encoder and
        decoder call it, who else have embeddings of their own.
        """
        tied = self.is_tied(source)
        copies = {*(self.copies if tied or self.shares else ()), *([weight_of(self.head)] if tied else ()), *self.computed}
        return [name for name in source.tensors if not is_ignored(name) and name not in copies]

    def copies_of(self, source: ModelSource) -> dict[str, str]:
        """Tensors in a model's files that are taken to be its embedding under other names -> the embedding's name."""
        own = {*self.own_names(source)}
        copies = {**dict.fromkeys((*self.copies, weight_of(HEAD)), weight_of(self.embedding)), **self.ties}
        return {name: copies[name] for name in source.tensors if name in copies and name not in own}

    def settings(self, config: Config, must_match: Sequence[str], *, where: str) -> Config:
        """The settings in which an expert must equal its base: those of every family, and its own."""
        said = {**self.meant(self.dense_config(config))}
        keys = [*must_match, *self.must_match]
        rope = said.get("rope_parameters")
        if isinstance(rope, Mapping):
            said["rope_parameters"], said["partial_rotary_factor"] = _written_out(rope, said, self.rotary), None
            if rope.get("rope_type") in {"dynamic", "longrope"}:
                keys.append("max_position_embeddings")  # these depend on it
        return {key: said.get(key) for key in keys}

    def looks_up(self, module: str) -> bool:
        """Whether a module is an embedding, of tokens or positions."""
        return is_looked_up(module) if self.derived is None else module in self.derived.lookups

    def keeps_columns(self, module: str) -> bool:
        """Whether a linear module keeps its weight as (I, O)."""
        return self.derived is not None and module in self.derived.columns

    def with_sizes(self, config: Config) -> Config:
        """A config with its sizes under the names that other families use."""
        return config

    def outside(self, source: ModelSource) -> list[str]:
        """Tensors outside of the layers that must be there."""
        norm = [weight_of(FINAL_NORM)] if not self.pair else []
        head = [] if self.is_tied(source) else [weight_of(self.head)]
        return [weight_of(self.embedding), *(name for stack in self.stacks for name in stack.outside), *norm, *head]

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name of a tensor -> the shape that follows from config.json: embedding, FFN, keys and values."""
        hidden = whole(config, self.width)
        full = self.dense_config(config)
        kinds = [] if self.pair else words(full, "layer_types")
        found: dict[str, tuple[int, ...]] = {weight_of(self.embedding): (whole(config, "vocab_size"), hidden)}
        for layer in self.layers(config):
            stack = self.stack_of(layer)
            number = stack_of(layer)[1]
            inner = whole(full, stack.ffn_width)
            paths = stack.mlp
            for part, path in paths.items():
                rows = inner * list(paths.values()).count(path)  # gate and up in one module
                found[self.in_layer(layer, path)] = (hidden, inner) if part == "down" else (rows, hidden)
            if not self.pair and "k" not in stack.fused and "linear_attention" not in kinds[number : number + 1]:
                size = whole(full, "num_key_value_heads") * whole(full, "head_dim")
                found |= {self.in_layer(layer, f"{stack.parts[part]}.weight"): (size, hidden) for part in "kv"}
        return found

    def dense_config(self, config: Config) -> dict[str, object]:
        """The dense config with every default written out and rope in one form."""
        full: dict[str, object] = {**self.defaults, **config}  # an explicit null is a setting, too
        if self.pair:
            return full | {key: full.get(other) for key, other in self.same_as.items() if full.get(key) is None}
        if full.get("num_key_value_heads") is None:
            full["num_key_value_heads"] = full["num_attention_heads"]
        if full.get("head_dim") is None:
            full["head_dim"] = self.head_dim or whole(full, "hidden_size") // whole(full, "num_attention_heads")
        if full.get("use_sliding_window") is False:
            full["sliding_window"] = None
        if self.layer_types is not None and full.get("layer_types") is None:
            full["layer_types"] = self.layer_types(full)
        full["rope_parameters"] = rope_parameters(config, self.rope_theta)
        return {key: value for key, value in full.items() if key not in ("rope_theta", "rope_scaling")}

    # --- what follows from the stacks

    @property
    def reads(self) -> Reads:
        """What its models read."""
        return "pairs" if self.pair else "text"

    @property
    def pair(self) -> bool:
        """Whether it has an encoder, and a decoder that writes what the encoder's text becomes."""
        return len(self.stacks) > 1

    @property
    def decoder(self) -> Stack:
        """The only stack, or the one that writes."""
        return self.stacks[-1]

    def layers(self, config: Config) -> list[Layer]:
        """All layers that config.json says there are, in the order in which they run."""
        return [layer_at(stack.name, number) for stack in self.stacks for number in range(stack.size(config))]

    def sizes(self, config: Config) -> dict[str, int]:
        """Stack -> number of layers."""
        return {stack.name: stack.size(config) for stack in self.stacks}

    def stack_of(self, layer: Layer) -> Stack:
        """The stack that a layer is in."""
        name, _ = stack_of(layer)
        return next((stack for stack in self.stacks if stack.name == name), self.stacks[-1])

    def in_layer(self, layer: Layer, path: str = "") -> str:
        """3, mlp.up_proj -> model.layers.3.mlp.up_proj; encoder.3, fc1 -> model.encoder.layers.3.fc1."""
        return f"{self.stack_of(layer).layers}{stack_of(layer)[1]}.{path}"


def rope_parameters(config: Config, default_theta: float) -> dict[str, object]:
    """Rotary settings in transformers 5 form, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise no_usable("rope_parameters or rope_scaling", given, "a mapping: rope_type, rope_theta, ...")
    rope: dict[str, object] = dict(given)
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or default_theta)
    return rope


def _written_out(rope: Mapping[str, object], config: Config, rotary: float) -> dict[str, object]:
    """Rotary settings, or those of each kind of attention, with what transformers 5 writes among them and older files say
    beside them or nowhere.
    """
    if any(isinstance(each, Mapping) for each in rope.values()):
        return {kind: _written_out(each, config, rotary) if isinstance(each, Mapping) else each for kind, each in rope.items()}
    said = {**rope, "partial_rotary_factor": rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or rotary}
    if rope.get("rope_type") in {"llama3", "yarn", "longrope"}:
        first = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        said["original_max_position_embeddings"] = first or config.get("max_position_embeddings")
    return said
