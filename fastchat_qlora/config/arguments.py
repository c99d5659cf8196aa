"""Command line -> four groups of arguments. Everything that can be refused by looking at them is refused here."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import transformers
from transformers import HfArgumentParser
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fastchat_qlora.config.fast_help import read_flags
from fastchat_qlora.config.flag_parsing import FlagParser, object_of_a_library, raise_errors
from fastchat_qlora.config.group_building import build_groups
from fastchat_qlora.config.legacy_flags import normalize_flag
from fastchat_qlora.config.resolve import adapt_to_machine
from fastchat_qlora.config.validation.deepspeed import find_refused
from fastchat_qlora.config.validation.json_flags import json_object
from fastchat_qlora.config.validation.paths import check_writable
from fastchat_qlora.distributed.deepspeed_config import find_deepspeed_contradictions
from fastchat_qlora.distributed.topology import USE_REENTRANT

logger = logging.getLogger(__name__)

Own = TypeVar("Own")


@dataclass
class ModelArguments:
    """The base model and its tokenizer."""

    model_name_or_path: str = field(metadata={"help": "Hub id or local folder of the base model."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model repository brings along."}
    )
    padding_side: Literal["right", "left"] = field(
        default="right", metadata={"help": "Side on which shorter conversations of a batch are padded."}
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "Attention backend as transformers names it (eager, sdpa, ...); auto takes the fastest that keeps "
            "conversations apart."
        },
    )


@dataclass
class DataArguments:
    """The conversations to learn from."""

    data_path: list[str] = field(
        metadata={
            "help": "ShareGPT, OpenAI or Alpaca records: .json, .jsonl or .parquet files (also .gz, .zst), folders, or "
            "hub datasets (name or name:split); one or several."
        }
    )
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "Conversations to evaluate on; same formats."}
    )
    eval_split: float = field(
        default=0.0,
        metadata={"help": "Conversations taken off the training data to evaluate on: a share (< 1) or a count."},
    )
    lazy_preprocess: bool = field(
        default=False,
        metadata={
            "help": "Check every conversation at the start, keep only its text, and tokenise it when it is asked for."
        },
    )
    conv_template: str = field(
        default="auto",
        metadata={
            "help": "Prompt template by name; auto takes the tokenizer's chat template if it has one, else vicuna."
        },
    )
    train_on: Literal["assistant", "last", "all"] = field(
        default="assistant",
        metadata={
            "help": "What is learnt: every answer of the assistant, only the last one, or every token of the text."
        },
    )
    overlong: Literal["truncate", "drop", "split", "error"] = field(
        default="truncate",
        metadata={
            "help": "A conversation longer than model_max_length: cut after its last whole assistant turn that fits, "
            "drop it, split it into several with the same system message, or stop with the list."
        },
    )
    padding_free: bool = field(
        default=True,
        metadata={"help": "Lay the conversations of a batch end to end in one row, each attending only to itself."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Fill rows of model_max_length with as many whole conversations as fit; a batch is of rows."},
    )
    max_rejected: float = field(
        default=0.05, metadata={"help": "Share of records that may be rejected before the run refuses to start."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; by default as the cores and the data ask for."}
    )


BARE_IS_TRUE = {"nargs": "?", "const": True}
"""For argparse: a boolean flag without a value, which HfArgumentParser does not see where the default is None."""


@dataclass
class TrainingArguments(transformers.TrainingArguments):  # type: ignore[misc]  # transformers is untyped
    """transformers' TrainingArguments with FastChat's defaults and additions."""

    output_dir: str = field(metadata={"help": "Folder for the adapter and the checkpoints."})
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder for downloads and for tokenised data."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, by its transformers name."})
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Drop dataset columns the model does not know; off, since the collator takes what it needs."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Search for adapter tensors without gradient at every step; needed for mixtures of experts."},
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute activations again in backward rather than keep them: True, False, or auto (the default): "
            "in as few layers as the device's memory asks for.",
            **BARE_IS_TRUE,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The older name of activation_checkpointing.", **BARE_IS_TRUE}
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile each repeated layer by itself with torch.compile; pays on a GPU, in runs of many steps."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that make batches; by default 2 beside an accelerator and none on the CPU."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log; waits for the device at every batch."},
    )
    restart: bool = field(
        default=False,
        metadata={"help": "Start anew though output_dir has checkpoints; they are set aside in a folder there."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume without auditing the files that DeepSpeed and DCP unpickle; they may run code."},
    )
    model_max_length: int = field(default=512, metadata={"help": "Longest row of tokens to train on."})
    flash_attn: bool = field(
        default=False, metadata={"help": "Use FlashAttention 2; the same as --attn_implementation flash_attention_2."}
    )
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Questions that the model answers before and after training, for report.html; one or several."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything up to the loading of the weights, then stop."}
    )
    print_config: str | None = field(
        default=None,
        metadata={
            "help": "Write all settings as a YAML file that stands for this command line, to the terminal or to the "
            "file named, and stop.",
            "nargs": "?",
            "const": "-",
        },
    )

    def __post_init__(self) -> None:
        """Checkpointing is the same under both of its names, and of the same kind whatever else is set about it."""
        given = [value for value in (self.activation_checkpointing, self.gradient_checkpointing) if value is not None]
        self.auto_checkpointing = not given
        self.activation_checkpointing = self.gradient_checkpointing = bool(given and given[0])
        on_accelerator = not self.use_cpu and torch.accelerator.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if on_accelerator else 0
        super().__post_init__()
        if on_accelerator and self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # batches are copied while the device computes
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # the second until v6
            if hasattr(self, name):
                setattr(self, name, {"use_reentrant": USE_REENTRANT} | (getattr(self, name) or {}))

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled of them: Trainer does so when it pushes a checkpoint, and tokens are not for the hub."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one at most, for torch's DataParallel copies the model to every GPU at every step."""
        return int(min(1, super().n_gpu))


@dataclass
class LoraArguments:
    """The adapter, and the quantisation of the base under it."""

    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter, as lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Modules that get an adapter, by the end of their names, or all-linear."},
    )
    lora_weight_path: str = field(default="", metadata={"help": "Start from the adapter in this folder."})
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "Biases to train: none, all, or those of the adapted modules."}
    )
    q_lora: bool = field(default=False, metadata={"help": "QLoRA: load the base in 4 bits."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed adapters (DoRA)."})
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = field(
        default="default",
        metadata={"help": "Initial values of the adapter; all of them leave the base model as it is."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole beside the adapter, such as lm_head."}
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "4-bit number format."})
    bnb_4bit_use_double_quant: bool = field(default=True, metadata={"help": "Quantise the quantisation constants too."})
    bnb_4bit_quant_storage: Literal["auto", "uint8", "float16", "bfloat16", "float32"] = field(
        default="auto",
        metadata={
            "help": "Storage type of 4-bit weights; auto is uint8, or the compute dtype where weights are sharded."
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base in 8 bits (LLM.int8)."})


class RunArguments(NamedTuple):
    """The four groups of one run; read-only by convention."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments


DESCRIPTION = (
    "Flags may also stand in a YAML or JSON file that comes first, as in `run.yaml --learning_rate 1e-4`; those behind "
    "it win."
)


class LiveParser(FlagParser, HfArgumentParser):  # type: ignore[misc]  # transformers is untyped
    """HfArgumentParser with this program's way of telling mistakes."""

    def __init__(self, groups: Sequence[type], prog: str) -> None:
        HfArgumentParser.__init__(self, groups, prog=prog, description=DESCRIPTION, allow_abbrev=False)
        replaced = {"dict": json_object, "ParallelismConfig": object_of_a_library}  # neither is made of a text
        for action in self._actions:
            action.type = replaced.get(getattr(action.type, "__name__", ""), action.type)
        self.own_flags = [f"--{name}" for group in groups for name in group.__annotations__]
        self.groups = {
            (group.__doc__ or "").partition("\n")[0]: [field.name for field in fields(group) if field.init]
            for group in RunArguments.__annotations__.values()
        }


def build_parser(prog: str = "train_lora.py", own: type | None = None) -> LiveParser:
    """The parser over the four groups, and over a command's own one."""
    groups = [*RunArguments.__annotations__.values(), *([own] if own else [])]
    return LiveParser(groups, prog)


def build_command_parser(prog: str, own: type) -> LiveParser:
    """The parser of a command that starts no run: train's flags, of which it needs no `output_dir`, and its own."""
    parser = build_parser(prog, own)
    parser.set_defaults(output_dir=".")
    for action in parser._actions:
        action.required = action.required and action.dest != "output_dir"
    return parser


def parse_args(argv: Sequence[str]) -> RunArguments:
    """Parse and check a command line.

    Args:
        argv: the arguments after the program's name; FastChat's old flag names are accepted.

    Raises:
        UserError: for what can be seen without loading a model or the data; all of it at once, except that a value of
            the wrong type or an old flag without a counterpart ends parsing where it stands.
    """
    arguments, notices, namespace, problems = read_flags(argv, build_parser())
    configuration = namespace.deepspeed
    if not problems:
        notices += adapt_to_machine(namespace)
        problems = check_writable(namespace.output_dir)
    raise_errors(problems)
    args = RunArguments(*build_groups(RunArguments.__annotations__.values(), namespace, arguments))
    if configuration:
        raise_errors(_check_deepspeed(configuration, args.training, arguments))
    for notice in notices:
        logger.warning(notice)
    return args


def parse_command(argv: Sequence[str], prog: str, own: type[Own]) -> tuple[RunArguments, Own]:
    """Parse and check the command line of a command that takes the train command's flags and starts no run.

    `output_dir` may be left out and nothing is written to it; what the machine makes of a run is not told.

    Args:
        argv: the arguments after the command's name.
        prog: the command's name in its help.
        own: the dataclass of the command's own flags.

    Raises:
        UserError: as for parse_args.
    """
    arguments, notices, namespace, problems = read_flags(argv, build_command_parser(prog, own))
    raise_errors(problems)
    configuration = namespace.deepspeed
    adapt_to_machine(namespace)
    for notice in notices:
        logger.warning(notice)
    *groups, last = build_groups([*RunArguments.__annotations__.values(), own], namespace, arguments)
    args = RunArguments(*groups)
    if configuration:
        raise_errors(_check_deepspeed(configuration, args.training, arguments, has_processes=False))
    return args, last


def _check_deepspeed(
    configuration: str, args: TrainingArguments, arguments: Sequence[str], *, has_processes: bool = True
) -> list[str]:
    """What the DeepSpeed configuration says against the flags, and what DeepSpeed would not take.

    The libraries would tell it after loading the weights. The batch of all processes is not looked at where they are
    not there.
    """
    noted = args.hf_deepspeed_config.mismatches
    mismatches = noted if has_processes else [text for text in noted if "ds train_batch_size=" not in text]
    written = {normalize_flag(text.partition("=")[0]) for text in arguments if text.startswith("--")}
    chosen = {
        "optim": OptimizerNames(args.optim).value,
        "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
    }
    given = {name: value for name, value in chosen.items() if f"--{name}" in written}
    found = find_deepspeed_contradictions(args.deepspeed, mismatches, given)
    hint = "; make them the same, or leave one out"
    problems = [f"{problem}{hint}" for problem in found] + find_refused(args.hf_deepspeed_config.config)
    return [f"--deepspeed {configuration}: {problem}" for problem in problems]
