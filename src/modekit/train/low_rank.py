"""What gets gradients: the parameters themselves, or a low-rank change of them that is folded in at the end.

PEFT puts its layers into the loaded model; which parameters they are put on is decided by identity, and said to PEFT by
their whole names.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trainable:
    """`names` of the parameters with gradients, as the model has them now, and the `targets` that move through them."""

    model: PreTrainedModel
    names: list[str]
    targets: dict[str, nn.Parameter]

    def moved(self) -> dict[str, torch.Tensor]:
        """Every target's value after training, by its name before, on the CPU. Low-rank changes are folded in, once."""
        for module in self.model.modules():
            if hasattr(module, "merge") and hasattr(module, "base_layer") and not module.merged:
                module.merge()
        return {name: parameter.detach().float().cpu() for name, parameter in self.targets.items()}


def make_trainable(model: PreTrainedModel, names: Sequence[str], rank: int | None) -> Trainable:
    """Freeze a model but for the parameters of these names, or for changes of rank `rank` of those that are matrices.

    Vectors, and matrices that have no more rows or columns than the rank, move themselves.
    """
    parameters = dict(model.named_parameters())
    targets = {name: parameters[name] for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    low_rank = [name for name, each in targets.items() if rank is not None and each.ndim > 1 and min(each.shape[-2:]) > rank]
    known = {id(parameter) for parameter in parameters.values()}
    if low_rank:
        assert rank is not None
        _inject(model, low_rank, rank)
    moving = {id(each) for name, each in targets.items() if name not in low_rank}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in moving or id(parameter) not in known)
    return Trainable(model, [name for name, each in model.named_parameters() if each.requires_grad], targets)


def _inject(model: PreTrainedModel, names: Sequence[str], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    modules: list[str] = []
    parameters: list[str] = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        is_layer = leaf == "weight" and isinstance(model.get_submodule(owner), (nn.Linear, nn.Embedding))
        (modules if is_layer else parameters).append(owner if is_layer else name)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=modules or None, target_parameters=parameters or None, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights: they are folded in before anything is saved
        inject_adapter_in_model(config, model)
