"""A full fine-tune as a LoRA adapter over its base: `modekit extract MODEL OUT --base BASE --rank 16`.

    MODEL - BASE, one linear weight of the decoder layers at a time (differences.py)
        -> the best factors B A (weights/factorise.py), plain or weighted by what the layer reads on a text (loaded/moments.py)
        -> OUT/adapter_config.json, adapter_model.safetensors    an ordinary PEFT folder, scale 1 everywhere
           OUT/extract.json                                      what was kept per tensor, and what an adapter cannot carry
           OUT/trained-on.txt                                    copied from MODEL, so that its text is never scored

Torch is imported only when there is text.

Shape legend: O outputs, I inputs, R rank of a module's factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from modekit.errors import ModekitError
from modekit.experts.differences import TensorDifference, check_differs, chosen_of, compare, linears_of, shared_names
from modekit.experts.extract_record import (
    RECORD_FILE,
    AdaptedWeight,
    Extraction,
    RankSettings,
    errors_by_kind,
    totals_of,
    weight_errors,
)
from modekit.experts.peft_folder import ModuleChange, PeftTensor, lora_config, peft_name, write_lora
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.staging import staging
from modekit.files.write import copy_file, write_json
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.model import open_source
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import TRAINED_FILE, TextDigest, text_record
from modekit.weights.factorise import Array32, factorise, relative_error
from modekit.weights.numeric import to_bytes
from modekit.weights.stored import read_float32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class ExtractSettings:
    """What the adapter holds.

    Attributes:
        rank: R of every module; or
        energy: the smallest R that keeps this share of each squared difference, at most
        max_rank.
        modules: only these, by the end of their name (q_proj, mlp.down_proj).
        texts: paths relative to `root`; of their fit split, up to `tokens`, the error in each layer's output is minimised
            instead of the error in its weight.
        base_name: what the adapter calls its base; the folder by default.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    modules: Sequence[str] | None = None
    texts: Sequence[str] = ()
    root: Path = Path()
    tokens: int = 16_384
    base_name: str | None = None

    def __post_init__(self) -> None:
        """Raises ModekitError unless exactly one of rank and energy is given, in range, and max_rank has an effect: before a
        model is opened or downloaded.
        """
        rank, energy, max_rank = self.rank, self.energy, self.max_rank
        if (rank is None) == (energy is None):
            raise ModekitError(
                "the size of the adapter is not determined",
                where="--rank, --energy",
                found="neither" if rank is None else "both",
                expected="one of them",
                remedy="give --rank 16 or --energy 0.9",
            )
        for where, value in (("--rank", rank), ("--max-rank", max_rank)):
            if value is not None and value < 1:
                raise ModekitError(
                    "a rank must be at least 1", where=where, found=value, expected="a whole number > 0", remedy="correct it"
                )
        if energy is not None and not 0 < energy <= 1:
            raise ModekitError(
                "not a share of the energy", where="--energy", found=energy, expected="above 0, at most 1", remedy="correct it"
            )
        if max_rank is not None and energy is None:
            raise ModekitError(
                "the setting has no effect with a fixed rank",
                where="--max-rank",
                found=max_rank,
                remedy="remove it, or give --energy in place of --rank",
            )

    @property
    def ranks(self) -> RankSettings:
        """What extract.json says of them."""
        modules = list(self.modules) if self.modules else None
        return RankSettings(rank=self.rank, energy=self.energy, max_rank=self.max_rank, modules=modules)


def extract(
    model: Path,
    base: Path,
    out: Path,
    settings: ExtractSettings,
    *,
    overwrite: bool = False,
    run: Run = QUIET,
) -> Extraction:
    """Write the adapter whose sum with `base` comes closest to `model`, in float32; returns what extract.json says.

    Every linear weight of the decoder layers that differs gets factors.

    Memory: the adapter, and one weight's difference with a few copies; with texts also the model in float32 and the
    moments of its layers' inputs, at most moments.MOMENT_BYTES of them at a time.

    Raises SourceError, MismatchError (another architecture, or nothing to extract), UnsupportedError (experts in a
    mixture), TextError, OutputError, and ModekitError for settings that contradict each other.
    """
    refuse_existing(out, replaced_by(overwrite), sources=(model, base))
    tuned = open_source("MODEL", str(model), model, run=run)
    origin = open_source("BASE", str(base), base, run=run)
    names = shared_names(tuned, origin)
    with OpenFiles() as opened:
        differences = [compare(tuned, origin, name, opened) for name in run.over("compare", names, len(names))]
        linears = linears_of(differences)
        chosen = [each for each in chosen_of(linears, settings.modules) if each.squared_delta]
        check_differs(chosen, differences)
        moments, text = _moments(chosen, model, settings, run)
        weights = run.over("factorise", moments, len(chosen))
        adapted = [_adapt(each, moment_II, opened, settings) for each, moment_II in weights]
    adapted_names = {entry.difference.name for entry in adapted}
    record = Extraction(
        model=model.name,
        base_model=settings.base_name or base.name,
        settings=settings.ranks,
        text=text,
        tensors={entry.difference.name: weight_errors(entry) for entry in adapted},
        kinds=errors_by_kind(adapted, [each.kind for each in linears]),
        totals=totals_of(adapted, differences),
        unchanged=[each.name for each in linears if not each.squared_delta],
        not_carried={each.name: each.drift for each in differences if each.squared_delta and each.name not in adapted_names},
    )
    run.begin("write")
    # alpha equals the rank in every module, so that every scale is exactly 1
    changes = {entry.difference.module: ModuleChange(entry.factors.rank, 1.0) for entry in adapted}
    config = lora_config(settings.base_name or str(base), changes, targets=_targets(adapted, linears))
    digest, replace = f"extract {_digest_of(record, adapted)}", replaced_by(overwrite)
    with staging(out, digest, "adapter", sources=(model, base), replace=replace, sync=run.sync) as stage:
        write_lora(stage, config, [tensor for entry in adapted for tensor in _tensors(entry)])
        if (model / TRAINED_FILE).exists():
            copy_file(model / TRAINED_FILE, stage.folder / TRAINED_FILE)
        write_json(stage.folder / RECORD_FILE, record.model_dump(mode="json"))
    return record


_Moments: TypeAlias = Iterator[tuple[TensorDifference, npt.NDArray[np.float32] | None]]


def _moments(
    chosen: Sequence[TensorDifference],
    model: Path,
    settings: ExtractSettings,
    run: Run,
) -> tuple[_Moments, TextDigest | None]:
    """Each chosen weight with E[x x^T] of what it reads on the text, or None without text; and the record of the text."""
    if not settings.texts:
        return ((each, None) for each in chosen), None
    from modekit.loaded.load import load_model, load_tokenizer
    from modekit.loaded.moments import input_moments

    sequences, text = _read_text(settings, load_tokenizer(model, run=run))
    by_module = {each.module: each for each in chosen}

    def read() -> _Moments:
        loaded = load_model(model, run=run)
        for name, moment_II in input_moments(loaded, list(by_module), sequences, advance=partial(run.progress, "read text")):
            yield by_module[name], moment_II

    return read(), text


def _read_text(settings: ExtractSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSequence], TextDigest]:
    """The fit split as sequences: what is held out stays unseen. Raises TextError when nothing is left."""
    text = read_text(settings.texts, root=settings.root, where="--text")
    documents = text.fit()
    sequences = encode(tokenizer, documents, max_tokens=settings.tokens, sequence_length=_SEQUENCE_LENGTH)
    if not documents:
        raise text.nothing_left("no document is left to read after the held-out split")
    if not sequences:
        raise text.none_fits(documents, _SEQUENCE_LENGTH, most=settings.tokens)
    return sequences, text_record(documents, sum(len(sequence.ids) for sequence in sequences))


def _adapt(
    each: TensorDifference, moment_II: npt.NDArray[np.float32] | None, opened: OpenFiles, settings: ExtractSettings
) -> AdaptedWeight:
    """Factors of one weight's difference."""
    delta_OI: Array32 = read_float32(opened, each.tuned) - read_float32(opened, each.base)
    factors = factorise(delta_OI, rank=settings.rank, energy=settings.energy, max_rank=settings.max_rank, moment_II=moment_II)
    plain = factors.error if moment_II is None else relative_error(delta_OI, factors.a, factors.b)
    return AdaptedWeight(each, factors, plain)


def _digest_of(record: Extraction, adapted: Sequence[AdaptedWeight]) -> str:
    """Of an adapter with its factors, so that a killed write goes on only with equal ones."""
    digest = hashlib.sha256(record.model_dump_json().encode())
    for factor in (factor for entry in adapted for factor in (entry.factors.a, entry.factors.b)):
        digest.update(to_bytes(factor, "F32"))
    return digest.hexdigest()


def _tensors(entry: AdaptedWeight) -> Iterator[PeftTensor]:
    for side, array in (("A", entry.factors.a), ("B", entry.factors.b)):
        name = peft_name(entry.difference.module, f"lora_{side}.weight")
        yield PeftTensor(name, "F32", array.shape, array.nbytes, partial(to_bytes, array, "F32"))


def _targets(adapted: Sequence[AdaptedWeight], linears: Sequence[TensorDifference]) -> list[str]:
    """Kinds of module where each is adapted in every layer that has it, else full names: peft adapts all that match."""
    modules = [entry.difference.module for entry in adapted]
    left_out = [each.module for each in linears if each.module not in set(modules)]
    kinds = {module.rsplit(".", 1)[1] for module in modules}
    return modules if kinds & {module.rsplit(".", 1)[1] for module in left_out} else sorted(kinds)
