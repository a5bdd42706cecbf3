"""Builds of four experts and their base in both forms, beside what the planner says: size.md.

    python benchmarks/size.py BASE TEXT FOLDER [--shape 1B]

BASE is SmolLM2-135M, TEXT a folder with law.jsonl, medicine.jsonl, french.jsonl, german.jsonl and general.jsonl.
The experts are random: LoRA adapters of rank 16 on all linear parts, and BASE with noise on every weight.
`--shape` puts random numbers of another model of scripts/size_table.py in BASE's place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

import modekit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import size_table

EXPERTS = ("law", "medicine", "french", "german")


def main() -> None:
    """Make the models, build each mixture in a process of its own, print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=[each.name for each in size_table.MODELS], help="random numbers in this shape")
    parser.add_argument("--kinds", nargs="+", default=["adapter", "model"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    base = options.folder / "base"
    make_base(base, options.base, options.shape)
    print(
        "| experts | form | on disk, GB | planned | peak memory, GB | planned | seconds | of processor |\n" + "|---" * 8 + "|"
    )
    for kind in options.kinds:
        for name in EXPERTS:
            make_expert(options.folder / f"{name}-{kind}", base, kind)
        for form in ("plain", "modekit"):
            print(row(options.folder, options.text, kind, form), flush=True)


def make_base(folder: Path, given: Path, shape: str | None) -> None:
    """A copy of BASE, or random numbers in another shape with its tokenizer."""
    if folder.exists():
        return
    shutil.copytree(given, folder)
    if shape is None:
        return
    model = next(each for each in size_table.MODELS if each.name == shape)
    (folder / "model.safetensors").unlink()
    size_table.write_config(folder, model)
    numbers: dict[str, torch.Tensor] = {}
    for name, size in size_table.tensors_of(model).items():
        ones = torch.ones(size, dtype=torch.bfloat16)
        numbers[name] = ones if "norm" in name else torch.randn(size, dtype=torch.bfloat16) * 0.02
    save_file(numbers, folder / "model.safetensors", metadata={"format": "pt"})


def make_expert(folder: Path, base: Path, kind: str) -> None:
    """An adapter or a full model of random changes."""
    if folder.exists():
        return
    numbers = load_file(base / "model.safetensors")
    if kind == "model":
        shutil.copytree(base, folder)
        changed: dict[str, torch.Tensor] = {}
        for name, value in numbers.items():
            changed[name] = value + 0.01 * value.std() * torch.randn_like(value)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return
    folder.mkdir()
    size_table.write_adapter_config(folder)
    factors = {}
    for name, value in numbers.items():
        part = name.removesuffix(".weight")
        if not part.endswith("_proj"):
            continue
        outputs, inputs = value.shape
        down, up = (f"base_model.model.{part}.lora_{letter}.weight" for letter in "AB")
        factors[down] = torch.randn(size_table.RANK, inputs) / inputs**0.5
        factors[up] = torch.randn(outputs, size_table.RANK) * 0.02
    save_file(factors, folder / "adapter_model.safetensors")


def row(folder: Path, text: Path, kind: str, form: str) -> str:
    """Build one, and say what it took; the recipe is what `modekit mix` writes."""
    out, path = folder / f"{kind}-{form}", folder / f"{kind}-{form}.yaml"
    experts = [{"name": name, kind: str(folder / f"{name}-{kind}"), "text": str(text / f"{name}.jsonl")} for name in EXPERTS]
    general = {"name": "general", "model": "base", "text": str(text / "general.jsonl")}
    recipe = {
        "base_model": str(folder / "base"),
        "experts": [*experts, general],
        "output": {"format": form},
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    plan = modekit.plan(recipe)
    planned = size_table.memory_to_build(plan)
    start = time.perf_counter()
    command = [sys.executable, "-m", "modekit", "build", str(path), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"the build of {path} ended with {status}")
    files = [file for file in out.rglob("*.safetensors") if "router" not in file.parts]
    written = sum(file.stat().st_size for file in files)
    shutil.rmtree(out)
    sizes = (written, plan.bytes_written, used.ru_maxrss * 1024, planned)
    shown = " | ".join(f"{each / 1e9:.3f}" for each in sizes)
    return f"| {kind}s | {form} | {shown} | {seconds:.0f} | {used.ru_utime + used.ru_stime:.0f} |"


if __name__ == "__main__":
    main()
