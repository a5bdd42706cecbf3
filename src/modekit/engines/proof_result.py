"""What the proof of a GGUF file found (proof.py), and whether it is enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from modekit.engines.registry import SMALL
from modekit.errors import EngineError

EXACT = "f32"
"""The outtype with which all must agree."""
TOLERANCE = 2e-3  # nats, of log-probabilities with float32 weights
LARGEST_LOSS = 0.01  # of perplexity, with fewer bits
LARGEST_TYPICAL = 0.1  # nats, of log-probabilities on average, with fewer bits: another model of the same quality is no proof
_OF_BITS, _TYPICAL_OF_BITS = 0.25, 0.5
"""What a small type may take of any model: beyond that the file is of no use, or of another model."""
_TYPICAL_OVER_BASE = 1.5
_SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Loss:
    """How much larger a perplexity is in llama.cpp than in transformers, as a share, and the standard error of that."""

    share: float
    standard_error: float

    @property
    def margin(self) -> float:
        """Two standard errors."""
        return _SURE * self.standard_error

    @property
    def is_too_large(self) -> bool:
        """Surely larger than what fewer bits may lose."""
        return not self.share - self.margin <= LARGEST_LOSS

    def is_known(self, outtype: str) -> bool:
        """Known well, or beyond doubt too large: more text would change no decision."""
        return self.margin <= LARGEST_LOSS / 3 or (outtype not in SMALL and self.share - 2 * self.margin > LARGEST_LOSS)

    def __str__(self) -> str:
        return f"{self.share:+.2%} \u00b1 {self.margin:.2%}"


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        same, written: of the tokens written greedily, those that both write, up to the first that differs in a text, and all.
        difference, typical: largest and mean difference of the log-probabilities of a token, in nats.
        base, base_typical: those of the dense base model, stored alike and over the same texts; None where it was not asked.
        accepted: whether it lost too much, and is kept since the user said so.
    """

    outtype: str
    same: int
    written: int
    text: str
    texts: int
    tokens: int
    difference: float
    typical: float
    perplexity: float
    in_transformers: float
    loss: Loss
    base: Loss | None = None
    accepted: bool = False
    notes: tuple[str, ...] = ()
    base_typical: float | None = None

    def __str__(self) -> str:
        base = "" if self.base is None else f"; the dense base model at {self.outtype} {self.base}"
        return (
            f"{self.same} of {self.written} greedy tokens as in transformers, log-probabilities {self.typical:.1e} apart "
            f"(at most {self.difference:.1e}), perplexity {self.perplexity:.5g} ({self.loss}{base}) "
            f"over {self.tokens:,} tokens of {self.texts:,} texts ({self.text})"
        )

    def as_data(self) -> dict[str, object]:
        """For a record."""
        return {name: value for name, value in asdict(self).items() if name != "notes"}

    def beside(self, base: Proof | None) -> Proof:
        """The same, with what the dense base model lost."""
        return self if base is None else replace(self, base=base.loss, base_typical=base.typical)

    @property
    def allowed(self) -> float:
        """Of perplexity. With a small type, what the dense base model loses is the bits', and comes on top."""
        if self.outtype not in SMALL or self.base is None:
            return LARGEST_LOSS
        return LARGEST_LOSS + min(max(self.base.share + self.base.margin, 0.0), _OF_BITS)

    @property
    def allowed_typical(self) -> float:
        """Nats, of log-probabilities on average; with a small type by those of the dense base model."""
        if self.outtype not in SMALL or self.base_typical is None:
            return LARGEST_TYPICAL
        return max(LARGEST_TYPICAL, min(_TYPICAL_OVER_BASE * self.base_typical, _TYPICAL_OF_BITS))

    @property
    def _bound(self) -> str:
        return (
            f"perplexity at most {100 * self.allowed:.3g} % higher, two standard errors aside, and log-probabilities within "
            f"{self.allowed_typical:.2g} on average"
        )

    def judged(self, file: Path, *, accept: bool = False) -> Proof:
        """The same, marked where only `accept` lets it pass; `file` is what messages name. Raises EngineError where llama.cpp
        computes another model, whatever is accepted, or fewer bits lost too much.
        """
        if self.outtype == EXACT:
            return self._exact(file)
        if self.loss.share - self.loss.margin <= self.allowed and self.typical <= self.allowed_typical:
            return self
        if not accept:
            raise EngineError(
                "the model in llama.cpp is not as good as in transformers",
                where=str(file),
                found=str(self),
                expected=self._bound,
                remedy=f"{self._blame} or keep the file as it is with --accept",
            )
        note = f"it lost more than a proof allows ({self._bound}), and was kept because of --accept"
        return replace(self, accepted=True, notes=(*self.notes, note))

    def _exact(self, file: Path) -> Proof:
        if self.same < self.written or not self.difference <= TOLERANCE:
            raise EngineError(
                "llama.cpp computes another model than transformers",
                where=str(file),
                found=str(self),
                expected=f"the same tokens, log-probabilities within {TOLERANCE:g}",
                remedy="do not use llama.cpp for it; serve the mixture with vLLM or transformers, and report this",
            )
        return self

    @property
    def _blame(self) -> str:
        """What to do, as far as the base model tells whether the bits or the mixture are to blame."""
        if self.base is None:
            return f"choose --outtype {EXACT}, which shows whether it is the bits,"
        if self.base.is_too_large or self.base.share + self.base.margin >= self.loss.share - self.loss.margin:
            return f"the dense base model loses as much at {self.outtype}, so it is the bits: choose a finer --outtype,"
        return f"the dense base model loses less at {self.outtype}, so it is this mixture: choose a finer --outtype,"
