"""One seed of modular.py: students of one teacher for four languages, put together in several ways.

After "Mixture of Modular Experts" (arXiv 2407.19610). All ways read as many tokens in training:

    teacher    a model four times as large, trained on all languages
    student    the student as it begins: small, of random weights
    base       one student for all languages, distilled
    english .. one student per language, distilled on a quarter of the tokens each (PLE)
    ple        these four as they are, one per text
    jeet       four decoders over one embedding and head, trained jointly
    moe-ce     the same with a common expert that learns from every step
    ffn        FFN specialists of a half-trained `base`, in a plain Mixtral with a lexical router: modekit's own way
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.models import ARCHITECTURE, new_model
from modekit.demo.text import LANGUAGES
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results
from modekit.experts.corpus.tokenizer import byte_level_bpe
from modekit.experts.distill import Teaching
from modekit.experts.moving import What
from modekit.experts.settings import DistillSettings, Mix
from modekit.experts.specialize import specialize
from modekit.files.change import is_there
from modekit.files.copies import library_writes
from modekit.files.staging import staging
from modekit.files.write import write_file
from modekit.loaded.load import without_bars
from modekit.loaded.text_training import Training, train_on_text, training_sequences
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.run import Run
from modekit.text.document import text_of
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train as train_mixture

TEXTS = (*LANGUAGES, "code")
TEACHER: dict[str, Any] = {**ARCHITECTURE, "vocab_size": 2_048, "hidden_size": 192, "intermediate_size": 576}
STUDENT: dict[str, Any] = {
    **TEACHER,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
WITH_TEACHER, WITHOUT_TEACHER = DistillSettings(), DistillSettings(weights=1.0)
LEXICAL = {"fit": "lexical"}
COMMON = {"always_on": {"expert": "base", "weight": 0.5, "apart": True}}
_TRAINING = Training(batch_tokens=512, sequence_length=256, learning_rate=4e-3, warmup=0.2, weight_decay=0.05)
_EMBEDDING = 1.0  # with the 0.02 of a Llama, seeds differ for long by when they leave the frequencies of tokens


@dataclass(frozen=True)
class Budget:
    """Steps of the teacher, and of everything else together that one way of mixing trains; tokens per language in the table."""

    teacher_steps: int
    steps: int
    eval_tokens: int


WHOLE = Budget(1_200, 768, 8_192)


class Languages:
    """A folder of models and mixtures of one seed; each is made where it is not there yet."""

    def __init__(self, folder: Path, texts: Mapping[str, Path], seed: int, budget: Budget, run: Run) -> None:
        self.folder, self.texts, self.seed, self.budget, self.run = folder, texts, seed, budget, run

    def teacher(self) -> None:
        """Teacher, and the student as it begins; both have the tokenizer of all languages."""
        teacher, student = self.folder / "teacher", self.folder / "student"
        if is_there(teacher) and is_there(student):
            return
        fit = {
            name: documents_of_split(read_documents([str(path)], root=path.parent, where=name), "fit")
            for name, path in self.texts.items()
        }
        tokenizer = byte_level_bpe(
            (text_of(document) for documents in fit.values() for document in documents), TEACHER["vocab_size"]
        )
        if not is_there(teacher):
            model = new_model(TEACHER, self.seed)
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING)
            of_each = [training_sequences(tokenizer, documents, _TRAINING) for documents in fit.values()]
            fewest = min(len(sequences) for sequences in of_each)
            sequences = [sequence for each in of_each for sequence in each[:fewest]]
            with staging(teacher, f"demo teacher {self.seed}", "model") as stage:
                training = _TRAINING.with_(steps=self.budget.teacher_steps, seed=self.seed)
                train_on_text(model, sequences, training, run=self.run.about("teacher"))
                with without_bars(), library_writes(stage.folder) as folder:
                    model.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
        if not is_there(student):
            made = staging(student, f"demo student {self.seed}", "model")
            with made as stage, without_bars(), library_writes(stage.folder) as folder:
                model = new_model(STUDENT, self.seed)
                torch.nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING)
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)

    def student(
        self,
        name: str,
        language: str,
        steps: int,
        *,
        of: str = "student",
        what: What = "full",
        settings: DistillSettings = WITH_TEACHER,
    ) -> Path:
        """A student of the teacher, distilled on one language."""
        training = _TRAINING.with_(steps=steps, seed=1000 * self.seed + len(name))
        teaching = Teaching(self.folder / "teacher", settings, None)
        return self._taught(name, of, [self.texts[language]], train=what, training=training, teaching=teaching)

    def session(self, name: str, mix: Mix | None, texts: Mapping[str, Path], settings: DistillSettings = WITH_TEACHER) -> Path:
        """A student for all languages that reads some texts in one session."""
        return self._together(name, mix, texts, settings, self.budget.steps)

    def half(self) -> Path:
        """A student for all languages that has read half as much."""
        return self._together("half", "equal", self.texts, WITH_TEACHER, self.budget.steps // 2)

    def mixture(self, name: str, base: str, experts: Mapping[str, str], mixture: dict[str, Any]) -> Checkpoint:
        """A mixture of models of this folder, one per language."""
        recipe = {
            "base_model": f"./{base}",
            "experts": [
                {"name": language, "model": f"./{model}", "text": f"../text/{self.texts[language].name}"}
                for language, model in experts.items()
            ],
            "mixture": mixture,
        }
        write_file(self.folder / f"{name}.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())
        out = self.folder / name
        if is_there(out):
            return open_checkpoint(out)
        return build(make_plan(parse_recipe(recipe, where=name), self.folder), out, run=self.run.about(name))

    def joint(self, name: str, common: Mapping[str, Any], router: dict[str, Any]) -> Checkpoint:
        """Four decoders over one embedding and head, from the student as it begins, trained jointly."""
        mixture = {"modules": "decoder", "top_k": 1, "router": router, **common}
        start = self.mixture(f"{name}-start", "student", dict.fromkeys(TEXTS, "student"), mixture)
        if is_there(self.folder / name):
            return open_checkpoint(self.folder / name)
        settings = checked_settings(
            {
                "regime": "joint",
                "losses": {"lm": 0.5, "forward_kl": 0.5},
                "temperature": 2.0,
                "teacher": str(self.folder / "teacher"),
                "steps": self.budget.steps,
                "batch_tokens": _TRAINING.batch_tokens,
                "weight_decay": _TRAINING.weight_decay,
                "sequence_length": _TRAINING.sequence_length,
                "backbone_learning_rate": _TRAINING.learning_rate,
                "warmup": _TRAINING.warmup,
                "select_tokens": 2_048,
                "patience": 99,
                "seed": self.seed,
            },
            TrainSettings,
            where=name,
        )
        train_mixture(start, settings, out=self.folder / name, evaluate_tokens=None, run=self.run.about(name))
        return open_checkpoint(self.folder / name)

    def table(self, checkpoint: Checkpoint, known: Results | None = None) -> Results:
        """What it is worth on every language."""
        named = self.run.about(checkpoint.folder.name)
        return evaluate(checkpoint, tokens_per_domain=self.budget.eval_tokens, known=known, run=named)

    def _together(self, name: str, mix: Mix | None, texts: Mapping[str, Path], settings: DistillSettings, steps: int) -> Path:
        training, teaching = (
            _TRAINING.with_(steps=steps, seed=1000 * self.seed),
            Teaching(self.folder / "teacher", settings, mix),
        )
        return self._taught(name, "student", texts.values(), train="full", training=training, teaching=teaching)

    def _taught(self, name: str, of: str, texts: Iterable[Path], **asked: Any) -> Path:
        """The student of a name: the one that is there, or a new one."""
        out = self.folder / name
        if not is_there(out):
            run = self.run.about(name)
            specialize(self.folder / of, out, [str(path) for path in texts], root=self.folder, run=run, **asked)
        return out


def whole_models(router: dict[str, Any] | None = None) -> dict[str, Any]:
    """One whole model per text."""
    return {"modules": "all", "top_k": 1, "router": router or LEXICAL}


def ffn_specialists(made: Languages, top_k: int = 1) -> Checkpoint:
    """Half of the tokens for a student of all languages, half for the FFNs of one specialist each."""
    made.half()
    for language in TEXTS:
        made.student(f"{language}-ffn", language, made.budget.steps // 8, of="half", what="mlp")
    router = {"fit": "lexical"}
    name = "ffn" if top_k == 1 else f"ffn-top-{top_k}"
    return made.mixture(name, "half", {each: f"{each}-ffn" for each in TEXTS}, {"top_k": top_k, "router": router})
