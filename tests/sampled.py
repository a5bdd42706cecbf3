"""Tests of many alike cases: which of them `make test` runs. The other cases are slow: `make test-all`, and so CI, has them.

Every capability stays in `make test` once; one that a case of another test shows as well has `nothing` here.
"""

from __future__ import annotations

import re

import pytest

nothing = r"^$"
_PAIRS = r"^(marian|t5)\b(?! gated)"
_DECODERS = r"^(gpt2|opt|bert|gpt_neox|phi|bloom|olmoe|gpt_oss|bamba|bart)$"
_ONE_OF_LLAMA = r"^(?!llama-mixtral-[1-5]|mistral-mixtral-8)"
_WHEN_CHANGED = r"^(native random|native lexical|whole models by n-grams|everything)$"

SAMPLED = {
    "architecture/test_encoder_decoder.py::test_a_static_cache_writes_the_same": _PAIRS,
    "architecture/test_encoder_decoder.py::test_it_opens_without_modekit": _PAIRS,
    "architecture/test_mixtures.py::test_copies_in_every_family": r"^(llama|qwen3)-",
    "architecture/test_mixtures.py::test_every_family_mixes_every_kind_of_expert": r"^llama-|-all kinds$",
    "architecture/test_pictures.py::test_an_expert_alone_is_its_own_multimodal_model_bit_for_bit": r"^(qwen3_5|gemma3)$",
    "architecture/test_pictures.py::test_embeddings_and_heads_of_experts": r"^gemma3$",
    "architecture/test_pictures.py::test_routers_read_pictures_and_text": r"^(qwen3_5|gemma3)$",
    "architecture/test_pictures.py::test_text_alone_is_the_text_mixture": r"^qwen3_5$",
    "architecture/test_whole_pairs.py::test_a_fitted_router_sends_each_source_to_one_model": _PAIRS,
    "architecture/test_whole_pairs.py::test_an_expert_alone_is_its_own_model_bit_for_bit": _PAIRS,
    "architecture/test_whole_pairs.py::test_every_source_goes_to_the_expert_that_its_router_names_beams_and_all": _PAIRS,
    "architecture/test_whole_pairs.py::test_it_opens_without_modekit": _PAIRS,
    "checkpoint/test_bad_output.py::test_a_full_disk": r"^(False-(100|20000)|True-(5000|40000))$",
    "checkpoint/test_bad_output.py::test_ctrl_c": r"^False-.*(record|fit_router)$|^True-.*write_index$",
    "checkpoint/test_resume.py::test_a_build_killed_at_any_file_operation_ends_in_the_same_bytes": r"^random here and there$",
    "checkpoint/test_resume.py::test_a_build_killed_at_any_journal_line_ends_in_the_same_bytes": r"^within the line$",
    "checkpoint/test_resume.py::test_killing_the_replacement_of_an_old_folder_loses_neither": nothing,  # test_kills: build over
    "cli/test_cli.py::test_a_walk_with_adapters": nothing,
    "docs/test_docs.py::test_the_tutorial_and_the_python_page_run": nothing,
    "docs/test_serve_page.py::test_the_commands_run": r"^One command$",
    "engines/test_gguf.py::test_fewer_bits_lose_little": r"^q8_0",
    "engines/test_gguf.py::test_small_types_lose_what_the_base_loses": r"^q4_0$",
    "engines/test_gguf.py::test_llama_cpp_computes_the_same": r"^(llama-0|qwen3-6|granite-8)$",
    "engines/test_kept_gguf.py::test_a_strangers_file_is_not_believed": r"^junk$",
    "engines/test_lora_gguf.py::test_other_families_without_their_sources": r"^granite$",
    "engines/test_serve.py::test_the_engine_ends_with_the_command": r"^9-",
    "evaluation/test_inspect.py::test_similarity_leaves_out_the_channels_of_a_lexical_router": r"^llama$",
    "evaluation/test_mixtures_of_pairs.py::test_it_is_fitted_scored_and_inspected": r"^t5-",
    "experts/test_distill.py::test_a_training_goes_on_and_ends_in_the_same_bytes": r"^lora$",
    "files/test_kills.py::test_it_befalls_here_and_there": r"^(build|fit)-",
    "files/test_kills.py::test_killed_here_and_there": r"^(build|build over|fit|eval|report|data balance)$",
    "files/test_links.py::test_some_entries_lead_elsewhere": r"^(build|train)$",
    "members/test_come_and_go.py::test_added_is_built_with_it_and_removed_is_built_without": _WHEN_CHANGED,
    "members/test_come_and_go.py::test_the_first_goes_in_place": _WHEN_CHANGED,
    "report/test_card.py::test_the_snippet_asks_a_model_that_knows_conversations": r"^chat_template",
    "sources/test_decoders.py::test_an_expert_has_a_head_of_its_own_and_its_base_none": r"^gpt2$",
    "sources/test_decoders.py::test_an_expert_alone_is_its_own_model": _DECODERS,
    "sources/test_bad_models.py::test_nan_and_inf": r"nan0?$|up_proj",
    "sources/test_families.py::test_an_expert_left_out_is_a_mixture_without_it": _ONE_OF_LLAMA,
    "sources/test_families.py::test_weights_are_those_that_the_layers_use": _ONE_OF_LLAMA,
    "sources/test_wrappers.py::test_one_recipe_of_every_form": r"-base$|^gemma3-",
    "sources/test_wrappers.py::test_text_is_generated_as_in_one_pass": r"^(qwen3_5|gemma4 shared)$",
    "text/test_template_process.py::test_the_child_ends_with_its_parent": r"^killed-computing$",
    "training/test_train.py::test_a_damaged_state_says_what_to_remove": r"content2|cut short",
    "training/test_train.py::test_a_kill_after_the_last_step_is_gone_on_from_too": r"^True-after",
}
"""File and test -> a pattern for the cases that `make test` runs."""


def mark_sampled(items: list[pytest.Item]) -> None:
    """Mark the cases slow that are not for `make test`."""
    for item in items:
        name, _, case = item.nodeid.removeprefix("tests/").partition("[")
        pattern = SAMPLED.get(name)
        if pattern is not None and (pattern == nothing or not re.search(pattern, case.removesuffix("]"))):
            item.add_marker("slow")
