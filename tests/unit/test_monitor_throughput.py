"""Speeds, the time left, MFU against known peaks, memory."""

import pytest

from gptdist.monitor.peaks import peak_flops
from gptdist.monitor.throughput import Throughput, memory_bytes


def test_an_interval_sums_its_steps_and_starts_anew() -> None:
    throughput = Throughput(flops_per_token=6e6, devices=2, peak_flops=1e10)
    throughput.update(1000, 0.5, data_wait_seconds=0.1)
    throughput.update(3000, 1.5, data_wait_seconds=0.3)
    values = throughput.interval(remaining_tokens=20_000)
    assert values == pytest.approx(
        {
            "speed/tokens_per_second": 2000.0,
            "speed/model_flops": 1.2e10,
            "speed/step_seconds": 1.0,
            "speed/data_wait_seconds": 0.2,
            "speed/mfu": 0.6,
            "speed/eta_seconds": 10.0,
        }
    )
    assert throughput.interval(20_000) == {}
    throughput.update(1000, 1.0)
    assert throughput.interval(0)["speed/tokens_per_second"] == 1000.0


def test_without_a_known_peak_there_is_no_mfu() -> None:
    throughput = Throughput(flops_per_token=1.0)
    throughput.update(10, 1.0)
    assert "speed/mfu" not in throughput.interval(0)


def test_a_slow_first_step_or_a_pause_does_not_move_the_time_left() -> None:
    throughput = Throughput(flops_per_token=1.0)
    assert throughput.eta_seconds(100) is None
    for seconds in (60.0, 1.0, 1.0, 1.0, 300.0, 1.0):
        throughput.update(100, seconds)
    assert throughput.eta_seconds(1000) == pytest.approx(10.0)


def test_the_time_left_counts_tokens_so_a_growing_batch_does_not_mislead() -> None:
    throughput = Throughput(flops_per_token=1.0)
    for tokens in (100, 200, 400):
        throughput.update(tokens, tokens / 100)
    assert throughput.eta_seconds(8000) == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_known_devices_by_the_name_torch_gives(name: str, peak: float) -> None:
    assert peak_flops(name, "bf16") == peak
    assert peak_flops(name, "fp16") == peak
    assert peak_flops(name, "fp32") is None


def test_volta_and_turing_have_fp16_only() -> None:
    for name, peak in (("Tesla V100-SXM2-32GB", 125e12), ("Tesla V100-PCIE-16GB", 112e12), ("Tesla T4", 65e12)):
        assert peak_flops(name, "fp16") == peak
        assert peak_flops(name, "bf16") is None


@pytest.mark.parametrize(
    "name", ["cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "NVIDIA H20", "Some GPU 4"]
)
def test_what_is_not_known_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_memory_of_this_process_is_plausible() -> None:
    ballast = bytearray(b"x" * 2**26)
    assert len(ballast) < memory_bytes("cpu") < 2**36
