"""The config of a modekit checkpoint: the dense family's own config, and what is mixed where under the key `modekit`.

    modekit.dense_type   model_type of the dense family, whose installed classes are used
    modekit.variant      of a family with several forms, which; a word for modekit alone
    modekit.experts      names in recipe order
    modekit.routing      how a router turns what it reads into weights (see modekit_router.py)
    modekit.places       module name -> what the experts have there (see modekit_mixed.py)

This file and those beside it are copied into every checkpoint, so that it opens without modekit, too.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_FAMILY = "ModekitConfig_"


class ModekitConfig(PreTrainedConfig):  # type: ignore[misc]
    """Opens as the config class of the checkpoint's own family, with `model_type` modekit."""

    model_type = "modekit"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's config. Raises ValueError when the key `modekit` is missing."""
        try:
            dense_type = config_dict["modekit"]["dense_type"]
        except (KeyError, TypeError, AttributeError):
            raise ValueError("config.json says model_type modekit but does not say what is mixed (key 'modekit')") from None
        config_class = family_config(dense_type)
        if "derived" in config_dict["modekit"]:
            _register(config_class)
        return config_class.from_dict(config_dict, **kwargs)


@functools.cache
def family_config(dense_type: str) -> type[PreTrainedConfig]:
    """The dense family's config class under model_type modekit, known to the Auto classes."""
    from transformers import AutoModelForSeq2SeqLM  # late: a config alone needs no torch

    members = {
        "__module__": __name__,
        "__qualname__": f"{_FAMILY}{dense_type}",
        "_auto_class": "AutoConfig",
        "model_type": ModekitConfig.model_type,
        "base_model_tp_plan": None,  # it would split some modules over devices and not the mixed ones that go with them
    }
    config_class: type[PreTrainedConfig] = type("ModekitConfig", (CONFIG_MAPPING[dense_type],), members)
    if getattr(config_class, "is_encoder_decoder", False):
        from .modekit_pairs import ModekitForSeq2SeqLM

        AutoModelForSeq2SeqLM.register(config_class, ModekitForSeq2SeqLM, exist_ok=True)
    else:
        _register(config_class)
    return config_class


def _register(config_class: type[PreTrainedConfig]) -> None:
    """Let the Auto classes of decoders know a family's config."""
    from transformers import AutoModel, AutoModelForCausalLM

    from .modeling_modekit import ModekitForCausalLM, ModekitModel

    AutoModel.register(config_class, ModekitModel, exist_ok=True)
    AutoModelForCausalLM.register(config_class, ModekitForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    """The class of a family, which pickle looks for under its qualified name."""
    if name.startswith(_FAMILY) and name.removeprefix(_FAMILY) in CONFIG_MAPPING:
        return family_config(name.removeprefix(_FAMILY))
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
