"""Flags and the base model's configuration -> the quantization of the base model, for all who need it."""

import logging
from typing import Any, Literal, NamedTuple, cast

import torch
from transformers import BitsAndBytesConfig

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.distributed.topology import Topology, get_quant_storage
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.quantization.published import (
    BITSANDBYTES_KINDS,
    PublishedQuantization,
    describe_source,
    name_quantization,
)

logger = logging.getLogger(__name__)

QuantizationKind = Literal["none", "nf4", "fp4", "int8"]

NF4_SINGLE_BYTES = 0.5 + 4 / 64  # of a weight with the scale, in fp32, of each block of 64
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # one byte for a scale, and the scale of 256 such scales in fp32
"""QLoRA, arXiv 2305.14314, section 3."""


class BaseQuantization(NamedTuple):
    """The storage of the weights of linear layers."""

    kind: QuantizationKind = "none"  # int8 is LLM.int8
    double_quant: bool = False  # the scales of 4-bit weights are quantized too; False for other kinds
    published: str = "none"  # quantization of the base model's files, as PublishedQuantization.kind has it
    repacked: bool = False  # 4-bit weights of the files are unpacked, and packed again together with all experts

    @property
    def is_quantized(self) -> bool:
        """Whether weights are quantized at all."""
        return self.kind != "none"

    @property
    def is_4bit(self) -> bool:
        """Whether a weight takes four bits."""
        return self.kind in ("nf4", "fp4")

    @property
    def is_as_published(self) -> bool:
        """Whether all weights are in the bits that the base model's files have them in."""
        return self.is_quantized and self.kind == self.published and not self.repacked

    @property
    def values(self) -> str:
        """The quantization that decides the values of the weights, whether they are dequantized or not."""
        if self.repacked:
            return f"repacked {self.kind}"
        return self.published if self.kind == "none" and self.published in BITSANDBYTES_KINDS else self.kind

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a quantized weight with its share of the scales."""
        if not self.is_4bit:
            return 1.0 if self.is_quantized else 0.0
        return NF4_DOUBLE_BYTES if self.double_quant else NF4_SINGLE_BYTES

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; a base model that is not published quantized has none that older runs lack."""
        omitted = (("published", "none"), ("repacked", False))
        return {name: value for name, value in self._asdict().items() if (name, value) not in omitted}

    def __str__(self) -> str:
        text = name_quantization(self.kind, self.double_quant)
        if self.kind == self.published != "none":
            return f"{text}, as published{', packed again with all experts' if self.repacked else ''}"
        return text + describe_source(self.kind, self.published)


NOT_QUANTIZED = BaseQuantization()


def get_base_quantization(lora_args: LoraArguments) -> BaseQuantization:
    """Return the quantization that the flags ask for, of a base model that is not published quantized."""
    if lora_args.load_in_8bit:
        return BaseQuantization("int8")
    if not lora_args.q_lora:
        return NOT_QUANTIZED
    return BaseQuantization(lora_args.bnb_4bit_quant_type, lora_args.bnb_4bit_use_double_quant)


def choose_base_quantization(
    lora_args: LoraArguments, published: PublishedQuantization | None, name: str
) -> BaseQuantization:
    """Return the quantization in which the base model of that name is trained, and log if it is another than published.

    Raises:
        UserError: flags ask for what its files do not give.
    """
    wanted, flag = get_base_quantization(lora_args), f"--model_name_or_path {name}"
    if published is None:
        if lora_args.dequantize_base:
            raise UserError("--dequantize_base True: has no effect, since the base model is not quantized; drop it")
        return wanted
    if not published.is_bitsandbytes or lora_args.dequantize_base or (published.kind == "int8" and wanted.is_4bit):
        chosen = wanted._replace(published=published.kind)
    elif published.kind == "int8" or wanted.kind != "int8":
        kind = cast(QuantizationKind, published.kind)
        return BaseQuantization(kind, published.double_quant, kind, published.packs_experts)
    else:
        raise UserError(
            f"--load_in_8bit True: the base model is published in 4 bits ({published}), from which 8 bits gain "
            "nothing; drop the flag to train it in 4 bits, or give --dequantize_base True in its place"
        )
    weights = f"quantized to {chosen._replace(published='none')}" if chosen.is_quantized else "not quantized again"
    logger.info(f"{flag}: published in {chosen.published}; dequantized while it is loaded, and {weights}.")
    return chosen


def log_published(quantization: BaseQuantization, lora_args: LoraArguments, name: str, method: str) -> None:
    """Log that a base model is trained by this method in its files' quantization, and what is without effect."""
    wanted, flag = get_base_quantization(lora_args), f"--model_name_or_path {name}"
    given = BaseQuantization(quantization.kind, quantization.double_quant)
    how = "packed again with all experts" if quantization.repacked else "trained as it is"
    logger.info(f"{flag}: published in {given}, and {how} ({method}); --dequantize_base True trains it without.")
    if wanted.is_4bit and wanted != given:
        logger.warning(
            f"--bnb_4bit_quant_type {wanted.kind}, --bnb_4bit_use_double_quant {wanted.double_quant}: ignored: the "
            f"base model is published in {given}."
        )


def fit_to_files(
    quantization: BaseQuantization, published: PublishedQuantization | None, name: str
) -> BaseQuantization:
    """Return how a base model is loaded in this quantization, or one like it, from the files of that name.

    Raises:
        UserError: its files hold 4-bit weights, and other quantized ones are wanted.
    """
    if published is None:
        return quantization._replace(published="none", repacked=False)
    if quantization.kind == published.kind:
        repacked = quantization.repacked or published.packs_experts
        return quantization._replace(double_quant=published.double_quant, published=published.kind, repacked=repacked)
    quantization = quantization._replace(repacked=False)
    if quantization.is_quantized and published.is_4bit:
        raise UserError(
            f"--model_name_or_path {name}: published in 4 bits ({published}), from which {quantization.kind} cannot be "
            f"made; give --quantization {published.kind}, or none to dequantize it"
        )
    return quantization._replace(published=published.kind)


def build_quantization_config(
    quantization: BaseQuantization, compute_dtype: torch.dtype, storage: torch.dtype | None = None
) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration, or None where weights are not quantized.

    Packed 4-bit weights are stored as the dtype `storage`, bitsandbytes' default if None.
    """
    if not quantization.is_quantized:
        return None
    if not quantization.is_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    from fastchat_qlora.model.quantization.quantizer import ExpertsBitsAndBytesConfig  # it imports bitsandbytes

    stored: dict[str, Any] = {} if storage is None else {"bnb_4bit_quant_storage": storage}
    return ExpertsBitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        **stored,
    )


def build_run_quantization_config(
    lora_args: LoraArguments, quantization: BaseQuantization, compute_dtype: torch.dtype, topology: Topology
) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration of a run; None for plain LoRA."""
    check_weights_can_be_sharded(quantization, topology)
    storage = None
    if quantization.is_4bit and not quantization.is_as_published:
        storage = get_quant_storage(lora_args.bnb_4bit_quant_storage, compute_dtype, topology)
    return build_quantization_config(quantization, compute_dtype, storage)


def warn_of_rounded_activations(quantization: BaseQuantization, accelerator: str | None, what: str) -> None:
    """Log what differs from training on 8-bit weights where activations are rounded in evaluation only.

    On a CPU and on XPU bitsandbytes has no kernel for training with them (0.50.2, `matmul`). This can go once both are
    computed alike.
    """
    if quantization.kind == "int8" and accelerator in (None, "cpu", "xpu"):
        logger.warning(
            "Base model in 8 bits: on this device bitsandbytes rounds activations to 8 bits too, in evaluation only. "
            f"{what} from those of the model in training by up to a fifth of the adapter's effect; with 4 bits they do "
            "not."
        )


def check_weights_can_be_sharded(quantization: BaseQuantization, topology: Topology) -> None:
    """Require that the parallel strategy can shard the base model's weights, if it shards them."""
    if not topology.shards_parameters:
        return
    if quantization.published != "none":
        raise UserError(
            f"{topology.strategy}: a base model that is published quantized ({quantization.published}) cannot be "
            "sharded; choose DDP or ZeRO-2, or give the model in 16 bits, with --q_lora True for 4 bits"
        )
    if quantization.kind == "int8":
        raise UserError("--load_in_8bit True: 8-bit weights cannot be sharded by FSDP or ZeRO-3; use --q_lora True")
