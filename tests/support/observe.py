"""What a forked run does that neither its log nor its files show: live objects, and the order of the records."""

import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

FILE = "observed.json"


def install() -> None:
    """Have the trainer of this process write what it did to $OBSERVED, if there is one."""
    from fastchat_qlora.training.trainer import LoraTrainer

    order: list[list[Any]] = []
    get_batch_samples, train = LoraTrainer.get_batch_samples, LoraTrainer.train

    def get_and_record(self: LoraTrainer, *args: Any, **kwargs: Any) -> Any:
        batches = get_batch_samples(self, *args, **kwargs)
        if batches[0]:
            order.append([[line for _, line, _ in sources] for sources in self.step.sources])
        return batches

    def train_and_write(self: LoraTrainer, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        path = Path(os.environ["OBSERVED"]).with_suffix(f".{os.environ.get('RANK', '0')}.json")
        path.write_text(json.dumps({"order": order, **_describe(self, order)}, default=str))
        return result

    LoraTrainer.get_batch_samples, LoraTrainer.train = get_and_record, train_and_write


def _describe(trainer: Any, order: list[list[Any]]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    import transformers

    loader = trainer.callback_handler.train_dataloader
    (group, *_) = trainer.optimizer.param_groups
    model = trainer.model_wrapped
    ddp = model if hasattr(model, "find_unused_parameters") else None
    layer = next(module for module in trainer.adapter.modules() if hasattr(module, "gradient_checkpointing"))
    checkpointing = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return {
        "optimizer": {name: value for name, value in group.items() if name != "params"},
        "loader": {
            **{name: getattr(loader, name) for name in ("num_workers", "pin_memory", "persistent_workers")},
            "prefetch_factor": loader.prefetch_factor,
            "context": getattr(loader.multiprocessing_context, "_name", None),
        },
        "ddp": ddp
        and {
            **{name: getattr(ddp, name) for name in ("find_unused_parameters", "broadcast_buffers", "static_graph")},
            "bucket_bytes": ddp.bucket_bytes_cap,
        },
        "passes": {"number": len(order[0]), "size": len(order[0][0])},
        "timeout": dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout if ddp else None,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "checkpointing": {**checkpointing, "layers": getattr(layer, "gradient_checkpointing", None)},
        "compiled": str(trainer.accelerator.state.dynamo_plugin.backend.value).lower(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "verbosity": transformers.logging.get_verbosity(),
    }


def run_out_of_memory() -> None:
    """Have every batch of more than one conversation fail as for lack of memory."""
    from fastchat_qlora.training.trainer import LoraTrainer

    compute_loss = LoraTrainer.compute_loss

    def fail_or_compute(self: LoraTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["source"]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return compute_loss(self, model, inputs, *args, **kwargs)

    LoraTrainer.compute_loss = fail_or_compute
    install()


class Unfinished(Future):  # type: ignore[type-arg]  # its result is of no interest
    """A push that is never seen to be done, and that nobody waits for in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.set_result(None)

    def done(self) -> bool:
        return False


class RecordedHub:
    """A hub that writes down what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def whoami(self, *_: Any) -> None: ...

    def create_repo(self, repo_id: str, *, token: str | None, private: bool | None, exist_ok: bool) -> Any:
        from huggingface_hub import RepoUrl

        self._write(kind="create", repo_id=repo_id, token=token, private=private)
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(self, *, folder_path: str, **settings: Any) -> Unfinished:
        names = ("repo_id", "token", "revision", "path_in_repo", "run_as_future")
        self._write(kind="upload", folder=Path(folder_path).name, **{name: settings.get(name) for name in names})
        return Unfinished()

    def _write(self, **asked: Any) -> None:
        self.asked.append(asked)
        Path(os.environ["OBSERVED"]).write_text(json.dumps(self.asked))


def push_to_a_recorder() -> None:
    """Have everything that would go to the hub written to $OBSERVED."""
    import huggingface_hub
    import transformers.trainer

    hub = RecordedHub()
    huggingface_hub.whoami = hub.whoami
    transformers.trainer.hf_api = lambda: hub
