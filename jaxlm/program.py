"""What a run computes, without its data: model, objective, optimizer and the jitted steps over a mesh.

The mesh may be of devices that this machine does not have: `train_step` of a run and what a plan compiles are one.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxlm.config_checks import check_config
from jaxlm.models import MODELS, kernels
from jaxlm.models.electra import generator_config
from jaxlm.models.flops import electra_step_flops, train_step_flops, xlnet_step_flops
from jaxlm.models.heads import Head
from jaxlm.models.kernels import cudnn
from jaxlm.models.transformer import TransformerConfig
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.auxiliary import with_auxiliary
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import offload
from jaxlm.parallel.compiler_options import compiler_options, lowering_platform
from jaxlm.training import optimizers, partition
from jaxlm.training.state import TrainState, new_state
from jaxlm.training.step import make_eval_step, make_train_step, with_state_on_device

PyTree = Any
log = logging.getLogger("jaxlm")


@dataclass(kw_only=True)
class Program:
    """The parts of a run that need neither data nor a workdir, sharded; see `make_program`.

    objective: what has `loss`: an objective of pretraining or a task of fine-tuning.
    dummy: one row of a batch, which parameters are initialised with. boxed: abstract parameters with their axis names.
    step_tokens, step_flops: tokens and model FLOPs (forward and backward, no recomputation) of a mean step. Of pretraining
      all places of its rows are counted, which packing fills; of fine-tuning real tokens alone.
    is_trained: whether the parameter of a path trains.
    """

    config: ConfigDict
    mesh: jax.sharding.Mesh
    model: nn.Module
    objective: Any
    optimizer: Any
    plateau: Any
    dummy: Mapping[str, jax.Array]
    boxed: PyTree
    step_tokens: float
    step_flops: float
    is_trained: Callable[[str], bool] = lambda path: True

    def parts(self) -> dict[str, Any]:
        """The fields of a Program, which a run is made of besides its data."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Program)}

    def in_mesh(self, function: Callable) -> Callable:
        """The function, called with the program's mesh and rules in force."""
        return in_mesh(self.mesh, function)

    @cached_property
    def state_shape(self) -> TrainState:
        """The state as ShapeDtypeStructs with shardings: what is restored, compiled for, and made."""
        params = nn.meta.unbox(self.boxed)
        shapes = jax.eval_shape(self.new_state, params)
        shardings = meshes.param_shardings(self.mesh, self.boxed)
        state_shardings = meshes.mirror_shardings(self.mesh, shapes, params, shardings)
        if self.config.offload_optimizer:
            host = offload.on_host(state_shardings.opt_state)
            state_shardings = state_shardings.replace(opt_state=host)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings
        )

    @property
    def param_shapes(self) -> PyTree:
        """All parameters, those that do not train included, as ShapeDtypeStructs with shardings."""
        return partition.join(self.state_shape.params, self.state_shape.frozen)

    @cached_property
    def batch_shape(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of `config.batch_size` rows, as the devices hold it: ShapeDtypeStructs with shardings."""
        shardings = meshes.batch_shardings(self.mesh, self.dummy)
        return {
            key: jax.ShapeDtypeStruct(
                (self.config.batch_size, *x.shape[1:]), x.dtype, sharding=shardings[key]
            )
            for key, x in self.dummy.items()
        }

    def new_state(self, params: PyTree) -> TrainState:
        """The state of step 0 with these parameters."""
        trained, frozen = partition.split(params, self.is_trained)
        guards = self.config.guards
        return new_state(
            trained,
            self.optimizer,
            ema=self.config.ema_decay > 0,
            plateau=self.plateau,
            frozen=frozen,
            spike_window=guards.spike_window if guards.spike_factor else 0,
        )

    def evaluated_params(self, state: TrainState) -> tuple[PyTree, str]:
        """What evaluation takes: the averaged parameters where there are some; and 'ema' or 'raw'."""
        if state.ema is None:
            return partition.join(state.params, state.frozen), "raw"
        return partition.join(state.ema, state.frozen), "ema"

    def init_state(self, params: PyTree | None = None) -> TrainState:
        """A fresh state, sharded from birth; with `params`, those instead of random ones."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shape)
        if params is not None:
            return self.in_mesh(jax.jit(self.new_state, out_shardings=shardings))(params)

        def make(seed):
            variables = self.model.init(jax.random.key(seed), self.dummy)
            return self.new_state(nn.meta.unbox(variables["params"]))

        return self.in_mesh(jax.jit(make, out_shardings=shardings))(self.config.seed)

    @cached_property
    def jitted_train_step(self) -> Any:
        """(state, batch) -> (state, metrics), jitted, the state donated; to be traced with the mesh in force."""
        config = self.config
        step = make_train_step(
            self.model,
            with_auxiliary(self.objective.loss),
            self.optimizer,
            make_schedule(config),
            seed=config.seed,
            accumulation_steps=config.accumulation_steps,
            grad_clip_norm=config.optimizer.grad_clip_norm,
            ema_decay=config.ema_decay,
            spike_factor=config.guards.spike_factor,
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shape)
        if config.offload_optimizer:
            step = with_state_on_device(step, offload.on_device(shardings.opt_state))
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=compiler_options(self.mesh, config.compiler_flags),
        )

    @cached_property
    def train_step(self) -> Callable:
        """Jitted (state, batch) -> (state, metrics); the state is donated."""
        return self.in_mesh(self.jitted_train_step)

    def lower_train_step(self) -> jax.stages.Lowered:
        """The train step lowered for the mesh's devices, from shapes alone."""
        platform = self.mesh.devices.flat[0].platform
        trace = self.in_mesh(self.jitted_train_step.trace)
        return self.in_mesh(trace(self.state_shape, self.batch_shape).lower)(
            lowering_platforms=(lowering_platform(platform),)
        )

    @cached_property
    def eval_step(self) -> Callable:
        """Jitted (params, batch) -> metrics as (total, weight) pairs."""
        return self.in_mesh(
            jax.jit(make_eval_step(self.model, with_auxiliary(self.objective.loss)))
        )

    def update_plateau(self, state: TrainState, value: float) -> TrainState:
        """Lowers the learning rate's scale if the held-out loss has stopped falling."""
        return state.replace(plateau=self._plateau_update(state.plateau, jnp.float32(value)))

    @cached_property
    def _plateau_update(self) -> Callable:
        """Jitted once: a new bound method would be compiled at each evaluation."""
        return self.in_mesh(jax.jit(self.plateau.update))

    @property
    def num_params(self) -> int:
        """Parameters, those that are not trained included."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.param_shapes))


def make_program(config: ConfigDict, mesh: jax.sharding.Mesh, tokenizer: Any) -> Program:
    """The program of a pretraining run. tokenizer: only its ids and tables are read (`TokenTables`).

    Raises:
      ValueError: with what to change, if fields do not fit one another, the tokenizer or the mesh.
    """
    objective = make_objective(config, tokenizer)
    check_family(config, objective)
    check_config(config, mesh, tokenizer, target_len(objective, config.seq_len))
    dummy = dummy_batch(objective, config.seq_len)
    model = make_model(config, mesh, has_prefix="is_prefix" in dummy)
    boxed = abstract_params(model, dummy)
    optimizer, plateau = make_optimizer(config, boxed)
    return Program(
        config=config,
        mesh=mesh,
        model=model,
        objective=objective,
        optimizer=optimizer,
        plateau=plateau,
        dummy=dummy,
        boxed=boxed,
        step_tokens=config.batch_size * (config.seq_len + target_len(objective, config.seq_len)),
        step_flops=step_flops(config, model.config, objective),
    )


def target_len(objective: Any, seq_len: int) -> int:
    """Places of a row of the decoder beside an encoder's `seq_len`; 0 where there is one stream of tokens."""
    return objective.target_len(seq_len) if hasattr(objective, "target_len") else 0


def step_flops(
    config: ConfigDict, options: TransformerConfig, objective: Any, *, causal_half: bool = False
) -> float:
    """Model FLOPs of a train step of pretraining; see `models.flops`."""
    sizes = config.batch_size, config.seq_len, objective.num_predictions(config.seq_len)
    if "generator" in config:
        return electra_step_flops(options, generator_config(options, **config.generator), *sizes)
    if config.family == "xlnet":
        return xlnet_step_flops(options, *sizes)
    return train_step_flops(
        options,
        *sizes,
        causal=config.family != "bert",
        causal_half=causal_half,
        target_len=target_len(objective, config.seq_len),
    )


def pick(table: Mapping[str, Any], name: str, what: str) -> Any:
    """`table[name]`, or an error that lists the names there are."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: known are {', '.join(sorted(table))}")
    return table[name]


def resolve_dtype(dtype: str, mesh: jax.sharding.Mesh) -> str:
    """'auto' is bfloat16 where the mesh's devices multiply in it, else float32: on CPUs, and on GPUs before Ampere (T4, V100)."""
    if dtype != "auto":
        return dtype
    return (
        "float32"
        if on_cpu(mesh) or (capability(mesh) or cudnn.AMPERE) < cudnn.AMPERE
        else "bfloat16"
    )


def capability(mesh: jax.sharding.Mesh) -> tuple[int, ...] | None:
    """The compute capability of a mesh's NVIDIA GPUs: (7, 5) is a T4, (8, 0) an A100, (9, 0) an H100; None of other devices."""
    says = getattr(
        mesh.devices.flat[0], "compute_capability", ""
    )  # of AMD's 'gfx942', of a TPU nothing
    return tuple(map(int, says.split("."))) if re.fullmatch(r"\d+\.\d+", says) else None


def on_cpu(mesh: jax.sharding.Mesh) -> bool:
    """Whether a mesh's devices are processors."""
    return mesh.devices.flat[0].platform == "cpu"


def resolve_kernel(
    options: TransformerConfig,
    mesh: jax.sharding.Mesh,
    *,
    family: str = "",
    has_prefix: bool = False,
) -> TransformerConfig:
    """'auto' is the fused attention kernel of the mesh's devices; the reference on CPUs and for what that kernel
    cannot do, which the log says. A kernel that is named and cannot is refused, with what to change."""
    chosen = options.attention_kernel
    if chosen == "auto":
        name = kernels.made_for(mesh.devices.flat[0].platform, mesh.shape)
        options = dataclasses.replace(options, attention_kernel=name)
    found = dict(family=family, has_prefix=has_prefix, capability=capability(mesh))
    if not (limits := kernels.find_limits(options, mesh.shape, **found)):
        return options
    lines = "\n  ".join(limits)
    if chosen != "auto":
        raise ValueError(
            f"attention_kernel={chosen!r} cannot run this model:\n  {lines}\nor take 'auto'"
        )
    log.info("attention by the reference and not by %s:\n  %s", options.attention_kernel, lines)
    return dataclasses.replace(options, attention_kernel=kernels.REFERENCE)


def make_model(
    config: ConfigDict, mesh: jax.sharding.Mesh, *, has_prefix: bool = False
) -> nn.Module:
    """The config's model, in the dtype that its devices compute in. Raises ValueError for options that do not go together.

    has_prefix: whether the batches that it will read have `is_prefix`.
    """
    options = TransformerConfig(
        **config.model,
        dtype=resolve_dtype(config.dtype, mesh),
        param_dtype=config.param_dtype,
        remat=config.remat,
        unroll=config.unroll,
        attention_kernel=config.attention_kernel,
        pipeline_micro_batches=config.pipeline_micro_batches,
        merge_rows=on_cpu(mesh),
    )
    if options.num_decoder_layers and config.family != "encoder_decoder":
        raise ValueError(
            f"num_decoder_layers={options.num_decoder_layers}: family {config.family!r} has one stack of layers; set it "
            "to 0, or the family to 'encoder_decoder'"
        )
    options = resolve_kernel(options, mesh, family=config.family, has_prefix=has_prefix)
    model = pick(MODELS, config.family, "family")
    if "head" in config:  # a fine-tuning run has a task's head instead of an objective's
        return model(options, head=Head(options, **config.head))
    if "generator" in config:  # ELECTRA's, as shares of the model
        return model(options, **config.generator)
    objective = config.get("objective", {}).get("name")  # a task that writes has neither
    pairs = {"num_pair_classes": 2} if objective in ("mlm_nsp", "mlm_sop") else {}
    return model(options, **pairs)


def make_objective(config: ConfigDict, tokenizer: Any) -> Any:
    """The config's objective, which keeps tables of the tokenizer."""
    options = config.objective.to_dict()
    return pick(OBJECTIVES, options.pop("name"), "objective")(tokenizer=tokenizer, **options)


def check_family(config: ConfigDict, objective: Any) -> None:
    """Raises ValueError if the objective is not made for models of the config's family: labels would be in plain sight of an
    encoder, say, or most of the model would not be trained."""
    family = config.family
    if family in objective.families:
        return
    pick(MODELS, family, "family")
    fitting = [name for name, kind in OBJECTIVES.items() if family in kind.families]
    raise ValueError(
        f"objective {config.objective.name!r} is not for family {family!r}: set --config.family to "
        f"{' or '.join(objective.families)}, or take one of {', '.join(fitting)}"
    )


def in_mesh(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """`function`, traced and run with the mesh and the axis rules in force."""

    def run(*args, **kwargs):
        with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
            return function(*args, **kwargs)

    return run


def dummy_batch(objective: Any, seq_len: int) -> dict[str, jax.Array]:
    """One row of the shapes that the objective makes: what parameters are initialised with."""
    empty = {
        "tokens": np.zeros(1, np.int32),
        "segment_ids": np.ones(1, np.int32),
        "positions": np.zeros(1, np.int32),
        "sentence_starts": np.zeros(1, bool),
    }
    if objective.window(seq_len).pair:
        empty = {**empty, "other": dict(empty)}
    row = objective.corrupt(np.random.default_rng(0), empty, seq_len)
    return {key: jnp.asarray(value)[None] for key, value in row.items()}


def make_schedule(config: ConfigDict) -> Callable:
    """step -> learning rate."""
    schedule = config.optimizer.schedule.to_dict()
    return optimizers.make_schedule(
        schedule.pop("name"),
        learning_rate=config.optimizer.learning_rate,
        num_train_steps=config.num_train_steps,
        **schedule,
    )


def make_optimizer(config: ConfigDict, boxed: PyTree) -> tuple[Any, Any]:
    """(direction of the update, reduce-on-plateau or None), from `config.optimizer`."""
    options = config.optimizer.to_dict()
    for handled_elsewhere in ("learning_rate", "schedule", "grad_clip_norm"):
        options.pop(handled_elsewhere)
    plateau = optimizers.Plateau(**options.pop("plateau")) if "plateau" in options else None
    axes = meshes.logical_axes(boxed)
    return optimizers.make_optimizer(options.pop("name"), axes=axes, **options), plateau


# Enough of a batch for `abstract_params`; decoders and encoders alone do not read the second.
ONE_TOKEN = {
    "tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32),
    "encoder_tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32),
}


def abstract_params(model: nn.Module, batch: Mapping[str, jax.Array]) -> PyTree:
    """The model's parameters as boxed ShapeDtypeStructs; nothing is allocated."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), batch))["params"]


def sharded_shapes(mesh: jax.sharding.Mesh, boxed: PyTree) -> PyTree:
    """Boxed abstract parameters as plain ShapeDtypeStructs with their shardings."""
    shardings = meshes.param_shardings(mesh, boxed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.meta.unbox(boxed),
        shardings,
    )
