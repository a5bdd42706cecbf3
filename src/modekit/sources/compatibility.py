"""Can these models be mixed? Checked from configs and headers, before anything is planned.

Each model must be whole and in a float format; each expert must have the base model's architecture in every setting that
changes what a tensor means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from modekit.errors import MismatchError, SourceError, some_of
from modekit.recipes.layers import Layer, layer_at, stack_of
from modekit.sources.adapter import AdapterSource
from modekit.sources.families import CONFIG_MUST_MATCH, family_of, own_family
from modekit.sources.family import UNTIE, Family, whole, words
from modekit.sources.model import ModelSource, check_floats
from modekit.sources.model_config import check_values
from modekit.sources.names import HEAD, is_ignored, layers_of, split_layer, weight_of
from modekit.sources.targets import check_same_target


def check_mixable(sources: Sequence[ModelSource], family: Family) -> None:
    """Raise SourceError for a model that is not whole, MismatchError for an expert of another architecture than the base.

    `sources` are the base and then each expert's.
    """
    base = sources[0]
    models = [source for source in dict.fromkeys(sources) if not isinstance(source, AdapterSource)]
    for source in models if family.derived is None else ():  # before anything is computed from their settings
        if source is base or source.config.get("model_type") == family.model_type:  # else that is said below
            check_sizes(source, own_family(source.config, family))
    for source in models:
        check_dtypes(source)
        if source is not base:
            check_same_architecture(base, source, family)
        check_complete(source, family, family.layers(base.config))
    if family.pair:
        check_same_target(sources)


def is_tied(source: ModelSource, family: Family) -> bool:
    """Whether the head is the embedding. A T5 that has a head of its own says so by its weights alone."""
    if family.derived is not None:
        return bool(family.ties)
    if family.shares:
        return weight_of(HEAD) not in source.tensors
    return bool(source.config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings")))


def own_names(source: ModelSource, family: Family) -> list[str]:
    """Names of a model's tensors in its order, without buffers and without copies of the embedding: a tied head, and what
    encoder and decoder call it, who else have embeddings of their own.
    """
    if family.tensors:
        return [name for name in source.tensors if name in family.tensors]
    tied = is_tied(source, family)
    copies = {*(family.copies if tied or family.shares else ()), *([weight_of(HEAD)] if tied else ())}
    left_out = {*copies, *family.computed}
    return [name for name in source.tensors if not is_ignored(name) and name not in left_out]


def copies_of(source: ModelSource, family: Family) -> dict[str, str]:
    """Tensors in a model's files that are taken to be its embedding under other names -> the embedding's name."""
    own = {*own_names(source, family)}
    copies = {**dict.fromkeys((*family.copies, weight_of(HEAD)), weight_of(family.embedding)), **family.ties}
    return {name: copies[name] for name in source.tensors if name in copies and name not in own}


def check_sizes(source: ModelSource, family: Family) -> None:
    """Raise SourceError when config.json lacks a size that every plan needs, or has more layers than there are weights for."""
    check_values(source.config, where=source.where, pair=family.pair)
    there = layers_of(source.tensors)
    for stack in family.stacks:
        count = stack.size(source.config)
        own = {number for name, number in map(stack_of, there) if name == stack.name}
        if count > len(own):  # before anything has an entry for each of them
            lacking = next(number for number in range(len(own) + 1) if number not in own)
            raise SourceError(
                "the weights have fewer layers than config.json says",
                where=f"{source.label}: {family.in_layer(layer_at(stack.name, lacking))}",
                found=f"{len(own)} layers in {source.spec}",
                expected=f"{stack.count[0]} {count}",
                remedy="check that the download is complete; correct config.json, or save the model again",
            )


def check_dtypes(source: ModelSource) -> None:
    """Raise SourceError for tensors that are no floats."""
    check_floats((ref for name, ref in source.tensors.items() if not is_ignored(name)), where=source.where)


def check_complete(source: ModelSource, family: Family, layers: Sequence[Layer]) -> None:
    """Raise SourceError unless the model is whole.

    Every layer must have what the other layers of its kind have; embedding, final norm, head and FFN must be as configured.
    """
    if family.derived is None:
        _check_layers_alike(source, family, layers)
    for name in [*family.outside, *([] if family.derived or is_tied(source, family) else [weight_of(HEAD)])]:
        source.tensor(name)
    for name, shape in _configured_shapes(source, family, layers).items():
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
    kinds = _kinds_of(source, family, layers)
    found: dict[Layer, set[str]] = {layer: set() for layer in layers}
    for name in source.tensors:
        layer, path = split_layer(name)
        if layer is None or is_ignored(name) or name != family.in_layer(layer, path):  # a list of layers beside the model's
            continue
        if layer not in found:
            raise SourceError(
                "the weights have more layers than config.json says",
                where=f"{source.where}: {name}",
                expected=_counted(layers),
                remedy="correct config.json, or save the model again",
            )
        if path not in family.stack_of(layer).first:
            found[layer].add(path)
    alike: dict[object, set[str]] = {}
    for layer, names in found.items():
        alike.setdefault(kinds[layer], set(family.stack_of(layer).mlp.values())).update(names)
    for layer, kind in kinds.items():
        for path in sorted(alike[kind] - found[layer]):
            source.tensor(family.in_layer(layer, path))


def _kinds_of(source: ModelSource, family: Family, layers: Sequence[Layer]) -> dict[Layer, object]:
    """Layer -> what layers with the same tensors have in common."""
    dense = family.dense_config(source.config)
    said = words(dense, "layer_types")
    if family.pair or len(said) != len(layers):
        return {layer: stack_of(layer)[0] for layer in layers}
    return {layer: family.of_layer(dense, number).get("kind", said[number]) for number, layer in enumerate(layers)}


def _counted(layers: Sequence[Layer]) -> str:
    """2 layers; 6 layers in the encoder, 2 layers in the decoder."""
    counts = Counter(stack_of(layer)[0] for layer in layers)
    return ", ".join(f"{count} layers" + (f" in the {name}" if name else "") for name, count in counts.items())


def _configured_shapes(source: ModelSource, family: Family, layers: Sequence[Layer]) -> dict[str, tuple[int, ...]]:
    """Name -> the shape that follows from config.json."""
    if family.derived is not None:
        return dict(family_of(source.config, where=source.where).tensors)
    hidden = family.hidden(source.config)
    shapes: dict[str, tuple[int, ...]] = {weight_of(family.embedding): (whole(source.config, "vocab_size"), hidden)}
    dense = family.dense_config(source.config)
    for layer in layers:
        stack, own = family.stack_of(layer), family.of_layer(dense, stack_of(layer)[1])
        expert_hidden, paths = whole(own, stack.ffn_width), stack.mlp
        for part, path in paths.items():
            rows = expert_hidden * list(paths.values()).count(path)  # gate and up in one module
            shapes[family.in_layer(layer, path)] = (hidden, expert_hidden) if part == "down" else (rows, hidden)
    for layer in () if family.pair else layers:
        own = family.of_layer(dense, stack_of(layer)[1])
        heads, head_dim = whole(own, "num_key_value_heads"), whole(own, "head_dim")
        for name in (family.in_layer(layer, f"self_attn.{part}_proj.weight") for part in ("k", "v")):
            if name in source.tensors:
                shapes[name] = (heads * head_dim, hidden)
    return shapes


def check_same_architecture(base: ModelSource, source: ModelSource, family: Family) -> None:
    """Raise MismatchError that names the setting in which an expert differs from the base model."""
    where = f"{source.where}: config.json"
    theirs_type = source.config.get("model_type")
    if theirs_type != family.model_type:
        raise MismatchError(
            "the expert is of another family than the base model",
            where=where,
            found=theirs_type,
            expected=family.model_type,
            remedy="use experts fine-tuned from this base model",
        )
    extra = sorted(name for name in own_names(source, family) if name not in base.tensors and name not in family.optional)
    head = weight_of(family.head)
    own_head = head in source.tensors and source.config.get("tie_word_embeddings") is False
    if is_tied(base, family) and (extra == [head] or (family.derived is not None and own_head)):
        raise MismatchError(
            "the expert has a head of its own, and the base model's is its embedding",
            where=source.where,
            found=f"{head} in the expert's weights alone",
            expected="the same in both",
            remedy="save both with the same version of transformers" if family.shares else UNTIE,
        )
    if extra:
        raise MismatchError(
            "the expert has tensors that the base model lacks, and they would be lost",
            where=source.where,
            found=some_of(extra),
            remedy="merge adapters into the model first, or use an expert fine-tuned from this base model",
        )
    _check_same_settings(base, source, family, where)


def _check_same_settings(base: ModelSource, source: ModelSource, family: Family, where: str) -> None:
    ours, theirs = (family.meant(family.dense_config(each.config)) for each in (base, source))
    keys = [*CONFIG_MUST_MATCH, *family.must_match]
    if family.derived is not None:  # with every setting that its class has
        theirs = family_of(source.config, where=where).defaults
        ours, keys = family.defaults, sorted({*family.defaults, *theirs} - {"vocab_size"})
    elif isinstance(rope := ours.get("rope_parameters"), Mapping) and rope.get("rope_type") in {"dynamic", "longrope"}:
        keys.append("max_position_embeddings")  # these ropes depend on it
    for key in keys:
        if _plain(ours.get(key)) != _plain(theirs.get(key)):
            raise MismatchError(
                f"the expert's {key} differs from the base model's",
                where=where,
                found=theirs.get(key),
                expected=ours.get(key),
                remedy="use experts fine-tuned from this base model without changing its architecture",
            )


def _plain(value: object) -> object:
    """Equal settings compare equal: 10000 and 10000.0, false and null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, bool) or value is None:
        return bool(value)
    return float(value) if isinstance(value, int) else value
