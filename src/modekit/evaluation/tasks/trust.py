"""What a stranger's task file may say: keys that are understood, and names that the installed harness has built in.

All else is refused, since the harness imports a metric that it does not know from the hub, hands `generation_kwargs` to
`generate` (which runs code for `custom_generate`), unpickles some data sets, opens prompt files anywhere, and gives `metadata`
of a group to the code of its own tasks. Patterns and templates are bounded where they run (`bounded.py`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from modekit.errors import ModekitError
from modekit.files.typed import Label, must_be, problem_said, shortened
from modekit.sources.patterns import bounded

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_REMEDY = "correct the file; or read the whole folder, and give --trust-remote-code if all of it may run"
_WITH_CODE = {"custom"}  # filters of the harness that are nothing without a function


def _named(kind: str) -> AfterValidator:
    """A check that a name is one of those that the harness has, asked for only when there is one to check."""

    def check(name: str) -> str:
        known = sorted(_known(kind))
        if name not in known:
            raise ValueError(f"one of the harness's {kind}s: {', '.join(known)}")
        return name

    return AfterValidator(check)


def _known(kind: str) -> Iterable[str]:
    """What the harness has of a kind of thing."""
    import lm_eval.api.metrics
    import lm_eval.filters  # noqa: F401  fills the registry
    from lm_eval.api import registry
    from lm_eval.api.samplers import SAMPLER_REGISTRY
    from lm_eval.prompts import PROMPT_REGISTRY

    found: dict[str, Iterable[str]] = {
        "metric": registry.metric_registry.keys(),
        "aggregation": registry.aggregation_registry.keys(),
        "filter": set(registry.filter_registry.keys()) - _WITH_CODE,
        "sampler": SAMPLER_REGISTRY,
        "prompt": [f"{group}:{name}" for group, prompts in PROMPT_REGISTRY.items() for name in prompts],
    }
    return found[kind]


def _pattern(pattern: str) -> str:
    bounded(pattern)
    return pattern


_Metric = Annotated[str, _named("metric")]
_Aggregation = Annotated[str, _named("aggregation")]
_Filter = Annotated[str, _named("filter")]
_Sampler = Annotated[str, _named("sampler")]
_Prompt = Annotated[str, _named("prompt")]
_Pattern = Annotated[str, AfterValidator(_pattern)]
_Name = Annotated[Label, Field(min_length=1)]
_NAME = re.compile(r"[\w. -]{1,200}")
_Split = Annotated[
    str, must_be("a name of letters, digits, points, blanks and dashes", lambda name: _NAME.fullmatch(name) is not None)
]
_Template = Annotated[str, StringConstraints(max_length=100_000)]
_Text = Annotated[str, StringConstraints(max_length=10_000)]
_Scalar = str | int | float | bool | None
_Row = dict[str, _Scalar | list[_Scalar]]
_Answer = _Template | int | list[_Template]
_Choices = _Template | list[_Template] | dict[str, _Template]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MetricEntry(_Strict):
    """One of `metric_list`."""

    metric: _Metric
    aggregation: _Aggregation | None = None
    higher_is_better: bool | None = None
    hf_evaluate: Literal[False] = False
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: list[_Pattern] | None = Field(None, max_length=20)


class FilterEntry(BaseModel):
    """One step of a filter: a name, and what the filter of that name takes."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, _Scalar | list[str] | dict[str | int, _Scalar]]

    function: _Filter

    @model_validator(mode="after")
    def _check_settings(self) -> FilterEntry:
        from lm_eval.api.registry import get_filter

        known = set(inspect.signature(get_filter(self.function)).parameters) - {"kwargs", "path"}
        known |= {"k"} if self.function == "take_first_k" else set()
        for key, value in self.__pydantic_extra__.items():
            if key not in known:
                raise ValueError(f"{key} is no setting of {self.function}, which takes {', '.join(sorted(known)) or 'none'}")
            for pattern in value if isinstance(value, list) else [value]:
                if "regex" in key and pattern is not None:
                    bounded(str(pattern))
        return self


class FilterPipeline(_Strict):
    """One of `filter_list`."""

    name: _Name
    filter: list[FilterEntry] = Field(max_length=20)


class Generation(_Strict):
    """`generation_kwargs`: what decides on the text, and nothing else of what `generate` takes."""

    until: _Text | list[_Text] = Field("", max_length=50)
    max_gen_toks: int = Field(256, ge=1, le=4_096)
    do_sample: bool = False
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(50, ge=0, le=10_000)
    num_beams: int = Field(1, ge=1, le=8)


class Fewshot(_Strict):
    """`fewshot_config`."""

    sampler: _Sampler = "default"
    split: _Split | None = None
    samples: list[_Row] | None = Field(None, max_length=1_000)
    fewshot_indices: list[int] | None = Field(None, max_length=1_000)
    doc_to_text: _Template | None = None
    doc_to_target: _Answer | None = None
    doc_to_choice: _Choices | None = None
    gen_prefix: _Template | None = None
    fewshot_delimiter: _Text | None = None
    target_delimiter: _Text | None = None


class Overrides(_Strict):
    """How items are asked and scored. A group may say it of the tasks in it, the harness's own ones among them."""

    output_type: Literal["loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice"] = "generate_until"
    training_split: _Split | None = None
    validation_split: _Split | None = None
    test_split: _Split | None = None
    fewshot_split: _Split | None = None
    doc_to_text: _Template | int | None = None
    doc_to_target: _Answer | None = None
    doc_to_choice: _Choices | None = None
    use_prompt: _Prompt | None = None
    description: _Template = ""
    target_delimiter: _Text = " "
    fewshot_delimiter: _Text = "\n\n"
    fewshot_config: Fewshot | None = None
    gen_prefix: _Template | None = None
    num_fewshot: int | None = Field(None, ge=0, le=100)
    metric_list: list[MetricEntry] | None = Field(None, min_length=1, max_length=50)
    generation_kwargs: Generation | None = None
    repeats: int = Field(1, ge=1, le=64)
    filter_list: list[FilterPipeline] | None = Field(None, min_length=1, max_length=20)
    should_decontaminate: bool = False
    doc_to_decontamination_query: _Template | None = None
    unsafe_code: Literal[False] = False
    task_alias: _Name | None = None


class DataKwargs(_Strict):
    """`dataset_kwargs`: files beside the task, and how they are read."""

    data_files: str | list[str] | dict[str, str | list[str]]
    field: _Split | None = None
    delimiter: Annotated[str, StringConstraints(min_length=1, max_length=1)] | None = None
    column_names: list[_Split] | None = None
    trust_remote_code: Literal[False] = False


class TaskFile(Overrides):
    """A file with one task."""

    task: _Name
    tag: _Name | list[_Name] | None = None
    dataset_path: Literal["json", "csv", "text"]  # loaders of plain text: nothing runs, unpacks or is fetched
    dataset_name: _Split | None = None
    dataset_kwargs: DataKwargs
    metadata: dict[str, _Scalar | list[_Scalar] | dict[str, _Scalar]] | None = None


class GroupMember(Overrides):
    """A task of a group, asked otherwise than its file says."""

    task: _Name


class GroupMetric(_Strict):
    """One of `aggregate_metric_list`."""

    metric: _Metric
    aggregation: Literal["mean"] = "mean"
    weight_by_size: bool = True
    filter_list: _Name | list[_Name] | None = None


class GroupFile(Overrides):
    """A file with one group of tasks that have files of their own."""

    group: _Name
    group_alias: _Name | None = None
    task: list[_Name | GroupMember] = Field(min_length=1, max_length=1_000)
    tag: _Name | list[_Name] | None = None
    aggregate_metric_list: GroupMetric | list[GroupMetric] | None = None
    metadata: dict[str, _Scalar] | None = None


_NESTED: Mapping[str, type[BaseModel]] = {
    "metric_list": MetricEntry,
    "filter_list": FilterPipeline,
    "generation_kwargs": Generation,
    "fewshot_config": Fewshot,
    "dataset_kwargs": DataKwargs,
    "aggregate_metric_list": GroupMetric,
    "task": GroupMember,
}
_KEY = re.compile(r"[a-z]+(_[a-z]+)*")
_TYPES = {"str", "int", "float", "bool", "none"}


def check_config(config: Mapping[str, object], where: Path) -> None:
    """Raise ModekitError when a task file, with what it includes, says anything that is not known to be harmless."""
    kind: type[TaskFile] | type[GroupFile] = GroupFile if "group" in config else TaskFile
    try:
        kind.model_validate(dict(config))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        worst = max(problems, key=lambda problem: len(problem["loc"]))  # of a choice of kinds, the one that was meant
        raise _refusal(kind, worst, where) from None


def refusal(where: Path, found: str, expected: str) -> ModekitError:
    """The error of a file in a folder of tasks: what stands there, and what may."""
    return ModekitError(
        "a task file asks for more than data and what the harness has built in",
        where=f"--include-path: {where}",
        found=found,
        expected=expected,
        remedy=_REMEDY,
    )


def _refusal(kind: type[BaseModel], problem: ErrorDetails, where: Path) -> ModekitError:
    place, unknown = problem["loc"], problem["type"] == "extra_forbidden"
    inner = [_NESTED[str(part)] for part in place[:-1] if part in _NESTED]
    expected = shortened(problem_said(str(problem["msg"])))
    if unknown:
        expected = f"one of the keys {', '.join((inner[-1] if inner else kind).model_fields)}"
    said = [part for part in place if isinstance(part, int) or (_KEY.fullmatch(part) and part not in _TYPES)]
    key = ".".join(map(str, [*said[: -1 if said[-1:] == [place[-1]] else None], place[-1]] if unknown else said))
    return refusal(where, f"{key}: {shortened(repr(problem['input']))}", expected)
