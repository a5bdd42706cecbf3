"""Fine-tunes of a base that is a mixture itself, as one plain mixture of its family: gap closed and time, routed.md.

    python benchmarks/routed.py train FOLDER --kind full --seeds 0 1 2       a small Qwen3-MoE and four fine-tunes
    python benchmarks/routed.py mixtures FOLDER --kind full --seeds 0 1 2    mixtures of them, lexical router, report split
    python benchmarks/routed.py cost                                         time of one pass, over the base's

Kinds: full (all parameters), mlp (experts and gates), lora (rank 16 on attention, gates and experts). `train` keeps models that
are there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import whole
from modekit.demo import models
from modekit.demo.text import DOMAINS, unpack_text

ARCHITECTURE = {
    **{key: value for key, value in models.ARCHITECTURE.items() if key != "intermediate_size"},
    **{"head_dim": 64, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
}
_AVERAGE = {"backbone": "average"}
whole.VARIANTS |= {
    "moe_mlp": {"modekit architecture": {"output": {"format": "modekit"}}, "plain": {"output": whole.NATIVE}},
    "moe_lora": {"modekit architecture": {"output": {"format": "modekit"}}, "plain": {"output": whole.NATIVE}},
    "moe_full": {
        "modekit architecture, all": {"output": {"format": "modekit"}, "modules": "all"},
        "plain, experts and gates, base": {"output": {**whole.NATIVE, "carry": "ffn"}},
        "plain, experts and gates, average": {"output": {**whole.NATIVE, "carry": "ffn"}, **_AVERAGE},
        "plain, whole, average, rank 64": {"output": {**whole.NATIVE, "carry": "all"}, **_AVERAGE},
        "plain, whole, average, rank 128": {"output": {**whole.NATIVE, "carry": "all", "rank": 128}, **_AVERAGE},
    },
}
whole.MOVED |= {"moe_full": "full", "moe_lora": "lora", "moe_mlp": "mlp"}
for _kind in ("moe_mlp", "moe_lora", "moe_full"):
    whole.EVAL_TOKENS[_kind], whole.FORCED_TOKENS[_kind] = 8_192, 1_024


def mixture_of_experts(_architecture: object, seed: int) -> PreTrainedModel:
    """A Qwen3-MoE of random weights whose attention starts as the identity."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**ARCHITECTURE))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()
            if name.endswith("gate.weight"):  # zeros choose the same experts for every token
                parameter.normal_(0.0, 0.02)
    return model


def train(folder: Path, kind: str, seed: int) -> None:
    """Base and fine-tunes of one seed, as whole.py trains dense ones."""
    models.new_model = mixture_of_experts  # type: ignore[assignment]
    unpack_text(folder / "text")
    texts = {name: folder / "text" / f"{name}.jsonl" for name in DOMAINS}
    whole.texts_of_kind = lambda *_: texts  # type: ignore[attr-defined]
    whole.train(folder, f"moe_{kind}", seed)


def cost(rounds: int = 9) -> None:
    """Processor time of a layer, over the base's: Qwen3-30B-A3B's shapes with fewer experts, two fine-tunes, random weights."""
    shape = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 1_024}
    made = {
        layers: Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**ARCHITECTURE, **shape, **wide, "num_hidden_layers": layers})).eval()
        for layers, wide in ((2, {"num_experts": 16}), (3, {"num_experts": 32, "hidden_size": 2048 + 32}))
    }
    with torch.no_grad():  # one channel says that the first fine-tune is best, as for a whole text
        made[3].model.embed_tokens.weight[:, -1] = 0.02
        for layer in made[3].model.layers:
            layer.self_attn.o_proj.weight[-1], layer.mlp.experts.down_proj[:, -1] = 0.0, 0.0
            layer.mlp.gate.weight[16:, -1] = -1e6
    torch.set_num_threads(1)
    for tokens in (1, 128):
        ids, times = torch.randint(0, 1_024, (1, tokens)), dict[int, list[float]]({2: [], 3: []})
        for layers in [*made] * (rounds + 1):
            start = time.process_time()
            with torch.inference_mode():
                made[layers].model(ids)
            times[layers].append((time.process_time() - start) / layers)
        ratios = sorted(wide / base for base, wide in zip(times[2][1:], times[3][1:], strict=True))
        print(f"| {tokens} | {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |", flush=True)


def main() -> None:
    """One step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "mixtures", "cost"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--kind", choices=["full", "mlp", "lora"], default="full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="")
    said = parser.parse_args()
    if said.step == "cost":
        cost()
        return
    for seed in said.seeds:
        if said.step == "train":
            train(said.folder.resolve(), said.kind, seed)
        else:
            whole.mixtures(said.folder.resolve(), f"moe_{said.kind}", seed, said.only)


if __name__ == "__main__":
    main()
