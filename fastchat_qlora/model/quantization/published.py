"""A model's configuration -> the quantization of its files, or a refusal that says what to use."""

import copy
import importlib.util
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.folder_checks import list_tensors
from fastchat_qlora.model.loading.text_part import has_experts
from fastchat_qlora.model.quantization.packed_integers import (
    INTEGER_PARTS,
    LAYOUT_NAMES,
    PACKED_BITS,
    PACKED_PARTS,
    TORCHAO_PARTS,
    get_layout_name,
    read_layout,
)

BITSANDBYTES_KINDS = ("nf4", "fp4", "int8")
CONFIG_KEYS = ("quantization_config", "compression_config")
DEQUANTIZED_FORMATS = ("fp8", "mxfp8", "mxfp4", "compressed-tensors", *LAYOUT_NAMES)
"""Values of quant_method whose weights are dequantized while they are loaded."""

FORMAT_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "gptq": "GPTQ",
    "gguf": "GGUF",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""quant_method -> the name that its users know; others are named by their quant_method."""

REASONS = {
    "aqlm": "whose layers PEFT fails to train",  # 0.21: RuntimeError, a view is modified in place
    "eetq": "whose layers need a kernel that is code from the hub",
    "hqq": "whose files can no longer be loaded",  # by transformers 5.23: layers keep random weights
    "nvfp4": "whose files cannot be loaded yet",  # by transformers 5.23
}
"""quant_method -> why there is no training on it, where the reason is not ours."""

FOUR_BITS = r"(.+\.weight)\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+)"
PACKED = rf"(.+\.)({'|'.join(PACKED_PARTS)})"
FP8 = r"(.+\.)(weight_scale_inv|weight_scale|qscale_weight|scale|activation_scale|input_scale)"
CONSTANTS = {
    "nf4": FOUR_BITS,
    "fp4": FOUR_BITS,
    "int8": r"(.+\.)(SCB|weight_format)",
    "mxfp4": r"(.+)_(blocks|scales)",
    "fp8": FP8,
    "mxfp8": FP8,
    "compressed-tensors": r"(.+\.)weight_(scale|packed|shape|zero_point|global_scale)",
    **dict.fromkeys(LAYOUT_NAMES, PACKED),
}
"""Kind of quantization -> names of tensors in place of a weight or beside it: the weight's own start, and the rest."""

QUANTIZED_TENSOR = re.compile(
    r".+(\.(weight\.absmax|SCB|weight_scale(_inv)?|weight_packed|qweight|_weight_qdata|weight\._data)|_proj_blocks)"
)
EXPERT_IN_4_BITS = re.compile(r".*\bexperts\.\d+\..+\.absmax")
OTHER_COPIES = "the model in 16 bits, or a copy in bitsandbytes' 4 or 8 bits, GPTQ, AWQ, FP8 or MXFP4"


class PublishedQuantization(NamedTuple):
    """The quantization of a base model's files."""

    kind: str  # nf4, fp4 and int8 of bitsandbytes; else the quant_method
    double_quant: bool
    settings: Mapping[str, Any]  # as config.json has them
    packs_experts: bool = False  # experts are in 4 bits, each by itself; taken for granted of a mixture on the hub

    @property
    def is_bitsandbytes(self) -> bool:
        """Whether the weights are trained on as they are."""
        return self.kind in BITSANDBYTES_KINDS

    @property
    def is_4bit(self) -> bool:
        """Whether the files hold bitsandbytes' 4-bit weights."""
        return self.kind in ("nf4", "fp4")

    def __str__(self) -> str:
        return name_quantization(self.kind, self.double_quant)


def name_quantization(kind: str, double_quant: bool) -> str:
    """Return what users know a quantization by."""
    return f"{kind} with double quantization" if double_quant else kind


def name_format(kind: str) -> str:
    """Return what users know the format of quantized files by."""
    return FORMAT_NAMES.get(kind, kind)


def describe_source(kind: str, published: str) -> str:
    """Return the end of a phrase on weights of this kind: from which published ones they were dequantized, if any."""
    return "" if published in ("none", kind) else f", dequantized from {name_format(published)}"


def read_published_quantization(
    config: PretrainedConfig, name: str, meta_model: PreTrainedModel | None
) -> PublishedQuantization | None:
    """Return the quantization of a model's files; None if its configuration has none.

    Raises:
        UserError: no adapter can be trained on such weights, or configuration and files contradict each other.
    """
    flag, settings = f"--model_name_or_path {name}", find_quantization_settings(config)
    published = None if settings is None else _read_settings(settings, flag)
    names = list_tensors(name)
    check_published_files(published, names, flag)
    if published and published.is_4bit and meta_model is not None and has_experts(meta_model):
        in_4_bits = not names or any(map(EXPERT_IN_4_BITS.fullmatch, names))
        return published._replace(packs_experts=in_4_bits)
    return published


def _read_settings(settings: Any, flag: str) -> PublishedQuantization:
    settings = settings if isinstance(settings, Mapping) else {}
    if settings.get("load_in_4bit") or settings.get("load_in_8bit") or settings.get("quant_method") == "bitsandbytes":
        return _read_bitsandbytes(settings, flag)
    method = settings.get("quant_method")
    if not isinstance(method, str):
        raise UserError(f"{flag}: quantization_config in its config.json has no quant_method; add it there")
    method = method.lower()
    settings = {**settings, "quant_method": method}
    if method == "compressed-tensors":
        _check_compressed_tensors(settings, flag)
    elif method in LAYOUT_NAMES:
        _check_packed(settings, flag)
    elif method not in DEQUANTIZED_FORMATS:
        name, reason = FORMAT_NAMES.get(method, method[:60]), REASONS.get(method, "on which training is not supported")
        raise UserError(f"{flag}: its weights are quantized by {name}, {reason}; give {OTHER_COPIES}")
    return PublishedQuantization(method, False, settings)


def check_published_files(published: PublishedQuantization | None, names: Collection[str], flag: str) -> None:
    """Require that a model's files hold quantized weights if its configuration has a quantization, and only then."""
    if published is None:
        if found := min(filter(QUANTIZED_TENSOR.fullmatch, names), default=None):
            raise UserError(
                f"{flag}: its files hold {found}, so its weights are quantized, and its config.json has no "
                "quantization_config; give a copy that has one, or the model in 16 bits"
            )
    elif names and not any(re.fullmatch(CONSTANTS[published.kind], name) for name in names):
        raise UserError(
            f"{flag}: its config.json has a quantization_config ({published}), and its files hold no such weights; "
            "remove it there if they are not quantized, or download the model again"
        )
    if published and published.kind in LAYOUT_NAMES:
        _check_parts(published, names, flag)


def find_quantization_settings(config: PretrainedConfig) -> Any:
    """Return the settings of the quantization of a model's files, of the whole model or of its text part."""
    for part in (config, config.get_text_config(decoder=True)):
        for key in CONFIG_KEYS:
            if (settings := getattr(part, key, None)) is not None:
                return settings
    return None


def remove_quantization_settings(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a configuration as a plain model has it."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        for key in CONFIG_KEYS:
            if hasattr(part, key):
                delattr(part, key)
    return config


def _read_bitsandbytes(settings: Mapping[str, Any], flag: str) -> PublishedQuantization:
    if not settings.get("load_in_4bit"):
        return PublishedQuantization("int8", False, settings)
    kind = settings.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
    if kind not in ("nf4", "fp4"):
        given = json.dumps(kind, default=str)[:60]
        raise UserError(f"{flag}: bnb_4bit_quant_type {given} in its config.json must be nf4 or fp4; correct it there")
    return PublishedQuantization(kind, bool(settings.get("bnb_4bit_use_double_quant")), settings)


def _check_compressed_tensors(settings: Mapping[str, Any], flag: str) -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError(
            f"{flag}: its weights are quantized by compressed-tensors, and the package compressed_tensors, which reads "
            f"them, is not installed; pip install compressed-tensors, or give {OTHER_COPIES}"
        )


def _check_packed(settings: Mapping[str, Any], flag: str) -> None:
    method, layout, bits = settings["quant_method"], read_layout(settings), str(settings.get("bits", 4))
    supported = (4,) if layout and layout.name == "gemm" else PACKED_BITS
    if layout is None:
        found, read = f"the layout {get_layout_name(settings)[:60]}", " or ".join(LAYOUT_NAMES[method])
    elif bits not in map(str, supported):
        found, read = f"{bits[:20]} bits", " or ".join(map(str, supported))
    elif settings.get("pack_dtype", "int32") != "int32":
        found, read = f"words of {str(settings['pack_dtype'])[:20]}", "int32"
    elif settings.get("rotation_config") or settings.get("spinquant_config"):
        found, read = "rotated activations", "plain ones"
    else:
        return
    raise UserError(
        f"{flag}: its weights are quantized by {FORMAT_NAMES[method]} with {found}, and only {read} can be trained on; "
        f"give {OTHER_COPIES}"
    )


def _check_parts(published: PublishedQuantization, names: Collection[str], flag: str) -> None:
    """Require that each packed weight is complete, and that activations have no scales, as in AWQ of some models."""
    kinds: tuple[str, ...] = TORCHAO_PARTS if published.kind == "torchao" else INTEGER_PARTS
    if published.settings.get("desc_act"):
        kinds = (*kinds, "g_idx")
    parts = {part: {name.removesuffix(part) for name in names if name.endswith(f".{part}")} for part in kinds}
    for weight in sorted(set[str]().union(*parts.values())):
        missing = [part for part in parts if weight not in parts[part]]
        if {*kinds} - {*missing} == {"scales"}:
            raise UserError(
                f"{flag}: its files hold {weight}scales, by which activations are divided, and on such models training "
                f"is not supported; give {OTHER_COPIES}"
            )
        if missing:
            raise UserError(f"{flag}: its files lack {weight}{missing[0]}; download the model again")
