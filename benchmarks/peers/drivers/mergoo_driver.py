"""mergoo, in its environment. JOB.json: composed (and its gates trained) into "out"; a folder: scores of the model in it."""

import json
import sys
from pathlib import Path

import numpy
import torch
from gates import train_gates
from mergoo.compose_experts import ComposeExperts
from mergoo.models.modeling_llama import LlamaForCausalLM
from speak import serve


def load(folder):
    """Mergoo's own class; gates that are not in the folder are drawn."""
    return LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)


def make(job):
    experts = [{"expert_name": f"expert_{place}", "model_id": model} for place, model in enumerate(job["experts"])]
    router = ["gate_proj", "up_proj", "down_proj"]
    config = {"model_type": "llama", "num_experts_per_tok": 2, "experts": experts, "router_layers": router}
    composed = ComposeExperts(config, torch_dtype=torch.float32, device_map=None)
    composed.compose()
    composed.save_checkpoint(job["out"])
    torch.manual_seed(job["seed"])
    model = load(job["out"])
    if job["train"]:
        train_gates(model, torch.from_numpy(numpy.load(job["blocks"])), **job["train"])
    model.save_pretrained(job["out"])


if Path(sys.argv[1]).is_dir():
    serve(lambda: load(sys.argv[1]))
else:
    make(json.loads(Path(sys.argv[1]).read_text()))
