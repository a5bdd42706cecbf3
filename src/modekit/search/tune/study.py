"""The search itself: trials of a sampler, each a candidate that is scored rung by rung and dropped when others do better.

Everything it knows stands in WORK/study.log, which several processes may append to and a killed search goes on from.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState
from transformers import PreTrainedModel

from modekit.errors import MismatchError, ModekitError, RecipeError, TuneError, UnsupportedError
from modekit.files.read import parse_json
from modekit.files.typed import shortened
from modekit.files.write import go_on_writing
from modekit.planning.plan import Plan
from modekit.recipes.edit import as_written, with_mixture
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.run import QUIET, Run
from modekit.search.tune.results import Candidate, Mixture, mean_of
from modekit.search.tune.selection import RUNGS, Selection, losses_of
from modekit.search.tune.shared_weights import SharedWeights, SwitchedModel
from modekit.search.tune.space import Space

_STUDY_FILE = "study.log"
OWN = "the recipe's own"
_SAME_AGAIN = 40  # choices in a row that were tried before: the space is used up, or nearly
_STATES: dict[TrialState, Literal["scored", "dropped", "refused"]] = {
    TrialState.COMPLETE: "scored",
    TrialState.PRUNED: "dropped",
    TrialState.FAIL: "refused",
}
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def damaged(path: Path, error: Exception) -> TuneError:
    """The error of a file that a search left in its folder, and that cannot be read."""
    return TuneError(
        "what a search left is damaged",
        where=str(path),
        found=shortened(error) or type(error).__name__,
        remedy=f"remove the folder {path.parent.name} to start over",
    )


@dataclass(frozen=True)
class SearchJob:
    """What every process of a search needs to know; all of it can be sent to another machine.

    `native`: whether a candidate that a native architecture says is built in one.
    """

    recipe: Recipe
    root: Path
    work: Path
    space: Space
    native: bool
    trials: int
    seed: int
    trust_remote_code: bool

    @property
    def run(self) -> Run:
        """For what reads models; a worker tells of whole candidates itself."""
        return Run(self.trust_remote_code)

    def weights(self) -> SharedWeights:
        """What candidates share."""
        return SharedWeights(self.work, self.root, averages=self.space.averages(), run=self.run)


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, Optuna says nothing but errors."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _damage_reported(job: SearchJob) -> Iterator[None]:
    """Raise TuneError for what reading a journal raises that is not one (optuna: whatever comes)."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise damaged(job.work / _STUDY_FILE, error) from None


def open_study(job: SearchJob, process: int = 0) -> optuna.Study:
    """The study in the work folder, made if need be. Processes draw from different seeds, and so does a search that goes on."""
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = str(job.work / _STUDY_FILE)
        # The other kind of lock is a symbolic link, which Windows gives to administrators alone.
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=RUNGS[0], reduction_factor=RUNGS[1] // RUNGS[0])
        with _damage_reported(job):
            storage = JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))
            study = optuna.create_study(
                study_name="modekit", storage=storage, pruner=pruner, load_if_exists=True, direction="minimize"
            )
        seed = int(np.random.SeedSequence([job.seed, process, len(study.get_trials(deepcopy=False))]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=12, constant_liar=True)
    return study


@_quiet()
def prepare(job: SearchJob) -> None:
    """Put the named variants first; what a killed process was at is tried again. Called once, before any process works."""
    _mend(job.work / _STUDY_FILE)
    study = open_study(job)
    named = job.space.named()
    cut_short = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
    for trial in cut_short:
        study.tell(trial.number, state=TrialState.FAIL)
        name = trial.user_attrs.get("name", "")
        if name != OWN:
            study.enqueue_trial(named.get(name, trial.params), user_attrs={"name": name})
    cut_off = {trial.number for trial in cut_short}
    known = {trial.user_attrs.get("name") for trial in study.get_trials(deepcopy=False) if trial.number not in cut_off}
    if OWN not in known and job.recipe.mixture.model_fields_set:
        own = json.dumps(job.recipe.mixture.model_dump(mode="json", exclude_unset=True))
        study.enqueue_trial({}, user_attrs={"name": OWN, "mixture": own})
    for name, choice in named.items():
        if name not in known:
            study.enqueue_trial(choice, user_attrs={"name": name})


def _mend(path: Path) -> None:
    """Cut off the line that a full disk or a power loss left unfinished: the journal could not be read with it."""
    try:
        with go_on_writing(path) as stream:
            data = stream.readall()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                stream.truncate(whole)
    except FileNotFoundError:
        return
    except OSError as error:
        raise damaged(path, error) from None


@_quiet()
def work(job: SearchJob, selection: Selection, run: Run = QUIET, *, process: int = 0) -> None:
    """Try candidates until there are `trials` of them. Any number of processes may do so at once."""
    study = open_study(job, process)
    worker = _Worker(job, study, selection, job.weights(), SwitchedModel(run=job.run))
    again = 0
    while again < _SAME_AGAIN:
        if is_done(job, study, run):
            return
        again = 0 if worker.try_one(study.ask()) else again + 1


def is_done(job: SearchJob, study: optuna.Study, run: Run) -> bool:
    """Whether there are as many candidates as were asked for; says how many there are."""
    trials = study.get_trials(deepcopy=False)
    distinct = len([trial for trial in trials if _counts(trial)])
    waiting = len([trial for trial in trials if trial.state == TrialState.WAITING])
    run.progress("search", distinct, max(job.trials, distinct + waiting))
    return distinct >= job.trials and not waiting


@dataclass(frozen=True)
class _Worker:
    """What one process scores candidates with."""

    job: SearchJob
    study: optuna.Study
    selection: Selection
    weights: SharedWeights
    switched: SwitchedModel

    def try_one(self, trial: optuna.Trial) -> bool:
        """Score one candidate; False when it was tried before."""
        started = time.perf_counter()
        mixture = _mixture_of(self.job, trial)
        key = json.dumps(mixture, sort_keys=True)
        trials = self.study.get_trials(deepcopy=False)
        earlier = next((each for each in trials if each.user_attrs.get("key") == key and _counts(each)), None)
        if earlier is not None:
            trial.set_user_attr("again", earlier.number)
            state = earlier.state if earlier.state in _DONE else TrialState.FAIL  # refused, or another process is at it
            self.study.tell(trial, earlier.value if state == TrialState.COMPLETE else None, state=state)
            return False
        trial.set_user_attr("key", key)
        try:
            recipe = candidate_recipe(self.job.recipe, mixture)
            plan = self.weights.plan(recipe)
        except (RecipeError, UnsupportedError, MismatchError) as error:
            return self._refuse(trial, error)
        is_native = self.job.native and not recipe.beyond_native()
        for attribute, value in (*plan.parameters().items(), ("native", is_native)):
            if attribute in {"active", "total", "native"}:
                trial.set_user_attr(attribute, value)
        model = self._model(recipe, plan)
        try:
            loss = self._score(trial, model)
        except TuneError as error:
            return self._refuse(trial, error)
        trial.set_user_attr("seconds", round(time.perf_counter() - started, 3))
        self.study.tell(trial, loss, state=TrialState.PRUNED if loss is None else TrialState.COMPLETE)
        return True

    def _refuse(self, trial: optuna.Trial, error: ModekitError) -> bool:
        trial.set_user_attr("why", str(error))
        self.study.tell(trial, state=TrialState.FAIL)
        return True

    def _model(self, recipe: Recipe, plan: Plan) -> PreTrainedModel:
        shared = self.weights.checkpoint(plan)
        fit = recipe.mixture.fit
        if fit is not None and fit.reads.hidden and not self.weights.statistics_of(recipe, recipe.mixture.router).exists():
            self.switched.clear()  # text is run through a model of its own first
        return self.switched.put(shared, self.weights.gates(shared, recipe))

    def _score(self, trial: optuna.Trial, model: PreTrainedModel) -> float | None:
        """Mean loss on all of the text; None when others did better on a part. Raises TuneError when it is not a number."""
        sums, tokens = Counter[str](), Counter[str]()
        for number, resource in enumerate(RUNGS):
            rung = self.selection.rung(number)
            found = losses_of(model, rung, f"candidate {trial.number}")
            tokens.update({domain.name: domain.scored_tokens for domain in rung})
            sums.update({domain.name: found[domain.name] * domain.scored_tokens for domain in rung})
            losses = {name: total / tokens[name] for name, total in sums.items()}
            trial.report(mean_of(losses), resource)
            trial.set_user_attr("losses", losses)
            trial.set_user_attr("tokens", tokens.total())
            if resource < RUNGS[-1] and trial.should_prune():
                return None
        return mean_of(losses)


def _mixture_of(job: SearchJob, trial: optuna.Trial) -> Mixture:
    """What a trial is about: the recipe's own mixture, or a choice along the axes."""
    if "mixture" in trial.user_attrs:
        return dict(json.loads(trial.user_attrs["mixture"]))

    def ask(axis: str, labels: Sequence[str]) -> str:
        return labels[0] if len(labels) == 1 else str(trial.suggest_categorical(axis, list(labels)))

    return job.space.mixture(job.space.choose(ask), job.recipe)


@_quiet()
def candidates(job: SearchJob) -> list[Candidate]:
    """What was tried, each once, in the order of the search."""
    with _damage_reported(job):
        trials = open_study(job).get_trials(deepcopy=False)
        again = [trial.user_attrs for trial in trials if _is_again(trial)]
        names = {each["again"]: each["name"] for each in again if each.get("name")}
        return [_candidate(trial, names) for trial in trials if trial.state in _STATES and _counts(trial)]


def _candidate(trial: optuna.trial.FrozenTrial, names: Mapping[int, str]) -> Candidate:
    kept = {**trial.user_attrs, "name": trial.user_attrs.get("name") or names.get(trial.number) or ""}
    mixture = parse_json(kept.pop("key"))
    return Candidate.model_validate({**kept, "number": trial.number, "mixture": mixture, "status": _STATES[trial.state]})


def candidate_recipe(recipe: Recipe, mixture: Mixture) -> Recipe:
    """The recipe with another mixture. Raises RecipeError."""
    return parse_recipe(with_mixture(as_written(recipe), mixture), where="candidate")


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial is one candidate, in work or done; those that a kill cut short are not."""
    cut_short = trial.state == TrialState.FAIL and "why" not in trial.user_attrs
    return trial.state != TrialState.WAITING and not cut_short and not _is_again(trial)


def _is_again(trial: optuna.trial.FrozenTrial) -> bool:
    return "again" in trial.user_attrs
