"""`modekit mix`: what it chooses, that its recipe builds the same bytes, and what it refuses before a byte is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

from adapter_folders import lora, train_adapter, write_adapter
from building.test_measured_form import full_shop
from command_line import ended, modekit
from conftest import Workshop
from modekit.building.mix import Models, plan_mix
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.files.marker import foreign_files
from modekit.routing import write_text
from modekit.sources.tokenizer import TOKENIZER_FILES
from modekit.text import written
from refusal import borrow, refuse, tree

pytestmark = pytest.mark.usefixtures("short_tables")
ADAPTERS_ALONE = {"fit": "arrow", "granularity": "context"}
INTERNAL = (".modekit", "recipe.yaml", "self-text")


@pytest.fixture(scope="module")
def shop(small_workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, law and code (full models), two adapters, and text."""
    root = tmp_path_factory.mktemp("mix")
    shutil.copytree(small_workshop.root, root, dirs_exist_ok=True)
    for seed, name in enumerate(("fever-lora", "court-lora"), 1):
        write_adapter(root / name, lora("mlp.up_proj", 48, 32, layers=1, seed=seed))
    for name in ("base", "law"):
        shutil.copytree(root / name, root / f"{name}-copy")
    shutil.copytree(root / "fever-lora", root / "fever-copy")
    shutil.copytree(root / "base", root / "mute")
    shutil.copytree(root / "base", root / "other")
    (root / "other" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 48}')
    config = shutil.copytree(root / "law", root / "rounded") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    for name in TOKENIZER_FILES:
        (root / "mute" / name).unlink(missing_ok=True)
    (root / "mute" / "chat_template.jinja").write_text("{{ messages }}")  # which alone reads nothing
    return root


@pytest.fixture(autouse=True)
def few_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that write their text write little."""
    for name in ("_MOST_DOCUMENTS", "_FEWEST_DOCUMENTS"):
        monkeypatch.setattr(written, name, 40)
    monkeypatch.setattr(write_text, "rows_at_once", lambda model, tokens: 20)


def texts(**files: str) -> list[str]:
    return [word for name, file in files.items() for word in ("--text", f"{name}=text/{file}.jsonl")]


def alike(*folders: Path) -> list[Any]:
    """The records of two mixtures, all other files of which are the same."""
    made, other = ({name: each for name, each in tree(folder).items() if not name.startswith(INTERNAL)} for folder in folders)
    records = [yaml.safe_load(each.pop("modekit.json") or b"") for each in (made, other)]
    assert made == other
    return records


def mix(root: Path, monkeypatch: pytest.MonkeyPatch, *words: str, base: str = "base") -> tuple[dict[str, Any], str]:
    """The recipe that `modekit mix base WORDS -o OUT` wrote, and what it printed; a build of that recipe is the same bytes."""
    monkeypatch.chdir(root)
    for name in ("OUT", "AGAIN"):
        shutil.rmtree(root / name, ignore_errors=True)
    printed = modekit("mix", base, *words, "-o", "OUT")
    assert not (root / "OUT.partial").exists()
    recipe = yaml.safe_load((root / "OUT" / "recipe.yaml").read_text())
    modekit("build", "OUT/recipe.yaml", "AGAIN")
    records = alike(root / "OUT", root / "AGAIN")
    assert [each.pop("recipe_folder") for each in records] == [".", "../OUT"]
    assert records[0] == records[1]
    assert is_proven(verify(open_checkpoint(root / "OUT"), reload=False))
    return recipe, printed


def test_full_models_with_text_become_a_plain_checkpoint_that_carries_them(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = texts(law="law", py="code", general="medicine")
    recipe, printed = mix(shop, monkeypatch, "law", "py=./code", *said)
    assert [each["name"] for each in recipe["experts"]] == ["law", "py", "general"]
    assert [each["model"] for each in recipe["experts"]] == ["../law", "../code", "base"]
    assert "law (law), py (./code), general (base)" in printed  # as they were typed
    assert recipe["mixture"] == {"top_k": 1, "router": {"fit": "lexical"}, "backbone": "average"}
    assert recipe["output"] == {"format": "plain", "carry": "all"} and "this plain checkpoint loses" in printed
    assert "\nrouter " in printed and "router lexical, fitted" in printed


def test_adapters_with_text_become_a_plain_checkpoint(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [*texts(**{"fever-lora": "medicine", "court-lora": "law"}), "--without-base"]
    recipe, printed = mix(shop, monkeypatch, "fever-lora", "court-lora", *said)
    assert recipe["output"] == {"format": "plain"} and recipe["mixture"]["router"] == {"fit": "lexical"}
    assert [each.get("adapter") for each in recipe["experts"]] == ["../fever-lora", "../court-lora"]
    assert "MixtralForCausalLM" in printed and not (shop / "OUT" / "self-text").exists()


def test_a_refit_goes_into_the_recipe_that_lies_in_the_mixture(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a build of it makes the same again."""
    said = [*texts(**{"fever-lora": "medicine", "court-lora": "law"}), "--without-base"]
    mix(shop, monkeypatch, "fever-lora", "court-lora", *said)
    modekit("fit", "OUT", "temperature=2.0")
    recipe = yaml.safe_load((shop / "OUT" / "recipe.yaml").read_text())
    assert recipe["mixture"]["router"]["temperature"] == 2.0
    modekit("build", "OUT/recipe.yaml", "AGAIN", "--overwrite")
    ours, theirs = alike(shop / "OUT", shop / "AGAIN")
    assert ours["recipe_digest"] == theirs["recipe_digest"] and ours["router"] == theirs["router"]
    own = (shop / "OUT" / "recipe.yaml").read_text().replace("2.0", "3.0")
    (shop / "OUT" / "recipe.yaml").write_text(own)
    modekit("fit", "OUT", "temperature=4.0")
    assert (shop / "OUT" / "recipe.yaml").read_text() == own  # the user's by now


def test_adapters_without_text_write_it(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = mix(shop, monkeypatch, "fever-lora", "court-lora")
    assert recipe["output"] == {"format": "plain"} and recipe["mixture"]["router"] == {"fit": "lexical"}
    assert [each["text"] for each in recipe["experts"]] == ["self"] * 3
    files = sorted(tree(shop / "OUT" / "self-text"))
    assert len(files) == 6 and {each.partition("-")[0] for each in files} == {"fever", "court", "base"}
    assert foreign_files(shop / "OUT") == []
    evaluated = modekit("eval", "OUT", "--tokens", "300", "--sequence-length", "64")
    assert "no real text of fever-lora, court-lora, general" in " ".join(evaluated.split())


def test_who_has_no_text_beside_others_writes_it(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = mix(shop, monkeypatch, "law", "code", *texts(law="law"))
    assert [each["text"] for each in recipe["experts"]] == [["../text/law.jsonl"], "self", "self"]
    assert recipe["output"]["format"] == "plain"


def test_an_expert_that_is_added_writes_its_text(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix(shop, monkeypatch, "fever-lora")
    modekit("add", "OUT", "--name", "court", "--adapter", "court-lora", "--force")
    assert yaml.safe_load((shop / "OUT" / "recipe.yaml").read_text())["experts"][-1]["text"] == "self"
    assert len(tree(shop / "OUT" / "self-text")) == 6 and foreign_files(shop / "OUT") == []
    made = (shop / "OUT" / "model-router.safetensors").read_bytes()
    shutil.rmtree(shop / "AGAIN")
    modekit("build", "OUT/recipe.yaml", "AGAIN")
    assert (shop / "AGAIN" / "model-router.safetensors").read_bytes() == made


def test_what_is_plain_runs_in_llama_cpp(shop: Path) -> None:
    """Full models, too, and without a measurement where it is asked for; here only as far as the plan."""
    models = Models("base", ["law", "code"], {name: [f"text/{name}.jsonl"] for name in ("law", "code")}, shop)
    plan, _ = plan_mix(models, shop / "PLAIN", form="plain")
    assert plan.shape.without_gguf is None and plan.otherwise is None
    other = plan_mix(models, shop / "ANY")[0].otherwise
    assert other is not None and other.shape.without_gguf is not None
    assert plan_mix(models, shop / "OWN", form="modekit")[0].config == other.config


@pytest.mark.parametrize(
    ("experts", "mixture", "said"),
    [
        (("fever-lora", "court-lora", "--without-base"), {"router": ADAPTERS_ALONE}, "from the adapters alone"),
        (("law", "fever-lora"), {"method": "linear", "backbone": "average"}, "none (fixed weights), as no"),
    ],
    ids=["adapters", "models"],
)
def test_what_cannot_write_says_what_that_costs(
    shop: Path, monkeypatch: pytest.MonkeyPatch, experts: tuple[str, ...], mixture: dict[str, Any], said: str
) -> None:
    recipe, printed = mix(shop, monkeypatch, *experts, base="mute")
    assert recipe["mixture"] == mixture and said in printed and "no tokenizer, which fit" in " ".join(printed.split())
    assert "next:" not in printed


@pytest.fixture(scope="module")
def readme_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What README's first command names: a base that chats, an adapter, and a full model, in folders of these names."""
    root = tmp_path_factory.mktemp("readme")
    full_shop(root, 2)
    template = "{% for each in messages %}{{ each['role'] }}: {{ each['content'] }} {% endfor %}"
    (root / "base" / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules="all-linear")
    train_adapter(root / "base", config, root / "law-lora")
    return root


def test_the_first_command_of_readme_makes_a_plain_checkpoint(readme_shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text()
    (line,) = re.findall(r"^modekit mix (.*)$", page, re.MULTILINE)
    base, *words, _, out = line.split()
    assert out == "OUT"
    shutil.copy(readme_shop / "text" / "law.jsonl", readme_shop / "law.jsonl")
    (readme_shop / "src").mkdir()
    shutil.copy(readme_shop / "text" / "code.jsonl", readme_shop / "src")
    _, printed = mix(readme_shop, monkeypatch, *words, base=base)
    assert "MixtralForCausalLM" in printed and "this plain checkpoint loses" in printed


def test_a_recipe_of_the_same_experts_is_the_same_mixture(readme_shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by hand, with nothing but the models and their text."""
    said = [f"--text={name}=text/{name}.jsonl" for name in ("law", "code")]
    mix(readme_shop, monkeypatch, "law=law-lora", "code", *said, "--text=general=text/medicine.jsonl")
    experts = [
        {"name": "law", "adapter": "./law-lora", "text": "text/law.jsonl"},
        {"name": "code", "model": "./code", "text": "text/code.jsonl"},
        {"name": "general", "model": "base", "text": "text/medicine.jsonl"},
    ]
    (readme_shop / "hand.yaml").write_text(yaml.safe_dump({"base_model": "./base", "experts": experts}))
    modekit("build", "hand.yaml", "HAND", "--overwrite")
    records = alike(readme_shop / "OUT", readme_shop / "HAND")
    for record in records:  # but for paths
        for key in ("recipe_folder", "recipe_digest"):
            record.pop(key)
        for expert in [record["recipe"], *record["recipe"]["experts"], *record["sources"]]:
            for key in ("base_model", "adapter", "model", "text", "spec"):
                expert.pop(key, None)
    assert records[0] == records[1]


def test_its_recipe_follows_a_change_unless_somebody_wrote_it(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    modekit("mix", "base", "law", "code", "-o", "CHANGED")
    file = shop / "CHANGED" / "recipe.yaml"
    modekit("remove", "CHANGED", "law")
    assert [each["name"] for each in yaml.safe_load(file.read_text())["experts"]] == ["code", "general"]
    modekit("plan", file)
    file.write_text(f"# mine\n{file.read_text()}")
    modekit("add", "CHANGED", "--name", "law", "--model", "./law", "--no-measure")
    assert file.read_text().startswith("# mine") and "name: law" not in file.read_text()
    assert f"{shop}/lwa" in refuse("add", "CHANGED", "--name", "more", "--model", "./lwa")


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "the base by its path": (("law", "./base"), "an expert is the base model itself"),
    "a copy of the base": (("law", "base-copy"), "an expert is the base model itself"),
    "a copy of an expert": (("law", "law-copy"), "an expert is the same as law"),
    "a copy of an adapter": (("fever-lora", "more=fever-copy"), "an expert is the same as fever-lora"),
    "a model of another family": (("law", "other"), "the expert is of another family than the base model"),
    "a model of other settings": (("law", "rounded"), "(rounded)"),
    "the base twice": (("law", "base", "more=base"), "a mixture needs two experts"),
    "one alone": (("law", "--without-base"), "a mixture needs two experts"),
    "a folder that is not there": (("lwa",), "model folder does not exist"),
    "text of nobody": (("law", *texts(lwa="law")), "did you mean 'law'?"),
    "text of the base, which is left out": (
        ("law", "code", "--without-base", *texts(general="law")),
        "the base is left out, and the experts are law, code",
    ),
    "text that is not there": (("law", "code", *texts(law="law", code="cod")), "the text does not exist"),
    "the name of a row": (("oracle=law",), "an expert cannot be named 'oracle'"),
    "a name twice": (("a=law", "a=code"), "two experts are named 'a'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_before_a_byte_is_written(shop: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    words, message = REFUSED[name]
    monkeypatch.chdir(shop)
    before = set(tree(shop))
    said = refuse("mix", "base", *words, "-o", "NEW")
    assert message in said and "../" not in said  # paths as they were typed
    assert set(tree(shop)) == before


def test_given_text_is_read_before_others_write(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    (shop / "empty.jsonl").touch()
    monkeypatch.setattr(write_text, "write_texts", lambda *_, **__: pytest.fail("an expert wrote"))
    code, _, said = ended("mix", "base", "law", "code", "--text", "law=empty.jsonl", "-o", "NEW")
    assert code == 2 and "the text is empty" in said and f"found:    {shop / 'empty.jsonl'}" in said


def test_a_plain_mixture_is_no_base(small_workshop: Workshop, tmp_path: Path) -> None:
    out = borrow(small_workshop, tmp_path).build(mixture={"router": {"fit": "random"}})
    said = refuse("mix", out, *(small_workshop.root / name for name in ("law", "code")), "-o", tmp_path / "NEW")
    assert "is itself a mixture" in said and "modekit add" in said


def test_what_is_there_and_what_is_no_model_are_refused(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    assert "--overwrite" not in refuse("mix", "base", "law", "-o", "code")  # a folder without the marker is not overwritten
    missing = refuse("mix", "base", "nolaw", "-o", "NEW")
    assert "(nolaw)" in missing and f"{shop}/nolaw" in missing and "partial" not in missing
    for model in ("law", "nolaw"):  # a text before any model, which may have to be downloaded
        assert f"{shop}/text/none.jsonl" in refuse("mix", "base", f"law={model}", *texts(law="none"), "-o", "NEW")
    assert "not a name" in refuse("mix", "base", "our law=law", "code", "-o", "NEW")
    assert "like the one that it was trained on" in refuse("mix", "fever-lora", "law", "-o", "NEW")
    (shop / "recipe.yaml").write_text("base_model: base\nexperts: [law, code]\nmixture: {method: linear}\n")
    assert "modekit build recipe.yaml OUT" in refuse("mix", "recipe.yaml", "law", "-o", "NEW")
