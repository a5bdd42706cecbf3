"""Is a router's evidence as exact in a layer in front as in one more head? whole.md.

    python benchmarks/whole_front.py [--hidden 4096] [--layers 4] [--ffn 2048] [--tokens 512]

A random Llama with heads of 128 in groups of four (32 and 8 at 4,096), four experts with FFNs of their own, a lexical router
at top-1, built both ways. Shown: the largest difference of log-probabilities between the mixture, gates forced, and the
expert; how far the gates are from the exact averages of the table (root mean square of the difference, both of length 1); on
how many tokens and layers they choose another expert than the exact averages do. Time and cache: whole_cost.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from lexical_cost import EXPERTS, make_models
from transformers import AutoModelForCausalLM

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources import natives
from modekit.sources.native import Widening

FORMS = {"layer in front": True, "one more head": False}
ROWS = natives.NATIVES


def built(root: Path, form: str, dtype: str) -> Checkpoint:
    """The mixture in one form and dtype: rows of the table that allow no layer in front give the other."""
    natives.NATIVES = tuple(
        dataclasses.replace(row, widening=dataclasses.replace(row.widening, in_front=FORMS[form]))
        if isinstance(row.widening, Widening)
        else row
        for row in ROWS
    )
    experts = [{"name": f"e{number}", "model": f"./e{number}", "text": f"./e{number}.jsonl"} for number in range(EXPERTS)]
    mixture = {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}}
    recipe = {"base_model": "./base", "experts": experts, "mixture": mixture, "output": {"format": "native", "dtype": dtype}}
    return build(make_plan(parse_recipe(recipe, where=form), root), root / "OUT", overwrite=True)


def words(root: Path, tokens: int) -> torch.Tensor:
    """A text that goes from domain to domain, (1, S): equally many words of each."""
    texts = [(root / f"e{number}.jsonl").read_text().splitlines()[-1] for number in range(EXPERTS)]
    found = [word for text in texts for word in json.loads(text)["text"].split()[: tokens // EXPERTS]]
    return torch.tensor([[int(word[1:]) for word in found]])


def exact(checkpoint: Checkpoint, model: torch.nn.Module, ids_S: torch.Tensor) -> torch.Tensor:
    """Averages of the rows of the table up to every token, (S, E), in float64."""
    channels = checkpoint.shape.channels
    assert channels is not None
    (decay,) = channels.decays
    rows_SX = model.get_input_embeddings().weight[ids_S].double()
    rows_SE = rows_SX[:, channels.evidence] / rows_SX[:, channels.constant, None]
    distances_SS = torch.arange(len(ids_S))[:, None] - torch.arange(len(ids_S))
    weights_SS = torch.where(distances_SS >= 0, decay ** distances_SS.clamp(min=0).double(), 0.0)
    return weights_SS @ rows_SE / weights_SS.sum(1, keepdim=True)


def main() -> None:
    """Print a row per form and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4_096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=2_048)
    parser.add_argument("--tokens", type=int, default=512)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_models(root, said.hidden, said.layers, said.ffn)
        ids = words(root, said.tokens)
        print("| | dtype | forced against the expert | gates against exact averages | other expert |\n|---|---|---|---|---|")
        for form in FORMS:
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype).rpartition(".")[2]
                print(f"| {form} | {name} | {_row(root, built(root, form, name), ids, dtype)} |", flush=True)


@torch.inference_mode()
def _row(root: Path, checkpoint: Checkpoint, ids: torch.Tensor, dtype: torch.dtype) -> str:
    own_model, expert = (AutoModelForCausalLM.from_pretrained(root / name, dtype=dtype) for name in ("base", "e1"))
    for layer, other in zip(own_model.model.layers, expert.model.layers, strict=True):
        layer.mlp = other.mlp
    own = own_model(ids).logits.double().log_softmax(-1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype).eval()
    said = model(ids, output_router_logits=True).router_logits[-checkpoint.shape.channels.layers :]
    with mixture_of(model, checkpoint).forced(1):
        apart = (model(ids).logits.double().log_softmax(-1) - own).abs().max()
    wanted_SE = _directions(exact(checkpoint, model, ids[0]))
    gates = [_directions(each.reshape(-1, EXPERTS).double()) for each in said]
    error = max(float((each - wanted_SE).square().sum(-1).mean().sqrt()) for each in gates)
    other = sum(float((each.argmax(-1) != wanted_SE.argmax(-1)).double().mean()) for each in gates) / len(gates)
    return f"{apart:.1e} | {error:.1e} | {other:.2%}"


def _directions(logits_SE: torch.Tensor) -> torch.Tensor:
    """Without what all experts have, and of length 1: a gate's norm divides by the size of the stream."""
    return torch.nn.functional.normalize(logits_SE - logits_SE.mean(-1, keepdim=True), dim=-1)


if __name__ == "__main__":
    main()
