"""How a model picks each next token, and how many it may read: what its configs say, for the chat and for other engines."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import CheckpointError, EngineError, SourceError
from modekit.files.read import UNREADABLE
from modekit.files.typed import Data, Number, read_as

FILE = "generation_config.json"
_Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


class _Generation(Data):
    """What of generation_config.json is read."""

    do_sample: bool | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**20, strict=True)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    eos_token_id: _Token | Annotated[list[_Token], Field(max_length=256)] | None = None


@dataclass(frozen=True)
class Sampling:
    """How each next token is drawn.

    Attributes:
        temperature: of the softmax; 0: always the likeliest token.
        top_p, top_k, min_p, repetition_penalty: as transformers has them; None: without.
        seed: of the draws; None: another one each time.
        ends: tokens with which an answer ends.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ends: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of(cls, folder: Path) -> Sampling:
        """What a model folder says; without a word of it greedy, as transformers is. Raises SourceError."""
        try:
            said = read_as(folder / FILE, _Generation)
        except FileNotFoundError:
            said = _Generation()
        except UNREADABLE as error:
            raise SourceError(
                "the file cannot be read", where=str(folder / FILE), found=error, remedy="mend it, or remove it"
            ) from None
        ends = said.eos_token_id if isinstance(said.eos_token_id, list) else [said.eos_token_id]
        drawn = cls(repetition_penalty=said.repetition_penalty, ends=frozenset(each for each in ends if each is not None))
        if not said.do_sample:
            return drawn
        temperature = 1.0 if said.temperature is None else said.temperature
        return replace(drawn, temperature=temperature, top_p=said.top_p, top_k=said.top_k, min_p=said.min_p)

    def at(self, temperature: float | None) -> Sampling:
        """The same at another temperature; None: at its own."""
        return self if temperature is None else replace(self, temperature=temperature)

    def for_transformers(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        said: dict[str, Any] = {"do_sample": self.temperature > 0, "eos_token_id": sorted(self.ends) or None}
        if self.repetition_penalty is not None:
            said["repetition_penalty"] = self.repetition_penalty
        return said | dict.fromkeys(("temperature", "top_p", "top_k", "min_p")) | (self._draw() if self.temperature else {})

    def for_llama(self) -> dict[str, Any]:
        """Keys of a request to llama.cpp, which has defaults of its own for what is not said."""
        penalty = {"repeat_penalty": self.repetition_penalty or 1.0}
        if not self.temperature:
            return {"temperature": 0.0, **penalty}
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"top_p": 1.0, "top_k": 0, "min_p": 0.0, **penalty, **seed, **self._draw()}

    def for_ollama(self) -> dict[str, float]:
        """Parameters of a Modelfile; what the model leaves open is Ollama's to choose."""
        said = self._draw() if self.temperature else {}
        penalty = self.repetition_penalty
        return said if penalty is None else {**said, "repeat_penalty": penalty, "repeat_last_n": -1}  # of all of the context

    def _draw(self) -> dict[str, float]:
        named = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return {name: value for name, value in named.items() if value is not None}


def longest_conversation(checkpoint: Checkpoint) -> int:
    """Tokens that the model was trained to read. Raises CheckpointError where its config does not say."""
    longest = checkpoint.config.get("max_position_embeddings")
    if type(longest) is not int or longest < 1:
        raise CheckpointError(
            "config.json does not say how long a text may be",
            where=f"{checkpoint.folder}: max_position_embeddings",
            found=longest,
            expected="a whole number of tokens",
            remedy="add what the base model's config.json says",
        )
    return longest


def context_of(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens of a context: as many as were asked for, or all that the model was trained to read. Raises EngineError for more;
    CheckpointError.
    """
    longest = longest_conversation(checkpoint)
    if asked is not None and asked > longest:
        raise EngineError(
            "the context is longer than the model's",
            where="--context",
            found=asked,
            expected=f"at most {longest}",
            remedy="ask for less; the model was not trained for more",
        )
    return asked or longest
