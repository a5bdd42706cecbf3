"""What a router is fitted on: a domain's documents and, inside the tokenizer's chat template, short questions cut from them.

A router that has seen documents alone takes a template and its system prompt for text of some domain, and a short question has
little against them. Half of the examples are therefore chats: a few words of a document as what the user says, those that
follow as the answer, under the template's own system prompt or another. What all domains share so weighs nothing. An exchange
of a conversation stands there as it is, and once more, perhaps with greetings or thanks around what the user says. A base model
that is an expert also takes small talk, of which domains have none. Where it costs no model, chats are read behind those of
other domains, too.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from modekit.errors import TextError
from modekit.recipes.mixture import Router
from modekit.recipes.recipe import Expert
from modekit.text.chat import ChatTemplate, chat_template_of
from modekit.text.document import Conversation, Document, Pair, reads_of, text_of
from modekit.text.plain import WORD
from modekit.text.sequences import TokenSequence, encode
from modekit.text.shipped import (
    ENGLISH,
    POLITE_FRAMES,
    QUESTION_FRAMES,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    framed_question,
    language_of,
)

Tokens = tuple[torch.Tensor, int]
"""Ids of a sequence, int32 (S,), and how many of them stand before the first that says something."""
_MOST_CHATS = 4_096  # of a domain
SHARE = 4
"""At most one token of so many is in chats that were cut or made."""
_OWN_SYSTEM = 0.2  # of chats stand under the template's own system prompt
_QUESTION = (1, 24)  # words
_ANSWER = 32  # words
_SMALL_TALK = 2  # times as much as chats that are cut
_WITH_ANSWER = 0.5  # of questions with words of asking
_POLITE = 0.25  # of questions in conversations have greetings or thanks; with more, thanks alone are no longer the base's
_WINDOW = 2_048  # characters from which words are cut


def read_examples(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], expert: Expert, settings: Router, *, most: int
) -> list[TokenSequence]:
    """Sequences of at most `most` tokens together: documents and, where the router knows chats and there are no pairs, chats.

    Raises TextError when chats are asked for and the tokenizer has no template.
    """
    plain = encode(tokenizer, documents, max_tokens=most, sequence_length=settings.sequence_length)
    template = None if "pairs" in map(reads_of, documents) else template_for(tokenizer, settings)
    count, chats = min(len(plain), _MOST_CHATS), list[TokenSequence]()
    if template is not None:
        chats = read_chats(template, documents, count, most // SHARE, is_base=expert.is_base)
    room = most - sum(len(chat.ids) for chat in chats)
    return [*(list(_first(plain, room)) or plain[:1]), *chats]


def read_chats(
    template: ChatTemplate, documents: Sequence[Document], count: int, most: int, *, is_base: bool
) -> list[TokenSequence]:
    """So many short questions cut from documents, as many with words of asking around their terms and, for the base, twice as
    much small talk, of at most `most` tokens together.
    """
    room = most // 2 if is_base else most
    chats = [*_first(cut_chats(template, documents, count), room // 2)]
    chats += _first(_framed_chats(template, documents, count), room // 2)
    if is_base:
        talk = ((SMALL_TALK[number % len(SMALL_TALK)], "") for number in range(_SMALL_TALK * count))
        left = most - sum(len(chat.ids) for chat in chats)
        chats += _first(_chats(template, talk, random.Random(_SMALL_TALK * count)), left)
    return chats


def template_for(tokenizer: PreTrainedTokenizerBase, settings: Router) -> ChatTemplate | None:
    """The template that a router is fitted inside, too; None when it is not. Raises TextError."""
    if settings.chat is False:
        return None
    template = chat_template_of(tokenizer)
    if template is not None and template.around(None) is None:  # what is said cannot be found in what it writes
        template = None
    if template is None and settings.chat:
        raise TextError(
            "the router is to know chats, and the tokenizer has no chat template that shows what is said",
            where="mixture.router.chat",
            remedy="remove 'chat', or put a chat_template.jinja beside the base model's tokenizer",
        )
    return template


def chats_of(tokenizer: PreTrainedTokenizerBase, expert: Expert, settings: Router) -> dict[str, str]:
    """What but text and other settings decides the chats of a domain; nothing where there are none. Raises TextError."""
    template = template_for(tokenizer, settings)
    if template is None:
        return {}
    frames = [frame for frames in QUESTION_FRAMES.values() for frame in frames]
    parts = [template.source, *SYSTEM_PROMPTS, *frames, *(SMALL_TALK if expert.is_base else ())]
    return {"chat": hashlib.sha256("\0".join(parts).encode()).hexdigest()}


def cut_chats(template: ChatTemplate, documents: Sequence[Document], count: int) -> Iterator[TokenSequence]:
    """So many chats of a few words of the documents, or of exchanges of conversations, which their number decides."""
    cut = [document for document in documents if not isinstance(document, Pair)]
    draw, numbers = random.Random(str(count)), range(count if cut else 0)
    # Every document once before any of them twice, and then at random.
    taken = (cut[number] if number < len(cut) <= count else draw.choice(cut) for number in numbers)
    return _chats(template, (_words(document, draw) for document in taken), draw)


def _framed_chats(template: ChatTemplate, documents: Sequence[Document], count: int) -> Iterator[TokenSequence]:
    """So many chats that ask for terms of the documents, or politely what conversations ask, in English or their own language;
    every other has an answer.
    """
    texts = [document for document in documents if not isinstance(document, Pair)]
    draw, languages = random.Random(f"framed {count}"), (ENGLISH, language_of([*map(text_of, texts)]))

    def asked(document: str | Conversation) -> tuple[str, str]:
        language = draw.choice(languages)
        if isinstance(document, Conversation):
            question, _ = _words(document, draw)
            if question and draw.random() < _POLITE:
                question = draw.choice(POLITE_FRAMES[language]).replace("{}", question)
        else:
            question = framed_question(document, QUESTION_FRAMES[language], draw) or ""
        return question, _words(document, draw)[1] if draw.random() < _WITH_ANSWER else ""

    return _chats(template, (asked(texts[number % len(texts)]) for number in range(count if texts else 0)), draw)


def changes_of_domain(template: ChatTemplate, domains: Sequence[Sequence[Tokens]], longest: int) -> list[list[Tokens]]:
    """Every chat of a domain once more, behind one of another domain: what was said before must not outweigh what is asked.

    Chats are told from documents by where they start; two together have no more than `longest` tokens.
    """
    turn = template.turn()
    chats = [[chat for chat in domain if chat[1] and len(chat[0]) <= longest // 2] for domain in domains]
    draw = random.Random(len(chats))
    found: list[list[Tokens]] = [[] for _ in domains]
    for place, own in enumerate(chats if turn is not None else []):
        others = [chat for other, domain in enumerate(chats) if other != place for chat in domain]
        between = torch.tensor(template.ids(turn or ""), dtype=torch.int32)
        for ids, start in own if others else ():
            before, _ = draw.choice(others)
            joined = torch.cat([before, between, ids[start:]])
            if len(joined) <= longest:
                found[place].append((joined, len(before) + len(between)))
    return found


def _words(document: str | Conversation, draw: random.Random) -> tuple[str, str]:
    """A few words from anywhere in a document, more rarely many, and those behind them; an exchange of a conversation."""
    if isinstance(document, Conversation):
        said, answer = draw.choice(document.exchanges or [("", "")])
        return said[:_WINDOW], "".join(WORD.findall(answer[:_WINDOW])[:_ANSWER]).strip()
    place = draw.randrange(max(1, len(document) - _WINDOW // 4))
    if place:
        place = next((at + 1 for at in range(place, min(place + 64, len(document))) if document[at].isspace()), place)
    words = WORD.findall(document[place : place + _WINDOW])
    fewest, most = _QUESTION
    count = min(len(words), round(fewest * (most / fewest) ** draw.random()))
    return "".join(words[:count]).strip(), "".join(words[count : count + _ANSWER]).strip()


def _chats(template: ChatTemplate, said: Iterable[tuple[str, str]], draw: random.Random) -> Iterator[TokenSequence]:
    """Of questions and answers, under the template's own system prompt or another."""
    for question, answer in said:
        system = None if draw.random() < _OWN_SYSTEM else draw.choice(SYSTEM_PROMPTS)
        around = template.around(system) or template.around(None)
        if around is not None and question:
            before, between = around
            ids = template.ids(before + question + between + answer)
            start = min(len(template.ids(before)), len(ids) - 1)
            if len(ids) > 1:
                yield TokenSequence(tuple(ids), start)


def _first(sequences: Iterable[TokenSequence], most: int) -> Iterator[TokenSequence]:
    """As many as have no more than `most` tokens together."""
    total = 0
    for sequence in sequences:
        total += sequence.size
        if total > most:
            return
        yield sequence
