"""What it costs that an expert comes or goes: bytes and seconds against a build, at many experts.

    python benchmarks/members.py [--experts 16] [--rounds 3] [--shape smollm2|tinyllama] [--layers 30] [--fits random lexical]
                                 [--resident] [--folder DIR]
    python benchmarks/members.py --demo demo [--tokens 20000]

Makes a base and experts of SmolLM2-135M's or TinyLlama's widths (bf16, random values, the demo's tokenizer) and text for each,
then in turn, round by round, as processes of their own: a build of all experts but one, a build of all, `modekit add` of the
last one to the former, and `modekit remove` of it again; with a random router (weights alone) and with a lexical one. Prints
seconds (median and range), the bytes that were written (files that are no links), and whether the mixture that an expert was
added to is, file by file, the one that was built with it. All with --no-fsync and --no-measure.

With --demo: the folder of `modekit demo`; each of its four experts in turn is the one that comes to the lexical mixture of the
other three, and the loss on their domains is compared before and after (report split).

With --resident: resident memory of a process that has loaded the mixture with transformers in the files' dtype and run two
experts, for two experts and for all, in the modekit architecture and in the native one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.text import DOMAINS, unpack_text
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Score
from modekit.experts.corpus.tokenizer import byte_level_bpe
from modekit.files.write import safetensors_header
from modekit.members.change import write_change
from modekit.members.edits import remove_expert
from modekit.text.document import text_of
from modekit.text.documents import read_documents

VOCABULARY = 3_072


class Shape(NamedTuple):
    """Widths of a Llama."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int


SHAPES = {"smollm2": Shape(576, 1_536, 9, 3), "tinyllama": Shape(2_048, 5_632, 32, 4)}


def shapes_of(shape: Shape, layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape of a Llama whose embeddings are tied."""
    hidden, ffn, narrow = shape.hidden, shape.ffn, shape.kv_heads * shape.hidden // shape.heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "o")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (narrow, hidden) for name in ("k", "v")}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes


def make_models(folder: Path, names: list[str], shape: Shape, layers: int) -> None:
    """Base and experts, random in every tensor."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    entries = [(name, "BF16", shape, 2 * int(np.prod(shape))) for name, shape in shapes_of(shape, layers).items()]
    header = safetensors_header(entries)
    for seed, name in enumerate(names):
        random = np.random.default_rng(seed)
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        with (folder / name / "model.safetensors").open("wb") as stream:
            stream.write(header)
            for _, _, _, size in entries:
                values = random.standard_normal(size // 2, np.float32) * np.float32(0.02)
                stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # the upper half: bfloat16


def make_texts(folder: Path, names: list[str]) -> None:
    """The demo's documents, dealt out: every expert gets a share of one of its domains."""
    paths = unpack_text(folder / "demo")
    documents = {name: read_documents([str(paths[name])], root=folder, where=name) for name in DOMAINS}
    some = (text_of(each) for found in documents.values() for each in found[:2000])
    byte_level_bpe(some, VOCABULARY).save_pretrained(folder / "base")
    shares = -(-len(names) // len(DOMAINS))
    for number, name in enumerate(names):
        share = documents[DOMAINS[number % len(DOMAINS)]][number // len(DOMAINS) :: shares]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in share))


def write_recipe(folder: Path, names: list[str], fit: str) -> Path:
    """A recipe of these experts."""
    experts = [{"name": name, "model": f"./{name}", "text": f"./{name}.jsonl"} for name in names]
    path = folder / f"{fit}-{len(names)}.yaml"
    mixture = {"top_k": 2, "router": {"fit": fit}}
    path.write_text(yaml.safe_dump({"base_model": "./base", "experts": experts, "mixture": mixture}, sort_keys=False))
    return path


def seconds_of(*words: object) -> float:
    """Of a command, from start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "modekit", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def written(out: Path) -> dict[str, int]:
    """Bytes of weight files that are no links, by kind."""
    found = {"experts": 0, "others": 0}
    for path in out.glob("*.safetensors"):
        if path.stat().st_nlink == 1:
            found["experts" if path.name.startswith("model-expert") else "others"] += path.stat().st_size
    return found


def same_files(one: Path, other: Path) -> bool:
    """Whether two mixtures have the same weights, config and index, file by file."""
    names = [{path.name for path in folder.iterdir() if path.name.startswith(("model", "config"))} for folder in (one, other)]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


def run(folder: Path, names: list[str], fit: str, rounds: int) -> None:
    """Rounds of the four commands, and a table."""
    few, all_of_them = write_recipe(folder, names[:-1], fit), write_recipe(folder, names, fit)
    last = names[-1]
    seconds: dict[str, list[float]] = {"build without": [], "build with": [], "add": [], "remove": []}
    bytes_of: dict[str, dict[str, int]] = {}
    same = []
    for _ in range(rounds):
        for out in ("few", "all", "added", "removed"):
            shutil.rmtree(folder / out, ignore_errors=True)
        seconds["build without"].append(seconds_of("build", few, folder / "few", "--no-fsync"))
        seconds["build with"].append(seconds_of("build", all_of_them, folder / "all", "--no-fsync"))
        bytes_of |= {"build without": written(folder / "few"), "build with": written(folder / "all")}
        new = ("--name", last, "--model", folder / last, "--text", folder / f"{last}.jsonl", "--no-measure")
        seconds["add"].append(seconds_of("add", folder / "few", *new, "--out", folder / "added", "--no-fsync"))
        bytes_of["add"] = written(folder / "added")
        seconds["remove"].append(seconds_of("remove", folder / "added", last, "--out", folder / "removed", "--no-fsync"))
        bytes_of["remove"] = written(folder / "removed")
        same += [same_files(folder / "added", folder / "all"), same_files(folder / "removed", folder / "few")]
    print(
        f"\n{fit} router, {len(names) - 1} experts and one more; the same files as a build: {all(same)} ({len(same)} compared)"
    )
    whole = statistics.median(seconds["build with"])
    for name, found in seconds.items():
        each, others = (bytes_of[name][kind] / 1e6 for kind in ("experts", "others"))
        middle = statistics.median(found)
        spread = f"({min(found):.2f} to {max(found):.2f})"
        told = f"{each:8.1f} MB of experts, {others:6.1f} MB else"
        print(f"  {name:14} {middle:7.2f} s {spread:18} {middle / whole:5.2f} of the build   {told}", flush=True)


def worth(demo: Path, tokens: int) -> None:
    """What an expert that comes does to the others' domains: each of the demo's four as the one that comes."""
    with tempfile.TemporaryDirectory(prefix="modekit-members-") as name:
        folder = Path(name)
        for path in sorted(demo.glob("seed*/lexical")):
            whole = open_checkpoint(path)
            every = {name: score.loss for name, score in losses_of(whole, tokens).items()}
            changes = []
            for expert in whole.names:
                out = folder / f"{path.parent.name}-{expert}"
                found = losses_of(write_change(whole, remove_expert(whole, expert), out), tokens)
                changes += [every[name] / score.loss - 1 for name, score in found.items() if name in whole.names]
            print(
                f"{path.parent.name}: loss on the others' domains changes by {min(changes):+.4f} to {max(changes):+.4f}",
                flush=True,
            )


def losses_of(checkpoint: Checkpoint, tokens: int) -> Mapping[str, Score]:
    """The mixture's scores per domain (report split)."""
    return evaluate(checkpoint, tokens_per_domain=tokens, write=False).row("mixture").scores


RESIDENT = """
import sys, torch
from pathlib import Path
from modekit.checkpoint.open import open_checkpoint
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
checkpoint = open_checkpoint(Path(sys.argv[1]))
model = load_model(checkpoint.folder, dtype="auto")
mixture = mixture_of(model, checkpoint)
with torch.inference_mode():
    for expert in (0, 1):
        with mixture.forced(expert):
            model(input_ids=torch.arange(64)[None])
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def resident(folder: Path, names: list[str]) -> None:
    """Two experts run of two, and of all."""
    for form in ("modekit", "native"):
        found = []
        for count in (2, len(names)):
            recipe = yaml.safe_load(write_recipe(folder, names[:count], "random").read_text())
            path = folder / f"{form}-{count}.yaml"
            path.write_text(yaml.safe_dump({**recipe, "output": {"format": form}}))
            subprocess.run(
                [sys.executable, "-m", "modekit", "build", path, folder / path.stem, "--no-fsync"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            done = subprocess.run([sys.executable, "-c", RESIDENT, folder / path.stem], check=True, capture_output=True)
            found.append(int(done.stdout))
        two, every = found
        print(f"{form}: {two} MB with 2 experts, {every} MB with {len(names)}, two of them run: {every / two:.2f}", flush=True)


def main() -> None:
    """Make everything, run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--fits", nargs="*", default=["random", "lexical"])
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args()
    if args.demo is not None:
        worth(args.demo, args.tokens)
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="modekit-members-"))
    names = [f"domain{number}" for number in range(args.experts + 1)]
    make_models(folder, ["base", *names], SHAPES[args.shape], args.layers)
    make_texts(folder, names)
    own = sum(2 * int(np.prod(shape)) for name, shape in shapes_of(SHAPES[args.shape], args.layers).items() if ".mlp." in name)
    print(f"one expert's own bytes: {own / 1e6:.1f} MB")
    for fit in args.fits:
        run(folder, names, fit, args.rounds)
    if args.resident:
        resident(folder, names[:-1])
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
