"""What every key of a recipe means: for the JSON schema that editors check against, and for the help of commands.

The schema beside this file (`recipe.schema.json`) is written by `python -m modekit.recipes` and kept in step by a test.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from modekit.recipes.recipe import Recipe

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")

_MEANINGS: dict[str, dict[str, str]] = {
    "Recipe": {
        "base_model": "Folder or hub id of the model that all experts descend from.",
        "revision": "Hub revision of the base model.",
        "experts": "In full, or in short (recipes/paths.py): a path, a hub id, or base; NAME= before it.",
        "eval": "Text per domain to evaluate on; default: the held-out part of the experts' text.",
    },
    "Expert": {
        "name": "Name of the expert and of its domain.",
        "model": "Folder, hub id, or the word 'base'.",
        "adapter": "Folder or hub id of a PEFT adapter of the base.",
        "as": "lora: keep only a low-rank part of a full model.",
        "rank": "Rank of that part (as: lora only; default 16).",
        "bits": "Keep each weight's difference from the base in so many bits per number (full models).",
        "layers": "Layers where it has its own parts; elsewhere it is the base.",
        "revision": "Hub revision (branch, tag or commit).",
        "text": "Text of the domain: .txt, .jsonl, .parquet, a folder, or a hub data set; self: the expert writes some.",
        "prompts": "Short texts of the domain, used like `text` for the fit.",
        "negative_prompts": "Texts this expert should not take; centroid fit only.",
        "labels": "Other names under which texts of the domain are known.",
    },
    "Output": {
        "format": "native: an architecture other tools know. modekit: everything else. auto: native where it is exact.",
        "dtype": "source keeps the base model's dtype.",
        "shard_size": "Largest shard, in bytes or like '5GB'.",
        "channels": "Native, fit: lexical: channels besides the base's; default the fewest, by 32. 256 suits K-quants.",
        "carry": (
            "Native, fit: lexical: what of the experts to carry. ffn: their FFNs alone. all: attention, head and embedding, "
            "too. Default: all if an adapter changes more than FFNs."
        ),
        "rank": (
            "Channels for attention's output, and for its input, head and embedding; default: as many as exact needs where "
            "those are few, else 64."
        ),
    },
    "Mixture": {
        "method": "linear: fixed weights; gating: all experts; routing: top_k of them.",
        "top_k": "Experts per token (routing only; default 2).",
        "top_p": "In place of top_k: the fewest experts whose probabilities reach it (routing only).",
        "groups": "In place of top_k: groups of experts, in order; the best of each is taken (routing only).",
        "threshold": (
            "In place of top_k: every expert whose probability reaches it, or the best where none does; one for all, or by "
            "name (routing only)."
        ),
        "modules": (
            "What experts have of their own; auto: the FFN, and what adapters change. decoder: everything between the "
            "embedding and the head, which they share. all: everything."
        ),
        "layers": "Layers that are mixed, such as [0, '4-11']; of a model that has both [encoder, decoder.4-5]; default all.",
        "always_on": "An expert, or the base, that takes part in every token.",
        "weights": "Relative weight per expert (linear only).",
        "backbone": "Where everything that is not an expert or a router comes from.",
    },
    "Router": {
        "tokens_per_domain": "Tokens of each domain that the fit reads.",
        "sequence_length": "Longest piece of a document, in tokens.",
        "temperature": "Divides the router's logits; folded into the gate.",
        "l2": "Regularisation, relative to the mean square of the router's input.",
        "compute_dtype": "Precision of the forward passes of the fit.",
        "keep_tokens": "Router inputs kept per domain and layer, for later re-fits.",
        "seed": "Seed of a random or hash router, of training one, and of text that experts write.",
        "granularity": "What the gate reads: the token, a causal average of the text so far, or the first tokens.",
        "decay": "Decays of averages; 1: the mean so far, 0: the token. Lexical: default 0.91 with chats, else 0.98.",
        "prefix": "Sequence: tokens after which the decision stays (default 64).",
        "dimensions": "Cosine: dimensions that what the router reads is projected to (default: one per expert).",
        "per": "One router for attention and one for the FFN of each layer, one for the model, ...",
        "jitter": "Random scaling of what the gate reads, in training only.",
        "noise": "Random addition to the logits, in training only.",
        "buckets": "Lexical: rows of a table that n-grams are hashed into.",
        "orders": "Lexical: n-grams that have a table each; [1], the tokens alone, is what native architectures carry.",
        "chat": "Fit inside the chat template, too, on short questions cut from the text; default: if the base has one.",
    },
    "AlwaysOn": {
        "expert": "Name of an expert, or base.",
        "weight": "Its share; without one, an expert of the list is always chosen and weighted by its logit.",
        "apart": (
            "The base reads the text through all of its own decoder, beside the chosen experts; the two last hidden states "
            "are averaged with this weight (the common expert of arXiv 2407.19610; takes expert: base)."
        ),
    },
    "BackboneMerge": {
        "scale": "Strength of task_arithmetic and ties (lambda).",
        "density": "Share of each difference that ties keeps.",
    },
}
"""Class -> key -> meaning. What `fit` means says the table of fits (fits.py)."""


def meaning_of(kind: type[BaseModel], key: str) -> str:
    """What a key of a part of a recipe means; empty where nothing needs to be said."""
    return _MEANINGS.get(kind.__name__, {}).get(key, "")


def schema_text() -> str:
    """The recipe's JSON schema as it is shipped."""
    schema = Recipe.model_json_schema()
    for name, meanings in _MEANINGS.items():
        properties = schema["properties"] if name == Recipe.__name__ else schema["$defs"][name]["properties"]
        for key, meaning in meanings.items():
            properties[key]["description"] = meaning
    said = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(said, indent=2, sort_keys=True) + "\n"
