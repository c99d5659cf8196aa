"""Datasets as a run loads them from files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastchat_qlora.config.arguments import DataArguments
from fastchat_qlora.data.dataset import LoadMode, load_dataset
from fastchat_qlora.data.selection import select_data, split_datasets


def load_splits(
    paths: Path | str | Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    max_length: int = 256,
    seed: int = 1,
    cache_dir: Path | None = None,
    mode: LoadMode = "main",
    **data_args: Any,
) -> dict[str, Dataset]:
    """Load training data, and evaluation data where `data_args` ask for it."""
    files = [str(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    args = DataArguments(data_path=files, **data_args)
    loaded = load_dataset(
        args,
        tokenizer,
        max_length=max_length,
        output_dir=output_dir,
        cache_dir=None if cache_dir is None else str(cache_dir),
        mode=mode,
    )
    return split_datasets(select_data(loaded, args.duplicates, seed, mode), args.eval_split, seed).named()
