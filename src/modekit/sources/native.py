"""What a native MoE architecture is that says a family's mixture of whole FFN experts exactly; natives.py has the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from modekit.sources.config import Config, whole
from modekit.sources.family import Family

Rule = tuple[Callable[[Config], bool], str]
"""(holds for this dense config, reason shown when it does not)."""
_NOT_ARCHITECTURE = ("_name_or_path", "auto_map", "torch_dtype", "dtype", "transformers_version", "architectures", "model_type")


@dataclass(frozen=True)
class Constant:
    """A tensor that the native architecture wants and the dense family lacks: zeros, so that it adds nothing.

    `shape` is given in the letters D hidden, F expert hidden, E experts, or digits.
    """

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Widening:
    """How a decoder of the architecture takes channels besides the base's (planning/channels.py).

    Attributes:
        before_attention, after_attention: the RMS norms over the hidden size under a layer, by module.
        recency: whether constant queries and keys score the distance of two tokens and nothing else.
        interleaved: whether the two numbers that are rotated together stand side by side in a head, not half a head apart.
        whole_heads: head_dim is always hidden size / heads, so that the channels are as many as the new heads are wide.
    """

    before_attention = "input_layernorm"
    after_attention = "post_attention_layernorm"
    norms = (before_attention, after_attention)

    recency: bool = True
    interleaved: bool = False
    whole_heads: bool = False


@dataclass(frozen=True)
class Routed:
    """How a base that is a mixture itself keeps its own experts, under a layer, by the names of its class.

    Attributes:
        gate_up, down: of all experts: (M, 2 F, D) and (M, D, F).
        gate: (M, D).
        shared_down: the last projection of an expert that all tokens have; empty where there is none.
        shared_gate: the module of its gate: llama.cpp divides by what that says, which must not be zero.
        sums_to_one: whether the weights of the chosen experts do.
    """

    gate_up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    gate: str = "mlp.gate.weight"
    shared_down: str = ""
    shared_gate: str = ""
    sums_to_one: Callable[[Config], bool] = lambda config: True

    @property
    def own(self) -> tuple[str, ...]:
        """All that each fine-tune has of its own."""
        return self.gate_up, self.down, self.gate

    def path(self, part: str) -> str:
        """Of the tensor that holds gate, up or down."""
        return self.down if part == "down" else self.gate_up

    @staticmethod
    def count(config: Config) -> int:
        """M; files of different ages have different names for it."""
        return whole(config, "num_experts" if config.get("num_experts") is not None else "num_local_experts")


def experts_in(block: str, *modules: str) -> dict[str, str]:
    """Native name per projection with `{expert}`, by the modules of gate, up and down."""
    names = zip(("gate", "up", "down"), modules, strict=True)
    return {part: f"{block}.experts.{{expert}}.{module}.weight" for part, module in names}


@dataclass(frozen=True)
class Native:
    """The native partner of one dense family.

    Attributes:
        family: the dense family.
        native_type: `model_type` of the result.
        native_class: `architectures[0]` of the result.
        experts: native name per projection with `{expert}`; None when the native layout fuses experts in one tensor.
        fused: native names of the fused (E, 2F, D) and (E, D, F) tensors; None when experts are tensors of their own.
        router: native name under the layer of the (E, D) gate.
        router_module: attribute path under the loaded decoder layer of the module that returns (logits, weights, index).
        block_module: attribute path of the block in a loaded native layer.
        num_experts_key, top_k_key: config keys of the native architecture.
        width_key: native config key of F.
        fixed: native settings that make the row exact.
        computed: native settings that follow from the dense config.
        dropped: dense keys that mean nothing to the native architecture.
        constants: see `Constant`.
        empty: tensors of the class without a number, under the layer, which the result leaves out: vLLM does not load them.
        rules: what must hold.
        serves: where the result runs besides transformers.
        without_gguf: why llama.cpp does not run it; empty where it does.
        vllm_differs: where vLLM's own class computes something else, and what; transformers' class is right there.
        gguf_differs: the same of llama.cpp, which then does not run it.
        widening: how it takes channels of a router's own, or the reason why it cannot.
        routed: of a base that is a mixture itself, whose mixture is one of the same family.
    """

    family: Family
    native_type: str
    native_class: str
    router: str = "mlp.gate.weight"
    experts: Mapping[str, str] | None = field(default_factory=lambda: experts_in("mlp", "gate_proj", "up_proj", "down_proj"))
    fused: tuple[str, str] | None = None
    router_module: str = "mlp.gate"
    block_module: str = "mlp"
    num_experts_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "intermediate_size"
    writes_head_dim: bool = True
    fixed: Config = field(default_factory=dict)
    computed: Mapping[str, Callable[[Config], object]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    constants: tuple[Constant, ...] = ()
    empty: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    serves: str = "vLLM"
    without_gguf: str = ""
    vllm_differs: tuple[Rule, ...] = ()
    gguf_differs: tuple[Rule, ...] = ()
    widening: Widening | str = Widening()
    routed: Routed | None = None

    def refusals(self, config: Config) -> list[str]:
        """Why this row does not fit a dense config; empty when it does."""
        full = self.family.dense_config(config)
        return [reason for holds, reason in self.rules if not holds(full)]

    def config(self, config: Config, *, experts: int, top_k: int, expert_hidden: int, dtype: str) -> dict[str, object]:
        """The native config.json: the dense one, renamed and completed.

        `experts` is E, `expert_hidden` is F, `dtype` one of float32, bfloat16, float16.
        """
        dense = self.family.dense_config(config)
        left_out = {*self.dropped, *_NOT_ARCHITECTURE, *(() if self.writes_head_dim else ("head_dim",))}
        return {
            **{key: value for key, value in dense.items() if key not in left_out},
            **self.fixed,
            "architectures": [self.native_class],
            "model_type": self.native_type,
            "dtype": dtype,
            self.num_experts_key: experts,
            self.top_k_key: top_k,
            self.width_key: expert_hidden,
            **{key: compute(dense) for key, compute in self.computed.items()},
        }
