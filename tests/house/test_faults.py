"""Faults that a run must survive and bad input that it must name: for each, the tests that bring it about."""

import ast

import pytest

from tests.support import ROOT

FAULTS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "kill -9 at a random time, also inside a save: what comes out is the unbroken run's, to the bit",
        (
            "tests/train/test_loop.py::test_ten_kills_at_random_moments_cost_nothing",
            "tests/runs/test_checkpoints.py::test_a_step_that_was_being_written_at_kill_9_is_never_picked",
        ),
    ),
    2: (
        "the newest step cut short, or a file of it missing: named, set aside, the step before is used",
        (
            "tests/runs/test_checkpoints.py::test_every_file_of_a_step_is_vouched_for",
            "tests/runs/test_checkpoints.py::test_with_no_sound_step_left_nothing_starts_over",
            "tests/train/test_loop.py::test_a_damaged_checkpoint_is_gone_back_from",
        ),
    ),
    3: (
        "a bit flipped in any file: found",
        ("tests/runs/test_checkpoints.py::test_a_thousand_flipped_bits_are_found",),
    ),
    4: (
        "gone on within an epoch, at its edge, in the last step: the same rows in the same order",
        (
            "tests/train/test_loop.py::test_broken_off_at_any_step_it_ends_as_the_unbroken_run",
            "tests/stages/test_pipeline.py::test_an_interrupted_run_ends_as_the_unbroken_one",
        ),
    ),
    5: (
        "broken off inside a PPO iteration: the iteration is made again, with the same rollout",
        ("tests/stages/test_pipeline.py::test_an_interrupted_run_ends_as_the_unbroken_one",),
    ),
    6: (
        "a leaf of the state gone or renamed: an error that names it",
        ("tests/runs/test_checkpoints.py::test_leaves_that_do_not_fit_are_named",),
    ),
    7: (
        "SIGTERM, SIGINT, twice in a row: saved and exact, and the second one ends it at once",
        (
            "tests/train/test_loop.py::test_a_signal_in_any_step_of_any_phase_costs_nothing",
            "tests/train/test_loop.py::test_a_second_signal_ends_it_at_once",
        ),
    ),
    8: (
        "a full disk, a read-only folder, a save that fails in the background: an error, and no older step is lost",
        (
            "tests/runs/test_checkpoints.py::test_a_full_disk_costs_the_step_alone",
            "tests/runs/test_checkpoints.py::test_a_folder_that_became_read_only_is_an_error_at_once",
            "tests/runs/test_checkpoints.py::test_a_failed_background_save_is_an_error_and_costs_no_older_step",
        ),
    ),
    9: (
        "one step kept, and a kill before the next is whole: the one is still there",
        ("tests/runs/test_checkpoints.py::test_a_step_that_was_being_written_at_kill_9_is_never_picked",),
    ),
    10: (
        "saved on one layout of devices, loaded on another: the same bits",
        (
            "tests/runs/test_checkpoints.py::test_another_mesh_changes_no_bit",
            "tests/stages/test_hosts.py::test_what_one_topology_saves_any_other_loads_bit_for_bit_and_goes_on_with",
        ),
    ),
    11: (
        "of two processes one is killed or asleep: the other ends in time and names it",
        (
            "tests/parallel/test_hosts.py::test_a_peer_that_is_gone_ends_the_others_and_is_named",
            "tests/parallel/test_hosts.py::test_a_coordinator_that_is_killed_is_named_by_the_others",
        ),
    ),
    12: (
        "the pad token is the EOS: the EOS keeps its label, and generation stops at it",
        (
            "tests/data/test_load.py::test_the_eos_keeps_its_label_where_it_is_the_pad_token_too",
            "tests/data/test_tokenizer.py::test_pad_is_not_eos_and_the_log_says_which_it_is",
            "tests/steps/test_generate.py::test_cached_decode_equals_the_simulation",
        ),
    ),
    13: (
        "a reward score alone and in a batch, padded left and right: equal within 1e-5",
        (
            "tests/models/hf/test_families.py::test_a_reward_score_is_that_of_the_last_real_token_alone_or_in_a_batch",
            "tests/models/test_decoder.py::test_padding_changes_no_logprob",
            "tests/steps/test_reward_step.py::test_padding_columns_row_order_and_completion_order_change_nothing",
        ),
    ),
    14: (
        "learning rate 0, the first minibatch: the ratio is one up to rounding, at temperature 0.7 too",
        (
            "tests/steps/test_ppo_step.py::test_lr_zero_moves_nothing_and_the_ratio_is_one",
            "tests/stages/test_pipeline.py::test_ppo_logs_the_whole_list_and_starts_on_policy",
        ),
    ),
    15: (
        "an answer with or without EOS, or as long as the row: scored at its last real token",
        (
            "tests/models/hf/test_families.py::test_a_reward_score_is_that_of_the_last_real_token_alone_or_in_a_batch",
            "tests/steps/test_reward_step.py::test_a_score_is_read_at_the_last_real_token",
            "tests/core/test_masks.py::test_last_token",
            "tests/core/test_advantages.py::test_shaped_rewards_by_hand",
        ),
    ),
    16: (
        "NaN in a masked slot: loss and gradients finite and unchanged",
        (
            "tests/core/test_logprobs.py::test_nan_at_padding_reaches_neither_loss_nor_gradient",
            "tests/core/test_ppo_losses.py::test_nan_behind_the_mask_changes_neither_loss_nor_gradient",
            "tests/core/test_rankings.py::test_nan_in_a_missing_completion_changes_no_gradient",
            "tests/steps/test_sft_step.py::test_nan_logits_at_padding_reach_no_gradient",
            "tests/steps/test_reward_step.py::test_nan_in_unread_positions_and_missing_completions_changes_nothing",
            "tests/steps/test_experience.py::test_metrics_and_targets_ignore_nan_behind_the_mask",
            "tests/steps/test_ppo_invariants.py::test_nan_behind_the_mask_changes_nothing",
        ),
    ),
    18: (
        "constant rewards, a batch of one, a row that is all masked: finite",
        (
            "tests/core/test_masks.py::test_whiten_of_no_spread_is_finite",
            "tests/core/test_advantages.py::test_gae_of_an_all_masked_row_and_of_constants_is_finite",
            "tests/steps/test_experience.py::test_degenerate_rollouts_are_finite",
            "tests/steps/test_ppo_invariants.py::test_degenerate_rollouts_are_finite",
            "tests/steps/test_sft_step.py::test_rows_without_a_trained_token_are_no_loss",
            "tests/models/test_decoder.py::test_an_all_masked_row_is_finite_and_changes_nothing",
        ),
    ),
    22: (
        "another config on the way (layers, vocabulary, batch, seed): named and refused",
        (
            "tests/runs/test_folder.py::test_what_decides_the_result_may_not_change_on_the_way",
            "tests/runs/test_folder.py::test_another_model_under_the_same_name_is_refused_and_a_checkpoint_names_no_file_outside",
            "tests/stages/test_pipeline.py::test_another_config_is_refused_by_name",
            "tests/runs/test_checkpoints.py::test_leaves_that_do_not_fit_are_named",
        ),
    ),
    23: (
        "an empty file, bad JSON, BOM, half a surrogate, NUL, CRLF, a key twice, wrong types, 1 MB: named or counted",
        (
            "tests/data/test_load.py::test_what_is_no_text_is_named_or_counted_and_the_rest_is_learnt",
            "tests/data/test_load.py::test_nothing_left_is_an_error",
            "tests/data/test_sources.py::test_the_same_rows_from_every_kind_of_file",
            "tests/data/test_sources.py::test_a_bad_line_is_named_and_the_others_are_read",
            "tests/data/test_sources.py::test_a_broken_file_is_named",
            "tests/data/test_sources.py::test_a_row_of_megabytes",
            "tests/data/test_formats.py::test_bad_text_is_found_in_every_column",
        ),
    ),
    24: (
        "an empty prompt or answer, a prompt too long, equal answers, ties only, one completion: counted, no NaN",
        (
            "tests/data/test_load.py::test_rankings_without_a_pair_are_counted_by_reason",
            "tests/data/test_load.py::test_answers_are_cut_at_their_end_and_prompts_at_their_start",
            "tests/data/test_load.py::test_cut_until_nothing_is_left",
            "tests/data/test_formats.py::test_bad_rankings",
            "tests/core/test_rankings.py::test_no_strict_pair_is_no_loss",
            "tests/steps/test_reward_step.py::test_one_completion_none_or_ties_only_is_no_loss",
        ),
    ),
    25: (
        "sequences of 500 lengths: no more programs than buckets, memory flat",
        (
            "tests/data/test_rows.py::test_lengths_compile_for_no_more_widths_than_buckets",
            "tests/stages/test_recompilation.py::test_sft",
            "tests/stages/test_recompilation.py::test_reward_model_and_ppo",
        ),
    ),
    27: (
        "two runs in one folder: the second is refused",
        (
            "tests/stages/test_pipeline.py::test_a_folder_in_use_is_refused",
            "tests/runs/test_checkpoints.py::test_a_run_folder_belongs_to_one_live_process",
            "tests/cli/test_cli.py::test_what_the_user_can_put_right_is_exit_code_2",
        ),
    ),
    28: (
        "a run's name that climbs, percent-encoded dots, a link out of the run: refused, nothing written outside",
        (
            "tests/house/test_security.py::test_a_run_is_where_its_name_says",
            "tests/house/test_security.py::test_a_percent_sign_is_a_percent_sign",
            "tests/house/test_security.py::test_a_link_out_of_the_run_is_refused",
            "tests/runs/test_folder.py::test_another_model_under_the_same_name_is_refused_and_a_checkpoint_names_no_file_outside",
        ),
    ),
    29: (
        "pickles, YAML tags, template escapes, safetensors that lie: a clean error, no code run, memory bounded",
        (
            "tests/house/test_security.py::test_nothing_that_is_read_can_be_run",
            "tests/house/test_security.py::test_pickled_weights_are_never_opened",
            "tests/house/test_security.py::test_code_beside_a_model_is_never_run",
            "tests/house/test_security.py::test_a_yaml_tag_makes_no_object",
            "tests/house/test_security.py::test_a_template_stays_in_its_sandbox",
            "tests/house/test_security.py::test_json_that_is_nested_too_deeply_is_named",
            "tests/models/hf/test_hostile_folder.py::test_a_weights_file_that_lies_is_named_and_takes_no_memory",
            "tests/models/hf/test_hostile_folder.py::test_sizes_that_the_weights_do_not_have_take_no_memory",
            "tests/models/hf/test_hostile_folder.py::test_an_index_reads_nothing_outside_its_folder",
        ),
    ),
    30: (
        "an access token in the environment, and a crash: in no file that was written",
        (
            "tests/house/test_secrets.py::test_a_token_in_the_environment_is_written_nowhere",
            "tests/house/test_secrets.py::test_a_password_in_a_url_is_refused_and_not_repeated",
        ),
    ),
    31: (
        "the clock set back, a cache of programs that is poisoned or unwritable: in order of steps, and goes on",
        (
            "tests/runs/test_metrics.py::test_a_clock_that_is_set_back_changes_no_order",
            "tests/runs/test_metrics.py::test_no_duration_is_taken_from_a_clock_that_can_be_set_back",
            "tests/system/test_environment.py::test_a_poisoned_or_unwritable_cache_is_gone_without",
        ),
    ),
    33: (
        "another jaxlib (.ci/run tries both ends; every family nightly): cached decode is the full forward",
        (
            "tests/models/hf/test_families.py::test_cached_decode_equals_the_full_forward",
            "tests/models/test_decoder.py::test_cached_decode_equals_the_full_forward",
            "tests/tools/test_verify.py::test_a_sound_model_holds",
        ),
    ),
    17: (
        "NaN or infinity from a reward, a loss, a gradient: nothing moves, it is counted, too many in a row end it",
        (
            "tests/steps/test_skipping.py::test_sft_and_reward_steps_leave_a_bad_batch_out",
            "tests/steps/test_skipping.py::test_ppo_leaves_out_the_minibatch_alone_that_is_bad",
            "tests/train/test_loop.py::test_too_many_in_a_row_end_the_run_with_what_it_read",
        ),
    ),
    19: (
        "the policy strays: a guard fires, and the run goes back to the last calm checkpoint",
        (
            "tests/train/test_loop.py::test_a_run_that_strays_goes_back_slower_and_under_a_shorter_leash",
            "tests/train/test_loop.py::test_it_goes_back_so_often_and_no_more",
            "tests/train/test_guards.py::test_a_learning_rate_a_thousand_times_too_high_is_rolled_back_before_any_nan",
            "tests/train/test_guards.py::test_a_milder_rate_after_a_rollback_lets_the_run_end",
        ),
    ),
    20: (
        "a reward that can be had for length or for one token: the length, repetition and entropy guards",
        (
            "tests/train/test_guards.py::test_a_reward_for_length_trips_the_length_guard_and_the_sampler_is_not_suspected",
            "tests/train/test_guards.py::test_a_reward_for_one_token_trips_repetition_and_entropy",
        ),
    ),
    21: (
        "a sampler that masks the stop token, cuts the distribution or has old weights: an alarm that names the cause",
        (
            "tests/train/test_guards.py::test_a_sampler_that_is_not_the_policy_is_named_as_the_cause",
            "tests/train/test_guards.py::test_a_reward_for_length_trips_the_length_guard_and_the_sampler_is_not_suspected",
        ),
    ),
    26: (
        "200 saves: no memory, file or thread is kept",
        ("tests/runs/test_checkpoints.py::test_two_hundred_saves_leak_nothing",),
    ),
    32: (
        "a checkpoint of an earlier format is read, one of a later format named",
        (
            "tests/runs/test_checkpoints.py::test_a_step_that_an_earlier_version_wrote_is_read",
            "tests/runs/test_checkpoints.py::test_a_step_of_another_format_is_left_where_it_is",
        ),
    ),
}
"""Number: the fault and what must be seen, and the tests that show it."""


@pytest.mark.parametrize("number", FAULTS)
def test_every_fault_has_its_tests(number: int) -> None:
    fault, tests = FAULTS[number]
    assert fault
    assert tests
    for test in tests:
        path, name = test.split("::")
        functions = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert name in {function.name for function in functions}, test
