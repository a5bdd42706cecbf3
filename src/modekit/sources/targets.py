"""Do models with an encoder write the same language? By the token with which their files say that a target begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from modekit.errors import MismatchError
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import read_beside

_FORCED = "forced_bos_token_id"
_OF_THE_TARGET = {
    ("generation_config.json", "config.json"): ("decoder_start_token_id", _FORCED),
    ("tokenizer_config.json",): ("tgt_lang", "target_lang"),
}


def check_same_target(sources: Sequence[ModelSource]) -> None:
    """Raise MismatchError where models that write a target were made for other languages: they begin it with another token.

    What a model's files leave unsaid is taken to be as the others have it.
    """
    said: dict[tuple[str, str], tuple[ModelSource, object]] = {}
    for source in dict.fromkeys(sources):
        for (file, key), value in _target_of(source).items():
            first, expected = said.setdefault((file, key), (source, value))
            if value != expected:
                raise MismatchError(
                    "two models begin what they write with another token: they were made for other languages",
                    where=f"{source.where}: {file}: {key}",
                    found=value,
                    expected=f"{expected}, as {first.where} has it",
                    remedy="use experts that write the same language, or correct the file if only it differs",
                )


def forced_by_one_side(base: ModelSource, experts: Mapping[str, ModelSource]) -> Iterator[str]:
    """Notes of experts, by name, whose files force the first token of a target where the base model's do not, or the reverse.

    Files may leave unsaid what whoever calls the model says, so that this is no error.
    """
    of_base, silent = _forced_first(base), []
    for name, source in experts.items():
        token = _forced_first(source)
        if of_base is None and token is not None:
            yield (
                f"{name}: begins what it writes with the token {token} (forced_bos_token_id), and the base model's files name "
                "none: the mixture begins as the base does; if that is another language, write the token into the base's files"
            )
        elif token is None and of_base is not None:
            silent.append(name)
    if silent:
        yield (
            f"{', '.join(silent)}: the base model begins what it writes with the token {of_base} (forced_bos_token_id), and so "
            "does the mixture; files of these name none: see that they write the same language"
        )


def _forced_first(source: ModelSource) -> object:
    said = _target_of(source)
    return next((value for (_, key), value in said.items() if key == _FORCED), None)


def _target_of(source: ModelSource) -> dict[tuple[str, str], object]:
    """File and key -> what it says of how a target begins, or where it says nothing what another file does: older models have
    one file, and newer ones say it in another.
    """
    found: dict[tuple[str, str], object] = {}
    for files, keys in _OF_THE_TARGET.items():
        configs = {file: read_beside(source.folder, file) for file in files}
        for key in keys:
            values = {file: config[key] for file, config in configs.items() if config.get(key) is not None}
            found |= {(file, key): values.get(file, next(iter(values.values()))) for file in files if values}
    return found
