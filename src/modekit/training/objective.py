"""A mixture and what it is trained towards, as one module: a batch goes in, a loss comes out.

The loss is computed inside `forward`, so that DDP and FSDP see the whole of it.

Shape legend: B rows, S sequence, N predicted tokens, T real tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.shapes import mixture_of
from modekit.training.losses import (
    DIVERGENCES,
    distillation,
    domain_label,
    importance,
    language_model,
    load_balance,
    z_loss,
)
from modekit.training.settings import OF_ROUTERS, TrainSettings
from modekit.training.teachers import Teacher
from modekit.training.trained_module import TrainedModule


class Objective(TrainedModule):
    """`mixture` with its losses. Nothing but the mixture has parameters; `moving` and `gate_names` are names of its own.

    `train_top_k` is how many experts a token gets in training, None: as the checkpoint says. `packed`: rows hold several
    sequences.
    """

    prefix = "mixture"

    def __init__(
        self,
        mixture: PreTrainedModel,
        checkpoint: Checkpoint,
        settings: TrainSettings,
        *,
        teachers: Sequence[Teacher | None],
        train_top_k: int | None,
        packed: bool,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        self.config = mixture.config  # where accelerate looks for sizes and for layers to shard
        self._no_split_modules = mixture._no_split_modules
        self._checkpoint = checkpoint
        self.settings = settings
        self._teachers = list(teachers)
        self._train_top_k = train_top_k
        self._top_k = train_top_k or checkpoint.record.recipe.top_k
        self._packed = packed
        gates = {id(gate) for gate in mixture_of(mixture, checkpoint).gates()}
        self.gate_names: list[str] = [name for name, parameter in mixture.named_parameters() if id(parameter) in gates]
        self.moving: list[str] = [name for name, parameter in mixture.named_parameters() if parameter.requires_grad]
        # Modules of experts that no token of a batch takes are not run in the modekit architecture, and losses of routers do
        # not reach what stands behind the last one.
        own = any(parameter.requires_grad and ".experts." in name for name, parameter in mixture.named_parameters())
        self.skips_parameters: bool = (checkpoint.shape.skips_experts and own) or settings.losses.keys() <= OF_ROUTERS
        mixture_of(mixture, checkpoint).set_top_k(train_top_k)
        sources = checkpoint.record.expert_sources
        self._base = sources.index(0) if 0 in sources else None
        self._sums: dict[str, float] = {}

    def forward(self, factor: float = 1.0, score: bool = False, **item: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of a batch from `Batches`: its share of the step's, times `factor`.

        With `score`, the sum of -log p over the predicted tokens of a padded batch (input_ids, real).
        """
        if score:
            logits = self.mixture(input_ids=item["input_ids"], attention_mask=item["real"].long(), use_cache=False).logits
            keep = item["real"][:, 1:]
            return {"loss": language_model(logits[:, :-1][keep], item["input_ids"][:, 1:][keep])}
        wanted = OF_ROUTERS & self.settings.losses.keys()
        with mixture_of(self.mixture, self._checkpoint).traced() if wanted else nullcontext() as trace:
            # Packed rows hold several sequences: positions that begin anew keep them apart.
            apart = {"position_ids": item["position_ids"]} if self._packed else {"attention_mask": item["real"].long()}
            logits = self.mixture(input_ids=item["input_ids"], use_cache=False, **apart).logits
            losses = self._losses(logits, item, trace or ())
        weights = self._weights(losses)
        targets = item["targets"].to(logits.device)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach() / targets)
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": total * (factor / targets)}

    def _losses(
        self, logits: torch.Tensor, item: Mapping[str, torch.Tensor], trace: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        real, positions = item["real"], item["position_ids"]
        predicted = real[:, :-1] & real[:, 1:] & (positions[:, 1:] > 0)  # not across documents, not from pads
        logits_NV = logits[:, :-1][predicted]
        losses: dict[str, torch.Tensor] = {}
        names = self.settings.losses
        if "lm" in names:
            losses["lm"] = language_model(logits_NV, item["input_ids"][:, 1:][predicted])
        for name in (name for name in DIVERGENCES if name in names):
            losses[name] = self._distillation(name, logits_NV, predicted, item)
        if OF_ROUTERS & names.keys():
            self._add_router_losses(losses, real, item["labels"], trace)
        return losses

    def _distillation(
        self, name: str, logits_NV: torch.Tensor, predicted: torch.Tensor, item: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """From each domain's own expert; a sequence whose label was taken or changed has no teacher."""
        corpus_N, position_N = item["corpus"][:, :-1][predicted], item["position"][:, :-1][predicted]
        label_N = item["labels"][:, :-1][predicted]
        total = logits_NV.sum() * 0.0  # keeps the graph when no token has a teacher
        for number, teacher in enumerate(self._teachers):
            if teacher is None:
                continue
            rows = ((corpus_N == number) & (label_N == teacher.expert)).nonzero().squeeze(-1)
            if len(rows):
                with torch.no_grad():
                    wanted = teacher.logits(position_N[rows], logits_NV.device)
                total = total + distillation(name, logits_NV[rows], wanted, self.settings.temperature)
        return total

    def _add_router_losses(
        self, losses: dict[str, torch.Tensor], real: torch.Tensor, labels: torch.Tensor, trace: Iterable[torch.Tensor]
    ) -> None:
        names = self.settings.losses
        said = [logits.reshape(*real.shape, -1, logits.shape[-1]) for logits in trace]  # (B, S, features or 1, E)
        for logits in said:
            mask = real.to(logits.device)
            logits_TFE = logits[mask]
            features = logits_TFE.shape[1]
            logits_TE = logits_TFE.flatten(0, 1)
            share = 1.0 / (features * len(said))
            values: dict[str, torch.Tensor] = {}
            if "label" in names:
                labels_T = labels.to(logits.device)[mask].repeat_interleave(features)
                values["label"] = domain_label(logits_TE, labels_T, self._base)
            if "balance" in names:
                values["balance"] = load_balance(logits_TE, self._top_k)
            if "importance" in names:
                values["importance"] = importance(logits_TE)
            if "z" in names:
                values["z"] = z_loss(logits_TE)
            for name, value in values.items():
                losses[name] = losses.get(name, torch.zeros((), device=value.device)) + value * share

    def _weights(self, losses: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The settings' weights; adaptive ones give the larger of lm and distillation the larger share."""
        weights: dict[str, float] = {name: weight for name, weight in self.settings.losses.items() if name in losses}
        if self.settings.adaptive:
            shared = [name for name in ("lm", *DIVERGENCES) if name in losses]
            whole, values = sum(weights[name] for name in shared), {name: float(losses[name].detach()) for name in shared}
            total = sum(values.values())
            if total > 0:
                weights |= {name: whole * value / total for name, value in values.items()}
        return weights

    @contextmanager
    def as_configured(self) -> Iterator[None]:
        """While open, routers choose as the checkpoint's config says and not as they do in training."""
        mixture_of(self.mixture, self._checkpoint).set_top_k(None)
        try:
            yield
        finally:
            mixture_of(self.mixture, self._checkpoint).set_top_k(self._train_top_k)

    def drain(self) -> dict[str, float]:
        """Every loss of the last step: of this process's parts, per predicted token of the step."""
        losses = {f"loss_{name}": value for name, value in self._sums.items()}
        self._sums = {}
        return losses
