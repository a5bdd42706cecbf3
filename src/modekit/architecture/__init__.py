"""The modekit architecture: mixtures that no native architecture can say, on the installed transformers classes.

The files beside this one import nothing of modekit but each other, and are copied into every checkpoint.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

CODE_FILES = tuple(sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py"))
_AUTO = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM open modekit checkpoints: now, or as soon as transformers is there.

    Importing transformers takes seconds that `modekit plan` does not have, so its import is awaited, not caused.
    """
    if _AUTO in sys.modules:
        _register_now(sys.modules[_AUTO])
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def _register_now(auto: ModuleType) -> None:
    from modekit.architecture.configuration_modekit import ModekitConfig

    auto.AutoConfig.register("modekit", ModekitConfig, exist_ok=True)


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Registers once the module of the Auto classes has been imported by whoever needs them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_now(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
