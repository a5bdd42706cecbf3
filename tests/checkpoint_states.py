"""The tensors of a workshop's models and of what is built of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conftest import DOMAINS, Workshop

State = dict[str, torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM = {"router": {"fit": "random"}}


def states_of(workshop: Workshop) -> tuple[State, list[State]]:
    """Tensors of the base and of each expert."""
    base = load_file(workshop.root / workshop.recipe["base_model"] / "model.safetensors")
    folders = [workshop.root / expert["model"] for expert in workshop.recipe["experts"]]
    return base, [load_file(folder / "model.safetensors") for folder in folders]


def result_of(folder: Path) -> State:
    """All tensors of a checkpoint but the gates, from all of its shards."""
    tensors: State = {}
    for file in sorted(folder.glob("model-*-0*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def store(workshop: Workshop, dtype: torch.dtype) -> Workshop:
    """The workshop with its models in another dtype and with values that are awkward to round."""
    awkward = torch.tensor(
        [
            1 + 2**-8,
            1 + 3 * 2**-8,
            1 + 2**-11,
            1 + 3 * 2**-11,
            -(1 + 2**-8 + 2**-20),
            0.0,
            -0.0,
            2**-14,
            2**-24,
            2**-25,
            3 * 2**-25,
            -(2**-26),
            1e-8,
            65_504.0,
            65_519.0,
            -1e-30,
            2**-126,
            1e-40,
        ],
        dtype=torch.float64,
    )
    names = ["base", *DOMAINS]
    for name in names:
        source = Path(workshop.recipe["base_model"]).parent / name
        shutil.copytree(source, workshop.root / name)
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
        for tensor in tensors.values():
            fitting = awkward.to(dtype).where(awkward.to(dtype).abs() < 65_520, 1)  # what float16 can still hold
            tensor.view(-1)[: len(awkward)] = fitting
        save_file(tensors, workshop.root / name / "model.safetensors", metadata={"format": "pt"})
    workshop.recipe["base_model"] = "./base"
    for expert in workshop.recipe["experts"]:
        expert["model"] = f"./{expert['name']}"
    return workshop
