"""`modekit inspect`: planted routers give the planted numbers, an expert left out is a mixture without it."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modekit.cli.inspection as printing_module
import modekit.evaluation.inspection.passes as passes_module
from chatting import make_chat_workshop
from command_line import modekit
from conftest import DOMAINS, Workshop, logits_of, make_workshop, save, tiny_model
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint, open_with_any_router
from modekit.cli.printing import print_result
from modekit.errors import CheckpointError, TextError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import UserMessage, inspect, inspect_text
from modekit.evaluation.inspection.likeness import similarity
from modekit.evaluation.inspection.result import Inspection, TextTrace, TokenLoss
from modekit.evaluation.inspection.tokens import token_texts, words_of
from modekit.files.typed import as_kind
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.plan import ROUTER_FILE
from modekit.text.sequences import make_batches
from refusal import borrow, refuse
from rounding import assert_close

pytestmark = pytest.mark.usefixtures("short_tables")

SMALL: dict[str, Any] = {"tokens_per_domain": 300, "sequence_length": 32}
MODEKIT = {"output": {"format": "modekit"}}
RANDOM = {"fit": "random", "seed": 1}
CONTEXT = {**RANDOM, "granularity": "context"}
MIXTURES: dict[str, dict[str, Any]] = {
    "native": {"mixture": {"method": "routing", "top_k": 2, "router": RANDOM}},
    "native weighted": {"mixture": {"method": "linear", "weights": {"medicine": 1, "law": 2, "code": 5}}},
    "token": {"mixture": {"method": "routing", "top_k": 2, "router": RANDOM}, **MODEKIT},
    "gating": {"mixture": {"method": "gating", "router": RANDOM}, **MODEKIT},
    "top_p": {"mixture": {"method": "routing", "top_p": 0.6, "router": RANDOM}, **MODEKIT},
    "context": {"mixture": {"method": "routing", "top_k": 2, "router": CONTEXT}, **MODEKIT},
    "bigrams": {"mixture": {"method": "routing", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}}, **MODEKIT},
    "everything": {
        "mixture": {"method": "routing", "modules": "all", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}},
        **MODEKIT,
    },
    "model": {"mixture": {"method": "routing", "router": {**RANDOM, "per": "model"}}, **MODEKIT},
    "projection": {"mixture": {"method": "routing", "modules": ["q", "mlp"], "router": {**RANDOM, "per": "projection"}}},
    "feature": {"mixture": {"method": "routing", "modules": ["q", "down"], "router": {**RANDOM, "per": "feature"}}},
    "always on": {"mixture": {"method": "routing", "always_on": {"expert": "code", "weight": 0.2}, "router": RANDOM}},
    "always chosen": {"mixture": {"method": "routing", "always_on": {"expert": "code"}, "router": RANDOM}},
    "always base": {"mixture": {"method": "routing", "always_on": {"expert": "base", "weight": 0.2}, "router": RANDOM}},
    "linear": {"mixture": {"method": "linear", "weights": {"medicine": 1, "law": 2, "code": 5}}, **MODEKIT},
}


def built(shared: Workshop, root: Path, name: str, **changes: Any) -> Checkpoint:
    return open_checkpoint(borrow(shared, root).build(**{**MIXTURES[name], **changes}))


def plant(checkpoint: Checkpoint, rows: list[list[float]]) -> None:
    """Write gates with these values at their beginning and zeros elsewhere."""
    gates = load_file(checkpoint.folder / ROUTER_FILE)
    for gate in gates.values():
        gate.zero_()
        for row, values in enumerate(rows):
            gate[row, : len(values)] = torch.tensor(values)
    save_file(gates, checkpoint.folder / ROUTER_FILE, metadata={"format": "pt"})


LEFT_OUT = ["native", "native weighted", "gating", "context", "everything", "feature", "always base", "always on"]


@pytest.mark.parametrize(("name", "place"), [*((name, 0) for name in LEFT_OUT), ("always chosen", 2)])
def test_an_expert_left_out_is_a_mixture_without_it(
    shared_workshop: Workshop, tmp_path: Path, ids: torch.Tensor, name: str, place: int
) -> None:
    """Leaving another one out keeps one that is always on; leaving that out is the mixture without the setting."""
    checkpoint = built(shared_workshop, tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    mixture = {key: said for key, said in MIXTURES[name]["mixture"].items() if key != "always_on" or place == 0}
    smaller = without(shared_workshop, tmp_path / "smaller", name, place, model, mixture=mixture)
    free = logits_of(model, ids)
    with mixture_of(model, checkpoint).left_out(place):
        left = logits_of(model, ids)
    torch.testing.assert_close(left, logits_of(smaller, ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(left, free, atol=1e-3)
    assert_close(logits_of(model, ids), free)


def without(shared: Workshop, root: Path, name: str, place: int, model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The same mixture built without one expert, its gates those of `model` without that expert's rows."""
    root.mkdir()
    workshop = borrow(shared, root)
    workshop.recipe["experts"] = [expert for row, expert in enumerate(workshop.recipe["experts"]) if row != place]
    changed = {**MIXTURES[name], **changes}
    weights = changed["mixture"].get("weights")
    if weights:
        kept = {expert: weight for expert, weight in weights.items() if expert != DOMAINS[place]}
        changed["mixture"] = {**changed["mixture"], "weights": kept}
    changed["output"] = {"format": "plain" if name.startswith("native") else "modekit"}
    smaller = AutoModelForCausalLM.from_pretrained(workshop.build(**changed), dtype=torch.float32).eval()
    parameters = dict(smaller.named_parameters())
    with torch.no_grad():
        for gate_name, gate in model.named_parameters():
            if gate_name.endswith(".gate") or gate_name.endswith(".gate.weight"):
                by_expert = gate.reshape(-1, 3, gate.shape[-1])
                rows = [row for row in range(3) if row != place]
                parameters[gate_name].copy_(by_expert[:, rows].reshape(parameters[gate_name].shape))
    return smaller


def test_the_weights_are_those_of_the_modules(shared_workshop: Workshop, tmp_path: Path) -> None:
    """Of the modekit architecture, whose modules keep what they used; every way to decide."""
    for name in ("token", "gating", "top_p", "context", "bigrams", "always on", "always base", "feature", "linear"):
        checkpoint = built(shared_workshop, tmp_path, name)
        data = inspect_text(checkpoint, "fever dose breach").as_data()
        model = load_model(checkpoint.folder)
        ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint.folder)("fever dose breach")["input_ids"]])
        with torch.inference_mode():
            model(input_ids=ids)
        for router, weights in zip(checkpoint.shape.positions, data["weights"], strict=True):
            used = model.get_submodule(router.name.removesuffix(".router.gate")).weights[0]
            used = used.mean(1) if used.ndim == 3 else used
            torch.testing.assert_close(torch.tensor(weights), used, atol=1e-5, rtol=1e-4)


def check_schema(data: dict[str, Any], checkpoint: Checkpoint) -> None:
    """What docs/inspect.md promises of inspect.json."""
    count, routers = len(data["experts"]), len(data["routers"])
    assert data["experts"] == checkpoint.names and routers == len(checkpoint.shape.positions)
    assert data["checkpoint"] == checkpoint.identity
    assert all(set(router) == {"name", "layer", "module"} for router in data["routers"])
    for name, entry in data["per_domain"].items():
        assert (entry["expert"] is None) == (entry["agreement"] is None) == (name not in DOMAINS)
        for key in ("shares", "chosen"):
            assert [len(row) for row in entry[key]] == [count] * routers
        assert len(entry["entropy"]) == routers and list(entry["without"]) == data["experts"]
        assert all(0 <= value <= 1 for row in entry["chosen"] for value in row)
        assert all(0 <= value <= math.log(count) + 1e-6 for value in entry["entropy"])
    assert [len(row) for row in data["similarity"]] == [count] * count
    assert set(data["top_tokens"]) == set(data["experts"])
    for text in data["texts"]:
        assert set(text) == {"domain", "loss", "tokens", "weights", "without"}
        assert 1 < len(text["tokens"]) <= 200
        assert [len(router) for router in text["weights"]] == [len(text["tokens"])] * routers
        assert text["tokens"][0]["loss"] is None and all(token["loss"] is not None for token in text["tokens"][1:])
        mean = sum(token["loss"] for token in text["tokens"][1:]) / (len(text["tokens"]) - 1)
        assert text["loss"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["native", "native weighted", "gating", "context", "everything", "projection", "always base", "linear"]
)
def test_every_mixture_is_inspected(shared_workshop: Workshop, tmp_path: Path, name: str) -> None:
    poetry = tmp_path / "poetry.jsonl"
    poetry.write_text(json.dumps({"text": "a rose is a rose is a rose"}))
    checkpoint = built(shared_workshop, tmp_path, name, eval={"poetry": str(poetry)})
    data = inspect(checkpoint, **SMALL).as_data()
    check_schema(data, checkpoint)
    assert list(data["per_domain"]) == [*DOMAINS, "poetry"]
    total = 0.8 if name == "always base" else 1.0
    for entry in data["per_domain"].values():
        assert all(sum(row) == pytest.approx(total, abs=1e-5) for row in entry["shares"])
    for row in data["per_domain"]["law"]["shares"] if name in {"native weighted", "linear"} else ():
        assert row == pytest.approx([0.125, 0.25, 0.625], abs=1e-6)
    written = json.loads((checkpoint.folder / "results" / "inspect.json").read_text())
    assert written == data
    # The columns of a report stand in the order of its rows.
    assert list(written["per_domain"]) == list(data["per_domain"])


def test_where_routers_stand(shared_workshop: Workshop, tmp_path: Path) -> None:
    def places(name: str) -> list[tuple[int | None, str]]:
        return [(router.layer, router.module) for router in built(shared_workshop, tmp_path, name).shape.positions]

    assert places("native") == places("token") == places("linear") == [(0, "mlp"), (1, "mlp"), (2, "mlp")]
    assert places("model") == places("bigrams") == places("everything") == [(None, "")]
    mixed = ["self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sorted(places("projection")) == sorted((layer, module) for layer in range(3) for module in mixed)
    workshop = borrow(shared_workshop, tmp_path)
    out = workshop.build(mixture={"router": RANDOM, "modules": ["q", "v", "mlp"], "layers": [1]})
    assert [(router.layer, router.module) for router in open_checkpoint(out).shape.positions] == [(1, "mlp"), (1, "self_attn")]


def test_a_router_that_always_takes_one_expert(shared_workshop: Workshop, tmp_path: Path) -> None:
    """A table whose rows for law are high: everything else is dead, worth nothing and never agrees."""
    checkpoint = built(shared_workshop, tmp_path, "bigrams")
    plant(checkpoint, [[0.0] * 512, [500.0] * 512, [0.0] * 512])
    checkpoint = open_with_any_router(checkpoint.folder)
    data = inspect(checkpoint, **SMALL).as_data()
    assert [note.partition(" is dead in every router")[0] for note in data["notes"][:2]] == ["medicine", "code"]
    results = evaluate(checkpoint, **SMALL, labels="gate", write=False)
    domain_losses = {
        name: results.row(row).scores[name].loss
        for name, row in (("medicine", "mixture, wrong label"), ("law", "oracle"), ("code", "mixture"))
    }
    for name, entry in data["per_domain"].items():
        assert entry["shares"] == entry["chosen"] == [[0, 1, 0]] and entry["entropy"] == [0]
        assert entry["agreement"] == [1 if name == "law" else 0]
        assert entry["loss"] == pytest.approx(domain_losses[name], rel=1e-5)
        assert entry["without"]["medicine"] == entry["without"]["code"] == 0 != entry["without"]["law"]
    assert data["top_tokens"]["law"] and not data["top_tokens"]["medicine"] and not data["top_tokens"]["code"]


@pytest.mark.parametrize(("model_type", "overrides"), [("llama", {}), ("qwen3", {"head_dim": 8})], ids=["llama", "qwen3"])
def test_similarity_is_of_what_the_experts_changed(tmp_path: Path, model_type: str, overrides: dict[str, Any]) -> None:
    """Against all changes in one vector; of a model that is gone, or another one now, nothing is said."""
    workshop = make_workshop(tmp_path, model_type, **overrides)
    checkpoint = open_checkpoint(workshop.build())
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("base", *DOMAINS)]
    vectors = [torch.cat([p.flatten() for name, p in m.named_parameters() if ".layers." in name]).detach() for m in models]
    expected = torch.nn.functional.normalize(torch.stack(vectors[1:]) - vectors[0], dim=-1)
    found = torch.tensor(similarity(checkpoint)[0], dtype=torch.float64)
    torch.testing.assert_close(found, expected @ expected.T, atol=1e-5, rtol=0)
    save(tiny_model(seed=7), tmp_path / "law")
    (note,) = similarity(checkpoint)[1]
    assert "law (" in note and "has changed since the mixture was built" in note
    (tmp_path / "base").rename(tmp_path / "gone")
    without, notes = similarity(checkpoint)
    assert without == [] and "base (it is no longer where" in notes[0]
    assert "Similarity of the experts" not in [table.title for table in inspect(checkpoint, **SMALL).tables()]


def test_padding_and_the_order_of_batches_change_nothing(
    shared_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("native", "feature"):
        checkpoint = built(shared_workshop, tmp_path, name)
        together = inspect(checkpoint, **SMALL).as_data()

        def one_by_one(sequences: Any, *, tokens: int) -> Iterator[Any]:
            yield from reversed(list(make_batches(sequences, tokens=1)))

        with monkeypatch.context() as patched:
            patched.setattr(passes_module, "make_batches", one_by_one)
            alone = inspect(checkpoint, **SMALL).as_data()
        for one, other in zip(flat(alone), flat(together), strict=True):
            assert one == (pytest.approx(other, rel=1e-4, abs=1e-5) if isinstance(other, float) else other)


def flat(data: Any) -> list[Any]:
    """Keys and values of lists in lists and mappings, in their order."""
    if isinstance(data, dict):
        data = [*data, *data.values()]
    return [leaf for each in data for leaf in flat(each)] if isinstance(data, list) else [data]


def test_a_single_expert_cannot_be_left_out(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    workshop.recipe["experts"] = workshop.recipe["experts"][:1]
    checkpoint = open_checkpoint(workshop.build(mixture={"method": "routing", "top_k": 1, "router": RANDOM}))
    data = inspect(checkpoint, **SMALL).as_data()
    (entry,) = data["per_domain"].values()
    assert entry["without"] == {} and "one expert" in data["notes"][0]
    print_result(Inspection.from_data(data))
    printing_module.print_trace(inspect_text(checkpoint, "fever and dose"))


def test_no_figure_comes_from_weights_that_are_not_finite(shared_workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = built(shared_workshop, tmp_path, "native")
    ref = next(ref for name, ref in checkpoint.tensors.items() if ".experts.2." in name)
    tensors = load_file(ref.file)
    next(tensors[name] for name in tensors if ".experts.2." in name).view(-1)[0] = math.nan
    save_file(tensors, ref.file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(checkpoint.folder)
    with pytest.raises(CheckpointError, match="not finite") as error:
        inspect(checkpoint, **SMALL)
    assert "modekit verify" in str(error.value)
    with pytest.raises(CheckpointError, match="not finite"):
        inspect_text(checkpoint, "fever dose breach of clause")


# One text.


def test_a_trace_is_one_pass_over_the_text(shared_workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = built(shared_workshop, tmp_path, "native")
    text = "fever artery, breach\nof clause"
    trace = inspect_text(checkpoint, text).as_data()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    model, ids = load_model(checkpoint.folder), torch.tensor([tokenizer(text).input_ids])
    assert "".join(token["text"] for token in trace["tokens"]) == tokenizer.decode(ids[0])
    losses = torch.nn.functional.cross_entropy(logits_of(model, ids)[0, :-1], ids[0, 1:], reduction="none")
    assert [token["loss"] for token in trace["tokens"]][1:] == pytest.approx(losses.tolist(), rel=1e-4)
    for place, name in enumerate(DOMAINS):
        with mixture_of(model, checkpoint).left_out(place):
            left = torch.nn.functional.cross_entropy(logits_of(model, ids)[0, :-1], ids[0, 1:])
        assert trace["without"][name] == pytest.approx(float(left - losses.mean()), abs=1e-5)
    base = load_model(checkpoint.recipe_root / checkpoint.record.recipe.base_model)
    expected = torch.nn.functional.cross_entropy(logits_of(base, ids)[0, :-1], ids[0, 1:])
    assert trace["base_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_text_longer_than_the_models_positions_is_read_in_windows(shared_workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = built(shared_workshop, tmp_path, "context")
    text = ("fever artery dose " * 60)[: 128 * 6 + 1]  # the last token stands alone, and is not read
    trace = inspect_text(checkpoint, text).as_data()
    assert len(trace["tokens"]) == 128 * 6 and "read in 6 windows" in trace["notes"][0]
    assert [place for place, token in enumerate(trace["tokens"]) if token["loss"] is None] == list(
        range(0, len(trace["tokens"]), 128)
    )
    assert [len(router) for router in trace["weights"]] == [len(trace["tokens"])] * 3
    alone = inspect_text(checkpoint, text[128:256]).as_data()  # a token is a character
    assert trace["weights"][2][128:256] == [pytest.approx(row, abs=1e-5) for row in alone["weights"][2]]


def test_a_very_long_text_is_read_in_part_and_prints_its_beginning(shared_workshop: Workshop, tmp_path: Path) -> None:
    trace = inspect_text(built(shared_workshop, tmp_path, "native"), "the patient " * 600).as_data()
    assert len(trace["tokens"]) == 4096 and "at most 4,096 tokens" in trace["notes"][-1]
    shown = drawn(trace)
    assert "The first 200 words are shown; the text has 4,096 tokens." in shown and len(shown) < 8_000


def test_a_model_without_a_largest_position_is_inspected(
    shared_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = built(shared_workshop, tmp_path, "native")
    known = inspect_text(checkpoint, "fever dose").loss
    monkeypatch.setitem(checkpoint.config, "max_position_embeddings", None)  # type: ignore[misc]
    assert inspect_text(checkpoint, "fever dose").loss == known


def drawn(trace: dict[str, Any], **options: Any) -> str:
    """What the terminal gets."""
    stream = io.StringIO()
    with patch.object(printing_module, "out", Console(file=stream, width=100, **options)):
        printing_module.print_trace(as_kind(trace, TextTrace))
    return stream.getvalue()


HOSTILE = "fever [bold red]x[/] \x1b[31mred\x1b[0m [link=http://x]y[/link] \x07 \u202e\u200b <script>"


def test_a_text_is_drawn_and_not_obeyed(shared_workshop: Workshop, tmp_path: Path) -> None:
    trace = inspect_text(built(shared_workshop, tmp_path, "native"), "abc def").as_data()
    words = HOSTILE.split(" ")
    trace["tokens"] = [{"text": f" {word}", "loss": 1.0} for word in words]
    trace["weights"] = [[[0.1, 0.9, 0.0]] * len(words)] * 3
    trace["experts"] = ["[red]a[/]", "b", "c"]
    trace["without"] = dict.fromkeys(trace["experts"], 0.5)
    plain = drawn(trace)
    assert "\x1b" not in plain and "\x07" not in plain and "\u202e" not in plain
    for piece in ("[bold", "red]x[/]", "\\x1b[31mred\\x1b[0m", "[red]a[/]", "<script>", "B90 1.0"):
        assert piece in plain
    coloured = drawn(trace, force_terminal=True, color_system="truecolor")
    assert "48;2;" in coloured and "\x1b[31m" not in coloured and "\\x1b[31mred" in coloured
    assert "\x1b]8" not in coloured


def test_characters_of_several_tokens_come_whole() -> None:
    class Bytes:
        bos_token_id = None

        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    text = "aé漢 \ufffd\ufffd b" + "\ufffd" * 20
    tokens = token_texts(Bytes(), list(text.encode()))  # type: ignore[arg-type]
    assert "".join(tokens) == text and tokens[:3] == ["a", "", "é"]
    assert token_texts(Bytes(), [97, 0xC3]) == ["a", "\ufffd"]  # type: ignore[arg-type]


def test_a_character_of_several_tokens_counts_with_the_word_that_it_begins() -> None:
    """Tokens of bytes: the space and two thirds of the character come before the token that shows them."""
    tokens = [TokenLoss(text, loss) for text, loss in (("ab", None), ("", 2.0), ("", 3.0), (" \u6f22", 4.0), (" c", 5.0))]
    weights = [[[1.0, 0.0]] + [[0.0, 1.0]] * 3 + [[0.5, 0.5]]]
    trace = TextTrace(
        loss=3.5,
        tokens=tokens,
        weights=weights,
        without={},
        experts=["a", "b"],
        routers=[],
        top_k=1,
        base_loss=None,
        entropy=0.0,
        notes=[],
    )
    words, more = words_of(trace, 9)
    assert [(word.text, word.loss) for word in words] == [("ab", None), ("\u6f22", 9.0), ("c", 5.0)] and not more
    assert [word.weights_E.tolist() for word in words] == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]


def test_a_text_of_no_domain_is_said_to_be_one(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    checkpoint = open_checkpoint(workshop.build(mixture={"method": "routing", "top_k": 3, "router": RANDOM}))
    plant(checkpoint, [])
    trace = inspect_text(checkpoint, "zzz qqq xxx").as_data()
    assert trace["entropy"] == pytest.approx(math.log(3), abs=1e-5)


# The command line.


def test_the_command_prints_tables(shared_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = built(shared_workshop, tmp_path, "native").folder
    options = ("--tokens", 300, "--sequence-length", 32)
    shown = modekit("inspect", out, *options)
    for piece in ("agreement", "left out", "Similarity", "largest mean weight", "inspect.json"):
        assert piece in shown
    data = json.loads(modekit("inspect", out, *options, "--json"))
    assert data == json.loads((out / "results" / "inspect.json").read_text())
    assert f"{data['per_domain']['law']['without']['code']:+.3f}" in shown


def said(words: bytes) -> Any:
    """What comes in from outside."""
    return patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(words)))


def test_the_command_prints_a_text(shared_workshop: Workshop, tmp_path: Path) -> None:
    out = built(shared_workshop, tmp_path, "native").folder
    with said(b"fever dose [bold]"):
        traces = {modekit("inspect", out, "--json", "--text", given) for given in ("fever dose [bold]", "-")}
    assert len(traces) == 1
    shown = modekit("inspect", out, "--text", "fever dose [bold]")
    assert "nats per token, of the base model" in shown
    assert not (out / "results" / "inspect.json").exists()


def test_what_cannot_be_inspected_is_refused(shared_workshop: Workshop, tmp_path: Path) -> None:
    out = built(shared_workshop, tmp_path, "native").folder
    assert "too short" in refuse("inspect", out, "--text", " \n ")
    assert "too short" in refuse("inspect", out, "--text", "a")
    with said(b"\xff\xfe\x00"):
        assert "not UTF-8" in refuse("inspect", out, "--text", "-")
    assert "a text (--text)" in refuse("inspect", out, "--chat")
    assert "a user message (--chat)" in refuse("inspect", out, "--text", "a b", "--system", "Be brief.")
    assert "not a modekit checkpoint" in refuse("inspect", shared_workshop.root / "base")
    silent = borrow(shared_workshop, tmp_path)
    silent.recipe["experts"] = [
        {key: value for key, value in expert.items() if key != "text"} for expert in silent.recipe["experts"]
    ]
    assert "no text to evaluate on" in refuse("inspect", silent.build("SILENT"))


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_chat_workshop(tmp_path_factory.mktemp("chat")).build("OUT", output={"format": "plain"}))


def test_a_chat_is_shown_up_to_where_its_answer_begins(chatting: Checkpoint) -> None:
    said = inspect_text(chatting, UserMessage("Be brief", "what is a fever"))
    text = "".join(token.text for token in said.tokens).replace(" ", "")
    assert text.startswith("<|im_start|>systemBe") and text.endswith("<|im_start|>assistant")
    last = [sum(router[-1][place] for router in said.weights) for place in range(len(chatting.names))]
    assert chatting.names[last.index(max(last))] == "medicine"
    shown = modekit("inspect", str(chatting.folder), "--chat", "--text", "what does def mean")
    assert "the answer begins with code" in shown


def test_of_a_long_chat_the_end_is_read_where_the_answer_begins(chatting: Checkpoint) -> None:
    said = inspect_text(chatting, UserMessage(None, "what is a fever " * 1_200))
    assert len(said.tokens) == 4096 and "at most 4,096 tokens" in said.notes[-1]
    assert "".join(token.text for token in said.tokens).replace(" ", "").endswith("<|im_start|>assistant")


def test_without_a_template_there_is_no_chat(shared_workshop: Workshop) -> None:
    plain = open_checkpoint(shared_workshop.build("NO-CHAT"))
    with pytest.raises(TextError, match=r"messages need a chat template(.|\n)*into that folder"):
        inspect_text(plain, UserMessage(None, "what is fever"))
    (plain.folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }} {% endfor %}")
    inspect_text(plain, UserMessage(None, "what is fever"))  # the remedy works
