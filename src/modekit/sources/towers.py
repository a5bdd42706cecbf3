"""Models that wrap a language model: its settings lie under `text_config`, and a vision tower or further heads beside it.

The language model is read as if it lay alone, by the names that its own class gives its tensors. transformers says which names
mean the same (`conversion_mapping`, which imports torch), and tests/sources/test_wrappers.py compares. A mixture may keep what
lies beside the language model (`output: {keep: wrapper}`): config.json is then the wrapper's, and inside modekit the language
model's settings lie open, as those of any mixture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.files.read import UNREADABLE, read_json
from modekit.run import Run
from modekit.sources.config import SAVE_AGAIN, Config, check_no_code, damaged_model, no_usable
from modekit.sources.families import own_family
from modekit.sources.family import Family, Stack
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, weight_of
from modekit.sources.tokenizer import copied_files

if TYPE_CHECKING:
    from modekit.sources.header import TensorRef
    from modekit.sources.source import ModelSource

WRAPPERS: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "mistral3": ("mistral", "ministral3"),
    "qwen3_5": ("qwen3_5_text",),
}
"""`model_type` of a wrapper -> those of the language models that it may hold; the first is meant where it says none."""
KEPT: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("vision_tower", "multi_modal_projector"),
    "gemma4": ("vision_tower", "embed_vision", "audio_tower", "embed_audio"),
    "mistral3": ("vision_tower", "multi_modal_projector"),
    "qwen3_5": ("visual",),
}
"""`model_type` of a wrapper -> what its class has beside the language model; the first two every model of the type has."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What AutoProcessor reads beside the tokenizer."""
_WRAPPED = frozenset(kind for kinds in WRAPPERS.values() for kind in kinds)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BOTH = (*_TOKENS, "dtype", "torch_dtype", "quantization_config")
"""Settings of a wrapper that are its language model's, too, where that says nothing else."""
_OF_BOTH = ("architectures", "auto_map", "dtype", "model_type", "modekit", "tie_word_embeddings")
"""Settings of a mixture with a wrapper that lie outside of text_config."""
_STACK = "model."
_OF_TEXT = (Stack().layers, f"{EMBEDDING}.", f"{FINAL_NORM}.", "language_model.", "model.language_model.")
"""What names of a language model begin with, in any naming."""
_AGAIN_OR_LEAVE = f"{SAVE_AGAIN}, or leave output.keep out"


@dataclass(frozen=True)
class Naming:
    """How a class names a language model: what the names of its stack begin with, and its head."""

    stack: str = _STACK
    head: str = HEAD

    def plain(self, name: str) -> str | None:
        """What the language model's own class calls a module or tensor; None for what is no part of it."""
        if name.startswith(self.stack):
            return _STACK + name.removeprefix(self.stack)
        head = next((head for head in (self.head, HEAD) if f"{name}.".startswith(f"{head}.")), None)
        return None if head is None else HEAD + name.removeprefix(head)

    def named(self, name: str) -> str:
        """What a module or tensor of the language model is called here."""
        if name.startswith(_STACK):
            return self.stack + name.removeprefix(_STACK)
        return self.head + name.removeprefix(HEAD) if f"{name}.".startswith(f"{HEAD}.") else name


PLAIN = Naming()
_NAMINGS = (Naming("model.language_model."), Naming("language_model.model.", "language_model.lm_head"))
"""Of wrappers: as their classes name their parts now, and as they did before transformers 4.52; many still save so."""


def naming_of(names: Iterable[str], *, where: str) -> Naming:
    """How tensors are named. Raises SourceError where those of one language model are named in two ways."""
    names = list(names)
    naming = next((each for each in _NAMINGS if any(name.startswith(each.stack) for name in names)), PLAIN)
    strange = next((name for name in names if naming.plain(name) is None and name.startswith(_OF_TEXT)), None)
    if naming is not PLAIN and strange is not None:
        what, expected = "the tensors of one language model are named in two ways", f"a name that begins with {naming.stack}"
        raise damaged_model(what, f"{where}: {strange}", expected=expected)
    return naming


def may_wrap(config: Config) -> bool:
    """Whether tensors may be named as a wrapper's: it is one, or a language model that may have been saved out of one."""
    return config.get("model_type") in {*WRAPPERS, *_WRAPPED}


def plain_names(tensors: Iterable[str], *, where: str) -> dict[str, str]:
    """Name of a tensor of the language model -> its name in the file. Raises SourceError where two mean the same."""
    tensors = list(tensors)
    naming = naming_of(tensors, where=where)
    found: dict[str, str] = {}
    for name in tensors:
        plain = naming.plain(name) if naming is not PLAIN else name
        if plain in found:
            both = f"{found[plain]} and {name}"
            raise damaged_model("two tensors of the model mean the same", f"{where}: {plain}", both)
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
        expected = "the settings of the language model that is wrapped"
        raise no_usable("text_config", inner, expected, f"{where}: config.json")
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
    defaults = own_family({"model_type": kind}, Family("")).defaults
    # Where the files hold a head, transformers keeps it, whatever the two configs say.
    return {**defaults, **both, **inner, "model_type": kind, "tie_word_embeddings": weight_of(HEAD) not in set(tensors)}


def kept_beside(source: ModelSource) -> dict[str, TensorRef]:
    """Tensors that a wrapper's class has beside the language model, by the names that it gives them in memory; others stay
    behind, such as a head that predicts further tokens. None of a model that wraps nothing.
    """
    named = {f"model.{name.removeprefix('model.')}": ref for name, ref in source.beside.items()}
    return {name: ref for name, ref in named.items() if is_in_tower(name, str((source.wrapper or {}).get("model_type")))}


def is_in_tower(name: str, wrapper: str | None) -> bool:
    """Whether a tensor of a mixture is what it keeps beside the language model, which no token of text passes."""
    return name.startswith(tuple(f"model.{part}." for part in KEPT.get(wrapper or "", ())))


def kept_settings(source: ModelSource) -> Config:
    """config.json of a wrapper without its language model's. Raises UnsupportedError where the base wraps nothing."""
    said = source.wrapper or {}
    if said.get("model_type") not in KEPT:
        raise UnsupportedError(
            "the base model wraps no language model, so there is no wrapper to keep",
            where=f"output.keep: {source.where}",
            found=source.config.get("model_type"),
            expected=", ".join(KEPT),
            remedy="give the whole model, vision tower and all, as base_model, or leave keep out",
        )
    if not isinstance(said.get("vision_config"), Mapping):
        expected, where = "the settings of the vision tower that is to be kept", f"{source.where}: config.json"
        raise no_usable("vision_config", said.get("vision_config"), expected, where, _AGAIN_OR_LEAVE)
    return {key: value for key, value in said.items() if key not in ("text_config", "torch_dtype", "_name_or_path")}


def processor_files(source: ModelSource, run: Run) -> tuple[Path, ...]:
    """What AutoProcessor reads beside the tokenizer. Raises SourceError for links out of the folder, and for code."""
    found = copied_files(source.folder, where=source.where, names=PROCESSOR_FILES)
    for file in found:
        place = f"{source.where}: {file.name}"
        try:
            said = read_json(file)
        except UNREADABLE as error:
            raise SourceError("the processor cannot be read", where=place, found=error, remedy=_AGAIN_OR_LEAVE) from None
        check_no_code(said if isinstance(said, dict) else {}, where=place, run=run)
    return found


def check_kept(sources: Sequence[ModelSource]) -> None:
    """Raise SourceError where a part of the base's tower is missing, MismatchError where an expert's has another shape."""
    kept, kind = kept_beside(sources[0]), str((sources[0].wrapper or {}).get("model_type"))
    lost = next((part for part in KEPT.get(kind, ())[:2] if not any(name.startswith(f"model.{part}.") for name in kept)), None)
    if lost is not None:
        what, where = "the vision tower is missing", f"{sources[0].where}: model.{lost}"
        raise SourceError(what, where=where, remedy=_AGAIN_OR_LEAVE)
    for expert in own_towers(sources):
        theirs = kept_beside(expert)
        for name, ref in kept.items():
            found = list(theirs[name].shape) if name in theirs else None
            if found != list(ref.shape):
                raise other_tower(expert, name, found, list(ref.shape))


def own_towers(sources: Sequence[ModelSource]) -> Iterator[ModelSource]:
    """The experts that have a tower of their own."""
    yield from (source for source in dict.fromkeys(sources[1:]) if source != sources[0] and kept_beside(source))


def other_tower(source: ModelSource, name: str, found: object, expected: object) -> MismatchError:
    """The error for an expert that sees otherwise than the base."""
    return MismatchError(
        "the expert's vision tower or projector is not the base model's, and all share one (output: {keep: wrapper})",
        where=f"{source.where}: {name}",
        found=found,
        expected=expected,
        remedy="fine-tune with both frozen, leave output.keep out, or load it with AutoModelForCausalLM and save that: its "
        "language model is mixed, behind the base's tower",
    )


def with_wrapper(text: Config, settings: Config | None) -> Config:
    """config.json of a mixture by its open settings, and those of the wrapper that it keeps."""
    if settings is None:
        return text
    shared = {key: text[key] for key in text if key in _OF_BOTH or (key in _TOKENS and key in settings)}
    inner = {key: value for key, value in text.items() if key not in ("architectures", "auto_map", "modekit")}
    said = text["modekit"]
    assert isinstance(said, Mapping)  # a mixture's
    return {**settings, **shared, "text_config": {**inner, "model_type": said["dense_type"]}}


def without_wrapper(config: Config) -> tuple[Config, Config | None]:
    """The open settings of a mixture by its config.json, and those of the wrapper; None without one."""
    said, inner = config.get("modekit"), config.get("text_config")
    if not (isinstance(said, Mapping) and "wrapper" in said and isinstance(inner, Mapping)):
        return config, None
    settings = {key: value for key, value in config.items() if key not in (*_OF_BOTH, "text_config")}
    return {**inner, **{key: config[key] for key in _OF_BOTH if key in config}}, settings
