"""The modules and parameters that an adapter is to be on -> a LoRA configuration by which PEFT selects them alone.

PEFT reads a configuration again wherever the adapter is loaded. For some mixtures of experts it moves names such as
gate_proj from linear layers to the experts (0.21.2, `utils/transformers_weight_conversion.py`), and it takes vision
towers for a part of the model. So what PEFT selects is compared with what is wanted, on a model without weights.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.unreached import find_unreached
from fastchat_qlora.model.loading.text_part import TextPart, computes_linear, has_experts
from fastchat_qlora.model.loading.towers import check_not_in_towers, is_in_tower
from fastchat_qlora.model.quantization.weight_shares import compute_share
from fastchat_qlora.utils.text import ends_with_any, lies_in_any, matches_name, one_line

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # PEFT's name for the adapter that a model is loaded with
PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
"""Errors of PEFT for an adapter that does not fit a model."""

ADAPTABLE_MODULES = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, Conv1D)

FUSED_NAMES = {
    "gate_up_proj": ({"gate_proj", "up_proj"}, {"w1", "w3"}, {"gate_up_proj"}),
    "up_proj": ({"up_proj"},),
    "down_proj": ({"down_proj"}, {"w2"}),
}
"""Name of fused weights -> the sets of names by which users know them from the separate experts of other versions."""

MOVED = {one for groups in FUSED_NAMES.values() for group in groups for one in group}
"""Last parts of names that PEFT may take for those of experts."""

UNWRAPPABLE_EXPERTS = ("DbrxExpertGLU",)
"""Classes of experts whose parameters the module around them reads, which it cannot through PEFT's wrapper."""

WITHOUT_ADAPTER = {
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d")),
    "rwkv": ("attention.output", "feed_forward.value"),
}
"""Type -> ends of the names of modules whose weights the model uses or changes beside their forward pass.

Mamba's kernels use the weights alone, and PEFT (0.21.2, `tuners_utils.py`) refuses such an adapter. RWKV (transformers
5.23, `_rescale_layers`) divides the weights of later layers for evaluation, and PEFT's adapter on them stays as it is.
"""


class Targets(NamedTuple):
    """Full names in the base model."""

    modules: frozenset[str]
    parameters: frozenset[str]  # of modules that are no linear layers, such as experts


def choose_targets(model: PreTrainedModel, text: TextPart, config: LoraConfig) -> Targets:
    """Return what the names in a configuration mean in a model.

    Args:
        model: without weights.
        text: its text part.
        config: with target_modules (`ALL_LINEAR`, ends of names, or a regular expression), target_parameters and
            exclude_modules from flags.

    Raises:
        UserError: a name matches nothing, only towers or a layer that cannot be adapted, or all is excluded.
    """
    names, excluded = config.target_parameters or (), config.exclude_modules or ()
    adaptable = {name for name in find_adaptable(model) if not is_in_tower(name, text.towers)}
    check_not_in_towers(config, model, text.towers)
    if config.target_modules == ALL_LINEAR:
        modules, parameters = _choose_all_linear(model, text), _find_adaptable_experts(model, text)
    else:
        modules = {name for name in adaptable if matches_name(name, config.target_modules)}
        parameters = find_fused(text, config.target_modules)
        if isinstance(config.target_modules, str):
            _check_pattern("--lora_target_modules", config.target_modules, modules | parameters, adaptable)
    weights = {name for name, parameter in model.named_parameters() if parameter.ndim in (2, 3)}
    weights = {name for name in weights if not is_in_tower(name, text.towers)}
    named = {name for name in weights if ends_with_any(name, names)}
    modules |= {name.removesuffix(".weight") for name in named} & adaptable
    parameters |= {name for name in named if name.removesuffix(".weight") not in adaptable}
    _check_matches("--lora_target_parameters", names, weights)
    chosen = modules | parameters | {*map(_get_owner, parameters)}
    out = {name for name in chosen if excluded and matches_name(name, excluded)}
    if isinstance(excluded, str):
        _check_pattern("--lora_exclude_modules", excluded, out, chosen)
    else:
        _check_matches("--lora_exclude_modules", excluded, chosen)
    kept = {name for name in parameters - out if _get_owner(name) not in out}
    modules -= out
    covered = _find_saved(modules | kept, config)
    modules, kept = modules - covered, kept - covered
    if not modules and not kept:
        given = excluded if isinstance(excluded, str) else " ".join(sorted(excluded))
        raise UserError(f"--lora_exclude_modules {given}: leaves no module to adapt; name fewer")
    _check_adapters_work(modules, model)
    return Targets(frozenset(modules), frozenset(kept))


def _find_saved(names: Collection[str], config: LoraConfig) -> set[str]:
    """Return those modules and parameters that are, or are in, modules to be trained as a whole, and log them."""
    saved = sorted(config.modules_to_save or ())
    found = {name for name in names if lies_in_any(name, saved)}
    flag = f"--modules_to_save {' '.join(saved)}"
    if found and len(found) == len(names):
        raise UserError(f"{flag}: holds all modules of --lora_target_modules; name others in one of the two")
    if found:
        logger.warning(
            f"{flag}: {len(found)} modules of --lora_target_modules are trained as a whole, so that they get no "
            f"adapter, such as {min(found)}."
        )
    return found


def _check_adapters_work(modules: set[str], model: PreTrainedModel) -> None:
    for kind, name in {type(model.get_submodule(name)): name for name in sorted(modules, reverse=True)}.items():
        if issubclass(kind, torch.nn.Linear) and not computes_linear(model.get_submodule(name)):
            raise UserError(
                f"--lora_target_modules: {name} is a {kind.__name__}, which computes more than the product with its "
                "weight, so that PEFT cannot adapt it; name other modules"
            )
    model_type = model.config.model_type
    for end in WITHOUT_ADAPTER.get(model_type, ()):
        if any(ends_with_any(name, [end]) for name in modules):
            raise UserError(
                f"--lora_target_modules: {model_type} uses or changes the weights of {end} outside of its forward "
                f"pass, where an adapter has no part; leave it out by --lora_exclude_modules {end}"
            )


def find_adaptable(model: torch.nn.Module) -> set[str]:
    """Return the names of all modules that PEFT has layers for."""
    return {name for name, module in model.named_modules() if isinstance(module, ADAPTABLE_MODULES)}


def _choose_all_linear(model: PreTrainedModel, text: TextPart) -> set[str]:
    refused = WITHOUT_ADAPTER.get(model.config.model_type, ())
    return {name for name in text.linear if not ends_with_any(name, refused)}


def _find_adaptable_experts(model: PreTrainedModel, text: TextPart) -> set[str]:
    owners = {name: type(model.get_submodule(_get_owner(name))).__name__ for name in text.experts}
    return {name for name, owner in owners.items() if owner not in UNWRAPPABLE_EXPERTS}


def find_fused(text: TextPart, names: str | Collection[str]) -> set[str]:
    """Return the parameters of experts that names or a regular expression mean; raise UserError for a part of one."""
    found = set()
    for name in text.experts:
        owner, _, leaf = name.rpartition(".")
        groups = FUSED_NAMES.get(leaf, ({leaf},))
        given = [{one for one in group if matches_name(f"{owner}.{one}", names)} for group in groups]
        if any(one == group for one, group in zip(given, groups, strict=True)):
            found.add(name)
        elif half := [(one, group - one) for one, group in zip(given, groups, strict=True) if one]:
            one, others = (" ".join(sorted(part)) for part in half[0])
            raise UserError(
                f"--lora_target_modules {one}: the experts of this model have it in one tensor with {others}; name both"
            )
    return found


def list_fused_names(text: TextPart) -> set[str]:
    """Return the full names that the separate weights of fused experts would have."""
    names = (name.rpartition(".") for name in text.experts)
    return {f"{owner}.{one}" for owner, _, leaf in names for group in FUSED_NAMES.get(leaf, ({leaf},)) for one in group}


def _get_owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _check_matches(flag: str, ends: Collection[str], names: Collection[str]) -> None:
    unmatched = sorted(end for end in ends if not any(ends_with_any(name, [end]) for name in names))
    if unmatched:
        known = ", ".join(sorted({_get_end(name) for name in names})) or "none"
        raise UserError(f"{flag} {' '.join(unmatched)}: matches nothing to adapt; the model has {known}")


def _check_pattern(flag: str, pattern: str, found: Collection[str], names: Collection[str]) -> None:
    if not found:
        ends = f".*({pattern})"
        remedy = f"; write '{ends}'" if any(matches_name(name, ends) for name in names) else ""
        raise UserError(
            f"{flag} {pattern}: matches nothing to adapt; a regular expression must match a whole name, such as "
            f"{max(sorted(names), key=len)}{remedy}"
        )


def _get_end(name: str) -> str:
    """Return the last part of a name, or the last two of a weight's."""
    *owner, last = name.rsplit(".", 2)[-2:]
    return ".".join([*owner, last]) if last == "weight" else last


def resolve_targets(
    config: LoraConfig, model: PreTrainedModel, text: TextPart, build: Callable[[], PreTrainedModel]
) -> LoraConfig:
    """Return a configuration by which PEFT selects what the flags mean, and log what `ALL_LINEAR` leaves out.

    Args:
        config: from the flags.
        model, text: without weights, and its text part.
        build: a function that returns such a model, which is used up.

    Raises:
        UserError: a name matches nothing, or PEFT cannot adapt it or would not load its adapter.
    """
    targets = choose_targets(model, text, config)
    if unreached := _find_unreached(build(), targets):
        targets = Targets(targets.modules - unreached, targets.parameters - unreached)
        if not targets.modules and not targets.parameters:
            raise UserError(
                f"--lora_target_modules: text reaches none of these modules, such as {min(unreached)}; name others"
            )
        logger.warning(
            f"--lora_target_modules: {len(unreached)} modules get no adapter, because their output does not reach the "
            f"loss of a text, such as {min(unreached)}."
        )
    resolved = fit_config(config, targets, model, build)
    if get_model_conversion_mapping(model) and (dropped := find_dropped(resolved, build())):
        if config.target_modules != ALL_LINEAR:
            raise UserError(
                f"--lora_target_modules: PEFT loses the adapters of {len(dropped)} modules, such as {min(dropped)}, "
                "when it loads them; leave them out by --lora_exclude_modules"
            )
        targets = Targets(targets.modules - dropped, targets.parameters - dropped)
        resolved = fit_config(config, targets, model, build)
    if config.target_modules == ALL_LINEAR:
        _log_left_out(text, targets)
    if resolved.target_parameters and config.lora_dropout:
        count = len(targets.parameters)
        left_out = f"not applied to {count} parameters such as those of experts, where PEFT has none" if count else ""
        saved = "the saved adapter has lora_dropout 0, because PEFT loads no other one on parameters"
        reasons = "; ".join(part for part in (left_out, saved) if part)
        logger.warning(f"--lora_dropout {config.lora_dropout:g}: {reasons}; that matters for training only.")
    return resolved


def _find_unreached(meta_model: PreTrainedModel, targets: Targets) -> frozenset[str]:
    try:
        return find_unreached(meta_model, targets.modules | targets.parameters)
    except Exception as error:  # models raise anything without values; the first step then checks the gradients
        logger.warning(f"Modules that text does not reach cannot be found before training: {one_line(error, 200)}.")
        return frozenset()


def _log_left_out(text: TextPart, targets: Targets) -> None:
    share = compute_share(text.sizes, targets.modules | targets.parameters)
    routers = f"{len(text.routers)} routers" if text.routers else ""
    others = f"{1 - share.share:.2%} of the weights ({', '.join(share.others)})" if share.others else ""
    if left_out := " and ".join(part for part in (routers, others) if part):
        logger.info(f"--lora_target_modules {ALL_LINEAR}: no adapter on {left_out}.")


def fit_config(
    config: LoraConfig, targets: Targets, model: PreTrainedModel, build: Callable[[], PreTrainedModel]
) -> LoraConfig:
    """Return a configuration by which PEFT selects these targets and no others.

    Args:
        config: as the user gave it; it is kept if it does so.
        targets: from `choose_targets`.
        model: without weights.
        build: a function that returns such a model, which a try uses up.

    Raises:
        UserError: PEFT does not do so by any configuration.
    """
    _check_parameters_work(config, {*map(_get_owner, targets.parameters)})
    is_plain = not targets.parameters and not config.target_parameters and not has_experts(model)
    if is_plain and _select_by_name(model, config) == targets.modules:
        return config
    wanted, difference, reason = targets.modules | targets.parameters, frozenset[str](), ""
    for attempt in _list_attempts(config, targets, {name for name, _ in model.named_parameters()}):
        try:
            peft_model = attach_to_meta(build(), attempt)
        except PEFT_ERRORS as error:
            difference, reason = wanted, f": {one_line(error, 200)}"
            continue
        difference, reason = wanted ^ get_adapted(peft_model), ""
        # PEFT has given some layers another rank if it has written a pattern.
        if not difference and peft_model.peft_config[ADAPTER].rank_pattern == attempt.rank_pattern:
            return attempt
    _check_parameters_work(config, _find_moved(targets) if config.use_dora else ())
    raise UserError(
        f"--lora_target_modules: PEFT cannot adapt {len(difference)} modules of this model as asked, such as "
        f"{min(difference)}{reason}; name other modules, or leave these out by --lora_exclude_modules"
    )


def _check_parameters_work(config: LoraConfig, owners: Collection[str]) -> None:
    """Require that PEFT (0.21.2) has what the flags ask for beside parameters; some it refuses only after loading."""
    is_orthogonal = config.init_lora_weights == "orthogonal"
    asked = {"--use_dora True": config.use_dora, "--init_lora_weights orthogonal": is_orthogonal}
    for flag in (flag for flag, is_asked in asked.items() if is_asked and owners):
        ends = sorted({owner.rpartition(".")[2] for owner in owners})
        raise UserError(
            f"{flag}: PEFT does not have it for the weights of {len(owners)} modules, such as {min(owners)}; drop it, "
            f"or leave them out by --lora_exclude_modules {' '.join(ends)}"
        )


def find_dropped(config: LoraConfig, meta_model: PreTrainedModel) -> frozenset[str]:
    """Return the modules whose adapter PEFT drops when it loads it from a file; the model is used up.

    PEFT (0.21.2) renames an adapter's tensors as transformers renames the model's on loading, and so loses those whose
    names a renaming matches once more: mlp.shared_expert. as a pattern matches mlp.shared_experts too. PEFT only warns.
    """
    model = attach_to_meta(meta_model, config)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    missing = set_peft_model_state_dict(model, saved, low_cpu_mem_usage=True).missing_keys
    owners = {id(layer): name for name, layer in find_adapters(model)}
    lost = (model.get_submodule(name.partition(".lora_")[0]) for name in missing if ".lora_" in name)
    return frozenset(owners[id(layer)] for layer in lost)


def _list_attempts(config: LoraConfig, targets: Targets, parameters: set[str]) -> Iterator[LoraConfig]:
    """Yield the configuration as given, one of full names, and one in which some modules are named as parameters.

    PEFT moves names of modules to experts, but never the names of parameters, for which it builds the same adapter,
    except with DoRA.
    """
    if not targets.parameters and not config.target_parameters:
        yield copy.deepcopy(config)
    for moved in (frozenset[str](), *(() if config.use_dora else (_find_moved(targets),))):
        explicit = copy.deepcopy(config)
        explicit.target_modules, explicit.exclude_modules = sorted(targets.modules - moved), None
        weights = frozenset(f"{name}.weight" for name in moved)
        ends = condense(targets.parameters, parameters) + condense(weights, parameters)
        explicit.target_parameters = ends or None
        yield explicit


def _find_moved(targets: Targets) -> frozenset[str]:
    return frozenset(name for name in targets.modules if name.rpartition(".")[2] in MOVED)


def _select_by_name(model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """Return the modules that PEFT selects in a model that it does not rename anything of."""
    if config.target_modules == ALL_LINEAR:
        head = model.get_output_embeddings()
        linear = (torch.nn.Linear, Conv1D)
        return {name for name, module in model.named_modules() if isinstance(module, linear) and module is not head}
    is_regular = isinstance(config.target_modules, str)  # such an expression may match what holds layers, too
    names = {name for name, _ in model.named_modules()} if is_regular else find_adaptable(model)
    found = {name for name in names if matches_name(name, config.target_modules)}
    return {name for name in found if not matches_name(name, config.exclude_modules or ())}


def attach_to_meta(meta_model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Attach an adapter without values, as its file will have it, to a model without weights, which is used up."""
    config = copy.deepcopy(config)
    config.init_lora_weights = False  # there are no values to initialize from
    config.lora_dropout = 0.0  # PEFT refuses any for parameters
    meta_model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # PEFT warns of patterns that it has written itself
        return get_peft_model(meta_model, config, low_cpu_mem_usage=True)


def get_adapted(model: Any) -> frozenset[str]:
    """Return the full names in the base model of modules and, in other modules than linear ones, of parameters."""
    return frozenset(name for name, _ in find_adapters(model))


def find_adapters(model: Any) -> list[tuple[str, Any]]:
    """Return the name of each adapted module or parameter of the base model, and the LoRA layer."""
    found = []
    for name, layer in getattr(model, "get_base_model", lambda: model)().named_modules():
        if isinstance(layer, LoraLayer):
            base_name = name.replace(".base_layer", "")  # parameters of one module are wrapped one in the other
            is_linear = isinstance(layer.get_base_layer(), torch.nn.Linear)
            is_parameter = isinstance(layer, lora.ParamWrapper) and not is_linear
            found.append((f"{base_name}.{layer.parameter_name}" if is_parameter else base_name, layer))
    return found


def condense(names: frozenset[str], everything: Collection[str]) -> list[str]:
    """Return the shortest ends of names, of two parts at least, that match these and no others of everything."""
    others = {*everything} - names
    ends = set()
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[-count:]) for count in range(2, len(parts) + 1))
        ends.add(next(tail for tail in tails if not any(ends_with_any(other, [tail]) for other in others)))
    return sorted(ends)
