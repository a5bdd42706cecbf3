"""`modekit tune`: the best mixture of a recipe's experts by held-out text, with everything that was tried.

    OUT/                     the best mixture, built as its recipe says
    OUT/recipe.yaml          that recipe; its paths work from OUT
    OUT/results/tune.json    every candidate; tune.md the same as a table
    OUT.tuning/              the search: it goes on from there after a kill, or when more trials are asked for

Candidates are compared on the `select` split of the domains' text. What is reported of the best, of the fixed variants and of
the Pareto front comes from the `report` split, which chose nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from modekit.build import build
from modekit.checkpoint import RECORD_FILE
from modekit.data import SELECTED_FILE
from modekit.errors import OutputError, TuneError
from modekit.evaluate import RESULTS_FOLDER, load_expert, score_domain
from modekit.models import load_model
from modekit.plan import make_plan
from modekit.planned import Plan
from modekit.progress import Progress, silent
from modekit.recipe import BASE, Recipe
from modekit.relocate import from_folder
from modekit.sources import Mappings, TensorRef
from modekit.tune.mount import Mount
from modekit.tune.results import TuneResults
from modekit.tune.selection import Selection, Tally, read_selection
from modekit.tune.space import Space, default_space
from modekit.tune.study import Candidate, Job, candidate_recipe, candidates, pareto, prepare, work
from modekit.writer import refuse_existing, write_atomically, write_json

_SETTINGS_FILE = "settings.json"
_REPORTED_FILE = "reported.json"
_GO_ON = "see what it said above; the same command goes on from what is there, with --processes 1 in less memory"


@dataclass(frozen=True)
class TuneSettings:
    """How much a search does: candidates, tokens per domain and split, and what may run at once."""

    trials: int = 48
    tokens_per_domain: int = 8_192
    sequence_length: int = 512
    seed: int = 0
    processes: int = 1
    ray: bool = False


def tune(
    recipe: Recipe, root: Path, out: Path, *, space: Space | None = None, settings: TuneSettings | None = None,
    native: bool = False, overwrite: bool = False, trust_remote_code: bool = False, progress: Progress = silent,
) -> TuneResults:  # fmt: skip
    """Search, build the best at `out` and write what was found.

    `native`: only what a native architecture says, which is what OUT is then built in. Raises what `make_plan` and `build`
    raise, TextError and TuneError.
    """
    settings = settings or TuneSettings()
    refuse_existing(out, overwrite=overwrite, marker=RECORD_FILE)
    plan = make_plan(plain_recipe(recipe), root, trust_remote_code=trust_remote_code)
    if native:  # a candidate that is not, whatever the space says, is then refused with the reason
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"format": "native"})})
    native = recipe.output.format == "native"
    if native and plan.native is None:
        low = [expert.name for expert in recipe.experts if expert.adapter is not None or expert.lora_rank is not None]
        raise TuneError(
            "native mixtures of these experts cannot be searched",
            found=f"{', '.join(low)}: candidates keep adapters low-rank" if low else plan.why,
            remedy="leave --native and output: {format: native} out" + (", or give full models" if low else ""),
        )
    space = space or space_of(recipe, root, plan, native=native)
    folder = out.with_name(out.name + ".tuning")
    built_native = plan.native is not None and recipe.output.format != "modekit"
    job = Job(recipe, root, folder, space, built_native, settings.trials, settings.seed, trust_remote_code)
    select, report = (
        read_selection(
            recipe, root, _folders(plan), split=split, tokens_per_domain=settings.tokens_per_domain,
            sequence_length=settings.sequence_length, trust_remote_code=trust_remote_code,
        )
        for split in ("select", "report")
    )  # fmt: skip
    _claim(job, settings, native, {"models": _stamp(plan), "text": select.read})
    with _alone(folder):
        started = time.perf_counter()
        prepare(job)
        _run(job, select, settings, progress)
        found = candidates(job)
        best = min((each for each in found if each.status == "scored"), key=lambda each: each.mean, default=None)
        if best is None:
            raise TuneError(
                "no candidate could be scored", where=str(folder), found=next((each.why for each in found), None),
                remedy="widen the space of the search",
            )  # fmt: skip
        searched = time.perf_counter() - started
        scores = _report(job, plan, [best, *(each for each in found if each.name), *pareto(found)], report, progress)
        reference = _reference(job, plan, {"select": select, "report": report}, progress)
        built = make_plan(candidate_recipe(recipe, best.mixture), root, trust_remote_code=trust_remote_code)
        checkpoint = build(built, out, overwrite=overwrite, progress=progress)
        write_atomically(out / SELECTED_FILE, "".join(f"{digest}\n" for digest in sorted(select.digests)).encode())
        said = from_folder(checkpoint.record.recipe.model_dump(mode="json", exclude_unset=True, by_alias=True), root, out)
        write_atomically(out / "recipe.yaml", yaml.safe_dump(said, sort_keys=False, allow_unicode=True).encode())
        results = TuneResults(
            found, best, pareto(found), scores, reference, dataclasses.asdict(settings),
            space.model_dump(mode="json"), {"select": _texts(select), "report": _texts(report)}, searched,
        )  # fmt: skip
        (out / RESULTS_FOLDER).mkdir(exist_ok=True)
        made = {"checkpoint": {"recipe_digest": checkpoint.record.recipe_digest}}
        write_json(out / RESULTS_FOLDER / "tune.json", {**made, **results.as_data()})
        write_atomically(out / RESULTS_FOLDER / "tune.md", results.markdown().encode())
        job.bodies().remove()
        return results


def space_of(recipe: Recipe, root: Path, plan: Plan, *, native: bool = False) -> Space:
    """The default space of a recipe."""
    only_adapters = all(
        expert.adapter is not None or expert.lora_rank is not None or expert.is_base for expert in recipe.experts
    )
    differ = not only_adapters and backbones_differ(recipe, root, trust_remote_code=plan.trust_remote_code)
    return default_space(
        recipe, layers=plan.layers, backbones_differ=differ,
        only_adapters=only_adapters, native=native or recipe.output.format == "native",
    )  # fmt: skip


def backbones_differ(recipe: Recipe, root: Path, *, trust_remote_code: bool = False) -> bool:
    """Whether an expert differs from the base outside of what is mixed: whether merging backbones can change anything.

    Reads until the first difference.
    """
    if all(expert.is_base for expert in recipe.experts):
        return False
    merged = make_plan(plain_recipe(recipe, backbone="average"), root, trust_remote_code=trust_remote_code)
    mappings = Mappings()
    try:
        for tensor in merged.tensors:
            if tensor.operation == "merge":
                base, *others = (piece.ref for piece in tensor.pieces)
                if any(not _same(base, other, mappings) for other in others) or any(p.change for p in tensor.pieces):
                    return True
                for piece in tensor.pieces:
                    mappings.forget(piece.ref)
        return False
    finally:
        mappings.close()


def _same(base: TensorRef, other: TensorRef, mappings: Mappings) -> bool:
    return base.dtype == other.dtype and mappings.view(base) == mappings.view(other)


def plain_recipe(recipe: Recipe, backbone: str = BASE) -> Recipe:
    """The recipe's experts in the plainest mixture, in whatever architecture suits them."""
    raw = recipe.model_dump(mode="json", exclude_unset=True, by_alias=True)
    mixture = {"method": "linear", **({"backbone": backbone} if backbone != BASE else {})}
    for expert in raw["experts"]:
        expert.pop("negative_prompts", None)
    return Recipe.model_validate({**raw, "mixture": mixture, "output": {}})


def _folders(plan: Plan) -> list[Path]:
    return list(dict.fromkeys(source.folder for source in plan.sources))


def _stamp(plan: Plan) -> str:
    """Changes with the models: size and time of every file."""
    files = ((source.label, file, file.stat()) for source in plan.sources for file in source.files)
    stats = [[label, file.name, stat.st_size, stat.st_mtime_ns] for label, file, stat in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _claim(job: Job, settings: TuneSettings, native: bool, read: Mapping[str, str]) -> None:
    """Make the work folder, or go on in that of the same search of the same models and text (`read`: their digests).

    Raises TuneError for another's.
    """
    folder = job.work
    asked = {
        "recipe": job.recipe.digest(), "space": hashlib.sha256(job.space.model_dump_json().encode()).hexdigest(),
        "native": native, "tokens_per_domain": settings.tokens_per_domain, "sequence_length": settings.sequence_length,
        "seed": settings.seed, **read,
    }  # fmt: skip
    path = folder / _SETTINGS_FILE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(
                "a folder that modekit did not make is in the way",
                where=str(folder),
                remedy="move it away, or choose another OUT",
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)
    known = json.loads(path.read_text(encoding="utf-8"))
    if known != asked:
        changed = ", ".join(sorted(key for key in asked if known.get(key) != asked[key]))
        raise TuneError(
            "the folder holds another search", where=str(folder), found=f"other {changed}",
            remedy="remove the folder to start over, or choose another OUT",
        )  # fmt: skip


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Held while a command searches: another would take its candidates for those that a kill cut short."""
    lock = FileLock(folder / "search.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TuneError(
            "another command is at this search", where=str(folder), remedy="wait for it, or use --processes for more at once"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _run(job: Job, select: Selection, settings: TuneSettings, progress: Progress) -> None:
    """Search in this process, in several on this machine, or where Ray puts them: the same function everywhere."""
    if settings.ray:
        _spread_with_ray(job, select, settings.processes)
    elif settings.processes > 1:
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=work, args=(job, select), kwargs={"process": place})
            for place in range(1, settings.processes)
        ]
        for process in others:
            process.start()
        try:
            work(job, select, progress)
        except BaseException:
            for process in others:
                process.terminate()
            raise
        finally:
            for process in others:
                process.join()
        if any(process.exitcode for process in others):
            raise TuneError("a process of the search ended early", where=str(job.work), remedy=_GO_ON)
    else:
        work(job, select, progress)


def _spread_with_ray(job: Job, select: Selection, processes: int) -> None:
    try:
        import ray
    except ImportError:
        raise TuneError("Ray is not installed", where="--ray", remedy="pip install ray, or use --processes") from None
    ray.init(ignore_reinit_error=True, logging_level="error")
    remote: Callable[..., Any] = ray.remote(work).remote
    ray.get([remote(job, select, process=place) for place in range(processes)])


def _report(
    job: Job, plan: Plan, shown: Sequence[Candidate], report: Selection, progress: Progress
) -> dict[int, dict[str, float]]:
    """Loss per domain on the report split, by number of the candidate; what an earlier run found is kept."""
    path = job.work / _REPORTED_FILE
    known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    bodies = job.bodies()
    mount = Mount(trust_remote_code=job.trust_remote_code)
    numbers = {candidate.number: candidate for candidate in shown if candidate.status != "refused"}
    for place, (number, candidate) in enumerate(numbers.items()):
        progress("report", place, len(numbers))
        if str(number) not in known:
            recipe = candidate_recipe(job.recipe, candidate.mixture)
            body = bodies.checkpoint(bodies.plan(recipe))
            model = mount.put(body, bodies.gates(body, recipe))
            tally = Tally()
            tally.add(model, report.domains, f"candidate {number}")
            known[str(number)] = tally.losses
            write_json(path, known)
    progress("report", len(numbers), len(numbers))
    return {number: known[str(number)] for number in numbers}


def _reference(
    job: Job, plan: Plan, splits: Mapping[str, Selection], progress: Progress
) -> dict[str, dict[str, dict[str, float]]]:
    """Per split and domain, the loss of the base and of the domain's own expert."""
    path = job.work / "reference.json"
    if path.exists():
        known: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text(encoding="utf-8"))
        return known
    found: dict[str, dict[str, dict[str, float]]] = {split: {"base": {}, "own": {}} for split in splits}
    base = plan.sources[0].folder

    def load(folder: Path) -> Any:
        return load_model(folder, trust_remote_code=job.trust_remote_code)

    model = load(base)
    for split, selection in splits.items():
        for domain in selection.domains:
            found[split]["base"][domain.name] = score_domain(model, domain, lambda _: None).loss
    for place, domain in enumerate(splits["select"].domains):
        progress("score the experts", place, len(splits["select"].domains))
        assert domain.expert is not None
        own = (
            model
            if job.recipe.experts[domain.expert].is_base
            else load_expert(base, plan.sources[1 + domain.expert].folder, load)
        )
        for split, selection in splits.items():
            text = next(each for each in selection.domains if each.name == domain.name)
            found[split]["own"][domain.name] = score_domain(own, text, lambda _: None).loss
    write_json(path, found)
    return found


def _texts(selection: Selection) -> dict[str, Any]:
    return {domain.name: dict(domain.record) for domain in selection.domains}
