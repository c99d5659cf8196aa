"""One training run, from top to bottom."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.validation.json_flags import parse_object
from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.distributed.process_group import host_group, process_group
from fastchat_qlora.distributed.topology import Topology, get_device_map, get_topology
from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.loading.base_model import get_compute_dtype, load_model, set_router_loss
from fastchat_qlora.model.quantization.weight_shares import check_quantized_share, count_quantized
from fastchat_qlora.training.callbacks.activation_checkpointing import AutoCheckpointing
from fastchat_qlora.training.callbacks.effective_settings import EffectiveSettings
from fastchat_qlora.training.callbacks.gradient_guards import GradientGuard, LossGuard
from fastchat_qlora.training.callbacks.progress import disable_bars_without_terminal, show_progress
from fastchat_qlora.training.callbacks.sample_generations import SampleGenerations, encode_prompts
from fastchat_qlora.training.callbacks.sanity_check import SanityCheck, run_sanity_check
from fastchat_qlora.training.callbacks.step_monitor import LateEvaluation, StepMonitor
from fastchat_qlora.training.callbacks.throughput import FirstStepClock, ThreadsByLoad
from fastchat_qlora.training.checkpoints.checkpoint_writer import PrepareOutputDir
from fastchat_qlora.training.checkpoints.output_lock import lock_output_dir
from fastchat_qlora.training.report.html_report import RunReport
from fastchat_qlora.training.report.report_data import RunSummary
from fastchat_qlora.training.report.results import write_results
from fastchat_qlora.training.setup import PreparedRun, prepare
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.free_cores import FreeCores
from fastchat_qlora.utils.signals import StopSignals

logger = logging.getLogger(__name__)


def train(args: RunArguments) -> Path:
    """Train an adapter, and return its folder.

    Raises:
        UserError: the model, the data or the adapter asked for cannot be used; no weights were loaded.
        RunError: the run was stopped, or what it saved cannot be trusted.
        Stopped: a signal has ended it; there is a checkpoint if a step was done.
    """
    training_args, output_dir = args.training, Path(args.training.output_dir)
    topology, dtype = get_topology(training_args), get_compute_dtype(training_args)
    disable_bars_without_terminal()
    writes = topology.is_main and not training_args.dry_run
    with process_group(topology), StopSignals() as signals, lock_output_dir(output_dir, is_main=writes):
        prepared = prepare(args, topology, dtype)
        prompts = _encode_sample_prompts(args, prepared)
        if training_args.dry_run:
            logger.info("Dry run: everything is right up to here; the weights are not loaded.")
            return output_dir
        monitor = StepMonitor(signals, host_group(training_args.ddp_timeout))
        set_seed(training_args.seed)  # the adapter's first values are random
        cores = FreeCores()  # the processes that tokenized have ended
        model = _load_model(args, prepared, topology, dtype)
        clock, threads = FirstStepClock(), ThreadsByLoad(cores)
        trainer = _build_trainer(args, prepared, model, [GradientGuard(), LossGuard(), clock, threads])
        threads.on_step_begin(training_args)  # for the start-up check
        run_sanity_check(trainer)
        published, template = prepared.base.quantization.published, prepared.data.loaded.train.template
        effective = EffectiveSettings(trainer, topology, prepared.base.sizes, published, template)
        answers = SampleGenerations(trainer, prompts)
        summary = RunSummary(trainer, args, prepared, effective)
        report, checkpoint = RunReport(summary, answers), prepared.checkpoint
        trainer.add_callback(SanityCheck(trainer))
        if prepared.model_cost is not None:
            trainer.add_callback(AutoCheckpointing(trainer, prepared.model_cost))
        monitor.trainer = trainer
        for callback in (effective, monitor, PrepareOutputDir(trainer, checkpoint), answers, report):
            trainer.add_callback(callback)
        show_progress(trainer)
        trainer.add_callback(LateEvaluation(trainer))
        with report:
            with signals.deferred():
                result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.folder))
                monitor.raise_if_stopped()
                trainer.save_model()  # before anything else can go wrong
            write_results(summary, result.metrics | clock.metrics)
            answers.generate_after(report.is_written)
        if training_args.push_to_hub:
            trainer.push_to_hub(commit_message="Adapter")
    logger.info(f"The adapter is in {output_dir}.")
    return output_dir


def _encode_sample_prompts(args: RunArguments, prepared: PreparedRun) -> Any:
    template_kwargs = parse_object(args.data.chat_template_kwargs)
    tokenizer, config = prepared.data.tokenizer, prepared.base.config
    return encode_prompts(
        args.training.sample_prompts or (), tokenizer, config, template_kwargs, args.data.system_prompt
    )


def _load_model(args: RunArguments, prepared: PreparedRun, topology: Topology, dtype: torch.dtype) -> Any:
    loading = prepared.loading
    commit = f" at commit {args.model.commit}" if args.model.commit else ""
    logger.info(f"Loading the weights of {args.model.model_name_or_path}{commit}.")
    model = load_model(
        args.model,
        dtype=dtype,
        quantization=loading.quantization,
        device_map=get_device_map(topology, quantized=prepared.base.quantization.is_quantized),
        attn_implementation=loading.attention,
        cache_dir=args.training.cache_dir,
    )
    if args.lora.q_lora and prepared.base.quantization.is_4bit:
        check_quantized_share(count_quantized(model, prepared.base.sizes), dtype)
    if args.training.router_aux_loss_coef is not None:
        set_router_loss(model.config, args.training.router_aux_loss_coef)
    return attach_adapter(
        model, prepared.base.lora_config, args.lora.lora_weight_path, excluded_classes=loading.sharded_classes
    )


def _build_trainer(
    args: RunArguments, prepared: PreparedRun, model: Any, callbacks: list[TrainerCallback]
) -> LoraTrainer:
    tokenizer = prepared.data.tokenizer
    return LoraTrainer(
        model=model,
        args=args.training,
        train_dataset=prepared.train_dataset,
        eval_dataset=prepared.eval_dataset,
        data_collator=Collator(
            tokenizer, padding_free=args.data.padding_free, share_prefixes=not prepared.loading.separation
        ),
        processing_class=tokenizer,
        callbacks=callbacks,
        fingerprint=prepared.fingerprint,
        shapes=prepared.shapes,
        stop_tokens=prepared.stop_tokens,
        source_names=prepared.data.source_names,
        cutting=prepared.cutting,
    )
