"""Every command that writes, typed in a folder of models, text, recipes and mixtures; a new one joins by a line in COMMANDS."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from adapter_folders import UP, write_adapter
from byte_level import save_byte_model
from chatting import TEMPLATE
from command_line import ended
from conftest import Workshop, make_workshop, shorten_tables
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError
from modekit.files.marker import foreign_files, read_marker
from modekit.files.write import is_temporary
from modekit.text import written
from refusal import Tree

FIT = {"fit": "logistic", "tokens_per_domain": 200, "keep_tokens": 32, "sequence_length": 32}
FEW = ("--tokens", "200")
MIXED = ("--text", "fever=text/code.jsonl", "--text", "law=text/law.jsonl")
TWO = ("--text", "law=text/law.jsonl", "--text", "code=text/code.jsonl")
SHORT = ("steps=3", "batch_tokens=256", "sequence_length=64", "select_tokens=200")
_VOLATILE = (".modekit",)
"""What has the time in it, or the digest of something that has."""


@dataclass(frozen=True)
class Command:
    """What a user types; OUT, ADAPTERS and so on are folders beside the recipes.

    Attributes:
        words: the command.
        least: how many moments there are at least, so that a hook which sees nothing is noticed.
        stride, hostile_stride: one in this many of the moments is tried, in `make test` and in `make test-hostile`.
        work: its work folder, where one run begins with what the one before has made: once all else is as it should be, what
            is killed is the tidying up of a run that is done, and the same command is the next one.
    """

    words: Sequence[str]
    least: int
    stride: int = 7
    hostile_stride: int = 1
    work: str = ""


COMMANDS = {
    "build": Command(("build", "native.yaml", "NEW"), 40, 17),
    "mix": Command(("mix", "base", "fever", "law", "--without-base", "-o", "NEW", *MIXED), 30, 23),
    "mix without text": Command(("mix", "base", "fever", "-o", "NEW"), 60, 97, 7),
    "build over": Command(("build", "other.yaml", "OUT", "--overwrite"), 40, 17),
    "fit": Command(("fit", "OUT", "fit=logistic"), 15),
    "fit modekit": Command(("fit", "ADAPTERS", "fit=random"), 15),
    "add": Command(("add", "OUT", "--name", "code", "--model", "code", "--text", "text/code.jsonl", *FEW, "--force"), 30),
    "add elsewhere": Command(
        ("add", "OUT", "--name", "code", "--model", "code", "--text", "text/code.jsonl", "--no-measure", "--out", "NEW"), 30
    ),
    "remove": Command(("remove", "THREE", "law"), 30),
    "replace": Command(("replace", "OUT", "law", "--model", "code", *FEW, "--force"), 30),
    "train gates": Command(("train", "OUT", "learning_rate=0.2", *SHORT, *FEW), 40, 37, 3, "OUT.training"),
    "train": Command(("train", "OUT", "what=experts", "backbone_learning_rate=0.01", *SHORT, *FEW), 40, 41, 3, "OUT.training"),
    "train elsewhere": Command(
        ("train", "OUT", "what=experts", "--out", "NEW", "backbone_learning_rate=0.01", *SHORT, *FEW),
        40,
        53,
        3,
        "NEW.training",
    ),
    "eval": Command(("eval", "OUT", *FEW), 10),
    "inspect": Command(("inspect", "OUT", *FEW), 8),
    "verify": Command(("verify", "OUT", "--deep", "--no-reload"), 10),
    "export": Command(("export", "ADAPTERS", "EXPORTED"), 40, 11),
    "export gguf": Command(("export", "BYTES", "NEW", "--gguf", "--outtype", "f32"), 15, 37, 3),
    "extract": Command(("extract", "medicine", "NEW", "--base", "base", "--rank", "2"), 20),
    "specialize": Command(("specialize", "base", "NEW", "--text", "text/law.jsonl", "steps=2"), 20),
    "specialize with a teacher": Command(
        (
            "specialize",
            "base",
            "NEW",
            "--text",
            "text/law.jsonl",
            "--teacher",
            "medicine",
            "steps=3",
            "batch_tokens=256",
            "sequence_length=64",
        ),
        40,
        23,
        work="NEW.training",
    ),
    "upcycle": Command(("upcycle", "base", "NEW", "--experts", "2", "--top-k", "1"), 20, 11),
    "densify": Command(("densify", "OUT", "NEW", "--by", "sum", *FEW), 15),
    "densify by distillation": Command(("densify", "OUT", "NEW", *SHORT, *FEW), 40, 47, 3, "NEW.training"),
    "data balance": Command(("data", "balance", "NEW", "--tokenizer", "base", "max_diff_percent=20", *TWO), 20),
    "data tokenizer": Command(("data", "tokenizer", "NEW", "--vocabulary", "300", *TWO), 15),
    "report": Command(("report", "OUT"), 15),
}


def make_writing_shop(root: Path) -> Workshop:
    """Models, text, recipes, a native mixture and one of adapters."""
    made = make_workshop(root, num_hidden_layers=1)
    (made.root / "base" / "chat_template.jinja").write_text(TEMPLATE)
    layer = {name: tensor for name, tensor in UP.items() if ".layers.0." in name}
    for name in ("fever", "court"):
        write_adapter(made.root / name, layer, target_modules=["up_proj"], r=4, lora_alpha=8)
    experts = made.recipe["experts"][:2]
    adapters = [{"name": name, "adapter": f"./{name}", "text": "./text/law.jsonl"} for name in ("fever", "court")]
    recipes = {
        "native": {**made.recipe, "experts": experts, "mixture": {"router": FIT}},
        "three": {**made.recipe, "mixture": {"router": FIT}},
        "other": {**made.recipe, "experts": experts, "mixture": {"router": {"fit": "random", "seed": 5}}},
        "adapters": {**made.recipe, "experts": adapters, "mixture": {"router": {**FIT, "fit": "arrow"}}},
    }
    recipes["adapters"]["mixture"] = {"router": {"fit": "arrow"}}
    for seed, name in enumerate(("bytes0", "bytes1")):
        save_byte_model(made.root / name, "llama", seed, num_hidden_layers=1)
    whole = [{"name": name, "model": f"./{name}"} for name in ("bytes0", "bytes1")]
    recipes["bytes"] = {"base_model": "./bytes0", "experts": whole, "mixture": {"router": {"fit": "random"}}}
    for name, recipe in recipes.items():
        (made.root / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for recipe_name, out in (
        ("native", "OUT"),
        ("three", "THREE"),
        ("adapters", "ADAPTERS"),
        ("bytes", "BYTES"),
    ):
        assert ended("build", made.root / f"{recipe_name}.yaml", made.root / out)[0] == 0
    return made


def run_in(root: Path, words: Sequence[str]) -> tuple[object, str]:
    """The command, typed in a folder; exit code and what it said of an error."""
    before = Path.cwd()
    os.chdir(root)
    try:
        with pytest.MonkeyPatch.context() as patch:  # experts that write their text write little
            for name in ("_MOST_DOCUMENTS", "_FEWEST_DOCUMENTS"):
                patch.setattr(written, name, 24)
            shorten_tables(patch)
            code, _, stderr = ended(*words)
    finally:
        os.chdir(before)
    return code, stderr


def check_whole(root: Path) -> None:
    """Every output that is there is all there, and is what it says."""
    for out in (root / name for name in ("OUT", "NEW", "THREE", "ADAPTERS")):
        try:
            opened = open_checkpoint(out)
        except CheckpointError as error:
            assert "modekit.json is missing" in str(error), error
            assert not (out / "config.json").exists() or read_marker(out) is not None
        else:
            assert is_proven(verify(opened, reload=False))
    exported = list((root / "EXPORTED").glob("*[!l]"))
    for out in (root / "NEW", *(path for path in exported if path.suffix != ".partial")):
        assert not out.exists() or foreign_files(out) == []


def stable(found: Tree) -> Tree:
    """What must be the same after every kill; a file in the making may lie in the user's own folder, where nobody tidies up."""
    return {
        name: content
        for name, content in found.items()
        if not any(part in _VOLATILE for part in name.split("/")) and not ("/" not in name and is_temporary(Path(name)))
    }
