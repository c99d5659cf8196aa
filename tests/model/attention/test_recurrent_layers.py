"""Recurrent layers compute each conversation of a packed sequence as if it were alone."""

import copy
from typing import Any

import pytest
import torch
from hybrids import HYBRIDS, make_hybrid
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from fastchat_qlora.model.attention.recurrent_layers import split_recurrent_layers


class Sums(nn.Module):
    """A recurrent layer: running sums over tokens, with its last sum as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, set[str]]] = []

    def forward(self, hidden_states: torch.Tensor, pair: Any = None, **kwargs: Any) -> Any:
        self.seen.append((hidden_states.shape[1], set(kwargs)))
        shifted = hidden_states if pair is None else hidden_states + pair[0]
        sums = shifted.cumsum(1)
        return self.A_log * sums, sums[:, -1]


class Model(nn.Module):
    """A model with one recurrent layer that passes it all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Sums()
        split_recurrent_layers(self)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return self.mixer(hidden_states=hidden_states, **kwargs)


def boundaries(lengths: list[int]) -> dict[str, torch.Tensor]:
    return {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int()}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans(), st.booleans())
@example([3, 3], True, False)  # conversations as long as the state is wide
def test_states_begin_anew(lengths: list[int], as_integers: bool, with_pair: bool) -> None:
    model = Model()
    hidden, shift = torch.randn(1, sum(lengths), 3), torch.randn(1, sum(lengths), 3)
    given = {"conversation_lengths": tuple(lengths)} if as_integers else boundaries(lengths)
    output, state = model(hidden, pair=(shift, None) if with_pair else None, layer=1, **given)
    parts = [part.cumsum(1) for part in (hidden + shift if with_pair else hidden).split(lengths, dim=1)]
    torch.testing.assert_close(output, torch.cat(parts, 1))
    torch.testing.assert_close(state, parts[-1][:, -1])
    assert model.mixer.seen == [(length, {"layer"}) for length in lengths]


def test_padded_batches_are_left_alone() -> None:
    model = Model()
    model(torch.randn(1, 7, 3), **boundaries([3, 4]))
    hidden = torch.randn(2, 7, 3)
    torch.testing.assert_close(model(hidden)[0], hidden.cumsum(1))
    assert model.mixer.seen[2:] == [(7, set())]


def test_other_inputs_than_the_sequence_are_left_alone() -> None:
    """A tower has tokens of its own."""
    model = Model()
    hidden = torch.randn(1, 5, 3)
    torch.testing.assert_close(model(hidden, conversation_lengths=(3, 4))[0], hidden.cumsum(1))


@pytest.mark.parametrize("name", HYBRIDS)
def test_replaced_layers_keep_names_parameters_and_classes(name: str) -> None:
    model = make_hybrid(name)
    names, before = list(model.state_dict()), {key: type(module) for key, module in model.named_modules()}
    split_recurrent_layers(model)
    assert list(model.state_dict()) == names
    changed = {key for key, module in model.named_modules() if type(module) is not before[key]}
    assert len(changed) == (2 if name == "falcon_h1" else 1)
    for key in changed:
        split_class = type(model.get_submodule(key))
        assert issubclass(split_class, before[key]) and split_class.__name__ == before[key].__name__


def test_a_copy_has_boundaries_of_its_own() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    hidden = torch.ones(1, 4, 1)
    model(hidden, **boundaries([2, 2]))
    assert twin(hidden)[0].flatten().tolist() == [1, 2, 3, 4]
    assert twin(hidden, **boundaries([1, 3]))[0].flatten().tolist() == [1, 1, 2, 3]


def test_layers_within_a_replaced_one_are_not_replaced() -> None:
    model = nn.Sequential(Sums())
    model[0].inner = Sums()
    split_recurrent_layers(model)
    assert type(model[0]) is not Sums and type(model[0].inner) is Sums


def test_models_without_such_layers_get_no_hook() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    split_recurrent_layers(model)
    assert type(model[1]) is nn.Conv1d and not model._forward_pre_hooks
