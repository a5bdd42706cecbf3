"""What the linear layers of a model read: E[x x^T] of their inputs over a text, pads excluded.

Memory beside the model: at most `MOMENT_BYTES` of sums at a time (or those of one layer's module, if that is more). The
modules are read in groups that fit, one forward pass over the whole text per group. Modules that read the same tensor
(query, key and value; gate and up) share one sum.

Shape legend: B batch, S sequence, T real tokens of a batch (of a module in a decoder those of the targets), I inputs of a
module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.errors import UnsupportedError
from modekit.loaded.passes import check_text, reads_target, removed, run_backbone
from modekit.text.sequences import TokenSequence, make_batches

MOMENT_BYTES = 4 * 2**30


def input_moments(
    model: PreTrainedModel,
    names: Sequence[str],
    sequences: Sequence[TokenSequence],
    *,
    advance: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Each module's name and E[x x^T] (I, I) float32, in the order of `names`, which should be that of the layers.

    Sums are float32: what they lose is far below the shrinkage of their user. `advance(tokens done, tokens to do)` is
    called after each batch. Raises UnsupportedError when a name is no linear layer of the loaded model, or is never run, and
    TextError for text of another kind than the model reads.
    """
    check_text(model, sequences)
    modules = {name: _linear(model, name) for name in names}
    groups = _groups({name: 4 * module.in_features**2 for name, module in modules.items()})
    tokens = sum(sequence.size for sequence in sequences)
    read = {of_target: sum(len(s.target if of_target else s.ids) for s in sequences) for of_target in (False, True)}
    for number, group in enumerate(groups):
        readers = _InputSums({name: modules[name] for name in group})
        for done in readers.read(model, sequences):
            advance(number * tokens + done, len(groups) * tokens)
        for name in group:
            yield name, readers.mean(name, read[reads_target(name)])


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    """The linear layer of that name."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(
            "the loaded model has no linear layer where its weights have one",
            where=name,
            found=type(module).__name__ if module is not None else "nothing",
            remedy="leave it out, or extract without --text",
        )
    return module


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Neighbouring names whose sums fit into MOMENT_BYTES together; sharing between them only makes it less."""
    groups: list[list[str]] = []
    filled = MOMENT_BYTES
    for name, size in sizes.items():
        if filled + size > MOMENT_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


class _InputSums:
    """Sums of x x^T over everything that some linear layers read."""

    def __init__(self, modules: Mapping[str, nn.Linear]) -> None:
        self._modules = modules
        self._sums: dict[str, torch.Tensor] = {}
        self._owner: dict[str, str] = {}  # module -> the module that read the same tensor first
        self._last: tuple[str, torch.Tensor] | None = None
        self._masks = (torch.empty(0), torch.empty(0))  # of sources, or of plain text, and of targets

    def read(self, model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> Iterator[int]:
        """Run the model (the head of a causal one is not needed) over all sequences; gives the tokens done after each batch."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._modules.items()]
        done = 0
        with removed(handles), torch.inference_mode():
            for batch in make_batches(sequences):
                self._masks = (batch.mask.to(model.device), batch.target_mask.to(model.device))
                run_backbone(model, batch)
                self._last = None
                done += batch.tokens
                yield done

    def mean(self, name: str, tokens: int) -> npt.NDArray[np.float32]:
        """E[x x^T] (I, I) of one module."""
        if name not in self._owner:
            raise UnsupportedError(
                "a linear layer is never run, so nothing is known of its inputs",
                where=name,
                remedy="leave it out, or extract without --text",
            )
        mean_II: npt.NDArray[np.float32] = (self._sums[self._owner[name]] / tokens).cpu().numpy()
        return mean_II

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if self._last is not None and self._last[1] is x:
                self._owner[name] = self._last[0]
                return
            self._last = (name, x)  # held, so that no other tensor takes its place in memory
            self._owner[name] = name
            x_TI = x.reshape(-1, x.shape[-1])[self._masks[reads_target(name)].flatten()].float()
            product_II = x_TI.T @ x_TI
            if name in self._sums:
                self._sums[name] += product_II
            else:
                self._sums[name] = product_II

        return read
