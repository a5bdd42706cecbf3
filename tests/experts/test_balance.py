"""Balanced corpora: totals near enough in train and validation, whole documents, the same ones in whatever order they come."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import modekit
from conftest import character_tokenizer
from modekit.experts.corpus.balance import (
    SPLITS,
    Balanced,
    BalanceSettings,
    Split,
    balance,
    choose_apart,
    diff_percent,
)
from modekit.experts.corpus.texts import GivenTexts
from modekit.run import Run
from modekit.text.documents import read_documents
from refusal import refuse, tree

WORDS = "the of court dose nerve self yield class lemma bread river stone window garden letter"
Records = list[dict[str, Any]]
QUICK = Run(sync=False)


def made(count: int, seed: int, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words, all different."""
    draw = random.Random(seed)
    return [f"{seed}-{number} " + " ".join(draw.choices(WORDS.split(), k=draw.randint(1, longest))) for number in range(count)]


def write_records(path: Path, records: Records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records_in(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return folder


def balanced(root: Path, texts: Mapping[str, str], out: str = "OUT", run: Run = QUICK, **settings: Any) -> Balanced:
    folder = root / "counts"
    if not folder.exists():
        character_tokenizer().save_pretrained(folder)
    given = GivenTexts({name: [spec] for name, spec in texts.items()}, root, "org/counts", folder)
    return balance(given, BalanceSettings(**settings), root / out, run=run)


def kept_tokens(found: Balanced, split: Split) -> dict[str, int]:
    return {domain.name: domain.splits[split].tokens for domain in found.domains}


def totals_of(out: Path, split: str) -> dict[str, int]:
    """Characters, which are this tokenizer's tokens, as the files have them."""
    return {
        path.stem: sum(len(record["text"]) for record in records_in(path)) for path in sorted((out / split).glob("*.jsonl"))
    }


def skewed(root: Path) -> dict[str, str]:
    """Three domains; the largest has 20 times the text of the smallest."""
    sizes = {"en": (2_200, 40), "fr": (300, 40), "py": (100, 40)}
    for seed, (name, (count, longest)) in enumerate(sizes.items()):
        write_records(root / f"{name}.jsonl", [{"text": text} for text in made(count, seed, longest)])
    return {name: f"{name}.jsonl" for name in sizes}


@pytest.mark.parametrize("percent", [5.0, 1.0])
def test_a_domain_of_twenty_times_the_smallest_is_as_large_in_both_splits(tmp_path: Path, percent: float) -> None:
    texts = skewed(tmp_path)
    found = balanced(tmp_path, texts, max_diff_percent=percent)
    all_of_it = {name: set(read_documents([spec], root=tmp_path, where="")) for name, spec in texts.items()}
    sizes = {name: sum(map(len, documents)) for name, documents in all_of_it.items()}
    assert max(sizes.values()) > 19 * min(sizes.values())
    for split in SPLITS:
        totals = totals_of(tmp_path / "OUT", split)
        assert (max(totals.values()) - min(totals.values())) / min(totals.values()) <= percent / 100
        assert totals == kept_tokens(found, split)
        for name, documents in all_of_it.items():
            kept = [record["text"] for record in records_in(tmp_path / "OUT" / split / f"{name}.jsonl")]
            assert len(set(kept)) == len(kept) and set(kept) <= documents  # whole, and once
    assert found.tokenizer == "org/counts"  # and not the folder that the hub's cache has it in
    kept_of_smallest = sum(totals_of(tmp_path / "OUT", split)["py"] for split in ("train", "validation"))
    assert kept_of_smallest >= 0.95 * sizes["py"]
    train, validation = ({r["text"] for r in records_in(tmp_path / "OUT" / s / "en.jsonl")} for s in ("train", "validation"))
    assert not train & validation


def test_what_is_kept_and_its_order_do_not_depend_on_files(tmp_path: Path) -> None:
    texts = skewed(tmp_path)
    balanced(tmp_path, texts, "first")
    for seed, (name, spec) in enumerate(texts.items()):
        records = records_in(tmp_path / spec)
        random.Random(seed).shuffle(records)
        half = len(records) // 2
        write_records(tmp_path / "other" / name / "z.jsonl", records[:half])
        write_records(tmp_path / "other" / name / "a" / "b.jsonl", records[half:] + records[:3])
    again = balanced(tmp_path, {name: f"other/{name}" for name in texts}, "second")
    balanced(tmp_path, texts, "third", seed=1)

    def files(name: str) -> dict[str, bytes | None]:
        return {path: content for path, content in tree(tmp_path / name).items() if path.endswith(".jsonl")}

    assert files("first") == files("second")
    assert files("first").keys() == files("third").keys() and files("first") != files("third")
    assert [domain.duplicates for domain in again.domains] == [3, 3, 3]
    # Another seed chooses other documents, and moves none from one split to the other.
    for split, other in (("train", "validation"), ("validation", "train")):
        mine = {record["text"] for record in records_in(tmp_path / "first" / split / "en.jsonl")}
        assert not mine & {record["text"] for record in records_in(tmp_path / "third" / other / "en.jsonl")}


def parallel(root: Path, count: int, factor: float, *, seed: int = 0) -> dict[str, str]:
    """The same documents in two languages, of which one takes `factor` times the tokens, more or less; some in one alone."""
    draw = random.Random(seed)
    records: dict[str, Records] = {"en": [], "fr": []}
    for number in range(count):
        words = draw.randint(20, 60)
        for name, length in (("en", words), ("fr", round(words * factor * draw.uniform(0.6, 1.4)))):
            text = f"{name} {number} " + " ".join(draw.choices(WORDS.split(), k=length))
            if not (name == "fr" and number % 10 == 0):
                records[name].append({"id": number if name == "en" else str(number), "text": text})
    for name, found in records.items():
        draw.shuffle(found)
        write_records(root / f"{name}.jsonl", found)
    return {name: f"{name}.jsonl" for name in records}


def test_common_documents_go_in_together_and_stand_in_the_same_order(tmp_path: Path) -> None:
    texts = parallel(tmp_path, 600, 1.2)
    found = balanced(tmp_path, texts, common=True)
    for split in SPLITS:
        ids = {name: [record["id"] for record in records_in(tmp_path / "OUT" / split / f"{name}.jsonl")] for name in texts}
        assert ids["en"] == ids["fr"] and len(ids["en"]) >= (100 if split == "train" else 5)
        assert not [each for each in ids["en"] if int(each) % 10 == 0]  # those that French lacks
        totals = totals_of(tmp_path / "OUT", split)
        assert 1 < 1 + diff_percent(list(totals.values())) / 100 <= 1.05
        assert found.domains[0].splits[split].documents == len(ids["en"])


def test_common_files_are_known_by_their_path_and_kept_whole(tmp_path: Path) -> None:
    for language, words in (("english", "stone"), ("french", "pierre")):
        for number in range(30):
            folder = tmp_path / language / f"part{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            paragraphs = "\n\n".join(f"{words} {number} {place} " * 220 for place in range(number % 4 + 1))
            (folder / f"page{number}.{'md' if language == 'french' else 'txt'}").write_text(paragraphs)
    texts = {"en": "english", "fr": "french"}
    balanced(tmp_path, texts, common=True, validation=0.0, max_diff_percent=40)
    assert not (tmp_path / "OUT" / "validation").exists()
    ids = {name: [record["id"] for record in records_in(tmp_path / f"OUT/train/{name}.jsonl")] for name in texts}
    assert list(dict.fromkeys(ids["en"])) == list(dict.fromkeys(ids["fr"])) and "part1/page7" in ids["en"]
    said = [record["text"] for record in records_in(tmp_path / "OUT/train/en.jsonl") if record["id"] == "part1/page7"]
    whole = read_documents(["english/part1/page7.txt"], root=tmp_path, where="")
    assert len(said) == len(whole) > 1 and set(said) == set(whole)


TOKENS = st.dictionaries(st.binary(min_size=16, max_size=16), st.integers(1, 5_000), min_size=1, max_size=9)


@given(st.lists(TOKENS, min_size=2, max_size=4), st.sampled_from([0.0, 1.0, 5.0, 50.0]), st.integers(1, 9))
def test_a_choice_is_within_what_was_asked_or_there_is_none(units: list[dict[bytes, int]], percent: float, seed: int) -> None:
    choice = choose_apart(units, percent, None, seed)
    if choice is not None:
        totals = [sum(own[unit] for unit in kept) for own, kept in zip(units, choice, strict=True)]
        assert diff_percent(totals) <= percent and min(totals) <= min(sum(own.values()) for own in units)
        assert all(len(set(kept)) == len(kept) > 0 for kept in choice)
    shuffled = [dict(reversed(own.items())) for own in units]
    assert choose_apart(shuffled, percent, None, seed) == choice


def typed(root: Path, tokenizer: Path, *words: str, **texts: str) -> list[str]:
    given = [f"{name}={root / spec}" for name, spec in texts.items()]
    return [
        "data",
        "balance",
        str(root / "OUT"),
        "--tokenizer",
        str(tokenizer),
        *words,
        *(w for t in given for w in ("--text", t)),
    ]


def test_the_command_says_what_was_kept(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = skewed(tmp_path)
    said = modekit(*typed(tmp_path, tokenizer_folder, **texts))
    assert "train en" in said and "validation py" in said and "3 domains, at most 5 % apart" in said
    data = json.loads(modekit(*typed(tmp_path, tokenizer_folder, "--overwrite", "--json", **texts)))
    assert data == json.loads((tmp_path / "OUT" / "balance.json").read_text())
    assert data["diff_percent"]["train"] <= 5 and str(tmp_path) not in json.dumps(data)


def bad(root: Path) -> None:
    skewed(root)
    write_records(root / "huge.jsonl", [{"text": WORDS * 8_000}])
    write_records(root / "one.jsonl", [{"text": "one document"}])
    write_records(root / "named.jsonl", [{"text": text, "id": f"n{n}"} for n, text in enumerate(made(40, 7))])
    write_records(root / "other.jsonl", [{"text": text, "id": f"o{n}"} for n, text in enumerate(made(40, 8))])
    write_records(root / "long.jsonl", [{"text": text * 4, "id": f"n{n}"} for n, text in enumerate(made(40, 7))])
    (root / "empty").mkdir()
    (root / "blank.jsonl").write_text("\n\n")


BAD: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "no text": ((), {"en": "en.jsonl", "fr": "nowhere.jsonl"}, "does not exist"),
    "one huge document": (("validation=0",), {"en": "en.jsonl", "fr": "huge.jsonl"}, "no choice of whole documents"),
    "one domain": ((), {"en": "en.jsonl"}, "nothing to balance"),
    "a name in two cases": ((), {"en": "en.jsonl", "EN": "fr.jsonl"}, "named twice"),
    "a path as a name": ((), {"../en": "en.jsonl", "fr": "fr.jsonl"}, "not a name"),
    "no tokens": (("max_tokens=0",), {"en": "en.jsonl", "fr": "fr.jsonl"}, "a setting is wrong"),
    "no ids": (("common=true",), {"en": "named.jsonl", "fr": "fr.jsonl"}, "has no id"),
    "nothing in common": (("common=true",), {"en": "named.jsonl", "fr": "other.jsonl"}, "no document is in all"),
    "four times as long": (("common=true",), {"en": "named.jsonl", "fr": "long.jsonl"}, "no choice of whole documents"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(tmp_path: Path, tokenizer_folder: Path, case: str) -> None:
    bad(tmp_path)
    words, texts, said = BAD[case]
    before = tree(tmp_path)
    assert said in refuse(*typed(tmp_path, tokenizer_folder, *words, **texts))
    assert tree(tmp_path) == before
