"""Peak arithmetic of known devices, the denominator of MFU.

A table and nothing else. A device that is not here has no MFU unless `monitor.peak_tflops` says what its peak is: a
guess would be worse than no number.
"""

import re

# Dense matrix FLOP/s in 16 bits with fp32 accumulation, by words of the device's name (all must be there; first match
# counts). Sources: the makers' data sheets; where a sheet gives the figure "with sparsity", half of it.
_PEAKS: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"GB200"}), 2500e12),  # NVIDIA GB200 NVL72 data sheet: 360 PFLOPS sparse for 72 GPUs
    (frozenset({"B200"}), 2250e12),  # NVIDIA HGX B200 data sheet: 36 PFLOPS sparse for 8 GPUs
    (frozenset({"H200", "NVL"}), 835e12),  # NVIDIA H200 data sheet: 1,671 sparse
    (frozenset({"H200"}), 989e12),  # NVIDIA H200 data sheet, SXM: 1,979 sparse
    (frozenset({"GH200"}), 989e12),  # NVIDIA GH200 data sheet: 1,979 sparse
    (frozenset({"H100", "NVL"}), 835e12),  # NVIDIA H100 data sheet: 1,671 sparse
    (frozenset({"H100", "PCIE"}), 756e12),  # NVIDIA H100 PCIe product brief: 1,513 sparse
    (frozenset({"H100"}), 989e12),  # NVIDIA H100 data sheet, SXM: 1,979 sparse
    (frozenset({"A100"}), 312e12),  # NVIDIA A100 data sheet, SXM and PCIe alike
    (frozenset({"A40"}), 149.7e12),  # NVIDIA A40 data sheet
    (frozenset({"A30"}), 165e12),  # NVIDIA A30 data sheet
    (frozenset({"A10"}), 125e12),  # NVIDIA A10 data sheet
    (frozenset({"L40S"}), 362e12),  # NVIDIA L40S data sheet
    (frozenset({"L40"}), 181e12),  # NVIDIA L40 data sheet
    (frozenset({"L4"}), 121e12),  # NVIDIA L4 data sheet: 242 sparse
    (frozenset({"MI300X"}), 1307e12),  # AMD Instinct MI300X data sheet
)

# Tensor cores of these generations have fp16 but no bf16.
_FP16_ONLY: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"V100", "PCIE"}), 112e12),  # NVIDIA V100 data sheet, PCIe
    (frozenset({"V100"}), 125e12),  # NVIDIA V100 data sheet, SXM2
    (frozenset({"T4"}), 65e12),  # NVIDIA T4 data sheet
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one device as torch names it (`NVIDIA H100 80GB HBM3`), or None where it is not known.

    Known for `bf16` and `fp16`. Not for `fp32`, where it depends on whether TF32 is on; not for a slice of a device
    (MIG), nor for a CPU.
    """
    words = frozenset(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if precision not in ("bf16", "fp16") or "MIG" in words:
        return None
    table = _PEAKS if precision == "bf16" else _PEAKS + _FP16_ONLY
    return next((peak for needed, peak in table if needed <= words), None)
