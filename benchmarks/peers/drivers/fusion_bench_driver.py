"""fusion-bench, in its environment. JOB.json: base, experts, runs of [method, settings, folder]; a folder: its scores."""

import json
import sys
from pathlib import Path

import torch
from fusion_bench.method import ISO_C_Merge, ISO_CTS_Merge, TaskSingularVectorMerging, WUDIMerging
from fusion_bench.method.mixture_of_experts.mixtral_merging import MixtralForCausalLMMergingAlgorithm
from fusion_bench.method.smile_upscaling.causal_lm_upscaling import SmileCausalLMUpscalingAlgorithm
from fusion_bench.modelpool import CausalLMPool
from speak import serve

METHODS = {
    "iso-c": ISO_C_Merge,
    "iso-cts": ISO_CTS_Merge,
    "tsv": TaskSingularVectorMerging,
    "wudi": WUDIMerging,
    "mixtral": MixtralForCausalLMMergingAlgorithm,
    "smile": SmileCausalLMUpscalingAlgorithm,
}


OUTSIDE = ("embed_tokens", "lm_head")


def unchanged(pool):
    """Tensors whose difference is zero for an expert: WUDI divides by its size."""
    base, experts = pool.load_pretrained_model().state_dict(), [model.state_dict() for model in pool.models()]
    return [name for name in base if any(torch.equal(base[name], each[name]) for each in experts)]


def make(job):
    models = {"_pretrained_": job["base"], **{f"expert_{place}": model for place, model in enumerate(job["experts"])}}
    for method, settings, folder in job["runs"]:
        torch.manual_seed(job["seed"])
        pool = CausalLMPool(models, tokenizer=job["base"], model_kwargs={"torch_dtype": "float32"})
        if method == "wudi":
            outside = [name for name in pool.load_pretrained_model().state_dict() if any(part in name for part in OUTSIDE)]
            settings["exclude_keys"] = [*outside, *unchanged(pool)]
        model = METHODS[method](**settings).run(pool)
        if method == "mixtral":
            check_attention(pool.load_pretrained_model(), model)
        if method == "smile":  # saved as a whole: its class does not open a folder with linear maps that no expert changed
            model.model.rotary_emb = type(model.model.rotary_emb)(
                model.config
            )  # its frequencies are not set before a folder is opened
            Path(folder).mkdir()
            torch.save(model, Path(folder) / "model.pt")
            (Path(folder) / "sizes.json").write_text(
                json.dumps(sizes(model, settings["num_experts_per_tok"] / len(job["experts"])))
            )
        else:
            model.save_pretrained(folder)


def check_attention(base, mixtral):
    """0.2.33 copies norms, FFNs, embeddings and head, and nothing else into a model whose weights are not initialized."""
    name = "model.layers.0.self_attn.q_proj.weight"
    if not torch.equal(base.state_dict()[name], mixtral.state_dict()[name]):
        raise ValueError("attention and gates of its Mixtral are memory that nothing was written to")


def sizes(model, share):
    """Parameters: all, and those that a token passes."""
    every = sum(weight.numel() for weight in model.parameters())
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    return [every, every - experts + round(share * experts)]


if Path(sys.argv[1]).is_dir():
    serve(lambda: torch.load(Path(sys.argv[1]) / "model.pt", weights_only=False))
else:
    make(json.loads(Path(sys.argv[1]).read_text()))
