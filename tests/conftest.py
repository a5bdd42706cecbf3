"""Tiny models, tokenizers and texts, made on the spot. One thread here and in every process of a test, no network."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are imported; child processes inherit it

# Where transformers copies the code that lies beside a checkpoint: each worker for itself, and none into the user's folder.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modekit-modules-")

import hypothesis
import pytest
import torch
import yaml
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from sampled import mark_sampled

if TYPE_CHECKING:
    from modekit.planning.plan import Plan

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
logging.disable_progress_bar()
logging.set_verbosity_error()
hypothesis.settings.register_profile("the same every time", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("the same every time")


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What is imported is not searched for garbage again and again: a training collects garbage after every run."""
    gc.collect()
    gc.freeze()


VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DOMAINS = ("medicine", "law", "code")
_WORDS = {
    "medicine": "fever artery lesion dose nerve renal tumour pulse",
    "law": "licence clause party breach court waiver tort deed",
    "code": "def return self import yield class lambda raise",
}


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, so that any English text can be read."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for code in range(32, 127):
        if len(vocab) < VOCAB:
            vocab.setdefault(chr(code), len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(model_type: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small random model of a family. Norm weights are random too, so that a lost one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
    return model


def save(model: PreTrainedModel, folder: Path, **kwargs: Any) -> Path:
    """Save a model with the test tokenizer."""
    model.save_pretrained(folder, **kwargs)
    character_tokenizer().save_pretrained(folder)
    return folder


def write_text(folder: Path, domains: tuple[str, ...] = DOMAINS, documents: int = 60) -> dict[str, Path]:
    """One .jsonl per domain with words of its own, different in every document."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for domain in domains:
        words = _WORDS[domain].split()
        lines = []
        for number in range(documents):
            picked = [words[(number * 7 + place * (number % 5 + 1)) % len(words)] for place in range(8)]
            lines.append(json.dumps({"text": f"{number} " + " ".join(picked)}))
        paths[domain] = folder / f"{domain}.jsonl"
        paths[domain].write_text("\n".join(lines) + "\n")
    return paths


@dataclass
class Workshop:
    """A folder with a base, three experts, texts and a recipe that a test may change."""

    root: Path
    recipe: dict[str, Any] = field(default_factory=dict)

    def write(self, **changes: Any) -> Path:
        """Write recipe.yaml with changes to its top level."""
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump({**self.recipe, **changes}, sort_keys=False))
        return path

    def plan(self, **changes: Any) -> Plan:
        """Plan the recipe with changes."""
        from modekit.planning.make import make_plan
        from modekit.recipes.read import load_recipe

        return make_plan(load_recipe(self.write(**changes)), self.root)

    def build(self, name: str = "OUT", **changes: Any) -> Path:
        """Build the recipe with changes; returns the checkpoint folder."""
        from modekit.building.build import build

        build(self.plan(**changes), self.root / name, overwrite=True)
        return self.root / name


def make_workshop(root: Path, model_type: str = "llama", **overrides: Any) -> Workshop:
    """Base and one expert per domain, random and different in every tensor."""
    save(tiny_model(model_type, seed=0, **overrides), root / "base")
    for seed, name in enumerate(DOMAINS, 1):
        save(tiny_model(model_type, seed=seed, **overrides), root / name)
    write_text(root / "text")
    recipe = {
        "base_model": "./base",
        "experts": [{"name": name, "model": f"./{name}", "text": f"./text/{name}.jsonl"} for name in DOMAINS],
        "mixture": {"method": "routing", "top_k": 2, "router": {"fit": "random", "seed": 1}},
    }
    return Workshop(root, recipe)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A Llama workshop of this test's own."""
    return make_workshop(tmp_path)


@pytest.fixture(scope="session")
def shared_workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A Llama workshop that tests only read from (they write results under names of their own)."""
    return make_workshop(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def bench(tmp_path: Path, shared_workshop: Workshop) -> Workshop:
    """A recipe of this test's own over the shared models."""
    from refusal import borrow

    return borrow(shared_workshop, tmp_path)


@pytest.fixture(scope="session")
def small_workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The same with models of one layer."""
    return make_workshop(tmp_path_factory.mktemp("small"), num_hidden_layers=1)


@pytest.fixture(scope="session")
def writing_shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """What the commands of writing_commands.py are typed in: copy it first."""
    from writing_commands import make_writing_shop

    return make_writing_shop(tmp_path_factory.mktemp("writing"))


@pytest.fixture(scope="module")
def short_tables() -> Iterator[None]:
    """The tables of lexical routers are trained in a few steps, where what they say is not what is shown."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_tables(patch)
        yield


def shorten_tables(patch: pytest.MonkeyPatch) -> None:
    """Of all lexical routers that are fitted until it is undone."""
    from modekit.routing import evidence

    few = partial(evidence.train_table, schedule=evidence.TableSchedule(steps=10))
    patch.setattr("modekit.routing.lexical.train_table", few)


QUICK_DEMO = "modekit demo --quick --out demo"
"""The first command of the tutorial and of the notebook, which tests/demo looks at."""


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that QUICK_DEMO makes, once for all workers: copy it first."""
    from command_line import modekit

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    made = shared / "quick" / "demo"
    made.parent.mkdir(exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        if not (made / "results" / "demo.md").exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(made.parent)
                modekit(*QUICK_DEMO.split()[1:])
    return made


@pytest.fixture
def a_state_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of a model on text keeps what it has whenever it can."""
    monkeypatch.setattr("modekit.loaded.engine.STATE_SECONDS", 0.0)
    monkeypatch.setattr("modekit.loaded.engine._STATE_SHARE", 0)


@pytest.fixture
def ids() -> torch.Tensor:
    """A batch of token ids."""
    return torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


Logits = Callable[[Path | PreTrainedModel], torch.Tensor]


def router_logits(model: Any, **given: Any) -> list[torch.Tensor]:
    """What every router of a mixture in the modekit architecture says in a pass, in the order in which they run."""
    found: list[torch.Tensor] = []
    with model.base_model.flow.changed(listener=lambda _place, logits: found.append(logits)):
        model(**given)
    return found


def logits_of(model: Path | PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits in a dtype, from a folder or a model."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval() if isinstance(model, Path) else model
    with torch.inference_mode():
        return loaded(input_ids=ids).logits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first, so that the other workers are busy as long as they take; hostile ones are slow."""
    for item in items:
        if item.get_closest_marker("hostile"):
            item.add_marker("slow")
    mark_sampled(items)
    items.sort(key=lambda item: not any(name in item.name for name in ("tutorial", "test_all_of_it")))
