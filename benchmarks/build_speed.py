"""Build speed and memory against the floor: copying the same output bytes from the same memory-mapped files.

    python benchmarks/build_speed.py [--scale 2] [--rounds 5] [--folder DIR]

Makes a base and four bf16 experts of about 300M parameters (random values; the scale multiplies the layers), then in
turn, in alternating order, runs the copy and `modekit build` as processes of their own. Prints wall and CPU seconds
(user + system, children included) as medians with the range, their ratio round by round, and the most memory that each
held: resident (all of it, pages of files included) and anonymous (its own alone). `build` is with --no-fsync, as the copy
does not wait for the disk; `synced` waits. With --verify, `modekit verify
--no-reload` of the result runs in every round, too; with --other CHECKOUT the build of another checkout. `widened` writes the
shards of the same experts under a lexical router (its fit aside), `wide copy` copies as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modekit.files.write import safetensors_header

HERE = Path(__file__).parents[1]

COPY = """
import json, mmap, sys
pieces, out = json.load(open(sys.argv[1])), sys.argv[2]
maps = {}
for shard, ranges in pieces.items():
    with open(out + "/" + shard, "wb", buffering=0) as stream:
        for path, start, end in ranges:
            if path not in maps:
                with open(path, "rb") as file:
                    maps[path] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            view = maps[path][start:end]
            while len(view):
                view = view[stream.write(view):]
"""


WIDENED = """
import io, sys
from pathlib import Path
from modekit.building.build import write_tensor
from modekit.files.write import safetensors_header, write_all
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from modekit.sources.contents import OpenFiles
from modekit.weights.reading import WeightReader
recipe, out = Path(sys.argv[1]), Path(sys.argv[2])
plan = make_plan(load_recipe(recipe), recipe.parent)
with OpenFiles() as opened:
    read = WeightReader(opened, plan.models)
    for shard in plan.shards:
        with io.FileIO(out / shard.file, "w") as stream:
            write_all(stream, memoryview(safetensors_header((t.name, t.dtype, t.shape, t.nbytes) for t in shard.tensors)))
            for tensor in shard.tensors:
                write_tensor(tensor, read, stream)
"""


def make_models(folder: Path, layers: int) -> None:
    """Llama-shaped bf16 models with hidden 1024, F 2816, vocabulary 32,000, tied embeddings."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, 1024), "model.norm.weight": (1024,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (1024, 1024)
        shapes |= {
            f"{prefix}mlp.gate_proj.weight": (2816, 1024),
            f"{prefix}mlp.up_proj.weight": (2816, 1024),
            f"{prefix}mlp.down_proj.weight": (1024, 2816),
            f"{prefix}input_layernorm.weight": (1024,),
            f"{prefix}post_attention_layernorm.weight": (1024,),
        }
    entries = [(name, "BF16", shape, 2 * int(np.prod(shape))) for name, shape in shapes.items()]
    generator = np.random.default_rng(0)
    noise = (generator.standard_normal(2**22, np.float32) * 0.02).view(np.uint32) >> 16
    block = noise.astype(np.uint16).tobytes()
    for name in ("base", "a", "b", "c", "d"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        vocabulary = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}
        (folder / name / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": vocabulary}))
        with (folder / name / "model.safetensors").open("wb") as stream:
            stream.write(safetensors_header(entries))
            rest = sum(entry[3] for entry in entries)
            while rest:
                rest -= stream.write(block[: min(rest, len(block))])


@dataclass(frozen=True)
class Figures:
    """Seconds and largest bytes of a process. The system keeps the resident peak, the anonymous one is sampled every 10 ms."""

    wall: float
    cpu: float
    resident: int
    anonymous: int


def measure(command: list[str], checkout: Path = HERE) -> Figures:
    """Run a process to its end, with the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    largest = {"VmHWM": 0, "RssAnon": 0}
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in largest:
                    largest[name] = max(largest[name], int(value.split()[0]) * 1024)
        except OSError:
            pass
        time.sleep(0.01)
    assert status == 0, command
    seconds = time.perf_counter() - started
    return Figures(seconds, usage.ru_utime + usage.ru_stime, largest["VmHWM"], largest["RssAnon"])


def shown(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def _ranges(size: int, file: Path) -> list[tuple[str, int, int]]:
    """So many bytes out of a file, over and over."""
    most = file.stat().st_size
    return [(str(file), 0, min(most, size - start)) for start in range(0, size, most)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="1: 24 layers, 340M parameters; 2: twice the layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--verify", action="store_true", help="measure the proof as well")
    parser.add_argument("--other", type=Path, metavar="CHECKOUT", help="measure its build as well, and the ratio to it")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        make_models(folder, 24 * arguments.scale)
        experts = "".join(f"  - {{name: {name}, model: ./{name}}}\n" for name in "abcd")
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"base_model: ./base\nexperts:\n{experts}mixture: {{method: routing, top_k: 2, router: {{fit: random}}}}\n"
        )
        from modekit.planning.make import make_plan
        from modekit.recipes.read import load_recipe

        plan = make_plan(load_recipe(recipe), folder)
        pieces = {
            shard.file: [(str(ref.file), ref.start, ref.end) for tensor in shard.tensors for ref in tensor.made.refs]
            for shard in plan.shards
        }
        (folder / "pieces.json").write_text(json.dumps(pieces))
        wide_recipe = folder / "wide.yaml"
        (folder / "text.txt").write_text("a a a")
        with_text = experts.replace("}", ", text: ./text.txt}")
        wide_recipe.write_text(f"base_model: ./base\nexperts:\n{with_text}mixture: {{router: {{fit: lexical}}}}\n")
        wide = make_plan(load_recipe(wide_recipe), folder)
        as_many = {shard.file: _ranges(shard.nbytes, folder / "base" / "model.safetensors") for shard in wide.shards}
        (folder / "wide.json").write_text(json.dumps(as_many))
        (folder / "copy.py").write_text(COPY)
        commands = {
            "copy": [sys.executable, str(folder / "copy.py"), str(folder / "pieces.json"), str(folder / "COPY")],
            "build": [sys.executable, "-m", "modekit", "build", str(recipe), str(folder / "OUT"), "--no-fsync"],
            "wide copy": [sys.executable, str(folder / "copy.py"), str(folder / "wide.json"), str(folder / "COPY")],
            "widened": [sys.executable, "-c", WIDENED, str(wide_recipe), str(folder / "COPY")],
            "synced": [sys.executable, "-m", "modekit", "build", str(recipe), str(folder / "OUT")],
        }
        checkouts = {"other": arguments.other} if arguments.other else {}
        commands |= dict.fromkeys(checkouts, commands["synced"])
        results: dict[str, list[Figures]] = {name: [] for name in commands}
        for round_ in range(arguments.rounds + 1):
            for name in sorted(commands, reverse=bool(round_ % 2)):
                for target in ("COPY", "OUT"):
                    shutil.rmtree(folder / target, ignore_errors=True)
                (folder / "COPY").mkdir()
                os.sync()  # the last run's write-back must not fall into this run's time
                figures = measure(commands[name], checkouts.get(name, HERE))
                if round_:
                    results[name].append(figures)
                if name == "build" and arguments.verify:
                    proven = measure([sys.executable, "-m", "modekit", "verify", str(folder / "OUT"), "--no-reload"])
                    if round_:
                        results.setdefault("verify", []).append(proven)
        print(f"{plan.bytes_written / 1e9:.2f} GB written, {arguments.rounds} rounds")
        for name, rows in results.items():
            resident, anonymous = max(row.resident for row in rows), max(row.anonymous for row in rows)
            print(
                f"{name:9} wall {shown([row.wall for row in rows], ' s')}  cpu {shown([row.cpu for row in rows], ' s')}"
                f"  resident {resident / 1e6:.0f} MB  anonymous {anonymous / 1e6:.0f} MB"
            )
        for made, floor in (
            ("build", "copy"),
            ("synced", "build"),
            ("widened", "wide copy"),
            *(("build", other) for other in checkouts),
        ):
            pairs = list(zip(results[made], results[floor], strict=True))
            print(f"{made} / {floor}: wall {shown([ours.wall / its.wall for ours, its in pairs])}", end="")
            print(f"  cpu {shown([ours.cpu / its.cpu for ours, its in pairs])}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
