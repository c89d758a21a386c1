"""Peaks of accelerators: what a utilisation divides by, measured or planned. Nothing is imported, so that a plan can read it
before jax starts."""

# Dense matmul peaks per chip in FLOP/s, from the vendors' data sheets: (bfloat16, float32 or TF32), by the device's kind.
PEAKS = {
    "TPU v4": (275e12, None),
    "TPU v5 lite": (197e12, None),
    "TPU v5e": (197e12, None),
    "TPU v5": (459e12, None),
    "TPU v5p": (459e12, None),
    "TPU v6 lite": (918e12, None),
    "TPU v6e": (918e12, None),
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA H100": (989e12, 495e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H200": (989e12, 495e12),
    "NVIDIA B200": (2250e12, 1125e12),
}
