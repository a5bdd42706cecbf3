"""Causal language models without a row in families.py: what a mixture must know of them, found in their installed class.

The class is made on torch's meta device, where nothing is allocated, and looked at by structure: the list of layers with most
parameters is the stack, its linear modules are the parts, and whatever else holds tensors is part of whole models only. Only
classes that transformers itself has are made. torch and transformers are imported here and only for such a model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from modekit.errors import UnsupportedError
from modekit.files.typed import entries
from modekit.recipes.layers import stack_of
from modekit.sources.config import Config, damaged_model, no_usable
from modekit.sources.family import Family
from modekit.sources.names import split_layer, weight_of
from modekit.sources.stack import Stack

if TYPE_CHECKING:
    from torch import nn

    from modekit.sources.source import ModelSource

SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")
"""Keys of config.json that every family with a row has; a mixture's has them whatever its class calls them."""
_MOST, _MOST_EXPERTS = 4096, 2**15
"""Layers, and experts of one layer, that are made on the meta device."""
_TOKENS = 13
_READ_FIRST = ("q_proj", "query", "q_lin")
_COUNTS = ("layer", "expert", "block", "depth", "codebook")
_PART_OF = {f"{part}_proj": part for part in ("q", "k", "v", "o", "gate", "up", "down")}
_FFN = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "feedforward")
_NO_MEANING: tuple[str, ...] = (
    "dropout",
    "drop",
    "initializer",
    "use_cache",
    "dtype",
    "token_id",
    "transformers_version",
    "architectures",
    "loss",
    "_name_or_path",
    "output_",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "task_specific",
    "aux_",
)
_NOT_CALLED = ("dt_proj",)
"""Linear modules whose weights their layer reads past them."""
INEXACT = {
    "falcon_h1": "the class alone knows a vector by which its recurrence multiplies",
    **dict.fromkeys(("gemma3n_text", "jetmoe"), "a part of its layers is called by its methods, past its routers"),
    "longcat_flash": "each of its layers is two in one, and its router is read past its module",
    "minimax": "it has a cache of its own kind",
}
"""Type -> why an expert alone would be another model, or not write (tests/sources/test_decoders.py found it)."""
INEXACT_WHOLE = {"qwen4_exp_text": "a norm runs on keys that are means of several tokens"}
"""Type -> why adapters and FFNs of it are mixed, and whole models are not."""
_Name = Annotated[str, Field(max_length=200, pattern=r"^[\w.]*$")]
_Names = Annotated[list[_Name], Field(max_length=512)]


class Derived(BaseModel, extra="forbid", strict=True, frozen=True):
    """What was found in a class: written into a mixture's config.json, so that it opens without looking again.

    Attributes:
        layers: what the names of the layers' tensors begin with.
        parts: linear modules under a layer, in the order of the class.
        ffn: module of the whole FFN under a layer; empty where no module holds it.
        embedding, head: their modules; `head` is empty where the class has none.
        tied: tensors that are others under a second name -> those others.
        lookups: embeddings besides the first, whole names.
        columns: linear modules that keep weights as (I, O), and modules that keep experts' as (E, I, O), whole names.
        heads_first: modules under a layer that see (B, heads, S, width).
        blocks: modules that only work as a whole, whole names: tensors of theirs are read by code outside of small modules.
    """

    layers: _Name
    parts: _Names
    ffn: _Name = ""
    embedding: _Name
    head: _Name = ""
    tied: Annotated[dict[_Name, _Name], Field(max_length=4096)] = {}
    lookups: _Names = []
    columns: _Names = []
    heads_first: _Names = []
    blocks: Annotated[list[_Name], Field(max_length=65_536)] = []


@dataclass(frozen=True)
class ClassFamily(Family):
    """A family by what was found in its class. `known`: what its config.json says of sizes, under the names that rows use."""

    known: Mapping[str, int] = field(default_factory=dict)

    def is_tied(self, source: ModelSource) -> bool:
        """Whether the head is the embedding."""
        return bool(self.ties)

    def own_names(self, source: ModelSource) -> list[str]:
        """Names of a model's tensors that its class has."""
        return [name for name in source.tensors if name in self.tensors] if self.tensors else super().own_names(source)

    def settings(self, config: Config, must_match: Sequence[str], *, where: str) -> Config:
        """Every setting that the class has."""
        said = structure(config, where=where).family.defaults
        return {key: value for key, value in said.items() if key != "vocab_size"}

    def with_sizes(self, config: Config) -> Config:
        """A config with its sizes under the names that rows use."""
        return {**config, **{key: size for key, size in self.known.items() if type(config.get(key)) is not int}}

    def outside(self, source: ModelSource) -> list[str]:
        """The embedding: `shapes` has the rest."""
        return [weight_of(self.embedding)]

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Every tensor of the class."""
        return dict(structure(config, where="config.json").family.tensors)

    def dense_config(self, config: Config) -> dict[str, object]:
        """The config with the settings of its class."""
        return dict(self.with_sizes({**self.defaults, **config}))


def family_from(model_type: str, derived: Derived) -> ClassFamily:
    """The family that what was found in a class amounts to."""
    layer, _ = split_layer(f"{derived.layers}0.x")
    name = "" if layer is None else stack_of(layer)[0]
    return ClassFamily(
        model_type,
        (Stack(name=name, layers=derived.layers, parts=_named(derived.parts), ffn=derived.ffn),),
        embedding=derived.embedding,
        head=derived.head,
        heads_first=tuple(derived.heads_first),
        without_vllm="its family has no row in modekit's table, and it was not tested in vLLM",
        derived=derived,
    )


def _named(paths: list[str]) -> dict[str, str]:
    """Part -> its module; a part that has no usual name, or none of its own, is called by its path."""
    usual = [_PART_OF.get(path.rpartition(".")[2], path) for path in paths]
    return {name if usual.count(name) == 1 else path: path for name, path in zip(usual, paths, strict=True)}


def structure(config: Config, *, where: str) -> Structure:
    """What the installed class of a config is made of. Raises SourceError where transformers cannot make it."""
    return _structure(json.dumps(config, sort_keys=True), where)


@lru_cache(maxsize=16)
def _structure(config_json: str, where: str) -> Structure:
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: dict[str, Any] = json.loads(config_json)
    _check_counts(config, where)
    try:
        with torch.device("meta"):
            config_class = CONFIG_MAPPING[config["model_type"]]
            made = config_class.from_dict(config_class._decode_special_floats(dict(config)))
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)](made)
    except Exception as error:  # by what a config says, anything may go wrong in a model's own code
        raise damaged_model(
            f"transformers cannot make a '{config['model_type']}' model of this config.json",
            where,
            f"{type(error).__name__}: {error}"[:300],
        ) from None
    return Structure(model, where)


def _check_counts(config: Config, where: str) -> None:
    """Raise SourceError before anything has an entry for each of a billion layers."""
    for key, value in entries(config):
        most = _MOST_EXPERTS if "expert" in key else _MOST
        if isinstance(value, int) and value > most and any(word in key for word in _COUNTS) and "size" not in key:
            raise no_usable(key, value, f"at most {most}", where)


class Structure:
    """What a model on the meta device is made of."""

    def __init__(self, model: Any, where: str) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        self.model = model
        self._where = where
        self._nn = torch.nn
        self._columns = Conv1D
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._called: dict[str, None] = {}
        self._heads_first: dict[str, None] = {}
        self.tied = dict(getattr(model, "all_tied_weights_keys", None) or {})

    @cached_property
    def family(self) -> Family:
        """The row of its config. Raises UnsupportedError where it cannot be mixed."""
        config = self.model.config
        if config.model_type in INEXACT:
            raise self.refused(INEXACT[config.model_type])
        layers = self._layers
        embedding = self._name_of(self.model.get_input_embeddings())
        if not embedding:
            raise self.refused("no embedding of tokens was found in its class")
        rows, width = self.model.get_input_embeddings().weight.shape
        derived = Derived(
            layers=layers,
            parts=self._parts(),
            # A child of every layer that is called as FFNs are.
            ffn=next((name for name in _FFN if all(name in dict(layer.named_children()) for layer in self._list)), ""),
            embedding=embedding,
            head=self._name_of(self.model.get_output_embeddings()),
            tied=self.tied,
            lookups=[name for name, module in self._modules.items() if isinstance(module, self._nn.Embedding)],
            columns=[
                name
                for name, module in self._modules.items()
                if isinstance(module, self._columns) or getattr(module, "is_transposed", False)
            ],
            heads_first=sorted({*map(self._inside, self._heads_first)} - {""}),
            blocks=self._blocks(),
        )
        found = zip(SIZES, (int(width), int(rows), len(self._list)), strict=True)
        known = {key: getattr(config, key) if type(getattr(config, key, None)) is int else size for key, size in found}
        tensors = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items() if name not in self.tied}
        own, said = type(config)().to_dict(), config.to_dict()  # training tools add what no class knows
        settings = {key: said[key] for key in said if key in own and not any(word in key for word in _NO_MEANING)}
        family = family_from(config.model_type, derived)
        called = tuple(self._called)
        routed = tuple(self._routed(derived.blocks))
        return replace(family, known=known, tensors=tensors, defaults=settings, called=called, routed=routed)

    def refused(self, why: str, remedy: str = "choose a base of another family (benchmarks/families.md)") -> UnsupportedError:
        """The error for a model that cannot be mixed."""
        return UnsupportedError(
            f"models of the family '{self.model.config.model_type}' cannot be mixed: {why}",
            where=self._where,
            remedy=remedy,
        )

    @cached_property
    def _layers(self) -> str:
        """What names in the list of modules, in no other list, with most parameters begin with."""
        lists = [name for name, module in self._modules.items() if isinstance(module, self._nn.ModuleList) and len(module)]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        sizes = {name: sum(each.numel() for each in self._modules[name].parameters()) for name in outer}
        if not sizes:
            raise self.refused("no list of layers was found in its class")
        return f"{max(sizes, key=lambda name: sizes[name])}."

    @property
    def _list(self) -> list[nn.Module]:
        return list(self._modules[self._layers.rstrip(".")].children())

    def _inside(self, name: str) -> str:
        """What a module is called in its layer; nothing outside of the layers."""
        return name.removeprefix(self._layers).partition(".")[2] if name.startswith(self._layers) else ""

    def _name_of(self, module: Any) -> str:
        return next((name for name, each in self._modules.items() if each is module), "")

    def _parts(self) -> list[str]:
        """Linear modules of the layers, in the order in which a pass calls them."""
        paths: dict[str, None] = {}
        for name, module in self._modules.items():
            inside = self._inside(name)
            if inside and self._is_linear(module) and ".experts." not in f".{inside}." and not inside.endswith(_NOT_CALLED):
                paths[inside] = None
        self._run()
        order = [path for path in map(self._inside, self._called) if path in paths]
        first = [path for path in paths if path.rpartition(".")[2] in _READ_FIRST]  # where the class says nothing
        return list(dict.fromkeys((*order, *first, *paths)))

    def _run(self) -> None:
        """Note which modules a pass calls, in that order, and which of them see (B, heads, S, width): as far as code comes that
        may look at numbers, of which there are none.
        """
        import torch

        def note(name: str, args: tuple[Any, ...]) -> None:
            self._called[name] = None
            if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 4 and args[0].shape[2] == _TOKENS:
                self._heads_first[name] = None

        hooks = [
            each.register_forward_pre_hook(lambda _, args, name=name: note(name, args)) for name, each in self._modules.items()
        ]
        mask = torch.zeros((2, 1, _TOKENS, _TOKENS), device="meta")
        try:
            self.model.config._attn_implementation = "eager"
            with torch.no_grad():
                self.model(torch.zeros((2, _TOKENS), dtype=torch.long, device="meta"), attention_mask=mask, use_cache=False)
        except Exception:  # it is enough to know what came first
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def _blocks(self) -> list[str]:
        """Modules with tensors that are no weight and bias of a plain map: their nearest parent that is a module of a layer."""
        tensors: dict[str, dict[str, Any]] = {}
        for name, tensor in self.model.state_dict().items():
            module, _, leaf = name.rpartition(".")
            tensors.setdefault(module, {})[leaf] = tensor
        found = dict.fromkeys(
            self._around(name) for name, own in tensors.items() if not self._is_plain(self._modules[name], own)
        )
        if any(self._layers.startswith(f"{name}.") or not name for name in found):
            raise self.refused("it holds tensors that belong to no part of it")
        return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]

    def _is_linear(self, module: Any) -> bool:
        """Whether it is a linear map and nothing else; some routers descend from one and return more."""
        import torch

        if not isinstance(module, self._nn.Linear | self._columns) or type(module).forward is self._nn.Linear.forward:
            return isinstance(module, self._nn.Linear)
        width = module.in_features if isinstance(module, self._nn.Linear) else module.weight.shape[0]
        with torch.no_grad():
            return isinstance(module(module.weight.new_zeros(2, width)), torch.Tensor)

    def _is_plain(self, module: Any, own: Mapping[str, Any]) -> bool:
        known = self._is_linear(module) or isinstance(module, self._nn.Embedding) or "Norm" in type(module).__name__
        alone = not any(True for _ in module.children())
        return known and alone and own.keys() <= {"weight", "bias"} and all(each.ndim <= 2 for each in own.values())

    def _routed(self, blocks: list[str]) -> Iterator[str]:
        """Modules with fused experts that are computed as transformers' own functions do (integrations/moe.py), in a block that
        is called with what it reads and nothing else.
        """
        for name, module in self._modules.items():
            block = next((self._modules[each] for each in blocks if name.startswith(f"{each}.")), None)
            alone = block is not None and len(inspect.signature(block.forward).parameters) == 1
            if alone and hasattr(module, "_apply_gate") and not getattr(module, "has_post_expert_norm", False):
                yield name

    def _around(self, name: str) -> str:
        inside = self._inside(name)
        return name if not inside else name.removesuffix(inside) + inside.partition(".")[0]
