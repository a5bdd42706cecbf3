"""What a router is fitted on inside the chat template: which tokens, how many, and always the same."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from chatting import documents_of, word_tokenizer
from conftest import _WORDS
from modekit.errors import TextError
from modekit.recipes.mixture import Router
from modekit.recipes.recipe import Expert
from modekit.routing.examples import changes_of_domain, chats_of, cut_chats, read_chats, read_examples
from modekit.text.chat import ChatTemplate
from modekit.text.document import Conversation, Pair
from modekit.text.sequences import encode
from modekit.text.shipped import POLITE_FRAMES, QUESTION_FRAMES, SMALL_TALK, framed_question, language_of

LEXICAL = Router(fit="lexical")
LAW, BASE = Expert(name="law", model="./law"), Expert(name="general", model="base")
GERMAN = ["Das Gericht hat die Klage abgewiesen, und wie der Vertrag zu lesen ist, sagt es nicht. Kann ich das?"]
FRENCH = ["Le tribunal a rejeté la demande, et il ne dit pas comment est lu le contrat. Est-ce que je peux le faire ?"]
DOCUMENTS = documents_of(_WORDS["law"])
TOKENIZER = word_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER)


def said(ids: tuple[int, ...], start: int) -> str:
    """The question of a chat."""
    return str(TOKENIZER.decode(ids[start:])).partition("<|im_end|>")[0].strip()


def test_two_of_three_examples_are_chats() -> None:
    found = read_examples(TOKENIZER, DOCUMENTS, LAW, LEXICAL, most=100_000)
    plain = encode(TOKENIZER, DOCUMENTS, max_tokens=100_000, sequence_length=512)
    assert found[: len(plain)] == plain
    chats = found[len(plain) :]
    assert len(chats) == 2 * len(plain) and all(0 < chat.start < len(chat.ids) for chat in chats)
    lengths = [len(said(chat.ids, chat.start).split()) for chat in chats[: len(plain)]]
    assert min(lengths) <= 3 and 12 <= max(lengths) <= 25


def test_questions_are_words_of_the_documents_in_their_order() -> None:
    known = {pair for document in DOCUMENTS for pair in pairwise(document.split())}
    for chat in cut_chats(TEMPLATE, DOCUMENTS, 30):
        words = said(chat.ids, chat.start).replace("<unk>", "").split()
        assert words == [] or all(pair in known for pair in pairwise(words) if "<unk>" not in pair), words


def test_they_are_the_same_every_time_and_do_not_exceed_what_is_asked() -> None:
    one, other = (read_examples(TOKENIZER, DOCUMENTS, LAW, LEXICAL, most=1_000) for _ in range(2))
    assert one == other
    assert 500 < sum(len(each.ids) for each in one) <= 1_000
    for expert in (LAW, BASE):
        found = read_examples(TOKENIZER, DOCUMENTS, expert, LEXICAL, most=1_000)
        assert sum(len(each.ids) for each in found) <= 1_000
        assert 0 < sum(len(each.ids) for each in found if each.start) <= 250
    assert read_examples(TOKENIZER, DOCUMENTS, LAW, LEXICAL, most=16) == encode(
        TOKENIZER, DOCUMENTS, max_tokens=16, sequence_length=512
    )


def test_the_base_takes_small_talk() -> None:
    own, base = (read_chats(TEMPLATE, DOCUMENTS, 40, 100_000, is_base=is_base) for is_base in (False, True))
    assert base[:80] == own and len(base) == 160
    encoded = {TOKENIZER.decode(TEMPLATE.ids(each)) for each in SMALL_TALK}
    assert all(said(chat.ids, chat.start) in encoded for chat in base[80:])


def test_words_of_asking_are_in_the_language_of_the_text_and_in_english() -> None:
    texts = {"de": GERMAN, "fr": FRENCH, "en": documents_of(_WORDS["law"]), "nl": ["Wat is er met de hond en waar is het?"]}
    assert {language_of(documents): language for language, documents in texts.items()} == {each: each for each in texts}
    assert language_of(["def f(x): return x"]) == language_of([]) == "en"
    for language, documents in texts.items():
        of_both = [*QUESTION_FRAMES["en"], *QUESTION_FRAMES[language]]
        begins = {frame.split()[0] for frame in of_both}
        questions = [framed_question(document, of_both, random.Random(1)) for document in documents]
        assert all(question is not None and question.split()[0] in begins for question in questions), questions


def test_without_chats_it_is_the_documents_alone() -> None:
    plain = encode(TOKENIZER, DOCUMENTS, max_tokens=1_000, sequence_length=512)
    off = Router(fit="lexical", chat=False)
    assert read_examples(TOKENIZER, DOCUMENTS, BASE, off, most=1_000) == plain
    assert read_examples(word_tokenizer(None), DOCUMENTS, BASE, LEXICAL, most=1_000) == plain
    assert chats_of(TOKENIZER, BASE, off) == {} and chats_of(word_tokenizer(None), BASE, LEXICAL) == {}
    with pytest.raises(TextError, match="the router is to know chats"):
        read_examples(word_tokenizer(None), DOCUMENTS, LAW, Router(fit="lexical", chat=True), most=1_000)


TALK = Conversation(
    [
        {"role": "system", "content": "court"},
        *({"role": role, "content": said} for role, said in (("user", "what is {a} tort"), ("assistant", "one more thing"))),
        {"role": "user", "content": "Thanks"},
    ]
)


def test_exchanges_of_conversations_stand_under_other_system_prompts_and_behind_greetings() -> None:
    chats = list(cut_chats(TEMPLATE, [TALK], 40))
    asked = {TOKENIZER.decode(TEMPLATE.ids(question)) for question, _ in TALK.exchanges}
    assert {said(chat.ids, chat.start) for chat in chats} == asked
    assert len({chat.ids[: chat.start] for chat in chats}) > 5  # system prompts
    found = read_examples(TOKENIZER, [TALK] * 40, LAW, LEXICAL, most=100_000)
    framed = [said(chat.ids, chat.start) for chat in found[80:]]
    frames, questions = POLITE_FRAMES["en"], [question for question, _ in TALK.exchanges]
    polite = {TOKENIZER.decode(TEMPLATE.ids(frame.replace("{}", each))) for frame in frames for each in questions}
    assert len(framed) == 40 and 4 <= sum(each not in asked for each in framed) <= 20 and {*framed} <= polite | asked
    assert found == read_examples(TOKENIZER, [TALK] * 40, LAW, LEXICAL, most=100_000)


def test_documents_are_cut_as_ever_where_conversations_have_no_say() -> None:
    silent = Conversation([{"role": "assistant", "content": "a breach"}])
    assert [*cut_chats(TEMPLATE, [silent], 5)] == []
    pair = Pair("what is a tort", "was ist das")
    assert [*cut_chats(TEMPLATE, [*DOCUMENTS, pair], 30)] == [*cut_chats(TEMPLATE, DOCUMENTS, 30)]


def test_a_change_of_domain_is_a_chat_behind_one_of_another_domain() -> None:
    domains = [
        [(torch.tensor(each.ids, dtype=torch.int32), each.start) for each in cut_chats(TEMPLATE, documents_of(words), 12)]
        for words in _WORDS.values()
    ]
    plain = (torch.arange(30, dtype=torch.int32), 0)
    found = changes_of_domain(TEMPLATE, [[plain, *domain] for domain in domains], 512)
    assert [len(own) for own in found] == [12, 12, 12]
    turn = TEMPLATE.ids(TEMPLATE.turn() or "")
    for place, (own, chats) in enumerate(zip(found, domains, strict=True)):
        others = [chat[0].tolist() for other, domain in enumerate(domains) if other != place for chat in domain]
        for (ids, start), (asked, from_) in zip(own, chats, strict=True):
            assert ids[start:].tolist() == asked[from_:].tolist()
            assert ids[start - len(turn) : start].tolist() == turn and ids[: start - len(turn)].tolist() in others


def test_a_template_that_hides_what_is_said_is_none() -> None:
    shouting = word_tokenizer("{% for message in messages %}{{ message['content'] | upper }}{% endfor %}")
    plain = encode(shouting, DOCUMENTS, max_tokens=1_000, sequence_length=512)
    assert read_examples(shouting, DOCUMENTS, LAW, LEXICAL, most=1_000) == plain and chats_of(shouting, LAW, LEXICAL) == {}
    with pytest.raises(TextError, match="no chat template that shows what is said"):
        read_examples(shouting, DOCUMENTS, LAW, Router(fit="lexical", chat=True), most=1_000)
