"""Records as other tools write them: prompts with answers, turns of `from` and `value`, tables that separate their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from chatting import word_tokenizer
from modekit.errors import TextError
from modekit.text.document import Conversation, Document, Pair, text_of
from modekit.text.documents import read_documents
from modekit.text.records import data_of
from modekit.text.sequences import encode
from text_files import write_records

TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
SAID = ["what is fever", "a thing"]
EXCHANGES: list[dict[str, Any]] = [
    {"prompt": SAID[0], "completion": SAID[1]},
    {"prompt": SAID[0], "response": SAID[1], "source": "web"},
    {"instruction": SAID[0], "input": "", "output": SAID[1]},
    {"instruction": SAID[0], "context": None, "response": SAID[1]},
    {"question": SAID[0], "answer": SAID[1]},
    {"query": SAID[0], "response": SAID[1]},
    {"input": SAID[0], "output": SAID[1]},
    {"prompt": "", "question": SAID[0], "completion": " ", "answer": SAID[1]},
]
TURNS = [{"from": "system", "value": "be kind"}, {"from": "human", "value": SAID[0]}, {"from": "gpt", "value": SAID[1]}]


def read(path: Path, *records: dict[str, Any]) -> list[Document]:
    return read_documents([write_records(path, records)], root=path.parent, where="law")


@pytest.mark.parametrize("record", EXCHANGES)
def test_a_prompt_and_its_answer_are_a_chat_where_there_is_a_template_and_else_plain_text(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    (document,) = read(tmp_path / "law.jsonl", record)
    assert isinstance(document, Conversation) and document.is_exchange and document.text == "what is fever\n\na thing"
    for template, text in ((TEMPLATE, "user what is fever assistant a thing "), (None, "what is fever\n\na thing")):
        tokenizer = word_tokenizer(template)
        (sequence,) = encode(tokenizer, [document], max_tokens=99, sequence_length=99)
        assert list(sequence.ids) == tokenizer(text, add_special_tokens=template is None)["input_ids"]


def test_what_is_asked_about_stands_behind_what_is_asked(tmp_path: Path) -> None:
    (document,) = read(tmp_path / "law.jsonl", {"instruction": "sum up", "input": "a long text", "output": "short"})
    assert isinstance(document, Conversation) and document.text == "sum up\n\na long text\n\nshort"
    assert [message["role"] for message in document.messages] == ["user", "assistant"]


def test_turns_of_from_and_value_are_a_conversation(tmp_path: Path) -> None:
    for key, turns in (("conversations", TURNS), ("conversations", [{"role": "user", "content": SAID[0]}])):
        (document,) = read(tmp_path / "law.jsonl", {key: turns})
        assert isinstance(document, Conversation) and not document.is_exchange
    (document,) = read(tmp_path / "law.jsonl", {"conversations": TURNS})
    assert isinstance(document, Conversation) and [m["role"] for m in document.messages] == ["system", "user", "assistant"]
    with pytest.raises(TextError, match="chat template"):
        encode(word_tokenizer(None), [document], max_tokens=99, sequence_length=99)
    said = [{"role": "user", "content": SAID[0]}], [{"role": "assistant", "content": SAID[1]}]
    (document,) = read(tmp_path / "law.jsonl", {"prompt": said[0], "completion": said[1]})
    assert isinstance(document, Conversation) and len(document.messages) == 2


def test_text_messages_and_pairs_come_first(tmp_path: Path) -> None:
    asked = EXCHANGES[0]
    assert read(tmp_path / "law.jsonl", {**asked, "text": "plain"}) == ["plain"]
    assert read(tmp_path / "law.jsonl", {**asked, "text": " "}) == read(tmp_path / "law.jsonl", asked) != []
    (document,) = read(tmp_path / "law.jsonl", {**asked, "messages": [{"role": "user", "content": "hello"}]})
    assert text_of(document) == "hello"
    (document,) = read(tmp_path / "law.jsonl", {**asked, "source": "a", "target": "b"})
    assert isinstance(document, Pair)


def test_a_record_made_of_it_gives_it_back(tmp_path: Path) -> None:
    for record in EXCHANGES:
        (document,) = read(tmp_path / "law.jsonl", record)
        (again,) = read(tmp_path / "law.jsonl", data_of(document))
        assert isinstance(again, Conversation) and again == document


# tables


@pytest.mark.parametrize(("name", "separator"), [("law.csv", ","), ("law.csv", ";"), ("law.csv", "\t")])
def test_values_that_are_separated(tmp_path: Path, name: str, separator: str) -> None:
    lines = [["id", "text"], ["1", '"a ""quoted"" word\nof two lines"'], ["2", "naïve"], ["3", ""], ["4"]]
    (tmp_path / name).write_text("\ufeff" + "\r\n".join(separator.join(line) for line in lines))
    assert set(read_documents([name], root=tmp_path, where="law")) == {'a "quoted" word\nof two lines', "naïve"}
    (tmp_path / name).write_text(f"question{separator}answer\n{separator.join(SAID)}\n")
    (document,) = read_documents([name], root=tmp_path, where="law")
    assert isinstance(document, Conversation) and document.is_exchange


def test_a_table_without_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "law.csv").write_text("The court held.,1\nThe lease ended.,2\n")
    with pytest.raises(TextError, match="no 'text', no 'messages'") as caught:
        read_documents(["law.csv"], root=tmp_path, where="law")
    assert "The court held." in str(caught.value) and "names the columns" in str(caught.value.remedy)


def test_a_quotation_mark_that_never_closes_swallows_no_rows(tmp_path: Path) -> None:
    for rest in ("", '4,"The lease ended."\n'):
        (tmp_path / "law.csv").write_text(f'id,text\n1,The court held.\n2,"The licence\n3,The deed.\n{rest}')
        with pytest.raises(TextError, match="the table cannot be read"):
            read_documents(["law.csv"], root=tmp_path, where="law")


def test_a_folder_is_not_searched_for_tables_that_often_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    (tmp_path / "law.txt").write_text("The court held.")
    assert read_documents(["."], root=tmp_path, where="law") == ["The court held."]


def test_tabs_part_values_as_they_stand(tmp_path: Path) -> None:
    """A quotation mark of a .tsv is one, and joins no lines."""
    texts = ['"fever" is hot', '5" of rain', "plain", 'a "b" c']
    (tmp_path / "law.tsv").write_text("id\ttext\n" + "".join(f"{place}\t{text}\n" for place, text in enumerate(texts)))
    assert set(read_documents(["law.tsv"], root=tmp_path, where="law")) == set(texts)


SKIPPED: list[dict[str, Any]] = [
    {"text": None},
    {"text": ""},
    {"text": " \n"},
    {"messages": None},
    {"messages": []},
    {"prompt": None, "completion": None},
]
HALF: list[dict[str, Any]] = [{"prompt": "x", "completion": None}, {"text": 3}, {"messages": "hello"}, {"body": "x"}]


@pytest.mark.parametrize("record", [*SKIPPED, *HALF])
def test_a_record_is_read_or_refused_alike_in_every_file(tmp_path: Path, record: dict[str, Any]) -> None:
    """One that is empty is skipped; one that holds something else than a document is refused with its place."""
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    parquet.write_table(pa.table({key: [value] for key, value in record.items()}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        with pytest.raises(
            TextError, match="the text is empty" if record in SKIPPED else "no prompt with its answer"
        ) as caught:
            read_documents([name], root=tmp_path, where="law")
        assert name in str(caught.value)
