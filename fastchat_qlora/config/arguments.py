"""Argument dataclasses of a run: model, data, training and adapter."""

from dataclasses import MISSING, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import transformers

from fastchat_qlora.config.validation.json_flags import parse_object
from fastchat_qlora.distributed.process_group import open_on_cpu
from fastchat_qlora.distributed.topology import USE_REENTRANT

BARE_IS_TRUE: dict[str, Any] = {"nargs": "?", "const": True}
"""Settings of a boolean flag with default None; HfArgumentParser alone would not accept the bare flag."""


def flag(text: str, default: Any = MISSING, **settings: Any) -> Any:
    """Build a dataclass field that is read from a flag.

    Args:
        text: one sentence for `--help`.
        default: without one the flag is required; a list is copied for each instance.
        settings: further arguments of argparse's `add_argument`.
    """
    metadata = {"help": text, **settings}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """The base model and its tokenizer."""

    model_name_or_path: str = flag("Hub id or local folder of the base model.")
    model_revision: str | None = flag("Branch, tag or commit of the base model on the hub.", None)
    trust_remote_code: bool = flag("Run the code that a model repository brings along.", False)
    padding_side: Literal["right", "left"] = flag("Side on which shorter sequences of a batch are padded.", "right")
    attn_implementation: str = flag(
        "Attention backend by its transformers name (eager, sdpa, ...); auto takes the fastest that keeps "
        "conversations apart.",
        "auto",
    )

    def __post_init__(self) -> None:
        """Leave the commit open; no flag, as `base_identity.choose_commit` chooses it."""
        self.commit: str | None = None

    @property
    def revision(self) -> str:
        """The revision that `from_pretrained` takes."""
        return self.commit or self.model_revision or "main"


@dataclass
class DataArguments:
    """The conversations to train on."""

    data_path: list[str] = flag(
        "ShareGPT, OpenAI or Alpaca records: .json, .jsonl, .csv, .parquet or .arrow files (also .gz, .zst, .bz2, .xz, "
        ".zip), folders (folder:split), or hub datasets (org/name/subset:split@revision); one or several. "
        "a.jsonl#max_samples=1000,share=0.5,repeat=2 uses a part of it or repeats it."
    )
    eval_data_path: list[str] | None = flag("Conversations to evaluate on; same formats.", None)
    columns: dict[str, Any] | str | None = flag(
        "Other names of the records' fields as a JSON object: column -> role (user, assistant, system, reasoning) or "
        'known field, such as \'{"question": "user", "reply": "assistant"}\'.',
        None,
    )
    system_prompt: str = flag("System message of conversations that have none.", "")
    eval_split: float = flag("Conversations held out from the training data for evaluation: share (< 1) or count.", 0.0)
    lazy_preprocess: bool = flag("Check conversations at the start, but tokenize them when they are needed.", False)
    conv_template: str = flag("Prompt template; auto takes the tokenizer's chat template, or else vicuna.", "auto")
    chat_template_kwargs: dict[str, Any] | str | None = flag(
        "Arguments of the chat template as a JSON object, such as '{\"enable_thinking\": false}'; a record's own come "
        "first.",
        None,
    )
    chat_template_date: str = flag(
        "Date that chat templates write, such as 2026-11-30; by default that of the run's first start.", ""
    )
    empty_thoughts: Literal["mask", "train", "prompt"] = flag(
        "Answers without a thought where the prompt asks for one: leave the empty thought out of the loss (mask), "
        "train it, or render the record with the prompt of the mode without thinking.",
        "mask",
    )
    content_tokens: Literal["reject", "allow"] = flag(
        "Records that contain the tokenizer's special tokens as text: reject them, or train on them as they stand.",
        "reject",
    )
    serving_template: str = flag("Chat template (a Jinja file) of the server, with which sequences are compared.", "")
    train_on: Literal["assistant", "last", "all"] = flag(
        "Tokens in the loss: those of all assistant messages, of the last one only, or all tokens.", "assistant"
    )
    overlong: Literal["truncate", "drop", "split", "error"] = flag(
        "What to do with a conversation longer than model_max_length: truncate it after its last complete assistant "
        "turn that fits, drop it, split it into several with the same system message, or stop with an error.",
        "truncate",
    )
    padding_free: bool = flag("Concatenate the conversations of a batch, each attending only to itself.", True)
    packing: bool = flag(
        "Pack complete conversations into sequences of up to model_max_length tokens; a batch counts packed sequences.",
        False,
    )
    micro_batch_tokens: str = flag(
        "Tokens of a forward pass into which an optimizer step is cut: auto (what suits the device, and its memory "
        "allows), a number, or off (per_device_train_batch_size conversations a pass).",
        "auto",
    )
    share_prefixes: str = flag(
        "Compute tokens that sequences of a pass share from their beginning on once: auto (where the model and the "
        "other flags allow it), True (or stop with an error), or False.",
        "auto",
        nargs="?",
        const="True",
    )
    duplicates: Literal["keep", "drop", "error"] = flag(
        "What to do with conversations that stood before, in the same data or, for evaluation, in the training data: "
        "keep and count them, drop them, or stop with an error.",
        "keep",
    )
    max_rejected: float = flag("Share of records that may be rejected before the run refuses to start.", 0.05)
    preprocessing_num_workers: int | None = flag("Processes that tokenize; by default by cores and data.", None)

    def __post_init__(self) -> None:
        """Parse the flags with JSON objects."""
        self.columns = parse_object(self.columns)
        self.chat_template_kwargs = parse_object(self.chat_template_kwargs)


@dataclass
class TrainingArguments(transformers.TrainingArguments):  # type: ignore[misc]  # transformers is untyped
    """transformers' TrainingArguments with FastChat's defaults and additions."""

    output_dir: str = flag("Folder for the adapter and the checkpoints.")
    cache_dir: str | None = flag("Cache folder for downloads and for tokenized data.", None)
    optim: str = flag("Optimizer by its transformers name; docs/optimizers.md has all of them.", "adamw_torch")
    optim_target_modules: list[str] | None = flag("Has no effect: modules for GaLore and APOLLO.", None)
    remove_unused_columns: bool = flag("Ignored: losses and order need all columns of the data.", False)
    ddp_find_unused_parameters: bool | None = flag(
        "Search for adapter parameters without gradient in every step; needed for mixtures of experts.", False
    )
    activation_checkpointing: bool | None = flag(
        "Recompute activations in the backward pass to save memory: True, False, or auto (the default), which does so "
        "in as few layers as the device's memory requires.",
        None,
        **BARE_IS_TRUE,
    )
    gradient_checkpointing: bool | None = flag("Older name of activation_checkpointing.", None, **BARE_IS_TRUE)
    router_aux_loss_coef: float | None = flag(
        "Weight of the loss that balances a mixture's use of its experts; by default as the model has it.",
        None,
    )
    compile_layers: bool = flag("Compile each repeated layer separately; pays on a GPU in long runs.", False)
    dataloader_num_workers: int | None = flag("Processes that make batches; 2 with an accelerator, else 0.", None)
    do_train: bool | None = flag("Accepted for old scripts: this program trains.", None, **BARE_IS_TRUE)
    include_num_input_tokens_seen: str = flag(
        "Count the tokens trained on, in the log: all, non_padding, or no.", "no", nargs="?", const="all"
    )
    logging_nan_inf_filter: bool = flag("Leave non-finite losses out of the log; waits for the device.", False)
    parallelism_config: str | None = flag("Not supported: use --deepspeed or --fsdp.", None)
    report_to: list[str] = flag(
        "Where else to log: none, all, tensorboard, wandb and others; one or several.", ["none"]
    )
    restart: bool = flag("Start over although output_dir has checkpoints; they are moved to a folder there.", False)
    trust_checkpoint: bool = flag(
        "Resume without auditing the files that DeepSpeed and DCP unpickle; they may run code.", False
    )
    model_max_length: int = flag("Maximum sequence length in tokens.", 512)
    flash_attn: bool = flag("Use FlashAttention 2; the same as --attn_implementation flash_attention_2.", False)
    sample_prompts: list[str] | None = flag(
        "Prompts that the model answers before and after training, for report.html; one or several.", None
    )
    dry_run: bool = flag("Check everything up to the loading of the weights, then stop.", False)
    print_config: str | None = flag(
        "Write all settings as a YAML file equivalent to this command line, to the terminal or to the file given, and "
        "stop.",
        None,
        nargs="?",
        const="-",
    )

    def __post_init__(self) -> None:
        """Merge the two names of activation checkpointing and set its kind."""
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

    @cached_property
    def _setup_devices(self) -> torch.device:
        """The device of this process; several processes on CPUs have opened their group."""
        if self.use_cpu and self.ddp_backend in (None, "gloo"):
            open_on_cpu(self.ddp_timeout)
        device: torch.device = super()._setup_devices
        return device

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without tokens: Trainer pickles it when it pushes a checkpoint to the hub."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: at most one, since torch's DataParallel copies the model to every GPU in every step."""
        return int(min(1, super().n_gpu))


@dataclass
class LoraArguments:
    """The adapter, and the quantization of the base model."""

    lora_r: int = flag("Rank of the adapter.", 8)
    lora_alpha: int = flag("Scaling of the adapter is lora_alpha / lora_r.", 16)
    lora_dropout: float = flag("Dropout on the adapter's input.", 0.05)
    lora_target_modules: list[str] = flag(
        "Modules that get an adapter: ends of their names, a regular expression of whole names, or all-linear.",
        ["q_proj", "v_proj"],
    )
    lora_target_parameters: list[str] | None = flag(
        "Parameters that get an adapter though they are in no linear layer, by the end of their names.", None
    )
    lora_exclude_modules: list[str] | None = flag(
        "Modules that get no adapter: ends of their names, or a regular expression.", None
    )
    lora_weight_path: str = flag("Start from the adapter in this folder.", "")
    lora_bias: Literal["none", "all", "lora_only"] = flag("Biases to train; lora_only: of adapted modules.", "none")
    q_lora: bool = flag("QLoRA: load the base model in 4 bits.", False)
    use_rslora: bool = flag("Scale by lora_alpha / sqrt(lora_r).", False)
    use_dora: bool = flag("Weight-decomposed adapters (DoRA).", False)
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = flag(
        "Initialization of the adapter; with each of them the model starts as the base model.", "default"
    )
    modules_to_save: list[str] | None = flag("Modules to train fully and save too, such as lm_head.", None)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag("4-bit data type.", "nf4")
    bnb_4bit_use_double_quant: bool = flag("Quantize the quantization constants too.", True)
    bnb_4bit_quant_storage: Literal["auto", "uint8", "float16", "bfloat16", "float32"] = flag(
        "Storage dtype of 4-bit weights; auto is uint8, or the compute dtype where weights are sharded.", "auto"
    )
    load_in_8bit: bool = flag("Load the base model in 8 bits (LLM.int8).", False)
    dequantize_base: bool = flag("Dequantize a base model that is published in 4 or 8 bits while it is loaded.", False)


class RunArguments(NamedTuple):
    """The four argument groups of a run; read-only by convention."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments
