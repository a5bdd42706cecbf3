"""What the routers do with one text, token by token: `modekit inspect OUT --text "..."`.

Shape legend: S tokens of a window, T tokens of the text, E experts, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.checkpoint.sources import why_not
from modekit.errors import TextError
from modekit.evaluation.inspection.inspect import counted, named_changes, tokens_of, top_k_of
from modekit.evaluation.inspection.passes import sums_of, token_losses, trace
from modekit.evaluation.inspection.result import TextTrace
from modekit.evaluation.inspection.tokens import split_text, token_texts
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer
from modekit.planning.shape import RouterPosition
from modekit.run import QUIET, Run
from modekit.text.chat import needed_template
from modekit.text.document import message_of
from modekit.text.sequences import TokenSequence
from modekit.text.tags import opening_ids, place_of_tag, split_tag

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
        remedy="leave it out: inspect.json and the report have pairs of the held-out text, token by token",
    )
    routers = list(checkpoint.shape.positions)
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    model = load_model(checkpoint.folder, run=run)
    length = min(sequence_length, int(getattr(model.config, "max_position_embeddings", sequence_length)))
    windows, texts, length = _windows(tokenizer, text, length)
    detailed = len(texts) <= _MOST_DETAIL
    traced = trace(model, checkpoint, windows, counted(run, checkpoint, windows), every=detailed)
    del model  # before the base model comes
    without_base = why_not(checkpoint, None, run=run)
    scored = sum(window.scored for window in windows)
    starts = accumulate((window.size for window in windows), initial=0)
    weights_RTE = np.concatenate([each.weights_RSE for each in traced], axis=1)
    return TextTrace(
        experts=checkpoint.names,
        routers=routers if detailed else [RouterPosition("mean", None, "")],
        top_k=top_k_of(checkpoint),
        text="".join(texts),
        loss=float(sums_of([each.losses_P for each in traced]).sum()) / scored,
        base_loss=_loss_of_base(checkpoint, windows, run) if without_base is None else None,
        entropy=float(np.concatenate([each.entropy_S for each in traced]).mean()),
        windows=len(windows),
        tokens=[
            token
            for window, start, each in zip(windows, starts, traced, strict=False)
            for token in tokens_of(window, texts[start : start + window.size], each)
        ],
        weights=weights_RTE.tolist(),
        prompt_end=weights_RTE[:, -1].mean(0).tolist() if isinstance(text, UserMessage) else None,
        without=named_changes(checkpoint, np.sum([each.changes_E for each in traced], axis=0) / scored),
        notes=_notes(len(windows), length, detailed, without_base),
    )


def _loss_of_base(checkpoint: Checkpoint, windows: Sequence[TokenSequence], run: Run) -> float:
    """Mean loss of the base model on the same tokens, in nats."""
    losses = token_losses(load_expert_source(checkpoint, None, run=run), windows, lambda _: None)
    return float(sums_of(losses).sum()) / sum(window.scored for window in windows)


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
    tag, body = split_tag(tokenizer, text) if isinstance(text, str) else (None, text)
    before = text[: len(text) - len(body)] if isinstance(text, str) and isinstance(body, str) else ""
    opening = opening_ids(tokenizer) if tag is not None else ()
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
