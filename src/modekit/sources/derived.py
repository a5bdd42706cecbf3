"""Decoders without a row in families.py: what a mixture must know of them, found in their installed class.

The class is made on torch's meta device, where nothing is allocated, and looked at by structure: the list of layers with most
parameters is the stack, its linear modules are the parts, and whatever else holds tensors is part of whole models only. Only
classes that transformers itself has are made. torch and transformers are imported here and only for such a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from modekit.errors import SourceError, UnsupportedError
from modekit.recipes.layers import stack_of
from modekit.sources.family import SAVE_AGAIN, Config, Family, Stack
from modekit.sources.names import split_layer

if TYPE_CHECKING:
    from torch import nn

SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")
"""Keys of config.json that every family with a row has; a mixture's has them whatever its class calls them."""
_MOST = 4096
"""Layers, or experts of one layer, that are made on the meta device."""
_COUNTS = ("layer", "expert", "block", "depth", "codebook")
_PART_OF = {f"{part}_proj": part for part in ("q", "k", "v", "o", "gate", "up", "down")}
_FFN = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "feedforward")
_NO_MEANING = ("dropout", "drop", "initializer", "use_cache", "dtype", "token_id", "transformers_version", "architectures")
_NO_MEANING += ("_name_or_path", "output_", "return_dict", "id2label", "label2id", "problem_type", "task_specific", "loss", "aux_")
_Name = Annotated[str, Field(max_length=200, pattern=r"^[\w.]*$")]
_Names = Annotated[list[_Name], Field(max_length=512)]


class Derived(BaseModel):
    """What was found in a class: written into a mixture's config.json, so that it opens without looking again.

    Attributes:
        layers: what the names of the layers' tensors begin with.
        parts: part -> linear module under a layer, in the order of the class; a part without a usual name is called by its path.
        ffn: module of the whole FFN under a layer; empty where no module holds it.
        embedding, head: their modules; `head` is empty where the class has none.
        tied: tensors that are others under a second name -> those others.
        lookups: embeddings besides the first, whole names.
        columns: linear modules that keep weights as (I, O), under a layer or whole names.
        blocks: modules that only work as a whole, whole names: tensors of theirs are read by code outside of small modules.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    layers: _Name
    parts: Annotated[dict[_Name, _Name], Field(max_length=256)]
    ffn: _Name = ""
    embedding: _Name
    head: _Name = ""
    tied: Annotated[dict[_Name, _Name], Field(max_length=4096)] = {}
    lookups: _Names = []
    columns: _Names = []
    blocks: Annotated[list[_Name], Field(max_length=65_536)] = []


def family_from(model_type: str, derived: Derived, **more: Any) -> Family:
    """The row that what was found in a class amounts to."""
    layer, _ = split_layer(f"{derived.layers}0.x")
    name = "" if layer is None else stack_of(layer)[0]
    stack = Stack(name=name, layers=derived.layers, parts=derived.parts, ffn=derived.ffn)
    return Family(
        model_type,
        (stack,),
        embedding=derived.embedding,
        head=derived.head,
        without_vllm="its family has no row in modekit's table, and nobody tried it in vLLM",
        derived=derived,
        **more,
    )


def is_installed(model_type: str) -> bool:
    """Whether transformers has a causal language model of a type. Imports transformers, not torch."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def derive(config: Config, *, where: str) -> Family:
    """The row of a config, from its installed class. Raises UnsupportedError where it cannot be mixed, and SourceError."""
    return _derive(json.dumps(config, sort_keys=True), where)


@lru_cache(maxsize=16)
def _derive(config_json: str, where: str) -> Family:
    config: dict[str, Any] = json.loads(config_json)
    model = _on_meta(config, where)
    return _Structure(model, where).family()


def _on_meta(config: Mapping[str, Any], where: str) -> Any:
    """The causal language model of a config, without numbers."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _check_counts(config, where)
    try:
        with torch.device("meta"):
            made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(made)](made)
    except Exception as error:  # by what a config says, anything may go wrong in a model's own code
        raise SourceError(
            f"transformers cannot make a '{config['model_type']}' model of this config.json",
            where=where,
            found=f"{type(error).__name__}: {error}"[:300],
            remedy=SAVE_AGAIN,
        ) from None


def _check_counts(config: Any, where: str) -> None:
    """Raise SourceError before anything has an entry for each of a billion layers."""
    waiting = [("", config)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += list(value.items())
        elif isinstance(value, list):
            waiting += [(key, each) for each in value if isinstance(each, Mapping)]
        elif isinstance(value, int) and value > _MOST and any(word in key for word in _COUNTS) and "size" not in key:
            raise SourceError(
                f"config.json gives no usable {key[:64]}", where=where, found=value, expected=f"at most {_MOST}", remedy=SAVE_AGAIN
            )


class _Structure:
    """What a model on the meta device is made of."""

    def __init__(self, model: Any, where: str) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        self._model, self._where, self._nn, self._columns = model, where, torch.nn, Conv1D
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})

    def family(self) -> Family:
        config = self._model.config
        layers = self._layers()
        parts, lookups, columns = self._parts(layers)
        embedding, head = self._name_of(self._model.get_input_embeddings()), self._name_of(self._model.get_output_embeddings())
        if not embedding:
            raise self._refused("no embedding of tokens was found in its class")
        rows, width = self._modules[embedding].weight.shape
        derived = Derived(
            layers=layers,
            parts=parts,
            ffn=self._ffn(layers),
            embedding=embedding,
            head=head,
            tied=self._tied,
            lookups=lookups,
            columns=columns,
            blocks=self._blocks(layers),
        )
        known = dict(zip(SIZES, (int(width), int(rows), self._count(layers)), strict=True))
        tensors = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items() if name not in self._tied}
        settings = {key: value for key, value in config.to_dict().items() if not any(word in key for word in _NO_MEANING)}
        return family_from(config.model_type, derived, known=known, tensors=tensors, defaults=settings)

    def _refused(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"models of the family '{self._model.config.model_type}' cannot be mixed: {why}",
            where=self._where,
            remedy="choose a base model of another family (docs/families.md)",
        )

    def _layers(self) -> str:
        """The list of modules, in no other list, with most parameters."""
        lists = [name for name, module in self._modules.items() if isinstance(module, self._nn.ModuleList) and len(module)]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        sizes = {name: sum(each.numel() for each in self._modules[name].parameters()) for name in outer}
        if not sizes:
            raise self._refused("no list of layers was found in its class")
        return f"{max(sizes, key=lambda name: sizes[name])}."

    def _count(self, layers: str) -> int:
        return len(self._modules[layers.rstrip(".")])  # type: ignore[arg-type]

    def _name_of(self, module: Any) -> str:
        return next((name for name, each in self._modules.items() if each is module), "")

    def _parts(self, layers: str) -> tuple[dict[str, str], list[str], list[str]]:
        """Parts of the layers, embeddings besides the first, and linear modules that keep their weights the other way round."""
        paths: dict[str, None] = {}
        lookups, columns = [], []
        for name, module in self._modules.items():
            if isinstance(module, self._nn.Embedding):
                lookups.append(name)
            if isinstance(module, self._columns):
                columns.append(name)
            inside = name.removeprefix(layers).partition(".")[2] if name.startswith(layers) else ""
            if inside and isinstance(module, self._nn.Linear | self._columns) and ".experts." not in f".{inside}.":
                paths[inside] = None
        usual: dict[str, list[str]] = {}
        for path in paths:
            usual.setdefault(_PART_OF.get(path.rpartition(".")[2], path), []).append(path)
        named = {path: part if len(same) == 1 else path for part, same in usual.items() for path in same}
        return {named[path]: path for path in paths}, lookups, columns

    def _ffn(self, layers: str) -> str:
        """A child of every layer that is called as FFNs are."""
        children = [{name for name, _ in layer.named_children()} for layer in self._modules[layers.rstrip(".")]]  # type: ignore[attr-defined]
        return next((name for name in _FFN if all(name in each for each in children)), "")

    def _blocks(self, layers: str) -> list[str]:
        """Modules with tensors that are no weight and bias of a plain map: their nearest parent that is a module of a layer."""
        found: dict[str, None] = {}
        for name, module in self._modules.items():
            own = dict(module.named_parameters(recurse=False))
            if own and not self._is_plain(module, own):
                found[self._around(name, layers)] = None
        return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]

    def _is_plain(self, module: Any, own: Mapping[str, Any]) -> bool:
        known = isinstance(module, self._nn.Linear | self._nn.Embedding | self._columns) or "Norm" in type(module).__name__
        return known and own.keys() <= {"weight", "bias"} and all(each.ndim <= 2 for each in own.values())

    def _around(self, name: str, layers: str) -> str:
        if not name.startswith(layers):
            return name
        number, _, path = name.removeprefix(layers).partition(".")
        if not path:
            raise self._refused(f"its layers hold tensors that belong to no module ({name})")
        return f"{layers}{number}.{path.partition('.')[0]}"
