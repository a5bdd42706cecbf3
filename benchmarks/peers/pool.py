"""Pools of experts on the disk: `whole.py train FOLDER` has made the models, this splits the text and merges the adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from modekit.demo.text import DOMAINS, UNSEEN
from modekit.text.document import text_of
from modekit.text.documents import read_documents
from modekit.text.splits import Split, split_of
from peers.parts import PARTS
from peers.peer import Pool
from strangers import EXPERTS

SMOLLM2 = "full-smollm2"
"""SmolLM2-135M with four experts, each made in another way (strangers.py): FOLDER/base is theirs."""
SPLITS: tuple[Split, ...] = ("fit", "select", "report")


@dataclass(frozen=True)
class Scored:
    """A pool and the text that its rows are scored on: the report split of each domain, and all of unseen text."""

    pool: Pool
    report: dict[str, Path]


def open_pool(folder: Path, kind: str, seed: int, out: Path) -> Scored:
    """The pool of FOLDER/seed<seed>/<kind>-<domain>; what it needs besides is written below `out` once.

    Of kind `adapters-twice` law's expert is there twice, each with every second document of law's text: whoever routes by
    domain has to share law out, and loses nothing by any way to do so.
    """
    how = kind.partition("-")[2]
    made = kind.removesuffix("-twice")
    base, experts = models_of_kind(folder, made, seed)
    read, text_home = texts_of_kind(folder, made), out / "text" / how.removesuffix("twice")
    text = {split: {name: _split_text(path, split, text_home) for name, path in read.items()} for split in SPLITS}
    unseen, report = folder / "text" / f"{UNSEEN}.jsonl", dict(text["report"])
    whole = {name: merged(base, path, out / f"{made}-seed{seed}" / name) for name, path in experts.items()}
    if how == "twice":
        for split in ("fit", "select"):
            halves = [read_text(text[split]["law"])[place::2] for place in range(2)]
            for name, half in zip(("law", "law-again"), halves, strict=True):
                text[split][name] = write_text(half, text_home / f"{name}-{split}-half.jsonl")
        for models in (experts, whole):
            models["law-again"] = models["law"]
    pool = Pool(kind, seed, base, experts, whole, text["fit"], text["select"], out / "environments")
    return Scored(pool, {**report, UNSEEN: unseen})


def models_of_kind(folder: Path, kind: str, seed: int) -> tuple[Path, dict[str, Path]]:
    """The base, and domain -> its expert."""
    home = folder / f"seed{seed}"
    if kind == SMOLLM2:
        return folder / "base", {each.domain: home / f"{each.name}-{each.domain}" for each in EXPERTS}
    return home / "base", {name: home / f"{kind}-{name}" for name in texts_of_kind(folder, kind)}


def texts_of_kind(folder: Path, kind: str) -> dict[str, Path]:
    """Domain -> its text below FOLDER: of the demo in FOLDER/text; of a pool of parts in FOLDER/parts, written here once."""
    domains = [each.domain for each in EXPERTS] if kind == SMOLLM2 else DOMAINS
    whole, how = {name: folder / "text" / f"{name}.jsonl" for name in domains}, kind.partition("-")[2]
    if how not in PARTS:
        return whole
    home = folder / "parts" / how
    if not home.exists():
        for name, documents in PARTS[how]({name: _documents(path) for name, path in whole.items()}).items():
            write_text(documents, home / f"{name}.jsonl")
    return {path.stem: path for path in sorted(home.glob("*.jsonl"))}


def merged(base: Path, expert: Path, out: Path) -> Path:
    """A whole model: the expert itself, or its adapter merged into the base by PEFT, in `out`."""
    if not is_adapter(expert):
        return expert
    if not (out / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        whole = PeftModel.from_pretrained(model, str(expert)).merge_and_unload()
        AutoTokenizer.from_pretrained(base).save_pretrained(out)
        whole.save_pretrained(out)
    return out


def is_adapter(expert: Path) -> bool:
    """Whether it is a PEFT adapter, and no whole model."""
    return (expert / "adapter_config.json").exists()


def write_text(documents: Sequence[str], path: Path) -> Path:
    """JSON Lines of some documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in documents), encoding="utf-8")
    return path


def read_text(path: Path) -> list[str]:
    """Its documents."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _documents(path: Path) -> list[str]:
    return [text_of(each) for each in read_documents([str(path)], root=path.parent, where=path.stem)]


def _split_text(read: Path, split: Split, out: Path) -> Path:
    path = out / f"{read.stem}-{split}.jsonl"
    if not path.exists():
        write_text([each for each in _documents(read) if split_of(each) == split], path)
    return path
