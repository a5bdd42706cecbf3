"""Adapters read by file and folded into their base: every tensor as PEFT's merge_and_unload makes it, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from transformers import AutoModelForCausalLM

from adapter_folders import quiet
from adapter_folders import train_adapter as train
from conftest import logits_of, tiny_model
from modekit.building.build import build
from modekit.errors import MismatchError, ModekitError, SourceError, UnsupportedError
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources.adapter import AdapterSource, LowRank, is_adapter, open_adapter
from modekit.sources.contents import OpenFiles
from modekit.sources.lora_settings import NO_EFFECT, LoraSettings
from modekit.sources.source import ModelSource, open_source
from modekit.weights import folding
from modekit.weights.flat import FlatArray
from modekit.weights.folding import reader
from modekit.weights.numeric import to_float32

BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True},
    "qwen2": {},
    "phi3": {},
    "tied llama": {"tie_word_embeddings": True},
    "narrow llama": {"hidden_size": 16},
}
pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a base model by name; each is made once."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            family = name.split()[0] if "llama" not in name else "llama"
            tiny_model(family, num_hidden_layers=2, **BASES[name]).save_pretrained(root / name)
        return root / name

    return folder


def merged(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """PEFT's merge of an adapter folder into its base."""
    with quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def opened(base: Path, adapter: Path) -> AdapterSource:
    """The adapter as modekit reads it."""
    return open_adapter("experts[0] 'law'", "./law", adapter, open_source("base_model", "./base", base))


def folded(base: ModelSource, adapter: AdapterSource) -> dict[str, np.ndarray]:
    """Every tensor of the base with the adapter folded in."""
    opened = OpenFiles()
    read, result = reader(opened), {}
    for name, ref in base.tensors.items():
        values: Any = read(adapter.replaced.get(name, ref))
        if name in adapter.changes:
            values = folding.folded(adapter.changes[name], values, (ref.shape[0], ref.shape[1]), read)[:]
        result[name] = to_float32(values).reshape(ref.shape).copy()
    opened.close()
    return result


def check_as_merged(base: Path, adapter: Path) -> AdapterSource:
    """Every tensor of the base with the adapter folded in is what PEFT merges."""
    theirs, source = merged(base, adapter), open_source("base_model", "./base", base)
    ours = opened(base, adapter)
    for name, values in folded(source, ours).items():
        if name in ours.changes:
            np.testing.assert_allclose(values, theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
        else:
            assert np.array_equal(values.view(np.uint32), theirs[name].view(np.uint32)), name
    return ours


SOME_TARGETS: list[Any] = [
    ["q_proj", "v_proj"],
    ["o_proj", "gate_proj", "up_proj", "down_proj"],
    ["k_proj", "embed_tokens", "lm_head"],
    ["model.layers.1.self_attn.q_proj", "v_proj"],
    r".*\.self_attn\.(q|v)_proj",
    r"model\.layers\.0\..*(up|down)_proj|model\.embed_tokens",
    "all-linear",
]
LORA = st.fixed_dictionaries(
    {
        "r": st.sampled_from([1, 4, 5]),
        "lora_alpha": st.sampled_from([1, 8, 20]),
        "target_modules": st.sampled_from(SOME_TARGETS),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "rank_pattern": st.sampled_from([{}, {"q_proj": 2, "v_proj": 3}, {r"layers\.1\..*": 7}, {"proj": 2, "up_proj": 6}]),
        "alpha_pattern": st.sampled_from([{}, {"embed_tokens": 3, ".*_proj": 11}, {"model.layers.0.self_attn.q_proj": 2}]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "layers_to_transform": st.sampled_from([None, None, 1, [0], []]),
        "layers_pattern": st.sampled_from([None, None, "layers", ["blocks", "layers"]]),
        "exclude_modules": st.sampled_from([None, None, ["v_proj", "1.mlp.up_proj"], r".*layers\.0.*", "lm_head"]),
        "modules_to_save": st.sampled_from([None, None, ["lm_head"], ["norm", "o_proj"], ["embed_tokens"]]),
        "fan_in_fan_out": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
    }
)


@EXAMPLES
@given(family=st.sampled_from(["llama", "llama with biases", "qwen2"]), given_settings=LORA)
def test_lora_folds_to_what_peft_merges(bases: Callable[[str], Path], family: str, given_settings: dict[str, Any]) -> None:
    if isinstance(given_settings["target_modules"], str) or given_settings["layers_to_transform"] is None:
        given_settings |= {"layers_to_transform": None, "layers_pattern": None}
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(bases(family), LoraConfig(**given_settings), Path(folder))
        except ValueError as error:  # nothing is left to adapt
            assume("No modules were targeted" not in str(error) and "not found in the base" not in str(error))
            raise
        check_as_merged(bases(family), Path(folder))


EACH_SETTING: dict[str, tuple[str, dict[str, Any]]] = {
    "biases of saved modules": ("llama with biases", {"bias": "all", "modules_to_save": ["o_proj", "input_layernorm"]}),
    "a saved block": ("llama", {"modules_to_save": ["0.mlp"]}),
    "fused modules": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "use_dora": True}),
    "every linear layer": ("phi3", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "eva": ("llama", {"init_lora_weights": "eva"}),
    "tied, embedding left alone": ("tied llama", {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("name", EACH_SETTING)
def test_each_setting_of_lora(bases: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    family, changes = EACH_SETTING[name]
    train(bases(family), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}), tmp_path)
    assert is_adapter(tmp_path)
    check_as_merged(bases(family), tmp_path)


def test_keys_may_lack_the_prefix_of_peft(bases: Callable[[str], Path], tmp_path: Path) -> None:
    train(bases("llama"), LoraConfig(target_modules=["q_proj"]), tmp_path)
    before = folded(open_source("", "", bases("llama")), opened(bases("llama"), tmp_path))
    change_tensors(tmp_path, lambda tensors: {name.removeprefix("base_model.model."): tensors[name] for name in tensors})
    after = folded(open_source("", "", bases("llama")), opened(bases("llama"), tmp_path))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_embedding_in_the_adapter_file_comes_before_the_change(bases: Callable[[str], Path], tmp_path: Path) -> None:
    train(bases("llama"), LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    change_tensors(tmp_path, lambda tensors: {**tensors, name: tensors[name] * 1.5})
    ours = check_as_merged(bases("llama"), tmp_path)
    assert "model.embed_tokens.weight" in ours.changes
    assert "model.embed_tokens.weight" in ours.replaced


def test_an_embedding_saved_without_being_adapted_replaces_the_base_s(bases: Callable[[str], Path], tmp_path: Path) -> None:
    train(bases("llama"), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    change_tensors(tmp_path, lambda tensors: {**tensors, "base_model.model.lm_head.weight": np.ones((96, 32), np.float32)})
    assert set(check_as_merged(bases("llama"), tmp_path).replaced) == {"lm_head.weight"}


def test_an_adapter_in_half_precision(bases: Callable[[str], Path], tmp_path: Path) -> None:
    train(bases("llama"), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_torch_file({name: tensor.bfloat16() for name, tensor in load_torch_file(file).items()}, file)
    check_as_merged(bases("llama"), tmp_path)


# --- built into a mixture, in both architectures (promise 3)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BUILT: dict[str, tuple[str, peft.PeftConfig]] = {
    "rank and alpha": ("llama", LoraConfig(r=5, lora_alpha=3, target_modules=ALL)),
    "rslora": ("llama", LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=ALL)),
    "rank_pattern and alpha_pattern": (
        "llama",
        LoraConfig(
            r=2,
            target_modules=ALL,
            rank_pattern={"up_proj": 7, r"layers\.1\..*q_proj": 3},
            alpha_pattern={"(down|v)_proj": 20},
        ),
    ),
    "uneven targets": ("qwen2", LoraConfig(r=3, target_modules=r".*layers\.0.*(q|down)_proj|.*layers\.1.*up_proj")),
    "named layers": ("llama", LoraConfig(r=3, target_modules=["up_proj", "o_proj"], layers_to_transform=[1])),
    "fan_in_fan_out": ("llama", LoraConfig(r=3, target_modules=ALL, fan_in_fan_out=True)),
    "dora": ("qwen2", LoraConfig(r=3, target_modules=ALL, use_dora=True)),
    "biases": ("llama with biases", LoraConfig(r=3, target_modules=ALL, bias="all")),
    "embedding and head": ("llama", LoraConfig(r=3, target_modules=["embed_tokens", "lm_head", "up_proj"])),
    "embedding and head, dora": (
        "llama",
        LoraConfig(
            r=3,
            use_dora=True,
            target_modules=["embed_tokens", "lm_head", "up_proj"],
        ),
    ),
    "saved modules": ("llama", LoraConfig(r=3, target_modules=["up_proj"], modules_to_save=["norm", "o_proj", "lm_head"])),
    "saved FFN": ("llama", LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["down_proj"])),
    "tied copies": (
        "tied llama",
        LoraConfig(
            r=3,
            target_modules=["up_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
    ),
    "fused modules": ("phi3", LoraConfig(r=3, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])),
    "fused modules, dora": ("phi3", LoraConfig(r=3, target_modules=["qkv_proj", "down_proj"], use_dora=True)),
}
EVERYTHING = {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}}


def in_mixture(base: Path, adapter: Path, ids: torch.Tensor, out: Path, form: str, mixture: dict[str, Any]) -> torch.Tensor:
    """Logits of a mixture of base and adapter whose routers are fixed on the adapter."""
    recipe = parse_recipe(
        {
            "base_model": str(base),
            "experts": [{"name": "plain", "model": "base"}, {"name": "law", "adapter": str(adapter)}],
            "mixture": mixture,
            "output": {"format": form},
        }
    )
    checkpoint = build(make_plan(recipe, out.parent), out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with mixture_of(model, checkpoint).forced(0):
        torch.testing.assert_close(logits_of(model, ids), logits_of(base, ids), atol=1e-5, rtol=0)
    with mixture_of(model, checkpoint).forced(1):
        return logits_of(model, ids)


@pytest.mark.parametrize("name", BUILT)
def test_a_mixture_fixed_on_an_adapter_is_the_model_of_peft(
    bases: Callable[[str], Path], tmp_path: Path, ids: torch.Tensor, name: str
) -> None:
    family, config = BUILT[name]
    base, adapter = bases(family), train(bases(family), copy.deepcopy(config), tmp_path / "law")
    with quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        expected = logits_of(model, ids)
    assert (expected - logits_of(base, ids)).abs().max() > 1e-2
    ours = in_mixture(base, adapter, ids, tmp_path / "OUT", "modekit", EVERYTHING)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("saved", [["down_proj"], ["mlp"]])
def test_what_an_adapter_keeps_whole_is_mixed_beside_what_it_adapts(
    bases: Callable[[str], Path], tmp_path: Path, ids: torch.Tensor, saved: list[str]
) -> None:
    """Where the recipe names no modules."""
    base = bases("llama")
    adapter = train(base, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=saved), tmp_path / "law")
    with quiet():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ours = in_mixture(base, adapter, ids, tmp_path / "OUT", "modekit", {"router": {"fit": "random"}})
    torch.testing.assert_close(ours, logits_of(expected, ids), atol=1e-5, rtol=0)


OF_FFNS = ["uneven targets", "biases", "saved FFN", "embedding and head, dora"]


@pytest.mark.parametrize(
    ("name", "form"), [*((name, form) for name in OF_FFNS for form in ("plain", "modekit")), ("fused modules", "modekit")]
)
def test_parts_of_an_adapter_that_are_not_mixed_are_the_base_s(
    bases: Callable[[str], Path], tmp_path: Path, ids: torch.Tensor, name: str, form: str
) -> None:
    """Against the base with what PEFT merges into the FFN."""
    family, config = BUILT[name]
    base, adapter = bases(family), train(bases(family), copy.deepcopy(config), tmp_path / "law")
    mixture = {"modules": ["mlp"], "router": {"fit": "random"}}
    own = merged(base, adapter)
    expected = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        ffn = {key: value.numpy() for key, value in expected.named_parameters() if ".mlp." in key}
        changed = [key for key, value in ffn.items() if not np.array_equal(value, own[key])]
        for key in changed:
            expected.get_parameter(key).copy_(torch.from_numpy(own[key]))
    if not changed:
        with pytest.raises(ModekitError, match=r"changes nothing that|no expert differs|no native architecture"):
            in_mixture(base, adapter, ids, tmp_path / "OUT", form, mixture)
        return
    ours = in_mixture(base, adapter, ids, tmp_path / "OUT", form, mixture)
    torch.testing.assert_close(ours, logits_of(expected, ids), atol=1e-5, rtol=0)


# --- the arithmetic of folding


class _Made:
    """A change over random tensors of given shapes, without a file."""

    def __init__(self, rows: int, columns: int, kind: str, generator: np.random.Generator) -> None:
        shapes: dict[str, tuple[int, ...]] = {"a": (3, columns), "b": (rows, 3), "m": (rows,)}
        if kind == "embedding":
            shapes |= {"a": (3, rows), "b": (columns, 3), "m": (columns,)}
        self.values = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        refs = {name: _ref(name, shape) for name, shape in shapes.items()}
        magnitude = refs["m"] if kind in {"dora", "embedding"} else None
        self.change = LowRank(refs["a"], refs["b"], 0.5, magnitude, transposed=kind == "embedding")
        self.base = generator.normal(size=rows * columns).astype(np.float32)
        self.shape = (rows, columns)

    def folded(self) -> FlatArray:
        return folding.folded(self.change, self.base, self.shape, lambda ref: self.values[ref.name].ravel())


def _ref(name: str, shape: tuple[int, ...]) -> Any:
    from modekit.sources.header import TensorRef

    return TensorRef(name, Path("none"), "F32", shape, 0, 4 * int(np.prod(shape)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["lora", "dora", "embedding"]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.integers(1, 2000),
    cuts=st.lists(st.floats(0, 1), max_size=6),
)
@example(kind="embedding", rows=40, columns=7, block=4, cuts=[0.1, 0.5])
def test_any_slices_of_a_folded_weight_are_bit_for_bit_those_of_the_whole(
    kind: str, rows: int, columns: int, block: int, cuts: list[float]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "BLOCK", block)
        made = _Made(rows, columns, kind, np.random.default_rng(rows))
        whole = made.folded()[:]
        assert len(made.folded()) == len(whole) == rows * columns
        ends = sorted({0, len(whole), *(int(cut * len(whole)) for cut in cuts)})
        parts = [made.folded()[start:stop] for start, stop in pairwise(ends)]
        assert all(part.dtype == np.float32 for part in parts)
        assert np.array_equal(np.concatenate(parts).view(np.uint32), whole.view(np.uint32))
        assert len(made.folded()[5:5]) == 0


def test_rows_that_the_adapter_leaves_alone_keep_every_bit() -> None:
    made = _Made(6, 5, "lora", np.random.default_rng(0))
    made.base[:10] = -0.0
    made.values["b"][:4] = 0.0
    values = made.folded()[:]
    assert np.array_equal(values[:20].view(np.uint32), made.base[:20].view(np.uint32))
    assert not np.array_equal(values[20:], made.base[20:])


# --- refusals


Q = "base_model.model.model.layers.{}.self_attn.q_proj."
FIRST = Q.format(0)
Tensors = dict[str, np.ndarray]


def plain_tensors() -> Tensors:
    """A rank-4 LoRA on q_proj of both layers."""
    tensors: Tensors = {}
    for layer in range(2):
        tensors[Q.format(layer) + "lora_A.weight"] = np.ones((4, 32), np.float32)
        tensors[Q.format(layer) + "lora_B.weight"] = np.ones((32, 4), np.float32)
    return tensors


def write_adapter(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """An adapter folder by hand, by default `plain_tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(plain_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    defaults = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps({**defaults, **config}))
    return folder


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def refused(error: type[ModekitError], base: Path, folder: Path, *words: str) -> None:
    """The adapter is refused with an error of that class that names place, remedy and the given words."""
    with pytest.raises(error) as caught:
        opened(base, folder)
    message = str(caught.value)
    assert "where:    experts[0] 'law' (./law)" in message and "to do:" in message
    for word in words:
        assert word in message, message


def test_the_plain_adapter_of_these_tests_is_good(bases: Callable[[str], Path], tmp_path: Path) -> None:
    check_as_merged(bases("llama"), write_adapter(tmp_path))


def test_refuses_missing_and_pickled_weights(bases: Callable[[str], Path], tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "adapter_model.safetensors").unlink()
    refused(SourceError, bases("llama"), tmp_path, "no safetensors weights", "model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    refused(SourceError, bases("llama"), tmp_path, "pickled", "adapter_model.bin")


@pytest.mark.parametrize("text", ["{", "[1]", "{}", "[" * 10**5])
def test_refuses_a_config_that_is_none(bases: Callable[[str], Path], tmp_path: Path, text: str) -> None:
    (write_adapter(tmp_path) / "adapter_config.json").write_text(text)
    refused(SourceError, bases("llama"), tmp_path, "adapter_config.json")


@pytest.mark.parametrize("kind", ["ADALORA", "IA3"])
def test_refuses_other_kinds_of_adapters_and_lists_the_known_ones(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    refused(UnsupportedError, bases("llama"), write_adapter(tmp_path, peft_type=kind), kind, "LORA")


REFUSED_SETTINGS: dict[str, Any] = {
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "trainable_token_indices": [3],
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "megatron_config": {"a": 1},
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1},
    "velora_config": {"num_groups": 2},
    "a_setting_of_a_later_peft": 0.5,
}


@pytest.mark.parametrize("key", ["layer_replication", "a_setting_of_a_later_peft"])
def test_refuses_settings_whose_maths_is_not_known(bases: Callable[[str], Path], tmp_path: Path, key: str) -> None:
    write_adapter(tmp_path, **{key: REFUSED_SETTINGS[key]})
    refused(UnsupportedError, bases("llama"), tmp_path, f"{key}: ", "merge_and_unload")


@pytest.mark.parametrize("init", ["pissa_niter_16", "olora"])
def test_refuses_initialisations_that_change_the_base(bases: Callable[[str], Path], tmp_path: Path, init: str) -> None:
    refused(UnsupportedError, bases("llama"), write_adapter(tmp_path, init_lora_weights=init), init)


def test_every_setting_of_the_installed_peft_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= LoraSettings.model_fields.keys() | NO_EFFECT | REFUSED_SETTINGS.keys()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(sorted({*LoraSettings.model_fields, *NO_EFFECT})), value=JSON, kind=JSON)
def test_garbage_in_the_config_never_crashes(bases: Callable[[str], Path], key: str, value: Any, kind: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for changes in ({key: value}, {"peft_type": kind}):
            write_adapter(Path(folder), **changes)
            try:
                opened(bases("llama"), Path(folder))
            except ModekitError as error:
                assert error.where and error.remedy


def test_refuses_an_adapter_of_another_base(bases: Callable[[str], Path], tmp_path: Path) -> None:
    write_adapter(tmp_path, target_modules=["q_proj"])
    refused(MismatchError, bases("phi3"), tmp_path, "model.layers.0.self_attn.q_proj", "phi3", "lacks")


def test_refuses_other_sizes_and_names_both(bases: Callable[[str], Path], tmp_path: Path) -> None:
    write_adapter(tmp_path)
    refused(MismatchError, bases("narrow llama"), tmp_path, "[4, 32]", "[4, 16]", "q_proj.lora_A")


def test_refuses_layers_beyond_the_base_s(bases: Callable[[str], Path], tmp_path: Path) -> None:
    more = {
        Q.format(7) + part: value[:]
        for part, value in zip(("lora_A.weight", "lora_B.weight"), plain_tensors().values(), strict=False)
    }
    write_adapter(tmp_path, {**plain_tensors(), **more})
    refused(MismatchError, bases("llama"), tmp_path, "more layers", "layer 7", "2 layers")


@pytest.mark.parametrize("part", ["lora_A.weight"])
def test_refuses_half_a_lora(bases: Callable[[str], Path], tmp_path: Path, part: str) -> None:
    tensors = {name: value for name, value in plain_tensors().items() if name != FIRST + part}
    refused(SourceError, bases("llama"), write_adapter(tmp_path, tensors), "lacks a part", part, "layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (FIRST + "lora_magnitude_vector", (32,)),
        ("base_model.model.model.layers.0.self_attn.k_proj.base_layer.weight", (16, 32)),
    ],
)
def test_refuses_tensors_that_no_rule_explains(
    bases: Callable[[str], Path], tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    write_adapter(tmp_path, {**plain_tensors(), name: np.ones(shape, np.float32)})
    refused(SourceError, bases("llama"), tmp_path, "would be lost", name)


def test_refuses_one_module_under_two_names(bases: Callable[[str], Path], tmp_path: Path) -> None:
    twice = {name.removeprefix("base_model.model."): value for name, value in plain_tensors().items()}
    refused(SourceError, bases("llama"), write_adapter(tmp_path, {**plain_tensors(), **twice}), "mean the same")


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_refuses_tensors_that_are_no_floats_of_a_model(bases: Callable[[str], Path], tmp_path: Path, dtype: type) -> None:
    write_adapter(tmp_path, {name: value.astype(dtype) for name, value in plain_tensors().items()})
    refused(SourceError, bases("llama"), tmp_path, "dtype", "bf16")


def test_refuses_lora_on_a_norm(bases: Callable[[str], Path], tmp_path: Path) -> None:
    names = {"base_model.model.model.norm.lora_A.weight": (4, 32), "base_model.model.model.norm.lora_B.weight": (32, 4)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in names.items()}
    write_adapter(tmp_path, tensors, target_modules=["model.norm"])
    refused(UnsupportedError, bases("llama"), tmp_path, "no linear layer", "model.norm")


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_refuses_to_change_one_of_two_tied_tensors(
    bases: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(bases("tied llama"), LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **changes}), tmp_path)
    refused(UnsupportedError, bases("tied llama"), tmp_path, "that this base model shares", "tie_word_embeddings = False")


def test_a_family_that_ties_by_itself_is_tied_though_its_files_hold_a_head(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("gemma", num_hidden_layers=2).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    train(base, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), tmp_path / "adapter")
    refused(UnsupportedError, base, tmp_path / "adapter", "that this base model shares")


def test_refuses_an_adapter_that_changes_nothing(bases: Callable[[str], Path], tmp_path: Path) -> None:
    write_adapter(tmp_path, {}, target_modules=["w1"])
    refused(SourceError, bases("llama"), tmp_path, "changes nothing")


def test_neither_torch_nor_peft_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, modekit.weights.folding; assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
