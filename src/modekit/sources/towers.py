"""Models that wrap a language model: its settings lie under `text_config`, and a vision tower or further heads beside it.

The language model is read as if it lay alone, by the names that its own class gives its tensors. transformers says which names
mean the same (`conversion_mapping`, which imports torch), and tests/sources/test_wrappers.py compares. What lies beside the
language model stays behind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modekit.errors import UnsupportedError
from modekit.sources.config import Config, damaged_model, no_usable
from modekit.sources.families import row_of
from modekit.sources.names import HEAD, weight_of

if TYPE_CHECKING:
    from modekit.sources.source import ModelSource

WRAPPERS: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "mistral3": ("mistral", "ministral3"),
    "qwen3_5": ("qwen3_5_text",),
}
"""`model_type` of a wrapper -> those of the language models that it may hold; the first is meant where it says none."""
_BOTH = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""Settings of a wrapper that are its language model's, too, where that says nothing else."""
_STACK = "model."


@dataclass(frozen=True)
class Naming:
    """How a class names a language model: what the names of its stack begin with, and its head."""

    stack: str = _STACK
    head: str = HEAD

    def plain(self, name: str) -> str | None:
        """What the language model's own class calls a module or tensor; None for what is no part of it."""
        if self.stack == _STACK:
            return name
        if name.startswith(self.stack):
            return _STACK + name.removeprefix(self.stack)
        head = next((head for head in (self.head, HEAD) if f"{name}.".startswith(f"{head}.")), None)
        return None if head is None else HEAD + name.removeprefix(head)

    def named(self, name: str) -> str:
        """What a module or tensor of the language model is called here."""
        if name.startswith(_STACK):
            return self.stack + name.removeprefix(_STACK)
        return self.head + name.removeprefix(HEAD) if f"{name}.".startswith(f"{HEAD}.") else name


_NAMINGS = (Naming("model.language_model."), Naming("language_model.model.", "language_model.lm_head"))
"""Of wrappers: as their classes name their parts now, and as they did before transformers 4.52; many still save so."""


def naming_of(names: Collection[str]) -> Naming:
    """How tensors are named."""
    return next((each for each in _NAMINGS if any(name.startswith(each.stack) for name in names)), Naming())


def may_wrap(config: Config) -> bool:
    """Whether tensors may be named as a wrapper's: it is one, or a language model that may have been saved out of one."""
    return any(config.get("model_type") in (wrapper, *held) for wrapper, held in WRAPPERS.items())


def unwrapped(source: ModelSource) -> ModelSource:
    """The language model in files that may be a wrapper's. Raises SourceError, or UnsupportedError, where it cannot be read."""
    config = source.config
    tensors = source.tensors
    if not may_wrap(config):
        return source
    names = plain_names(tensors, where=source.where)
    wraps = config["model_type"] in WRAPPERS
    own = {name: replace(tensors[named], name=name) for name, named in names.items()}
    text = text_config(config, own, where=source.where) if wraps else config
    beside = {name: tensors[name] for name in tensors.keys() - set(names.values())}
    if not wraps and own.keys() == tensors.keys():
        return source
    return replace(source, config=text, tensors=own, wrapper=config, beside=beside)


def plain_names(tensors: Iterable[str], *, where: str) -> dict[str, str]:
    """Name of a tensor of the language model -> its name in the file. Raises SourceError where two mean the same."""
    tensors = list(tensors)
    naming = naming_of(tensors)
    found: dict[str, str] = {}
    for name in tensors:
        plain = naming.plain(name)
        if plain in found:
            raise damaged_model(
                "two tensors of the model mean the same",
                f"{where}: {plain}",
                f"{found[plain]} and {name}",
            )
        if plain is not None:
            found[plain] = name
    return found


def text_config(config: Config, tensors: Iterable[str], *, where: str) -> Config:
    """Settings of a wrapper's language model, with its row's defaults written out; `tensors` are the language model's.

    Raises SourceError where there are none, UnsupportedError for a language model that the wrapper is not read with.
    """
    kinds = WRAPPERS[str(config["model_type"])]
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        raise no_usable(
            "text_config",
            inner,
            "the settings of the language model that is wrapped",
            f"{where}: config.json",
        )
    kind = inner.get("model_type", kinds[0]) if len(kinds) > 1 else kinds[0]  # the class of one kind does not ask
    if kind not in kinds:
        raise UnsupportedError(
            f"a '{config['model_type']}' model that wraps a model of this family cannot be mixed",
            where=f"{where}: config.json: text_config",
            found=kind,
            expected=" or ".join(kinds),
            remedy="give the language model alone, as its own class saves it",
        )
    both = {key: config[key] for key in _BOTH if key in config}
    row = row_of({"model_type": kind})
    defaults = {} if row is None else row.defaults
    # Where the files hold a head, transformers keeps it, whatever the two configs say.
    return {**defaults, **both, **inner, "model_type": kind, "tie_word_embeddings": weight_of(HEAD) not in set(tensors)}
