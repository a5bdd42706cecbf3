"""Which decay follows a change of subject? Tables of evidence alone, no model is run: chat.md.

    python benchmarks/whole.py train FOLDER --kind strangers --seeds 0      (its base and text are enough)
    python benchmarks/chat_tables.py FOLDER [--seeds 3] [--gap] [--only 0.91 "0.91 alone" "0.98 0.9"]

A variant is the decays of its averages; `alone`: rare words borrow no evidence from words with similar embeddings.

FOLDER/base is SmolLM2-135M-Instruct, FOLDER/text has a .jsonl per domain. A seed draws the order of the fit. "prompt 0" and
"prompt 1" are every other real question; answers are the hand-written ones, their first 16 tokens; a change is a question and
its answer before a question of another domain, 60 of them; documents are those of the report split, each token's domain named
by who leads there. With --gap the experts run once on 1,024 held-out tokens of each domain, alone; each token then has the loss
of the one that leads. The experts may have been trained on some of these documents: only differences count.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.evaluation.chat import GREETINGS
from modekit.evaluation.chat_questions import RealQuestion, read_questions
from modekit.loaded.experts import load_expert
from modekit.loaded.load import load_tokenizer
from modekit.recipes.recipe import Expert
from modekit.recipes.router import Router
from modekit.routing.evidence import Averaging, TokenRows, train_table
from modekit.routing.examples import changes_of_domain, read_examples
from modekit.routing.lexical import TOWARD_BASE, lean, with_borrowed
from modekit.run import QUIET
from modekit.sources.model import read_header
from modekit.text.chat import ChatTemplate, needed_template
from modekit.text.document import Message, message_of
from modekit.text.documents import read_documents
from modekit.text.sequences import encode
from modekit.text.splits import documents_of_split

DOMAINS = ("medicine", "law", "french", "german", "general")
MOST, ANSWER, PER_PAIR, SCORED = 2**20, 16, 3, 1_024
VARIANTS = ("0.98 alone", "0.92 alone", "0.98", "0.94", "0.93", "0.92", "0.91", "0.9", "0.98 0.9")


@dataclass(frozen=True)
class Asked:
    """Ids of a prompt and of what is answered, its kind, and the place that should lead."""

    kind: str
    prompt: list[int]
    answer: list[int]
    place: int


@dataclass(frozen=True)
class Table:
    """What a fit gives: (V, J, E), and how it is averaged."""

    rows_VJE: torch.Tensor
    averaging: Averaging

    def leaders(self, ids: Sequence[int]) -> torch.Tensor:
        """Who leads after each token, (S,)."""
        logits_1SE = torch.einsum("jts,bsje->bte", self.averaging.matrices(len(ids)), self.rows_VJE[torch.tensor([ids])])
        return logits_1SE[0].argmax(-1)


class Setting:
    """Base, text and questions, read once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder / "base")
        self.template = needed_template(self.tokenizer, str(folder))
        self.router = Router(fit="lexical")
        self.experts = [
            Expert.model_validate({"name": name, "model": "base" if name == "general" else f"./{name}", "text": "./t"})
            for name in DOMAINS
        ]
        files = {name: str(folder / "text" / f"{name}.jsonl") for name in DOMAINS}
        self.documents = {name: read_documents([file], root=folder, where=name) for name, file in files.items()}
        self.sequences = [list(self._sequences(expert)) for expert in self.experts]
        changes = changes_of_domain(self.template, self.sequences, self.router.sequence_length)
        self.examples = [
            [TokenRows(ids[:, None], start) for ids, start in [*own, *more]]
            for own, more in zip(self.sequences, changes, strict=True)
        ]
        said = torch.cat([each.rows[each.start :, 0] for own in self.examples for each in own])
        self.embedding = read_header(folder / "base" / "model.safetensors", where=str(folder))["model.embed_tokens.weight"]
        self.counts_V = torch.bincount(said, minlength=self.embedding.shape[0]).float()
        self.asked = list(asked(self.template))
        self.held = [
            [each.ids for each in encode(self.tokenizer, self._split(name, "report"), max_tokens=16_384, sequence_length=512)]
            for name in DOMAINS
        ]

    def _sequences(self, expert: Expert) -> Iterator[tuple[torch.Tensor, int]]:
        for each in read_examples(self.tokenizer, self._split(expert.name, "fit"), expert, self.router, most=MOST):
            yield torch.tensor(each.ids, dtype=torch.int32), each.start

    def _split(self, name: str, split: str) -> list[object]:
        return list(documents_of_split(self.documents[name], split))

    def fitted(self, variant: str, seed: int) -> Table:
        """As routing/lexical.py does."""
        averaging = Averaging(tuple(float(word) for word in variant.split() if word != "alone"))
        silent = sorted(set(self.tokenizer.all_special_ids))
        table_EJV = train_table(self.examples, len(self.counts_V), averaging, seed=seed, silent=silent).table
        table_VN = table_EJV.permute(2, 1, 0).flatten(1).contiguous()
        if "alone" not in variant:
            table_VN = with_borrowed(table_VN, self.counts_V, self.embedding, self.embedding.shape[1])
            table_VN[silent] = 0.0
        rows_VJE = table_VN.reshape(len(table_VN), len(averaging.decays), -1)
        return Table(rows_VJE + lean(self.experts, TOWARD_BASE) / len(averaging.decays), averaging)


def losses_of_experts(folder: Path, setting: Setting) -> torch.Tensor:
    """Of every expert on the beginning of every domain's held-out text, (E, E, T); kept in FOLDER/losses.safetensors."""
    kept = folder / "losses.safetensors"
    if not kept.exists():
        homes = {name: next((folder / "seed0").glob(f"*-{name}"), folder / "base") for name in DOMAINS}
        found = [_losses(load_expert(folder / "base", home, run=QUIET), setting.held) for home in homes.values()]
        save_file({"losses": torch.stack(found)}, kept)
    return load_file(kept)["losses"]


@torch.inference_mode()
def _losses(model: PreTrainedModel, held: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """(E, T)."""
    of_domains = []
    for documents in held:
        said = [torch.tensor([ids]) for ids in beginning(documents)]
        found = [cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none") for ids in said]
        of_domains.append(torch.cat(found)[:SCORED])
    return torch.stack(of_domains)


def beginning(documents: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Documents with SCORED tokens to predict."""
    left = SCORED
    for ids in documents:
        if left <= 0:
            return
        yield ids
        left -= len(ids) - 1


def gap_closed(setting: Setting, table: Table, losses_EET: torch.Tensor) -> float:
    """(base - mixture) / (base - own expert), mean over the domains but the base's own."""
    base, found = DOMAINS.index("general"), []
    for place, documents in enumerate(setting.held):
        leads_T = torch.cat([table.leaders(ids)[:-1] for ids in beginning(documents)])[:SCORED]
        mixed, own, of_base = (
            losses_EET[:, place].gather(0, leads_T[None]).mean(),
            losses_EET[place, place],
            losses_EET[base, place],
        )
        if place != base:
            found.append(float((of_base.mean() - mixed) / (of_base.mean() - own.mean())))
    return statistics.fmean(found)


def asked(template: ChatTemplate) -> Iterator[Asked]:
    """Real questions, greetings, and changes of domain."""
    real = [each for each in read_questions(None) if each.domain in DOMAINS]
    by_domain = {name: [each for each in real if each.domain == name] for name in DOMAINS}
    for name, questions in by_domain.items():
        for number, each in enumerate(questions):
            yield _asked(template, f"{name} {number % 2}", [message_of("user", each.question)], each.answer, name)
    for greeting in GREETINGS:
        yield _asked(template, "small talk", [message_of("user", greeting)], None, "general")
    for number, (first, second) in enumerate(permutations(DOMAINS, 2)):
        before = [each for each in by_domain[first] if each.answer is not None]
        after = by_domain[second]
        for turn in range(PER_PAIR):
            said, new = before[(number + 7 * turn) % len(before)], after[(3 * number + 11 * turn) % len(after)]
            yield _asked(template, "change", [*_answered(said), message_of("user", new.question)], new.answer, second)


def _answered(said: RealQuestion) -> list[Message]:
    return [message_of("user", said.question), message_of("assistant", said.answer or "")]


def _asked(template: ChatTemplate, kind: str, messages: list[Message], answer: str | None, name: str) -> Asked:
    prompt = template.ids(template.text(messages, answer=True))
    return Asked(kind, prompt, template.ids(answer or "")[:ANSWER], DOMAINS.index(name))


def measured(setting: Setting, table: Table) -> dict[str, float]:
    """The shares that chat.md shows."""
    prompts: dict[str, list[float]] = {}
    answers: dict[str, list[float]] = {}
    for each in setting.asked:
        right = (table.leaders([*each.prompt, *each.answer]) == each.place).float()
        prompts.setdefault(each.kind, []).append(float(right[len(each.prompt) - 1]))
        answers.setdefault(each.kind, []).extend(right[len(each.prompt) :].tolist())
    found: dict[str, float] = {}
    for half in "01":
        found[f"prompt {half}"] = statistics.fmean(statistics.fmean(prompts[f"{name} {half}"]) for name in DOMAINS)
    for name in DOMAINS:
        found[name] = statistics.fmean([*prompts[f"{name} 0"], *prompts[f"{name} 1"]])
    own = [answers[f"{name} {half}"] for name in DOMAINS for half in "01"]
    found["answer"] = statistics.fmean(statistics.fmean(each) for each in own if each)
    found["small talk"] = statistics.fmean(prompts["small talk"])
    found["change"], found["change, answer"] = statistics.fmean(prompts["change"]), statistics.fmean(answers["change"])
    right = [[(table.leaders(ids) == place).float() for ids in held] for place, held in enumerate(setting.held)]
    found["documents"] = statistics.fmean(float(torch.cat(each).mean()) for each in right)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--gap", action="store_true", help="run the experts of FOLDER/seed0 once, for the gap closed")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(arguments.folder)
    losses_EET = losses_of_experts(arguments.folder, setting) if arguments.gap else None
    titles: list[str] = []
    for variant in arguments.only:
        tables = [setting.fitted(variant, seed) for seed in range(arguments.seeds)]
        rows = [measured(setting, table) for table in tables]
        for row, table in zip(rows, tables, strict=True) if losses_EET is not None else ():
            row["gap"] = gap_closed(setting, table, losses_EET)
        if not titles:
            titles = list(rows[0])
            print(f"| averages | {' | '.join(titles)} |\n{'|---' * (len(titles) + 1)}|", flush=True)
        cells = [_spread([row[title] for row in rows]) for title in titles]
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" ± {max(abs(value - mean) for value in values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
