"""The base with one adapter that stands before the text: a mixture of that expert alone, in memory, on the base's weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from modekit.architecture.configuration_modekit import family_config
from modekit.architecture.modeling_modekit import family_classes
from modekit.planning.prefixes import entry_of, place_of_prefixes, prefix_tensors
from modekit.sources.adapter import AdapterSource
from modekit.sources.contents import OpenFiles
from modekit.sources.family import Family
from modekit.weights.numeric import to_float32
from modekit.weights.reading import Reading


def with_prefix(model: PreTrainedModel, adapter: AdapterSource, family: Family) -> PreTrainedModel:
    """A loaded base with the adapter's prefix, or prompt, before every text."""
    said = model.config.to_dict()
    dense_type: str = said["model_type"]
    places = [place_of_prefixes((adapter, adapter), family, layer) for layer in family.layers(said)]
    found = [place for place in places if place is not None]
    common = {"ranks": [0], "scales": [1.0], "own": [], "base": True, "router": found[0].module}
    entries: dict[str, Any] = {place.module: common | entry_of(place, first=place is found[0]) for place in found}
    entries[found[0].module] |= {"width": family.hidden(said), "rows": [1]}
    fixed = {"method": "linear", "weights": [1.0], "averages": [{"decay": None}], "top_k": None, "top_p": None}
    mixture = {"format": 1, "dense_type": dense_type, "experts": ["own"], "places": entries, "routing": fixed}
    kind: Any = family_config(dense_type)
    config = kind.from_dict({**said, "model_type": "modekit", "modekit": mixture})
    config._attn_implementation = model.config._attn_implementation
    made: PreTrainedModel = family_classes(kind)[1](config).to(model.dtype)
    made.load_state_dict(model.state_dict(), strict=False)
    with OpenFiles() as opened, torch.no_grad():
        for place in found:
            for tensor in prefix_tensors(place, lambda ref: ref.dtype, first=place is found[0]):
                own = torch.from_numpy(to_float32(tensor.made.numbers(Reading(opened, ()))[:]).reshape(tensor.shape))
                made.get_parameter(tensor.name).copy_(own)
    return made.eval()
