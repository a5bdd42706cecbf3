"""Experts come and go: what comes out is what a build of the new recipe gives, byte for byte, whatever is no longer there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from adapter_folders import lora, train_adapter, write_adapter
from conftest import Workshop, make_workshop, save, tiny_model, write_text
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import SourceError
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert, replace_expert
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from refusal import tree

pytestmark = pytest.mark.usefixtures("short_tables")
SHORT = {"tokens_per_domain": 200, "keep_tokens": 32, "sequence_length": 32}
WHOLE = ("medicine", "law", "code")
LOW_RANK = ("fever", "court", "yield")
WIDE = ("cough", "oath", "loop")
"""Adapters of attention and FFN, as most are: a plain mixture carries the attention's in channels."""
FEW_BITS = ("dose", "deed", "self")
"""Copies of the whole models, kept in two bits per number."""


@dataclass(frozen=True)
class Kind:
    """A kind of mixture: its experts, and what its recipe says."""

    mixture: dict[str, Any]
    output: dict[str, Any]
    names: Sequence[str] = WHOLE
    of_all: tuple[str, ...] = ()
    """Whose models must be there for a change: what they gave lies in one tensor with others, and is made anew."""
    and_leaving: bool = False
    """Whether the model of the expert that goes must be there, too: what it took lies in the tensors of all."""


def _routed(fit: str, **router: Any) -> dict[str, Any]:
    return {"method": "routing", "top_k": 2, "router": {"fit": fit, **router}}


NATIVE, MODEKIT = {"format": "plain"}, {"format": "modekit"}
FFN = {**NATIVE, "carry": "ffn"}
KINDS = {
    "native random": Kind(_routed("random", seed=3), NATIVE),
    "native logistic": Kind(_routed("logistic", **SHORT), NATIVE),
    "native lexical": Kind(_routed("lexical"), FFN),
    "native lexical with the base": Kind(_routed("lexical"), FFN, ("base_too", *WHOLE)),
    "native that carries all": Kind(_routed("lexical"), {**NATIVE, "carry": "all", "rank": 32}, WHOLE, WHOLE),
    "native in small files": Kind(_routed("random", seed=3), {**NATIVE, "shard_size": "20KB"}),
    "native average": Kind({**_routed("random", seed=3), "backbone": "average"}, NATIVE, WHOLE, WHOLE),
    "native uniform": Kind({"method": "linear"}, NATIVE),
    "whole models by pairs": Kind({**_routed("lexical", orders=[1, 2], buckets=512), "modules": ["mlp"]}, MODEKIT),
    "everything": Kind({**_routed("lexical"), "modules": "all"}, MODEKIT),
    "adapters": Kind(_routed("logistic", **SHORT), MODEKIT, LOW_RANK),
    "adapters without text": Kind(_routed("arrow"), MODEKIT, LOW_RANK),
    "adapters of attention, plain": Kind(_routed("lexical"), NATIVE, WIDE, WIDE, and_leaving=True),
    "adapters folded": Kind(_routed("random", seed=3), NATIVE, LOW_RANK),
    "a few bits": Kind({**_routed("random", granularity="sequence", per="model"), "modules": "all"}, MODEKIT, FEW_BITS),
    "adapters and whole models": Kind(
        {**_routed("lexical", orders=[1, 2], buckets=512), "modules": ["mlp"]}, MODEKIT, ("fever", "law", "yield")
    ),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = make_workshop(tmp_path_factory.mktemp("members"), num_hidden_layers=2)
    for seed, (name, rank) in enumerate(zip(LOW_RANK, (4, 2, 3), strict=True)):
        tensors = {key: value * (seed + 1) for key, value in lora("mlp.up_proj", 48, 32, rank, layers=2).items()}
        write_adapter(made.root / name, tensors, target_modules=["up_proj"], r=rank, lora_alpha=8)
        shutil.copyfile(made.root / "text" / f"{WHOLE[seed]}.jsonl", made.root / "text" / f"{name}.jsonl")
    for seed, name in enumerate(WIDE):
        parts = ["q_proj", "o_proj", "up_proj"]
        train_adapter(made.root / "base", LoraConfig(target_modules=parts, r=12, lora_alpha=24 + seed), made.root / name)
        shutil.copyfile(made.root / "text" / f"{WHOLE[seed]}.jsonl", made.root / "text" / f"{name}.jsonl")
    for name, model in zip(FEW_BITS, WHOLE, strict=True):
        shutil.copytree(made.root / model, made.root / name)
    for name in (*FEW_BITS, "base_too"):
        shutil.copyfile(made.root / "text" / "law.jsonl", made.root / "text" / f"{name}.jsonl")
    return made


def expert(name: str) -> dict[str, Any]:
    """As a recipe says it."""
    said = {"adapter": f"./{name}"} if name in (*LOW_RANK, *WIDE) else {"model": "base" if name == "base_too" else f"./{name}"}
    return {"name": name, **said, **({"bits": 2} if name in FEW_BITS else {}), "text": [f"./text/{name}.jsonl"]}


def recipe(kind: Kind, names: Sequence[str]) -> dict[str, Any]:
    return {
        "base_model": "./base",
        "experts": [expert(name) for name in names],
        "mixture": kind.mixture,
        "output": kind.output,
    }


def built(shop: Workshop, said: dict[str, Any], out: Path) -> Checkpoint:
    return build(make_plan(parse_recipe(said), shop.root), out)


def new(shop: Workshop, said: dict[str, Any]) -> NewExpert:
    return NewExpert({key: value for key, value in said.items() if key != "name"}, shop.root)


@contextmanager
def gone(shop: Workshop, *names: str) -> Iterator[None]:
    """While open, the models and texts of these are not there."""
    paths = [path for name in names for path in (shop.root / name, shop.root / "text" / f"{name}.jsonl") if path.exists()]
    for path in paths:
        path.rename(path.with_name(f"{path.name}.gone"))
    try:
        yield
    finally:
        for path in paths:
            path.with_name(f"{path.name}.gone").rename(path)


def content(out: Path) -> dict[str, Any]:
    """Every file, without what tells of the changes."""
    files: dict[str, Any] = dict(tree(out))
    record = json.loads((out / "modekit.json").read_text())
    record.pop("history", None)
    marker = json.loads((out / ".modekit").read_text())
    marker["files"].pop("modekit.json")
    return {**files, "modekit.json": record, ".modekit": marker}


def check_same(found: Path, wanted: Path) -> None:
    ours, theirs = content(found), content(wanted)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("name", KINDS)
def test_added_is_built_with_it_and_removed_is_built_without(shop: Workshop, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    *first, last = kind.names
    before = built(shop, recipe(kind, first), tmp_path / "before")
    joint = built(shop, recipe(kind, kind.names), tmp_path / "joint")
    others = [other for other in first if other not in kind.of_all]
    with gone(shop, *others):
        added = write_change(before, add_expert(before, last, new(shop, expert(last))), tmp_path / "added")
    check_same(added.folder, joint.folder)
    with gone(shop, *others, *(() if kind.and_leaving else (last,))):
        removed = write_change(added, remove_expert(added, last), tmp_path / "removed")
    check_same(removed.folder, before.folder)
    assert is_proven(verify(open_checkpoint(added.folder))) and is_proven(verify(open_checkpoint(removed.folder)))


@pytest.mark.parametrize("name", KINDS)
def test_the_first_goes_in_place(shop: Workshop, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    out = built(shop, recipe(kind, kind.names), tmp_path / "OUT")
    wanted = built(shop, recipe(kind, kind.names[1:]), tmp_path / "wanted")
    with gone(shop, *(other for other in kind.names if other not in kind.of_all[0 if kind.and_leaving else 1 :])):
        write_change(out, remove_expert(out, kind.names[0]), out.folder)
    check_same(out.folder, wanted.folder)
    assert is_proven(verify(open_checkpoint(out.folder), reload=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "wanted"]


@pytest.mark.parametrize("name", ["native logistic", "native lexical", "adapters", "everything"])
def test_another_model_in_the_place_of_one(shop: Workshop, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    first, second, third = kind.names
    out = built(shop, recipe(kind, [first, second]), tmp_path / "OUT")
    replaced = write_change(out, replace_expert(out, first, new(shop, expert(third))), tmp_path / "replaced")
    said = recipe(kind, [first, second])
    said["experts"][0] = {**expert(third), "name": first}
    wanted = built(shop, said, tmp_path / "wanted")
    check_same(replaced.folder, wanted.folder)
    assert replaced.record.history[-1].model_dump(exclude={"on"}) == {
        "what": "replace",
        "expert": first,
        "was": f"./{first}",
        "source": f"./{third}",
    }


def test_the_files_of_others_are_the_same_files(shop: Workshop, tmp_path: Path) -> None:
    before = built(shop, recipe(KINDS["native lexical"], WHOLE[:2]), tmp_path / "OUT")
    files = {path.name: path.stat().st_ino for path in before.folder.glob("model-*.safetensors")}
    write_change(before, add_expert(before, "code", new(shop, expert("code"))), before.folder)
    after = {path.name: path.stat().st_ino for path in before.folder.glob("model-*.safetensors")}
    same = {name for name in files if after[name] == files[name]}
    kept = {"model-backbone-00001.safetensors", "model-expert-00001-00001.safetensors", "model-expert-00002-00001.safetensors"}
    assert same == kept
    assert all((before.folder / name).stat().st_nlink == 1 for name in after)


def test_more_channels_are_made_when_they_are_needed(tmp_path: Path) -> None:
    """32 carry 15 experts: with one more every tensor is wider, and comes from the models again."""
    shop = make_workshop(tmp_path, num_hidden_layers=1, head_dim=64)
    write_text(shop.root / "few", ("law",), documents=6)
    same = [{"name": f"base{number}", "model": "base", "text": ["./few/law.jsonl"]} for number in range(13)]
    said = {**recipe(KINDS["native lexical"], WHOLE[:2]), "experts": [*map(expert, WHOLE[:2]), *same]}
    before = built(shop, said, tmp_path / "before")
    joint = built(shop, {**said, "experts": [*said["experts"], expert("code")]}, tmp_path / "joint")
    assert before.config["hidden_size"] == 32 + 32 and joint.config["hidden_size"] == 32 + 64
    added = write_change(before, add_expert(before, "code", new(shop, expert("code"))), tmp_path / "added")
    check_same(added.folder, joint.folder)


def test_of_an_adapter_that_is_gone_the_mixture_has_what_it_keeps_whole(shop: Workshop, tmp_path: Path) -> None:
    """DoRA's modules, one of which no other adapter changes."""
    for name, parts in (("first", ["q_proj", "up_proj"]), ("second", ["up_proj"]), ("third", ["up_proj"])):
        config = LoraConfig(target_modules=parts, r=4, use_dora=name == "first")
        train_adapter(shop.root / "base", config, tmp_path / name)
    experts = [{"name": name, "adapter": str(tmp_path / name)} for name in ("first", "second", "third")]
    said = {"base_model": "./base", "mixture": {"router": {"fit": "random"}}, "output": MODEKIT}
    out, wanted = (built(shop, {**said, "experts": experts[:count]}, tmp_path / f"of {count}") for count in (3, 2))
    (tmp_path / "first").rename(tmp_path / "first.gone")
    removed = write_change(out, remove_expert(out, "third"), tmp_path / "removed")
    check_same(removed.folder, wanted.folder)


def test_an_adapter_that_is_gone_and_needed_is_named(shop: Workshop, tmp_path: Path) -> None:
    """What a plain mixture carries of attention is of all at once."""
    out = built(shop, recipe(KINDS["adapters of attention, plain"], WIDE), tmp_path / "OUT")
    kept = tree(out.folder)
    with (
        gone(shop, "cough"),
        pytest.raises(SourceError, match=r"is missing or has changed since the mixture was built[^§]*cough"),
    ):
        write_change(out, remove_expert(out, "loop"), tmp_path / "removed")
    assert tree(out.folder) == kept and not (tmp_path / "removed").exists()


def test_an_adapter_that_was_changed_since_is_not_believed(shop: Workshop, tmp_path: Path) -> None:
    """Its scale stands in a small file, which no hash of weights knows."""
    for name in LOW_RANK[:2]:
        shutil.copytree(shop.root / name, tmp_path / name)
    said = recipe(KINDS["adapters"], LOW_RANK[:2])
    for each in said["experts"]:
        each["adapter"] = str(tmp_path / each["name"])
    out = built(shop, said, tmp_path / "OUT")
    config = json.loads((tmp_path / "fever" / "adapter_config.json").read_text())
    (tmp_path / "fever" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    added = write_change(out, add_expert(out, "yield", new(shop, expert("yield"))), tmp_path / "added")
    for module, place in out.shape.mixture.places.items():
        assert added.shape.mixture.places[module].scales[:2] == place.scales


def test_an_expert_whose_folder_has_another_model_now_can_go(shop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(shop.root / "law", tmp_path / "law")
    said = recipe(KINDS["native random"], WHOLE)
    said["experts"][1]["model"] = str(tmp_path / "law")
    out = built(shop, said, tmp_path / "OUT")
    shutil.rmtree(tmp_path / "law")
    save(tiny_model(seed=9, intermediate_size=64, num_hidden_layers=2), tmp_path / "law")
    removed = write_change(out, remove_expert(out, "law"), tmp_path / "removed")
    check_same(removed.folder, built(shop, recipe(KINDS["native random"], ("medicine", "code")), tmp_path / "wanted").folder)


def test_no_hub_is_asked_for_an_expert_that_stays(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop.root / "org").mkdir()
    shutil.copytree(shop.root / "law", shop.root / "org" / "law")
    said = recipe(KINDS["native random"], WHOLE)
    said["experts"][1]["model"] = "org/law"
    out = built(shop, said, tmp_path / "OUT")
    shutil.rmtree(shop.root / "org")

    def asked(*_args: object, **_options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("modekit.sources.hub.snapshot_download", asked)
    assert write_change(out, remove_expert(out, "medicine"), tmp_path / "removed").names == ["law", "code"]


def test_another_model_in_the_place_of_the_backbones_expert(shop: Workshop, tmp_path: Path) -> None:
    """What the others' router read through the old backbone is not of the new one."""
    kind = Kind({**_routed("logistic", **SHORT), "backbone": {"expert": "law"}}, NATIVE)
    out = built(shop, recipe(kind, WHOLE[:2]), tmp_path / "OUT")
    code = NewExpert({"model": "./code", "text": ["./text/law.jsonl"]}, shop.root)
    replaced = write_change(out, replace_expert(out, "law", code), tmp_path / "replaced")
    said = recipe(kind, WHOLE[:2])
    said["experts"][1]["model"] = "./code"
    check_same(replaced.folder, built(shop, said, tmp_path / "wanted").folder)


def test_what_is_kept_of_a_text_counts_and_not_what_it_says_now(shop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(shop.root / "text", tmp_path / "text")
    said = recipe(KINDS["native logistic"], WHOLE)
    for each in said["experts"]:
        each["text"] = [str(tmp_path / "text" / f"{each['name']}.jsonl")]
    out = built(shop, said, tmp_path / "OUT")
    wanted = write_change(out, remove_expert(out, "code"), tmp_path / "wanted")
    (tmp_path / "text" / "law.jsonl").write_text((tmp_path / "text" / "medicine.jsonl").read_text())
    check_same(write_change(out, remove_expert(out, "code"), tmp_path / "removed").folder, wanted.folder)


def test_what_others_put_into_the_folder_stays_and_nobody_else_may_read_it(shop: Workshop, tmp_path: Path) -> None:
    out = built(shop, recipe(KINDS["native random"], WHOLE), tmp_path / "OUT").folder
    out.chmod(0o700)
    (out / "notes.txt").write_text("mine")
    (out / "results").mkdir()
    (out / "results" / "eval.json").write_text("{}")
    write_change(open_checkpoint(out), remove_expert(open_checkpoint(out), "law"), out)
    assert (out / "notes.txt").read_text() == "mine" and (out / "results" / "eval.json").exists()
    assert out.stat().st_mode & 0o777 == 0o700


def test_given_weights_follow(shop: Workshop, tmp_path: Path) -> None:
    kind = Kind({"method": "linear", "weights": {"medicine": 2, "law": 1}}, NATIVE)
    before = built(shop, recipe(kind, WHOLE[:2]), tmp_path / "before")
    added = write_change(before, add_expert(before, "code", NewExpert({"model": "./code"}, shop.root, 3.0)), tmp_path / "added")
    assert added.record.recipe.mixture.weights == {"medicine": 2, "law": 1, "code": 3}
    said = recipe(kind, WHOLE)
    said["mixture"] = {"method": "linear", "weights": {"medicine": 2, "law": 1, "code": 3.0}}
    del said["experts"][2]["text"]
    check_same(added.folder, built(shop, said, tmp_path / "joint").folder)
    assert is_proven(verify(open_checkpoint(added.folder), reload=False))
