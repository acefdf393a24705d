"""`ollatune bench`: what it measures, and what its ceiling counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from ollatune.commands import bench
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import LoRALinear, LoRASettings, inject_lora
from ollatune.training.ceiling import Product, measure_ceiling, step_products
from tests.run_helpers import run, tiny_base, write_records


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path)


def test_products_are_what_a_step_computes(base: Path) -> None:
    """Their operations are those that torch counts in the unfused forward and backward pass, attention aside."""
    from torch.utils.flop_counter import FlopCounterMode

    with GGUFFile.open(base) as file:
        model = load_base_model(file)
    inject_lora(model, LoRASettings(2, 4.0, 0.0), seed=1)
    num_tokens = 12
    with FlopCounterMode(display=False) as counter:
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                hidden = torch.randn(num_tokens, module.in_features, requires_grad=True)
                small = functional.linear(hidden, module.lora_A)
                added = functional.linear(small, module.lora_B)
                (functional.linear(hidden, module.base.weight) + added).sum().backward()
            elif name == "lm_head":
                hidden = torch.randn(num_tokens, module.in_features, requires_grad=True)
                module(hidden).sum().backward()
    products = step_products(model, num_tokens=num_tokens, num_targets=num_tokens)
    assert sum(product.flops * count for product, count in products.items()) == (
        counter.get_total_flops()
    )


def test_layers_of_one_input_are_one_product(base: Path) -> None:
    with GGUFFile.open(base) as file:
        model = load_base_model(file)
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    kv = head_size * config.num_key_value_heads
    inject_lora(model, LoRASettings(2, 4.0, 0.0, target_modules=["q_proj", "v_proj"]), seed=1)
    products = step_products(model, num_tokens=7, num_targets=3)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    assert products[Product(7, hidden, hidden + 2 * kv)] == layers
    assert products[Product(7, hidden, 4, is_trained=True)] == layers
    assert products[Product(7, 2, hidden, is_trained=True)] == layers
    assert products[Product(7, 2, kv, is_trained=True)] == layers
    assert products[Product(7, hidden, 2 * config.intermediate_size)] == layers
    assert products[Product(3, hidden, config.vocab_size)] == 1
    assert sum(products.values()) == 7 * layers + 1


def test_trained_weights_count_their_gradient(base: Path) -> None:
    with GGUFFile.open(base) as file:
        model = load_base_model(file)
    frozen = step_products(model, num_tokens=7, num_targets=7)
    model.requires_grad_(True)
    trained = step_products(model, num_tokens=7, num_targets=7)
    assert sum(p.flops * n for p, n in trained.items()) * 2 == (
        sum(p.flops * n for p, n in frozen.items()) * 3
    )


def test_ceiling_is_timed_in_the_dtype_asked_for() -> None:
    products = {Product(16, 32, 64): 3, Product(16, 64, 32, is_trained=True): 1}
    for dtype in (torch.float32, torch.bfloat16):
        ceiling = measure_ceiling(products, dtype, torch.device("cpu"))
        assert ceiling.seconds > 0
        assert ceiling.flops == 3 * 4 * 16 * 32 * 64 + 6 * 16 * 64 * 32


def test_the_ceiling_in_bf16_of_an_old_processor() -> None:
    """Its library has no packed products in bf16: they are left out."""
    program = (
        "import torch; from ollatune.training.ceiling import Product, measure_ceiling\n"
        "device = torch.device('cpu')\n"
        "print(measure_ceiling({Product(16, 32, 64): 1}, torch.bfloat16, device).seconds > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr


def test_bench_measures_steps_and_writes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_records(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["bench", "--model", str(base), "--data", str(data), "--steps", "3", "--warmup", "1"]
    assert run([*command, "--batch-size", "2", "--json", "--set", "model.dtype=fp32"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    assert result["steps"] == 3
    assert result["records"] == 20
    low, high = result["spread"]
    assert low <= result["tokens_per_second"] <= high
    assert sum(result["phases"].values()) == pytest.approx(1.0, abs=0.01)
    assert {"forward", "backward", "optimizer", "data"} <= set(result["phases"])
    assert 0 < result["ceiling_share"] < 1
    assert result["tokens_per_second"] / result["ceiling_tokens_per_second"] == pytest.approx(
        result["ceiling_share"], rel=0.01
    )


def test_bench_text_names_the_figures(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_records(tmp_path / "data")
    command = ["bench", "--model", str(base), "--data", str(data), "--steps", "1", "--warmup", "0"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    for expected in ("tokens/s", "peak memory", "bare matrix products", "one epoch of 20 records"):
        assert expected in shown


def test_bench_wants_at_least_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--steps", "0"]) == 2
    assert "--steps" in capsys.readouterr().err


def test_peers_need_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = tmp_path / "lib" / "site-packages" / "ollatune" / "commands" / "bench.py"
    monkeypatch.setattr(bench, "__file__", str(installed))
    assert run(["bench", "--peers"]) == 2
    assert "source tree" in capsys.readouterr().err


def test_peers_result_is_the_scripts_object(tmp_path: Path) -> None:
    script = tmp_path / bench.PEERS_SCRIPT
    script.parent.mkdir()
    script.write_text("import sys, json\nprint('log')\nprint(json.dumps({'argv': sys.argv[1:]}))\n")
    assert bench.measure_peers(tmp_path, rounds=2) == {"argv": ["--json", "--rounds", "2"]}
    script.write_text("raise SystemExit(3)\n")
    with pytest.raises(bench.OllatuneError, match="exit code 3"):
        bench.measure_peers(tmp_path, rounds=2)


def test_peers_text_has_every_row_and_what_is_missing() -> None:
    figures = {"setting": "default", "peak_mb": 1100.0, "loss": 1.5}
    rows = [
        figures | {"system": "Other", "case": "mixed", "tokens_per_second": 400.0},
        figures | {"system": "Ollatune", "case": "shared", "tokens_per_second": 5000.0},
        figures | {"system": "Ollatune", "case": "mixed", "tokens_per_second": 1200.0},
    ]
    text = bench.bench_text(
        {"rows": rows, "ratio_best_peer": 3.0, "not_measured": {"TRL": "no wheel"}}
    ).splitlines()
    assert [line.split()[0] for line in text[1:4]] == ["Ollatune", "Other", "Ollatune"]
    assert text[1].split() == ["Ollatune", "default", "mixed", "1200", "1100", "1.5000"]
    assert text[4:] == ["ratio_best_peer: 3.0", "not measured: TRL: no wheel"]


def test_stopped_bench_does_not_speak_of_saved_state(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ollatune.training import measure

    data = write_records(tmp_path / "data")

    def stop_after_one(self: measure.StepMeter, state: object, report: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(measure.StepMeter, "_on_step", stop_after_one)
    assert run(["bench", "--model", str(base), "--data", str(data)]) == 143
    message = capsys.readouterr().err
    assert "nothing was written" in message
    assert "resume" not in message
