"""How fast a config trains on this machine, and what that is worth.

    python tools/benchmark.py --config=configs/gpt.py:gpt2 --config.batch_size=4 --config.seq_len=256 \
        --config.unroll=0 --steps=10 --against=torch --json=out.json

--mode=train          tokens/s, step and compile time, MFU, input wait, peak memory; with --against=torch also
                      transformers' model of the same sizes, in blocks of steps that alternate with ours
--mode=decode         tokens/s of a decoder's prompts and of its new tokens in batches of 1 and 8, greedy, with random
                      parameters, --steps times; with --against=torch also transformers' `generate`, in turns
--mode=cross_entropy  the chunked loss against the plain one: memory and time (needs no config)
--mode=checkpoints    how fast checksums are, how long a save keeps the next step waiting (needs no config)
--mode=guards         what the guards against bad steps, hangs and signals cost in each step
--mode=store          what it costs that a token store is checked as it is read
--mode=mlm_flops      FLOPs of a BERT config's step with the head at the masked positions and at all of them

On a CPU, MFU divides by the best float32 matmul of 1024, 2048 and 4096 that jax, numpy or torch reaches on all
cores in the same run; on an accelerator by its data sheet.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm import program as programs
from jaxlm.exits import with_status
from jaxlm.flags import define_config_flag, parse
from jaxlm.host import keep_freed_memory
from jaxlm.inference import decode
from jaxlm.inference.sampling import make_sampling
from jaxlm.models.flops import train_step_flops
from jaxlm.objectives.losses import cross_entropy, plain_cross_entropy
from jaxlm.training.throughput import measured_matmul_flops
from tools.checkpoint_cost import checkpoint_cost
from tools.guard_cost import guard_cost
from tools.store_cost import store_cost
from tools.torch_reference import make_torch_generate, make_torch_step

MODES = ("train", "decode", "cross_entropy", "checkpoints", "guards", "store", "mlm_flops")
T = TypeVar("T")
ROUNDS = 5  # alternations of ours and theirs
WARMUP_STEPS = 3  # of each, untimed: meanwhile the heap grows to what both need together


# --- the peak ---------------------------------------------------------------------------------------------------------


def measure_peak(sizes: Sequence[int] = (1024, 2048, 4096), repeats: int = 5) -> dict[str, float]:
    """FLOP/s of each library's best square float32 matmul on all cores, by size: {'jax 1024': …}."""
    libraries = {"jax": measured_matmul_flops, "numpy": numpy_matmul_flops}
    try:
        import torch  # noqa: F401

        libraries["torch"] = torch_matmul_flops
    except ImportError:
        pass
    return {
        f"{name} {size}": measure("float32", size, repeats)
        for size in sizes
        for name, measure in libraries.items()
    }


def numpy_matmul_flops(dtype: str, size: int, repeats: int) -> float:
    x = np.ones((size, size), dtype)
    return 2 * size**3 / min(seconds_of(lambda: x @ x) for _ in range(repeats))


def torch_matmul_flops(dtype: str, size: int, repeats: int) -> float:
    import torch

    torch.set_num_threads(num_cores())
    x = torch.ones((size, size), dtype=getattr(torch, dtype))
    return 2 * size**3 / min(seconds_of(lambda: x @ x) for _ in range(repeats))


def seconds_of(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- train ------------------------------------------------------------------------------------------------------------


class TrainSteps:
    """The steps of a run, one call each: launches a step, prepares the next batch meanwhile, waits for the step."""

    def __init__(self, run: build.Run):
        self.run, self.state = run, run.init_state()
        self.batches = run.device_batches(0)
        self.batch = next(self.batches)
        self.waited = 0.0

    def __call__(self) -> float:
        started = time.perf_counter()
        self.state, metrics = self.run.train_step(self.state, self.batch)
        launched = time.perf_counter()
        self.batch = next(self.batches)
        self.waited += time.perf_counter() - launched
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - started


def alternate(steppers: Sequence[Callable[[], T]], steps: int) -> list[list[T]]:
    """The seconds of `steps` calls of each stepper, in blocks that take turns, so that they share the weather."""
    seconds: list[list[T]] = [[] for _ in steppers]
    for block in np.array_split(np.arange(steps), min(ROUNDS, steps)):
        for stepper, collected in zip(steppers, seconds, strict=True):
            collected += [stepper() for _ in block]
    return seconds


def benchmark_train(
    config: ConfigDict,
    workdir: str | Path,
    steps: int,
    against: str = "",
    peak_sizes: Sequence[int] = (1024, 2048, 4096),
) -> dict[str, Any]:
    """Times `steps` train steps of a config, with its own text; see the module's docstring for what is reported."""
    config.num_train_steps = max(config.num_train_steps, steps + WARMUP_STEPS + 3)
    config.data.validation_fraction = 0.05  # nothing is evaluated; a small text has no 1/1000 part
    run = build.make_run(config, workdir)
    ours = TrainSteps(run)
    first = ours()
    ours()
    peak_memory = peak_memory_bytes()
    steppers = [ours]
    if against == "torch":
        steppers.append(make_torch_step(config, threads=num_cores()))
    alternate(steppers, WARMUP_STEPS)
    ours.waited = 0.0
    seconds = alternate(steppers, steps)

    peak, peak_of = run_peak(run, peak_sizes)
    tokens = config.batch_size * config.seq_len
    speed = lambda times: describe(times, tokens, run.step_flops, peak)
    report: dict[str, Any] = {
        "mode": "train",
        "device": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}, {num_cores()} cores",
        "dtype": run.model.config.dtype,
        "num_params": run.num_params,
        "tokens_per_step": tokens,
        "flops_per_step": run.step_flops,
        "peak_flops": peak,
        "peak_of": peak_of,
        **speed(seconds[0]),
        "compile_seconds": max(first - statistics.median(seconds[0]), 0.0),
        "input_wait": ours.waited / sum(seconds[0]),
        "peak_memory_bytes": peak_memory,
    }
    if against:
        report[against] = speed(seconds[1])
        report["ratio"] = report["tokens_per_second"] / report[against]["tokens_per_second"]
    return report


def describe(seconds: list[float], tokens: int, flops: float, peak: float) -> dict[str, float]:
    """Speed by the median step; the spread is between the quartiles."""
    median = statistics.median(seconds)
    low, high = np.quantile(seconds, [0.25, 0.75])
    return {
        "tokens_per_second": tokens / median,
        "step_seconds": median,
        "step_seconds_spread": float(high - low),
        "mfu": flops / median / peak,
    }


def run_peak(run: build.Run, sizes: Sequence[int]) -> tuple[float, str]:
    if run.mesh.devices.flat[0].platform != "cpu":
        return run.peak
    peaks = measure_peak(sizes)
    best = max(peaks, key=peaks.__getitem__)
    return peaks[best], f"best float32 matmul, {best}"


def median_step(steps: int) -> Callable[[build.Run], float]:
    def measure(run: build.Run) -> float:
        ours = TrainSteps(run)
        alternate([ours], WARMUP_STEPS)
        return statistics.median(alternate([ours], steps)[0])

    return measure


def peak_memory_bytes() -> int:
    """The most memory held so far: of the device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- decode -----------------------------------------------------------------------------------------------------------


def benchmark_decode(
    config: ConfigDict,
    rounds: int,
    against: str = "",
    prompt_len: int = 128,
    new_tokens: int = 64,
    batch_sizes: Sequence[int] = (1, 8),
) -> dict[str, Any]:
    """Times generation from random prompts, ours and theirs in turns; see `describe_decode`."""
    mesh = build.meshes.make_mesh(devices=jax.devices()[:1])
    model = programs.make_model(config, mesh)
    batch = {"tokens": jnp.zeros((1, 1), jnp.int32)}
    params = jax.jit(lambda: nn.meta.unbox(model.init(jax.random.key(0), batch)["params"]))()
    report: dict[str, Any] = {
        "mode": "decode",
        "device": f"{mesh.devices.flat[0].device_kind}, {num_cores()} cores",
        "dtype": model.config.dtype,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
    }
    for rows in batch_sizes:
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, config.model.vocab_size, (rows, prompt_len), np.int32)
        generators = [make_generate(model, params, prompts, new_tokens)]
        if against == "torch":
            threads = num_cores()
            generators.append(make_torch_generate(config, prompts, new_tokens, threads=threads))
        for generate in generators:
            generate()
        seconds = alternate(generators, rounds)
        ours, *theirs = (describe_decode(np.array(times), rows, prompt_len) for times in seconds)
        report[f"batch_{rows}"] = ours
        for other in theirs:
            ours[against] = dict(other)
            ours["prefill_ratio"] = ours["prefill"] / other["prefill"]
            ours["decode_ratio"] = ours["decode"] / other["decode"]
    return report


def make_generate(
    model: nn.Module, params: Any, prompts: np.ndarray, new_tokens: int
) -> Callable[[], list[float]]:
    """A function that generates greedily and returns the seconds of the first token and of each further one."""
    decoder = decode.make_decoder(model)
    params = decoder.prepare(params)
    options = dict(max_new_tokens=new_tokens, max_len=prompts.shape[1] + new_tokens)

    def generate() -> list[float]:
        times = [time.perf_counter()]
        sampling = make_sampling(temperature=0)
        for _ in decode.stream(decoder, params, list(prompts), sampling=sampling, **options):
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    return generate


def describe_decode(seconds: np.ndarray, rows: int, prompt_len: int) -> dict[str, float]:
    """Of seconds (rounds, new tokens): tokens/s until the first new token and of all further ones, by medians.

    late_token: the time of one of the last quarter of the tokens over that of the first.
    """
    first, rest = statistics.median(seconds[:, 0]), seconds[:, 1:]
    quarter = max(1, rest.shape[1] // 4)
    return {
        "prefill": rows * prompt_len / first,
        "decode": rows / float(np.median(rest)),
        "token_seconds": float(np.median(rest)),
        "late_token": float(np.median(rest[:, -quarter:]) / np.median(rest[:, :quarter])),
    }


# --- cross-entropy ----------------------------------------------------------------------------------------------------


def benchmark_cross_entropy(
    steps: int, tokens: int = 4096, width: int = 768, vocab_size: int = 128_000
) -> dict[str, Any]:
    """Loss and gradients, chunked and plain: temporaries of the two programs, and median seconds taken in turns."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, tokens, width)), jnp.float32)
    unembed = jnp.asarray(0.02 * rng.standard_normal((vocab_size, width)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocab_size, (1, tokens)), jnp.int32)
    weights = jnp.ones((1, tokens), jnp.float32)

    def compile_loss(loss):
        def mean(hidden, unembed):
            (total, weight), _ = loss(hidden, unembed, labels, weights)
            return total / weight

        return jax.jit(jax.value_and_grad(mean, argnums=(0, 1))).lower(hidden, unembed).compile()

    programs = [compile_loss(loss) for loss in (cross_entropy, plain_cross_entropy)]
    steppers = [lambda p=p: seconds_of(lambda: p(hidden, unembed)) for p in programs]
    for stepper in steppers:
        stepper()
    chunked, plain = (statistics.median(times) for times in alternate(steppers, steps))
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    return {
        "mode": "cross_entropy",
        "tokens": tokens,
        "width": width,
        "vocab_size": vocab_size,
        "chunked_seconds": chunked,
        "plain_seconds": plain,
        "time_ratio": chunked / plain,
        "chunked_temporary_bytes": memory[0],
        "plain_temporary_bytes": memory[1],
        "memory_ratio": memory[1] / max(memory[0], 1),
    }


# --- FLOPs of masked language modelling -------------------------------------------------------------------------------


def benchmark_mlm_flops(config: ConfigDict) -> dict[str, Any]:
    """XLA's count of the unrolled loss and its gradient, and the analytic one, at the masked and at all positions.

    Nothing is run. The optimizer, the same in both, is not counted.
    """
    masked = round(config.objective.rate * config.seq_len)
    report: dict[str, Any] = {"mode": "mlm_flops", "masked_positions": masked}
    for name, predictions in (("masked", masked), ("all", config.seq_len)):
        counted, analytic = count_mlm_flops(config, predictions)
        report |= {f"{name}_flops": counted, f"{name}_flops_analytic": analytic}
        report[f"{name}_analytic_error"] = analytic / counted - 1
    report["saving"] = 1 - report["masked_flops"] / report["all_flops"]
    return report


def count_mlm_flops(config: ConfigDict, predictions: int) -> tuple[float, float]:
    """(XLA's count, analytic) FLOPs of the loss of one batch and its gradient."""
    config = config.copy_and_resolve_references()
    config.unroll = 0  # a loop's body would be counted once
    model = programs.make_model(config, build.meshes.make_mesh())
    rows = lambda length, dtype=jnp.int32: jax.ShapeDtypeStruct((config.batch_size, length), dtype)
    batch = {"tokens": rows(config.seq_len), "masked_positions": rows(predictions)}
    batch |= {"labels": rows(predictions), "weights": rows(predictions, jnp.float32)}

    def loss(params, batch):
        out = model.apply({"params": params}, batch, deterministic=True)
        (total, weight), _ = cross_entropy(
            out.hidden,
            out.unembed,
            batch["labels"],
            batch["weights"],
            bias_V=out.unembed_bias,
            chunk_tokens=config.batch_size * predictions,  # one chunk, no loop
        )
        return total / weight

    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    analysis = jax.jit(jax.value_and_grad(loss)).lower(params, batch).cost_analysis()
    analytic = train_step_flops(
        model.config, config.batch_size, config.seq_len, predictions, causal=False
    )
    return analysis["flops"], analytic


# --- the command ------------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any], indent: str = "") -> None:
    for key, value in report.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            print_report(value, indent + "  ")
        else:
            text = f"{value:,.4g}" if isinstance(value, float) else str(value)
            print(f"{indent}{key:<26} {text}")


def define_flags() -> None:
    define_config_flag()
    flags.DEFINE_enum("mode", "train", MODES, "What to measure.")
    flags.DEFINE_integer("steps", 20, "Steps to time.", lower_bound=1)
    flags.DEFINE_enum("against", "", ("", "torch"), "Whose model to run in alternation.")
    flags.DEFINE_string("json", "", "File for the report as one JSON object.")
    flags.DEFINE_string("workdir", "", "Where text is prepared and reused; '' = temporary.")


@with_status
def main(argv):
    del argv
    keep_freed_memory()
    args = flags.FLAGS
    if args.mode == "cross_entropy":
        report = benchmark_cross_entropy(args.steps)
    elif args.mode == "checkpoints":
        logging.set_verbosity(logging.ERROR)  # of libraries: Orbax writes dozens of lines
        with tempfile.TemporaryDirectory(dir=args.workdir or None) as folder:
            report = checkpoint_cost(Path(folder), args.steps, alternate)
    elif args.config is None:
        raise app.UsageError(f"--mode={args.mode} needs --config=configs/NAME.py:VARIANT")
    elif args.mode == "mlm_flops":
        report = benchmark_mlm_flops(args.config)
    elif args.mode == "decode":
        report = benchmark_decode(args.config, args.steps, args.against)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            workdir = args.workdir or temporary
            if args.mode == "guards":
                report = guard_cost(args.config, Path(workdir), median_step(args.steps))
            elif args.mode == "store":
                report = store_cost(args.config, Path(workdir), median_step(args.steps))
            else:
                report = benchmark_train(args.config, workdir, args.steps, args.against)
    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse)
