"""A model that is larger than what the process may use passes through, both ways."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.interop.safetensors_io import DTYPES, Planned, write_folder
from tests.tiny import ROOT, environment

D, F, LAYERS, V = 2048, 5632, 24, 32000
SHARD = 250 << 20  # bytes

# VmHWM is of this program alone; ru_maxrss would be that of the process that started it, if that was larger.
PROGRAM = """
import sys
from tools import convert_checkpoint
code = convert_checkpoint.main(sys.argv[1:])
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", int(peak) * 1024)
sys.exit(code)
"""


def tensors():
    """(name, shape) of a Llama of 1.3 billion parameters."""
    yield "model.embed_tokens.weight", (V, D)
    yield "lm_head.weight", (V, D)
    yield "model.norm.weight", (D,)
    for layer in range(LAYERS):
        for name in "qkvo":
            yield f"model.layers.{layer}.self_attn.{name}_proj.weight", (D, D)
        for name in ("gate", "up"):
            yield f"model.layers.{layer}.mlp.{name}_proj.weight", (F, D)
        yield f"model.layers.{layer}.mlp.down_proj.weight", (D, F)
        yield f"model.layers.{layer}.input_layernorm.weight", (D,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (D,)


def make_folder(folder):
    """Many shards of finite bfloat16 numbers; returns their bytes."""
    folder.mkdir()
    config = dict(model_type="llama", vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS)
    config |= dict(num_attention_heads=16, intermediate_size=F, max_position_embeddings=2048)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def draw(shape):
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16) & 0x3FFF
        return bits.view(DTYPES["BF16"]).reshape(shape)

    planned = [Planned(n, s, DTYPES["BF16"], lambda s=s: draw(s)) for n, s in tensors()]
    write_folder(folder, planned, SHARD)
    return sum(t.nbytes for t in planned)


def peak_of(*arguments):
    """The most memory that the command line had, in bytes."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments), "--certificate=round_trip"]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_the_peak_is_the_largest_shard_and_a_gigabyte_at_most(tmp_path):
    total = make_folder(tmp_path / "hf")
    largest = max(p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors"))
    assert largest + 2**30 < total / 1.5  # so that the test can fail
    peak = peak_of("from_hf", "--source", tmp_path / "hf", "--target", tmp_path / "w")
    assert peak < largest + 2**30, f"{peak / 2**20:.0f} MiB for {total / 2**20:.0f} MiB"
    peak = peak_of(
        "to_hf", "--source", tmp_path / "w", "--target", tmp_path / "out", "--max_shard_gb=0.25"
    )
    assert peak < largest + 2**30, f"{peak / 2**20:.0f} MiB for {total / 2**20:.0f} MiB"
    print(f"peak {peak / 2**20:.0f} MiB, model {total / 2**20:.0f} MiB")
