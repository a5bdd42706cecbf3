"""Lexical routers: what does every token say of the domain, averaged over the text so far?

The table is trained without a model (evidence.py). In the modekit architecture it is the gate of one router before the first
layer; a native checkpoint carries it in channels besides the base's: evidence in the embedding, gates that read its average.
The channels of the average pass a norm before each gate, which divides them by the size of the stream there. By how much is
measured on a little text: the gate of a layer multiplies with the median, over tokens, of what the average is over what
arrives. docs/lexical.md has the equations.

Words that the text has rarely, or not at all, borrow: ridge regression over the tokens that the text has goes from the base's
embedding to the table, and what it says of a token counts as much as some occurrences of it. How many, and how strong the ridge
is, say tokens that are kept aside: embeddings that tell nothing lend nothing.

Shape legend: B batch, S sequence, E experts, J averages, V vocabulary, N = J E channels, D width of what a router reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, zip_longest

import numpy as np
import torch
from torch import nn

from modekit.architecture.modekit_router import causal_average, ngram_rows
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import evidence_columns, evidence_values, rows_of
from modekit.checkpoint.record import RouterRecord
from modekit.loaded.load import load_tokenizer
from modekit.loaded.shapes import expert_view
from modekit.planning.channels import MEASURED_TOKENS, Channels
from modekit.recipes.recipe import Expert, place_of_base
from modekit.recipes.router import Router
from modekit.routing.evidence import Averaging, TokenRows, train_table
from modekit.routing.examples import changes_of_domain, template_for
from modekit.routing.fit import FittedRouter, Fitting
from modekit.routing.token_text import TokenText, read_token_texts
from modekit.sources.contents import OpenFiles
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import embedding_in, weight_of
from modekit.text.chat import ChatTemplate
from modekit.text.sequences import make_batches
from modekit.weights.numeric import as_array, to_float32

_PRIOR = 25.0  # occurrences of a token that what it borrows counts as much as, were it all that there is to know
_RIDGES = [10.0**power for power in range(-3, 4, 2)]  # of the mean square of an embedding's column
_ASIDE = 8  # one token of so many chooses the ridge
_LEAST = 1e-30  # where all rows are zeros


def shared_embedding(checkpoint: Checkpoint) -> TensorRef | None:
    """The embedding, in full precision, that all experts have; None where there is no such one."""
    found = checkpoint.tensors.get(weight_of(embedding_in(checkpoint.tensors)))
    return found if found is not None and found.shape[:1] == (checkpoint.vocabulary,) and found.dtype in DTYPE_NAMES else None


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
    settings, recipe = fitting.settings, fitting.recipe
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    texts = read_token_texts(fitting, tokenizer)
    fitting.run.begin("prepare the examples")
    channels = fitting.checkpoint.shape.channels  # of a native architecture, which may not let evidence fade
    averaging = Averaging(tuple(settings.decays) if channels is None else channels.decays)
    table = LexicalTable(settings, fitting.checkpoint.vocabulary)
    template, special = template_for(tokenizer, settings), sorted(set(tokenizer.all_special_ids))
    examples = _examples(texts, table, template, settings.sequence_length)
    trained = train_table(
        examples,
        table.height,
        averaging,
        seed=settings.seed,
        silent=table.of_tokens(torch.tensor(special, dtype=torch.long)).tolist(),
        expected=table.expected([text.expected_V for text in texts]),
        advance=lambda done, total: fitting.run.progress("train evidence", done, total),
    )
    leaning = lean(recipe.experts, TOWARD_BASE if template is not None else 0.0)[:, None, None] / len(averaging.decays)
    said_EJV = table.parts(trained.table)
    if template is not None and not settings.hashes:
        said_EJV = _with_borrowed(fitting, said_EJV, examples, special)
    table_EJV = (said_EJV + leaning / len(table.orders)) / settings.temperature
    report: dict[str, object] = {
        "tokens": [len(each.ids_N) for each in texts],
        "kept_aside": [trained.before, trained.after],
        "steps": trained.steps,
    }
    if template is not None:
        report |= {"chats": [int((text.starts > 0).sum()) for text in texts]}
    fitted = fitting.fitted([table_EJV.flatten(1).numpy()], [each.source["text"] for each in texts], report)
    return fitted if channels is None else gates_on_channels(fitting, texts, table_EJV, averaging, fitted.record)


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
    """The table with what words that the text has rarely take from others (`with_borrowed`), where one embedding tells."""
    embedding, channels = shared_embedding(fitting.checkpoint), fitting.checkpoint.shape.channels
    if embedding is None:
        return table_EJV
    said = torch.cat([each.rows[each.start :, 0] for own in examples for each in own])
    counts_V = torch.bincount(said, minlength=table_EJV.shape[-1]).float()
    hidden = embedding.shape[1] if channels is None else channels.hidden
    table_VN = with_borrowed(table_EJV.flatten(0, 1).t().contiguous(), counts_V, embedding, hidden)
    table_VN[list(special)] = 0.0
    return table_VN.t().reshape(table_EJV.shape).contiguous()


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


def gates_on_channels(
    fitting: Fitting, texts: Sequence[TokenText], table_EJV: torch.Tensor, averaging: Averaging, record: RouterRecord
) -> FittedRouter:
    """Gates and evidence of a native checkpoint that has channels for them."""
    channels, embedding = fitting.checkpoint.carrier
    table_VN = table_EJV.permute(2, 1, 0).flatten(1).contiguous().numpy()
    columns = evidence_columns(channels, embedding, table_VN)
    factors = _factors(fitting, channels, texts, table_VN, evidence_values(columns, embedding), averaging)
    gates = []
    for slot, factor in zip(fitting.checkpoint.slots, factors, strict=True):
        gate_ED = np.zeros(slot.shape, np.float32)
        for number in range(table_VN.shape[1]):
            gate_ED[number % channels.experts, channels.context.start + number] = factor
        gates.append(gate_ED)
    return FittedRouter(gates, record, columns)


def _factors(
    fitting: Fitting,
    channels: Channels,
    texts: Sequence[TokenText],
    table_VN: np.ndarray,
    evidence_VN: np.ndarray,
    averaging: Averaging,
) -> list[float]:
    """Per router, by what the channels that reach it must be multiplied to be the average of the table."""
    view = expert_view(fitting.checkpoint, run=fitting.run)
    fitting.run.begin("measure the stream", len(texts))
    routers = view.router_inputs()
    weight: torch.Tensor = view.model.get_input_embeddings().weight
    weight.data[:, channels.evidence] = torch.from_numpy(evidence_VN).to(weight)
    table = torch.from_numpy(table_VN)
    found: list[list[torch.Tensor]] = [[] for _ in routers]
    wanted_BSN: torch.Tensor | None = None
    mask_BS: torch.Tensor | None = None

    def hook(slot: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert wanted_BSN is not None and mask_BS is not None
            arrived_BSN = args[0].reshape(*wanted_BSN.shape[:2], -1)[..., channels.context].float().cpu()
            size = (wanted_BSN * wanted_BSN).sum(-1)
            ratio = size / (arrived_BSN * wanted_BSN).sum(-1)
            found[slot].append(ratio[mask_BS & (size > 0) & ratio.isfinite()])

        return read

    with ExitStack() as hooks, torch.inference_mode():
        for slot, module in enumerate(routers):
            hooks.enter_context(module.register_forward_pre_hook(hook(slot)))
        for place, text in enumerate(texts):
            view.use_expert(place)
            for batch in make_batches(text.beginning(max(16, MEASURED_TOKENS // len(texts)))):
                mask_BS = batch.mask
                wanted_BSN = _averages(table[batch.input_ids], batch.mask, averaging, channels.experts)
                view.model.model(
                    input_ids=batch.input_ids.to(view.model.device),
                    attention_mask=batch.mask.long().to(view.model.device),
                    use_cache=False,
                )
            fitting.run.progress("measure the stream", place + 1, len(texts))
    said = [torch.cat(each) for each in found]
    return [float(each.median()) if len(each) else 1.0 for each in said]  # of an expert alone no token says anything


def _averages(values_BSN: torch.Tensor, mask_BS: torch.Tensor, averaging: Averaging, experts: int) -> torch.Tensor:
    parts = torch.split(values_BSN, experts, dim=-1)
    said = [causal_average(part, mask_BS.float(), decay, None)[0] for part, decay in zip(parts, averaging.decays, strict=True)]
    return torch.cat(said, dim=-1)
