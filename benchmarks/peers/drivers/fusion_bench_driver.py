"""fusion-bench, in its environment. JOB.json: {"base", "experts", "runs": [[method, settings, folder]]}; a folder: its scores."""

import json
import sys
from pathlib import Path

import torch
from fusion_bench.method import ISO_C_Merge, ISO_CTS_Merge, TaskSingularVectorMerging, WUDIMerging
from fusion_bench.method.mixture_of_experts.mixtral_merging import MixtralForCausalLMMergingAlgorithm
from fusion_bench.method.smile_upscaling.causal_lm_upscaling import SmileCausalLMUpscalingAlgorithm
from fusion_bench.modelpool import CausalLMPool
from speak import serve
from transformers import AutoModelForCausalLM

METHODS = {
    "iso-c": ISO_C_Merge,
    "iso-cts": ISO_CTS_Merge,
    "tsv": TaskSingularVectorMerging,
    "wudi": WUDIMerging,
    "mixtral": MixtralForCausalLMMergingAlgorithm,
    "smile": SmileCausalLMUpscalingAlgorithm,
}


def make(job):
    models = {"_pretrained_": job["base"], **{f"expert_{place}": model for place, model in enumerate(job["experts"])}}
    for method, settings, folder in job["runs"]:
        torch.manual_seed(job["seed"])
        pool = CausalLMPool(models, tokenizer=job["base"], model_kwargs={"torch_dtype": "float32"})
        METHODS[method](**settings).run(pool).save_pretrained(folder)


if Path(sys.argv[1]).is_dir():
    serve(lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32))
else:
    make(json.loads(Path(sys.argv[1]).read_text()))
