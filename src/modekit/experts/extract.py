"""A full fine-tune as a LoRA adapter over its base: `modekit extract MODEL OUT --base BASE --rank 16`.

    MODEL - BASE, one linear weight of the decoder layers at a time
        -> the best factors B A (lowrank.py), plain or weighted by what the layer reads on a text (moments.py)
        -> OUT/adapter_config.json, adapter_model.safetensors    an ordinary PEFT folder, scale 1 everywhere
           OUT/extract.json                                      what was kept per tensor, and what an adapter cannot carry
           OUT/trained-on.txt                                    copied from MODEL, so that its text is never scored

Torch is imported only when there is text.

Shape legend: O outputs, I inputs, R rank of a module's factors.
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.staging import Entry, Staging, refuse_existing, staging, write_all, write_json
from modekit.errors import MismatchError, ModekitError, SourceError, UnsupportedError
from modekit.progress import Progress, silent
from modekit.sources.compatibility import check_dtypes, check_same_architecture, check_sizes, matching, own_names
from modekit.sources.families import FAMILIES, Family
from modekit.sources.model import Mappings, ModelSource, TensorRef, open_source
from modekit.sources.names import module_of, split_layer
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import TRAINED_FILE, text_record
from modekit.weights.factorise import Array32, Factors, factorise, relative_error
from modekit.weights.numeric import as_array, blocks, is_finite, to_bytes, to_float32

RECORD_FILE = "extract.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class _Pair:
    """One tensor in both models. `squared_delta` and `squared_base` are sums over its elements."""

    name: str
    tuned: TensorRef
    base: TensorRef
    squared_delta: float
    squared_base: float

    @property
    def module(self) -> str:
        """Name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def kind(self) -> str:
        """Name under the layer: self_attn.q_proj."""
        return self.module.split(".", 3)[3]

    @property
    def drift(self) -> float | None:
        """|| delta || / || W ||; None when W is zero and the difference is not."""
        if self.squared_base == 0:
            return None if self.squared_delta else 0.0
        return math.sqrt(self.squared_delta / self.squared_base)


@dataclass(frozen=True)
class _Adapted:
    """A module's factors, and the plain error || delta - B A || / || delta || whatever they were weighted by."""

    pair: _Pair
    factors: Factors
    plain_error: float


def extract(
    model: Path,
    base: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    modules: Sequence[str] | None = None,
    texts: Sequence[str] = (),
    root: Path = Path(),
    tokens: int = 16_384,
    base_name: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the adapter whose sum with `base` comes closest to `model`, in float32; returns what extract.json says.

    Every linear weight of the decoder layers that differs gets factors: of `rank`, or of the smallest rank that keeps
    the share `energy` of its squared difference, at most `max_rank`. `modules` chooses by the end of the name (q_proj,
    mlp.down_proj). With `texts` (paths relative to `root`; their fit split, up to `tokens`) the error in each layer's
    output over that text is minimised instead of the error in its weight. `base_name` is what the adapter calls its
    base; the folder by default.

    Memory: the adapter, and one weight's difference with a few copies; with texts also the model in float32 and the
    moments of its layers' inputs, at most moments.MOMENT_BYTES of them at a time.

    Raises SourceError, MismatchError (another architecture, or nothing to extract), UnsupportedError (experts in a
    mixture), TextError, OutputError, and ModekitError for settings that contradict each other.
    """
    _check_settings(rank, energy, max_rank)
    refuse_existing(out, overwrite=overwrite, marker=RECORD_FILE)
    tuned = open_source("MODEL", str(model), model, trust_remote_code=trust_remote_code)
    origin = open_source("BASE", str(base), base, trust_remote_code=trust_remote_code)
    names = _shared_names(tuned, origin)
    mappings = Mappings()
    try:
        pairs = []
        for place, name in enumerate(names):
            pairs.append(_compare(tuned, origin, name, mappings))
            progress("compare", place + 1, len(names))
        linears = _linears(pairs)
        chosen = [pair for pair in _chosen(linears, modules) if pair.squared_delta]
        _check_differs(chosen, pairs)
        moments, text = _moments(chosen, model, texts, root, tokens, trust_remote_code, progress)
        adapted = []
        for place, (pair, moment_II) in enumerate(moments):
            adapted.append(_adapt(pair, moment_II, mappings, rank=rank, energy=energy, max_rank=max_rank))
            progress("factorise", place + 1, len(chosen))
    finally:
        mappings.close()
    settings = {"rank": rank, "energy": energy, "max_rank": max_rank, "modules": list(modules) if modules else None}
    record = {
        "model": model.name, "base_model": base_name or base.name, "settings": settings, "text": text,
        **_account(adapted, linears, pairs),
    }  # fmt: skip
    _write(out, adapted, linears, record, base_name or str(base), model / TRAINED_FILE, overwrite=overwrite)
    return record


def _check_settings(rank: int | None, energy: float | None, max_rank: int | None) -> None:
    """Raise ModekitError unless exactly one of rank and energy is given, in range, and max_rank has an effect."""
    if (rank is None) == (energy is None):
        raise ModekitError(
            "the size of the adapter is not determined", where="--rank, --energy",
            found="neither" if rank is None else "both", expected="one of them", remedy="give --rank 16 or --energy 0.9",
        )  # fmt: skip
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
            "the setting has no effect with a fixed rank", where="--max-rank", found=max_rank,
            remedy="remove it, or give --energy in place of --rank",
        )  # fmt: skip


def _shared_names(tuned: ModelSource, origin: ModelSource) -> list[str]:
    """Tensors of both models in the base's order.

    Raises SourceError, MismatchError or UnsupportedError unless both are unquantised models of one architecture.
    """
    for source in (tuned, origin):
        check_dtypes(source)
        check_sizes(source)
    model_type = origin.config["model_type"]
    row = next((row for row in FAMILIES if row.model_type == model_type), None)
    family = row or Family(model_type=model_type)  # without a row: compared with the defaults of most families
    check_same_architecture(origin, tuned, family)
    names = own_names(origin, family)
    for name in names:
        matching(tuned, name, origin.tensors[name])
        if ".experts." in name:
            raise UnsupportedError(
                "the experts of a mixture are no linear layers in memory, so an adapter cannot reach them",
                where=f"{origin.label} ({origin.spec}): {name}", remedy="extract from dense models",
            )  # fmt: skip
    return names


def _compare(tuned: ModelSource, origin: ModelSource, name: str, mappings: Mappings) -> _Pair:
    """How far a tensor has moved: read in blocks, summed in float64. Raises SourceError for NaN or Inf."""
    refs = (tuned.tensors[name], origin.tensors[name])
    views = [mappings.view(ref) for ref in refs]
    for source, ref, view in zip((tuned, origin), refs, views, strict=True):
        if not is_finite(view, ref.dtype):
            raise SourceError(
                "the weights hold NaN or Inf", where=f"{source.label} ({source.spec}): {name}",
                remedy="the model is damaged: save or download it again",
            )  # fmt: skip
    moved, still = (as_array(view, ref.dtype) for view, ref in zip(views, refs, strict=True))
    squared_delta = squared_base = 0.0
    for part in blocks(len(still)):
        base_block = to_float32(still[part])
        squared_delta += float(np.square(to_float32(moved[part]) - base_block, dtype=np.float64).sum())
        squared_base += float(np.square(base_block, dtype=np.float64).sum())
    for ref in refs:
        mappings.forget(ref)
    return _Pair(name, *refs, squared_delta, squared_base)


def _linears(pairs: Sequence[_Pair]) -> list[_Pair]:
    """The linear weights of the decoder layers, by layer and name. Raises UnsupportedError when there are none."""
    found = []
    for pair in pairs:
        layer, path = split_layer(pair.name)
        if layer is not None and path.endswith(".weight") and len(pair.base.shape) == 2 and "norm" not in path:
            found.append((layer, module_of(path), pair))
    if not found:
        raise UnsupportedError(
            "the model keeps its layers under other names", where="BASE", found=pairs[0].name if pairs else "no tensors",
            expected="model.layers.N.*_proj.weight", remedy="save both models with a current transformers",
        )  # fmt: skip
    return [pair for _, _, pair in sorted(found, key=lambda entry: entry[:2])]


def _chosen(linears: Sequence[_Pair], modules: Sequence[str] | None) -> list[_Pair]:
    """The linears whose names end as asked for. Raises ModekitError for an ending that none has."""
    if modules is None:
        return list(linears)
    for ending in modules:
        if not any(_ends(pair, ending) for pair in linears):
            raise ModekitError(
                "no linear weight of the decoder layers has this name", where="--module", found=ending,
                expected=", ".join(dict.fromkeys(pair.kind for pair in linears)), remedy="write one of them",
            )  # fmt: skip
    return [pair for pair in linears if any(_ends(pair, ending) for ending in modules)]


def _ends(pair: _Pair, ending: str) -> bool:
    return f".{pair.module}".endswith(f".{ending}")


def _check_differs(chosen: Sequence[_Pair], pairs: Sequence[_Pair]) -> None:
    """Raise MismatchError when an adapter would be empty."""
    if chosen:
        return
    moved = [pair.name for pair in pairs if pair.squared_delta]
    if not moved:
        raise MismatchError(
            "the model is its base: no tensor differs", where="MODEL, BASE", remedy="give the fine-tuned model as MODEL"
        )
    raise MismatchError(
        "no linear weight that could be adapted differs", where="MODEL, BASE",
        found="only " + ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else ""),
        remedy="use the full model: an adapter of its linear layers would be empty",
    )  # fmt: skip


_Moments = Iterator[tuple[_Pair, npt.NDArray[np.float32] | None]]


def _moments(
    chosen: Sequence[_Pair], model: Path, texts: Sequence[str], root: Path, tokens: int, trust_remote_code: bool,
    progress: Progress,
) -> tuple[_Moments, dict[str, Any] | None]:  # fmt: skip
    """Each chosen weight with E[x x^T] of what it reads on the text, or None without text; and the record of the text."""
    if not texts:
        return ((pair, None) for pair in chosen), None
    from modekit.loaded.load import load_model, load_tokenizer
    from modekit.loaded.moments import input_moments

    sequences, text = _read_text(texts, root, tokens, load_tokenizer(model, trust_remote_code=trust_remote_code))
    by_module = {pair.module: pair for pair in chosen}

    def read() -> _Moments:
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        for name, moment_II in input_moments(loaded, list(by_module), sequences, advance=partial(progress, "read text")):
            yield by_module[name], moment_II

    return read(), text


def _read_text(texts: Sequence[str], root: Path, tokens: int, tokenizer: Any) -> tuple[list[TokenSequence], dict[str, Any]]:
    """The fit split as sequences: what is held out stays unseen. Raises TextError when nothing is left."""
    text = read_text(texts, root=root, where="--text")
    documents = text.fit()
    sequences = encode(tokenizer, documents, max_tokens=tokens, sequence_length=_SEQUENCE_LENGTH)
    if not sequences:
        raise text.nothing_left("no document is left to read after the held-out split")
    return sequences, text_record(documents, sum(len(sequence.ids) for sequence in sequences))


def _adapt(
    pair: _Pair, moment_II: npt.NDArray[np.float32] | None, mappings: Mappings, *,
    rank: int | None, energy: float | None, max_rank: int | None,
) -> _Adapted:  # fmt: skip
    """Factors of one weight's difference."""
    moved, still = (to_float32(as_array(mappings.view(ref), ref.dtype)) for ref in (pair.tuned, pair.base))
    delta_OI: Array32 = (moved - still).reshape(pair.base.shape)
    for ref in (pair.tuned, pair.base):
        mappings.forget(ref)
    factors = factorise(delta_OI, rank=rank, energy=energy, max_rank=max_rank, moment_II=moment_II)
    plain = factors.error if moment_II is None else relative_error(delta_OI, factors.a, factors.b)
    return _Adapted(pair, factors, plain)


def _account(adapted: Sequence[_Adapted], linears: Sequence[_Pair], pairs: Sequence[_Pair]) -> dict[str, Any]:
    """What extract.json says of the tensors.

    tensors      per adapted weight: rank; error = what was minimised (relative; of the outputs when there was text);
                 energy = 1 - error^2; weight_error = || delta - B A || / || delta ||; drift = || delta || / || W ||
    kinds        the same over all layers: ranks from-to, root mean squares weighted by || delta ||^2
    unchanged    linear weights that are equal in both models: no factors
    not_carried  everything else that differs, with its drift (null where the base is zero)
    totals       over the adapter; carried = share of the squared difference of all tensors that the adapter holds
    """
    carried = {entry.pair.name for entry in adapted}
    parameters = sum(entry.factors.a.size + entry.factors.b.size for entry in adapted)
    kept = sum(entry.pair.squared_delta * (1 - entry.plain_error**2) for entry in adapted)
    kinds = dict.fromkeys(pair.kind for pair in linears)
    groups = {kind: [entry for entry in adapted if entry.pair.kind == kind] for kind in kinds}
    return {
        "tensors": {
            entry.pair.name: {
                "rank": entry.factors.rank, "error": entry.factors.error, "energy": 1 - entry.factors.error**2,
                "weight_error": entry.plain_error, "drift": entry.pair.drift,
            }
            for entry in adapted
        },
        "kinds": {kind: _together(group) for kind, group in groups.items() if group},
        "totals": {
            **_together(adapted), "parameters": parameters, "bytes": 4 * parameters,
            "carried": kept / sum(pair.squared_delta for pair in pairs),
        },
        "unchanged": [pair.name for pair in linears if not pair.squared_delta],
        "not_carried": {pair.name: pair.drift for pair in pairs if pair.squared_delta and pair.name not in carried},
    }  # fmt: skip


def _together(adapted: Sequence[_Adapted]) -> dict[str, Any]:
    """Ranks and errors of several weights as one."""
    ranks = [entry.factors.rank for entry in adapted]
    squares = np.array([entry.pair.squared_delta for entry in adapted])
    error = np.array([entry.factors.error for entry in adapted])
    weight_error = np.array([entry.plain_error for entry in adapted])
    base = sum(entry.pair.squared_base for entry in adapted)
    mean_square = float(np.average(error**2, weights=squares))
    return {
        "modules": len(adapted), "smallest_rank": min(ranks), "largest_rank": max(ranks),
        "error": math.sqrt(mean_square), "energy": 1 - mean_square,
        "weight_error": math.sqrt(float(np.average(weight_error**2, weights=squares))),
        "drift": math.sqrt(float(squares.sum()) / base) if base else None,
    }  # fmt: skip


def _write(
    out: Path, adapted: Sequence[_Adapted], linears: Sequence[_Pair], record: Mapping[str, Any], base_name: str,
    trained_on: Path, *, overwrite: bool,
) -> None:  # fmt: skip
    """The adapter folder, by rename. Its digest is that of the factors, so a killed write goes on only with equal ones."""
    digest = hashlib.sha256(repr(record).encode())
    for entry in adapted:
        digest.update(to_bytes(entry.factors.a, "F32"))
        digest.update(to_bytes(entry.factors.b, "F32"))
    with staging(out, f"extract {digest.hexdigest()}", overwrite=overwrite, marker=RECORD_FILE) as stage:
        _write_weights(stage, adapted)
        write_json(stage.folder / CONFIG_FILE, _adapter_config(adapted, linears, base_name))
        if trained_on.exists():
            shutil.copyfile(trained_on, stage.folder / TRAINED_FILE)
        write_json(stage.folder / RECORD_FILE, record)


def _write_weights(stage: Staging, adapted: Sequence[_Adapted]) -> None:
    tensors: dict[str, Array32] = {}
    for entry in adapted:
        tensors[f"base_model.model.{entry.pair.module}.lora_A.weight"] = entry.factors.a
        tensors[f"base_model.model.{entry.pair.module}.lora_B.weight"] = entry.factors.b
    arrays = list(tensors.values())
    entries: list[Entry] = [(name, "F32", array.shape, array.nbytes) for name, array in tensors.items()]

    def write(place: int, stream: io.FileIO) -> None:
        write_all(stream, to_bytes(arrays[place], "F32"))

    stage.write_shard(WEIGHTS_FILE, entries, write)


def _adapter_config(adapted: Sequence[_Adapted], linears: Sequence[_Pair], base_name: str) -> dict[str, Any]:
    """adapter_config.json. alpha equals the rank in every module, so that every scale (alpha / rank) is exactly 1.

    `r` is the largest rank, for engines that reserve room by it and do not know the patterns.
    """
    ranks = {entry.pair.module: entry.factors.rank for entry in adapted}
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": _targets(adapted, linears),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _targets(adapted: Sequence[_Adapted], linears: Sequence[_Pair]) -> list[str]:
    """Kinds of module where each is adapted in every layer that has it, else full names: peft adapts all that match."""
    modules = [entry.pair.module for entry in adapted]
    left_out = [pair.module for pair in linears if pair.module not in set(modules)]
    kinds = {module.rsplit(".", 1)[1] for module in modules}
    return modules if kinds & {module.rsplit(".", 1)[1] for module in left_out} else sorted(kinds)
