"""What the routers do with one text, token by token: `modekit inspect OUT --text "..."`.

Shape legend: S tokens of a window or of the text, E experts, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import refuse_pairs
from modekit.checkpoint.sources import why_not
from modekit.errors import TextError
from modekit.evaluation.inspection.inspect import counted, token_trace
from modekit.evaluation.inspection.passes import Array32, Decided, loss_per_token, losses_without, token_losses, traced_losses
from modekit.evaluation.inspection.result import TextTrace
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import QUIET, Run
from modekit.text.chat import needed_template
from modekit.text.document import message_of
from modekit.text.sequences import TokenSequence, encode

_MOST = 4_096
"""Tokens of a text that are read: the weights of every router are kept."""


@dataclass(frozen=True)
class UserMessage:
    """A user's message in a chat; without a system prompt the template has its own."""

    system: str | None
    text: str


def inspect_text(checkpoint: Checkpoint, text: str | UserMessage, *, sequence_length: int = 512, run: Run = QUIET) -> TextTrace:
    """What the routers do with the first 4,096 tokens of a text; what is said in a chat is shown in the chat template, with the
    last 4,096 tokens up to where the answer begins.

    Raises TextError for a text of fewer than two tokens, or without a chat template, UnsupportedError for a model that reads
    pairs, CheckpointError when losses or weights are not finite.
    """
    refuse_pairs(
        checkpoint,
        "a source and its target are shown together, and this is one text",
        remedy="leave it out: inspect.json and the report have pairs of the held-out text, token by token",
    )
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    model = load_model(checkpoint.folder, run=run)
    positions = checkpoint.config.get("max_position_embeddings")
    windows = _windows(tokenizer, text, min(sequence_length, positions) if isinstance(positions, int) else sequence_length)
    decided = dict[int, Decided]()
    advance = counted(run, checkpoint, windows)
    losses = _joined(windows, traced_losses(model, checkpoint, windows, decided.__setitem__, advance))
    without = [_joined(windows, each) for each in losses_without(model, checkpoint, windows, advance)]
    del model  # before the base model comes
    weights_RSE = np.concatenate([decided[row].weights_RSE for row in range(len(windows))], axis=1)
    ids = [token for window in windows for token in window.ids]
    lacks_base, base_loss = why_not(checkpoint, None, run=run), None
    if lacks_base is None:
        base = load_expert_source(checkpoint, None, run=run)
        base_loss = float(np.nanmean(_joined(windows, token_losses(base, windows, lambda _: None)), dtype=np.float64))
    notes = {
        f"the text was read in {len(windows)} windows, each without the text before it": len(windows) > 1,
        f"of a text at most {_MOST:,} tokens are read": len(ids) >= _MOST - 1,
        f"no loss of the base model to compare with: {lacks_base}": lacks_base is not None,
    }
    recipe = checkpoint.record.recipe
    return TextTrace(
        **vars(token_trace(checkpoint, tokenizer, ids, weights_RSE, [losses, *without])),
        experts=checkpoint.names,
        routers=list(checkpoint.shape.positions),
        top_k=None if recipe.mixture.varies else recipe.top_k,
        base_loss=base_loss,
        entropy=float(np.concatenate([decided[row].entropy_RS for row in range(len(windows))], axis=1).mean(dtype=np.float64)),
        notes=[note for note, is_so in notes.items() if is_so],
    )


def _joined(windows: Sequence[TokenSequence], losses: Sequence[Array32]) -> Array32:
    """Losses of the tokens of all windows (S), NaN where there is none."""
    return np.concatenate([loss_per_token(window, each) for window, each in zip(windows, losses, strict=True)])


def _windows(tokenizer: PreTrainedTokenizerBase, text: str | UserMessage, length: int) -> list[TokenSequence]:
    """A text as `modekit eval` reads a document; a message in the template, to which the tokenizer adds nothing."""
    if isinstance(text, str):
        clean = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character
        windows = encode(tokenizer, [clean] if clean.strip() else [], max_tokens=_MOST, sequence_length=length)
    else:
        above = [] if text.system is None else [message_of("system", text.system)]
        written = needed_template(tokenizer, "--chat").text([*above, message_of("user", text.text)], answer=True)
        ids: Any = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"][-_MOST:]
        windows = [TokenSequence(tuple(ids[start : start + length])) for start in range(0, len(ids), length)]
    if not windows:
        raise TextError(
            "the text is too short: it needs two tokens, as the first is not predicted", where="--text", remedy="give more text"
        )
    return windows
