"""transformers' Trainer for mixtures and students: batches in their order, only what moves is kept, states may be judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import tokens_per_pass
from modekit.files.libraries import new_folder
from modekit.files.write import appearing, disk_errors, make_folder, sync_tree, write_file
from modekit.run import Run
from modekit.text.sequences import make_batches
from modekit.training.batches import Batches
from modekit.training.resumed import state_read
from modekit.training.trained_module import TrainedModule

COMPLETE = "complete"
STATE_FILE = "model.safetensors"  # the name that Trainer looks for


class NotFiniteError(Exception):
    """Where a loss was not finite, and what it was."""

    def __init__(self, where: str, found: str) -> None:
        self.where = where
        self.found = found
        super().__init__(where)


class MixtureTrainer(Trainer):  # type: ignore[misc]
    """Reads the batches in their order, keeps only what moves, and judges states by the mean loss on `select`, if any."""

    def __init__(
        self,
        objective: TrainedModule,
        batches: Batches,
        select: Sequence[Domain],
        arguments: TrainingArguments,
        watchers: Sequence[TrainerCallback],
        run: Run,
    ) -> None:
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=batches,
            eval_dataset=batches,
            data_collator=lambda items: items[0],
            callbacks=[*([EarlyStoppingCallback(objective.settings.patience)] if select else []), *watchers],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is per step, not per part: `compute_loss` sees to it
        self._objective = objective
        self._moving = {f"{objective.prefix}.{name}" for name in objective.moving}
        self._batches = batches
        self._select = select
        self._settings = objective.settings
        self._run = run
        if self.is_fsdp_enabled:  # one whole state, so that it can be written as a checkpoint
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self._batches)

    optimizer: Any
    control: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a rate of their own for routers; only what moves is in it."""
        if self.optimizer is None:
            routers: list[Any] = []
            others: list[Any] = []
            gates = {f"{self._objective.prefix}.{name}" for name in self._objective.gate_names}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    (routers if name in gates else others).append(parameter)
            groups = [
                {"params": routers, "lr": self._settings.learning_rate, "weight_decay": 0.0},
                {
                    "params": others,
                    "lr": self._settings.backbone_learning_rate,
                    "weight_decay": self._settings.weight_decay,
                },
            ]
            self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear up over the warm-up, then linear to zero after the last step."""
        warm = max(1, math.ceil(num_training_steps * self._settings.warmup))
        rest = max(1, num_training_steps - warm)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: min((step + 1) / warm, max(0.0, 1.0 - (step - warm) / rest))
        )
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part's share of the step's mean loss. Trainer divides by the parts, DDP by the processes."""
        factor = float(self.args.gradient_accumulation_steps * self.args.world_size)
        loss = model(factor=factor, **inputs)["loss"]
        finite = self.accelerator.reduce(torch.isfinite(loss.detach()).float(), reduction="mean") == 1.0
        if not finite:
            part = self.state.global_step * self.args.gradient_accumulation_steps * self.args.world_size
            parts = range(part, min(len(self._batches), part + int(factor)))
            where = f"step {self.state.global_step + 1}: {'; '.join(self._batches.describe(number) for number in parts)}"
            raise NotFiniteError(where, f"loss {float(loss.detach())}")
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs with the parts of the loss."""
        if "loss" in logs:
            logs |= self._objective.drain()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean held-out loss of every domain (select split), and the mean over domains."""
        losses = self.select_losses()
        metrics = {
            "eval_loss": sum(losses.values()) / len(losses),
            **{f"eval_{name}_loss": loss for name, loss in losses.items()},
        }
        if not math.isfinite(metrics["eval_loss"]):
            raise NotFiniteError(f"held-out text after step {self.state.global_step}", f"loss {metrics['eval_loss']}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def select_losses(self) -> dict[str, float]:
        """Loss per domain under the routing that the checkpoint's config says."""
        self.model.eval()
        with torch.no_grad(), self._objective.as_configured():
            losses = {}
            for place, text in enumerate(self._select):
                self._run.progress("score held-out text", place, len(self._select))
                losses[text.name] = self._score(text)
            self._run.progress("score held-out text", len(self._select), len(self._select))
            return losses

    def _score(self, text: Domain) -> float:
        total = 0.0
        for batch in make_batches(text.sequences, tokens=tokens_per_pass(self._objective.config)):
            given = batch.to(self.args.device)
            item = {"input_ids": given.input_ids, "real": given.mask}
            item |= {} if given.target is None else {"target": given.target}
            item |= {} if given.silent is None else {"silent": given.silent}
            total += float(self.model(score=True, **item)["loss"])
        return total / text.scored_tokens

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Only what moves."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        make_folder(folder)
        state = state_dict if state_dict is not None else dict(self.model.named_parameters())
        moved = {name: state[name].detach().contiguous().cpu() for name in sorted(self._moving)}
        with appearing(folder / STATE_FILE) as temporary:
            save_file(moved, temporary)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            new_folder(state)
        self.accelerator.wait_for_everyone()
        with disk_errors(state):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_tree(state)
            write_file(state / COMPLETE, b"")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with state_read(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with state_read(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with state_read(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, _result: Any) -> None:
        """Nothing: what does not move is not in the file."""
