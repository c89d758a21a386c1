"""Looking into checkpoints, on real ones made by Orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.interop import tiny_hf
from tests.interop.test_convert import from_hf
from tools import inspect_checkpoint


def small_params():
    params = {
        "embed": {"embedding": jnp.arange(12, dtype=jnp.float32).reshape(4, 3)},
        "scale": jnp.ones((3,), jnp.bfloat16),
        "zero": jnp.zeros((2,)),
    }
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    params["sharded"] = jax.device_put(jnp.arange(16.0).reshape(8, 2), sharded)
    return params


def save(workdir, params, step=7):
    """Writes <workdir>/checkpoints/<step> with params, opt_state and a manifest."""
    rest = {
        "step": jnp.int32(step),
        "opt_state": optax.adamw(1e-3).init(params),
        "plateau": None,
    }
    with ocp.CheckpointManager((workdir / "checkpoints").resolve()) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                opt_state=ocp.args.StandardSave(rest),
                manifest=ocp.args.JsonSave({"step": step}),
            ),
        )
    return workdir


def run(capsys, *arguments):
    code = inspect_checkpoint.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_every_array_is_shown_with_its_shape_dtype_and_norm(tmp_path, capsys):
    params = small_params()
    code, out = run(capsys, save(tmp_path / "w", params))
    assert code == 0
    rows = {
        line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and "/" in line
    }
    for name, array in {
        "params/embed/embedding": params["embed"]["embedding"],
        "params/scale": params["scale"],
        "params/sharded": params["sharded"],
    }.items():
        norm = float(np.linalg.norm(np.asarray(array, np.float64)))
        assert f"{array.dtype}" in rows[name] and f"{array.shape}" in rows[name]
        assert f"norm {norm:.6g}" in rows[name]
    assert "opt_state/opt_state/0/mu/scale" in rows and "opt_state/step" in rows
    assert f"params: {12 + 3 + 2 + 16} parameters in 4 arrays" in out
    assert "NaN or infinite elements: 0" in out


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_nan_is_found_and_fails(tmp_path, capsys, value):
    params = small_params()
    params["scale"] = params["scale"].at[1].set(value)
    code, out = run(capsys, save(tmp_path / "w", params))
    assert code == 1 and "NaN or infinite elements: 1" in out


def test_the_path_may_be_a_workdir_its_checkpoints_or_a_step(tmp_path, capsys):
    workdir = save(tmp_path / "w", small_params(), step=7)
    save(workdir, small_params(), step=12)
    newest = f"checkpoint {workdir / 'checkpoints' / '12'}"
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "12"):
        assert newest in run(capsys, path)[1]
    older = f"checkpoint {workdir / 'checkpoints' / '7'}"
    assert older in run(capsys, workdir / "checkpoints" / "7")[1]
    assert older in run(capsys, workdir, "--step=7")[1]


def test_no_checkpoint_is_said_and_is_no_traceback(tmp_path, capsys):
    code, out = run(capsys, tmp_path)
    assert code == 2 and str(tmp_path) in out


def changed(name, change):
    def make():
        params = small_params()
        params[name] = change(params[name])
        return params

    return make


CHANGES = {
    "one bit of one element": changed(
        "sharded", lambda x: x.at[3, 1].set(np.nextafter(np.float32(7), np.float32(8)))
    ),
    "the sign of a zero": changed("zero", lambda x: -x),
    "the dtype": changed("scale", lambda x: x.astype(jnp.float32)),
    "the shape": changed("zero", lambda x: x.reshape(1, 2)),
    "one array more": lambda: small_params() | {"more": jnp.ones(1)},
}


def check_diff(diff, tmp_path):
    """Equal checkpoints have no difference, and every change of an array is one."""
    original = save(tmp_path / "original", small_params())
    assert diff(original, save(tmp_path / "again", small_params())) == []
    for i, (name, make) in enumerate(CHANGES.items()):
        assert diff(original, save(tmp_path / str(i), make())), name


def test_diff_finds_every_change(tmp_path):
    check_diff(inspect_checkpoint.differences, tmp_path)


def test_a_diff_by_value_would_be_caught(tmp_path):
    def by_value(a, b):
        first, second = (dict(inspect_checkpoint.Arrays(path)) for path in (a, b))
        return [n for n in first if n in second and not np.allclose(first[n], second[n])]

    with pytest.raises(AssertionError):
        check_diff(by_value, tmp_path)


def test_diff_lists_what_is_not_equal_and_its_exit_code_says_so(tmp_path, capsys):
    a = save(tmp_path / "a", small_params())
    b = save(tmp_path / "b", changed("sharded", lambda x: x.at[3, 1].add(0.5))())
    code, out = run(capsys, "--diff", a, b)
    assert code == 1
    assert "params/sharded: 1 of 16 elements differ, by 0.5 at most" in out
    assert "params/scale" not in out
    code, out = run(capsys, "--diff", a, a / "checkpoints")
    assert code == 0 and "bitwise equal" in out


def test_a_nan_equals_the_same_nan(tmp_path, capsys):
    make = changed("scale", lambda x: x.at[0].set(jnp.nan))
    a, b = save(tmp_path / "a", make()), save(tmp_path / "b", make())
    assert run(capsys, "--diff", a, b)[0] == 0


def test_an_optimizer_array_that_differs_is_found(tmp_path, capsys):
    a, b = (save(tmp_path / str(step), small_params(), step=step) for step in (7, 8))
    code, out = run(capsys, "--diff", a, b)
    assert code == 1 and "opt_state/step" in out


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def test_a_hugging_face_folder_is_shown(tmp_path, capsys):
    folder, weights = tiny_hf.write_recorded(tmp_path / "hf", "bert_pretraining")
    code, out = run(capsys, folder)
    assert code == 0 and f"tensors: {sum(w.size for w in weights.values()):,} parameters" in out
    norm = np.linalg.norm(weights["cls.predictions.bias"].astype(np.float64))
    (line,) = (row for row in out.splitlines() if "cls.predictions.bias" in row)
    assert "(37,)" in line and f"norm {norm:.6g}" in line


def check_table_diff(diff, tmp_path, name):
    """A folder and its conversion are equal; a changed, a lost and an added tensor are each found."""
    folder, weights = tiny_hf.write_recorded(tmp_path / "hf", name)
    from_hf(folder, tmp_path / "w")
    assert diff(folder, tmp_path / "w") == diff(tmp_path / "w", folder) == []
    config = tiny_hf.read_recorded()[name]["config"]
    key = next(n for n in weights if "layers.1" in n or "h.1" in n or "layer.1" in n)
    changes = {
        "changed": weights | {key: weights[key] * np.float32(1.5)},
        "lost": {n: w for n, w in weights.items() if n != key},
        "added": weights | {"more": np.ones(2, np.float32)},
    }
    for change, tensors in changes.items():
        other = tiny_hf.write_source(tmp_path / change, config, tensors)
        (line,) = diff(other, tmp_path / "w")
        assert line.startswith("more" if change == "added" else key)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_folder_is_compared_with_a_checkpoint_through_the_table(name, tmp_path):
    check_table_diff(inspect_checkpoint.differences, tmp_path, name)


def test_a_buffer_of_zeros_that_no_parameter_stands_for_is_no_difference(tmp_path):
    """Published BARTs hold final_logits_bias."""
    recorded = tiny_hf.read_recorded()["bart"]
    weights = tiny_hf.make_weights(recorded["shapes"])
    for value in (0, 1):
        weights["final_logits_bias"] = np.full((1, tiny_hf.V), value, np.float32)
        folder = tiny_hf.write_source(tmp_path / f"hf{value}", recorded["config"], weights)
        if not value:
            from_hf(folder, tmp_path / "w")
            assert inspect_checkpoint.differences(folder, tmp_path / "w") == []
    (line,) = inspect_checkpoint.differences(folder, tmp_path / "w")
    assert line.startswith("final_logits_bias: holds other values than 0")


def test_a_diff_of_norms_would_be_caught(tmp_path):
    def of_sizes(a, b):
        arrays = [inspect_checkpoint.open_path(path) for path in (a, b)]
        one, other = (sum(x.size for x in found.about.values()) for found in arrays)
        return [] if one == other else ["sizes"]

    with pytest.raises((AssertionError, ValueError)):
        check_table_diff(of_sizes, tmp_path, "qwen3")


def test_two_folders_are_compared_by_name(tmp_path, capsys):
    one, _ = tiny_hf.write_recorded(tmp_path / "a", "gpt2")
    other, weights = tiny_hf.write_recorded(tmp_path / "b", "gpt2")
    assert run(capsys, "--diff", one, other)[0] == 0
    changed = weights | {"transformer.ln_f.bias": -weights["transformer.ln_f.bias"]}
    config = tiny_hf.read_recorded()["gpt2"]["config"]
    code, out = run(capsys, "--diff", one, tiny_hf.write_source(tmp_path / "c", config, changed))
    assert code == 1 and "transformer.ln_f.bias: 24 of 24 elements differ" in out


def test_a_bad_folder_is_said_and_is_no_traceback(tmp_path, capsys):
    folder, _ = tiny_hf.write_recorded(tmp_path / "hf", "gpt2")
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    code, out = run(capsys, folder)
    assert code == 2 and "not a safetensors file" in out
