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
from modekit.text.splits import Split, documents_of_split
from peers.peer import Pool

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
    trained, _, how = kind.partition("-")
    home, kept = folder / f"seed{seed}", out / f"{trained}-seed{seed}"
    experts = {name: home / f"{trained}-{name}" for name in DOMAINS}
    text = {split: {name: _split_text(folder / "text", name, split, out / "text") for name in DOMAINS} for split in SPLITS}
    unseen, report = folder / "text" / f"{UNSEEN}.jsonl", dict(text["report"])
    whole = {name: merged(home / "base", path, kept / name) for name, path in experts.items()}
    if how == "twice":
        for split in ("fit", "select"):
            halves = [read_text(text[split]["law"])[place::2] for place in range(2)]
            for name, half in zip(("law", "law-again"), halves, strict=True):
                text[split][name] = write_text(half, out / "text" / f"{name}-{split}-half.jsonl")
        for models in (experts, whole):
            models["law-again"] = models["law"]
    pool = Pool(kind, seed, home / "base", experts, whole, text["fit"], text["select"], out / "environments")
    return Scored(pool, {**report, UNSEEN: unseen})


def merged(base: Path, expert: Path, out: Path) -> Path:
    """A whole model: the expert itself, or its adapter merged into the base by PEFT, in `out`."""
    if not (expert / "adapter_config.json").exists():
        return expert
    if not (out / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        whole = PeftModel.from_pretrained(model, str(expert)).merge_and_unload()
        AutoTokenizer.from_pretrained(base).save_pretrained(out)
        whole.save_pretrained(out)
    return out


def write_text(documents: Sequence[str], path: Path) -> Path:
    """JSON Lines of some documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in documents), encoding="utf-8")
    return path


def read_text(path: Path) -> list[str]:
    """Its documents."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _split_text(texts: Path, name: str, split: Split, out: Path) -> Path:
    path = out / f"{name}-{split}.jsonl"
    if not path.exists():
        documents = read_documents([str(texts / f"{name}.jsonl")], root=texts, where=name)
        write_text([text_of(each) for each in documents_of_split(documents, split)], path)
    return path
