# SPDX-License-Identifier: Apache-2.0
"""The tests that have the marker `ci`: a few seconds each, run by .ci/run.

The fast suite, `pytest`, leaves them out: it has a cheaper case of what each of
them shows. `pytest -m ci` runs them.
"""

# Files whose tests all are, the slow ones too: no change may move a recorded
# number, or the paper's mixture.
CI_FILES = (
  'tests/invariants/test_recorded_losses.py',
  'tests/reference/test_exact.py',
)
# {file: the start of its tests' names}.
CI_TESTS = {
  'tests/benchmarks/test_device_table.py': ('test_',),
  'tests/benchmarks/test_train_step.py': (
    'test_the_naive_side_is_the_same_function_with_the_same_gradients',
  ),
  'tests/checkpoints/hf/test_merged.py': (
    'test_merged_gives_the_adapted_logits_here_and_in_transformers',
  ),
  'tests/checkpoints/hf/test_peft.py': (
    'test_a_lora_from_kernels_becomes_one_of_twice_the_rank',
  ),
  'tests/checkpoints/t5x/test_files.py': ('test_an_orbax_checkpoint_is_read',),
  'tests/checkpoints/test_asynchronous.py': (
    'test_a_second_save_waits_for_the_first',
    'test_what_is_written_is_the_state_at_the_save_whatever_follows',
  ),
  'tests/checkpoints/test_checksums.py': (
    'test_each_of_forty_flipped_bits_of_the_arrays_is_found',
    'test_eight_devices_save_and_one_and_four_restore',
  ),
  'tests/checkpoints/test_exported_adapters.py': (
    'test_logits_are_those_of_the_version_that_exported[dora',
  ),
  'tests/checkpoints/test_quantize.py': (
    'test_any_advice_sees_the_decoded_weight',
    'test_memory_falls_to_the_bits_that_are_kept',
  ),
  'tests/checkpoints/test_solve_method.py': ('test_count_prints_the_solved',),
  'tests/contracts/test_adapters.py': ('test_identity_at_initialisation[dora',),
  'tests/contracts/test_bert.py': ('test_',),
  'tests/contracts/test_decoders.py': (
    'test_advice_may_lengthen',
    'test_cached_decoding_equals_uncached[gemma2-chunked',
    'test_cached_decoding_equals_uncached[gpt2',
    'test_cached_decoding_equals_uncached[mistral',
    'test_cached_decoding_equals_uncached_in_bfloat16[gemma2',
    'test_padding_beyond',
    'test_scan_equals_loop',
  ),
  'tests/contracts/test_letters.py': (
    'test_what_depends_on_the_base_and_what_is_vmapped_says_its_letters_too',
  ),
  'tests/contracts/test_models.py': (
    'test_eight_virtual_devices_equal_one',
    'test_the_program_does_not_grow_with_depth',
  ),
  'tests/contracts/test_router_kinds.py': (
    'test_a_loss_of_its_own_is_in_the_training_loss',
    'test_packing_remat_and_accumulation_change_nothing',
    'test_state_follows_the_sums_of_the_batch',
  ),
  'tests/contracts/test_seam.py': (
    'test_a_probe_trains_under_scan_remat_and_jit[mixture-full',
    'test_a_probe_trains_under_scan_remat_and_jit[prefix',
  ),
  'tests/contracts/test_two_pass.py': (
    'test_cached_decoding_equals_uncached',
    'test_it_trains_and_neither_parts_nor_remat_change_that',
  ),
  'tests/core/test_host_memory.py': (
    'test_holes_of_a_real_process_go_back_and_a_buffer_is_kept',
  ),
  'tests/data/batching/test_packing.py': (
    'test_packed_rows_have_the_losses_and_gradients_of_examples_alone',
  ),
  'tests/data/readers/test_seqio.py': (
    'test_a_stream_begins_at_any_place',
    'test_hosts_share_the_examples_out',
    'test_seqio_makes_our_batches_of_our_tasks[train-train',
    'test_seqio_makes_our_batches_of_our_tasks[validation',
    'test_seqio_packs_the_ids_of_our_tasks',
  ),
  'tests/data/test_loader.py': (
    'test_hosts_share_the_windows_among_them',
    'test_worker_processes',
    'test_workers_end_with_a_run_that_is_killed',
  ),
  'tests/data/test_t0_mixtures.py': ('test_real_rows_get_the_rates_of_t0',),
  'tests/docs/test_extending.py': (
    'test_example_runs[api',
    'test_example_runs[callback',
    'test_example_runs[model_family',
    'test_example_runs[objective',
  ),
  'tests/evaluation/routing/test_collect.py': (
    'test_plots_are_of_what_there_is',
    'test_shares_are_those_of_the_metrics_log[',
    'test_shares_of_a_decoder_are_those_of_the_metrics_log',
  ),
  'tests/evaluation/routing/test_command.py': (
    'test_conversations_are_rendered_by_the_chat_template',
    'test_a_wrong_command_line_is_one_sentence',
    'test_a_run_s_held_out_rows_are_routed_and_shown',
    'test_a_reduced_adapter_is_written_and_has_its_loss',
  ),
  'tests/evaluation/routing/test_reduce.py': (
    'test_an_even_mixture_is_one_lora',
  ),
  'tests/evaluation/test_evaluate.py': (
    'test_held_out_rows_have_the_named_metrics',
    'test_lengths_may_be_longer_than_those_of_training',
  ),
  'tests/evaluation/test_greedy_answers.py': (
    'test_answers_are_those_of_a_loop_without_cache_and_padding',
  ),
  'tests/evaluation/test_rank_classification.py': (
    'test_a_router_of_examples_ranks_as_it_was_trained',
  ),
  'tests/inference/adapters/test_bank_rows.py': (
    'test_layers_with_unlike_counts_of_experts_are_served',
    'test_the_first_slot_is_the_base_bit_for_bit[ia3',
  ),
  'tests/inference/adapters/test_pad.py': (
    'test_doras_ratio_is_of_the_weight_that_is_served',
  ),
  'tests/inference/engine/test_cached.py': (
    'test_a_decoders_cached_logits_are_the_uncached[lora',
    'test_a_decoders_cached_logits_are_the_uncached'
    '[molora(experts=3, rank=2, router=random',
    'test_an_encoder_decoders_cached_logits_are_the_uncached',
  ),
  'tests/inference/engine/test_engine.py': (
    'test_every_family_says_what_its_model_says[gemma2',
    'test_every_family_says_what_its_model_says[gpt2',
  ),
  'tests/inference/engine/test_inline.py': (
    'test_a_batch_of_answers_is_that_of_whole_calls',
    'test_log_probs_of_an_encoder_decoder_are_those_of_training',
    'test_new_weights_of_an_encoder_decoder_forget_encoded_inputs',
  ),
  'tests/inference/engine/test_router_inputs.py': (
    'test_beams_have_the_scores',
    'test_tasks_of_a_loss_alone',
  ),
  'tests/inference/engine/test_served_as_trained.py': (
    'test_a_request_in_a_mixed_batch_is_as_alone',
    'test_the_servers_log_probabilities_are_the_trainers',
  ),
  'tests/inference/engine/test_soft_prompts.py': (
    'test_echo_tells_of_the_users_tokens_alone',
    'test_texts_are_found_again_by_the_adapter_and_counted_without_it',
  ),
  'tests/inference/engine/test_stop.py': (
    'test_a_constraint_holds_for_its_request_alone',
    'test_a_constraint_that_fails_ends_its_request_alone',
  ),
  'tests/inference/test_generator.py': (
    'test_all_learned_positions_are_used_and_no_other',
    'test_an_evaluation_uses_all_learned_positions_and_refuses_more',
    'test_answers_to_a_prompt_differ_and_do_not_depend_on_others',
    'test_beams_are_texts_too[decoder',
    'test_evaluations_answer_with_decoders_as_with_t5',
  ),
  'tests/inference/test_soft_prompts.py': (
    'test_cached_answers_are_those_of_whole_texts_behind_the_prompt[t5',
  ),
  'tests/invariants/test_recorded_losses.py': (
    'test_losses_and_gradient_norms_are_those_recorded',
  ),
  'tests/models/test_shape.py': (
    'test_every_kind_of_positions_trains[learned',
  ),
  'tests/moe/test_hash_router.py': (
    'test_an_encoder_decoder_is_served_with_the_ids_of_both',
  ),
  'tests/moe/test_parameter_losses.py': (
    'test_a_step_adds_its_gradient_once_with_accumulation_too',
  ),
  'tests/moe/test_router_stats.py': (
    'test_every_site_counts_the_real_tokens_that_it_reads',
  ),
  'tests/nn/test_attention.py': (
    'test_chunked_holds_no_array_of_queries_and_keys',
  ),
  'tests/nn/test_dropout.py': ('test_layers_do_not_share_first_weights',),
  'tests/objectives/test_packed_preferences.py': (
    'test_packed_answers_have_the_loss_and_gradient_of_answers_alone'
    '[llama-dpo-False',
  ),
  'tests/peft/test_experts_per_layer.py': (
    'test_the_mask_is_that_of_the_layer',
  ),
  'tests/peft/test_initial_factors.py': (
    'test_the_copies_stay_as_they_are_and_the_model_starts_as_the_base',
  ),
  'tests/peft/test_prompt_tuning.py': (
    'test_a_prompt_is_rows_more_of_the_table[t5',
  ),
  'tests/peft/test_shared_routers.py': (
    'test_shared_routers_compute_what_equal_routers_compute',
  ),
  'tests/peft/test_vectors_and_norms.py': (
    'test_a_smaller_frozen_matrix_is_the_corner_of_a_larger_one',
  ),
  'tests/reference/test_exact.py': ('test_exact_logits[official/mov',),
  'tests/reference/test_generation.py': (
    'test_greedy_tokens[gemma2',
    'test_greedy_tokens[t5_v1_0',
  ),
  'tests/reference/test_t5.py': (
    'test_logits[official/molora_top2',
    'test_sequence_log_likelihoods[official/molora_top2',
  ),
  'tests/serve/http/test_prompt.py': ('test_usage_counts_what_the_user_gave',),
  'tests/serve/test_open_engine.py': (
    'test_adapters_come_and_go_without_a_compilation',
  ),
  'tests/sweeps/test_ablations.py': ('test_',),
  'tests/sweeps/test_solving.py': (
    'test_a_trial_that_cannot_be_solved_is_refused_before_any_is_run',
  ),
  'tests/sweeps/test_sweep.py': (
    'test_a_dry_run_prints',
    'test_a_wrong_command_is_refused_before_anything_is_written',
    'test_an_array_job_is_written_and_its_order_is_that_of_select',
  ),
  'tests/test_library.py': ('test_a_merged_model_answers_as_its_adapter_did',),
  'tests/test_packaging.py': (
    'test_source_distribution_holds_every_file_of_python',
    'test_wheel_',
  ),
  'tests/test_structure.py': ('test_the_measure_sees_imports_of_entries',),
  'tests/training/callbacks/test_profiling.py': (
    'test_a_trace_covers_the_steps_that_are_named',
  ),
  'tests/training/callbacks/test_task_routing.py': (
    'test_a_run_of_several_tasks_has_the_map_and_one_of_a_task_none',
  ),
  'tests/training/test_decoder_training.py': (
    'test_a_dry_run_of_text_writes_nothing',
  ),
  'tests/training/test_expert_padding.py': (
    'test_five_steps_equal_those_of_layers_with_their_own_counts'
    '[mixture(expert=lora(rank=3), {}, share=b',
    'test_five_steps_equal_those_of_layers_with_their_own_counts[mov',
  ),
  'tests/training/test_from_adapters.py': (
    'test_an_export_needs_the_files_no_more',
    'test_experts_can_be_trained_further',
  ),
  'tests/training/test_kill.py': ('test_a_signal_saves_the_step_and_leaves',),
  'tests/training/test_preference_training.py': (
    'test_dpo_learns_what_is_preferred_and_tells_it',
  ),
  'tests/training/test_prompt_training.py': (
    'test_a_decoder_is_trained_behind_a_prompt',
  ),
  'tests/training/test_published_methods.py': (
    'test_a_method_learns_what_its_labels_say',
  ),
  'tests/training/test_sft.py': (
    'test_answers_are_learnt_and_judged_again_the_same',
  ),
  'tests/training/test_start_from_run.py': (
    'test_a_run_gives_the_adapter_of_its_latest_checkpoint',
    'test_a_run_that_trained_the_base_has_no_adapter',
  ),
  'tests/training/test_train.py': (
    'test_a_dry_run_goes_on_from_an_adapter_and_writes_no_file',
  ),
  'tests/training/test_vmapped.py': (
    'test_trials_together_take_the_steps_that_they_take_alone'
    '[llama-molora(experts=3, rank=2, targets',
  ),
}
