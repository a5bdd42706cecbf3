"""What the routers do with one text, token by token: `modekit inspect OUT --text "..."`.

Shape legend: S tokens of a window, T tokens of the text, E experts, R routers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.checkpoint.sources import why_not
from modekit.errors import TextError
from modekit.evaluation.inspection.inspect import counted, named_changes, top_k_of
from modekit.evaluation.inspection.passes import Decided, changes_without, loss_per_token, sums_of, token_losses, traced_losses
from modekit.evaluation.inspection.result import TextTrace, TokenLoss, only_figures
from modekit.evaluation.inspection.tokens import split_text, token_texts
from modekit.evaluation.inspection.unseen import scores_of
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer
from modekit.planning.shape import RouterPosition
from modekit.run import QUIET, Run
from modekit.text.chat import needed_template
from modekit.text.document import message_of
from modekit.text.sequences import TokenSequence
from modekit.text.tags import leading_tag, opening_ids, place_of_tag, without_tag

_MOST_DETAIL = 4_096  # tokens up to which every router's weights are kept, and not only their mean


@dataclass(frozen=True)
class UserMessage:
    """A user's message in a chat; without a system prompt the template has its own."""

    system: str | None
    text: str


def inspect_text(checkpoint: Checkpoint, text: str | UserMessage, *, sequence_length: int = 512, run: Run = QUIET) -> TextTrace:
    """What the routers do with a text; what is said in a chat is shown in the chat template, up to where the answer begins.

    Beyond 4,096 tokens `weights` has one entry, the mean over the routers. Raises TextError for a text of fewer than two
    tokens, or without a chat template, UnsupportedError for a model that reads pairs, CheckpointError when losses or weights
    are not finite.
    """
    refuse_pairs(
        checkpoint,
        "a source and its target are shown together, and this is one text",
        option="--text",
        remedy="leave it out: inspect.json and the report have pairs of the held-out text, token by token",
    )
    routers = list(checkpoint.shape.positions)
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    model = load_model(checkpoint.folder, run=run)
    length = min(sequence_length, int(getattr(model.config, "max_position_embeddings", sequence_length)))
    windows, texts, length = _windows(tokenizer, text, length)
    detailed = len(texts) <= _MOST_DETAIL
    read = _Read(len(routers) if detailed else 1, len(texts), len(checkpoint.names), length)
    advance = counted(run, checkpoint, windows)
    losses = traced_losses(model, checkpoint, windows, read.consume, advance)
    changes_EN = changes_without(model, checkpoint, windows, sums_of(losses), advance)
    del model  # before the base model comes
    without_base = why_not(checkpoint, None, run=run)
    base_losses = None
    if without_base is None:  # of the base model on the same tokens
        base_losses = token_losses(load_expert_source(checkpoint, None, run=run), windows, lambda _: None)
    per_token = [loss for window, each in zip(windows, losses, strict=True) for loss in loss_per_token(window, each)]
    scored, scores = sum(window.scored for window in windows), scores_of(checkpoint, windows)
    with only_figures(checkpoint):
        return TextTrace(
            experts=checkpoint.names,
            routers=routers if detailed else [RouterPosition("mean", None, "")],
            top_k=top_k_of(checkpoint),
            text="".join(texts),
            loss=float(sums_of(losses).sum()) / scored,
            base_loss=None if base_losses is None else float(sums_of(base_losses).sum()) / scored,
            entropy=float(read.entropy_T.mean()),
            windows=len(windows),
            tokens=[TokenLoss(text=token, loss=loss) for token, loss in zip(texts, per_token, strict=True)],
            weights=read.weights_RTE.tolist(),
            scores={name: np.concatenate([each[name] for each in scores]).tolist() for name in scores[0]} if scores else None,
            prompt_end=read.weights_RTE[:, -1].mean(0).tolist() if isinstance(text, UserMessage) else None,
            without=named_changes(checkpoint, changes_EN.sum(1) / scored),
            notes=_notes(len(windows), length, detailed, without_base),
        )


class _Read:
    """Weights and entropies of a text that is read in windows of `length` tokens: of each router, or their mean."""

    def __init__(self, rows: int, tokens: int, experts: int, length: int) -> None:
        self.weights_RTE = np.zeros((rows, tokens, experts), np.float32)
        self.entropy_T = np.zeros(tokens)
        self._length = length

    def consume(self, row: int, decided: Decided) -> None:
        """Take a window."""
        window = slice(row * self._length, row * self._length + decided.weights_RSE.shape[1])
        weights = decided.weights_RSE
        self.weights_RTE[:, window] = weights if len(weights) == len(self.weights_RTE) else weights.mean(0)
        self.entropy_T[window] = decided.entropy_RS.mean(0)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str | UserMessage) -> tuple[list[int], list[str]]:
    """Token ids, and the text that belongs to each."""
    written = text
    if isinstance(text, UserMessage):
        above = [] if text.system is None else [message_of("system", text.system)]
        written = needed_template(tokenizer, "--chat").text([*above, message_of("user", text.text)], answer=True)
    clean = str(written).encode("utf-8", "replace").decode()  # half of a surrogate pair is no character
    encoded: Any = {}
    if clean.strip():
        encoded = tokenizer(
            clean, return_offsets_mapping=tokenizer.is_fast, verbose=False, add_special_tokens=isinstance(text, str)
        )
    ids: list[int] = encoded.get("input_ids", [])
    if len(ids) < 2:
        short = "the text is too short: it needs two tokens, as the first is not predicted"
        raise TextError(
            short if ids else "the text is empty", where="--text", found=f"{len(ids)} tokens", remedy="give more text"
        )
    return ids, split_text(clean, encoded["offset_mapping"]) if tokenizer.is_fast else token_texts(tokenizer, ids)


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: str | UserMessage, length: int
) -> tuple[list[TokenSequence], list[str], int]:
    """Windows as `encode` cuts a document, each with the tag that the text begins with, if it does; the text of every token of
    them; and how many one has at most.
    """
    tag: int | None = None
    body, before = text, ""
    opening: tuple[int, ...] = ()
    if isinstance(text, str) and (tag := leading_tag(tokenizer, text)) is not None:
        body = without_tag(text)
        before, opening = text[: len(text) - len(body)], opening_ids(tokenizer)
    ids, texts = _encoded(tokenizer, body)
    room = int(tag is not None)
    length = max(2 + room, length)
    windows: list[TokenSequence] = []
    shown: list[str] = []
    for start in range(0, len(ids), length - room):
        window, said = TokenSequence(tuple(ids[start : start + length - room]), 0), texts[start : start + length - room]
        if tag is not None:
            place = place_of_tag(opening, window.ids)
            window, said = window.with_tag(tag, place), [*said[:place], before, *said[place:]]
        windows.append(window)
        shown += said
    return windows, shown, length


def _notes(windows: int, length: int, detailed: bool, without_base: str | None) -> list[str]:
    notes = []
    if windows > 1:
        notes.append(f"the text was read in {windows} windows of up to {length} tokens, each without the text before it")
    if not detailed:
        notes.append("long text: weights are the mean over the routers")
    if without_base is not None:
        notes.append(f"no loss of the base model to compare with: {without_base}")
    return notes
