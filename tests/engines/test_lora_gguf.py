"""Mixtures of adapters as files for llama.cpp, loaded in the real one, and compared there with transformers and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapter_folders import quiet, train_adapter
from byte_level import byte_tokenizer, save_byte_model
from command_line import ended
from domain_mixtures import built
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines import converter
from modekit.engines.adapters import Adapter, backbone_names, chosen_adapters
from modekit.engines.convert_process import place_of
from modekit.engines.gguf import EXPORT_FILE, GgufFile, export_gguf
from modekit.engines.llama import Llama
from modekit.engines.proof import compare
from modekit.engines.registry import GgufSettings
from modekit.errors import EngineError, OutputError, UnsupportedError
from modekit.files.marker import foreign_files
from modekit.planning.shape import LowRankPart
from modekit.sources.header import TensorRef, read_header
from refusal import refuse
from sources.test_wrappers import adapter
from wrapped_models import wrapped_model

pytestmark = pytest.mark.filterwarnings("ignore")

EXACT = GgufSettings("f32")
PATTERNS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1},
    "alpha_pattern": {"k_proj": 11},
}
RSLORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS: dict[str, peft.PeftConfig] = {
    "patterns": peft.LoraConfig(task_type="CAUSAL_LM", **PATTERNS),
    "rslora": peft.LoraConfig(task_type="CAUSAL_LM", **RSLORA),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "biased": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, lora_bias=True, target_modules=["q_proj"]),
    "biases": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, bias="all", target_modules=["v_proj"]),
    "saved": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["o_proj"], modules_to_save=["lm_head"]),
    "head": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["o_proj", "lm_head"]),
}
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 2.0, "attention_multiplier": 0.2}
FAMILIES: list[tuple[str, dict[str, Any]]] = [("qwen2", {}), ("granite", SCALED)]


def mixture(root: Path, family: str, kinds: Iterable[str], **mixed: Any) -> Checkpoint:
    """The base, and adapters of some kinds over it, as one mixture; `full` is a full model."""
    save_byte_model(root / "base", family, 0, **mixed.pop("overrides", {}))
    experts: list[dict[str, Any]] = [{"name": "general", "model": "base"}]
    for name in kinds:
        if name == "full":
            save_byte_model(root / name, family, 1)
            experts.append({"name": name, "model": f"./{name}"})
        else:
            train_adapter(root / "base", deepcopy(KINDS[name]), root / name)  # PEFT writes the targets that it found into it
            experts.append({"name": name, "adapter": f"./{name}"})
    settings = mixed if "method" in mixed else {"router": {"fit": "random"}, **mixed}
    recipe = {"base_model": "./base", "experts": experts, "mixture": settings, "output": {"format": "modekit"}}
    return built(root, recipe)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Llama, whose q and k llama.cpp holds in another order."""
    return mixture(tmp_path_factory.mktemp("lora"), "llama", ("patterns", "rslora"))


@pytest.fixture(scope="module")
def written(lora: Checkpoint) -> list[GgufFile]:
    """Its files."""
    return export_gguf(lora, lora.folder.with_name("GGUF"), EXACT)


@pytest.mark.parametrize("output", [{}, {"keep": "wrapper"}])
def test_the_language_model_of_a_wrapper(tmp_path: Path, output: dict[str, str]) -> None:
    """Its config names no class of the language model alone; a tower that is kept stays out of the file."""
    tokenizer = byte_tokenizer()
    wrapper = wrapped_model("mistral3", vocab_size=len(tokenizer), max_position_embeddings=256)
    wrapper.save_pretrained(tmp_path / "base")
    adapter(wrapper, tmp_path / "lora", target_modules=r".*language_model.*\.(q_proj|up_proj)")
    tokenizer.save_pretrained(tmp_path / "base")
    experts = [{"name": "lora", "adapter": "./lora"}, {"name": "rest", "model": "base"}]
    said = {"base_model": "./base", "experts": experts, "mixture": {"router": {"fit": "random"}}, "output": output}
    assert_exact(export_gguf(built(tmp_path, said), tmp_path / "GGUF", EXACT))


def assert_exact(written: list[GgufFile]) -> None:
    """All that was proven agrees as two float32 engines can."""
    for each in written:
        assert each.proof.same == each.proof.written == 96, each
        assert each.proof.difference < 1e-4, each


def test_llama_cpp_computes_every_adapter(written: list[GgufFile]) -> None:
    assert_exact(written)
    folder = written[0].file.parent
    assert [each.file.name for each in written] == ["base-f32.gguf", "patterns.lora.gguf", "rslora.lora.gguf"]
    said = json.loads((folder / EXPORT_FILE).read_text())
    assert foreign_files(folder) == [] and said["base"]["proof"]["same"] == 96
    assert [(each["expert"], each["file"]) for each in said["adapters"]] == [
        ("patterns", "patterns.lora.gguf"),
        ("rslora", "rslora.lora.gguf"),
    ]
    assert any("3 of 21 modules is folded into B" in note for note in written[1].notes) and written[2].notes == ()


def test_the_base_is_that_of_the_source(lora: Checkpoint, written: list[GgufFile]) -> None:
    proof = compare(lora.folder.with_name("base"), written[0].file, "f32").judged(written[0].file)
    assert proof.same == proof.written and proof.difference < 1e-4


def test_peft_computes_the_same(lora: Checkpoint, written: list[GgufFile]) -> None:
    """In any order, with one text going on from another's cache: what is asked for is what computes."""
    ids = [5, 40, 77, 200, 118, 31, 9, 260]
    with Llama(written[0].file, context=64, threads=1, adapters=[each.file for each in written[1:]]) as llama, quiet():
        for place, name in ((1, "rslora"), (0, "patterns"), (None, ""), (1, "rslora"), (None, "")):
            model = AutoModelForCausalLM.from_pretrained(lora.folder.with_name("base"), dtype=torch.float32)
            if name:
                model = peft.PeftModel.from_pretrained(model, lora.folder.with_name(name))
            llama.use_adapter(place)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                greedy = model.generate(
                    input_ids=torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids)),
                    max_new_tokens=24,
                    do_sample=False,
                    pad_token_id=0,
                )
            expected = [float(logprobs[at, token]) for at, token in enumerate(ids[1:])]
            assert llama.logprobs(ids) == pytest.approx(expected, abs=1e-4)
            assert llama.greedy(ids, 24) == greedy[0, len(ids) :].tolist()


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_other_families_without_their_sources(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    """All is in the mixture: the base and the adapters may be gone."""
    checkpoint = mixture(tmp_path, family, ("patterns", "rslora"), overrides=overrides)
    for name in ("base", "patterns", "rslora"):
        shutil.rmtree(tmp_path / name)
    assert_exact(export_gguf(checkpoint, tmp_path / "GGUF", EXACT))


def test_a_wrong_adapter_is_no_proof(lora: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that leaves the rows of q and k as transformers has them."""
    monkeypatch.setattr(converter, "PROCESS", "unpermuted")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(EngineError, match="another model than transformers") as error:
        export_gguf(lora, tmp_path / "GGUF", EXACT, experts=["rslora"])
    assert "rslora.lora.gguf" in str(error.value.where) and not list(tmp_path.iterdir())


def test_a_merged_backbone_with_fewer_bits_and_one_expert(tmp_path: Path) -> None:
    """By the command line; beside a full model, whose average with the base is what the adapter stands on."""
    checkpoint = mixture(tmp_path, "llama", ("full", "rslora"), backbone="average")
    words = ("export", checkpoint.folder, tmp_path / "GGUF", "--gguf")
    message = refuse(*words)
    assert "full: it is a full model" in message and "--expert rslora" in message and not (tmp_path / "GGUF").exists()
    code, stdout, stderr = ended(*words, "--expert", "rslora", "--outtype", "q8_0")
    said = " ".join(stdout.split())
    assert code == 0, stderr
    assert "base-q8_0.gguf" in said and "rslora.lora.gguf" in said and said.count("greedy tokens as in transformers") == 2
    assert "it is the mixture's merged backbone" in said
    found = json.loads((tmp_path / "GGUF" / EXPORT_FILE).read_text())
    for each in (found["base"], found["adapters"][0]):
        assert 1e-6 < each["proof"]["typical"] < 0.1 and abs(each["proof"]["loss"]["share"]) < 0.01


WHOLE = "as whole tensors of its own"
REFUSED = {
    "dora": WHOLE,
    "ia3": WHOLE,
    "biases": WHOLE,
    "saved": WHOLE,
    "head": WHOLE,
    "biased": "no biases",
    "full": "a full model",
}


def test_what_llama_cpp_has_no_form_for_is_refused_at_once(tmp_path: Path) -> None:
    checkpoint = mixture(tmp_path, "qwen2", [*REFUSED, "rslora"], method="linear", modules="all")
    with pytest.raises(UnsupportedError, match="does not run these experts") as error:
        export_gguf(checkpoint, tmp_path / "GGUF", EXACT)
    found = dict(each.split(": ", 1) for each in str(error.value.found).split("; "))
    assert found.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert reason in found[name], found[name]
    assert error.value.expected == "rslora" and "--expert rslora" in str(error.value.remedy)
    assert [adapter.name for adapter in chosen_adapters(checkpoint, ["rslora"])] == ["rslora"]
    for name, reason in (("general", "nothing of it differs from the backbone"), ("nobody", "no such expert")):
        with pytest.raises(UnsupportedError) as refused:
            chosen_adapters(checkpoint, [name])
        assert reason in str(refused.value.found)
    assert not list(tmp_path.glob("GGUF*"))


def test_parts_that_a_family_holds_in_one_are_refused(tmp_path: Path) -> None:
    checkpoint = mixture(tmp_path, "phi3", ["patterns"])
    with pytest.raises(UnsupportedError, match="does not run the mixture, nor one of its experts") as error:
        chosen_adapters(checkpoint, None)
    assert "parts in one" in str(error.value.found) and "native architecture" in str(error.value.remedy)


def test_a_folder_of_another_is_not_replaced(lora: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "GGUF").mkdir()
    (tmp_path / "GGUF" / "notes.txt").write_text("mine")
    for replace in ("nothing", "modekit's own"):
        with pytest.raises(OutputError):
            export_gguf(lora, tmp_path / "GGUF", EXACT, replace=replace)
    assert [path.name for path in (tmp_path / "GGUF").iterdir()] == ["notes.txt"]


def test_the_backbone_is_the_base(lora: Checkpoint) -> None:
    names = backbone_names(lora)
    source = read_header(lora.folder.with_name("base") / "model.safetensors", where="base")
    assert set(names.values()) == set(source) and len(set(names.values())) == len(names)
    assert all(lora.tensors[name].shape == source[known].shape for name, known in names.items())


@pytest.mark.parametrize(
    ("scales", "alpha", "folded"),
    [
        ([2.0, 2.0], 8.0, []),
        ([2.0, 0.0], 8.0, ["1"]),
        ([0.0, 0.0], 1.0, ["0", "1"]),
        ([7 / 4, 7 / 4], 7.0, []),
    ],
)
def test_one_alpha_for_all_modules(scales: list[float], alpha: float, folded: list[str]) -> None:
    """Never zero, which llama.cpp takes for a scale of one."""
    ref = TensorRef("x", Path("x"), "F32", (4, 4), 0, 64)
    changes = {str(place): LowRankPart(scale, ref, ref, slice(0, 4)) for place, scale in enumerate(scales)}
    adapter = Adapter(0, "law", changes)
    assert (adapter.alpha, adapter.folded) == (alpha, folded)


class _Model:
    """A converter that does something to a weight (O, I)."""

    def __init__(self, *made: Any) -> None:
        self._made = made

    def modify_tensors(self, weight: torch.Tensor, name: str, layer: int | None) -> list[tuple[str, torch.Tensor]]:
        return [(f"blk.{layer}.x.weight", change(weight)) for change in self._made]


def test_what_is_more_than_another_order_of_rows_is_no_place_for_an_adapter() -> None:
    name, rows = place_of(_Model(lambda weight: weight[[2, 0, 1]]), "model.layers.7.x.weight", (3, 2))
    assert name == "blk.7.x.weight" and rows.tolist() == [2, 0, 1]
    for made in (
        [lambda weight: weight.T],
        [lambda weight: weight + 1],
        [lambda weight: weight[:, [1, 0]]],
        [lambda weight: weight[:2]],
        [lambda weight: weight, lambda weight: weight],
        [],
    ):
        with pytest.raises(ValueError, match="its rows in some order"):
            place_of(_Model(*made), "model.layers.7.x.weight", (3, 2))
