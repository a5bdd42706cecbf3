"""Tests of many alike cases: which of them `make test` runs. The other cases are slow: `make test-all`, and so CI, has them.

Every capability stays in `make test` once, in the cheapest test that shows it; a test of what another test shows as well
has `nothing` here.
"""

from __future__ import annotations

import re

import pytest

nothing = r"^$"
_FEW_ROWS = r"^(llama-mixtral-0|qwen2-qwen2_moe-9|olmo2)"
_INSPECTED = r"^(native|gating|context|everything|feature)(-0)?$|^always (on-0|chosen-2)$"

SAMPLED = {
    "architecture/test_architecture.py::test_half_precision": r"^(token|two contexts|context per feature|sequence)$",
    "architecture/test_architecture.py::test_blocks_compile_without_a_break": r"^context per feature$",
    "architecture/test_encoder_decoder.py::test_a_static_cache_writes_the_same": r"^t5-",
    "architecture/test_encoder_decoder.py::test_it_opens_without_modekit": r"^t5$",
    "architecture/test_mixtures.py::test_every_family_mixes_every_kind_of_expert": r"^llama-|^(gemma2|cohere2|phi3)-all",
    "architecture/test_whole_pairs.py::test_a_fitted_router_sends_each_source_to_one_model": r"^t5-(bigrams|lexical)$",
    "architecture/test_whole_pairs.py::test_every_source_goes_to_the_expert_that_its_router_names_beams_and_all": r"^t5$",
    "building/test_carry.py::test_a_build_again_is_the_same_bytes": nothing,
    "building/test_carry.py::test_a_forced_adapter_is_what_peft_makes_of_it": r"^llama-mixtral0$",
    "building/test_carry.py::test_a_killed_build_goes_on_with_the_channels_that_it_has_written": nothing,
    "building/test_carry.py::test_full_models_are_carried_the_better_the_more_channels": r"^64$",
    "building/test_carry.py::test_training_moves_what_the_base_has_and_no_channel": r"^llama$",
    "building/test_carry.py::test_what_is_left_comes_from_the_output_projection": nothing,
    "building/test_measured_form.py::test_a_plain_checkpoint_is_built_in_every_dtype_and_for_every_size_of_stream": r"dtype0-1",
    "building/test_routed.py::test_copies_of_a_mixture_are_that_mixture": r"^qwen3$",
    "building/test_routed.py::test_members_come_and_go": r"^qwen3$",
    "cli/test_mix.py::test_adapters_without_text_write_it": nothing,
    "docs/test_docs.py::test_the_tutorial_and_the_python_page_run": nothing,
    "docs/test_serve_page.py::test_the_commands_run": nothing,
    "engines/test_gguf.py::test_a_tokenizers_code_is_not_run": r"^Hybrid",
    "engines/test_gguf.py::test_a_window_that_llama_cpp_lacks_is_found": nothing,
    "engines/test_gguf.py::test_another_model_is_no_proof": nothing,
    "engines/test_gguf.py::test_evidence_survives_eight_bits": nothing,
    "engines/test_gguf.py::test_fewer_bits_lose_little": nothing,
    "engines/test_gguf.py::test_llama_cpp_computes_the_same": nothing,
    "engines/test_gguf.py::test_another_end_of_a_text_is_no_other_model": nothing,
    "engines/test_gguf.py::test_mixtures_of_every_other_kind_run_there": r"^(fading|fine-tunes of mixtral)$",
    "engines/test_kept_gguf.py::test_a_strangers_file_is_not_believed": r"^junk$",
    "engines/test_serve.py::test_the_engine_ends_with_the_command": nothing,
    "engines/test_serve.py::test_the_file_is_made_once_and_anew_when_the_router_is": nothing,
    "evaluation/test_inspect.py::test_an_expert_left_out_is_a_mixture_without_it": _INSPECTED,
    "evaluation/test_inspect.py::test_every_mixture_is_inspected": _INSPECTED,
    "evaluation/test_inspect.py::test_padding_and_the_order_of_batches_change_nothing": nothing,
    "evaluation/test_mixtures_of_pairs.py::test_it_is_fitted_scored_and_inspected": r"^t5-(bigrams|per model)$",
    "evaluation/test_translation.py::test_neither_batch_nor_padding_changes_a_translation": r"^3$",
    "experts/test_specialize.py::test_a_training_goes_on_after_a_kill_and_ends_in_the_same_bytes": r"^mlp$",
    "files/test_kills.py::test_it_befalls_here_and_there": r"^build-stuck$",
    "files/test_kills.py::test_killed_here_and_there": r"^(build over|fit)$",
    "files/test_links.py::test_some_entries_lead_elsewhere": r"^build$",
    "files/test_power.py::test_a_build": r"^zeros-over an old one$",
    "files/test_power.py::test_a_fit": r"^cut off$",
    "files/test_power.py::test_who_does_not_wait_for_the_disk_may_lose_what_is_there": nothing,
    "files/test_two_at_once.py::test_a_race_of_two_commands": r"^two that",
    "members/test_come_and_go.py::test_added_is_built_with_it_and_removed_is_built_without": r"lexical$|by pairs$|bits$",
    "members/test_come_and_go.py::test_another_model_in_the_place_of_one": r"^(native lexical|adapters)$",
    "members/test_come_and_go.py::test_the_first_goes_in_place": r"^(native random|everything)$",
    "members/test_whole_plain.py::test_who_comes_and_goes_leaves_no_trace": r"-2$",
    "planning/test_chosen_router.py::test_the_recipe_of_a_build_builds_the_same_bytes": r"^(models|adapters.*)$",
    "report/test_card.py::test_the_snippet_asks_a_model_that_knows_conversations": nothing,
    "report/test_card.py::test_the_snippet_runs": r"^token$",
    "report/test_report.py::test_a_large_mixture_fits_into_a_page": nothing,
    "routing/test_adapter_routers.py::test_a_router_without_data_scores_what_the_adapters_make_of_x": r"^layer-self_attn",
    "routing/test_chat_routing.py::test_a_lexical_router_knows_chats": r"^modekit$",
    "routing/test_chat_routing.py::test_a_mixture_keeps_its_decay": nothing,
    "routing/test_chat_routing.py::test_what_was_kept_before_there_were_chats_does_without_them": r"^bigrams$",
    "routing/test_refit.py::test_a_changed_router_is_what_its_recipe_builds": r"^built(0|3|4|6|7)-",
    "routing/test_write_text.py::test_a_build_writes_fits_and_evaluates": nothing,
    "routing/test_write_text.py::test_another_model_writes_anew": nothing,
    "sources/test_adapters.py::test_parts_of_an_adapter_that_are_not_mixed_are_the_base_s": r"-native$",
    "sources/test_bad_models.py::test_nan_and_inf": r"nan0?$|up_proj",
    "sources/test_decoders.py::test_a_mixture_of_every_class_is_trained_and_taught": r"^(gpt2|modernbert-decoder)$",
    "sources/test_decoders.py::test_a_specialist_of_every_class_learns_by_the_class_s_own_loss": (
        r"^(bloom|falcon|gpt2|gpt_neox|hyperclovax|mamba|modernbert-decoder|mpt)$"
    ),
    "sources/test_decoders.py::test_an_expert_alone_is_its_own_model": r"^(gpt2|bert|gpt_oss|bamba)$",
    "sources/test_decoders.py::test_an_expert_has_a_head_of_its_own_and_its_base_none": r"^gpt2$",
    "sources/test_families.py::test_an_expert_left_out_is_a_mixture_without_it": _FEW_ROWS,
    "sources/test_vocabulary.py::test_an_expert_forced_is_its_own_model_on_the_tokens_that_it_has": r"-True$",
    "sources/test_vocabulary.py::test_experts_with_more_tokens_come_and_go": r"0$",
    "sources/test_wrappers.py::test_one_recipe_of_every_form": r"^(qwen3_5|gemma3|gemma4 shared)-base$",
    "sources/test_wrappers.py::test_text_is_generated_as_in_one_pass": r"^(qwen3_5|gemma4 shared)$",
    "training/test_train.py::test_a_damaged_state_says_what_to_remove": r"^model.*cut short",
    "training/test_train.py::test_a_kill_after_the_last_step_is_gone_on_from_too": nothing,
    "training/test_train.py::test_a_kill_while_the_folder_is_removed_stops_nobody": r"^3$",
    "training/test_train.py::test_a_killed_training_ends_as_if_it_had_not_been_killed": r"^4$",
    "training/test_train.py::test_each_loss_falls_when_it_is_trained_on": r"^(balance|z|forward_kl)$",
    "training/test_train.py::test_only_what_was_named_has_other_bytes": r"-native$|^routers-context$",
    "training/test_train_pairs.py::test_a_training_lowers_the_held_out_loss_and_is_written": r"^t5-token$",
    "weights/test_merge.py::test_a_merged_backbone": r"^float32-(average|task_arithmetic|ties)-\d$|^bfloat16-ties-3$",
}
"""File and test -> a pattern for the cases that `make test` runs."""


_PAIR_FAMILIES = r"^(bart untied|mbart|m2m_100|marian|t5 gated)\b"
FURTHER = {
    "architecture/test_architecture.py": r"^context per model",
    "architecture/test_encoder_decoder.py": _PAIR_FAMILIES,
    "architecture/test_whole_pairs.py": _PAIR_FAMILIES,
    "engines/test_serve.py": r"^adapters-transformers$",
    "planning/test_channels.py": r"^(?!llama-mixtral-0$|qwen2-qwen2_moe-9$)\w+-\w+-\d+$",
}
"""File -> a pattern for the cases that `make test` leaves out of every test that has no line above."""


def mark_sampled(items: list[pytest.Item]) -> None:
    """Mark the cases slow that are not for `make test`."""
    for item in items:
        name, _, case = item.nodeid.removeprefix("tests/").partition("[")
        case, pattern = case.removesuffix("]"), SAMPLED.get(name)
        further = FURTHER.get(name.partition("::")[0])
        if pattern is not None:
            left_out = pattern == nothing or not re.search(pattern, case)
        else:
            left_out = further is not None and re.search(further, case) is not None
        if left_out:
            item.add_marker("slow")
