"""The one training loop: transformers' Trainer over planned batches, whatever launcher and however many processes.

What is trained is a `TrainedModule`: a model with its loss. Batches come in their order, states hold only what moves
(states.py), and nothing is judged: training/engine.py adds held-out losses, by which a mixture's best state is found.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from modekit.errors import TrainingError
from modekit.files.write import appearing, disk_errors, make_folder, new_folder, sync_tree, write_file
from modekit.loaded.load import verbosity_kept
from modekit.loaded.states import COMPLETE, STATE_FILE, check_names, state_read, state_to_resume
from modekit.run import DETAIL, Run

STATE_SECONDS = 120.0
"""Between two states of a training that is not judged: what a kill costs at most, unless writing one takes long."""
_STATE_SHARE = 20  # at most one second of so many is spent on writing states
BETAS = (0.9, 0.95)
"""Of AdamW."""


class TrainedModule(nn.Module):
    """A model with its loss: a batch goes in, {"loss": ...} comes out, times `factor` where that is given.

    Attributes:
        model: the submodule that is trained, with whose name a state's names begin.
        config: of the model.
        moving: names of the parameters that move, within the model.
        skips_parameters: whether a step may leave some that move without a gradient.
    """

    skips_parameters = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # where accelerate looks for sizes and for layers to shard
        self.moving = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def optimizer(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Of the module's parameters, as they are named and sharded when training begins."""
        raise NotImplementedError

    def drain(self) -> dict[str, float]:
        """Figures of the step that has just ended, for the log. Called once per step."""
        raise NotImplementedError

    def as_configured(self) -> AbstractContextManager[None]:
        """While open, the model is as it will be used."""
        return nullcontext()

    def go_on(self, history: Sequence[Mapping[str, float]]) -> None:
        """Called before the first step, with the log of the steps before: those of a training that is gone on with."""


class PlannedBatches(Protocol):
    """All parts of all steps, in order."""

    def __len__(self) -> int: ...
    def describe(self, number: int) -> str:
        """Which text a part holds, for messages."""


@dataclass(frozen=True)
class LoopSettings:
    """How a training goes through its batches.

    Attributes:
        steps: optimiser steps.
        parts: of how many parts each process makes a step.
        warmup: share of the steps over which rates rise; then they fall linearly.
        clip: largest norm of the gradient.
        seed: of all generators; None leaves them as they are.
        bfloat16: whether products are in bfloat16.
        least: share of its peak below which a rate does not fall.
        seconds: the training ends after so many, counted from its start or from where it goes on; rates fall with them.
    """

    steps: int
    parts: int
    warmup: float
    clip: float
    seed: int | None
    bfloat16: bool = False
    least: float = 0.0
    seconds: float | None = None


class NotFiniteError(TrainingError):
    """Where a loss was not finite, and what it was."""

    @classmethod
    def at(cls, where: str, found: str) -> NotFiniteError:
        """Of a loss. Without a constructor of its own it can be pickled, as results of processes are."""
        what, remedy = "the loss is not finite: training stopped", "lower the learning rate, or leave this text out"
        return cls(what, where=where, found=found, remedy=remedy)


def run_all_steps(
    module: TrainedModule, batches: PlannedBatches, loop: LoopSettings, folder: Path | None, run: Run
) -> list[dict[str, float]]:
    """Train until the steps are done, from the last whole state in `folder` on, and judge none; the log of all steps.

    A state is kept every two minutes; without a folder, none is. `module` then holds what came of it. Raises TrainingError
    when the last state is damaged, or a loss is not finite.
    """
    with verbosity_kept():  # Trainer sets it for the whole process
        last = state_to_resume(folder) if folder is not None else None
        arguments = arguments_of(module, loop, folder, eval_strategy="no", save_strategy="no")
        with _generators_kept() if loop.seed is None else nullcontext():  # Trainer seeds them
            trainer = ModuleTrainer(module, batches, loop, arguments, [_StateEvery()] if folder is not None else [], run)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        history: list[dict[str, float]] = trainer.state.log_history
        return history


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While open, torch's own generators, from which adapters, dropout, jitter and noise are drawn, go on from a seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Afterwards the generators of torch, numpy and Python go on from where they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def arguments_of(module: TrainedModule, loop: LoopSettings, folder: Path | None, **more: Any) -> TrainingArguments:
    """What Trainer is told; `more` has what is judged and kept, and when. Without a folder nothing is written."""
    arguments = TrainingArguments(
        output_dir=str(folder or gettempdir()),
        max_steps=loop.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=loop.parts,
        max_grad_norm=loop.clip,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        seed=loop.seed or 0,
        bf16=loop.bfloat16,
        use_cache=bool(getattr(module.config, "use_cache", False)),  # Trainer writes it into the model's config
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=module.skips_parameters,
        log_level="error",
        **more,
    )
    if arguments.n_gpu > 1:  # several devices without a launcher: Trainer would cut every part anew
        arguments._n_gpu = 1
    return arguments


class ModuleTrainer(Trainer):  # type: ignore[misc]
    """Reads the batches in their order, and keeps only what moves."""

    optimizer: Any
    control: Any

    def __init__(
        self,
        module: TrainedModule,
        batches: PlannedBatches,
        loop: LoopSettings,
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback],
        run: Run,
    ) -> None:
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=batches,
            eval_dataset=batches,
            data_collator=lambda items: items[0],
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is per step, not per part: `compute_loss` sees to it
        self._module = module
        self._moving = {f"model.{name}" for name in module.moving}
        self._batches, self._run = batches, run
        self._loop, self._began = loop, time.monotonic()
        self.add_callback(_StepReport(module, run, self.elapsed))
        if self.is_fsdp_enabled:  # one whole state, so that it can be written as a checkpoint
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")

    def get_train_dataloader(self) -> Any:
        """Trainer's; where torch's generators are to be left as they are, it draws from one of its own."""
        loader = super().get_train_dataloader()
        if self._loop.seed is None:
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self._batches)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The module's own; only what moves is in it."""
        if self.optimizer is None:
            self.optimizer = self._module.optimizer((model or self.model).named_parameters())
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear up over the warm-up, then linear to zero after the last step, or to the least rate."""
        warm = max(1, math.ceil(num_training_steps * self._loop.warmup))
        rest, least = max(1, num_training_steps - warm), self._loop.least
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: min((step + 1) / warm, max(least, 1.0 - max((step - warm) / rest, self.elapsed()))),
        )
        return self.lr_scheduler

    def elapsed(self) -> float:
        """The share of its time that is over, at most 1; 0 without a limit."""
        seconds = self._loop.seconds
        return 0.0 if seconds is None else min(1.0, (time.monotonic() - self._began) / max(seconds, 1e-9))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part's share of the step's mean loss. Trainer divides by the parts, DDP by the processes."""
        factor = float(self.args.gradient_accumulation_steps * self.args.world_size)
        loss = model(factor=factor, **inputs)["loss"]
        finite = self.accelerator.reduce(torch.isfinite(loss.detach()).float(), reduction="mean") == 1.0
        if not finite:
            part = self.state.global_step * self.args.gradient_accumulation_steps * self.args.world_size
            parts = range(part, min(len(self._batches), part + int(factor)))
            where = f"step {self.state.global_step + 1}: {'; '.join(self._batches.describe(number) for number in parts)}"
            raise NotFiniteError.at(where, f"loss {float(loss.detach())}")
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs with the module's figures."""
        if "loss" in logs:
            logs |= self._module.drain()
        super().log(logs, start_time)

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
        state = Path(resume_from_checkpoint)
        with state_read(state):
            check_names(state, self._moving)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with state_read(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with state_read(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, _result: Any) -> None:
        """Nothing: what does not move is not in the file."""


class _StepReport(TrainerCallback):  # type: ignore[misc]
    """Reports every step, gives the module the log of the steps before a kill, and ends the training when its time is over."""

    def __init__(self, module: TrainedModule, run: Run, elapsed: Callable[[], float]) -> None:
        self._module, self._progress, self._elapsed = module, run.progress, elapsed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What is kept, before the first step."""
        self._module.go_on(state.log_history)
        self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """How many steps are done; of a training whose time is over, the last state is judged and kept."""
        self._report(state)
        if self._elapsed() >= 1.0:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """The loss of the step."""
        if logs is not None and "loss" in logs:
            self._report(state, f"{DETAIL}loss {logs['loss']:.3f}")

    def _report(self, state: Any, detail: str = "") -> None:
        if state.is_world_process_zero:
            self._progress(f"train{detail}", state.global_step, state.max_steps)


class _StateEvery(TrainerCallback):  # type: ignore[misc]
    """Asks for a state every two minutes, or as often as writing one allows."""

    def __init__(self) -> None:
        self._next = time.monotonic() + STATE_SECONDS
        self._asked = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._asked = time.monotonic()
        control.should_save = self._asked >= self._next

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._next = now + max(STATE_SECONDS, _STATE_SHARE * (now - self._asked))
