"""What every key of a recipe means: for the JSON schema that editors check against, and for the help of commands.

The schema beside this file (`recipe.schema.json`) is written by `python -m modekit.recipes` and kept in step by a test.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from modekit.recipes.fits import FITS, OPEN
from modekit.recipes.recipe import Recipe

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")

_MEANINGS = {
    "Recipe.base_model": "Folder or hub id of the model that all experts descend from.",
    "Recipe.revision": "Hub revision of the base model.",
    "Recipe.experts": "In full, or in short (recipes/paths.py): a path, a hub id, or base; NAME= before it.",
    "Recipe.eval": "Text per domain to evaluate on; default: the held-out part of the experts' text.",
    "Expert.name": "Name of the expert and of its domain.",
    "Expert.model": "Folder, hub id, or the word 'base'.",
    "Expert.adapter": "Folder or hub id of a PEFT adapter of the base.",
    "Expert.as": "lora: keep only a low-rank part of a full model.",
    "Expert.rank": "Rank of that part (as: lora only; default 16).",
    "Expert.bits": "Keep each weight's difference from the base in so many bits per number (full models).",
    "Expert.layers": "Layers where it has its own parts; elsewhere it is the base.",
    "Expert.revision": "Hub revision (branch, tag or commit).",
    "Expert.text": "Text of the domain: .txt, .jsonl, .parquet, a folder, or a hub data set; self: the expert writes some.",
    "Expert.prompts": "Short texts of the domain, used like `text` for the fit.",
    "Expert.negative_prompts": "Texts this expert should not take; centroid fit only.",
    "Expert.labels": "Other names under which texts of the domain are known.",
    "Output.format": "plain: an architecture other tools know. modekit: modekit's own. auto: plain where it holds the experts.",
    "Output.dtype": "source keeps the base model's dtype.",
    "Output.shard_size": "Largest shard, in bytes or like '5GB'.",
    "Output.channels": "Plain, fit: lexical: channels besides the base's; default the fewest, by 32. 256 suits K-quants.",
    "Output.carry": "Plain, lexical. ffn: FFNs of experts alone. all: attention, head, embedding, too. Default: as they need.",
    "Output.rank": "Plain, lexical: channels for attention's output, and for its input; default: what exact needs, or 64.",
    "Mixture.method": "linear: fixed weights; gating: all experts; routing: top_k of them.",
    "Mixture.top_k": "Experts per token (routing only; default 2).",
    "Mixture.top_p": "In place of top_k: the fewest experts whose probabilities reach it (routing only).",
    "Mixture.groups": "In place of top_k: groups of experts, in order; the best of each is taken (routing only).",
    "Mixture.threshold": "In place of top_k: all whose probability reaches it, or the best; one, or by name (routing only).",
    "Mixture.modules": "What is mixed. auto: FFN, what adapters change. decoder: all but embedding and head. all: everything.",
    "Mixture.layers": "Layers that are mixed, such as [0, '4-11']; with an encoder [encoder, decoder.4-5]; default all.",
    "Mixture.always_on": "An expert, or the base, that takes part in every token.",
    "Mixture.weights": "Relative weight per expert (linear only).",
    "Mixture.backbone": "Where everything that is not an expert or a router comes from.",
    "Router.tokens_per_domain": "Tokens of each domain that the fit reads.",
    "Router.sequence_length": "Longest piece of a document, in tokens.",
    "Router.temperature": "Divides the router's logits; folded into the gate.",
    "Router.l2": "Regularisation, relative to the mean square of the router's input.",
    "Router.compute_dtype": "Precision of the forward passes of the fit.",
    "Router.keep_tokens": "Router inputs kept per domain and layer, for later re-fits.",
    "Router.seed": "Seed of a random router, of training one, and of text that experts write.",
    "Router.granularity": "What the gate reads: the token, a causal average of the text so far, or the first tokens.",
    "Router.decay": "Decays of averages; 1: the mean so far, 0: the token. Lexical: default 0.91 with chats, else 0.98.",
    "Router.prefix": "Sequence: tokens after which the decision stays (default 64).",
    "Router.dimensions": "Cosine: dimensions that what the router reads is projected to (default: one per expert).",
    "Router.per": "One router for attention and one for the FFN of each layer, one for the model, ...",
    "Router.jitter": "Random scaling of what the gate reads, in training only.",
    "Router.noise": "Random addition to the logits, in training only.",
    "Router.buckets": "Lexical: rows of a table that n-grams are hashed into.",
    "Router.orders": "Lexical: n-grams that have a table each; [1], the tokens alone, is what plain checkpoints carry.",
    "Router.chat": "Fit inside the chat template, too, on questions from the text; default: if the base has one.",
    "AlwaysOn.expert": "Name of an expert, or base.",
    "AlwaysOn.weight": "Its share; without one, an expert of the list is always chosen and weighted by its logit.",
    "AlwaysOn.apart": "The base reads the text by itself; its last hidden state is averaged with the experts' (expert: base).",
    "BackboneMerge.scale": "Strength of task_arithmetic and ties (lambda).",
    "BackboneMerge.density": "Share of each difference that ties keeps.",
}
"""Class.key -> meaning. What a `fit` is says its row (fits.py)."""


def meaning_of(kind: type[BaseModel], key: str) -> str:
    """What a key of a part of a recipe means; empty where nothing needs to be said."""
    return _MEANINGS.get(f"{kind.__name__}.{key}", "")


def schema_text() -> str:
    """The recipe's JSON schema as it is shipped."""
    schema = Recipe.model_json_schema()
    parts = {**schema["$defs"], Recipe.__name__: schema}
    for name, meaning in _MEANINGS.items():
        kind, key = name.split(".")
        parts[kind]["properties"][key]["description"] = meaning
    rows = (OPEN, *FITS.values())
    about = "; ".join(f"{row.name}: {row.about}" for row in rows)
    parts["Router"]["properties"]["fit"] |= {
        "enum": [row.name for row in rows],
        "description": f"How the gate is set. {about}.",
    }
    said = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(said, indent=2, sort_keys=True) + "\n"
