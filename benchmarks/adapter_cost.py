"""What a mixture of eight LoRA adapters costs over its base: time of a forward pass and of a decoding step, and memory.

    OMP_NUM_THREADS=1 python benchmarks/adapter_cost.py forward [--tokens 512] [--rounds 40] [--rank 16]
    OMP_NUM_THREADS=1 python benchmarks/adapter_cost.py memory [--models small tiny] [--ranks 8 16] [--rounds 3]
    python benchmarks/adapter_cost.py shapes

Weights are random (a cost does not depend on them), adapters lie on every linear module of every layer, in the files that PEFT
saves, and the mixtures are built from them by recipe with a random router per layer.

forward: a Llama of hidden 1024, F 2816, 4 layers, 16 heads, vocabulary 1,024, float32. In one process and rotating order: the
    base, the modekit mixtures, PEFT's X-LoRA and Arrow on the same adapters, and the native mixture of the FFNs with the
    adapters folded in. Every ratio is to the base in the same round. A decoding step is one token after `--tokens` cached ones.
memory: processes of their own that load the base or the mixture: bytes of parameters and buffers, how much the resident memory
    has grown once every weight has been read, and its peak with a forward pass over 16 tokens.
shapes: parameters of the mixture over those of the base for published shapes, counted and not loaded.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modekit.building.build import build
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe

ADAPTERS = 8
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIMED = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "timed": {**TIMED, "vocab_size": 32_000, "num_hidden_layers": 24},
    "tiny": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
NAMES = {
    "small": "SmolLM2-135M's",
    "timed": "hidden 1024, 24 layers, vocabulary 32,000",
    "tiny": "TinyLlama-1.1B's",
    "mistral": "Mistral-7B's",
}
MIXTURES: dict[str, dict[str, Any]] = {
    "routing, top_k 2": {"method": "routing", "top_k": 2},
    "routing, top_k 2, per model": {"method": "routing", "top_k": 2, "router": {"per": "model"}},
    "routing, top_k 2, per projection": {"method": "routing", "top_k": 2, "router": {"per": "projection"}},
    "routing, top_k 2, context": {"method": "routing", "top_k": 2, "router": {"granularity": "context"}},
    "gating": {"method": "gating"},
    "linear": {"method": "linear"},
}
LOAD = """
import re, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import modekit

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # what only the first load imports does not count
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = kilobytes("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
with torch.inference_mode():
    for tensor in model.state_dict().values():  # loading only maps the file: each page must be read once to be resident
        tensor.view(torch.uint8).flatten()[::1024].sum()
    after = kilobytes("VmRSS")
    model(input_ids=torch.arange(16)[None])
peak = kilobytes("VmHWM")
weights = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
print(sum(weights.values()), 1024 * (after - before), 1024 * (peak - before))
"""


def save_base(folder: Path, shape: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def linears(shape: dict[str, Any]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear modules of the layers."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def save_adapter(folder: Path, base: Path, shape: dict[str, Any], rank: int, dtype: torch.dtype, seed: int) -> None:
    """A folder as PEFT saves it, with random A and B."""
    from peft import LoraConfig

    LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=PARTS, base_model_name_or_path=str(base), task_type="CAUSAL_LM"
    ).save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in linears(shape):
        prefix = f"base_model.model.{name}."
        a, b = (rank, module.in_features), (module.out_features, rank)
        tensors[f"{prefix}lora_A.weight"] = (torch.randn(a, generator=generator) / a[1] ** 0.5).to(dtype)
        tensors[f"{prefix}lora_B.weight"] = (torch.randn(b, generator=generator) * 0.02).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")


def save_models(folder: Path, shape: dict[str, Any], rank: int, dtype: torch.dtype) -> list[Path]:
    """`base` and the adapters; returns the adapters' folders."""
    save_base(folder / "base", shape, dtype)
    adapters = [folder / f"adapter{number}-{rank}" for number in range(ADAPTERS)]
    for number, adapter in enumerate(adapters):
        save_adapter(adapter, folder / "base", shape, rank, dtype, seed=1 + number)
    return adapters


def save_mixture(out: Path, adapters: list[Path], mixture: dict[str, Any], form: str = "modekit") -> Path:
    fit = {} if mixture["method"] == "linear" else {"router": {"fit": "random", **mixture.get("router", {})}}
    recipe = {
        "base_model": "./base",
        "mixture": {**mixture, **fit},
        "output": {"format": form},
        "experts": [{"name": f"e{place}", "adapter": f"./{adapter.name}"} for place, adapter in enumerate(adapters)],
    }
    build(make_plan(parse_recipe(recipe), out.parent), out)
    return out


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peft_models(folder: Path, adapters: list[Path]) -> dict[str, Any]:
    """X-LoRA and Arrow with the same adapters."""
    from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model

    base = load(folder / "base")
    base.config.use_cache = False  # X-LoRA insists
    paths = {str(number): str(adapter) for number, adapter in enumerate(adapters)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=paths, layerwise_scalings=True)
    xlora = get_peft_model(base, config).eval()
    arrow = create_arrow_model(load(folder / "base"), list(paths.values()), ArrowConfig(top_k=2, router_temperature=1.0)).eval()
    return {"PEFT X-LoRA": xlora, "PEFT Arrow, top_k 2": arrow}


def differences(mixture: Any, folder: Path, adapter: Path, place: int, ids: torch.Tensor) -> tuple[float, float]:
    """Of the logits from PEFT's, over the largest logit: of a mixture that is fixed on one expert, and of the base."""
    from peft import PeftModel

    base = load(folder / "base")
    plain = base(input_ids=ids).logits
    expected = PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=ids).logits
    mixture.use_expert(place)
    found = mixture(input_ids=ids).logits
    mixture.use_expert(None)
    ours, without = (float((logits - expected).abs().max() / expected.abs().max()) for logits in (found, plain))
    return ours, without


def shown(values: list[float], unit: str = "", digits: int = 2) -> str:
    """Median and the middle half of the rounds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def flops(shape: dict[str, Any], rank: int, tokens: int, past: int) -> float:
    """Multiplications of the mixture over those of the base: matrix products and causal attention, all ranks dense."""
    weights = [(module.in_features, module.out_features) for _, module in linears(shape)]
    attention = shape["num_hidden_layers"] * 2 * shape["hidden_size"] * (past + (tokens + 1) / 2)
    base = sum(i * o for i, o in weights) + attention + shape["hidden_size"] * shape["vocab_size"]
    gates = shape["num_hidden_layers"] * 2 * ADAPTERS * shape["hidden_size"]
    return float(1 + (sum(ADAPTERS * rank * (i + o) for i, o in weights) + gates) / base)


def time_in_turn(jobs: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 3) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each job per round; every round starts with another job."""
    names = list(jobs)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for round_ in range(-warm_up, rounds):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            wall, cpu = time.perf_counter(), time.process_time()
            jobs[name]()
            if round_ >= 0:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def table(seconds: dict[str, list[tuple[float, float]]]) -> None:
    print("| | ms | over the base | CPU time over the base |\n|---|---|---|---|")
    for name, rows in seconds.items():
        walls = [1000 * wall for wall, _ in rows]
        ratios = [[ours[kind] / plain[kind] for ours, plain in zip(rows, seconds["base"], strict=True)] for kind in (0, 1)]
        print(f"| {name} | {shown(walls, digits=1)} | {shown(ratios[0])} | {shown(ratios[1])} |")


def decoder(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """One more token each time it is called."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


@torch.inference_mode()
def forward(arguments: argparse.Namespace, folder: Path) -> None:
    adapters = save_models(folder, TIMED, arguments.rank, torch.float32)
    models = {"base": load(folder / "base")}
    for number, (name, mixture) in enumerate(MIXTURES.items()):
        models[f"modekit {name}"] = load(save_mixture(folder / f"mixture{number}", adapters, mixture))
    if not arguments.only_modekit:
        models |= peft_models(folder, adapters)
        ffn = [folder / f"ffn{number}" for number in range(ADAPTERS)]
        for source, target in zip(adapters, ffn, strict=True):
            only_ffn(source, target)
        native = {"method": "routing", "top_k": 2}
        models["native (FFN adapters folded), top_k 2"] = load(save_mixture(folder / "native", ffn, native, "native"))
    ids = torch.randint(0, TIMED["vocab_size"], (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    mixture = models["modekit routing, top_k 2"]
    pairs = [differences(mixture, folder, adapters[place], place, ids) for place in range(ADAPTERS)]
    threads = torch.get_num_threads()
    print(
        f"{platform.processor() or platform.machine()}, {threads} thread(s), torch {torch.__version__}, seeds 0 to {ADAPTERS}"
    )
    worst, without = max(ours for ours, _ in pairs), min(base for _, base in pairs)
    print(
        f"fixed on one expert, the logits differ from PEFT's by at most {worst:.1e} of the largest (the base: {without:.1e})\n"
    )
    jobs: dict[str, Callable[[], Any]] = {
        name: partial(model, input_ids=ids, use_cache=False) for name, model in models.items()
    }
    print(f"Forward pass, {arguments.tokens} tokens, rank {arguments.rank}, {arguments.rounds} rounds")
    print(f"multiplications over the base: {flops(TIMED, arguments.rank, arguments.tokens, 0):.3f}\n")
    table(time_in_turn(jobs, arguments.rounds))
    cached = {name: decoder(model, ids) for name, model in models.items() if "X-LoRA" not in name}
    rounds = 5 * arguments.rounds
    print(f"\nDecoding step after {arguments.tokens} tokens, {rounds} rounds")
    print(f"multiplications over the base: {flops(TIMED, arguments.rank, 1, arguments.tokens):.3f}\n")
    table(time_in_turn(cached, rounds, warm_up=10))


def only_ffn(source: Path, target: Path) -> None:
    """A copy of an adapter without what it changes in attention."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(source))
    config.target_modules = {part for part in PARTS if part in {"gate_proj", "up_proj", "down_proj"}}
    config.save_pretrained(target)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if ".mlp." in name}, target / "adapter_model.safetensors")


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    save_base(folder / "warm", {**TIMED, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}, torch.float32)
    print("| shape | rank | dtype | parameter bytes | files | resident, all weights read | peak, with a forward pass |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        for dtype in arguments.dtypes:
            for rank in arguments.ranks:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    row = memory_row(Path(place), folder / "warm", name, rank, getattr(torch, dtype), arguments)
                print(f"| {NAMES[name]} | {rank} | {dtype} | {row} |", flush=True)


def memory_row(folder: Path, warm: Path, name: str, rank: int, dtype: torch.dtype, arguments: argparse.Namespace) -> str:
    adapters = save_models(folder, SHAPES[name], rank, getattr(torch, arguments.adapter_dtype or str(dtype).split(".")[1]))
    if arguments.adapter_dtype:
        save_base(folder / "base", SHAPES[name], dtype)
    mixture = save_mixture(folder / "mixture", adapters, {"method": "routing", "top_k": 2})
    rows: dict[str, list[list[int]]] = {"base": [], "mixture": []}
    for _ in range(arguments.rounds):
        for which, model in (("base", folder / "base"), ("mixture", mixture)):
            command = [sys.executable, "-c", LOAD, str(warm), str(model)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[which].append([int(figure) for figure in printed.split()])
    files = [sum(file.stat().st_size for file in model.glob("*.safetensors")) for model in (folder / "base", mixture)]
    cells = []
    for column in range(3):
        base, ours = ([row[column] for row in rows[which]] for which in ("base", "mixture"))
        ratios = [after / before for after, before in zip(ours, base, strict=True)]
        spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if column else ""
        sizes = f"{statistics.median(base) / 1e6:.0f} -> {statistics.median(ours) / 1e6:.0f} MB"
        cells.append(f"{sizes}, {statistics.median(ratios):.3f}{spread}")
    cells.insert(1, f"{files[1] / files[0]:.3f}")
    return " | ".join(cells)


def shapes() -> None:
    print(
        "| shape | hidden | base | " + " | ".join(f"rank {rank}" for rank in (4, 8, 16, 32)) + " | largest rank within 1.15 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            base = sum(parameter.numel() for parameter in LlamaForCausalLM(LlamaConfig(**shape)).parameters())
        widths = sum(module.in_features + module.out_features for _, module in linears(shape))
        gates = shape["num_hidden_layers"] * 2 * ADAPTERS * shape["hidden_size"]
        ratios = [1 + (ADAPTERS * rank * widths + gates) / base for rank in (4, 8, 16, 32)]
        largest = int((0.15 * base - gates) / (ADAPTERS * widths))
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {NAMES[name]} | {shape['hidden_size']:,} | {base / 1e6:,.0f} M | {cells} | {largest} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["forward", "memory", "shapes"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only-modekit", action="store_true", help="forward: neither PEFT nor the native mixture")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["small", "tiny"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16"])
    parser.add_argument("--adapter-dtype", choices=["float32", "bfloat16"], help="memory: of the adapters; default: the base's")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.what == "shapes":
        shapes()
        return
    arguments.rounds = arguments.rounds or {"forward": 40, "memory": 3}[arguments.what]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        {"forward": forward, "memory": memory}[arguments.what](arguments, Path(folder))


if __name__ == "__main__":
    main()
