import balance
import numpy as np
import pytest
from balance import Model, Waiting, measure_cost, simulate, write_report


def test_costs_count_padding_where_passes_are_padded() -> None:
    passes = [[np.array([10, 20])], [np.array([30])]]
    assert measure_cost(passes, 0.1, is_padded=False).tolist() == [[20 + 60], [120]]
    assert measure_cost(passes, 0.1, is_padded=True).tolist() == [[120], [120]]


def test_waiting_is_the_mean_ranks_share() -> None:
    waiting = Waiting().add(np.array([[1.0, 3.0], [2.0, 2.0]])).add(np.array([[4.0, 0.0], [0.0, 0.0]]))
    assert waiting.share == pytest.approx(1 - 6 / 8)
    assert waiting.share_in_passes == pytest.approx(1 - 6 / 9)


def test_a_small_step_is_balanced_as_well_as_it_can_be() -> None:
    found = simulate([np.array([800, 700, 100, 200])], 2, Model("no attention", 0.0, 1000))
    assert found.at_random.share == pytest.approx(1 - 900 / 1500)
    assert found.by_cost.share == found.least.share == 0
    assert simulate([np.array([900, 50, 50])], 3, Model("M", 0.0, 1000)).least.share == pytest.approx(1 - 1000 / 2700)


@pytest.mark.parametrize("name", balance.DRAWN)
def test_ranks_wait_less_than_two_percent_longer_than_they_must(name: str) -> None:
    random = np.random.default_rng(0)
    found = simulate([balance.DRAWN[name](random, 64 * 16)], 64, balance.MODELS[0], is_slow=True)
    assert found.by_cost.share < found.least.share + 0.02
    assert found.at_random.share > 0.3


def test_agents_are_as_long_as_published() -> None:
    lengths = balance.draw_agent(np.random.default_rng(0), 20_000)
    assert np.median(lengths) == pytest.approx(23_840, rel=0.05)
    assert np.quantile(lengths, 0.95) == pytest.approx(69_274, rel=0.05)


def test_report_has_a_line_for_each_case() -> None:
    lines = write_report(balance.MODELS[:1], [2], limit=1).splitlines()
    assert sum(line.startswith("| Alpaca-like | 2 |") for line in lines) == 3
