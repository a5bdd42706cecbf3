"""Tensors of files by the names of their class, where a family has no row: transformers renames and joins what it loads.

Only what lies in files as it is, or piece by piece, is read so; imports torch for such a model alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from modekit.sources.derived import Structure, is_installed, structure
from modekit.sources.families import row_of
from modekit.sources.model import ModelSource, TensorRef
from modekit.sources.rows import concatenated, stacked


def named_by_class(source: ModelSource) -> ModelSource:
    """A model of a family without a row with its tensors under the names that its class has for them.

    Raises as `family_of` does, and UnsupportedError for files that only arithmetic turns into these tensors.
    """
    config = source.config
    if row_of(config) is not None or "text_config" in config or not is_installed(str(config.get("model_type"))):
        return source
    return replace(source, tensors=_named(structure(config, where=f"{source.label} ({source.spec})"), source.tensors))


def _named(found: Structure, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    known, prefix = found.model.state_dict(), found.model.base_model_prefix
    mapping = get_model_conversion_mapping(found.model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
    named: dict[str, TensorRef] = {}
    many: dict[str, dict[str, list[TensorRef]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if pattern is None or target == name:
            named[target] = replace(tensors[name], name=target)
        else:
            many.setdefault(target, {}).setdefault(pattern, []).append(tensors[name])
    for target, by_pattern in many.items():
        converter = next(each for each in converters if next(iter(by_pattern)) in each.source_patterns)
        parts = [by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern]
        joined = _joined(target, parts, [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations])
        if joined is None or target not in known or joined.shape != tuple(known[target].shape):
            steps = ", ".join(type(each).__name__ for each in converter.operations)
            raise found.refused(f"transformers computes {target} from what its files hold ({steps})")
        named[target] = joined
    return named


def _joined(target: str, parts: Sequence[Sequence[TensorRef]], steps: list[tuple[str, int | None]]) -> TensorRef | None:
    """One tensor of the class, whose bytes are those of many tensors of files one after the other; None where it is not.

    `parts`: what each pattern of names found, a tensor per expert where these are stacked.
    """
    all_parts = [ref for found in parts for ref in found]
    if len({(ref.dtype, ref.shape[1:]) for ref in all_parts}) > 1 or not all(ref.shape for ref in all_parts):
        return None
    if steps == [("Concatenate", 0)]:
        return concatenated(target, all_parts)
    if steps[:1] != [("MergeModulelist", 0)] or any({ref.shape for ref in found} != {found[0].shape} for found in parts):
        return None
    if steps[1:] == [("Concatenate", 1)] and len({len(found) for found in parts}) == 1:
        return stacked(target, [concatenated(target, members) for members in zip(*parts, strict=True)])
    return stacked(target, parts[0]) if len(steps) == len(parts) == 1 else None
