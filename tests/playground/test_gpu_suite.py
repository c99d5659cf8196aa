import json
from pathlib import Path

import gpu_suite
import pytest
import torch
from gpu_model import LLAMA_8B, TINY, draw_conversations, make_base
from gpu_report import count_operations, vendor_peak, write_report


def test_operations_match_the_documentation() -> None:
    """GFLOP of a token of Llama-3-8B, without and with all layers recomputed, by the 4 N formula."""
    found = count_operations(LLAMA_8B, rank=16, mean_length=4096, head_share=1.0, checkpointed=1.0)
    assert found.model / 1e9 == pytest.approx(33.5, abs=0.1)
    assert (found.model + found.recomputed) / 1e9 == pytest.approx(48.6, abs=0.1)


def test_trained_parameters_are_counted_as_peft_makes_them() -> None:
    from gpu_training import lora_config

    from fastchat_qlora.model.adapter.lora import attach_adapter, get_trainable_parameters

    base = make_base(TINY, torch.device("cpu"), quantized=False, attention=None)
    trained = sum(p.numel() for p in get_trainable_parameters(attach_adapter(base, lora_config())).values())
    rank_16, rank_0 = (count_operations(TINY, rank=r, mean_length=1, head_share=1).model for r in (16, 0))
    assert rank_16 - rank_0 == 6 * trained


def test_weights_of_a_quantized_base_are_not_zeros() -> None:
    base = make_base(TINY, torch.device("cpu"), quantized=True, attention=None)
    weight = base.model.layers[1].mlp.down_proj.weight
    assert weight.quant_state.nested
    assert weight.quant_state.quant_type == "nf4"
    import bitsandbytes

    values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert float(values.std()) == pytest.approx(0.02, rel=0.1)


def test_conversations_are_as_long_as_sharegpts() -> None:
    conversations = draw_conversations(3000, 4096, 1000)
    assert conversations.lengths.max() <= 4096
    assert conversations.lengths.mean() == pytest.approx(1465, rel=0.07)
    assert conversations.supervised_share == pytest.approx(0.78, abs=0.03)


def test_unknown_cards_have_no_peak() -> None:
    assert vendor_peak("NVIDIA H200") == 989
    assert vendor_peak("NVIDIA H100 80GB HBM3") == 989
    assert vendor_peak("CPU") is None


def test_tiny_mode_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--folder", str(tmp_path), "--parts", "peers"]
    gpu_suite.main(words)
    gpu_suite.main([*words[:-1], "lora", "peers"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert not [run["failed"] for run in results["runs"].values() if "failed" in run]
    assert next(iter(results["runs"])).startswith("Trainer + PEFT")
    assert len(results["runs"]) == 5
    ours, theirs = (results["runs"][name] for name in ("NF4, 4 x 128, full", next(iter(results["runs"]))))
    assert ours["positions_per_real"] == 1 < theirs["positions_per_real"]
    assert ours["checkpointed"] == 2
    page = write_report(results)
    assert page == (tmp_path / "table.md").read_text()
    assert "nothing here says whether they are met" in page

    # Invented results, to check the arithmetic of the targets.
    made_up = results | {"about": results["about"] | {"card": "NVIDIA H200", "size": LLAMA_8B._asdict()}}
    made_up["about"]["max_length"] = 4096
    for run in made_up["runs"].values():
        run["setup"]["capacity"] *= 32
        run |= {"allocated_gib": 10.0, "predicted_gib": 11.0, "real_per_second": 13_000.0}
    page = write_report(made_up)
    assert "| +10.0% |" in page
    assert ">= 12,500 | 13,000 | yes |" in page
    assert ">= 3.00 | 1.00 | no |" in page
    assert "<= 7.50 | - | - |" in page
