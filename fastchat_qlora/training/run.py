"""One training run, from top to bottom."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import set_seed

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.distributed.process_group import host_group, process_group
from fastchat_qlora.distributed.topology import get_device_map, get_topology
from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.loading.base_model import get_compute_dtype, load_model
from fastchat_qlora.training.callbacks.activation_checkpointing import AutoCheckpointing
from fastchat_qlora.training.callbacks.effective_settings import EffectiveSettings
from fastchat_qlora.training.callbacks.gradient_guards import GradientGuard, LastStepLog, LossGuard
from fastchat_qlora.training.callbacks.progress import disable_bars_without_terminal, show_progress
from fastchat_qlora.training.callbacks.sample_generations import SampleGenerations, encode_prompts
from fastchat_qlora.training.callbacks.sanity_check import SanityCheck, run_sanity_check
from fastchat_qlora.training.callbacks.startup_timer import FirstStepClock
from fastchat_qlora.training.callbacks.step_monitor import StepMonitor
from fastchat_qlora.training.callbacks.throughput import peak_memory_mib
from fastchat_qlora.training.checkpoints.checkpoint import RESULTS, ClearTheWay, saving
from fastchat_qlora.training.checkpoints.output_lock import lock_output_dir
from fastchat_qlora.training.report.html_report import RunReport
from fastchat_qlora.training.report.model_card import write_model_card
from fastchat_qlora.training.setup import PreparedRun, prepare
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.signals import StopSignals
from fastchat_qlora.utils.text import mask_secrets

logger = logging.getLogger(__name__)


def train(args: RunArguments) -> Path:
    """Train an adapter.

    Returns:
        The folder that the adapter lies in.

    Raises:
        UserError: the model, the data or the adapter asked for cannot be used; nothing was loaded.
        RunError: the run was stopped, or what it saved cannot be trusted.
        Stopped: a signal has ended it; there is a checkpoint if a step was done.
    """
    model_args, data_args, training_args, lora_args = args
    output_dir = Path(training_args.output_dir)
    topology = get_topology(training_args)
    dtype = get_compute_dtype(training_args)
    writes = topology.is_main and not training_args.dry_run
    disable_bars_without_terminal()
    with process_group(topology), StopSignals() as signals, lock_output_dir(output_dir, is_main=writes):
        prepared = prepare(args, topology, dtype)
        prompts = encode_prompts(training_args.sample_prompts or (), prepared.data.tokenizer, prepared.base.config)
        if training_args.dry_run:
            logger.info("Dry run: nothing is wrong up to here; the weights are not loaded.")
            return output_dir
        watch = StepMonitor(signals, host_group(training_args.ddp_timeout))
        set_seed(training_args.seed)  # the adapter's first values are random
        loading, checkpoint = prepared.loading, prepared.checkpoint
        logger.info(f"Loading the weights of {model_args.model_name_or_path}.")
        model = load_model(
            model_args,
            dtype=dtype,
            quantization_config=loading.quantization_config,
            device_map=get_device_map(topology, quantized=prepared.base.quantization.is_quantized),
            attn_implementation=loading.attention,
            cache_dir=training_args.cache_dir,
        )
        clock = FirstStepClock()
        trainer = LoraTrainer(
            model=attach_adapter(
                model, prepared.base.lora_config, lora_args.lora_weight_path, leave=loading.sharded_classes
            ),
            args=training_args,
            train_dataset=prepared.train_dataset,
            eval_dataset=prepared.eval_dataset,
            data_collator=Collator(prepared.data.tokenizer, padding_free=data_args.padding_free),
            processing_class=prepared.data.tokenizer,
            callbacks=[GradientGuard(), LossGuard(), LastStepLog(), clock],
            fingerprint=prepared.fingerprint,
            shapes=prepared.shapes,
            stop_tokens=prepared.stop_tokens,
        )
        run_sanity_check(trainer)
        effective = EffectiveSettings(trainer, topology)
        watch.trainer = trainer
        trainer.add_callback(SanityCheck(trainer))
        if prepared.model_cost is not None:
            trainer.add_callback(AutoCheckpointing(trainer, prepared.model_cost))
        answers = SampleGenerations(trainer, prompts)
        report = RunReport(trainer, args, prepared, effective, answers)
        for callback in (effective, watch, ClearTheWay(trainer, checkpoint), answers, report):
            trainer.add_callback(callback)
        show_progress(trainer)
        with report:
            with signals.deferred():
                result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.folder))
                watch.raise_if_stopped()
                trainer.save_model()  # before anything else can go wrong
            _write_results(trainer, args, prepared, result.metrics | clock.metrics, effective.settings)
            answers.ask_after(report.is_written)
        if training_args.push_to_hub:
            trainer.push_to_hub(commit_message="Adapter")
    logger.info(f"The adapter is in {output_dir}.")
    return output_dir


def _write_results(
    trainer: LoraTrainer, args: RunArguments, prepared: PreparedRun, metrics: dict[str, Any], effective: dict[str, str]
) -> None:
    """Evaluate once more if there is something to evaluate on, and write the account of the run."""
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    real, supervised = trainer.tokens_seen()
    total = trainer.throughput.total
    metrics |= {
        "tokens": real,
        "supervised_tokens": supervised,
        "tokens_per_second": round(total.rate, 1),
        "supervised_tokens_per_second": round(total.supervised_rate, 1),
        "peak_memory_mib": round(peak_memory_mib(trainer.args.device)),
    }
    if not trainer.args.should_save:
        return
    output_dir = Path(trainer.args.output_dir)
    path = output_dir / RESULTS
    if not real and path.exists():
        logger.warning("The run had finished before: nothing was left to train, its results stay as they are.")
        return
    if not real:  # it ended between its last step and this file
        unknown = ("train_", "tokens", "supervised_tokens")
        metrics = {name: value for name, value in metrics.items() if not name.startswith(unknown)}
    groups: dict[str, Any] = {name: vars(group) for name, group in args._asdict().items()}
    groups |= {"training": args.training.to_dict(), "effective": effective, "processes": trainer.args.world_size}
    unfinished = path.with_suffix(".unfinished")
    with saving("the results", output_dir):
        trainer.save_state()
        trainer.save_metrics("train", metrics, combined=False)
        write_model_card(output_dir, args, prepared, trainer.last_figures() | metrics, effective)
        unfinished.write_text(json.dumps(mask_secrets(groups), indent=2, default=str) + "\n", encoding="utf-8")
        unfinished.replace(path)  # last, and at once: a run without it has not finished
