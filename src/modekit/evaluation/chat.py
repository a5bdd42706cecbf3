"""Where do conversations go? `modekit eval-chat OUT`: short questions inside the chat template, and who leads on them.

Asked are words of held-out text, alone and behind an answered question of another domain; small talk of the base; and real
questions (chat_questions.py). An expert leads where the mean of its weights over the routers is largest.

Shape legend: B batch, S sequence, E experts, R routers.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.errors import TextError
from modekit.evaluation.chat_questions import RealQuestion, by_expert, read_questions
from modekit.evaluation.domains import held_out_texts
from modekit.evaluation.inspection.passes import Decided, traced_losses
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results_folder import CheckpointResult
from modekit.files.figures import or_dash
from modekit.files.typed import Count, Number
from modekit.loaded.load import load_model, load_tokenizer
from modekit.recipes.recipe import Expert, place_of_base
from modekit.run import QUIET, ProgressCount, Run
from modekit.text.chat import ChatTemplate, needed_template
from modekit.text.document import Conversation, Document, Message, message_of, text_of
from modekit.text.held_out import HeldOutText
from modekit.text.plain import WORD
from modekit.text.sequences import TokenSequence

GREETINGS = tuple(files("modekit.evaluation").joinpath("greetings.txt").read_text(encoding="utf-8").splitlines())
"""Small talk that no fit has seen (text/shipped.py has other)."""
SMALL_TALK, CHANGE = "small talk", "change of domain"
REAL, REAL_CHANGE = "real questions: ", "real questions: change of domain"
_FEWEST, _MOST = 8, 24  # words of a question
_ANSWERED = 32  # words of an answer that stands before a change of domain
_BATCH, _ANSWER_TOKENS = 8, 16
_PAGE = 4_000  # characters
_SENTENCE = re.compile(r"(?<=[.;:!?\n])\s+")


@dataclass(frozen=True)
class ChatScore:
    """Questions of one kind: the share whose expert leads at the last prompt token, at the end of the answer, and over the
    answers' tokens (None in results of earlier versions). `expert`: None where there is none that they could go to; `leaders`:
    who leads at the last prompt token.
    """

    name: str
    expert: str | None
    questions: Count
    at_prompt: Number | None
    after_answer: Number | None
    leaders: Mapping[str, Count]
    over_answer: Number | None = None

    @property
    def shares(self) -> list[str]:
        """As tables show them."""
        return [or_dash(each, ".2f") for each in (self.at_prompt, self.after_answer, self.over_answer)]


@dataclass(frozen=True)
class ChatResults(CheckpointResult):
    """chat.json: a row per kind of question, each answered in at most so many tokens."""

    experts: Sequence[str]
    system: str | None
    answer_tokens: Count
    rows: Annotated[Sequence[ChatScore], Field(max_length=2**10)]
    notes: Sequence[str] = field(default_factory=list)

    file = "chat.json"
    command = "modekit eval-chat"

    def cells(self) -> int:
        """Of a row per kind and a column per expert."""
        return len(self.rows) * (5 + len(self.experts))

    def markdown(self) -> str:
        """For chat.md."""
        titles = ["", "questions", "last prompt token", f"after {self.answer_tokens} tokens", "over them", *self.experts]
        counts = ([str(row.leaders.get(name, 0)) for name in self.experts] for row in self.rows)
        lines = [[row.name, str(row.questions), *row.shares, *led] for row, led in zip(self.rows, counts, strict=True)]
        return "\n".join([markdown_table(titles, lines), "", *(f"* {note}" for note in self.notes), ""])


@dataclass(frozen=True)
class ChatQuestion:
    """What is asked, and the place of the expert that it should go to."""

    kind: str
    messages: Sequence[Message]
    expert: int | None


def evaluate_chat(
    checkpoint: Checkpoint,
    *,
    questions: int = 32,
    system: str | None = None,
    seed: int = 0,
    ask: Path | None = None,
    run: Run = QUIET,
    write: bool = True,
) -> ChatResults:
    """Ask so many questions per domain and write OUT/results/chat.json and chat.md.

    `system`: in place of the template's own system prompt; `seed`: which words are asked; `ask`: a file of real questions in
    place of modekit's own. Raises UnsupportedError for a mixture with an encoder; TextError.
    """
    refuse_pairs(checkpoint, "chats are with models that write a text on", option="")
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    template = needed_template(tokenizer, "eval-chat")
    above = [] if system is None else [message_of("system", system)]
    if system is not None and not _is_shown(template, system):
        raise TextError("the chat template takes no system prompt", where="--system", remedy="leave it out")
    real = list(_real_questions(checkpoint.record.recipe.experts, read_questions(ask), questions))
    if ask is not None and not real:
        raise TextError(
            "no expert has the name of a domain that is asked about", where="--ask", found=", ".join(checkpoint.names)
        )
    asked = [*_questions(checkpoint, held_out_texts(checkpoint), questions, seed), *real]
    prompts = [template.ids(template.text([*above, *each.messages], answer=True)) for each in asked]
    model = load_model(checkpoint.folder, run=run)
    leaders = _leaders(model, checkpoint, prompts, tokenizer, run)
    rows = [_score(kind, asked, leaders, checkpoint.names) for kind in dict.fromkeys(each.kind for each in asked)]
    notes = _notes(template, system, rows)
    results = ChatResults(checkpoint.names, system, _ANSWER_TOKENS, rows, notes, checkpoint=checkpoint.identity)
    if write:
        results.write(checkpoint)
    return results


def _questions(checkpoint: Checkpoint, texts: Sequence[HeldOutText], count: int, seed: int) -> Iterator[ChatQuestion]:
    base = place_of_base(checkpoint.record.recipe.experts)
    said = {text.name: list(_said(text.documents, count, seed)) for text in texts}
    for text in texts:
        own = text.expert if text.expert is not None else base
        for question, _ in said[text.name]:
            yield ChatQuestion(text.name, [message_of("user", question)], own)
    owned = [text for text in texts if text.expert is not None]
    for first, second in zip(owned, [*owned[1:], *owned[:1]], strict=True) if len(owned) > 1 else ():
        for (question, answer), (other, _) in list(zip(said[first.name], said[second.name], strict=False))[: count // 4]:
            if answer:
                said_before = [message_of("user", question), message_of("assistant", answer)]
                yield ChatQuestion(CHANGE, [*said_before, message_of("user", other)], second.expert)
    for greeting in GREETINGS:
        yield ChatQuestion(SMALL_TALK, [message_of("user", greeting)], base)


def _real_questions(experts: Sequence[Expert], real: Sequence[RealQuestion], count: int) -> Iterator[ChatQuestion]:
    """Of every domain that has an expert so many, and questions of each domain behind answered ones of every other."""
    owners = by_expert(real, experts)
    said = {domain: [each for each in real if each.domain == domain][:count] for domain in owners}
    for domain, owner in owners.items():
        for each in said[domain]:
            yield ChatQuestion(REAL + domain, [message_of("user", each.question)], owner)
    for first, second in permutations(owners, 2):
        answered = [each for each in said[first] if each.answer is not None]
        if owners[first] == owners[second]:
            continue
        for before, each in list(zip(answered, said[second], strict=False))[: max(1, count // 8)]:
            said_before = [message_of("user", before.question), message_of("assistant", before.answer or "")]
            yield ChatQuestion(REAL_CHANGE, [*said_before, message_of("user", each.question)], owners[second])


def _is_shown(template: ChatTemplate, system: str) -> bool:
    """Whether the template writes a system prompt."""
    try:
        return system.strip() in template.text([message_of("system", system), message_of("user", ".")], answer=True)
    except TextError:
        return False


def _said(documents: Sequence[Document], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions, and the words behind each: from every document once before any is asked again."""
    draw = random.Random(seed)
    asked = [document for document in documents if not isinstance(document, Conversation) or _spoken(document)]
    for number in range(count if asked else 0):
        document = asked[number % len(asked)]
        spoken = _spoken(document) if isinstance(document, Conversation) else _cut(text_of(document), draw)
        if spoken is not None:
            yield spoken


def _spoken(conversation: Conversation) -> tuple[str, str] | None:
    """What the user says first, and what is answered; None where that is nothing, or more than a page."""
    spoken = [each for each in conversation.messages if each["content"].strip()]
    place = next((place for place, each in enumerate(spoken) if each["role"] == "user"), len(spoken))
    behind = "".join(each["content"] for each in spoken[place + 1 : place + 2] if each["role"] == "assistant")
    question = spoken[place]["content"] if place < len(spoken) else ""
    return (question, behind) if 0 < len(question) <= _PAGE else None


def _cut(document: str, draw: random.Random) -> tuple[str, str]:
    """A few words from the beginning of a sentence, of a long document somewhere, and those behind them."""
    page = document
    if len(document) > _PAGE:
        at = draw.randrange(len(document) - _PAGE)
        page = document[at : at + _PAGE]
    starts = [0, *(found.end() for found in _SENTENCE.finditer(page))]
    pieces = [WORD.findall(page[start : start + 1_000]) for start in starts]
    pieces = [words for words in pieces if len(words) >= _FEWEST]
    words = draw.choice(pieces) if pieces else WORD.findall(page)
    length = draw.randint(_FEWEST, _MOST)
    return "".join(words[:length]).strip(), "".join(words[length : length + _ANSWERED]).strip()


def _leaders(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
) -> list[list[int]]:
    """Who leads at the end of every prompt, and at each token of its answer."""
    answered: list[TokenSequence] = []
    run.begin("answer", len(prompts))
    for start in range(0, len(prompts), _BATCH):
        answered += _answers(model, prompts[start : start + _BATCH], tokenizer)
        run.progress("answer", len(answered), len(prompts))
    found: list[list[int]] = [[]] * len(prompts)

    def consume(row: int, decided: Decided) -> None:
        mean_SE = decided.weights_RSE.mean(0)
        found[row] = mean_SE[len(prompts[row]) - 1 :].argmax(-1).tolist()

    work = ProgressCount(run, sum(len(each.ids) for each in answered))
    traced_losses(model, checkpoint, answered, consume, partial(work.advance, "read routers"))
    return found


def _answers(
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
            input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=_ANSWER_TOKENS, do_sample=False, pad_token_id=0
        )
    for prompt, row in zip(prompts, out_BS[:, longest:].tolist(), strict=True):
        length = next((place for place, token in enumerate(row) if token in ended), len(row))
        yield TokenSequence((*prompt, *row[:length]), 0)


def _score(kind: str, asked: Sequence[ChatQuestion], leaders: Sequence[Sequence[int]], names: Sequence[str]) -> ChatScore:
    found = [(each.expert, lead) for each, lead in zip(asked, leaders, strict=True) if each.kind == kind]
    counts = Counter(names[lead[0]] for _, lead in found)
    own = found[0][0]
    if own is None:
        return ChatScore(kind, None, len(found), None, None, dict(counts))
    right = [[expert == each for each in lead] for expert, lead in found]
    over = [fmean(each[1:]) for each in right if len(each) > 1]  # an answer may be empty
    whose = "the last one's" if kind in (CHANGE, REAL_CHANGE) else names[own]
    at_prompt, after = (fmean(each[place] for each in right) for place in (0, -1))
    return ChatScore(kind, whose, len(found), at_prompt, after, dict(counts), fmean(over) if over else None)


def _notes(template: ChatTemplate, system: str | None, rows: Sequence[ChatScore]) -> list[str]:
    before, _ = template.around(system) or ("", "")
    notes = [f"the template and its system prompt put {len(template.ids(before))} tokens before a question"]
    if any(row.name == SMALL_TALK and row.expert is None for row in rows):
        notes.append("no expert is the base, to which small talk could go: add one with model: base and some general text")
    return notes
