"""Whether an adapter's own folder still holds what a mixture was built from, so that it can be given back as it came.

The weights are known by the blake3 in modekit.json, adapter_config.json by the digest of its settings there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import changed_settings
from modekit.errors import ModekitError
from modekit.planning.mixture_config import Place
from modekit.run import Run
from modekit.sources.adapter import AdapterSource, open_adapter
from modekit.sources.adapter_config import CONFIG_FILE
from modekit.sources.contents import blake3_of
from modekit.sources.model import open_source

TRAINED = "it was trained on in the mixture (modekit train)"


@dataclass(frozen=True)
class OwnFiles:
    """An adapter's folder and its config as they are now; `problem` says why they are not what the mixture was built from."""

    folder: Path
    config: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None


def places_of(checkpoint: Checkpoint, expert: int) -> dict[str, Place]:
    """Module -> its place, where an expert has something of its own."""
    return {module: place for module, place in checkpoint.shape.mixture.places.items() if place.has(expert)}


def is_trained(checkpoint: Checkpoint, expert: int) -> bool:
    """Whether `modekit train` moved a part of an expert since the build."""
    for module, place in places_of(checkpoint, expert).items():
        own = f"{module}.experts.{place.own.index(expert)}." if expert in place.own else f"{module}.lora_"
        if any(name.startswith(own) for name in checkpoint.record.trained):
            return True
    return False


def own_files(checkpoint: Checkpoint, expert: int) -> OwnFiles:
    """Look at the folder of an adapter expert. Reads its weights once; raises nothing, a problem is part of the answer."""
    record = checkpoint.record.sources[checkpoint.record.expert_sources[expert]]
    folder = (checkpoint.folder / record.folder).resolve()
    try:
        for name, expected in record.files.items():
            file = folder / name
            if not file.is_file():
                return OwnFiles(folder, problem=f"its own folder is gone ({folder})")
            if file.stat().st_size != expected.size or blake3_of(file) != expected.blake3:
                return OwnFiles(folder, problem=f"{name} in its own folder has changed since the build")
        source = _opened(checkpoint, expert, folder)
        return OwnFiles(folder, source.config, _problem(checkpoint, expert, source))
    except ModekitError as error:
        return OwnFiles(folder, problem=f"its own folder cannot be read any more ({error.what})")


def _opened(checkpoint: Checkpoint, expert: int, folder: Path) -> AdapterSource:
    recipe, base = checkpoint.record.recipe, checkpoint.record.sources[0]
    # Headers alone are read: no code of the model's runs, whatever it brings.
    model = open_source(base.label, base.spec, (checkpoint.folder / base.folder).resolve(), run=Run(trust_remote_code=True))
    return open_adapter(f"experts[{expert}]", str(recipe.experts[expert].adapter), folder, model)


def _problem(checkpoint: Checkpoint, expert: int, source: AdapterSource) -> str | None:
    if is_trained(checkpoint, expert):
        return TRAINED
    places = places_of(checkpoint, expert)
    changed = {*source.changes, *source.bias_changes, *source.replaced}
    outside = [name for name in changed if not any(name.startswith(f"{module}.") for module in places)]
    if outside:
        return f"only a part of it is mixed: {len(outside)} of the {len(changed)} tensors that it changes are not"
    record = checkpoint.record.sources[checkpoint.record.expert_sources[expert]]
    if not record.config:
        return "the mixture was built by a version of modekit that did not record adapter_config.json"
    return f"{CONFIG_FILE} in its own folder has changed since the build" if changed_settings(record, source.folder) else None
