"""Tensors of files by the names of their class, where a family has no row: transformers renames, joins and cuts what it loads.

Only what lies in files as it is, or piece by piece, is read so; imports torch for such a model alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from modekit.sources.families import is_class_alone
from modekit.sources.header import TensorRef
from modekit.sources.rows import concatenated, rows_of, stacked
from modekit.sources.source import ModelSource
from modekit.sources.structure import structure

if TYPE_CHECKING:
    from torch import Tensor

_Steps = Sequence[tuple[str, int | None]]
_SAVE_AS_CLASS = (
    "save it under the names of its class: m = AutoModelForCausalLM.from_pretrained(MODEL, dtype='auto'); "
    "m.save_pretrained(NEW, save_original_format=False), and the tokenizer beside it"
)


def named_by_class(source: ModelSource) -> ModelSource:
    """A model of a family without a row with its tensors under the names that its class has for them; others as they are.

    Raises as `family_of` does, and UnsupportedError for files that only arithmetic turns into these tensors.
    """
    return replace(source, tensors=_named(source)) if is_class_alone(source.config) else source


def _named(source: ModelSource) -> Mapping[str, TensorRef]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    found = structure(source.config, where=source.where)
    tensors = source.tensors
    known = found.model.state_dict()
    prefix = found.model.base_model_prefix
    own = {name: tuple(tensor.shape) for name, tensor in known.items() if name not in found.tied}
    if all(name in tensors and tensors[name].shape == shape for name, shape in own.items()):
        return tensors  # saved under the names of the class; some renamings would rename these again
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
        steps = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
        made = _made(
            [target.replace(converter.target_patterns[0], each) for each in converter.target_patterns], parts, steps, known
        )
        if not made or any(ref.shape != tuple(known[name].shape) for name, ref in made.items()):
            how = ", ".join(step for step, _ in steps)
            raise found.refused(f"transformers computes {target} from what its files hold ({how})", remedy=_SAVE_AS_CLASS)
        named.update(made)
    return named


def _made(
    targets: Sequence[str],
    parts: Sequence[Sequence[TensorRef]],
    steps: _Steps,
    known: Mapping[str, Tensor],
) -> dict[str, TensorRef]:
    """What files hold of one converter, by the names of the class; empty where their bytes are not those of the class."""
    if any(name not in known for name in targets):
        return {}
    if len(targets) == 1:
        joined = _joined(targets[0], parts, steps)
        return {} if joined is None else {targets[0]: joined}
    whole = parts[0][0]
    sizes = [known[name].shape[0] for name in targets]
    if steps not in ([("Split", 0)], [("Chunk", 0)]) or whole.shape[:1] != (sum(sizes),):
        return {}
    cuts = zip(targets, sizes, accumulate(sizes), strict=True)
    return {name: replace(rows_of(whole, end - size, end), name=name) for name, size, end in cuts}


def _joined(target: str, parts: Sequence[Sequence[TensorRef]], steps: _Steps) -> TensorRef | None:
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
