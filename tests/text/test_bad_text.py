"""Text that cannot set a router or be scored is refused by domain and file, before the experts are copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import Workshop, write_text
from modekit.text.documents import read_documents
from modekit.text.splits import split_of
from refusal import borrow, refuse, refuse_build, tree

MIXTURE = {"router": {"fit": "centroid", "tokens_per_domain": 64, "keep_tokens": 8}}


@pytest.fixture
def bench(bench: Workshop) -> Workshop:
    """A recipe that fits its router, over the shared models and texts."""
    bench.recipe["mixture"] = MIXTURE
    return bench


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shared_workshop: Workshop) -> Path:
    """A fitted checkpoint with its text beside it; copy the folder before damaging it."""
    workshop = borrow(shared_workshop, tmp_path_factory.mktemp("fitted"))
    for place, (name, path) in enumerate(write_text(workshop.root / "text").items()):
        workshop.recipe["experts"][place]["text"] = f"./text/{path.name}"
        assert workshop.recipe["experts"][place]["name"] == name
    return workshop.build("OUT", mixture=MIXTURE)


@pytest.fixture
def fitted(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the fitted checkpoint, with its text, that a test may damage."""
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / "OUT"


def use_text(workshop: Workshop, text: object) -> None:
    workshop.recipe["experts"][1]["text"] = text


HELD_OUT = [document for document in map("document {}".format, range(100)) if split_of(document) != "fit"]


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("law.txt", b"", "the text is empty"),
    ("law.txt", b" \n\n\t\n", "the text is empty"),
    ("law.jsonl", b"", "the text is empty"),
    ("law.jsonl", b'{"text": "  "}\n', "the text is empty"),
    ("law.txt", b"plain \x00\x01 text", "NUL"),
    ("law.txt", b"caf\xe9 au lait", "not UTF-8"),
    ("law.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', "not UTF-8"),
    ("law.jsonl", b'{"text": "good"}\n{"text": \n', "law.jsonl:2"),
    ("law.jsonl", b'{"text": "good"}\n\n{"body": "x"}\n', "law.jsonl:3"),
    ("law.jsonl", b'{"text": 3}\n', "law.jsonl:1"),
    ("law.jsonl", b'["text"]\n', "law.jsonl:1"),
    ("law.jsonl", b"[" * 100_000, "law.jsonl:1"),
    ("law.parquet", b"not parquet at all", "the parquet file cannot be read"),
    ("law.md", HELD_OUT[0].encode(), "no document is left for the fit"),
    ("law.jsonl", "\n".join(json.dumps({"text": text}) for text in HELD_OUT).encode(), "no document is left for the fit"),
]


@pytest.mark.parametrize(("name", "content", "part"), BAD_FILES)
def test_bad_file(bench: Workshop, name: str, content: bytes, part: str) -> None:
    (bench.root / name).write_bytes(content)
    use_text(bench, f"./{name}")
    message = refuse_build(bench)
    assert "experts[1] 'law'" in message
    assert name in message or part.startswith("no document")
    assert part in message


def test_too_few_documents_are_counted_and_the_way_to_many_is_said(bench: Workshop) -> None:
    (bench.root / "law.txt").write_text(HELD_OUT[0])
    use_text(bench, "./law.txt")
    message = refuse_build(bench)
    assert "1 document" in message
    assert "blank lines" in message and ".jsonl" in message
    (bench.root / "many").mkdir()
    for number, text in enumerate(HELD_OUT[:3]):
        (bench.root / "many" / f"{number}.txt").write_text(text)
    use_text(bench, ["./law.txt", "./many"])
    assert "3 documents" in refuse_build(bench)


def test_text_that_is_not_there(bench: Workshop) -> None:
    for spec in ("./law.txt", "law.jsonl", "/nowhere/law", "~nobody-of-that-name/law.txt", "x" * 300 + ".txt"):
        use_text(bench, spec)
        message = refuse_build(bench)
        assert "experts[1] 'law'" in message
        assert "the text does not exist" in message


def test_a_hub_data_set_without_the_hub(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    use_text(bench, "some/dataset")
    message = refuse_build(bench)
    assert "experts[1] 'law'" in message
    assert "some/dataset" in message
    assert "hub" in message


def test_folder_without_text(bench: Workshop) -> None:
    (bench.root / "empty").mkdir()
    (bench.root / "empty" / "picture.png").write_bytes(b"\x89PNG")
    use_text(bench, "./empty")
    message = refuse_build(bench)
    assert "experts[1] 'law'" in message
    assert "the folder holds no text" in message
    assert ".jsonl" in message


def test_a_base_without_tokenizer(bench: Workshop) -> None:
    shutil.copytree(bench.recipe["base_model"], bench.root / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    bench.recipe["base_model"] = "./base"
    assert "the base model has no tokenizer" in refuse_build(bench)


def test_unusual_text_is_read(tmp_path: Path) -> None:
    lines = [{"text": "line\u2028separator"}, {"text": "next\x85line"}, {"text": "half \ud800 pair"}]
    (tmp_path / "law.jsonl").write_bytes(
        b"\r\n".join(json.dumps(line, ensure_ascii="\ud800" in line["text"]).encode() for line in lines)
    )
    assert set(read_documents(["law.jsonl"], root=tmp_path, where="law")) == {
        "line\u2028separator",
        "next\x85line",
        "half ? pair",
    }


# eval and fit


@pytest.mark.parametrize(
    ("place", "name", "command"),
    [(1, "law", ("eval",)), (2, "code", ("fit", "tokens_per_domain=50"))],  # kept statistics do not say this
)
def test_text_that_is_gone(fitted: Path, place: int, name: str, command: tuple[str, ...]) -> None:
    (fitted.parent / "text" / f"{name}.jsonl").unlink()
    before = tree(fitted)
    message = refuse(command[0], fitted, *command[1:])
    assert f"experts[{place}] '{name}'" in message and "the text does not exist" in message
    assert tree(fitted) == before


@pytest.mark.parametrize("damage", ["nan", "zeros", "negated", "shape", "tokens"])
def test_fit_with_statistics_that_say_nothing(fitted: Path, damage: str) -> None:
    """A stranger's whole file of numbers that no text gives; a fit from kept statistics does without the text."""
    path = fitted / "router" / "law.safetensors"
    with safe_open(path, "pt") as file:
        about, tensors = json.loads(file.metadata()["about"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in sorted(tensors) if name.endswith(".sum"))
    if damage == "tokens":
        about["tokens"] = -3
    else:
        own = tensors[name]
        tensors[name] = {"nan": own * float("nan"), "zeros": own * 0, "negated": -own, "shape": own[:-1].clone()}[damage]
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    (fitted.parent / "text" / "law.jsonl").unlink()
    before = tree(fitted)
    message = refuse("fit", fitted, "fit=logistic")
    assert str(path) in message
    assert tree(fitted) == before
