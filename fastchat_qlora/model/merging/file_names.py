"""The names of a model's tensors in its files, as transformers reads them."""

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class FileNames(NamedTuple):
    """The tensors of files by what becomes of them when the model is loaded."""

    by_parameter: dict[str, str]  # name in the model -> name in the files, of tensors that are loaded as they are
    unused: frozenset[str]  # names in the files of what the model leaves out, such as the towers of a text model


def match_file_names(meta_model: PreTrainedModel, names: Iterable[str]) -> FileNames:
    """Return what the names in a model's files stand for: parameters and buffers, or nothing that is loaded.

    Tensors that loading converts, such as the experts that it fuses, are in neither group.
    """
    changes = get_model_conversion_mapping(meta_model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    prefix, state = meta_model.base_model_prefix, meta_model.state_dict()
    by_parameter, unused = {}, set()
    for name in names:
        parameter, converted = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state:
            parameter, converted = rename_source_key(name, [], [], prefix, state)
        if parameter not in state:
            unused.add(name)
        elif converted is None:
            by_parameter[parameter] = name
    return FileNames(by_parameter, frozenset(unused))
