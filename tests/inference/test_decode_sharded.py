"""Generation on a mesh of simulated devices: the cache lies where its heads are, and the text is one device's."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.inference import decode
from jaxlm.inference.sampling import make_sampling
from jaxlm.models import cache
from jaxlm.parallel import mesh as meshes
from tests.models.tiny import MODERN, init_params, make_batch, make_gpt

PROMPTS = [np.array(ids, np.int32) for ids in ([3, 1, 4, 1, 5], [2], [7, 1, 8], [9, 9])]


SAMPLING = make_sampling(temperature=1.0, top_k=8)


class OnMesh:
    """A decoder of its own, and parameters, on a mesh of these sizes."""

    def __init__(self, **sizes):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        self.mesh = meshes.make_mesh(**sizes, devices=devices)
        model = make_gpt(**MODERN, num_layers=1)
        boxed = jax.eval_shape(model.init, jax.random.key(0), make_batch())["params"]
        shardings = meshes.param_shardings(self.mesh, boxed)
        self.params = jax.device_put(init_params(model, make_batch()), shardings)
        self.decoder = decode.Decoder(model, 32)

    def __call__(self, function, *args, **options):
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(meshes.RULES):
            return function(*args, **options)

    def generate(self):
        options = dict(max_new_tokens=6, max_len=16, sampling=SAMPLING)
        return self(decode.generate, self.decoder, self.params, PROMPTS, **options)

    def caches(self):
        """After the prompts, and after one more token."""
        tokens, segment_ids = decode.pad_left(PROMPTS, 16)
        params = self(self.decoder.prepare, self.params)
        logits, stored = self(self.decoder.prefill, params, tokens, segment_ids, size=32)
        yield stored
        four, none = np.full(4, 9, np.int32), np.int32(-1)
        state = self(decode.begin, stored, logits, four, four, np.uint32(0), None, SAMPLING, none)
        yield self(self.decoder.extend, params, state, SAMPLING, none, np.int32(1)).cache


@pytest.fixture(scope="module")
def eight_devices():
    return OnMesh(data=2, fsdp=2, tensor=2)


def check_cache_sharding(on_mesh):
    """Rows over data and fsdp, kv heads over tensor: (L, B, K, S, H)."""
    expected = jax.sharding.NamedSharding(
        on_mesh.mesh, P(None, ("data", "fsdp", "expert", "stage"), "tensor")
    )
    for stored in on_mesh.caches():
        for array in (stored.key, stored.value):
            assert array.shape == (1, 4, 2, 32, 4)
            assert array.sharding.is_equivalent_to(expected, 5), array.sharding
            assert array.addressable_shards[0].data.shape == (1, 1, 1, 32, 4)


def test_the_cache_is_sharded_by_rows_and_kv_heads(eight_devices):
    check_cache_sharding(eight_devices)


def test_the_sharding_check_fails_for_a_cache_that_is_whole_on_every_device(monkeypatch):
    monkeypatch.setattr(cache, "AXES", (None,) * 5)
    with pytest.raises(AssertionError):
        check_cache_sharding(OnMesh(data=2, fsdp=2, tensor=2))


def check_text(on_mesh, alone):
    for one, other in zip(on_mesh, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_text_on_a_mesh_is_that_of_one_device(eight_devices):
    alone = OnMesh(data=1).generate()
    check_text(eight_devices.generate(), alone)
    with pytest.raises(AssertionError):
        check_text([alone[1], alone[0], *alone[2:]], alone)
