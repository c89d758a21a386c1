"""What a chip can do, from its vendor's documents. Nothing here is measured, and nothing is fitted.

Sources. Peaks (in `parallel.peaks`), memory, bandwidths: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and NVIDIA's H100 SXM data sheet. One-way link
bandwidths and the network per chip: "How to Scale Your Model" (jax-ml.github.io/scaling-book), part 2. Clocks follow from
peak = MXUs x width^2 x 2 x clock. `usable_bytes`: what the compiler itself says a program may use.
"""

from dataclasses import dataclass

from jaxlm.parallel.peaks import PEAKS

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Chip:
    """One chip (a v4's or v5p's two cores together), or one GPU.

    clock: Hz of the cycles that the compiler estimates in. mxu_width: rows and columns of
    a matrix unit. usable_bytes: device memory that a program may take. hbm_bandwidth: bytes/s.
    axis_bandwidth: bytes/s in both directions together along one axis of the torus; for a GPU of all its links to the
    others in its node, one way. torus_axes: 2, 3, or 0 for a switch. wraps: a torus axis of a multiple of this many chips is a ring.
    dcn_bandwidth: bytes/s one way between slices or nodes, for each chip.
    """

    name: str
    device_kind: str
    platform: str
    clock: float
    mxu_width: int
    usable_bytes: int
    hbm_bandwidth: float
    axis_bandwidth: float
    torus_axes: int
    wraps: int
    dcn_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s: what a run's own MFU divides by, too."""
        return PEAKS[self.device_kind][0]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kind="TPU v4",
            platform="tpu",
            clock=1.05e9,
            mxu_width=128,
            usable_bytes=round(30.75 * GIB),
            hbm_bandwidth=1.23e12,
            axis_bandwidth=9e10,
            torus_axes=3,
            wraps=4,
            dcn_bandwidth=6.25e9,
        ),
        Chip(
            name="v5e",
            device_kind="TPU v5 lite",
            platform="tpu",
            clock=1.5e9,
            mxu_width=128,
            usable_bytes=round(15.75 * GIB),
            hbm_bandwidth=8.19e11,
            axis_bandwidth=9e10,
            torus_axes=2,
            wraps=16,
            dcn_bandwidth=3.125e9,
        ),
        Chip(
            name="v5p",
            device_kind="TPU v5",
            platform="tpu",
            clock=1.75e9,
            mxu_width=128,
            usable_bytes=round(95.73 * GIB),
            hbm_bandwidth=2.765e12,
            axis_bandwidth=1.8e11,
            torus_axes=3,
            wraps=4,
            dcn_bandwidth=6.25e9,
        ),
        Chip(
            name="v6e",
            device_kind="TPU v6 lite",
            platform="tpu",
            clock=1.75e9,
            mxu_width=256,
            usable_bytes=round(31.24 * GIB),
            hbm_bandwidth=1.6e12,
            axis_bandwidth=1.8e11,
            torus_axes=2,
            wraps=16,
            dcn_bandwidth=12.5e9,
        ),
        Chip(
            name="h100",
            device_kind="NVIDIA H100",
            platform="gpu",
            clock=1.98e9,
            mxu_width=64,
            # XLA's allocator takes 75% of the card at first and all of it with XLA_PYTHON_CLIENT_MEM_FRACTION; the driver and
            # CUDA keep about 1 GiB.
            usable_bytes=84929347584 - GIB,
            hbm_bandwidth=3.352e12,
            axis_bandwidth=4.5e11,
            torus_axes=0,
            wraps=0,
            dcn_bandwidth=5e10,
        ),
    )
}
