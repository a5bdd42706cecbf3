"""What a mixture keeps of a base that wraps a language model (`output: {keep: wrapper}`): tower, settings, processor.

config.json of such a mixture is the wrapper's; the language model's settings lie under `text_config`, as there. Inside
modekit they lie open, as those of any mixture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.files.read import UNREADABLE, read_json
from modekit.run import Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.family import SAVE_AGAIN, Config, no_usable
from modekit.sources.model import ModelSource, TensorRef
from modekit.sources.model_config import check_no_code
from modekit.sources.tokenizer import copied_files

KEPT: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("vision_tower", "multi_modal_projector"),
    "gemma4": ("vision_tower", "embed_vision", "audio_tower", "embed_audio"),
    "mistral3": ("vision_tower", "multi_modal_projector"),
    "qwen3_5": ("visual",),
}
"""`model_type` of a wrapper -> what its class has beside the language model."""
_ALWAYS = 2
"""Parts that every model of the type has; others only with settings of their own."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What AutoProcessor reads beside the tokenizer."""
_OF_BOTH = ("architectures", "auto_map", "dtype", "model_type", "modekit", "tie_word_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NUMBERED = re.compile(r"^(.*?)\.([0-9]{1,9})\.(.+)$")
_AGAIN_OR_LEAVE = f"{SAVE_AGAIN}, or leave output.keep out"
_SAVE_TEXT = "load it with AutoModelForCausalLM and save that: its language model is mixed, behind the base's tower"


def kept_beside(source: ModelSource) -> dict[str, TensorRef]:
    """Tensors that a wrapper's class has beside the language model, by the names that it gives them in memory; others stay
    behind, such as a head that predicts further tokens. None of a model that wraps nothing.
    """
    parts = KEPT.get(str((source.wrapper or {}).get("model_type")), ())
    named = {f"model.{name.removeprefix('model.')}": ref for name, ref in source.beside.items()}
    return {name: ref for name, ref in named.items() if name.split(".")[1] in parts}


def is_in_tower(name: str, wrapper: str | None) -> bool:
    """Whether a tensor of a mixture is what it keeps beside the language model, which no token of text passes."""
    return name.startswith(tuple(f"model.{part}." for part in KEPT.get(wrapper or "", ())))


def kept_settings(source: ModelSource) -> Config:
    """config.json of a wrapper without its language model's. Raises UnsupportedError where the base wraps nothing."""
    said, where = source.wrapper or {}, source.where
    kind = str(said.get("model_type"))
    if kind not in KEPT:
        raise UnsupportedError(
            "the base model wraps no language model, so there is no wrapper to keep",
            where=f"output.keep: {where}",
            found=source.config.get("model_type"),
            expected=", ".join(KEPT),
            remedy="give the whole model, vision tower and all, as base_model, or leave keep out",
        )
    if not isinstance(said.get("vision_config"), Mapping):
        expected = "the settings of the vision tower that is to be kept"
        raise no_usable("vision_config", said.get("vision_config"), expected, f"{where}: config.json", _AGAIN_OR_LEAVE)
    return {key: value for key, value in said.items() if key not in ("text_config", "torch_dtype", "_name_or_path")}


def processor_files(source: ModelSource, run: Run) -> tuple[Path, ...]:
    """What AutoProcessor reads beside the tokenizer. Raises SourceError for links out of the folder, and for code."""
    where = source.where
    found = copied_files(source.folder, where=where, names=PROCESSOR_FILES)
    for file in found:
        try:
            said = read_json(file)
            check_no_code(said if isinstance(said, dict) else {}, where=f"{where}: {file.name}", run=run)
        except UNREADABLE as error:
            place = f"{where}: {file.name}"
            raise SourceError("the processor cannot be read", where=place, found=error, remedy=_AGAIN_OR_LEAVE) from None
    return found


def check_kept(sources: Sequence[ModelSource]) -> None:
    """Raise SourceError where a part of the base's tower is missing, MismatchError where an expert's has another shape."""
    base, kept = sources[0], kept_beside(sources[0])
    lost = next(_lost_of(base.wrapper or {}, kept), None)
    if lost is not None:
        raise SourceError(
            "a tensor of the vision tower is missing",
            where=f"{base.where}: {lost}",
            found=f"{len(kept)} tensors beside the language model",
            remedy=_AGAIN_OR_LEAVE,
        )
    for expert in own_towers(sources):
        theirs = kept_beside(expert)
        wrong = next((name for name in kept if name not in theirs or theirs[name].shape != kept[name].shape), None)
        if wrong is not None:
            raise other_tower(expert, wrong, list(theirs[wrong].shape) if wrong in theirs else None, list(kept[wrong].shape))


def own_towers(sources: Sequence[ModelSource]) -> Iterator[ModelSource]:
    """The full models among experts that have a tower of their own."""
    for source in dict.fromkeys(sources[1:]):
        if source != sources[0] and not isinstance(source, AdapterSource) and kept_beside(source):
            yield source


def other_tower(source: ModelSource, name: str, found: object, expected: object) -> MismatchError:
    """The error for an expert that sees otherwise than the base."""
    return MismatchError(
        "the expert's vision tower or projector is not the base model's, and all share one (output: {keep: wrapper})",
        where=f"{source.where}: {name}",
        found=found,
        expected=expected,
        remedy=f"fine-tune with both frozen, leave output.keep out, or {_SAVE_TEXT}",
    )


def _lost_of(settings: Config, kept: Mapping[str, TensorRef]) -> Iterator[str]:
    """Names of what is missing: a part as a whole, a layer, or a tensor that other layers of the same stack have."""
    parts = KEPT[str(settings["model_type"])][:_ALWAYS]
    yield from (f"model.{part}" for part in parts if not any(name.split(".")[1] == part for name in kept))
    stacks: dict[str, dict[int, set[str]]] = {}
    for match in filter(None, map(_NUMBERED.match, kept)):
        stacks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    vision = settings["vision_config"]
    assert isinstance(vision, Mapping)  # kept_settings looks
    count = vision.get("depth", vision.get("num_hidden_layers"))
    deepest = max((max(layers) for stack, layers in stacks.items() if stack.split(".")[1] == parts[0]), default=-1)
    if isinstance(count, int) and deepest + 1 < count:
        yield f"model.{parts[0]}: layer {deepest + 1} of {count}"
    for stack, layers in stacks.items():
        every = set[str]().union(*layers.values())
        for number in range(1 + min(max(layers), len(kept))):
            yield from (f"{stack}.{number}.{leaf}" for leaf in sorted(every - layers.get(number, set())))


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
