"""What the command line draws on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import err, out, shows_bold
from modekit.cli.printing.table import OWN, Cell, Table
from modekit.evaluation.tables import MIXTURE, ResultTable, cells_of
from modekit.files.figures import bytes_of, count_of, file_count, three_digits

if TYPE_CHECKING:
    from pathlib import Path

    from modekit.building.again import Check
    from modekit.building.mix import MixPlan
    from modekit.building.preview import Preview
    from modekit.evaluation.results_folder import Result
    from modekit.experts.extract_record import Extraction
    from modekit.experts.specialist import BeforeAfter, SpecialistRecord
    from modekit.training.finish import TrainedMixture


def print_result(result: Result) -> None:
    """Draw the tables of a result, but for its details, and what has to be said of them."""
    for shown in result.tables():
        if not shown.detail:
            print_table(shown)
    print_notes(result.notes)


def print_table(shown: ResultTable) -> None:
    """Draw a table and what its figures are; the mixture's row stands out."""
    first, *titles = (title.replace(" ", "\n") for title in shown.header)
    table, own = Table(first, titles, prose=shown.prose), False
    for row in shown.rows:
        name, *cells = cells_of(row)
        own = own or any(cell.own for cell in cells)
        style = "bold green" if name.text == MIXTURE else ""
        table.add(name.text, *(Cell(cell.text, own=cell.own) for cell in cells), style=style)
    how = "in bold" if shows_bold(out) else f"marked {OWN}"
    out.print(Text(shown.title, style="bold"))
    if shown.caption:
        out.print(Text(shown.caption + (f" Each domain's own is {how}." if own else "")))
    out.print(table)


def print_next(*commands: str) -> None:
    """Say which commands go on from here."""
    out.print(f"next: {', '.join(commands)}")


def print_notes(notes: Iterable[str]) -> None:
    """Draw what has to be said of a table."""
    for note in notes:
        out.print(Text.assemble(("note:", "yellow"), f" {note}"))


def print_specialist(output: Path, record: SpecialistRecord) -> None:
    """Draw what became of a base model, and of its distance to a teacher where it had one."""
    loss, kl = record.held_out_loss, record.held_out_kl
    change = "no held-out text" if loss.before is None else f"held-out loss {_change(loss)}"
    line = f": {record.specialist}, {record.training['steps']} steps, {change}"
    if kl is not None and kl.before is not None:
        line += f", KL to the teacher {_change(kl)}"
    out.print(Text.assemble((str(output), "bold"), line))
    if record.held_out_loss_by_label:
        each = (f"{name} {_change(losses)}" for name, losses in record.held_out_loss_by_label.items())
        out.print(Text(f"with their tags: {', '.join(each)}"))
    if record.teacher is not None and record.distillation_loss is not None:
        said = f"{_change(record.distillation_loss)}; mean weight of the text {record.cross_entropy_weight:.2f}"
        out.print(f"teacher {record.teacher['name']}: distillation loss {said}")


def _change(loss: BeforeAfter) -> str:
    return "no text" if loss.before is None or loss.after is None else f"{loss.before:.3f} -> {loss.after:.3f}"


def print_training(folder: Path, training: TrainedMixture) -> None:
    """Draw what a training came to."""
    record = training.record
    if training.results is not None:
        print_result(training.results)
    table = Table("domain", ["before", "after"])
    for name, loss in record.select_loss.items():
        table.add(name, f"{loss['before']:.4f}", f"{loss['after']:.4f}")
    out.print("Held-out loss by which states were compared (select split).")
    out.print(table)
    print_notes(record.notes)
    moved = f"{count_of(record.parameters)} parameters, {record.steps} steps, {record.tokens:,} tokens"
    verdict = "trained" if training.improved else "left as it was"
    out.print(Text.assemble((str(folder), "bold"), f": {verdict}; {moved}"))


def print_summary(summary: dict[str, dict[str, float | None]]) -> None:
    """Draw the means over the seeds of a demo."""
    titles = {"mean_loss": "mean loss", "gap_closed": "gap closed", "unseen_against_base": "unseen / base"}
    if any("bleu" in figures for figures in summary.values()):
        titles |= {"bleu": "BLEU", "unseen_bleu": "BLEU,\nunseen"}
    table = Table("model", list(titles.values()))
    for name, figures in summary.items():
        cells = []
        for key in titles:
            digits = 1 if "bleu" in key else 3
            value, deviation = figures.get(key), figures.get(f"{key}_spread")
            cells.append("-" if value is None else f"{value:.{digits}f} ± {deviation:.{digits}f}")
        table.add(name, *cells)
    out.print("Over the seeds: mean and largest deviation.")
    out.print(table)


def print_checks(checks: Sequence[Check]) -> None:
    """Draw what a verification found."""
    table = Table("check", ["verdict", "detail"], prose=True)
    colours = {"proven": "green", "failed": "red", "not possible": "yellow"}
    for check in checks:
        table.add(check.name, Cell(check.verdict, colours[check.verdict]), check.detail)
    out.print(table)


def print_extract(record: Extraction) -> None:
    """Draw what an extraction kept, by the kind of module."""
    table = Table("module", ["number", "rank", "drift", "error"])
    for name, row in {**record.kinds, "all": record.all}.items():
        cells = [str(row.modules), str(row.rank), _share(row.drift), _share(row.error)]
        table.add(name, *cells, style="bold" if name == "all" else "")
    out.print("drift: |difference| / |base weight|; error: what the factors leave of the difference, 0 = nothing.")
    out.print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else three_digits(value)


def print_plan(plan: Preview) -> None:
    """Draw what a build would do."""
    table = Table("", [""], prose=True, name_style="bold")
    parameters, sizes, memory, disk = plan.parameters, plan.bytes, plan.memory, plan.disk
    operations = ", ".join(f"{count} {name}" for name, count in plan.tensors.items() if name != "total")
    rows = [
        ("architecture", _with_engines(plan.architecture, plan.also_runs_in)),
        ("why", plan.why),
        ("experts", ", ".join(f"{name} ({model})" for name, model in plan.experts.items())),
        ("mixing", f"{plan.method}, top_k {plan.top_k}, backbone {plan.backbone}"),
        ("router", plan.router_why or plan.router),
        ("parameters", f"{count_of(parameters['total'])} total, {count_of(parameters['active'])} active per token"),
        ("tensors", f"{plan.tensors['total']} ({operations}) in {file_count(plan.shards)}, {plan.dtype}"),
        (
            "bytes",
            f"{bytes_of(sizes['read'])} read, {bytes_of(sizes['written'])} written, {bytes_of(sizes['statistics'])} statistics",
        ),
        ("disk", f"{bytes_of(disk['needed'])} needed, {bytes_of(disk['free'])} free"),
        (
            "memory",
            f"{bytes_of(memory['build'])} to build, {bytes_of(memory['fit'])} to fit, {bytes_of(memory['load'])} to load",
        ),
        *(("note", note) for note in plan.notes),
    ]
    for name, value in rows:
        table.add(name, value)
    out.print(table)
    if disk["needed"] > disk["free"]:
        err.print(Text("the disk has too little free space for this build", style="yellow"))


def _with_engines(architecture: str, engines: str) -> str:
    return f"{architecture} ({'' if engines.startswith('transformers') else 'also '}runs in {engines})"


def print_mix(planned: MixPlan) -> None:
    """Draw in four lines what will be mixed, and how."""
    from modekit.recipes.auto import why_chosen

    plan, size = planned.plan, planned.plan.parameters()
    kinds = {"base": "the base", "adapter": "adapter", "ffn": "model", "full": "model"}
    experts = [f"{name} ({kinds[kind]})" for name, kind in zip(plan.recipe.names, planned.kinds, strict=True)]
    parameters = f"{count_of(size['total'])} parameters, {count_of(size['active'])} active per token"
    table = Table("", [""], prose=True, name_style="bold")
    table.add("experts", ", ".join(experts))
    authors = [expert.name for expert in plan.recipe.experts if expert.writes_text]
    router = why_chosen(plan.recipe, native=plan.shape.plain)
    table.add("router", router + (f"; text written by {', '.join(authors)}" if authors else ""))
    table.add("result", f"{_with_engines(plan.architecture, plan.shape.also_runs_in)}, {parameters}")
    table.add("disk", f"{bytes_of(plan.disk_needed)} needed, {bytes_of(planned.free)} free")
    out.print(table)
    print_notes(planned.notes)
