"""MixtureKit, in its environment. JOB.json: built (and its gates trained) into "out"; a folder: scores of the model in it."""

import json
import shutil
import sys
from pathlib import Path

import numpy
import torch
from gates import train_gates
from MixtureKit import build_moe
from speak import serve
from transformers import AutoModelForCausalLM


def load(folder):
    """The code in the folder is MixtureKit's, written by it; gates that are not in the folder are drawn."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


def make(job):
    config = {
        "moe_method": job["method"],
        "model_type": "mixedx",
        "num_experts_per_tok": 2,
        "experts": [{"expert_name": f"expert_{place}", "model_id": model} for place, model in enumerate(job["experts"])],
        "router_layers": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
        "alpha": 0.01,
        "router_layers_index": [],
    }
    built = Path(job["out"] + "-built")
    build_moe(config=config, torch_dtype=torch.float32, output_dir=str(built))
    torch.manual_seed(job["seed"])
    model = load(built)
    if job["train"]:
        train_gates(model.train(), torch.from_numpy(numpy.load(job["blocks"])), **job["train"])
    model.save_pretrained(job["out"])
    for file in built.glob("*.py"):
        shutil.copy(file, job["out"])
    shutil.rmtree(built)


if Path(sys.argv[1]).is_dir():
    serve(lambda: load(sys.argv[1]))
else:
    make(json.loads(Path(sys.argv[1]).read_text()))
