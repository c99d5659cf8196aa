"""Result files of a run: train_results.json, the card, training_args.json last."""

import json
import logging
from pathlib import Path
from typing import Any

from fastchat_qlora.training.callbacks.step_monitor import find_evaluation
from fastchat_qlora.training.callbacks.throughput import peak_memory_mib
from fastchat_qlora.training.checkpoints.checkpoint_writer import TRAINING_ARGS_FILE, saving
from fastchat_qlora.training.checkpoints.run_fingerprint import fingerprint_base, get_lora_values
from fastchat_qlora.training.report.model_card import write_model_card
from fastchat_qlora.training.report.report_data import RunSummary
from fastchat_qlora.utils.atomic import write_atomically
from fastchat_qlora.utils.text import mask_secrets

logger = logging.getLogger(__name__)


def write_results(summary: RunSummary, metrics: dict[str, Any]) -> None:
    """Write the results, with an evaluation of the adapter if there is data for it; every process must call this.

    Tokens and their rates are those of the whole run, whose last step has been logged; `train_` those of this process.
    """
    trainer, output_dir = summary.trainer, Path(summary.args.training.output_dir)
    if trainer.eval_dataset is not None:
        found = find_evaluation(trainer.state, trainer.best_step or trainer.state.global_step)
        metrics = metrics | {name: value for name, value in (found or trainer.evaluate()).items() if name != "step"}
    total, has_trained = trainer.throughput.total, bool(trainer.throughput.seen[0])
    metrics |= {
        "tokens": total.tokens,
        "supervised_tokens": total.supervised,
        "tokens_per_second": round(total.rate, 1),
        "supervised_tokens_per_second": round(total.supervised_rate, 1),
        **({} if total.computed == total.tokens else {"computed_tokens": total.computed}),
        **total.computed_rates,
        "peak_memory_mib": round(peak_memory_mib(trainer.args.device)),
    }
    if not trainer.args.should_save:
        return
    if not has_trained and (output_dir / TRAINING_ARGS_FILE).exists():
        logger.warning("The run had finished before: nothing was left to train, and its results are kept.")
        return
    if not has_trained:  # an earlier process was killed between its last step and its results
        metrics = {name: value for name, value in metrics.items() if not name.startswith("train_")}
    with saving("the results", output_dir):
        trainer.save_state()
        trainer.save_metrics("train", metrics, combined=False)
        write_model_card(output_dir, summary, metrics)
        groups: dict[str, Any] = {name: vars(group) for name, group in summary.args._asdict().items()}
        groups |= {"training": summary.args.training.to_dict(), "effective": summary.effective.settings}
        groups["lora"] = groups["lora"] | get_lora_values(summary.prepared.base.lora_config)
        groups["base_model"] = fingerprint_base(summary.prepared.base_identity)
        groups["processes"] = trainer.args.world_size
        groups["base_quantization"] = summary.prepared.base.quantization.to_dict()
        with write_atomically(output_dir / TRAINING_ARGS_FILE) as target:  # last: a run without it has not finished
            target.write(json.dumps(mask_secrets(groups), indent=2, default=str) + "\n")
