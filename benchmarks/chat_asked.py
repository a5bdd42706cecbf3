"""Who leads in the chats of a mixture? Short questions inside its chat template: chat.md.

    python benchmarks/chat_asked.py OUT [--questions 32] [--system "Be brief."] [--ask questions.jsonl]

Asked are words of held-out text, alone and behind an answered question of another domain; small talk, which is the base's; and
real questions, by default those of chat_questions.jsonl, a line of which is {"domain": ..., "question": ..., "answer": ...}
(the answer may be left out). No fit reads them. An expert leads where the mean of its weights over the routers is largest.

Shape legend: B batch, S sequence, E experts, R routers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.evaluation.domains import held_out_texts
from modekit.evaluation.inspection.passes import Decided, traced_losses
from modekit.loaded.load import load_model, load_tokenizer
from modekit.recipes.recipe import Expert
from modekit.text.chat import needed_template
from modekit.text.document import Conversation, Document, Message, message_of, text_of
from modekit.text.held_out import HeldOutText
from modekit.text.plain import WORD
from modekit.text.sequences import TokenSequence

HERE = Path(__file__).parent
GREETINGS = tuple((HERE / "chat_greetings.txt").read_text(encoding="utf-8").splitlines())
GENERAL = "general"
"""The domain of questions that are the base's."""
SMALL_TALK, CHANGE = "small talk", "change of domain"
REAL, REAL_CHANGE = "real questions: ", "real questions: change of domain"
FEWEST, MOST = 8, 24  # words of a question
ANSWERED = 32  # words of an answer that stands before a change of domain
BATCH, ANSWER_TOKENS = 8, 16
PAGE = 4_000  # characters
SENTENCE = re.compile(r"(?<=[.;:!?\n])\s+")
ALIKE = {
    "medicine": {"medical", "med", "health", "clinical", "biomedical"},
    "law": {"legal"},
    "german": {"de", "deutsch"},
    "french": {"fr", "francais"},
    "code": {"coder", "coding", "python", "programming"},
    "science": {"scientific", "sciences"},
}
"""Other words for a domain in the name of an expert."""
Real = Mapping[str, str]


@dataclass(frozen=True)
class ChatRow:
    """Questions of one kind: the share whose expert leads at the last prompt token, at the end of the answer, and over the
    answers' tokens; None where there is no expert that they could go to. `leaders`: who leads at the last prompt token.
    """

    name: str
    questions: int
    at_prompt: float | None
    after_answer: float | None
    over_answer: float | None
    leaders: Mapping[str, int]


@dataclass(frozen=True)
class Question:
    """What is asked, and the place of the expert that it should go to."""

    kind: str
    messages: Sequence[Message]
    expert: int | None


def who_leads(
    checkpoint: Checkpoint, questions: int = 32, system: str | None = None, seed: int = 0, ask: Path | None = None
) -> list[ChatRow]:
    """A row per kind of question, so many of a domain; `system` in place of the template's own system prompt."""
    tokenizer = load_tokenizer(checkpoint.folder)
    template = needed_template(tokenizer, "chat_asked.py")
    above = [] if system is None else [message_of("system", system)]
    lines = (ask or HERE / "chat_questions.jsonl").read_text(encoding="utf-8").splitlines()
    real = [json.loads(line) for line in lines if line.strip()]
    asked = [
        *questions_of_text(checkpoint, held_out_texts(checkpoint), questions, seed),
        *real_questions(checkpoint.record.recipe.experts, real, questions),
    ]
    prompts = [template.ids(template.text([*above, *each.messages], answer=True)) for each in asked]
    leaders = leaders_of(load_model(checkpoint.folder), checkpoint, prompts, tokenizer)
    return [row_of(kind, asked, leaders, checkpoint.names) for kind in dict.fromkeys(each.kind for each in asked)]


def _place_of_base(experts: Sequence[Expert]) -> int | None:
    return next((place for place, expert in enumerate(experts) if expert.is_base), None)


def questions_of_text(checkpoint: Checkpoint, texts: Sequence[HeldOutText], count: int, seed: int) -> Iterator[Question]:
    base = _place_of_base(checkpoint.record.recipe.experts)
    said = {text.name: list(said_in(text.documents, count, seed)) for text in texts}
    for text in texts:
        own = text.expert if text.expert is not None else base
        for question, _ in said[text.name]:
            yield Question(text.name, [message_of("user", question)], own)
    owned = [text for text in texts if text.expert is not None]
    for first, second in zip(owned, [*owned[1:], *owned[:1]], strict=True) if len(owned) > 1 else ():
        for (question, answer), (other, _) in list(zip(said[first.name], said[second.name], strict=False))[: count // 4]:
            if answer:
                said_before = [message_of("user", question), message_of("assistant", answer)]
                yield Question(CHANGE, [*said_before, message_of("user", other)], second.expert)
    for greeting in GREETINGS:
        yield Question(SMALL_TALK, [message_of("user", greeting)], base)


def real_questions(experts: Sequence[Expert], real: Sequence[Real], count: int) -> Iterator[Question]:
    """Of every domain that has an expert so many, and questions of each domain behind answered ones of every other."""
    places = {domain: place_of(domain, experts) for domain in dict.fromkeys(each["domain"] for each in real)}
    owners = {domain: place for domain, place in places.items() if place is not None}
    said = {domain: [each for each in real if each["domain"] == domain][:count] for domain in owners}
    for domain, owner in owners.items():
        for each in said[domain]:
            yield Question(REAL + domain, [message_of("user", each["question"])], owner)
    for first, second in permutations(owners, 2):
        answered = [each for each in said[first] if "answer" in each]
        if owners[first] == owners[second]:
            continue
        for before, each in list(zip(answered, said[second], strict=False))[: max(1, count // 8)]:
            said_before = [message_of("user", before["question"]), message_of("assistant", before["answer"])]
            yield Question(REAL_CHANGE, [*said_before, message_of("user", each["question"])], owners[second])


def place_of(domain: str, experts: Sequence[Expert]) -> int | None:
    """An expert of this name, else the base for what is general, else the first one with the domain in its name."""
    named = next((place for place, expert in enumerate(experts) if expert.name == domain), None)
    if named is not None or domain == GENERAL:
        return _place_of_base(experts) if named is None else named
    words = {domain.casefold(), *ALIKE.get(domain, ())}
    for place, expert in enumerate(experts):
        if not expert.is_base and words & set(re.split(r"[\W\d_]+", expert.name.casefold())):
            return place
    return None


def said_in(documents: Sequence[Document], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions, and the words behind each: from every document once before any is asked again."""
    draw = random.Random(seed)
    asked = [document for document in documents if not isinstance(document, Conversation) or spoken(document)]
    for number in range(count if asked else 0):
        document = asked[number % len(asked)]
        found = spoken(document) if isinstance(document, Conversation) else cut(text_of(document), draw)
        if found is not None:
            yield found


def spoken(conversation: Conversation) -> tuple[str, str] | None:
    """What the user says first, and what is answered; None where that is nothing, or more than a page."""
    said = [each for each in conversation.messages if each["content"].strip()]
    place = next((place for place, each in enumerate(said) if each["role"] == "user"), len(said))
    behind = "".join(each["content"] for each in said[place + 1 : place + 2] if each["role"] == "assistant")
    question = said[place]["content"] if place < len(said) else ""
    return (question, behind) if 0 < len(question) <= PAGE else None


def cut(document: str, draw: random.Random) -> tuple[str, str]:
    """A few words from the beginning of a sentence, of a long document somewhere, and those behind them."""
    page = document
    if len(document) > PAGE:
        at = draw.randrange(len(document) - PAGE)
        page = document[at : at + PAGE]
    starts = [0, *(found.end() for found in SENTENCE.finditer(page))]
    pieces = [WORD.findall(page[start : start + 1_000]) for start in starts]
    pieces = [words for words in pieces if len(words) >= FEWEST]
    words = draw.choice(pieces) if pieces else WORD.findall(page)
    length = draw.randint(FEWEST, MOST)
    return "".join(words[:length]).strip(), "".join(words[length : length + ANSWERED]).strip()


def leaders_of(
    model: PreTrainedModel, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Who leads at the end of every prompt, and at each token of its answer."""
    answered = [
        answer
        for start in range(0, len(prompts), BATCH)
        for answer in answers(model, prompts[start : start + BATCH], tokenizer)
    ]
    found: list[list[int]] = [[]] * len(prompts)

    def consume(row: int, decided: Decided) -> None:
        mean_SE = decided.weights_RSE.mean(0)
        found[row] = mean_SE[len(prompts[row]) - 1 :].argmax(-1).tolist()

    traced_losses(model, checkpoint, answered, consume, lambda _: None)
    return found


def answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[TokenSequence]:
    """Every prompt with its greedy answer of at most 16 tokens."""
    longest = max(map(len, prompts))
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ended = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    ids_BS = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask_BS = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        out_BS: Any = model.generate(
            input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0
        )
    for prompt, row in zip(prompts, out_BS[:, longest:].tolist(), strict=True):
        length = next((place for place, token in enumerate(row) if token in ended), len(row))
        yield TokenSequence((*prompt, *row[:length]))


def row_of(kind: str, asked: Sequence[Question], leaders: Sequence[Sequence[int]], names: Sequence[str]) -> ChatRow:
    found = [(each.expert, lead) for each, lead in zip(asked, leaders, strict=True) if each.kind == kind]
    counts = Counter(names[lead[0]] for _, lead in found)
    if found[0][0] is None:
        return ChatRow(kind, len(found), None, None, None, counts)
    right = [[expert == each for each in lead] for expert, lead in found]
    over = [fmean(each[1:]) for each in right if len(each) > 1]  # an answer may be empty
    at_prompt, after = (fmean(each[place] for each in right) for place in (0, -1))
    return ChatRow(kind, len(found), at_prompt, after, fmean(over) if over else None, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--system")
    parser.add_argument("--ask", type=Path)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    titles = ["", "questions", "last prompt token", f"after {ANSWER_TOKENS} tokens", "over them", *checkpoint.names]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for row in who_leads(checkpoint, options.questions, options.system, ask=options.ask):
        shares = ["-" if each is None else f"{each:.2f}" for each in (row.at_prompt, row.after_answer, row.over_answer)]
        counts = [str(row.leaders.get(name, 0)) for name in checkpoint.names]
        print(f"| {' | '.join([row.name, str(row.questions), *shares, *counts])} |")


if __name__ == "__main__":
    main()
