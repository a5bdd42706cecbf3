"""Code that comes with a model or that its config.json names: it runs only if the user allows it."""

from __future__ import annotations

from modekit.errors import SourceError
from modekit.files.typed import entries
from modekit.run import Run
from modekit.sources.config import OF_A_MIXTURE, Config

_CODE = frozenset(
    {
        "auto_map",
        "fusion_config",
        "kernel_config",
        "use_kernel",
        "use_kernels",
        # other files than those that modekit checks
        "configuration_files",
        "transformers_weights",
    }
)
"""Keys by which a config makes transformers import, download or read something else, wherever in the config they stand."""
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""What follows underscores in the names of keys that may name a repository of compiled code; those without a slash do not."""


def check_no_code(config: Config, *, where: str, run: Run) -> None:
    """Raise SourceError when a config brings Python of its own, or names other code or files, and the user did not accept it.

    For every config that reaches transformers: those of models, and of a mixture itself.
    """
    if run.trust_remote_code:
        return
    for key, value in entries(config):
        if key == "auto_map" and value and config.get("model_type") == "modekit":
            raise SourceError("this is a mixture, not a model that fine-tunes descend from", where=where, remedy=OF_A_MIXTURE)
        if key == "auto_map" and value:
            raise SourceError(
                "the model brings code of its own (auto_map in config.json)",
                where=where,
                found=value,
                remedy="check that the weights follow the named family, then pass --trust-remote-code",
            )
        said = list(value.values()) if isinstance(value, dict) else [value]  # of several parts of the model, or of all of it
        words = all(each is None or (isinstance(each, str) and "/" not in each) for each in said)
        named = key.lstrip("_").removesuffix("_internal") in _IMPLEMENTATIONS and not words
        if named or (key in _CODE and value not in (None, False)):
            raise SourceError(
                f"config.json makes transformers use other code or files ({key[:64]})",
                where=where,
                found=value,
                remedy="remove the setting from config.json, or pass --trust-remote-code if you trust what it names",
            )
