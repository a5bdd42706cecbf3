"""What llama.cpp can have of a mixture that keeps adapters: its backbone as a plain model, and experts as LoRA over it.

Shape legend: O and I rows and columns of a module's weight, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import UnsupportedError, some_of
from modekit.planning.shape import LowRankPart
from modekit.sources.contents import OpenFiles
from modekit.sources.names import module_of, split_layer
from modekit.sources.towers import is_in_tower
from modekit.weights.stored import read_float32

_NATIVE = (
    "where the base model has a native architecture, mix whole FFNs in it (output.format: native; `modekit plan` says "
    "whether it has one); else serve the mixture with vLLM or transformers"
)


@dataclass(frozen=True)
class Adapter:
    """An expert that is nothing but low-rank changes.

    Attributes:
        expert: its place in the recipe.
        changes: tensor of the dense family's model -> the change.
    """

    expert: int
    name: str
    changes: Mapping[str, LowRankPart]

    @property
    def alpha(self) -> float:
        """What most modules have: llama.cpp scales a module's B A by one alpha of the file, over that module's rank.

        As float32, which the file holds, and not zero, which llama.cpp takes for a scale of one.
        """
        alphas = [alpha for alpha in map(_alpha_of, self.changes.values()) if alpha]
        return Counter(alphas).most_common(1)[0][0] if alphas else 1.0

    @property
    def folded(self) -> list[str]:
        """Tensors with another one, whose B is scaled instead."""
        return [name for name, part in self.changes.items() if _alpha_of(part) != self.alpha]

    def factors(self, name: str, opened: OpenFiles) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A (R, I) and B (O, R) such that the change is B A times alpha over R."""
        part = self.changes[name]
        a, b = read_float32(opened, part.a)[part.ranks], read_float32(opened, part.b)[:, part.ranks]
        if _alpha_of(part) != self.alpha:
            b = (b.astype(np.float64) * (part.scale * _rank(part) / self.alpha)).astype(np.float32)
        return np.ascontiguousarray(a), np.ascontiguousarray(b)


def chosen_adapters(checkpoint: Checkpoint, names: Sequence[str] | None) -> list[Adapter]:
    """The adapters of the experts that were asked for; None: of all, but for the base, which is the backbone alone. Raises
    UnsupportedError where llama.cpp has no form for one of them, with the reason for each.
    """
    found = {name: _adapter_of(checkpoint, expert) for expert, name in enumerate(checkpoint.names)}
    base = {expert.name for expert in checkpoint.record.recipe.experts if expert.is_base and found[expert.name] == _NOTHING}
    asked = [name for name in found if name not in base] if names is None else list(dict.fromkeys(names))
    chosen = [(name, found.get(name, "there is no such expert")) for name in asked]
    reasons = [f"{name}: {reason}" for name, reason in chosen if isinstance(reason, str)]
    able = [name for name, adapter in found.items() if isinstance(adapter, Adapter)]
    if not able:
        raise UnsupportedError(
            "llama.cpp does not run the mixture, nor one of its experts as an adapter",
            where=str(checkpoint.folder),
            found="; ".join(filter(None, [checkpoint.shape.without_gguf, *reasons])),
            remedy=_NATIVE,
        )
    if reasons or not chosen:
        raise UnsupportedError(
            "llama.cpp does not run these experts as adapters",
            where=str(checkpoint.folder),
            found="; ".join(reasons) or "no expert but the base",
            expected=", ".join(able),
            remedy=" ".join(["name these:", *(f"--expert {name}" for name in able)]),
        )
    return [adapter for _, adapter in chosen if isinstance(adapter, Adapter)]


def backbone_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor of the checkpoint -> its name in a model of the dense family; experts, routers and a kept tower are left out."""
    mixture = checkpoint.shape.mixture
    places, names = mixture.places, {}
    for name in (each for each in checkpoint.tensors if not is_in_tower(each, mixture.wrapper)):
        module = next((each for each in _modules_over(name) if each in places), None)
        inside = "" if module is None else name.removeprefix(f"{module}.")
        if module is None:
            names[name] = name
        elif inside.startswith("base."):
            names[name] = f"{module}.{inside.removeprefix('base.')}"
    return names


_NOTHING = "nothing of it differs from the backbone"


def _adapter_of(checkpoint: Checkpoint, expert: int) -> Adapter | str:
    """An expert as an adapter, or why it is none for llama.cpp."""
    mixed = list(checkpoint.shape.mixed_tensors(checkpoint.tensors))
    changes = {tensor.name: tensor.low_rank[expert] for tensor in mixed if expert in tensor.low_rank}
    added = [tensor.name for tensor in mixed if expert in tensor.own and tensor.holds_changes]
    whole = [tensor.name for tensor in mixed if expert in tensor.own and not tensor.holds_changes]
    asked = checkpoint.record.recipe.experts[expert]
    few = [tensor.name for tensor in mixed if expert in tensor.few_bits]
    if few:
        return f"it has {some_of(few, 1)} in a few bits (experts[].bits)"
    if whole and asked.adapter is None:
        return "it is a full model"
    if whole:
        return f"it has {some_of(whole, 1)} as whole tensors of its own (DoRA, IA3, biases, modules_to_save, the head)"
    if added:
        return f"it adds {some_of(added, 1)}, and a LoRA of llama.cpp has no biases"
    return next(_unsaid(checkpoint, changes), None) or (Adapter(expert, asked.name, changes) if changes else _NOTHING)


def _unsaid(checkpoint: Checkpoint, changes: Mapping[str, LowRankPart]) -> Iterator[str]:
    """What llama.cpp has no adapters for: more than the linear parts of layers, and parts that the family holds in one."""
    paths = Counter(checkpoint.shape.mixture.family.parts.values())
    for name in changes:
        layer, path = split_layer(module_of(name))
        if layer is None or path not in paths:
            yield f"it changes {name}, which is no linear part of a layer"
        elif paths[path] > 1:
            yield f"it changes {name}, in which the family holds {paths[path]} parts in one"


def _modules_over(name: str) -> Iterator[str]:
    """a.b.c -> a.b, a."""
    while module := module_of(name):
        yield module
        name = module


def _rank(part: LowRankPart) -> int:
    return int(part.ranks.stop - part.ranks.start)


def _alpha_of(part: LowRankPart) -> float:
    return float(np.float32(part.scale * _rank(part)))
