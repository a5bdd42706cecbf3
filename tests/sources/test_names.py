"""Names of tensors, taken apart and put together."""

from __future__ import annotations

import pytest

from modekit.sources.names import (
    EMBEDDING,
    HEAD,
    in_decoder,
    in_layer,
    is_ignored,
    layers_of,
    module_of,
    natural_key,
    split_layer,
    weight_of,
)


@pytest.mark.parametrize(
    ("name", "layer", "path"),
    [
        ("model.layers.3.mlp.up_proj", 3, "mlp.up_proj"),
        ("model.layers.12.mlp.up_proj.weight", 12, "mlp.up_proj.weight"),
        ("lm_head", None, "lm_head"),
        ("model.norm.weight", None, "model.norm.weight"),
        ("model.layers.x.mlp", None, "model.layers.x.mlp"),
    ],
)
def test_a_name_is_a_layer_and_a_path(name: str, layer: int | None, path: str) -> None:
    assert split_layer(name) == (layer, path)
    if layer is not None:
        assert in_layer(layer, path) == name


def test_names_sort_as_the_model_runs() -> None:
    names = [
        weight_of(EMBEDDING),
        in_layer(2, "mlp.up_proj.weight"),
        in_layer(10, "mlp.up_proj.weight"),
        in_layer(10, "self_attn.q_proj.weight"),
        weight_of(HEAD),
        "model.norm.weight",
    ]
    mixed_up = [names[number] for number in (4, 2, 0, 5, 3, 1)]
    assert sorted(mixed_up, key=natural_key) == names


def test_layers_are_those_that_are_named() -> None:
    assert layers_of([weight_of(HEAD)]) == set()
    assert layers_of([in_layer(0, "a.weight"), in_layer(11, "a.weight"), weight_of(HEAD)]) == {0, 11}
    assert layers_of(["model.encoder.layers.3.fc1.weight", "decoder.block.0.layer.1.x", "shared.weight"]) == {
        "encoder.3",
        "decoder.0",
    }


def test_names_of_two_stacks_are_taken_apart_and_sorted_as_they_run() -> None:
    assert split_layer("model.encoder.layers.12.fc1.weight") == ("encoder.12", "fc1.weight")
    assert split_layer("decoder.block.0.layer.1.EncDecAttention.q") == ("decoder.0", "layer.1.EncDecAttention.q")
    assert split_layer("model.encoder.embed_positions.weight")[0] is None
    layers = ["model.encoder.layers.2.fc1", "model.encoder.layers.10.fc1", "model.decoder.layers.0.fc1"]
    names = ["model.shared", *layers, "lm_head"]
    assert sorted([*names[1:], names[0]], key=natural_key) == names
    assert [in_decoder(name) for name in names] == [False, False, False, True, False]


def test_a_module_is_the_name_without_its_last_part() -> None:
    assert module_of(weight_of(HEAD)) == HEAD


def test_old_buffers_are_ignored() -> None:
    assert is_ignored(in_layer(0, "self_attn.rotary_emb.inv_freq")) and is_ignored("transformer.h.0.attention.masked_bias")
    assert not is_ignored(in_layer(0, "self_attn.q_proj.bias"))
