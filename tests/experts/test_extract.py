"""Adapters extracted from full fine-tunes: exact where the difference is of low rank, optimal where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import character_tokenizer, logits_of, save, tiny_model, write_text
from modekit.errors import MismatchError, ModekitError, OutputError, SourceError, TextError, UnsupportedError
from modekit.experts.extract import ExtractSettings, extract
from modekit.loaded import moments
from modekit.run import Run
from modekit.text.documents import read_documents
from modekit.text.sequences import encode
from modekit.text.splits import TRAINED_FILE, documents_of_split
from modekit.weights.factorise import Array32, Factors, factorise
from pair_models import pair_model, pair_tokenizer
from refusal import run_python, tree

State = dict[str, torch.Tensor]


# -- factors ---------------------------------------------------------------------------------------------------------


def spectrum(outputs: int, inputs: int, values: np.ndarray, seed: int = 0) -> Array32:
    """A matrix with given singular values."""
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.standard_normal((size, len(values))))[0] for size in (outputs, inputs))
    return ((left * values) @ right.T).astype(np.float32)


def best_error(delta: np.ndarray, rank: int) -> float:
    """The error of the truncated SVD (Eckart and Young)."""
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


def error_of(delta: Array32, factors: Factors) -> float:
    product = factors.b.astype(np.float64) @ factors.a
    return float(np.linalg.norm(delta - product) / np.linalg.norm(delta))


def anisotropic(inputs: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Inputs (T, I) that lean on a few directions, as hidden states do."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((inputs, inputs)) * np.exp(1.5 * generator.standard_normal(inputs))
    return generator.standard_normal((tokens, inputs)) @ mixing.T


def output_error(delta: Array32, factors: Factors, x: np.ndarray) -> float:
    missed = delta - factors.b.astype(np.float64) @ factors.a
    return float(np.linalg.norm(x @ missed.T) / np.linalg.norm(x @ delta.T))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_small_differences_get_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    factors = factorise(delta, rank=rank)
    assert factors.a.shape == (rank, shape[1]) and factors.b.shape == (shape[0], rank)
    assert factors.a.dtype == factors.b.dtype == np.float32
    assert error_of(delta, factors) == pytest.approx(best_error(delta, rank), rel=1e-5)
    assert factors.error == pytest.approx(error_of(delta, factors), rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1, 601) ** -0.5,
        np.arange(1, 601) ** -0.1,
        np.where(np.arange(600) < 8, 20.0, 1.0),
        np.exp(-np.arange(600) / 9),
    ],
    ids=["power", "flat", "spikes", "exponential"],
)
@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_large_differences_are_as_good_as_the_truncated_svd(shape: tuple[int, int], values: np.ndarray) -> None:
    delta = spectrum(*shape, values)
    factors = factorise(delta, rank=16)
    best = float(np.linalg.norm(values[16:]) / np.linalg.norm(values))
    assert best * (1 - 1e-4) <= error_of(delta, factors) <= best * (1 + 1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (600, 640)])
def test_a_difference_of_low_rank_is_recovered_whatever_its_spectrum(shape: tuple[int, int], weighted: bool) -> None:
    delta = spectrum(*shape, 10.0 ** -np.linspace(0, 4, 8))  # the last direction is a ten-thousandth of the first
    x = anisotropic(shape[1], 2 * shape[1])
    factors = factorise(delta, rank=8, moment_II=x.T @ x if weighted else None)
    assert error_of(delta, factors) < 1e-5
    assert factors.error < 1e-5


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_singular_values_are_split_evenly(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for moment in (None, np.cov(anisotropic(shape[1], 99).T)):
        factors = factorise(delta, rank=6, moment_II=moment)
        product = np.linalg.svd(factors.b @ factors.a, compute_uv=False)[:6]
        assert np.diag(factors.a @ factors.a.T) == pytest.approx(product, rel=1e-4)
        assert np.diag(factors.b.T @ factors.b) == pytest.approx(product, rel=1e-4)
        assert abs(factors.a @ factors.a.T - np.diag(product)).max() < 1e-4 * product[0]


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_the_smallest_rank_that_reaches_the_energy_is_taken(shape: tuple[int, int], energy: float) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    factors = factorise(delta, energy=energy)
    assert 1 - error_of(delta, factors) ** 2 >= energy - 1e-6
    assert factors.rank == 1 or 1 - best_error(delta, factors.rank - 1) ** 2 < energy


@pytest.mark.parametrize(("energy", "rank"), [(0.5, None), (0.95, None), (0.99, None), (0.99, 20)])
def test_energy_of_large_differences(energy: float, rank: int | None) -> None:
    values = np.arange(1, 601) ** -1.0
    smallest = int(np.searchsorted(np.cumsum(values**2), energy * np.sum(values**2))) + 1
    factors = factorise(spectrum(600, 640, values), energy=energy, max_rank=rank)
    assert factors.rank == min(smallest, rank or smallest)


def test_energy_one_finds_the_rank_of_the_difference() -> None:
    assert factorise(spectrum(48, 64, 10.0 ** -np.linspace(0, 2, 7)), energy=1.0).rank == 7
    assert factorise(spectrum(600, 640, 10.0 ** -np.linspace(0, 2, 7)), energy=1.0).rank == 7


def test_a_difference_of_zero_has_factors_of_zero() -> None:
    zero = np.zeros((6, 4), np.float32)
    for factors, rank in ((factorise(zero, rank=3), 3), (factorise(zero, rank=9), 4), (factorise(zero, energy=0.9), 1)):
        assert (factors.rank, factors.error) == (rank, 0.0)
        assert not factors.a.any() and not factors.b.any()


def test_a_rank_beyond_the_shape_gives_the_difference_itself() -> None:
    delta = np.random.default_rng(1).standard_normal((6, 9)).astype(np.float32)
    factors = factorise(delta, rank=64)
    assert factors.rank == 6
    assert abs(factors.b @ factors.a - delta).max() < 1e-5


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (600, 520)])
def test_weighting_reaches_the_optimum_on_the_inputs(shape: tuple[int, int]) -> None:
    """The oracle whitens: the best rank-R error of D S, S the symmetric square root of the shrunk moment."""
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    x = anisotropic(shape[1], 3 * shape[1])
    moment = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(0.99 * moment + 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment)))
    root = (vectors * np.sqrt(values)) @ vectors.T
    factors = factorise(delta, rank=6, moment_II=moment)
    best = best_error(delta @ root, 6)
    reached = np.linalg.norm((delta - factors.b @ factors.a) @ root) / np.linalg.norm(delta @ root)
    assert best * (1 - 1e-5) <= reached <= best * (1 + 1e-3)
    assert factors.error == pytest.approx(reached, rel=1e-3)
    plain = factorise(delta, rank=6)
    assert output_error(delta, factors, x) < 0.9 * output_error(delta, plain, x)
    assert error_of(delta, factors) > error_of(delta, plain)


def test_inputs_that_are_alike_in_all_directions_change_nothing() -> None:
    delta = np.random.default_rng(1).standard_normal((20, 30)).astype(np.float32)
    weighted, plain = factorise(delta, rank=4, moment_II=7.0 * np.eye(30)), factorise(delta, rank=4)
    assert abs(weighted.b @ weighted.a - plain.b @ plain.a).max() < 1e-5


def test_inputs_that_were_always_zero_weigh_nothing() -> None:
    delta = np.random.default_rng(1).standard_normal((20, 30)).astype(np.float32)
    assert factorise(delta, rank=4, moment_II=np.zeros((30, 30))).error == factorise(delta, rank=4).error


@pytest.mark.parametrize("shape", [(24, 40), (600, 640)])
def test_the_same_difference_gives_the_same_bytes(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    one, two = factorise(delta, rank=4), factorise(delta.copy(), rank=4)
    assert one.a.tobytes() == two.a.tobytes() and one.b.tobytes() == two.b.tobytes()
    assert (one.a[np.arange(4), abs(one.a).argmax(axis=1)] > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    rank=st.integers(1, 14),
    exponent=st.integers(-120, 120),
    seed=st.integers(0, 99),
)
def test_every_scale_and_shape_is_optimal(outputs: int, inputs: int, rank: int, exponent: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    delta = (generator.standard_normal((outputs, inputs)) * 2.0**exponent).astype(np.float32)
    factors = factorise(delta, rank=rank)
    assert error_of(delta.astype(np.float64), factors) <= best_error(delta, rank) + 1e-5
    assert 0.0 <= factors.error <= 1.0 + 1e-6


@pytest.mark.parametrize(
    "wrong", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"energy": 0.5, "max_rank": 0}]
)
def test_wrong_settings_of_a_factorisation_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        factorise(np.ones((4, 4), np.float32), **wrong)


def test_what_is_not_finite_is_refused() -> None:
    delta = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="moment"):
        factorise(delta, rank=1, moment_II=np.full((4, 4), np.nan))
    delta[1, 2] = np.inf
    with pytest.raises(ValueError, match="difference"):
        factorise(delta, rank=1)


# -- adapters --------------------------------------------------------------------------------------------------------


def is_linear(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


def tune(root: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], name: str = "tuned") -> Path:
    """A copy of root/base in which `change` has replaced tensors."""
    shutil.copytree(root / "base", root / name)
    state = load_file(root / "base" / "model.safetensors")
    changed = {key: change(key, tensor) for key, tensor in state.items()}
    state = {key: tensor if changed[key] is None else changed[key].contiguous() for key, tensor in state.items()}
    save_file(state, root / name / "model.safetensors", metadata={"format": "pt"})
    return root / name


def low_rank(rank: int = 3, only: str = "_proj") -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """Add a difference of low rank to linear weights."""
    generator = torch.Generator().manual_seed(7)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if not is_linear(name) or only not in name:
            return None
        left = torch.randn(weight.shape[0], rank, generator=generator)
        right = torch.randn(rank, weight.shape[1], generator=generator)
        return (weight.float() + 0.02 * left @ right).to(weight.dtype)

    return change


def noise(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Move everything, in full rank."""
    generator = torch.Generator().manual_seed(len(name) + 31 * sum(map(ord, name)))
    return weight + 0.02 * torch.randn(weight.shape, generator=generator)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a tiny base."""
    save(tiny_model(), tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize("said", [{}, {"rank": 3, "energy": 0.9}, {"rank": 0}])
def test_sizes_are_refused_before_a_model_is_opened_or_downloaded(said: dict[str, Any]) -> None:
    with pytest.raises(ModekitError):
        ExtractSettings(**said)


def run(root: Path, **kwargs: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"rank": 3} if not {"rank", "energy"} & kwargs.keys() else {}
    settings.update({key: kwargs.pop(key) for key in [*kwargs] if key in ExtractSettings.__dataclass_fields__})
    return extract(root / "tuned", root / "base", root / "OUT", ExtractSettings(root=root, **settings), **kwargs)


def with_adapter(root: Path) -> Any:
    """The base with the adapter, as peft loads it."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "OUT").eval()


def test_a_low_rank_fine_tune_is_recovered_and_loads_in_peft(root: Path, ids: torch.Tensor) -> None:
    tuned = tune(root, low_rank())
    record = run(root)
    assert all(entry.error < 1e-5 and entry.rank == 3 for entry in record.tensors.values())
    assert len(record.tensors) == 21 and not record.not_carried and not record.unchanged
    assert record.totals.carried == pytest.approx(1.0)
    model = with_adapter(root)
    assert (logits_of(model, ids) - logits_of(tuned, ids)).abs().max() < 1e-4
    assert (logits_of(root / "base", ids) - logits_of(tuned, ids)).abs().max() > 0.1
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in load_file(tuned / "model.safetensors").items():
        assert torch.allclose(merged[name], weight, atol=1e-5), name
    assert json.loads((root / "OUT" / "extract.json").read_text()) == record.model_dump(mode="json")
    config = json.loads((root / "OUT" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["bias"]) == (3, 3, {}, "none")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert Path(config["base_model_name_or_path"]) == root / "base"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "phi3"])
def test_full_rank_is_the_model(tmp_path: Path, model_type: str, ids: torch.Tensor) -> None:
    save(tiny_model(model_type), tmp_path / "base")
    tuned = tune(tmp_path, lambda name, weight: noise(name, weight) if is_linear(name) else None)
    record = run(tmp_path, rank=10_000)
    assert record.totals.error < 1e-5
    assert (logits_of(with_adapter(tmp_path), ids) - logits_of(tuned, ids)).abs().max() < 1e-4


def test_ranks_by_energy_differ_and_every_scale_is_one(root: Path, ids: torch.Tensor) -> None:
    tune(root, noise)
    record = run(root, energy=0.6, max_rank=12)
    weights = load_file(root / "OUT" / "adapter_model.safetensors")
    base, tuned = (load_file(root / name / "model.safetensors") for name in ("base", "tuned"))
    ranks = {entry.rank for entry in record.tensors.values()}
    assert len(ranks) > 1 and max(ranks) <= 12
    for name, entry in record.tensors.items():
        delta = (tuned[name] - base[name]).numpy()
        smallest = next(rank for rank in range(1, 33) if 1 - best_error(delta, rank) ** 2 >= 0.6)
        assert entry.rank == min(smallest, 12)
        assert entry.error == pytest.approx(best_error(delta, entry.rank), rel=1e-4)
        assert entry.drift == pytest.approx(float(np.linalg.norm(delta) / base[name].norm()), rel=1e-5)
    merged = dict(with_adapter(root).merge_and_unload().named_parameters())
    for name in record.tensors:
        a, b = (weights[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(merged[name], base[name] + b @ a, atol=1e-5)


def test_what_an_adapter_cannot_carry_is_named(root: Path) -> None:
    tune(root, noise)
    record = run(root)
    base = load_file(root / "base" / "model.safetensors")
    assert set(record.not_carried) == {name for name in base if not is_linear(name)}
    tuned = load_file(root / "tuned" / "model.safetensors")
    for name, drift in record.not_carried.items():
        assert drift == pytest.approx(float((tuned[name] - base[name]).norm() / base[name].norm()), rel=1e-5)
    assert record.totals.carried < 1
    assert record.kinds["mlp.up_proj"].modules == 3


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_encoder_and_decoder_are_told_apart(tmp_path: Path, model_type: str) -> None:
    for seed, name in enumerate(("base", "tuned")):
        pair_model(model_type, seed).save_pretrained(tmp_path / name)
        pair_tokenizer().save_pretrained(tmp_path / name)
    record = run(tmp_path)
    stacks = [kind.partition(".")[0] for kind in record.kinds]
    assert stacks == sorted(stacks, reverse=True) and set(stacks) == {"encoder", "decoder"}
    assert all(row.modules <= 2 for row in record.kinds.values())
    kind = next(iter(record.kinds))
    chosen = run(tmp_path, modules=[kind], overwrite=True)
    assert list(chosen.kinds) == [kind] and len(chosen.tensors) == 2


def test_unchanged_modules_get_no_factors(root: Path, ids: torch.Tensor) -> None:
    change = low_rank()
    tuned = tune(root, lambda name, weight: change(name, weight) if ".layers.1." in name or "down" in name else None)
    record = run(root)
    assert len(record.tensors) == 9 and len(record.unchanged) == 12
    model = with_adapter(root)
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 9
    assert (logits_of(model, ids) - logits_of(tuned, ids)).abs().max() < 1e-4


def test_modules_can_be_chosen(root: Path) -> None:
    tune(root, low_rank())
    record = run(root, modules=["q_proj", "mlp.down_proj", "layers.1.self_attn.o_proj"])
    assert len(record.tensors) == 7
    assert len(record.not_carried) == 14
    adapted = {name for name, _ in with_adapter(root).named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 7


def test_weighting_by_text_lowers_the_error_of_the_outputs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tune(root, noise)
    text = write_text(root / "text")["law"]
    plain = run(root, rank=2)
    factors = {"plain": load_file(root / "OUT" / "adapter_model.safetensors")}
    record = run(root, rank=2, texts=["text/law.jsonl"], overwrite=True)
    factors["weighted"] = load_file(root / "OUT" / "adapter_model.safetensors")
    documents = documents_of_split(read_documents([str(text)], root=root, where=""), "fit")
    sequences = encode(character_tokenizer(), documents, max_tokens=16_384, sequence_length=512)
    assert record.text["tokens"] == sum(len(sequence.ids) for sequence in sequences)
    inputs = inputs_of(tuned, sequences)
    deltas = {
        name: (load_file(tuned / "model.safetensors")[name] - load_file(root / "base" / "model.safetensors")[name]).double()
        for name in record.tensors
    }
    for name, entry in record.tensors.items():
        module = name.removesuffix(".weight")
        error = {}
        for way, state in factors.items():
            a, b = (state[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
            x = inputs[module].double()
            error[way] = float((x @ (deltas[name] - b @ a).T).norm() / (x @ deltas[name].T).norm())
        assert error["weighted"] < error["plain"], name
        assert entry.error == pytest.approx(error["weighted"], rel=0.1)
        assert entry.weight_error > plain.tensors[name].weight_error
    monkeypatch.setattr(moments, "MOMENT_BYTES", 2 * 4 * 48**2)  # many groups, one forward pass each: the same bytes
    before = tree(root / "OUT")
    run(root, rank=2, texts=["text/law.jsonl"], overwrite=True)
    assert tree(root / "OUT") == before


def inputs_of(folder: Path, sequences: Any) -> dict[str, torch.Tensor]:
    """What each linear layer reads, one sequence at a time, so that there are no pads."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    with torch.inference_mode():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence.ids]))
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_pads_do_not_count(root: Path) -> None:
    text = write_text(root / "text")["code"]
    documents = [document[: 9 + 5 * place] for place, document in enumerate(read_documents([str(text)], root=root, where=""))]
    sequences = encode(character_tokenizer(), documents, max_tokens=4096, sequence_length=64)
    model = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.v_proj", "model.layers.2.mlp.down_proj"]
    inputs = inputs_of(root / "base", sequences)
    for name, moment in moments.input_moments(model, names, sequences):
        expected = (inputs[name].T @ inputs[name] / len(inputs[name])).numpy()
        assert np.allclose(moment, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("texts", [(), ("text/law.jsonl",)])
def test_the_same_models_give_the_same_bytes(root: Path, texts: tuple[str, ...]) -> None:
    tune(root, noise)
    write_text(root / "text")
    run(root, texts=texts)
    shutil.move(root / "OUT", root / "one")
    run(root, texts=texts)
    assert tree(root / "one") == tree(root / "OUT")


def test_models_in_bfloat16_and_in_shards(tmp_path: Path) -> None:
    save(tiny_model().to(torch.bfloat16), tmp_path / "base")
    tune(tmp_path, low_rank())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16)
    shutil.rmtree(tmp_path / "tuned")
    save(model, tmp_path / "tuned", max_shard_size="40KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    record = run(tmp_path, rank=32)
    assert record.totals.error < 1e-5


def test_tied_heads_are_not_compared(tmp_path: Path) -> None:
    save(tiny_model(tie_word_embeddings=True), tmp_path / "base")
    tune(tmp_path, low_rank())
    assert not run(tmp_path).not_carried


def test_the_list_of_documents_trained_on_is_kept(root: Path) -> None:
    from modekit.text import held_out

    assert held_out.TRAINED_FILE == TRAINED_FILE
    tuned = tune(root, low_rank())
    run(root)
    assert not (root / "OUT" / TRAINED_FILE).exists()
    (tuned / TRAINED_FILE).write_text("0123456789abcdef\n")
    run(root, overwrite=True)
    assert (root / "OUT" / TRAINED_FILE).read_text() == "0123456789abcdef\n"


def test_an_adapter_needs_no_torch(root: Path) -> None:
    tune(root, low_rank())
    code = """
import sys
from pathlib import Path
from modekit.experts.extract import ExtractSettings, extract
root = Path(sys.argv[1])
extract(root / "tuned", root / "base", root / "OUT", ExtractSettings(rank=3))
assert "torch" not in sys.modules
"""
    done = run_python(code, root)
    assert done.returncode == 0, done.stderr
    assert (root / "OUT" / "adapter_model.safetensors").exists()


def test_progress_is_told(root: Path) -> None:
    tune(root, low_rank())
    write_text(root / "text")
    calls: list[tuple[str, int, int]] = []
    run(root, texts=["text/law.jsonl"], run=Run(progress=lambda *call: calls.append(call)))
    for stage in ("compare", "read text", "factorise"):
        done = [call[1:] for call in calls if call[0] == stage]
        assert done[-1][0] == done[-1][1] and done == sorted(done)


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(root: Path, error: type[ModekitError], match: str, **kwargs: Any) -> None:
    """The extraction is refused with a whole message, and the folder is as before."""
    before = tree(root)
    with pytest.raises(error, match=match) as caught:
        run(root, **kwargs)
    assert caught.value.where and caught.value.remedy
    assert tree(root) == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": None, "energy": None}, "neither"),
        ({"rank": 4, "energy": 0.9}, "both"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 0.0}, "share"),
        ({"energy": 1.5}, "share"),
        ({"energy": float("nan")}, "share"),
        ({"energy": 0.5, "max_rank": 0}, "at least 1"),
        ({"rank": 4, "max_rank": 8}, "no effect"),
        ({"rank": 4, "modules": ["k_prog"]}, "k_prog"),
    ],
)
def test_settings_that_contradict_each_other(root: Path, settings: dict[str, Any], match: str) -> None:
    tune(root, low_rank())
    refused(root, ModekitError, match, **settings)


def test_models_of_another_shape(root: Path) -> None:
    save(tiny_model(intermediate_size=40), root / "tuned")
    refused(root, MismatchError, "intermediate_size|shape")


def test_models_of_another_vocabulary(root: Path) -> None:
    save(tiny_model(vocab_size=100), root / "tuned")
    refused(root, MismatchError, "vocab_size|shape")


def test_models_of_another_family(root: Path) -> None:
    save(tiny_model("qwen2"), root / "tuned")
    refused(root, MismatchError, "qwen2")


def test_settings_that_change_what_a_weight_means(root: Path) -> None:
    tuned = tune(root, low_rank())
    config = json.loads((tuned / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 500_000.0}
    (tuned / "config.json").write_text(json.dumps(config))
    refused(root, MismatchError, "rope_parameters")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(root: Path, name: str) -> None:
    tune(root, lambda key, weight: torch.full_like(weight, torch.nan) if key == name else None)
    refused(root, SourceError, f"(?s)NaN.*MODEL.*{name}")


def test_quantised_models(root: Path) -> None:
    tuned = tune(root, low_rank())
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused(root, SourceError, "quantised")


def test_the_base_itself(root: Path) -> None:
    tune(root, lambda _name, _weight: None)
    refused(root, MismatchError, "no tensor differs")


def test_a_model_that_differs_only_where_no_adapter_reaches(root: Path) -> None:
    tune(root, lambda name, weight: noise(name, weight) if "norm" in name else None)
    refused(root, MismatchError, r"(?s)no linear weight.*norm.weight")


def test_a_missing_tensor(root: Path) -> None:
    tuned = tune(root, low_rank())
    state = load_file(tuned / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    refused(root, SourceError, r"(?s)missing.*up_proj")


def test_mixtures(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1}
    for seed, name in enumerate(("base", "tuned")):
        save(tiny_model("mixtral", seed=seed, **sizes), tmp_path / name)
    refused(tmp_path, UnsupportedError, "experts of a mixture")


def test_text_without_a_document_to_read(root: Path) -> None:
    tune(root, low_rank())
    (root / "empty.txt").write_text("\n")
    refused(root, TextError, "empty", texts=["empty.txt"])


def test_a_folder_that_exists(root: Path) -> None:
    tune(root, low_rank())
    (root / "OUT").mkdir()
    (root / "OUT" / "mine").write_text("precious")
    refused(root, OutputError, "exists")
    refused(root, OutputError, "something else", overwrite=True)
