"""Lexical routers: what does every token say of the domain, averaged over the text so far?

The table is trained without a model (evidence.py). In the modekit architecture it is the gate of one router before the first
layer; a native checkpoint carries it in channels besides the base's: evidence in the embedding, gates that read its average.
The channels of the average pass a norm before each gate, which divides them by the size of the stream there. By how much was
measured at the build where more than FFNs is carried, else it is on a little text: the gate of a layer multiplies with the
median, over tokens, of what the average is over what arrives. docs/lexical.md has the equations.

Words that the text has rarely, or not at all, borrow: ridge regression over the tokens that the text has goes from the base's
embedding to the table, and what it says of a token counts as much as some occurrences of it. How many, and how strong the ridge
is, say tokens that are kept aside: embeddings that tell nothing lend nothing.

Shape legend: B batch, S sequence, E experts, J averages, V vocabulary, N = J E channels, D width of what a router reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

import numpy as np
import torch

from modekit.architecture.modekit_router import ngram_rows
from modekit.checkpoint.carried import stream_sizes
from modekit.checkpoint.evidence import evidence_columns
from modekit.checkpoint.evidence_file import rows_of
from modekit.loaded.load import load_tokenizer
from modekit.loaded.shapes import expert_view
from modekit.planning.channels import MEASURED_TOKENS
from modekit.recipes.mixture import Router
from modekit.recipes.recipe import Expert
from modekit.routing.evidence import TokenRows, averaged, train_table
from modekit.routing.examples import changes_of_domain, template_for
from modekit.routing.fit import FittedRouter, Fitting
from modekit.routing.inputs import GateInput, run_with_inputs
from modekit.routing.token_text import TokenText, read_token_texts
from modekit.sources.contents import OpenFiles
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import weight_of
from modekit.weights.numeric import as_array, to_float32

_PRIOR = 25.0  # occurrences of a token that what it borrows counts as much as, were it all that there is to know
_RIDGES = [10.0**power for power in range(-3, 4, 2)]  # of the mean square of an embedding's column
_ASIDE = 8  # one token of so many chooses the ridge
_LEAST = 1e-30  # where all rows are zeros


def with_borrowed(table_VN: torch.Tensor, counts_V: torch.Tensor, embedding: TensorRef, hidden: int) -> torch.Tensor:
    """The table with what its rarer tokens borrow. `counts_V`: occurrences of each; `hidden`: D, of the embedding's columns."""
    weights_V = counts_V / (counts_V + _PRIOR)
    own, held = torch.zeros(2, *[hidden + table_VN.shape[1]] * 2, dtype=torch.float64)  # X, Y transposed times X, Y
    with OpenFiles() as opened:
        for start, x_BD in _blocks(opened, embedding, hidden):
            seen = start + counts_V[start : start + len(x_BD)].nonzero()[:, 0]
            aside = seen % _ASIDE == 0
            for rows, product in ((seen[~aside], own), (seen[aside], held)):
                both = torch.cat([x_BD[rows - start], table_VN[rows]], dim=1)
                product += ((both * weights_V[rows, None]).t() @ both).double()
        explained, ridge = max((_explained(_solved(own, hidden, each), held), each) for each in _RIDGES)
        prior, into_DN = _PRIOR * max(0.0, explained), _solved(own + held, hidden, ridge).float()
        said = [x_BD @ into_DN for _, x_BD in _blocks(opened, embedding, hidden)]
    return torch.lerp(table_VN, torch.cat(said), prior / (counts_V + prior).clamp_min(_LEAST)[:, None])


def _solved(product: torch.Tensor, hidden: int, ridge: float) -> torch.Tensor:
    """What takes X to Y, (D, N)."""
    gram_DD = product[:hidden, :hidden].clone()
    gram_DD.diagonal().add_((ridge * gram_DD.diagonal().mean()).clamp_min(_LEAST))
    return torch.linalg.solve(gram_DD, product[:hidden, hidden:])  # type: ignore[no-any-return]


def _explained(into_DN: torch.Tensor, held: torch.Tensor) -> float:
    """Share of the squares of tokens that are kept aside."""
    hidden = len(into_DN)
    less = (into_DN * (2 * held[:hidden, hidden:] - held[:hidden, :hidden] @ into_DN)).sum()
    return float(less / held.diagonal()[hidden:].sum().clamp_min(_LEAST))


def _blocks(opened: OpenFiles, embedding: TensorRef, hidden: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Some rows (B, D), and the number of the first."""
    for start, rows in rows_of(opened, embedding):
        yield start, torch.from_numpy(to_float32(as_array(rows, embedding.dtype)).reshape(-1, embedding.shape[1])[:, :hidden])


TOWARD_BASE = 0.05  # logits, with chats: a base that is an expert takes words of which nothing is known
_LEAN = 0.01
"""Logits between the first expert and the last where nothing speaks for any: every engine then takes the same."""


def lexical_gates(fitting: Fitting) -> FittedRouter:
    """The table, and the gates that read it. Raises TextError."""
    settings, run = fitting.settings, fitting.run
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=run)
    texts = read_token_texts(fitting, tokenizer)
    run.begin("prepare the examples")
    channels = fitting.checkpoint.shape.channels  # of a native architecture, which may not let evidence fade
    decays = settings.decays if channels is None else channels.decays
    table = LexicalTable(settings, fitting.checkpoint.vocabulary)
    template, special = template_for(tokenizer, settings), sorted(set(tokenizer.all_special_ids))
    sequences = [text.sequences() for text in texts]
    changes = [] if template is None else changes_of_domain(template, sequences, settings.sequence_length)
    examples = [
        [TokenRows(table.rows(ids), start) for ids, start in chain(*own)]
        for own in zip_longest(sequences, changes, fillvalue=())
    ]
    trained = train_table(
        examples,
        table.height,
        decays,
        seed=settings.seed,
        silent=table.of_tokens(torch.tensor(special, dtype=torch.long)).tolist(),
        expected=table.expected([text.expected_V for text in texts]),
        advance=lambda done, total: run.progress("train the table of the router", done, total),
    )
    said_EJV = table.parts(trained.table)
    if template is not None and not settings.hashes:
        said_EJV = _with_borrowed(fitting, said_EJV, examples, special)
    leaning = lean(fitting.recipe.experts, TOWARD_BASE if template is not None else 0.0)[:, None, None] / len(decays)
    table_EJV = (said_EJV + leaning / len(table.orders)) / settings.temperature
    report: dict[str, object] = {
        "tokens": [len(each.ids_N) for each in texts],
        "kept_aside": [trained.before, trained.after],
        "steps": trained.steps,
    }
    if template is not None:
        report |= {"chats": [int((text.starts > 0).sum()) for text in texts]}
    fitted = fitting.fitted([table_EJV.flatten(1).numpy()], [each.source["text"] for each in texts], report)
    return fitted if channels is None else _on_channels(fitting, texts, table_EJV, fitted)


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
        return self._rows(ids[None])[0]

    def of_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of tokens (N,) by themselves, (N,) int32; without such a table, of n-grams that begin a text."""
        return self._rows(ids[:, None])[:, 0, self.orders.index(1) if 1 in self.orders else 0]

    def _rows(self, ids_BS: torch.Tensor) -> torch.Tensor:
        if not self._hashed:
            return ids_BS.int()[..., None]
        ids_BS = ids_BS.long()
        found = [ngram_rows(ids_BS, torch.ones_like(ids_BS), None, order, self._buckets)[0] for order in self.orders]
        return torch.stack([rows + number * self._buckets for number, rows in enumerate(found)], dim=-1).int()

    def expected(self, counts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """How often experts expect each row, (E, H), of counts of single tokens (V,); None where not all are known."""
        known = [each for each in counts if each is not None]
        if len(known) < len(counts) or 1 not in self.orders:
            return None
        found_EH = torch.zeros(len(known), self.height)
        for found_H, counts_V in zip(found_EH, known, strict=True):
            found_H.index_add_(0, self.of_tokens(torch.arange(len(counts_V))), counts_V)
        return found_EH

    def parts(self, table_EJH: torch.Tensor) -> torch.Tensor:
        """As a gate has them: order by order, and in each average by average, (E, K J, buckets)."""
        experts, averages, _ = table_EJH.shape
        by_order = table_EJH.reshape(experts, averages, len(self.orders), self._buckets).transpose(1, 2)
        return by_order.reshape(experts, averages * len(self.orders), self._buckets)


def _with_borrowed(
    fitting: Fitting, table_EJV: torch.Tensor, examples: Sequence[Sequence[TokenRows]], special: Sequence[int]
) -> torch.Tensor:
    """The table with what words that the text has rarely take from others (`with_borrowed`), where all experts have one
    embedding in full precision.
    """
    checkpoint, channels = fitting.checkpoint, fitting.checkpoint.shape.channels
    embedding = checkpoint.tensors.get(weight_of(checkpoint.shape.family.embedding))
    if embedding is None or embedding.shape[:1] != (checkpoint.vocabulary,) or embedding.dtype not in DTYPE_NAMES:
        return table_EJV
    said = torch.cat([each.rows[each.start :, 0] for own in examples for each in own])
    counts_V = torch.bincount(said, minlength=table_EJV.shape[-1]).float()
    hidden = embedding.shape[1] if channels is None else channels.hidden
    table_VN = with_borrowed(table_EJV.flatten(0, 1).t().contiguous(), counts_V, embedding, hidden)
    table_VN[list(special)] = 0.0
    return table_VN.t().reshape(table_EJV.shape).contiguous()


def lean(experts: Sequence[Expert], toward_base: float) -> torch.Tensor:
    """Logits (E,) of a text without evidence: falling from expert to expert, the base first if it is one, by so much more.

    Every token has them, so that every average does, too.
    """
    base, logits = next((place for place, expert in enumerate(experts) if expert.is_base), None), torch.zeros(len(experts))
    order = sorted(range(len(experts)), key=lambda place: (place != base, place))
    for rank, place in enumerate(order):
        logits[place] = _LEAN * (len(experts) - 1 - rank) / max(1, len(experts) - 1)
    if base is not None:
        logits[base] += toward_base
    return logits


def _on_channels(fitting: Fitting, texts: Sequence[TokenText], table_EJV: torch.Tensor, fitted: FittedRouter) -> FittedRouter:
    """Gates and evidence of a native checkpoint that has channels for them: each gate multiplies the channels that reach it by
    what makes them the average of the table.
    """
    channels, embedding = fitting.checkpoint.carrier
    table_VN = table_EJV.permute(2, 1, 0).flatten(1).contiguous()
    columns = evidence_columns(channels, embedding, table_VN.numpy())
    if not fitting.checkpoint.slots:  # gates follow from the sources
        return FittedRouter([], fitted.record, columns)
    if channels.carry is None:
        factors = _measured_factors(fitting, texts, table_VN, columns)
    else:
        factors = [channels.gate_factor(size) for size in stream_sizes(fitting.checkpoint.folder)]
    gates = []
    for slot, factor in zip(fitting.checkpoint.slots, factors, strict=True):
        gate_ED = np.zeros(slot.shape, np.float32)
        for number in range(table_VN.shape[1]):
            gate_ED[number % channels.experts, channels.context.start + number] = factor
        gates.append(gate_ED)
    return FittedRouter(gates, fitted.record, columns)


def _measured_factors(fitting: Fitting, texts: Sequence[TokenText], table_VN: torch.Tensor, columns: memoryview) -> list[float]:
    """What each gate multiplies by, where no stream was measured at the build: the median over a little text, read by the
    experts as they are in the checkpoint.
    """
    channels, embedding = fitting.checkpoint.carrier
    view = expert_view(fitting.checkpoint, run=fitting.run)
    weight: torch.Tensor = view.model.get_input_embeddings().weight
    weight.data[:, channels.evidence] = torch.from_numpy(
        to_float32(as_array(columns, embedding.dtype)).reshape(len(table_VN), -1)
    ).to(weight)
    ratios: list[list[torch.Tensor]] = [[] for _ in fitting.checkpoint.slots]
    for place, text in fitting.run.over("read the text with the base", enumerate(texts), len(texts)):
        sequences = text.beginning(max(16, MEASURED_TOKENS // len(texts)))
        wanted_TN = torch.cat([_averages(table_VN[list(each.ids)], channels.decays) for each in sequences])

        def compare(slot: int, x_TD: torch.Tensor, places_T: torch.Tensor, wanted_TN: torch.Tensor = wanted_TN) -> None:
            wanted = wanted_TN[places_T]
            size = (wanted * wanted).sum(-1)
            ratio = size / (x_TD[:, channels.context].cpu() * wanted).sum(-1)
            ratios[slot].append(ratio[(size > 0) & ratio.isfinite()])

        view.use_expert(place)
        run_with_inputs(view, sequences, GateInput(), compare)
    found_by_slot = map(torch.cat, ratios)
    return [
        float(found.median()) if len(found) else 1.0 for found in found_by_slot
    ]  # of an expert alone no token says anything


def _averages(values_SN: torch.Tensor, decays: Sequence[float]) -> torch.Tensor:
    """Of the parts of a table, side by side (S, N)."""
    parts = values_SN[None, :, None].chunk(len(decays), dim=-1)
    return torch.cat([averaged(part, [decay])[0] for part, decay in zip(parts, decays, strict=True)], dim=-1)
