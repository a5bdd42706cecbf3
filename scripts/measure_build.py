"""What a build passes through: the files of the package in which anything runs while a mixture is planned and written.

    python scripts/measure_build.py            every file, with its lines and those of the functions that ran
    python scripts/measure_build.py --walk     these functions in the order of their first call, to read one after the other
    python scripts/measure_build.py --check    exit code 1 when there are more files or lines than BOUNDS

The mixture is what the shortest recipe gives: two Llama models with FFNs of their own and a text each, in a plain Mixtral with
the default router. Of models that differ in more, a build measures first what a plain checkpoint would lose. Whoever follows
`modekit build` reads these files; one of which less than a screen runs is taken at its word, and does not count. The bounds are
of the rooms from the recipe to the checkpoint, without those that read text for the router's fit.
What only defines things as it is imported does not count either.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import numpy as np

import modekit
from modekit.files.write import safetensors_header

PACKAGE = Path(modekit.__file__).parent
ROOMS = ("recipes", "sources", "planning", "weights", "files", "checkpoint", "building")
SCREEN = 30
"""Lines of functions."""
LONG = 8
"""Lines of a function that a reader opens; a shorter one is its name."""
BOUNDS = {"files": 26, "lines": 4_800, "lines to read": 2_460}
"""Most files, lines in them (a lexical router and the channels that carry it are five files), and lines that --walk names."""
_WORDS = {"law": "court contract clause appeal", "medicine": "fever artery lesion dose"}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail when a bound is broken")
    parser.add_argument("--walk", action="store_true", help="print the functions and not the files")
    options = parser.parse_args()
    codes = codes_of_a_build()
    if options.walk:
        print("\n".join(walk_of(codes)))
        return
    ran = files_of(codes)
    print("| file | lines | of what ran |\n|---|---|---|")
    for file, (lines, run) in sorted(ran.items(), key=lambda item: -item[1][1]):
        print(f"| {file} | {lines} | {run} |")
    read = {file: lines for file, (lines, run) in ran.items() if file.startswith(ROOMS) and run >= SCREEN}
    walked = sum(_lines(code) for code in codes if _is_read(code))
    found = {"files": len(read), "lines": sum(read.values()), "lines to read": walked}
    print(f"\n{len(ran)} files with {sum(lines for lines, _ in ran.values()):,} lines in all.")
    print(f"From the recipe to the checkpoint {found['files']} files, with {found['lines']:,} lines.")
    print(f"Who reads function after function (--walk) reads {walked:,} lines.")
    broken = [f"{name} {found[name]}, at most {most}" for name, most in BOUNDS.items() if found[name] > most]
    if options.check and broken:
        sys.exit(f"broken: {'; '.join(broken)}")


Codes = dict[CodeType, int]
"""Functions in the order of their first call -> how many functions to read stand above."""


def codes_of_a_build() -> Codes:
    """The second build's, so that imports are over."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_models(Path(folder))
        modekit.build(recipe, Path(folder) / "IMPORTS")
        with watched() as codes:
            modekit.build(recipe, Path(folder) / "OUT")
    return codes


def files_of(codes: Codes) -> dict[str, tuple[int, int]]:
    """File of the package -> its lines, and those of the functions in it that ran."""
    found: dict[str, tuple[int, int]] = {}
    for code in codes:
        name = _name(code)
        lines, run = found.get(name, (len(Path(code.co_filename).read_text(encoding="utf-8").splitlines()), 0))
        found[name] = lines, run + _lines(code)
    return found


def walk_of(codes: Codes) -> Iterator[str]:
    """A line for each function to read, below the one that called it first, and how many there are."""
    read = [(code, depth) for code, depth in codes.items() if _is_read(code)]
    for code, depth in read:
        yield f"{'  ' * depth}{_name(code)}:{code.co_firstlineno} {getattr(code, 'co_qualname', code.co_name)}"
    files = len({code.co_filename for code, _ in read})
    yield f"{len(read)} functions of {LONG} lines or more, {sum(_lines(code) for code, _ in read):,} lines in {files} files"


def _name(code: CodeType) -> str:
    return str(Path(code.co_filename).relative_to(PACKAGE))


def _lines(code: CodeType) -> int:
    last = max((line for _, _, line in code.co_lines() if line is not None), default=code.co_firstlineno)
    return last - code.co_firstlineno + 1


def _is_read(code: CodeType) -> bool:
    return code.co_filename.startswith(f"{PACKAGE}/") and _name(code).startswith(ROOMS) and _lines(code) >= LONG


@contextmanager
def watched() -> Iterator[Codes]:
    """The functions of the package that run inside the block, in every thread."""
    codes: Codes = {}
    prefix = f"{PACKAGE}/"

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        named = not code.co_name.startswith("<") and "__qualname__" not in code.co_names
        if event == "call" and named and code.co_filename.startswith(prefix) and code not in codes:
            codes[code] = sum(1 for above in _callers(frame) if above in codes and _is_read(above))

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield codes
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _callers(frame: FrameType) -> Iterator[CodeType]:
    above = frame.f_back
    while above is not None:
        yield above.f_code
        above = above.f_back


def write_models(folder: Path) -> Path:
    """A base and two experts of a layer, their texts, and the recipe that mixes them."""
    width, ffn, words = 64, 96, ["<unk>", *" ".join(_WORDS.values()).split()]
    config = {"model_type": "llama", "vocab_size": len(words), "hidden_size": width, "intermediate_size": ffn}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    shapes = {"model.embed_tokens.weight": (len(words), width), "lm_head.weight": (len(words), width)}
    layer = "model.layers.0."
    shapes |= {f"{layer}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
    shapes |= {f"{layer}mlp.{part}_proj.weight": (ffn, width) for part in ("gate", "up")}
    shapes[f"{layer}mlp.down_proj.weight"] = (width, ffn)
    random, data = np.random.default_rng(0), dict[str, bytes]()
    for name in ("base", *_WORDS):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        model = {"type": "WordLevel", "vocab": {word: place for place, word in enumerate(words)}, "unk_token": "<unk>"}
        tokenizer = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "model": model}
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        norms = {f"{layer}input_layernorm.weight": (width,), f"{layer}post_attention_layernorm.weight": (width,)}
        tensors = {**shapes, **norms, "model.norm.weight": (width,)}
        entries = [(key, "F32", shape, 4 * int(np.prod(shape))) for key, shape in tensors.items()]
        drawn = {key: random.standard_normal(shape, np.float32).tobytes() for key, shape in tensors.items()}
        data = {**drawn, **data, **{key: numbers for key, numbers in drawn.items() if ".mlp." in key}}
        (folder / name / "model.safetensors").write_bytes(safetensors_header(entries) + b"".join(data[key] for key in tensors))
    for name, text in _WORDS.items():
        lines = (" ".join(random.permutation(text.split())) for _ in range(200))
        (folder / f"{name}.txt").write_text("\n\n".join(f"{line} {number}" for number, line in enumerate(lines)))
    experts = "".join(f"  - {{name: {name}, model: ./{name}, text: ./{name}.txt}}\n" for name in _WORDS)
    (folder / "recipe.yaml").write_text(f"base_model: ./base\nexperts:\n{experts}")
    return folder / "recipe.yaml"


if __name__ == "__main__":
    main()
