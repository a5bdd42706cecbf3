"""Lexical routers: what does every token say of the domain, averaged over the text so far?

The table is trained without a model (evidence.py). In the modekit architecture it is the gate of one router before the first
layer; a native checkpoint carries it in channels besides the base's (on_channels.py).

Shape legend: E experts, J averages, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import torch

from modekit.architecture.modekit_router import ngram_rows
from modekit.loaded.load import load_tokenizer
from modekit.recipes.recipe import Expert, Recipe, place_of_base
from modekit.recipes.router import Router
from modekit.routing.evidence import Averaging, BaseRoom, TokenRows, train_table
from modekit.routing.examples import changes_of_domain, template_for
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.on_channels import gates_on_channels
from modekit.routing.token_text import TokenText, read_token_texts
from modekit.routing.unseen import made_texts
from modekit.text.chat import ChatTemplate

_LEAN = 0.01
"""Logits between the first expert and the last where nothing speaks for any: every engine then takes the same."""


def lexical_gates(fitting: Fitting) -> FittedRouter:
    """The table, and the gates that read it. Raises TextError."""
    settings, recipe = fitting.settings, fitting.recipe
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    texts = read_token_texts(fitting, tokenizer)
    fitting.run.begin("prepare the examples")
    averaging = averaging_of(fitting)
    table = LexicalTable(settings, int(fitting.checkpoint.config["vocab_size"]))
    template, special = template_for(tokenizer, settings), sorted(set(tokenizer.all_special_ids))
    examples, room = _examples(texts, table, template, settings.sequence_length), _room(recipe, template)
    if recipe.mixture.unseen is not None and room is not None:
        made = made_texts(texts, room.base, special, int(fitting.checkpoint.config["vocab_size"]), settings.seed)
        examples[room.base] += [TokenRows(table.rows(ids)) for ids in made]
    trained = train_table(
        examples,
        table.height,
        averaging,
        seed=settings.seed,
        room=room,
        silent=[int(table.rows(torch.tensor([token]))[0, 0]) for token in special],
        advance=lambda done, total: fitting.run.progress("train evidence", done, total),
    )
    toward = trained.room - (0.0 if recipe.mixture.unseen is None else _LEAN)  # what it leans by is in what it may take
    leaning = lean(recipe.experts, toward)[:, None, None] / len(averaging.decays)
    table_EJV = (table.parts(trained.table) + leaning / len(table.orders)) / settings.temperature
    report: dict[str, object] = {
        "tokens": [len(each.ids_N) for each in texts],
        "kept_aside": [trained.before, trained.after],
        "steps": trained.steps,
    }
    if template is not None:
        report |= {"chats": [int((text.starts > 0).sum()) for text in texts]}
    if room is not None or template is not None:
        report |= {"toward_base": trained.room}
    fitted = fitting.fitted([table_EJV.flatten(1).numpy()], [each.source["text"] for each in texts], report)
    if fitting.checkpoint.shape.channels is not None:
        return gates_on_channels(fitting, texts, table_EJV, averaging, fitted.record)
    return fitted


class LexicalTable:
    """The rows of a lexical router's tables, one table for every order of n-grams, below one another."""

    def __init__(self, settings: Router, vocabulary: int) -> None:
        self.orders = settings.orders or [1]
        self._hashed = settings.hashes
        self._buckets = settings.buckets if self._hashed else vocabulary

    @property
    def height(self) -> int:
        """Of all of them together."""
        return self._buckets * len(self.orders)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """What the tokens (S,) of a sequence choose, (S, K) int32."""
        if not self._hashed:
            return ids.int()[:, None]
        one = ids.long()[None]
        found = [ngram_rows(one, torch.ones_like(one), None, order, self._buckets)[0][0] for order in self.orders]
        return torch.stack([rows + number * self._buckets for number, rows in enumerate(found)], dim=1).int()

    def parts(self, table_EJH: torch.Tensor) -> torch.Tensor:
        """As a gate has them: order by order, and in each average by average, (E, K J, buckets)."""
        experts, averages, _ = table_EJH.shape
        by_order = table_EJH.reshape(experts, averages, len(self.orders), self._buckets).transpose(1, 2)
        return by_order.reshape(experts, averages * len(self.orders), self._buckets)


def _room(recipe: Recipe, template: ChatTemplate | None) -> BaseRoom | None:
    """What the base may take of the domains, where it is an expert that takes what is no domain's."""
    base = place_of_base(recipe.experts)
    if base is not None and recipe.mixture.unseen is not None:
        return BaseRoom(base, recipe.mixture.router.alarms, of_all=True)
    return None if base is None or template is None else BaseRoom(base)


def _examples(
    texts: Sequence[TokenText], table: LexicalTable, template: ChatTemplate | None, longest: int
) -> list[list[TokenRows]]:
    """What the tokens of every domain's sequences choose, and of changes of domain in chats."""
    sequences = [text.sequences() for text in texts]
    changes = [] if template is None else changes_of_domain(template, sequences, longest)
    return [
        [TokenRows(table.rows(ids), start) for ids, start in chain(*own)]
        for own in zip_longest(sequences, changes, fillvalue=())
    ]


def averaging_of(fitting: Fitting) -> Averaging:
    """As the architecture averages: a native one may not let evidence fade."""
    channels = fitting.checkpoint.shape.channels
    return Averaging(channels.decays if channels is not None else tuple(fitting.settings.decays))


def lean(experts: Sequence[Expert], room: float = 0.0) -> torch.Tensor:
    """Logits (E,) of a text without evidence: falling from expert to expert, the base first if it is one, by `room` more.

    Every token has them, so that every average does, too.
    """
    order = sorted(range(len(experts)), key=lambda place: (not experts[place].is_base, place))
    logits = torch.zeros(len(experts))
    for rank, place in enumerate(order):
        logits[place] = _LEAN * (len(experts) - 1 - rank) / max(1, len(experts) - 1)
    base = place_of_base(experts)
    if base is not None:
        logits[base] += room
    return logits
