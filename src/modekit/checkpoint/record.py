"""modekit.json: what a mixture was made from, how its router was set, and what was trained since."""

from __future__ import annotations

from operator import not_
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from modekit.files.marker import STATISTICS
from modekit.files.typed import Count, Digest, Number, PlainName, RelativePath, Spec, as_kind
from modekit.planning.carry import CarrySize
from modekit.recipes.edit import as_written
from modekit.recipes.mixture import Router
from modekit.recipes.recipe import Recipe

RECORD_FILE = "modekit.json"
STATISTICS_FOLDER = STATISTICS


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A source file as it was when it was read."""

    size: Count
    blake3: Digest


class SourceRecord(_Record):
    """A model that the mixture was made from; `folder` is relative to the checkpoint.

    `config` is the digest of its settings. `packed` is `ModelSource.packed`.
    """

    label: str
    spec: Spec
    revision: str | None
    folder: RelativePath
    files: dict[PlainName, FileRecord]
    config: Digest = ""
    packed: str = Field("", exclude_if=not_)

    @property
    def digests(self) -> list[str]:
        """What changes with its weights and settings."""
        return [self.config, *(file.blake3 for _, file in sorted(self.files.items()))]


class RouterRecord(_Record):
    """How the router was set."""

    status: Literal["unfitted", "fitted", "trained"]
    settings: Router | None
    sha256: Digest
    text: dict[str, dict[str, Any]]
    report: dict[str, Any]

    @property
    def evidence(self) -> str:
        """sha256 of the columns of the embedding that carry it; empty where none do."""
        return str(self.report.get("evidence_sha256", ""))

    @classmethod
    def unfitted(cls, recipe: Recipe, sha256: str = "") -> RouterRecord:
        """Of a router whose gates the recipe alone gives: fixed weights have no settings."""
        settings = None if recipe.mixture.method == "linear" else recipe.mixture.router
        return cls(status="unfitted", settings=settings, sha256=sha256, text={}, report={})


class CarryRecord(CarrySize):
    """What a native checkpoint carries, and the sha256 of the file that keeps how (checkpoint/carried.py)."""

    sha256: Digest = ""


class _Shown(BaseModel):
    """What pages and cards say of a training's settings; later versions may have others."""

    what: list[str] = []
    losses: dict[str, Number] = {}
    generic: list[str] = []
    teacher: str | None = None


class TokensRecord(_Record):
    """Whose tokens a mixture of models with different vocabularies has: the place of their model in `sources`, the ids at which
    a text may end (empty: as the base says), and the files beside the weights that were made of several models'.
    """

    tokenizer: Count
    eos: list[Count] = []
    written: list[PlainName] = []


class TrainingRecord(_Record):
    """One run of `modekit train`: its settings, what of each domain was read, how many parameters moved, what it took, and
    held-out losses (select split) per domain, before and after.
    """

    settings: Annotated[dict[str, Any], AfterValidator(lambda settings: as_kind(settings, _Shown) and settings)]
    text: dict[str, dict[str, Any]]
    parameters: Count
    steps: Count
    tokens: Count
    select_loss: dict[str, dict[str, float]]
    notes: list[str]


class Change(_Record):
    """An expert that came, went or was replaced after the build: the day, as YYYY-MM-DD, and the models before and after."""

    what: Literal["add", "remove", "replace"]
    expert: str
    on: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    was: str | None = None
    source: str | None = None

    @property
    def said(self) -> str:
        """In words."""
        if self.what == "remove":
            return f"{self.expert} was removed ({self.was})"
        if self.what == "replace":
            return f"{self.expert} was replaced: {self.source}, in the place of {self.was}"
        return f"{self.expert} was added: {self.source}"


class MixtureRecord(_Record):
    """modekit.json.

    Of the recipe it has what the user set: a default that has no effect is fine unsaid, and an
    error when said. `carry` says what besides FFN experts a native checkpoint carries. `trained`
    names the tensors, gates aside, that a training moved, with the blake3 of their bytes. `history`
    has who came and went since the build.
    """

    format: Literal[1]
    modekit_version: str
    recipe: Annotated[Recipe, PlainSerializer(as_written)]
    recipe_digest: Digest
    recipe_folder: RelativePath
    dense_config: dict[str, Any]
    native_type: str | None
    dense_parameters: Annotated[Count, Field(ge=1)]
    expert_sources: list[int]
    sources: list[SourceRecord] = Field(min_length=1)
    router: RouterRecord
    carry: CarryRecord | None = Field(None, exclude_if=not_)
    trained: dict[str, str] = {}
    training: list[TrainingRecord] = []
    history: list[Change] = Field([], exclude_if=not_)
    tokens: TokensRecord | None = Field(None, exclude_if=not_)

    @property
    def pinned_recipe(self) -> Recipe:
        """The recipe at the commits that its models on the hub had."""
        base, *commits = (self.sources[place].revision for place in (0, *self.expert_sources))
        pairs = zip(self.recipe.experts, commits, strict=True)
        pinned = [each.model_copy(update={"revision": said}) if said and not each.is_base else each for each, said in pairs]
        return self.recipe.model_copy(update={"revision": base or self.recipe.revision, "experts": pinned})

    @model_validator(mode="after")
    def _experts_have_sources(self) -> MixtureRecord:
        numbers = self.expert_sources
        if len(numbers) != len(self.recipe.experts) or not all(0 <= number < len(self.sources) for number in numbers):
            raise ValueError("expert_sources must name a source for every expert")
        if self.tokens is not None and self.tokens.tokenizer >= len(self.sources):
            raise ValueError("tokens.tokenizer must name a source")
        if len(self.sources) > 1 + len(numbers):
            raise ValueError("sources must be the base model's and the experts', each once")
        return self
