"""What the command line draws on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from modekit.cli.printing.console import err, out
from modekit.cli.printing.figures import bytes_of, count_of, range_of, three_digits, time_of
from modekit.cli.printing.table import Cell, Table

if TYPE_CHECKING:
    from pathlib import Path

    from modekit.building.verify import Check
    from modekit.evaluation.results import Results
    from modekit.search.tune.results import TuneResults
    from modekit.training.finish import TrainedMixture


def print_results(results: Results) -> None:
    """Draw the table of an evaluation."""
    table = table_of_models(*results.table(between="\n"))
    place = "after /" if out.soft_wrap else "below"
    out.print(f"Held-out loss in nats per token, perplexity {place}; gap closed: 1 = as good as each domain's own expert.")
    out.print(table)
    print_notes(results.notes)


def table_of_models(header: Sequence[str], body: Iterable[Sequence[str]]) -> Table:
    """A row per model, the mixture's stands out."""
    table = Table(header[0], [title.replace(" ", "\n") for title in header[1:]])
    for name, *cells in body:
        table.add(name, *cells, style="bold green" if name == "mixture" else "")
    return table


def print_notes(notes: Iterable[str]) -> None:
    """Draw what has to be said of a table."""
    for note in notes:
        out.print(Text.assemble(("note:", "yellow"), f" {note}"))


def print_specialist(output: Path, record: Mapping[str, Any]) -> None:
    """Draw what became of a base model, and of its distance to a teacher where it had one."""
    loss, kl = record["held_out_loss"], record.get("held_out_kl")
    change = "no held-out text" if loss["before"] is None else f"held-out loss {loss['before']:.3f} -> {loss['after']:.3f}"
    said = f": {record['specialist']}, {record['training']['steps']} steps, {change}"
    if kl is not None and kl["before"] is not None:
        said += f", KL to the teacher {kl['before']:.3f} -> {kl['after']:.3f} (over {kl['over']})"
    out.print(Text.assemble((str(output), "bold"), said))
    labels = record.get("held_out_loss_by_label", {})
    if labels:
        each = (f"{name} {losses['before']:.3f} -> {losses['after']:.3f}" for name, losses in labels.items())
        out.print(Text(f"with their tags: {', '.join(each)}"))
    if kl is not None:
        weight = record["cross_entropy_weight"]
        out.print(
            f"teacher {record['teacher']['name']}: distillation loss {record['distillation_loss']['first']:.3f} -> "
            f"{record['distillation_loss']['last']:.3f}; the text counted {weight['mean']:.2f} of the steps' loss, from "
            f"{weight['lowest']:.2f} to {weight['highest']:.2f}"
        )


_SHOWN_CANDIDATES = 12


def print_tune(results: TuneResults) -> None:
    """Draw the best candidates of a search, and the fixed variants."""
    header, body = results.table()
    table = Table("variant", header[2:])
    named = [bool(candidate.name) for candidate in results.candidates]
    left_out = 0
    for place, (cells, is_named) in enumerate(zip(body, named, strict=True)):
        if place < _SHOWN_CANDIDATES or is_named or cells[0]:
            mark, variant, *figures = cells
            style = "bold green" if mark == "best" else "dim" if figures[0].startswith("(") else ""
            table.add(f"{mark}: {variant}" if mark else variant, *figures, style=style)
        else:
            left_out += 1
    out.print("Mean held-out loss; compared on the select split, the report split chose nothing. In brackets: dropped early;")
    out.print("front: no other variant is better with as few active parameters.")
    out.print(table)
    more = f"; {left_out} more in tune.md" if left_out else ""
    out.print(Text(f"{len(body)} variants in {results.seconds:.0f} s{more}", style="dim"))


def print_training(folder: Path, training: TrainedMixture) -> None:
    """Draw what a training came to."""
    record = training.record
    if training.results is not None:
        print_results(training.results)
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


def print_extract(record: dict[str, Any]) -> None:
    """Draw what an extraction kept, by the kind of module."""
    table = Table("module", ["number", "rank", "drift", "error\nin weight", "error\nin output"])
    weighted = record["text"] is not None

    def add(name: str, row: dict[str, Any], style: str = "") -> None:
        low, high = row["smallest_rank"], row["largest_rank"]
        table.add(
            name,
            str(row["modules"]),
            str(low) if low == high else f"{low}-{high}",
            _share(row["drift"]),
            _share(row["weight_error"]),
            _share(row["error"]) if weighted else "-",
            style=style,
        )

    for kind, row in record["kinds"].items():
        add(kind, row)
    add("all", record["totals"], "bold")
    out.print("drift: |difference| / |base weight|; error: what the factors leave of the difference, 0 = nothing.")
    out.print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else three_digits(value)


def print_plan(summary: dict[str, Any]) -> None:
    """Draw what a build would do."""
    table = Table("", [""], prose=True, name_style="bold")
    parameters, sizes, memory, disk = summary["parameters"], summary["bytes"], summary["memory"], summary["disk"]
    operations = ", ".join(f"{count} {name}" for name, count in summary["tensors"].items() if name != "total")
    rows = [
        ("architecture", f"{summary['architecture']} (also runs in {summary['also_runs_in']})"),
        ("why", summary["why"]),
        ("experts", ", ".join(f"{expert['name']} ({expert['model']})" for expert in summary["experts"])),
        (
            "mixing",
            f"{summary['method']}, top_k {summary['top_k']}, router {summary['router']}, backbone {summary['backbone']}",
        ),
        ("parameters", f"{count_of(parameters['total'])} total, {count_of(parameters['active'])} active per token"),
        ("tensors", f"{summary['tensors']['total']} ({operations}) in {summary['shards']} files, {summary['dtype']}"),
        (
            "bytes",
            f"{bytes_of(sizes['read'])} read, {bytes_of(sizes['written'])} written, {bytes_of(sizes['statistics'])} statistics",
        ),
        ("disk", f"{bytes_of(disk['needed'])} needed, {bytes_of(disk['free'])} free"),
        (
            "memory",
            f"{bytes_of(memory['build'])} to build, {bytes_of(memory['fit'])} to fit, {bytes_of(memory['load'])} to load",
        ),
        ("fit", fit_said(summary["fit"])),
        ("time", time_said(summary["time"])),
        *(("note", note) for note in summary["notes"]),
    ]
    for name, value in rows:
        table.add(name, value)
    out.print(table)
    if disk["needed"] > disk["free"]:
        err.print(Text("the disk has too little free space for this build", style="yellow"))


def time_said(needed: Mapping[str, Any]) -> str:
    """How long a build takes, in a line."""
    write = f"{time_of(needed['write'])} to write"
    parts = [write, *([f"{time_of(needed['fit'])} to fit the router"] if needed["fit"] else [])]
    faster = "; less on the accelerator" if needed["accelerated"] else ""
    return f"{range_of(*needed['range'])} on this machine as busy as it is now ({', '.join(parts)}){faster}"


def fit_said(work: Mapping[str, Any] | None) -> str:
    """How much the fit of the router has to do, and how long that takes."""
    if work is None:
        return "nothing to read: the router is set without text"
    if not work["reads"]:
        return "reads tokens alone: no model is run, seconds"
    much = f"at most {work['tokens']:,} tokens, {work['flops']:.1e} floating-point operations"
    return much if work["seconds"] is None else f"{much}; {time_of(work['seconds'])} on this machine"
