"""Can these models be mixed? Checked from configs and headers, before anything is planned.

Each model must be whole and in a float format; each expert must have the base model's architecture in every setting that
changes what a tensor means.
"""

from __future__ import annotations

from modekit.errors import MismatchError, SourceError
from modekit.sources.families import CONFIG_MUST_MATCH, Family
from modekit.sources.model import DTYPE_NAMES, ModelSource, TensorRef
from modekit.sources.model_config import check_values
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, in_layer, is_ignored, split_layer, weight_of


def is_tied(source: ModelSource, family: Family) -> bool:
    """Whether the head is the embedding."""
    return bool(family.dense_config(source.config).get("tie_word_embeddings"))


def own_names(source: ModelSource, family: Family) -> list[str]:
    """Names of a model's tensors in its order, without buffers and without the copy of the embedding that is a tied head."""
    tied = is_tied(source, family)
    return [name for name in source.tensors if not is_ignored(name) and not (tied and name == weight_of(HEAD))]


def check_sizes(source: ModelSource) -> None:
    """Raise SourceError when config.json lacks a size that every plan needs, or has more layers than there are weights for."""
    where = f"{source.label} ({source.spec})"
    check_values(source.config, where=where)
    layers, there = int(source.config["num_hidden_layers"]), {layer for layer, _ in map(split_layer, source.tensors)} - {None}
    if layers > len(there):  # before anything has an entry for each of them
        lacking = next(layer for layer in range(len(there) + 1) if layer not in there)
        raise SourceError(
            "the weights have fewer layers than config.json says", where=f"{source.label}: {in_layer(lacking)}",
            found=f"{len(there)} layers in {source.spec}", expected=f"num_hidden_layers {layers}",
            remedy="check that the download is complete; correct config.json, or save the model again",
        )  # fmt: skip


def check_dtypes(source: ModelSource) -> None:
    """Raise SourceError for quantised models and tensors that are no floats."""
    where = f"{source.label} ({source.spec})"
    if source.config.get("quantization_config"):
        raise SourceError(
            "the model is quantised; its tensors cannot be mixed exactly", where=where,
            remedy="give the unquantised model",
        )  # fmt: skip
    for name, ref in source.tensors.items():
        if ref.dtype not in DTYPE_NAMES and not is_ignored(name):
            raise SourceError(
                "tensor dtype cannot be mixed", where=f"{where}: {name}", found=ref.dtype,
                expected=", ".join(DTYPE_NAMES), remedy="give the model in bf16, fp16 or fp32",
            )  # fmt: skip


def check_complete(source: ModelSource, family: Family, layers: int) -> None:
    """Raise SourceError unless the model is whole.

    Every layer must have what the other layers of its kind have; embedding, final norm, head and FFN must be as configured.
    """
    _check_layers_alike(source, family, layers)
    needed = {EMBEDDING: True, FINAL_NORM: family.norms_have_weights, HEAD: not is_tied(source, family)}
    for module in (module for module, is_needed in needed.items() if is_needed):
        source.tensor(weight_of(module))
    for name, shape in _configured_shapes(source, family, layers).items():
        if source.tensor(name).shape != shape:
            raise SourceError(
                "a tensor has another shape than config.json says", where=f"{source.label} ({source.spec}): {name}",
                found=list(source.tensor(name).shape), expected=list(shape),
                remedy="correct config.json, or save the model again",
            )  # fmt: skip


def _check_layers_alike(source: ModelSource, family: Family, layers: int) -> None:
    """Raise SourceError when a layer lacks what another of its kind has, or when there are more layers than configured."""
    kinds = source.config.get("layer_types") or []
    kinds = kinds if len(kinds) == layers else [""] * layers
    found: list[set[str]] = [set() for _ in range(layers)]
    for name in source.tensors:
        layer, path = split_layer(name)
        if layer is None or is_ignored(name):
            continue
        if layer >= layers:
            raise SourceError(
                "the weights have more layers than config.json says", where=f"{source.label} ({source.spec}): {name}",
                expected=f"{layers} layers", remedy="correct config.json, or save the model again",
            )  # fmt: skip
        found[layer].add(path)
    alike: dict[str, set[str]] = {kind: set(family.mlp.values()) for kind in kinds}
    for names, kind in zip(found, kinds, strict=True):
        alike[kind] |= names
    for layer, kind in enumerate(kinds):
        for path in sorted(alike[kind] - found[layer]):
            source.tensor(in_layer(layer, path))


def _configured_shapes(source: ModelSource, family: Family, layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> the shape that follows from config.json."""
    hidden, expert_hidden = int(source.config["hidden_size"]), int(source.config["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {weight_of(EMBEDDING): (int(source.config["vocab_size"]), hidden)}
    for layer in range(layers):
        for part, path in family.mlp.items():
            rows = expert_hidden * list(family.mlp.values()).count(path)  # gate and up in one module
            shapes[in_layer(layer, path)] = (hidden, expert_hidden) if part == "down" else (rows, hidden)
    dense = family.dense_config(source.config)
    heads, head_dim = int(dense["num_key_value_heads"]), int(dense["head_dim"])
    for layer in range(layers):
        for name in (in_layer(layer, f"self_attn.{part}_proj.weight") for part in ("k", "v")):
            if name in source.tensors:
                shapes[name] = (heads * head_dim, hidden)
    return shapes


def check_same_architecture(base: ModelSource, source: ModelSource, family: Family) -> None:
    """Raise MismatchError that names the setting in which an expert differs from the base model."""
    where = f"{source.label} ({source.spec}): config.json"
    theirs_type = source.config.get("model_type")
    if theirs_type != family.model_type:
        raise MismatchError(
            "the expert is of another family than the base model", where=where, found=theirs_type,
            expected=family.model_type, remedy="use experts fine-tuned from this base model",
        )  # fmt: skip
    extra = sorted(name for name in own_names(source, family) if name not in base.tensors)
    if extra:
        raise MismatchError(
            "the expert has tensors that the base model lacks, and they would be lost", where=f"{source.label} ({source.spec})",
            found=", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else ""),
            remedy="merge adapters into the model first, or use an expert fine-tuned from this base model",
        )  # fmt: skip
    ours, theirs = family.dense_config(base.config), family.dense_config(source.config)
    keys = [*CONFIG_MUST_MATCH]
    if ours["rope_parameters"]["rope_type"] in {"dynamic", "longrope"}:
        keys.append("max_position_embeddings")  # these ropes depend on it
    for key in keys:
        if _plain(ours.get(key)) != _plain(theirs.get(key)):
            raise MismatchError(
                f"the expert's {key} differs from the base model's", where=where, found=theirs.get(key),
                expected=ours.get(key), remedy="use experts fine-tuned from this base model without changing its architecture",
            )  # fmt: skip


def _plain(value: object) -> object:
    """Equal settings compare equal: 10000 and 10000.0, false and null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, bool) or value is None:
        return bool(value)
    return float(value) if isinstance(value, int) else value


def matching(source: ModelSource, name: str, ref: TensorRef) -> TensorRef:
    """The expert's tensor of that name. Raises MismatchError when its shape is not that of `ref`, the base model's."""
    other = source.tensor(name)
    if other.shape != ref.shape:
        raise MismatchError(
            "the expert's tensor has another shape than the base model's", where=f"{source.label} ({source.spec}): {name}",
            found=list(other.shape), expected=list(ref.shape), remedy="use an expert fine-tuned from this base model",
        )  # fmt: skip
    return other
