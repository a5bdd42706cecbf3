"""Resident memory of a build and of its proof, pages of files included: the same for models of any number of layers.

`python -m pytest -s tests/building/test_memory.py` prints the table of benchmarks/speed.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from modekit.building.preview import memory_of
from modekit.files.staging import safetensors_header
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from refusal import run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc"),
]

MOST = 400e6
"""Bytes that a process may hold at its peak."""
ALIKE = 30e6
"""Bytes by which a process for three times the layers may differ."""

Shapes = dict[str, tuple[int, ...]]
RANDOM = {"method": "routing", "top_k": 2, "router": {"fit": "random"}}
FULL = [{"name": name, "model": f"./{name}"} for name in ("one", "two")]
ADAPTERS = [{"name": name, "adapter": f"./{name}"} for name in ("lora", "dora")]
FIRST = {**RANDOM, "layers": [0]}  # whatever is not mixed is backbone, and merged
WIDE, NARROW, SMALL = (512, 32_768), (1024, 4096), (256, 8192)

CASES: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "copied": (WIDE, (1, 3), {"experts": FULL, "mixture": RANDOM}),
    "cast": (WIDE, (1, 3), {"experts": FULL, "mixture": RANDOM, "output": {"dtype": "float32"}}),
    "average": (WIDE, (2, 4), {"experts": FULL, "mixture": {**FIRST, "backbone": "average"}}),
    "ties": (NARROW, (2, 4), {"experts": FULL, "mixture": {**FIRST, "backbone": "ties"}}),
    "folded": (WIDE, (1, 3), {"experts": ADAPTERS, "mixture": RANDOM, "output": {"format": "plain"}}),
    "as lora": (NARROW, (1, 3), {"experts": [{**each, "as": "lora", "rank": 8} for each in FULL], "mixture": RANDOM}),
    "as lora, exactly": (SMALL, (1, 3), {"experts": [{**each, "as": "lora", "rank": 8} for each in FULL], "mixture": RANDOM}),
}
"""What is made of the sources -> hidden size and width of an FFN, two numbers of layers, the recipe."""


@pytest.mark.parametrize("case", CASES)
def test_three_times_the_layers_take_the_same_memory(case: str, tmp_path: Path) -> None:
    sizes, layers, recipe = CASES[case]
    few, many = (measured(tmp_path / str(count), sizes, count, recipe) for count in layers)
    for each in (few, many):
        print(f"\n| {case} | {each.read / 1e9:.2f} GB | {each.build / 1e6:.0f} MB | {each.verify / 1e6:.0f} MB |", end="")
        assert max(each.build, each.verify) <= min(MOST, each.planned)
    assert abs(many.build - few.build) <= ALIKE and abs(many.verify - few.verify) <= ALIKE


@dataclass(frozen=True)
class Measured:
    """Bytes of the sources, and the most that a build and then a proof held; `planned` is what the plan said of it."""

    read: int
    build: int
    verify: int
    planned: int


def measured(root: Path, sizes: tuple[int, int], layers: int, recipe: dict[str, Any]) -> Measured:
    """Make models, build, verify, and remove all of it."""
    root.mkdir()
    make_model(root / "base", sizes, layers, seed=0)
    for seed, expert in enumerate(recipe["experts"], 1):
        make = make_adapter if "adapter" in expert else make_model
        make(root / expert["name"], sizes, layers, seed)
    (root / "recipe.yaml").write_text(yaml.safe_dump({"base_model": "./base", **recipe}))
    read = sum(file.stat().st_size for file in root.rglob("*.safetensors"))
    planned = memory_of(make_plan(load_recipe(root / "recipe.yaml"), root))["build"]
    found = Measured(
        read, peak("build", root / "recipe.yaml", root / "OUT"), peak("verify", root / "OUT", "--no-reload"), planned
    )
    shutil.rmtree(root)
    return found


COMMAND = """
import sys
from modekit.cli.shell import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*args: object) -> int:
    """Most bytes that a command holds in a process of its own. What `wait4` says of it starts with what this one holds."""
    ran = run_python(COMMAND, *args)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return 1024 * int(ran.stdout.rpartition("peak ")[2])


def make_model(folder: Path, sizes: tuple[int, int], layers: int, seed: int) -> None:
    """A random Llama in bfloat16."""
    hidden, width = sizes
    folder.mkdir()
    sizes_of = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes_of, tie_word_embeddings=True, dtype="bfloat16"))
    model.config.save_pretrained(folder)
    fill(folder / "model.safetensors", {name: tuple(each.shape) for name, each in model.named_parameters()}, seed)


def make_adapter(folder: Path, sizes: tuple[int, int], layers: int, seed: int, rank: int = 16) -> None:
    """Random LoRA of every FFN, or DoRA where the folder is called so."""
    folder.mkdir()
    dora = folder.name == "dora"
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_dora": dora,
        "base_model_name_or_path": "base",
        "target_modules": [f"{name}_proj" for name in ffn(sizes)],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes: Shapes = {}
    for layer in range(layers):
        for name, (rows, columns) in ffn(sizes).items():
            prefix = f"base_model.model.model.layers.{layer}.mlp.{name}_proj."
            shapes |= {f"{prefix}lora_A.weight": (rank, columns), f"{prefix}lora_B.weight": (rows, rank)}
            shapes |= {f"{prefix}lora_magnitude_vector": (rows,)} if dora else {}
    fill(folder / "adapter_model.safetensors", shapes, seed)


def ffn(sizes: tuple[int, int]) -> Shapes:
    hidden, width = sizes
    return {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}


def fill(file: Path, shapes: Shapes, seed: int) -> None:
    """Tensors of random bfloat16, the same few megabytes again and again."""
    noise = np.random.default_rng(seed).standard_normal(2**22, np.float32).view(np.uint32) >> 16
    block = noise.astype(np.uint16).tobytes()
    entries = [(name, "BF16", shape, 2 * int(np.prod(shape))) for name, shape in shapes.items()]
    with file.open("wb") as stream:
        stream.write(safetensors_header(entries))
        left = sum(entry[3] for entry in entries)
        while left:
            left -= stream.write(block[: min(left, len(block))])
