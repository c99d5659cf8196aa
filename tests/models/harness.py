"""Every command of the program on a tiny model, each in a forked child, compared with plain transformers and PEFT.

The product is asked for nothing but its files, its messages and the live model of a run; what is expected of them is
computed here, with transformers and PEFT alone.
"""

import gc
import json
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from forked import context
from peft import PeftModel
from safetensors import safe_open
from tiny import quiet, write
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.utils.text import one_line

SECONDS = 240
"""For which a command may run, on a busy machine."""

CONVERSATIONS = [
    [("human", "Who are you?"), ("gpt", "I'm Pellico, an assistant from Harrow Lane Labs.")],
    [("human", "Count."), ("gpt", "one two three"), ("human", "And then?"), ("gpt", "four five six seven eight")],
    [("human", "Say it in Greek, please"), ("gpt", "Γειά σου 🙂")],
    [("human", "hi"), ("gpt", "Hello, how are you today?"), ("human", "fine"), ("gpt", "Good to hear that.")],
]
RUN: dict[str, Any] = {
    "lora_target_modules": "all-linear",
    "lora_r": 8,
    "lora_alpha": 16,
    "max_steps": 1,
    "per_device_train_batch_size": len(CONVERSATIONS),
    "learning_rate": 1e-2,  # the adapter's matrices move by as much in the one step
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
QLORA = {"q_lora": True, "bf16": True}
FP32_ONLY = ("xlstm",)
"""Types that transformers computes in fp32 only."""

TOLERANCE = 1e-4
QLORA_TOLERANCE = 5e-3
"""Relative error of a first loss in bf16: a token near the border may go to another expert."""

SHARE = 0.9
"""Share of the parameters of linear and expert weights that is to be in 4 bits, and adapted."""

ROUTER = re.compile(r"(^|\.)(gate|router|wg)(\.|$)|\.router\.|routers?\.")
PREFIX = re.compile(r"^(base_model\.model\.)?((model|transformer|language_model|text_model|decoder)\.)*")


class Weight(NamedTuple):
    """A weight of a linear layer or of experts of a base model.

    Attributes:
        numel: its elements.
        part: "text", or why it is not counted: "output head", "router", or the module that text does not reach.
    """

    numel: int
    part: str


def run_child(work: Callable[..., Any], folder: Path, name: str, *arguments: Any) -> tuple[int, Any]:
    """Run a function in a fork; return its exit code and its result, which is kept as JSON."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)  # without a handler: it ends the process
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            value, code = work(folder, *arguments), 0
            if isinstance(value, tuple):
                value, code = value
            result.write_text(json.dumps(value), encoding="utf-8")
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, json.loads(result.read_text(encoding="utf-8")) if result.exists() else None


def command(folder: Path, subcommand: str, **flags: Any) -> list[str]:
    """Return a command line on the base model and the data of a folder."""
    flags = {"model_name_or_path": folder / "base", "data_path": folder / "data.json"} | RUN | flags
    return [subcommand, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]


def call(argv: list[str], folder: Path) -> tuple[int, bool]:
    """Run a command of the program; return its exit code and whether weights were loaded."""
    from fastchat_qlora import cli

    loaded = []
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def watched(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded.append(cls)
        return original(cls, *args, **kwargs)

    with (
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(watched)),
        mock.patch("fastchat_qlora.data.tokenization.cache.HF_HOME", str(folder / "hf_home")),
    ):
        try:
            code = cli.main(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, bool(loaded)


def train(folder: Path, output: str, **flags: Any) -> tuple[dict[str, Any], int]:
    """Train a step; return what the live model is, and the exit code."""
    from fastchat_qlora.training import run

    kept: list[Any] = []

    class Watched(run.LoraTrainer):  # type: ignore[misc, name-defined]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            kept.append(self)
            return super().train(*args, **kwargs)

    argv = command(folder, "train", output_dir=folder / output, **flags)
    no_charts = mock.patch("fastchat_qlora.training.report.html_report.draw", lambda *_: "")  # they take half the time
    with mock.patch.object(run, "LoraTrainer", Watched), no_charts:
        code, loaded = call(argv, folder)
    result: dict[str, Any] = {"loaded": loaded}
    if code == 0:
        result |= _describe_run(kept[0], folder / output)
    return result, code


def _describe_run(trainer: Any, output: Path) -> dict[str, Any]:
    model = trainer.model
    rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    rows = [{name: [int(token) for token in row[name]] for name in ("input_ids", "labels")} for row in rows]
    use_default_attention(model.get_base_model())
    torch.save(forward(model, rows[0]["input_ids"]), output / "live.pt")
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {
        "rows": rows,
        "loss": history[0]["loss"],
        "padding_free": trainer.data_collator.padding_free,
        "stored": stored_bytes(model),
        "adapters": adapters(model),
        "trained": sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad),
        "bytes": base_bytes(model),
    }


def use_default_attention(base: Any) -> None:
    """Give the text part, if it takes packed rows only, the attention that it has in plain transformers."""
    text = base.config.get_text_config()
    if text._attn_implementation != PER_CONVERSATION:
        return
    attention = "sdpa" if base._supports_sdpa else "eager"
    parts = [name for name in base.config.sub_configs if getattr(base.config, name, None) is text]
    base.set_attn_implementation(dict.fromkeys(parts, attention) if parts else attention)


@torch.no_grad()
def forward(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the logits of a conversation alone, in evaluation."""
    logits: torch.Tensor = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits.float()[0]


def plain_name(name: str) -> str:
    """Return a live tensor's name in the base model: without adapter layers and parametrizations."""
    name = re.sub(r"^base_model\.model\.", "", name)
    name = re.sub(r"\.base_layer(?=\.|$)", "", name)
    return re.sub(r"\.parametrizations\.(\w+)\.original\d*$", r".\1", name)


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Return plain name -> bytes of each frozen tensor."""
    frozen = ((name, tensor) for name, tensor in model.named_parameters() if not tensor.requires_grad)
    return {plain_name(name): tensor.numel() * tensor.element_size() for name, tensor in frozen}


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of the frozen base model and of the constants of its quantized weights, wherever they are."""
    gc.collect()
    states = [one for one in gc.get_objects() if isinstance(one, QuantState)]  # nested ones are states as well
    constants = {state.absmax.data_ptr(): state.absmax.numel() * state.absmax.element_size() for state in states}
    return sum(stored_bytes(model).values()) + sum(constants.values())


def adapters(model: nn.Module) -> dict[str, list[float]]:
    """Return plain name of an adapted weight -> rank and scale of its adapter."""
    found = {}
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}) and module.lora_A["default"].weight.numel():
            weight = getattr(module, "parameter_name", "weight")
            rank = module.lora_A["default"].weight.shape[0] / getattr(module, "num_experts", 1)
            found[f"{plain_name(name)}.{weight}"] = [rank, float(module.scaling["default"])]
    return found


def plain_classes(folder: Path) -> list[Any]:
    """Return the classes by which users load a base model: of causal models, and that of the checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    published = getattr(transformers, config.architectures[0])
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [AutoModelForCausalLM, published] if known else [published]


def load_plain(loader: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet():
        return loader.from_pretrained(folder, dtype=dtype).eval()


def weights(model: PreTrainedModel, ids: list[int]) -> dict[str, Weight]:
    """Return the weights of linear layers and experts; those without a gradient are not reached by text."""
    model.requires_grad_(True)
    model(input_ids=torch.tensor([ids]), use_cache=False).logits.float().square().mean().backward()
    head = model.get_output_embeddings()
    found = {}
    once = {name for name, _ in model.named_parameters()}  # layers may share a weight, as heads share the embeddings'
    for module_name, module in model.named_modules():
        for name, tensor in module.named_parameters(prefix=module_name, recurse=False):
            is_linear = isinstance(module, nn.Linear | Conv1D) and name.endswith("weight")
            words = f"{name} {type(module).__name__}".lower()
            is_fused = tensor.ndim > 1 and "bias" not in name and ("expert" in words or "router" in words)
            is_fused &= not isinstance(module, nn.Linear | Conv1D | nn.Embedding)
            if (name in once or module is head) and (is_linear or is_fused):
                found[name] = Weight(tensor.numel(), _find_part(name, module, head, is_reached=tensor.grad is not None))
    return found


def _find_part(name: str, module: nn.Module, head: nn.Module | None, *, is_reached: bool) -> str:
    if module is head:
        return "output head"
    if not is_reached:
        return _shorten(name)
    return "router" if "router" in type(module).__name__.lower() or ROUTER.search(name.rpartition(".")[0]) else "text"


def _shorten(name: str) -> str:
    """Return the module that a weight is part of: a tower, or a part of a layer."""
    path = re.sub(r"^(layers|h|blocks)\.\d+\.", "", PREFIX.sub("", name)).split(".")
    deep = path[0] in ("self_attn", "attn", "attention", "mlp", "mamba", "shared_transformer", "block")
    return ".".join(path[: 2 if deep and len(path) > 2 else 1])


def share(found: dict[str, Weight], chosen: set[str]) -> float:
    """Return the share of the parameters of the text part's weights that some of them have."""
    text = {name: weight.numel for name, weight in found.items() if weight.part == "text"}
    return sum(numel for name, numel in text.items() if name in chosen) / max(sum(text.values()), 1)


def percent(part: float) -> int:
    """Return a share in percent, rounded down: 100 is all of it."""
    return int(100 * part + 1e-9)


def mean_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean over the supervised tokens of conversations that are each alone."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        losses = nn.functional.cross_entropy(forward(model, row["input_ids"])[:-1], labels, reduction="none")
        total, count = total + float(losses[labels != -100].sum()), count + int((labels != -100).sum())
    return total / count


def is_causal(model: Any, ids: list[int]) -> bool:
    """Return whether earlier logits are the same with another last token."""
    changed = [*ids[:-1], (ids[-1] + 7) % 500]
    difference = (forward(model, ids) - forward(model, changed))[:-1]
    return float(difference.abs().max()) < TOLERANCE


def examine_base(folder: Path) -> dict[str, Any]:
    """Return facts of the base model in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    chat = [{"role": "user", "content": text} for turns in CONVERSATIONS for _, text in turns]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    models = [load_plain(loader, folder / "base") for loader in plain_classes(folder / "base")]
    found = [weights(model, ids) for model in models]
    return {"causal": is_causal(models[0], ids), "weights": found}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def check_adapter(folder: Path, lora: dict[str, Any]) -> dict[str, list[str]]:
    """Return what is wrong with the numbers of a LoRA run, and with its merged model."""
    rows = lora["rows"]
    for loader in plain_classes(folder / "base"):
        base = load_plain(loader, folder / "base")
        expected_loss = mean_loss(base, rows)
        adapted, missing = attach_plain(base, folder / "lora")
        if not missing:
            break
    problems: dict[str, list[str]] = {"lora": [missing] if missing else [], "merge": []}
    if abs(lora["loss"] - expected_loss) > TOLERANCE:
        problems["lora"].append("first loss is not that of the conversations alone")
    if adapted is None:
        return problems
    logits = forward(adapted, rows[0]["input_ids"])
    if error(torch.load(folder / "lora" / "live.pt"), logits) > TOLERANCE:
        problems["lora"].append("plain PEFT has other logits than the live model")
    if (folder / "merged").is_dir():
        merged = forward(load_plain(loader, folder / "merged"), rows[0]["input_ids"])
        problems["merge"] = list(_check_merged(folder, error(merged, logits), set(base.all_tied_weights_keys)))
    return problems


def attach_plain(base: Any, adapter: Path) -> tuple[Any, str]:
    """Return a base model with an adapter as PEFT loads it, and what is wrong with that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
        except (ValueError, KeyError, RuntimeError) as failure:
            return None, f"plain PEFT does not load the adapter: {type(failure).__name__}"
    is_missing = any("missing adapter keys" in str(warning.message) for warning in caught)
    return adapted, "plain PEFT misses tensors of the adapter" if is_missing else ""


def _check_merged(folder: Path, difference: float, shared: set[str]) -> Iterator[str]:
    if difference > TOLERANCE:
        yield "logits are not those of base and adapter"
    merged, base = headers(folder / "merged"), headers(folder / "base")
    # Layers that share a weight have adapters of their own, and then weights of their own.
    if {name: header for name, header in merged.items() if name in base or name not in shared} != base:
        yield "other tensors than the base model's"


def headers(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Return name -> shape and dtype of all tensors in a folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # has no iterator
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def check_qlora(folder: Path, qlora: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """Return what is wrong with the first loss of a QLoRA run: the weights are those of NF4, unpacked."""
    for loader in plain_classes(folder / "base"):
        model = load_plain(loader, folder / "base", dtype)
        named = dict(model.named_parameters())
        if set(qlora["stored"]) <= set(named):
            break
    with torch.no_grad():
        for name in in_4_bits(qlora["stored"], {name: tensor.numel() for name, tensor in named.items()}):
            packed, state = quantize_4bit(named[name].data.contiguous(), quant_type="nf4", compress_statistics=True)
            named[name].copy_(dequantize_4bit(packed, state).view_as(named[name]))
    expected = mean_loss(model, qlora["rows"])
    wrong = abs(qlora["loss"] - expected) > QLORA_TOLERANCE * expected
    return [f"first loss is not that of NF4 weights ({qlora['loss']:.2f}, {expected:.2f})"] if wrong else []


def in_4_bits(stored: dict[str, int], numel: dict[str, int]) -> set[str]:
    """Return the names of tensors that take half a byte for each element."""
    return {name for name, size in stored.items() if name in numel and size <= 0.6 * numel[name]}


def ending(folder: Path, name: str, code: int, result: Any) -> str:
    """Return how a command ended: "", or a refusal, or a failure by its last line."""
    if code == 0:
        return ""
    log = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").replace(str(folder), "FOLDER")
    lines = [line for line in log.strip().splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"error:|\S*(Error|Exception|Exit)\b", line)] or ["no message"]
    last = re.sub(r"\s+", " ", said[-1])
    last = re.sub(r"\{('[^{}:]*')\}", _sort_set, last)
    errors = sum(line.startswith("error:") for line in lines)
    if code == 2 and errors == 1 and not (result or {}).get("loaded", False):
        return f"refused: {last.removeprefix('error: ')}"
    return f"failed ({code}): {last[:240]}"


def _sort_set(found: re.Match[str]) -> str:
    return f"{{{', '.join(sorted(found[1].split(', ')))}}}"


def plan(folder: Path, **flags: Any) -> tuple[dict[str, Any], int]:
    output = folder / "written-plan.json"
    code, loaded = call(command(folder, "plan", output=output, **flags), folder)
    written = json.loads(output.read_text(encoding="utf-8")) if code == 0 else {}
    output.unlink(missing_ok=True)
    return written | {"loaded": loaded}, code


def merge(folder: Path) -> tuple[dict[str, Any], int]:
    code, _ = call(["merge", str(folder / "lora"), "--output_dir", str(folder / "merged")], folder)
    return {"loaded": True}, code


def examine(name: str, folder: Path) -> dict[str, Any]:
    """Run all commands on a model, and return what is right, refused, wrong or failed."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"conversations": [{"from": role, "value": value} for role, value in turns]} for turns in CONVERSATIONS]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    with quiet():
        write(name, folder / "base")
    facts, runs = _run_all(folder)
    if facts.ending:  # plain transformers cannot compute with it; the program is to refuse it
        return {kind: runs[run].ending or f"wrong: plain transformers {facts.ending}" for kind, run in KINDS.items()}
    return _judge(folder, facts.result, runs)


KINDS = {"LoRA": "train", "QLoRA": "train-qlora", "plan": "plan"}
"""Entries of an outcome that every architecture has, and the names of their commands."""


class Run(NamedTuple):
    """A command that has ended: its ending, "" if it is done, and its result."""

    ending: str
    result: Any


def _run_all(folder: Path) -> tuple[Run, dict[str, Run]]:
    runs: dict[str, Run] = {}

    def go(name: str, work: Callable[..., Any], *arguments: Any, **flags: Any) -> Run:
        code, result = run_child(lambda folder: work(folder, *arguments, **flags), folder, name)
        runs[name] = Run(ending(folder, name, code, result), result)
        return runs[name]

    facts = go("facts", examine_base)
    is_half = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))["model_type"] not in FP32_ONLY
    flags = QLORA | {"bf16": is_half}
    lora = go("train", train, "lora")
    qlora = go("train-qlora", train, "qlora", **flags)
    go("plan", plan)
    go("plan-qlora", plan, **flags)
    if not lora.ending and not facts.ending:
        lora.result["log"] = (folder / "train.log").read_text(encoding="utf-8")
        if lora.result["padding_free"]:
            go("train-padded", train, "padded", padding_free=False)
        go("merge", merge)
        go("check", check_adapter, lora.result)
    if not qlora.ending and not facts.ending:
        go("check-qlora", check_qlora, qlora.result, torch.bfloat16 if is_half else torch.float32)
    return facts, runs


def _judge(folder: Path, base: dict[str, Any], runs: dict[str, Run]) -> dict[str, Any]:
    lora, qlora = runs["train"].result or {}, runs["train-qlora"].result or {}
    outcome: dict[str, Any] = {"LoRA": runs["train"].ending, "QLoRA": runs["train-qlora"].ending}
    if not outcome["LoRA"]:
        found = _of_same_names(base["weights"], lora["stored"])
        adapted = lora["adapters"]
        outcome |= {
            "adapted": percent(share(found, set(adapted))),
            "rows": "padding-free" if lora["padding_free"] else "padded",
        }
        outcome["left out"] = _left_out(found, adapted)
        outcome["LoRA"] = _join(_judge_lora(base["causal"], found, lora, runs))
        outcome["merge"] = runs["merge"].ending or _join(_results(runs["check"], "merge"))
    if not outcome["QLoRA"]:
        found = _of_same_names(base["weights"], qlora["stored"])
        in_4bit = in_4_bits(qlora["stored"], {name: weight.numel for name, weight in found.items()})
        outcome["in 4 bits"] = percent(share(found, in_4bit))
        outcome["QLoRA"] = _join(_judge_qlora(base["causal"], share(found, in_4bit), runs))
    plans = [("LoRA", runs["plan"], lora), ("QLoRA", runs["plan-qlora"], qlora)]
    outcome["plan"] = _join(problem for kind, run, live in plans for problem in _judge_plan(run, live, kind))
    return outcome


def _left_out(found: dict[str, Weight], adapted: dict[str, Any]) -> list[str]:
    parts = {name: _shorten(name) if weight.part == "text" else weight.part for name, weight in found.items()}
    return sorted({part for name, part in parts.items() if name not in adapted})


def _results(run: Run, key: str = "") -> list[str]:
    if run.ending:
        return [f"check {run.ending}"]
    return list(run.result[key] if key else run.result)


def _join(problems: Any) -> str:
    problems = list(problems)
    only_refused = problems and all(problem.startswith("refused: ") for problem in problems)
    return problems[0] if only_refused else "wrong: " + "; ".join(problems) if problems else "right"


def _of_same_names(found: list[dict[str, list[Any]]], stored: dict[str, int]) -> dict[str, Weight]:
    """Return the weights of the class whose names the live model has."""
    best = max(found, key=lambda one: len(one.keys() & stored.keys()))
    return {name: Weight(*weight) for name, weight in best.items()}


def _judge_lora(causal: bool, found: dict[str, Weight], lora: dict[str, Any], runs: dict[str, Run]) -> Iterator[str]:
    if not causal:
        yield "it sees the answers"
    adapted = lora["adapters"]
    if share(found, set(adapted)) < SHARE and not _are_named(found, set(adapted), lora["log"]):
        yield "most weights are not adapted"
    if any(found[name].part == "router" for name in adapted if name in found):
        yield "routers are trained"
    if any(one != [RUN["lora_r"], RUN["lora_alpha"] / RUN["lora_r"]] for one in adapted.values()):
        yield "ranks or scales are not as asked"
    padded = runs.get("train-padded")
    if padded and (padded.ending or abs(padded.result["loss"] - lora["loss"]) > TOLERANCE):
        yield padded.ending or "padded and padding-free losses differ"
    yield from _results(runs["check"], "lora")


def _are_named(found: dict[str, Weight], adapted: set[str], log: str) -> bool:
    """Return whether the log names the layers of the text part that have no adapter."""
    without = [name for name, weight in found.items() if weight.part == "text" and name not in adapted]
    return all(name.removesuffix(".weight").rpartition(".")[2] in log for name in without)


def _judge_qlora(causal: bool, quantized: float, runs: dict[str, Run]) -> Iterator[str]:
    if not causal:
        yield "it sees the answers"
    if quantized < SHARE:
        yield "most weights are not in 4 bits"
    yield from _results(runs["check-qlora"])


def _judge_plan(run: Run, live: dict[str, Any], kind: str) -> Iterator[str]:
    if run.ending:
        yield run.ending
        return
    if run.result["unknown"]:
        yield f"{kind}: memory cannot be told"
    if "trained" not in live:
        return
    if sum(run.result["trainable"].values()) != live["trained"]:
        yield f"{kind}: another number of trained parameters"
    needs = [device["need"]["weights"] for device in run.result["devices"] if device.get("need")]
    if needs and abs(needs[0] / live["bytes"] - 1) > 0.05:
        yield f"{kind}: weights are {needs[0] / live['bytes']:.2f} of what they are"


def _work(name: str, folder: Path) -> None:
    try:
        outcome = examine(name, folder)
    except Exception as error:
        outcome = _fail(f"{type(error).__name__}: {one_line(error, 200)}")
    (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")


def _fail(reason: str) -> dict[str, Any]:
    """Return the outcome of an architecture that no command could be tried on."""
    return dict.fromkeys(KINDS, f"failed: the test itself: {reason}")


def examine_apart(name: str) -> dict[str, Any]:
    """Do as examine in a process that forks, whatever the state of this one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        process = context().Process(target=_work, args=(name, folder))
        process.start()
        process.join()
        written = folder / "outcome.json"
        if not written.exists():
            return _fail(f"its process ended with {process.exitcode}")
        outcome: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
        return outcome
