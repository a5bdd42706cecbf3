"""Small translation models for translation.py: tokenizers with a token per domain, Barts of any width, labels and how they are
drawn anew, fine-tunes and mixtures of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.experts.moving import What
from modekit.experts.specialize import specialize
from modekit.loaded.load import load_model, without_bars
from modekit.loaded.text_training import Training, train_on_text
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.document import Pair
from modekit.text.sequences import encode

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WIDTH, LAYERS, HEADS = 128, 2, 4
Mode = Literal["uniform", "others", "generic"]
"""What a label becomes when it is drawn anew: any domain's, another domain's, or none."""
Labelled = tuple[Pair, str | None]


@dataclass(frozen=True)
class Size:
    """Of one part of the study."""

    ffn: int
    positions: int
    dropout: float
    training: Training
    fine: Training
    adapter: Training


def token_of(domain: str) -> str:
    """The reserved token of a domain."""
    return f"<domain:{domain}>"


def word_tokenizer(words: Sequence[str], domains: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token per word."""
    special = [*SPECIAL, *map(token_of, domains)]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate([*special, *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(made, special)


def piece_tokenizer(texts: Iterable[str], vocabulary: int, domains: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level pieces of words."""
    special = [*SPECIAL, *map(token_of, domains)]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return _finished(made, special)


def _finished(made: Tokenizer, special: Sequence[str]) -> PreTrainedTokenizerFast:
    made.add_special_tokens(list(special))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(special[len(SPECIAL) :]),
    )


def new_model(tokenizer: PreTrainedTokenizerFast, size: Size, *, ffn: int, seed: int) -> BartForConditionalGeneration:
    """A Bart that has learned nothing."""
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        dropout=size.dropout,
        max_position_embeddings=size.positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        init_std=0.06,  # 0.7 / sqrt(d_model): with a Bart's own 0.02 so narrow a model stays at the frequencies of tokens
    )
    torch.manual_seed(seed)
    return BartForConditionalGeneration(config)


def count(model: torch.nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def match_width(tokenizer: PreTrainedTokenizerFast, size: Size, parameters: int) -> int:
    """The width of the FFN with which a model has so many parameters, within 1 %."""
    with torch.device("meta"):
        some, more = (count(new_model(tokenizer, size, ffn=ffn, seed=0)) for ffn in (1, 2))
    ffn = max(1, round((parameters - some) / (more - some)) + 1)
    found = some + (ffn - 1) * (more - some)
    if abs(found - parameters) > 0.01 * parameters:
        raise SystemExit(f"no width of the FFN gives {parameters} parameters: {ffn} gives {found}")
    return ffn


def tagged(pair: Pair, label: str | None) -> Pair:
    """With the token of a domain before the source, unless there is none."""
    return pair if label is None else Pair(f"{token_of(label)} {pair.source}", pair.target)


def labelled(pairs: Mapping[str, Sequence[Pair]], probability: float, mode: Mode, seed: int) -> list[Labelled]:
    """Pairs with their domains, drawn anew with some probability. Then every pair is there four times, each drawn by itself."""
    draw, domains = random.Random(f"labels {seed}"), list(pairs)
    found: list[Labelled] = []
    for domain, some in pairs.items():
        drawn = {
            "uniform": domains,
            "others": [each for each in domains if each != domain],
            "generic": [None],
        }[mode]
        for pair in some:
            for _ in range(4 if probability else 1):
                found.append((pair, draw.choice(drawn) if draw.random() < probability else domain))  # type: ignore[arg-type]
    return found


def with_generic(pairs: Sequence[Labelled], generic: Sequence[Pair], share: float) -> list[Labelled]:
    """With so large a share of text of no domain, which is repeated or cut for it."""
    wanted = round(len(pairs) * share / (1 - share))
    return [*pairs, *((generic[place % len(generic)], None) for place in range(wanted))]


class Maker:
    """Models of one seed, each made once and kept in a folder."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, size: Size, seed: int) -> None:
        self.folder, self.tokenizer, self.size, self.seed = folder, tokenizer, size, seed
        folder.mkdir(parents=True, exist_ok=True)

    def dense(
        self, name: str, pairs: Iterable[Pair], training: Training, *, ffn: int | None = None, of: str | None = None
    ) -> Path:
        """A model trained on pairs, from nothing or from another one."""
        out = self.folder / name
        if (out / "config.json").exists():
            return out
        model = (
            load_model(self.folder / of)
            if of
            else new_model(self.tokenizer, self.size, ffn=ffn or self.size.ffn, seed=self.seed)
        )
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        longest = training.sequence_length
        sequences = encode(self.tokenizer, pairs, max_tokens=training.max_tokens, sequence_length=longest)
        train_on_text(model, sequences, training.with_(seed=self.seed))
        with without_bars():
            model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        return out

    def specialists(self, group: str, base: str, texts: Mapping[str, Path], train: What = "mlp") -> dict[str, Path]:
        """A fine-tune per domain."""
        made = {}
        for place, (domain, text) in enumerate(texts.items()):
            made[domain] = self.folder / f"{group}-{domain}"
            training = self.size.adapter if train == "lora" else self.size.fine
            if not made[domain].exists():
                training = training.with_(seed=1000 * self.seed + place)
                specialize(self.folder / base, made[domain], [str(text)], root=text.parent, train=train, training=training)
        return made

    def mixture(
        self,
        name: str,
        base: str,
        experts: Mapping[str, Path],
        texts: Mapping[str, Path],
        unseen: Mapping[str, Path],
        mixture: Mapping[str, Any],
    ) -> Checkpoint:
        """Specialists, or adapters, under a router that is set by `texts`."""
        out = self.folder / name
        if out.exists():
            return open_checkpoint(out)

        def says(path: Path) -> str:
            return "base" if path.name == base else f"./{path.name}"

        recipe = {
            "base_model": f"./{base}",
            "experts": [
                {
                    "name": domain,
                    "adapter" if (path / "adapter_config.json").exists() else "model": says(path),
                    "text": str(texts[domain]),
                }
                for domain, path in experts.items()
            ],
            "mixture": {"method": "routing", **mixture},
            "eval": {domain: str(path) for domain, path in unseen.items()},
        }
        return build(make_plan(parse_recipe(recipe, where=name), self.folder), out)

    def texts(self, group: str, pairs: Mapping[str, Iterable[Pair]]) -> dict[str, Path]:
        """Files of pairs that fine-tunes read."""
        made = {}
        for domain, some in pairs.items():
            made[domain] = self.folder / f"{group}-{domain}.jsonl"
            records = ({"source": pair.source, "target": pair.target} for pair in some)
            made[domain].write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return made
