"""The values that every flag is tried with, and where the effect of each is seen; docs/flags.md shows it.

`$base` is the folder of the same run without the flag, `$out` that of the run itself, `$eval` conversations to evaluate
on, `$model` the base model, `$data` the data.
"""

from typing import NamedTuple

from effects import (
    Dropped,
    Effect,
    Elsewhere,
    Files,
    Live,
    Logged,
    OnDevice,
    Order,
    Refused,
    Same,
    Says,
    Setting,
    Shapes,
    Tensors,
    Weights,
)


class Trial(NamedTuple):
    """A flag as typed, without dashes, and its effect.

    Its run and that without the flag have other flags `beside` it. `before` are flags of a run in the same folder that
    came first.
    """

    given: str
    effect: Effect
    beside: str = ""
    processes: int = 1
    before: str = ""
    core: bool = False  # one of those that CI runs: they were broken, or stand for a kind

    @property
    def flag(self) -> str:
        """The flag's name."""
        return self.given.partition(" ")[0]

    @property
    def value(self) -> str:
        """The value as typed; empty for a bare flag."""
        return self.given.partition(" ")[2]


def _find(shapes: Shapes, text: str) -> list[list[int]]:
    return [shape for name, shape in shapes.items() if text in name]


EVALUATED = "--eval_strategy steps --eval_steps 2 --eval_data_path $eval"
CHECKPOINTED = "--save_strategy steps --save_steps 2"
PADDED = "--padding_free False"
RECOMPUTED = "--activation_checkpointing True"
LOSS_ALONE = "ignored: evaluation computes the loss alone"
NO_HUB = Dropped("ignored: needs --push_to_hub True")
PUSHED = Elsewhere("tests/config/test_flag_effects.py::test_pushes_follow_the_flags_of_the_hub")
MACHINES = Elsewhere("tests/config/test_flag_effects.py::test_each_machine_saves_and_logs_as_asked")
WHOLE_COMPILED = Says("compilation        the whole model", "the effective settings: compilation")
LAYERS_COMPILED = Says("compilation        2 of 2 layers, one by one", "the effective settings: compilation")
STEPS = [1, 2, 3, 4]

DURATION = [
    Trial("output_dir $out/deeper", Files(missing="adapter_model.safetensors")),
    Trial("per_device_train_batch_size 3", Live("passes.size", 3)),
    Trial("num_train_epochs 0.2", Logged("loss", [1, 2, 3]), "--max_steps -1"),
    Trial("max_steps 3", Logged("loss", [1, 2, 3]), core=True),
    Trial("max_steps 0", Refused("must be at least 1")),
    Trial("gradient_accumulation_steps 2", Live("passes.size", 4)),
    Trial("micro_batch_tokens off", Live("passes.number", 2), "--gradient_accumulation_steps 2", core=True),
    Trial("micro_batch_tokens 0", Refused("must be auto, off, or a number of tokens, at least 1")),
    Trial("micro_batch_tokens 5", Refused("the longest sequence has")),
]
OPTIMIZER = [
    Trial("learning_rate 2e-3", Live("optimizer.initial_lr", 2e-3)),
    Trial("lr_scheduler_type cosine", Logged("learning_rate", STEPS)),
    Trial("lr_scheduler_type constant", Logged("learning_rate", STEPS, [0.001] * 4)),
    Trial("lr_scheduler_type constant_with_warmup", Logged("learning_rate", STEPS), "--warmup_steps 2"),
    Trial("lr_scheduler_type polynomial", Logged("learning_rate", STEPS)),
    Trial("lr_scheduler_type inverse_sqrt", Logged("learning_rate", STEPS)),
    Trial("lr_scheduler_type cosine_with_restarts", Logged("learning_rate", STEPS)),
    Trial("lr_scheduler_type reduce_lr_on_plateau", Logged("learning_rate", STEPS), EVALUATED),
    Trial("lr_scheduler_type greedy", Logged("learning_rate", STEPS), EVALUATED),
    Trial('lr_scheduler_kwargs {"num_cycles":0.25}', Logged("learning_rate"), "--lr_scheduler_type cosine"),
    Trial('lr_scheduler_kwargs {"power":2.0}', Logged("learning_rate"), "--lr_scheduler_type polynomial"),
    Trial('lr_scheduler_kwargs {"power":2.0}', Refused("not a setting of --lr_scheduler_type linear")),
    Trial("warmup_steps 2", Logged("learning_rate", STEPS, [0.0, 0.0005, 0.001, 0.0005])),
    Trial("warmup_steps 0.5", Logged("learning_rate", STEPS, [0.0, 0.0005, 0.001, 0.0005])),
    Trial("optim sgd", Says("SGD, linear schedule", "the effective settings: optimizer")),
    Trial("optim adafactor", Says("Adafactor, linear schedule", "the effective settings: optimizer")),
    Trial("optim_args momentum=0.5", Tensors(), "--optim sgd"),
    Trial("optim_target_modules all-linear", OnDevice("the optimizers that read it are packages of their own")),
    Trial("weight_decay 0.5", Live("optimizer.weight_decay", 0.5)),
    Trial("adam_beta1 0.5", Live("optimizer.betas", [0.5, 0.999])),
    Trial("adam_beta2 0.5", Live("optimizer.betas", [0.9, 0.5])),
    Trial("adam_epsilon 1e-2", Live("optimizer.eps", 0.01)),
    Trial("average_tokens_across_devices False", Tensors(), processes=2),
    Trial("average_tokens_across_devices False", Dropped("ignored: there is only one process")),
    Trial("max_grad_norm 0.01", Tensors()),
    Trial("max_grad_norm 0", Tensors(), "--max_grad_norm 0.01"),
    Trial("label_smoothing_factor 0.1", Logged("loss", STEPS)),
    Trial("neftune_noise_alpha 5", Logged("loss", STEPS), PADDED),
    Trial("neftune_noise_alpha 5", Refused("needs --padding_free False")),
]
PRECISION = [
    Trial("bf16 True", Says("compute dtype      bfloat16", "the effective settings: compute dtype")),
    Trial("fp16 True", Refused("is not supported on a CPU")),
    Trial(
        "bf16_full_eval True",
        Refused("evaluation has the precision of training; give --bf16 True"),
        EVALUATED,
        core=True,
    ),
    Trial("bf16_full_eval True", Same("as in training"), f"--bf16 True {EVALUATED}"),
    Trial("fp16_full_eval True", Refused("evaluation has the precision of training; give --fp16 True"), EVALUATED),
    Trial("tf32 True", Refused("needs an NVIDIA GPU")),
    Trial("tf32 False", Same("a CPU has none")),
]
MEMORY = [
    Trial("activation_checkpointing True", Live("checkpointing.layers", True)),
    Trial("activation_checkpointing", Live("checkpointing.layers", True)),
    Trial("activation_checkpointing False", Same("auto recomputes nothing where memory suffices")),
    Trial("gradient_checkpointing True", Live("checkpointing.layers", True)),
    Trial(
        'activation_checkpointing_kwargs {"use_reentrant":true}', Live("checkpointing.use_reentrant", True), RECOMPUTED
    ),
    Trial(
        'activation_checkpointing_kwargs {"every_n_layers":2}',
        Says("1 of 2 layers", "the effective settings"),
        RECOMPUTED,
    ),
    Trial('activation_checkpointing_kwargs {"preserve_rng_state":false}', Tensors(), RECOMPUTED),
    Trial(
        'activation_checkpointing_kwargs {"determinism_check":"none"}',
        Live("checkpointing.determinism_check", "none"),
        RECOMPUTED,
    ),
    Trial('activation_checkpointing_kwargs {"early_stop":false}', Live("checkpointing.early_stop", False), RECOMPUTED),
    Trial('activation_checkpointing_kwargs {"debug":true}', Live("checkpointing.debug", True), RECOMPUTED),
    Trial(
        'activation_checkpointing_kwargs {"offload":true}',
        Refused("moves activations off a GPU"),
        RECOMPUTED,
        core=True,
    ),
    Trial(
        'activation_checkpointing_kwargs {"early_stop":false}',
        Dropped("ignored: nothing is checkpointed"),
        "--activation_checkpointing False",
    ),
    Trial(
        'gradient_checkpointing_kwargs {"use_reentrant":true}', Live("checkpointing.use_reentrant", True), RECOMPUTED
    ),
    Trial('gradient_checkpointing_kwargs {"offload":true}', Refused("moves activations off a GPU"), RECOMPUTED),
    Trial("torch_compile True", WHOLE_COMPILED),
    Trial("torch_compile_backend aot_eager", Live("compiled", "aot_eager")),
    Trial("torch_compile_backend none_such", Refused("must be one of")),
    Trial("torch_compile_mode default", Live("compiled", "inductor")),
    Trial("torch_compile_mode none_such", Refused("Unrecognized mode=none_such")),
    Trial(
        "torch_compile_mode reduce-overhead",
        Dropped("needs --torch_compile_backend inductor"),
        "--torch_compile_backend eager",
    ),
    Trial("use_liger_kernel True", Refused("its kernels need a GPU")),
    Trial('liger_kernel_config {"rope":true}', Refused("has no effect without --use_liger_kernel True")),
    Trial("use_cache True", Dropped("ignored: training uses no cache"), PADDED, core=True),
    Trial("torch_empty_cache_steps 1", Dropped("ignored: there is no device to empty a cache of")),
    Trial(
        "auto_find_batch_size True",
        Elsewhere("tests/config/test_flag_effects.py::test_passes_become_smaller_until_they_fit"),
    ),
]
LOGGING = [
    Trial("logging_strategy no", Logged("loss", [4])),
    Trial("logging_strategy epoch", Logged("loss", [4])),
    Trial("logging_steps 2", Logged("loss", [2, 4])),
    Trial("logging_steps 0.5", Logged("loss", [2, 4])),
    Trial(
        "logging_steps 2",
        Dropped("--logging_steps 2: ignored: needs --logging_strategy steps"),
        "--logging_strategy epoch",
    ),
    Trial("logging_first_step True", Logged("loss", [1, 4]), "--logging_steps 500"),
    Trial("log_on_each_node False", Dropped("ignored: there is only one machine"), processes=2),
    Trial("log_on_each_node False", MACHINES),
    Trial(
        "logging_nan_inf_filter True",
        Elsewhere("tests/config/test_flag_effects.py::test_filter_leaves_non_finite_losses_out_of_evaluations"),
    ),
    Trial("include_num_input_tokens_seen True", Logged("num_input_tokens_seen", [*STEPS, 4]), core=True),
    Trial("include_num_input_tokens_seen all", Logged("num_input_tokens_seen", [*STEPS, 4]), PADDED, core=True),
    Trial("include_num_input_tokens_seen non_padding", Logged("num_input_tokens_seen", [*STEPS, 4]), PADDED, core=True),
    Trial("include_num_input_tokens_seen no", Same("the default")),
    Trial("include_num_input_tokens_seen some", Refused("must be all, non_padding or no")),
    Trial("log_level info", Says("***** Running training *****", "transformers' messages")),
    Trial("log_level error", Live("verbosity", 40)),
    Trial("log_level_replica info", Live("verbosity", 20, rank=1), processes=2),
    Trial("log_level_replica info", Dropped("ignored: there is only one process")),
    Trial("disable_tqdm True", Elsewhere("tests/training/callbacks/test_progress.py::test_disable_tqdm_hides_the_bar")),
    Trial("report_to tensorboard", Elsewhere("tests/training/test_tensorboard.py::")),
    Trial("report_to swanlab", Elsewhere("tests/training/test_tensorboard.py::")),
    Trial("report_to none tensorboard", Refused("none must stand alone")),
    Trial("run_name first", Dropped("ignored: no --report_to shows it"), core=True),
    Trial("project first", Dropped("ignored: needs --report_to trackio")),
    Trial("trackio_space_id org/space", Dropped("ignored: needs --report_to trackio")),
    Trial("trackio_bucket_id org/bucket", Dropped("ignored: needs --report_to trackio")),
    Trial("trackio_static_space_id org/space", Dropped("ignored: needs --report_to trackio")),
    Trial("debug underflow_overflow", Same("no value is inf or nan")),
    Trial(
        "debug underflow_overflow",
        Says("--debug underflow_overflow: step 2: a value is inf or nan", code=1),
        "--learning_rate 1e30",
        core=True,
    ),
    Trial("debug tpu_metrics_debug", Refused("torch_xla is not installed")),
    Trial("skip_memory_metrics False", Setting("train_results.json", "train_mem_cpu_alloc_delta")),
]
EVALUATION = [
    Trial("eval_strategy steps", Logged("eval_loss", [2, 4]), "--eval_steps 2 --eval_data_path $eval"),
    Trial(
        "eval_strategy epoch",
        Logged("eval_loss", [2, 4]),  # the run without it is evaluated once, at its end
        "--eval_data_path $eval --per_device_train_batch_size 15",
    ),
    Trial("eval_strategy steps", Dropped("ignored: there is nothing to evaluate on")),
    Trial(
        "eval_steps 1",
        Logged("eval_loss", STEPS),
        "--eval_strategy steps --eval_data_path $eval --logging_steps 2",
    ),
    Trial("eval_steps 0.5", Logged("eval_loss", [2, 4]), "--eval_strategy steps --eval_data_path $eval"),
    Trial(
        "eval_steps 2", Dropped("ignored: needs --eval_strategy steps"), "--eval_strategy epoch --eval_data_path $eval"
    ),
    Trial("eval_delay 3", Logged("eval_loss", [4]), EVALUATED),
    Trial("eval_delay 3", Dropped("ignored: needs --eval_strategy"), "--eval_data_path $eval"),
    Trial(
        "per_device_eval_batch_size 3", Elsewhere("tests/training/test_run.py::test_evaluation_is_a_mean_over_tokens")
    ),
    Trial("per_device_eval_batch_size 3", Dropped("ignored: there is nothing to evaluate on")),
    Trial("eval_on_start True", Logged("eval_loss", [0, 2, 4]), EVALUATED),
    Trial("eval_on_start True", Dropped("--eval_on_start True: ignored: there is nothing to evaluate on")),
    Trial("do_eval True", Same("what there is to evaluate on is evaluated at the end"), "--eval_data_path $eval"),
    Trial("do_eval True", Dropped("--do_eval True: ignored: there is nothing to evaluate on")),
    Trial("prediction_loss_only True", Dropped(LOSS_ALONE), EVALUATED),
    Trial("eval_do_concat_batches False", Dropped(LOSS_ALONE), f"{EVALUATED} --per_device_eval_batch_size 3"),
    Trial("eval_use_gather_object True", Dropped(LOSS_ALONE), EVALUATED, processes=2, core=True),
    Trial("eval_accumulation_steps 1", Dropped(LOSS_ALONE), EVALUATED),
    Trial("include_for_metrics inputs loss", Dropped(LOSS_ALONE), EVALUATED),
    Trial("batch_eval_metrics True", Dropped(LOSS_ALONE), EVALUATED),
    Trial("label_names foo bar", Dropped(f"--label_names foo bar: {LOSS_ALONE}"), EVALUATED, core=True),
    Trial(
        "load_best_model_at_end True",
        Elsewhere("tests/faults/test_resuming.py::test_best_checkpoint_is_kept_and_found"),
    ),
    Trial("load_best_model_at_end True", Refused("needs evaluations"), core=True),
    Trial(
        "metric_for_best_model eval_loss",
        Same("it is the default"),
        f"{EVALUATED} {CHECKPOINTED} --load_best_model_at_end True",
    ),
    Trial("metric_for_best_model accuracy", Refused("only the loss is measured")),
    Trial("metric_for_best_model loss", Dropped("ignored: needs --load_best_model_at_end True")),
    Trial(
        "greater_is_better True",
        Says("the largest counts as the best"),
        f"{EVALUATED} {CHECKPOINTED} --load_best_model_at_end True",
    ),
    Trial("greater_is_better False", Dropped("ignored: needs --load_best_model_at_end True")),
]
SAVING = [
    Trial("save_strategy steps", Files("checkpoint-2/optimizer.pt checkpoint-4/optimizer.pt"), "--save_steps 2"),
    Trial("save_strategy epoch", Files("checkpoint-4/optimizer.pt")),
    Trial("save_strategy best", Files("checkpoint-2/optimizer.pt"), f"{EVALUATED} --metric_for_best_model loss"),
    Trial("save_strategy best", Refused("needs evaluations")),
    Trial("save_steps 3", Files("checkpoint-3/optimizer.pt"), "--save_strategy steps"),
    Trial("save_steps 0.5", Files("checkpoint-2/optimizer.pt"), "--save_strategy steps"),
    Trial("save_steps 3", Dropped("ignored: needs --save_strategy steps")),
    Trial("save_total_limit 1", Files(missing="checkpoint-2/optimizer.pt"), CHECKPOINTED),
    Trial("save_total_limit 0", Dropped("--save_total_limit 0: ignored: below 1 there is no limit"), CHECKPOINTED),
    Trial("save_total_limit 1", Dropped("ignored: --save_strategy no saves no checkpoints")),
    Trial("save_only_model True", Files(missing="checkpoint-2/optimizer.pt"), CHECKPOINTED),
    Trial("save_on_each_node True", MACHINES),
    Trial("save_on_each_node True", Dropped("ignored: there is only one machine")),
    Trial("enable_jit_checkpoint True", Dropped("ignored: SIGTERM and SIGINT always save a checkpoint"), core=True),
    Trial("resume_from_checkpoint $out/checkpoint-2", Order(), before=CHECKPOINTED),
    Trial("ignore_data_skip True", Order(), before=f"{CHECKPOINTED} --max_steps 2"),
    Trial(
        "restore_callback_states_from_checkpoint True",
        Dropped("ignored: a resumed run always restores what it needs"),
        before=f"{CHECKPOINTED} --max_steps 2",
    ),
]
HUB = [
    Trial("push_to_hub True", Refused("the hub does not know you")),
    *(
        Trial(given, PUSHED)
        for given in ("push_to_hub True", "hub_model_id org/name", "hub_token x", "hub_revision next")
    ),
    *(Trial(given, PUSHED) for given in ("hub_private_repo True", "hub_strategy end", "hub_strategy checkpoint")),
    *(Trial(given, PUSHED) for given in ("hub_strategy all_checkpoints", "hub_always_push True")),
    *(
        Trial(given, NO_HUB)
        for given in ("hub_model_id org/name", "hub_token x", "hub_strategy end", "hub_revision next")
    ),
    *(Trial(given, NO_HUB) for given in ("hub_always_push True", "hub_private_repo True")),
]
ORDER = [
    Trial("seed 1", Order()),
    Trial("data_seed 7", Order()),
    Trial("full_determinism True", Live("deterministic", True)),
    Trial("train_sampling_strategy sequential", Order()),
    Trial("train_sampling_strategy group_by_length", Order()),
    Trial("train_sampling_strategy batch_rebalance", Order(), "--gradient_accumulation_steps 2"),
    Trial("length_column_name none_such", Dropped("ignored: the lengths of the sequences are known")),
    Trial("dataloader_drop_last True", Order(), "--per_device_train_batch_size 8"),
    Trial(
        "dataloader_drop_last True",
        Same("all is evaluated"),
        "--eval_data_path $eval --per_device_eval_batch_size 4",
        core=True,
    ),
    Trial("dataloader_num_workers 2", Live("loader.num_workers", 2)),
    Trial("dataloader_num_workers 2", Same("the order stays")),
    Trial("dataloader_pin_memory False", Same("a CPU pins nothing")),
    Trial("dataloader_persistent_workers True", Live("loader.persistent_workers", True), "--dataloader_num_workers 1"),
    Trial("dataloader_persistent_workers True", Refused("has no effect without --dataloader_num_workers")),
    Trial("dataloader_prefetch_factor 4", Live("loader.prefetch_factor", 4), "--dataloader_num_workers 1"),
    Trial("dataloader_prefetch_factor 4", Refused("has no effect without --dataloader_num_workers")),
    Trial("dataloader_multiprocessing_context fork", Live("loader.context", "fork"), "--dataloader_num_workers 1"),
    Trial("dataloader_multiprocessing_context spawn", Live("loader.context", "spawn"), "--dataloader_num_workers 1"),
    Trial("dataloader_multiprocessing_context fork", Refused("has no effect without --dataloader_num_workers")),
    Trial("dataloader_in_order False", Refused("the order would depend on time"), core=True),
    Trial("remove_unused_columns True", Dropped("ignored: no column is unused")),
    Trial('accelerator_config {"even_batches":false}', Refused("even_batches must be true")),
    Trial('accelerator_config {"use_seedable_sampler":false}', Refused("use_seedable_sampler must be true"), core=True),
    Trial('accelerator_config {"split_batches":true}', Refused("split_batches must be false")),
    Trial('accelerator_config {"dispatch_batches":true}', Refused("dispatch_batches must be false")),
    Trial('accelerator_config {"non_blocking":true}', OnDevice("copies to a GPU do not wait")),
    Trial(
        'accelerator_config {"gradient_accumulation_kwargs":{"sync_each_batch":true}}',
        Tensors(),
        "--gradient_accumulation_steps 2 --micro_batch_tokens off",
        processes=2,
    ),
    Trial(
        'accelerator_config {"gradient_accumulation_kwargs":{"adjust_scheduler":true}}',
        Refused("Trainer does not read it"),
    ),
    Trial('parallelism_config {"tp_size":2}', Refused("use --deepspeed or --fsdp")),
]
PROCESSES = [
    Trial("use_cpu True", Same("there is only the CPU"), "--use_cpu False"),
    Trial("ddp_find_unused_parameters True", Live("ddp.find_unused_parameters", True), processes=2),
    Trial("ddp_find_unused_parameters True", Dropped("ignored: needs DDP")),
    Trial("ddp_bucket_cap_mb 1", Live("ddp.bucket_bytes", 1 << 20), processes=2),
    Trial("ddp_bucket_cap_mb 1", Dropped("ignored: needs DDP")),
    Trial("ddp_bucket_cap_mb 1", Dropped("ignored: needs DDP"), "--fsdp True", processes=2),
    Trial("ddp_broadcast_buffers False", Live("ddp.broadcast_buffers", False), processes=2),
    Trial("ddp_broadcast_buffers False", Dropped("ignored: needs DDP")),
    Trial("ddp_static_graph True", Live("ddp.static_graph", True), processes=2),
    Trial(
        "ddp_static_graph True",
        Live("ddp.static_graph", True),
        "--gradient_accumulation_steps 2 --micro_batch_tokens off",
        2,
    ),
    Trial("ddp_static_graph True", Dropped("ignored: needs DDP")),
    Trial("ddp_backend gloo", Same("a CPU has no other"), processes=2),
    Trial("ddp_backend nccl", Refused("please use gloo"), processes=2),
    Trial("ddp_backend gloo", Dropped("ignored: there is only one process")),
    Trial("ddp_timeout 100", Dropped("ignored: there is only one process")),
    Trial("ddp_timeout 100", Live("timeout", "0:01:40"), processes=2, core=True),
    Trial("fsdp True", Says("strategy           FSDP2", "the effective settings: strategy"), processes=2),
    Trial("fsdp True", Dropped("ignored: a single process has nothing to shard")),
    Trial("fsdp_config {}", Elsewhere("tests/distributed/test_fsdp_config.py::")),
    Trial("deepspeed zero2.json", Elsewhere("tests/integration/test_strategies.py::")),
    Trial("local_rank 0", Dropped("ignored: launchers give the rank in the environment")),
    Trial("do_train True", Same("this program trains")),
    Trial("do_train False", Refused("this program trains"), core=True),
    Trial("do_predict True", Refused("prediction is not supported")),
]
BASE = [
    Trial(
        "model_name_or_path $model",
        Elsewhere("tests/training/test_run.py::test_plain_peft_gives_the_trained_models_logits"),
    ),
    Trial("model_revision v1", Elsewhere("tests/model/loading/test_model_revision.py::")),
    Trial("model_revision v1", Refused("is a folder")),
    Trial("trust_remote_code True", Elsewhere("tests/faults/test_security.py::")),
    Trial("padding_side left", Setting("tokenizer_config.json", "padding_side", "left"), PADDED),
    Trial("attn_implementation sdpa", Same("auto takes it"), PADDED),
    Trial("attn_implementation eager", Says("attention          eager", "the effective settings: attention"), PADDED),
    Trial("attn_implementation none_such", Refused("must be one of")),
    Trial("flash_attn True", Elsewhere("tests/model/attention/test_attention.py::")),
]
DATA = [
    Trial("data_path $data", Elsewhere("tests/data/test_dataset.py::test_files_are_read_in_order")),
    Trial("eval_data_path $eval", Logged("eval_loss", [4])),
    Trial('columns {"question":"user"}', Elsewhere("tests/data/sources/test_fields.py::")),
    Trial("system_prompt Hello.", Setting("train_results.json", "tokens")),
    Trial("eval_split 4", Logged("eval_loss", [4])),
    Trial("eval_split 0.2", Logged("eval_loss", [4])),
    Trial("lazy_preprocess True", Elsewhere("tests/data/test_dataset.py::test_lazy_sequences_equal_eager_ones")),
    Trial("lazy_preprocess True", Same("the sequences are the same")),
    Trial("conv_template vicuna", Setting("train_results.json", "tokens")),
    Trial('chat_template_kwargs {"a":1}', Elsewhere("tests/training/test_template_arguments.py::")),
    Trial("chat_template_date 2026-11-30", Elsewhere("tests/training/test_template_dates.py::")),
    Trial("empty_thoughts train", Elsewhere("tests/data/analysis/test_thought_kinds.py::")),
    Trial(
        "content_tokens allow", Elsewhere("tests/data/test_dataset.py::test_special_tokens_in_a_thought_are_allowed")
    ),
    Trial("serving_template template.jinja", Elsewhere("tests/data/analysis/test_serving_parity.py::")),
    Trial("train_on last", Setting("train_results.json", "supervised_tokens")),
    Trial("train_on all", Setting("train_results.json", "supervised_tokens")),
    Trial("overlong drop", Order(), "--model_max_length 64"),
    Trial("overlong split", Order(), "--model_max_length 64"),
    Trial("overlong error", Says("error: --overlong error", code=2), "--model_max_length 64"),
    Trial("padding_free False", Says("padded to the longest conversation", "the effective settings: sequences")),
    Trial("share_prefixes False", Says("computed for each sequence", "the effective settings: shared prefixes")),
    Trial("share_prefixes True", Refused("with that each sequence is computed by itself"), PADDED),
    Trial("packing True", Says("packed up to 512 tokens", "the effective settings: sequences")),
    Trial("duplicates drop", Elsewhere("tests/data/test_selection.py::test_duplicates_are_dropped")),
    Trial("duplicates error", Elsewhere("tests/data/test_selection.py::test_duplicates_are_an_error")),
    Trial("max_rejected 0", Elsewhere("tests/data/test_dataset.py::test_run_stops_above_max_rejected")),
    Trial("preprocessing_num_workers 2", Elsewhere("tests/data/test_dataset.py::test_workers_make_the_same_sequences")),
    Trial("model_max_length 64", Setting("train_results.json", "tokens")),
]
OWN = [
    Trial("cache_dir ~/cache", Elsewhere("tests/data/tokenization/test_cache.py::")),
    Trial("router_aux_loss_coef 0.1", Elsewhere("tests/training/test_mixtures.py::")),
    Trial("compile_layers True", LAYERS_COMPILED),
    Trial("restart True", Says("does not resume from checkpoint-2, checkpoint-4: moved to"), before=CHECKPOINTED),
    Trial("trust_checkpoint True", Elsewhere("tests/faults/test_security_checkpoints.py::")),
    Trial("sample_prompts Hello", Elsewhere("tests/training/callbacks/test_sample_generations.py::")),
    Trial("dry_run True", Files(missing="adapter_model.safetensors")),
    Trial("print_config", Elsewhere("tests/config/test_print_config.py::")),
    Trial("lora_r 4", Weights("a rank of 4", lambda shapes: _find(shapes, "lora_A")[0][0] == 4)),
    Trial("lora_alpha 32", Logged("loss", STEPS)),
    Trial("lora_dropout 0", Tensors()),
    Trial("lora_target_modules q_proj", Weights("those of q_proj", lambda shapes: not _find(shapes, "mlp"))),
    Trial("lora_target_parameters experts.gate_up_proj", Elsewhere("tests/model/adapter/test_targets.py::")),
    Trial("lora_exclude_modules q_proj", Weights("none of q_proj", lambda shapes: not _find(shapes, "q_proj"))),
    Trial("lora_weight_path $base", Logged("loss")),
    Trial("lora_bias all", Elsewhere("tests/model/adapter/test_lora.py::test_biases_are_trained_as_asked")),
    Trial("q_lora True", Says("quantized weights  nf4", "the effective settings: quantized weights")),
    Trial("use_rslora True", Logged("loss", STEPS)),
    Trial("use_dora True", Weights("magnitudes", lambda shapes: _find(shapes, "lora_magnitude_vector"))),
    Trial("init_lora_weights gaussian", Tensors()),
    Trial("init_lora_weights orthogonal", Tensors()),
    Trial("modules_to_save lm_head", Weights("lm_head", lambda shapes: _find(shapes, "lm_head"))),
    Trial("bnb_4bit_quant_type fp4", Says("fp4", "the effective settings: quantized weights"), "--q_lora True"),
    Trial("bnb_4bit_quant_type fp4", Refused("has no effect without --q_lora True")),
    Trial("bnb_4bit_use_double_quant False", Tensors(), "--q_lora True"),
    Trial(
        "bnb_4bit_quant_storage float32",
        Says("stored as float32", "the effective settings: quantized weights"),
        "--q_lora True",
    ),
    Trial("load_in_8bit True", Says("LLM.int8", "the effective settings: quantized weights")),
    Trial("dequantize_base True", Elsewhere("tests/training/test_published_bases.py::")),
]
TRAINING = [*DURATION, *OPTIMIZER, *PRECISION, *MEMORY, *LOGGING, *EVALUATION, *SAVING, *HUB, *ORDER, *PROCESSES]
TRIALS = [*TRAINING, *BASE, *DATA, *OWN]
"""All trials: of transformers' flags, then of this program's own."""
