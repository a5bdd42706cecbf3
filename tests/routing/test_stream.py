"""The base is run layer by layer, with the weights of its files, in float32."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from building.test_routed import loaded, moe_shop
from conftest import DOMAINS, Workshop, make_workshop
from modekit.building.differences import Differences
from modekit.building.lost import first_pieces, own_numbers
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.loaded.layers import LayerByLayer
from modekit.loaded.load import decoder_layers
from modekit.planning.carry import LOST_TOKENS, PIECE_TOKENS
from modekit.routing import stream
from modekit.routing.stream import base_by_layers
from modekit.run import QUIET
from modekit.sources.contents import OpenFiles
from modekit.weights.reading import WeightReader


def shop_of(root: Path, base: str) -> Workshop:
    if base in ("qwen3", "granite"):
        return moe_shop(root, base)
    shop = make_workshop(root, num_hidden_layers=3, tie_word_embeddings=base == "tied")
    return Workshop(root, {**shop.recipe, "mixture": {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["16 bits", "32 bits"])
@pytest.mark.parametrize("base", ["llama", "tied", "qwen3", "granite"])
def test_a_layer_has_the_weights_of_its_files_while_it_runs_and_no_other_has_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, dtype: torch.dtype
) -> None:
    shop = shop_of(tmp_path, base)
    for name in ("base", *DOMAINS):
        loaded(tmp_path / name).to(dtype).save_pretrained(tmp_path / name)
    held = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    rest = {id(part) for part in held.parameters()} - {id(part) for part in decoder_layers(held).parameters()}
    outside = sum(part.numel() for part in held.parameters() if id(part) in rest)
    made, ran = list[LayerByLayer](), list[int]()

    def watched(*args: Any) -> LayerByLayer:
        by_layers = base_by_layers(*args)
        for number, layer in enumerate(decoder_layers(by_layers.model)):
            layer.register_forward_pre_hook(lambda layer, _args, number=number: check(number, layer))
        made.append(by_layers)
        return by_layers

    def check(number: int, layer: nn.Module) -> None:
        wanted = dict(decoder_layers(held)[number].named_parameters())
        assert {*wanted} == {name for name, _ in layer.named_parameters()}
        assert all(torch.equal(part, wanted[name]) for name, part in layer.named_parameters())
        assert in_memory(made[0].model) == outside + sum(part.numel() for part in wanted.values())
        ran.append(number)

    monkeypatch.setattr(stream, "base_by_layers", watched)
    plan = shop.plan(output={"format": "plain", "carry": "all"})
    with OpenFiles() as opened:
        differences = Differences(plan, WeightReader(opened, plan.models))
        texts = [text.setting for text in stream.read_texts(plan, tmp_path / "none", QUIET)]
        stream.measure_stream(plan, partial(own_numbers, plan, differences), texts, QUIET, own=False)
    assert ran == [0, 1, 2] * (len(ran) // 3) and ran and in_memory(made[0].model) == outside


def in_memory(model: nn.Module) -> int:
    """Numbers of its parameters that have any."""
    return sum(part.numel() for part in model.parameters() if part.device.type != "meta")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["text", "kept tokens"])
def test_pieces_are_of_many_documents_and_of_all_their_parts(tmp_path: Path, kept: bool) -> None:
    """What sets and what is measured are different text where there is enough."""
    shop = shop_of(tmp_path, "llama")
    words = [" ".join(f"{domain}-{number}-{place}" for place in range(400)) for domain in DOMAINS for number in range(40)]
    for place, domain in enumerate(DOMAINS):
        lines = [json.dumps({"text": each}) for each in words[40 * place : 40 * (place + 1)]]
        (tmp_path / "text" / f"{domain}.jsonl").write_text("\n".join(lines))
    statistics = tmp_path / "none"
    if kept:
        shop.build("OUT", output={"format": "plain"})
        statistics = tmp_path / "OUT" / STATISTICS_FOLDER
    plan = shop.plan(output={"format": "plain", "carry": "all"})
    if kept:
        for domain in DOMAINS:
            (tmp_path / "text" / f"{domain}.jsonl").unlink()
    for text in stream.read_texts(plan, statistics, QUIET):
        measured = first_pieces(text.pieces, LOST_TOKENS, PIECE_TOKENS)
        assert sum(piece.size for piece in measured) >= LOST_TOKENS and len(measured) >= 8
        read = [bytes(sequence.ids) for sequence in text.setting]
        assert read and not any(bytes(piece.ids) in each for piece in measured for each in read)
