"""Can these models be mixed? Checked from configs and headers, before anything is planned.

Each model must be whole and in a float format; each expert must have the base model's architecture in every setting that
changes what a tensor means.
"""

from __future__ import annotations

from collections.abc import Sequence

from modekit.errors import MismatchError, SourceError, some_of
from modekit.recipes.layers import Layer, stack_of
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import OF_A_MIXTURE, SAVE_AGAIN, check_values, is_mixture
from modekit.sources.families import row_of
from modekit.sources.family import UNTIE, Family
from modekit.sources.header import check_floats
from modekit.sources.names import is_ignored, layers_of, split_layer, weight_of
from modekit.sources.pairs import check_same_target
from modekit.sources.source import ModelSource


def check_mixable(sources: Sequence[ModelSource], family: Family) -> None:
    """Raise SourceError for a model that is not whole, MismatchError for an expert of another architecture than the base.

    `sources` are the base and then each expert's.
    """
    base = sources[0]
    models = [source for source in dict.fromkeys(sources) if not isinstance(source, AdapterSource)]
    for source in models:  # before anything is computed from their settings
        if source.config.get("model_type") == family.model_type:  # else that is said below
            check_sizes(source, row_of(source.config) or family)
    for source in models:
        check_floats((ref for name, ref in source.tensors.items() if not is_ignored(name)), where=source.where)
        if source is not base:
            check_same_architecture(base, source, family)
        check_complete(source, family, family.layers(family.with_sizes(base.config)))
    if family.pair:
        check_same_target(sources)


def check_sizes(source: ModelSource, family: Family) -> None:
    """Raise SourceError when config.json lacks a size that every plan needs, or has more layers than there are weights for."""
    if family.derived is not None:  # its class was made
        return
    check_values(source.config, where=source.where, pair=family.pair)
    there = layers_of(source.tensors)
    for stack in family.stacks:
        count = stack.size(source.config)
        own = sum(name == stack.name for name, _ in map(stack_of, there))
        if count > own:  # before anything has an entry for each of them
            raise SourceError(
                "the weights have fewer layers than config.json says",
                where=f"{source.where}: {stack.layers}",
                found=f"{own} layers",
                expected=f"{stack.count[0]} {count}",
                remedy="check that the download is complete; correct config.json, or save the model again",
            )


def check_complete(source: ModelSource, family: Family, layers: Sequence[Layer]) -> None:
    """Raise SourceError unless the model is whole.

    Every layer must have what the other layers of its kind have; embedding, final norm, head and FFN must be as configured.
    """
    if family.derived is None:
        _check_layers_alike(source, family, layers)
    for name in family.outside(source):
        source.tensor(name)
    for name, shape in family.shapes(source.config).items():
        if source.tensor(name).shape != shape:
            raise SourceError(
                "a tensor has another shape than config.json says",
                where=f"{source.where}: {name}",
                found=list(source.tensor(name).shape),
                expected=list(shape),
                remedy="correct config.json, or save the model again",
            )


def _check_layers_alike(source: ModelSource, family: Family, layers: Sequence[Layer]) -> None:
    """Raise SourceError when a layer lacks what another of its kind has, or when there are more layers than configured."""
    said = None if family.pair else family.dense_config(source.config).get("layer_types")
    kinds = said if isinstance(said, list) and len(said) == len(layers) else [stack_of(layer)[0] for layer in layers]
    found: dict[Layer, set[str]] = {layer: set(family.stack_of(layer).mlp.values()) for layer in layers}
    for name in source.tensors:
        layer, path = split_layer(name)
        if layer is None or is_ignored(name) or name != family.in_layer(layer, path):  # a list of layers beside the model's
            continue
        if layer not in found:
            what, where = "the weights have more layers than config.json says", f"{source.where}: {name}"
            raise SourceError(
                what, where=where, expected=f"{len(layers)} layers", remedy=f"correct config.json, or {SAVE_AGAIN}"
            )
        if path not in family.stack_of(layer).first:
            found[layer].add(path)
    alike: dict[object, set[str]] = {}
    for kind, names in zip(kinds, found.values(), strict=True):
        alike.setdefault(kind, set()).update(names)
    for layer, kind in zip(layers, kinds, strict=True):
        for path in sorted(alike[kind]):
            source.tensor(family.in_layer(layer, path)) if path not in found[layer] else None


def check_same_architecture(base: ModelSource, source: ModelSource, family: Family) -> None:
    """Raise MismatchError that names the setting in which an expert differs from the base model."""
    where = f"{source.where}: config.json"
    theirs_type = source.config.get("model_type")
    if theirs_type != family.model_type and is_mixture(base.config) and not is_mixture(source.config):
        what = "the base model is itself a mixture of experts, and the expert is a dense model"
        raise MismatchError(what, where=base.where, found=family.model_type, expected=theirs_type, remedy=OF_A_MIXTURE)
    if theirs_type != family.model_type:
        raise MismatchError(
            "the expert is of another family than the base model",
            where=where,
            found=theirs_type,
            expected=family.model_type,
            remedy="use experts fine-tuned from this base model",
        )
    _check_no_more(base, source, family)
    ours, theirs = (family.settings(each.config, where=each.where) for each in (base, source))
    for key in dict.fromkeys([*ours, *theirs]):
        if _plain(ours.get(key)) != _plain(theirs.get(key)):
            raise MismatchError(
                f"the expert's {key} differs from the base model's",
                where=where,
                found=theirs.get(key),
                expected=ours.get(key),
                remedy="use experts fine-tuned from this base model without changing its architecture",
            )


def _check_no_more(base: ModelSource, source: ModelSource, family: Family) -> None:
    """Raise MismatchError for a tensor of the expert alone, which would be lost."""
    copies = {*source.tensors} - {*family.own_names(source)}
    known = {*base.tensors, *family.optional, *(copies if family.derived is None else {*family.tensors})}
    extra = sorted(name for name in source.tensors if name not in known and not is_ignored(name))
    head = weight_of(family.head)
    if family.is_tied(base) and head in source.tensors and source.config.get("tie_word_embeddings") is False:
        extra = extra or [head]
    if extra:
        raise MismatchError(
            "the expert has tensors that the base model lacks, and they would be lost",
            where=source.where,
            found=some_of(extra),
            remedy=UNTIE if extra == [head] else "merge adapters first, or use an expert fine-tuned from this base model",
        )


def _plain(value: object) -> object:
    """Equal settings compare equal, such as false and null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return value or False
