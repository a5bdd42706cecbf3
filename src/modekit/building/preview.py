"""`modekit plan`: what a build would do, and how long it takes on this machine; what a build says when it is done. No torch.

Configs and headers alone are read, and the processor is measured, as busy as it is now, by a twentieth of a second of products.
The speed of the disk is assumed, and so is how much of the products' speed a model's pass reaches (benchmarks/speed.md has what
was predicted and what it took).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import MixtureRecord
from modekit.planning.carry import STREAM_TOKENS
from modekit.planning.channels import MEASURED_TOKENS
from modekit.planning.make import make_plan
from modekit.planning.notes import twins
from modekit.planning.plan import Plan
from modekit.recipes.auto import why_chosen
from modekit.recipes.mixture import BackboneExpert
from modekit.recipes.read import load_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.config import whole
from modekit.sources.names import split_layer
from modekit.text.amounts import FORCED_TOKENS
from modekit.text.glance import check_texts
from modekit.text.written import DOCUMENT_TOKENS, documents_of, read_written, written_file

_BYTES_PER_SECOND = 600e6
"""Copied, hashed and brought to the disk; a fast disk does twice as much, a slow one a third."""
_SHARE_OF_PRODUCTS = 0.6
"""What a pass of a model reaches of the speed of its products."""
_SHARE_IN_WRITING = 0.3
"""What a batch of texts that are written token by token reaches of it."""
_COPY_SECONDS, _FIT_SECONDS = 0.5, 10.0
"""Processor time of what does not grow with the work: a command that starts; libraries and models that are loaded, text that is
tokenised, a table that is trained.
"""
_LEAST, _MOST = 1 / 1.6, 2.9
"""Of what is computed: builds of five strangers' models took up to 1.8 times 1.6 as long."""
_MEASURED_SECONDS = 0.05
_ROWS, _WIDTH = 256, 1_024  # of the products that are measured
_EVALUATIONS = 500  # passes over the kept tokens that a logistic fit makes of a router, forward and back, at most
_FEWEST_EXPERTS = 8  # a product with fewer columns takes no less: reading the tokens is what takes time
_ACCELERATOR = Path("/dev/nvidia0")

Clock = Callable[[], float]


class NeededTime(BaseModel, frozen=True):
    """Seconds that a build needs on the processor.

    Attributes:
        write: tensors and statistics.
        write_text: of experts that write their own.
        fit: of the router.
        accelerated: there is an accelerator, on which the fit takes less.
        range: the least and the most that it takes, as far as one can tell.
    """

    write: float
    write_text: float
    fit: float
    accelerated: bool
    range: tuple[float, float]


class FitWork(BaseModel, frozen=True):
    """What a fit does at most; texts may be shorter.

    Attributes:
        reads: whether a model reads the text; a table is made from token ids, which takes seconds.
        tokens: read by the model, of all domains together.
        flops: floating-point operations of that and of the statistics that it keeps.
        solving: floating-point operations of making gates from what was kept, as if all of them were those of a model.
    """

    reads: bool
    tokens: int
    flops: int
    solving: int = 0


class ExpertSummary(BaseModel, frozen=True):
    """An expert, the model or adapter that it is, and whether it has text."""

    name: str
    model: str
    text: bool


class Preview(BaseModel, frozen=True):
    """A plan, and how long a build of it takes; `disk` is that of the recipe's folder, sizes are in bytes.

    Attributes:
        router_why: which it is, and why `fit: auto` takes it; empty where it does not.
        tensors: their number in all, and by the operation that makes them.
        bytes: read, written, and of statistics.
        parameters, memory: as `Plan` has them.
        disk: needed and free.
        fit: None where the router is set without text.
    """

    architecture: str
    why: str
    also_runs_in: str
    method: str
    top_k: int
    router: str
    router_why: str
    backbone: str
    experts: list[ExpertSummary]
    mixed: list[str]
    layers: int
    dtype: str
    tensors: dict[str, int]
    shards: int
    bytes: dict[str, int]
    parameters: dict[str, int]
    disk: dict[str, int]
    memory: dict[str, int]
    fit: FitWork | None
    notes: list[str]
    time: NeededTime


def preview(recipe: Path, *, run: Run = QUIET) -> Preview:
    """The plan of a recipe file, as `modekit plan --json` prints it.

    Raises what a build would raise for models, and TextError for a text as far as it is read here.
    """
    root, parsed = recipe.resolve().parent, load_recipe(recipe)
    plan = make_plan(parsed, root, run=run)
    return preview_of(plan, check_texts(plan.recipe, root, plan.family.reads))


def backbone_label(recipe: Recipe) -> str:
    """What the backbone is, in a word or two."""
    merge = recipe.mixture.merge
    if merge is not None:
        return merge.method
    if isinstance(recipe.mixture.backbone, BackboneExpert):
        return f"expert {recipe.mixture.backbone.expert}"
    return BASE


def preview_of(plan: Plan, notes: Iterable[str] = ()) -> Preview:
    """What `modekit plan` shows of a plan, with further notes."""
    recipe, operations = plan.recipe, dict[str, int]()
    for tensor in plan.tensors:
        label = "router" if tensor.role == "router" else tensor.operation
        operations[label] = operations.get(label, 0) + 1
    return Preview(
        architecture=plan.architecture,
        why=plan.why,
        also_runs_in=plan.shape.also_runs_in,
        method=recipe.mixture.method,
        top_k=recipe.top_k,
        router="none (fixed weights)" if recipe.mixture.method == "linear" else recipe.mixture.router.fit,
        router_why=why_chosen(recipe, native=plan.shape.plain),
        backbone=backbone_label(recipe),
        experts=[ExpertSummary(name=e.name, model=e.source, text=bool(e.text or e.prompts)) for e in recipe.experts],
        mixed=plan.shape.mixed,
        layers=plan.layers,
        dtype=str(plan.config["dtype"]),
        tensors={"total": len(plan.tensors), **operations},
        shards=len(plan.shards) + 1,
        bytes={"read": plan.bytes_read, "written": plan.bytes_written, "statistics": plan.bytes_of_statistics},
        parameters=plan.parameters(),
        disk={"needed": plan.disk_needed, "free": shutil.disk_usage(plan.root).free},
        memory=plan.memory(),
        fit=fit_work(plan),
        notes=[*plan.notes, *notes],
        time=needed_time(plan),
    )


def fit_work(plan: Plan) -> FitWork | None:
    """The work of setting the plan's router from text; None when it is set without."""
    mixture, router = plan.recipe.mixture, plan.recipe.mixture.router
    if not mixture.needs_text:
        return None
    if router.row.reads_ids:
        tokens = _measured_tokens(plan)
        return FitWork(reads=tokens > 0, tokens=tokens, flops=2 * tokens * _weights(plan))
    tokens = router.tokens_per_domain * plan.experts
    solved = router.row.sample  # by a search, where others have a closed form
    kept = min(router.keep_tokens, router.tokens_per_domain) * plan.experts if solved else 0
    solving = 2 * _EVALUATIONS * kept * max(_FEWEST_EXPERTS, plan.experts) * sum(slot.shape[1] for slot in plan.slots)
    return FitWork(reads=True, tokens=tokens, flops=2 * tokens * _weights(plan), solving=solving)


def _measured_tokens(plan: Plan) -> int:
    """That a model reads so that a plain checkpoint carries a router, and whole experts: their stream's size is measured."""
    channels = plan.shape.channels
    if channels is None:
        return 0
    return MEASURED_TOKENS + (0 if channels.carry is None else STREAM_TOKENS)


def _weights(plan: Plan) -> int:
    """Weights of the layers that a token passes with one expert active, which stands for the base where that is one."""
    parameters = plan.parameters()
    own = {tensor.name.partition(".experts.")[0] for tensor in plan.tensors if tensor.role == "expert"}
    backbone = sum(
        tensor.numel
        for tensor in plan.tensors
        if tensor.role == "backbone"
        and split_layer(tensor.name)[0] is not None
        and tensor.name.partition(".base.")[0] not in own
    )
    return backbone + parameters["per_expert"] + parameters["adapters"] // plan.experts


def needed_time(plan: Plan, *, clock: Clock = time.perf_counter, used: Clock = time.process_time) -> NeededTime:
    """The time that a build of a plan needs on this machine, which is measured for a moment."""
    machine, work = measured(clock, used), fit_work(plan)
    write = ((plan.bytes_written + plan.bytes_of_statistics) / _BYTES_PER_SECOND + _COPY_SECONDS) / machine.share
    fit = 0.0
    if work is not None:
        fit = (work.flops + work.solving) / (_SHARE_OF_PRODUCTS * machine.products) + _FIT_SECONDS / machine.share
    write_text = _flops_of_writing(plan) / (_SHARE_IN_WRITING * machine.products)
    seconds = write + write_text + fit
    runs = write_text > 0 or (work is not None and work.reads)
    return NeededTime(
        write=write,
        write_text=write_text,
        fit=fit,
        accelerated=runs and _ACCELERATOR.exists(),
        range=(seconds * _LEAST, seconds * _MOST),
    )


def _flops_of_writing(plan: Plan) -> float:
    """Of text that experts are yet to write, token by token, each beside the base."""
    if not plan.recipe.mixture.needs_text:
        return 0.0
    weights = plan.sources[0].parameters
    documents = 0
    for expert in (each for each in plan.recipe.experts if each.writes_text):
        known = read_written(written_file(expert, plan.root))
        left = documents_of(weights) - (known.documents if known is not None else 0)
        documents += max(0, left) * (1 if expert.is_base else 2)
    common = documents_of(weights) if documents else 0  # texts of the base that all read
    return 2.0 * (documents + common) * DOCUMENT_TOKENS * weights


@dataclass(frozen=True)
class Cost:
    """What a work takes: seconds at least and at most, and bytes of memory."""

    seconds: tuple[float, float]
    memory: int


def forced_cost(checkpoint: Checkpoint) -> Cost:
    """Of running every expert of a mixture, forced, beside its own model, all in float32 (`verify --deep`); no torch."""
    recipe, sizes, machine = checkpoint.record.recipe, checkpoint.parameters, measured()
    named = {*recipe.eval, *(expert.name for expert in recipe.experts if expert.text)}
    experts, tokens = len(recipe.experts), FORCED_TOKENS * max(1, len(named))
    passes = 2.0 * tokens * ((1 + experts) * sizes.dense + experts * sizes.active)
    read = 4.0 * ((1 + experts) * sizes.dense + sizes.total)
    seconds = passes / (_SHARE_OF_PRODUCTS * machine.products) + (_FIT_SECONDS + read / _BYTES_PER_SECOND) / machine.share
    memory = 4 * (sizes.total + sizes.dense + tokens * whole(checkpoint.config, "vocab_size"))
    return Cost((seconds * _LEAST, seconds * _MOST), memory)


@dataclass(frozen=True)
class Machine:
    """As busy as it is now: floating-point operations per second of float32 matrix products, and the share of a processor
    that a command gets.
    """

    products: float
    share: float


def measured(clock: Clock = time.perf_counter, used: Clock = time.process_time) -> Machine:
    """Measure for a moment; `used` says the seconds that the processors worked for this process."""
    left, right = np.ones((_ROWS, _WIDTH), np.float32), np.ones((_WIDTH, _WIDTH), np.float32)
    left @ right  # the first one warms up
    started, worked, calls = clock(), used(), 0
    while True:
        left @ right
        calls += 1
        passed = clock() - started
        if passed >= _MEASURED_SECONDS:
            share = min(1.0, max(0.02, (used() - worked) / passed))
            return Machine(2.0 * _ROWS * _WIDTH * _WIDTH * calls / passed, share)


_FEWEST_DOCUMENTS, _FEWEST_TOKENS = 10, 500  # from which a router learns a domain


def notes_of(checkpoint: Checkpoint) -> list[str]:
    """By the digests of the sources and by the text that the router has read."""
    record = checkpoint.record
    return [*_of_twins(record), *_of_text(record)]


def _of_twins(record: MixtureRecord) -> Iterator[str]:
    places = zip(record.recipe.experts, record.expert_sources, strict=True)
    own = [(expert, _digests(record, place)) for expert, place in places if not expert.is_base]
    return twins([expert for expert, _ in own], [digests for _, digests in own], _digests(record, 0))


def _digests(record: MixtureRecord, place: int) -> tuple[str, ...]:
    return tuple(sorted(file.blake3 for file in record.sources[place].files.values()))


def _of_text(record: MixtureRecord) -> Iterator[str]:
    for name, read in record.router.text.items():
        if read["documents"] < _FEWEST_DOCUMENTS or read["tokens"] < _FEWEST_TOKENS:
            yield (
                f"{name}: the router was set from {read['documents']:,} documents and {read['tokens']:,} tokens of its text, "
                f"too little to learn a domain from: give at least {_FEWEST_DOCUMENTS} documents and {_FEWEST_TOKENS} tokens"
            )
