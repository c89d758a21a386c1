"""From a ConfigDict to the parts of a run: `program` makes what needs no data, this the rest. These two and `tuning` are
the only modules that know configs."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxlm import tokenizers
from jaxlm.config_checks import cannot_run
from jaxlm.config_files import saved_config
from jaxlm.data import prepare as preparation
from jaxlm.data import sources as text_sources
from jaxlm.data.pipeline import EvalBatches, TrainBatches, make_iterator
from jaxlm.data.positions import Rewind, StepBatches, position, read_rewinds
from jaxlm.data.store_format import read_manifest
from jaxlm.data.token_store import TokenStore
from jaxlm.exits import Damaged
from jaxlm.files import as_path, is_remote, new_folder, write_text
from jaxlm.identity import accept_changes
from jaxlm.interop import convert, tokenizer_files
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import processes
from jaxlm.private import refuse_secrets
from jaxlm.program import (
    ONE_TOKEN,
    Program,
    abstract_params,
    make_model,
    make_program,
    sharded_shapes,
)
from jaxlm.training import stored
from jaxlm.training.checkpoints import (
    evaluated_item,
    find_step,
    load_item,
    restore_state,
    split_step,
)
from jaxlm.training.metrics import MetricSums, one_behind, with_perplexity
from jaxlm.training.state import TrainState
from jaxlm.training.throughput import peak_flops

PyTree = Any
log = logging.getLogger("jaxlm")

MODEL_SIZES = "vocab_size emb_dim num_layers num_heads num_kv_heads head_dim mlp_dim".split()

HUGGING_FACE = "hf:"  # what an `init_from` begins with that is no run of ours


def write_config(config: ConfigDict, path: str | Path) -> None:
    """Writes config.json. Raises ValueError if a field holds a secret."""
    refuse_secrets(flatten_dict(config.to_dict(), sep="."))
    write_text(path, config.to_json(indent=2, sort_keys=False) + "\n")


def make_tokenizer(config: ConfigDict, workdir: Path) -> Any:
    """The run's tokenizer: the workdir's own if there is one; else loaded from a path or from the Hugging Face
    folder that the run starts from, or made from the text."""
    saved = workdir / "tokenizer"
    if tokenizers.is_saved(saved):
        return tokenizers.load_tokenizer(saved)
    stores = [s for _, s in named_sources(config.data.sources) if is_store(s)]
    options = config.tokenizer.to_dict()
    kind, path = options.pop("kind"), options.pop("path")
    if path:
        tokenizer = tokenizers.load_tokenizer(path)
    elif config.init_from.startswith(HUGGING_FACE):
        tokenizer = tokenizer_files.fetch_tokenizer(config.init_from.removeprefix(HUGGING_FACE))
    elif stores:
        tokenizer = tokenizers.load_tokenizer(as_path(stores[0]) / "tokenizer")
    else:
        texts = (
            document.text
            for _, source in named_sources(config.data.sources)
            for document in text_sources.read_documents(
                source,
                text_field=config.data.text_field,
                cache_dir=config.data.cache_dir,
                left_out=[workdir],
            )
            if isinstance(document, text_sources.Document)
        )
        tokenizer = tokenizers.train_tokenizer(kind, texts, **options)
    with new_folder(saved, last=tokenizers.META) as folder:
        tokenizer.save(folder)
    return tokenizers.load_tokenizer(saved)


def named_sources(sources: tuple[str, ...]) -> list[tuple[str, str]]:
    """('name=path', 'path') -> [(name, path)]; a nameless path is named after its last part."""
    named = []
    for source in (sources,) if isinstance(sources, str) else sources:
        name, equals, path = source.partition("=")
        if not equals or is_remote(name):
            name, path = Path(source).name.split(".")[0].replace("*", "all") or "text", source
        named.append((name, path))
    if len({name for name, _ in named}) != len(named):
        raise ValueError(
            f"data.sources has two sources of one name: {named}; write them as 'name=path'"
        )
    if odd := [name for name, _ in named if Path(name).name != name or name in ("", "..")]:
        raise ValueError(f"data.sources names {odd}, which are no names of folders in W/store")
    return named


def is_store(path: str) -> bool:
    """Whether a whole token store is at `path`."""
    return (as_path(path) / "manifest.json").is_file()


def make_stores(
    config: ConfigDict, tokenizer: Any, workdir: Path, allow_change: bool = False
) -> dict[str, Path]:
    """The token store of each source: the given one, or prepared by process 0 from text, under `workdir/store`, where the
    others, who come after it, find it.

    allow_change: a store of other text that lies there stays, and is used.
    """
    stores = {}
    for name, source in named_sources(config.data.sources):
        store = as_path(source) if is_store(source) else workdir / "store" / name
        if not is_store(source) and processes.is_main():
            try:
                preparation.prepare(
                    [source],
                    tokenizer,
                    store,
                    split=config.data.split,
                    validation_fraction=config.data.validation_fraction,
                    text_field=config.data.text_field,
                    seed=config.seed,
                    cache_dir=config.data.cache_dir,
                    left_out=[workdir],  # what a run writes below its own text is none of it
                    progress=config.log.progress,
                )
            except preparation.OtherStore as error:
                changes = [f"data of {name}: {line}" for line in error.differences]
                then = f" Then {store} is used as it is."
                accept_changes(workdir, changes, allowed=allow_change, then=then)
        if read_manifest(store)["tokenizer_sha256"] != tokenizer.sha256:
            raise ValueError(
                f"{store} was prepared with another tokenizer than the run's: prepare it again with "
                f"--tokenizer={workdir / 'tokenizer'}, or set tokenizer.path={store / 'tokenizer'}"
            )
        stores[name] = store
    return stores


def refuse_short(stores: Mapping[str, TokenStore], seq_len: int) -> None:
    """Raises ValueError for text that does not fill one row: a model would learn it by heart, and nothing else."""
    if short := [
        f"data.sources: {name} has {store.num_tokens} tokens to train on, and a row takes {seq_len}: give more text, or set "
        "--config.seq_len lower"
        for name, store in stores.items()
        if store.num_tokens < seq_len
    ]:
        raise cannot_run(short)


def open_store(config: ConfigDict, path: Path, split: str) -> TokenStore:
    """A split of the store at `path`, with the config's folder for copies from buckets."""
    return TokenStore(path, split, cache_dir=config.data.cache_dir)


def mixture_weights(
    weights: tuple[str, ...], names: list[str], sizes: list[int]
) -> dict[int, dict[str, float]]:
    """('0:0.7,0.3', '1000:0.2,0.8') -> {step: {source: weight}}; () is in proportion to the sizes."""
    if not weights:
        return {0: dict(zip(names, map(float, sizes), strict=True))}
    schedule = {}
    for entry in weights:
        step, _, values = str(entry).rpartition(":")
        shares = [float(v) for v in values.split(",")]
        if len(shares) != len(names):
            raise ValueError(
                f"data.weights {entry!r} has {len(shares)} weights for the sources {names}: set "
                "\"--config.data.weights=('0:0.7,0.3',)\", with a weight for each from a step on"
            )
        schedule[int(step or 0)] = dict(zip(names, shares, strict=True))
    return schedule


@dataclass(kw_only=True)
class Run(Program):
    """Every part of a training run, built and sharded; see `make_run`."""

    workdir: Path
    tokenizer: Any
    train_batches: Any
    eval_batches: Mapping[str, Any]
    data_fingerprint: dict[str, str]

    @cached_property
    def rewinds(self) -> list[Rewind]:
        """What has moved the batches of later steps; see `jaxlm.rewind`."""
        return read_rewinds(self.workdir)

    def documents(self, k: int) -> list[dict[str, Any]]:
        """Where the rows of batch k come from, as JSON has it."""
        return self.train_batches.documents(k)

    def epochs_seen(self, step: int) -> dict[str, float]:
        """How often each source has been read after so many steps; batches that were left out count as read."""
        return self.train_batches.epochs_seen(position(step, self.rewinds))

    def device_batches(self, start_step: int) -> Iterator[dict[str, jax.Array]]:
        """The batches of steps `start_step`, `start_step` + 1, … on the devices."""
        data, num_steps = self.config.data, self.config.num_train_steps
        batches = make_iterator(
            StepBatches(self.train_batches, self.rewinds, num_steps),
            start_step,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
        )
        for batch in batches:
            yield self.put_batch(batch)

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch, on the run's devices."""
        return meshes.put_batch(self.mesh, batch)

    def evaluate(
        self, params: PyTree, did_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Metrics over the fixed held-out set: of all text together, and as `source/metric` for each source.

        did_batch: called after each batch; what it raises ends the evaluation.
        """
        results: dict[str, float] = {}
        pooled = MetricSums()
        for name, batches in self.eval_batches.items():
            sums = MetricSums()
            for metrics in one_behind(
                self.eval_step(params, self.put_batch(batches[index]))
                for index in range(len(batches))
            ):
                sums.add(metrics)
                did_batch()
            pooled.merge(sums)
            if len(self.eval_batches) > 1:
                means = with_perplexity(sums.means())
                results |= {f"{name}/{key}": value for key, value in means.items()}
        return with_perplexity(pooled.means()) | results

    @cached_property
    def peak(self) -> tuple[float, str]:
        """(FLOP/s of all devices together, what says so), for MFU."""
        return peak_flops(list(self.mesh.devices.flat), self.model.config.dtype)


def make_run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    allow_change: bool = False,
) -> Run:
    """Builds every part of the run that `config` describes; text is tokenized and stored if it is not yet.

    allow_change: the text may be another than the one that was stored; what was stored is read.

    Raises:
      ValueError: with what to change, if fields do not fit one another, the tokenizer or the mesh.
    """
    workdir = as_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = mesh or meshes.make_mesh(**config.mesh)
    tokenizer = make_tokenizer(config, workdir)
    program = make_program(config, mesh, tokenizer)
    stores = make_stores(config, tokenizer, workdir, allow_change)

    train = {name: open_store(config, path, "train") for name, path in stores.items()}
    refuse_short(train, config.seq_len)
    weights = mixture_weights(
        config.data.weights, list(train), [s.num_tokens for s in train.values()]
    )
    train_batches = TrainBatches(
        train,
        weights,
        program.objective,
        config.seq_len,
        config.batch_size,
        config.seed,
        rows=meshes.local_rows(mesh, config.batch_size),
    )
    eval_batches = {
        name: EvalBatches(
            open_store(config, path, "validation"),
            program.objective,
            config.seq_len,
            config.eval.batch_size,
            config.seed,
            max_batches=config.eval.num_batches,
            rows=meshes.local_rows(mesh, config.eval.batch_size),
        )
        for name, path in stores.items()
    }
    return Run(
        **program.parts(),
        workdir=workdir,
        tokenizer=tokenizer,
        train_batches=train_batches,
        eval_batches=eval_batches,
        data_fingerprint={name: store.fingerprint for name, store in train.items()},
    )


def initial_state(run: Run) -> TrainState:
    """The state that a new run starts from: random, or `init_from` another run's checkpoint.

    `init='params'` or 'ema' takes those arrays and starts at step 0; `init='state'` goes on from the
    other run's step with its optimizer state, e.g. to fork the cooldown of a WSD run.
    `init_from='hf:DIR_OR_HUB_ID[@REVISION]'` takes the parameters of a Hugging Face folder.
    What was taken is written to the workdir's origin.json: the checkpoint, or the commit of the hub.
    """
    config = run.config
    if not config.init_from:
        return run.init_state()
    if config.init_from.startswith(HUGGING_FACE):
        if config.init != "params":
            raise ValueError(f"init {config.init!r}: a Hugging Face folder has only 'params'")
        spec = config.init_from.removeprefix(HUGGING_FACE)
        weights = convert.load_params(spec, run.model.config, run.param_shapes)
        if weights.new:
            log.info("%s has no %s: initialised", spec, ", ".join(weights.new))
        write_origin(run, commit=weights.commit)
        return run.init_state(weights.params)
    if config.init not in ("params", "ema", "state"):
        raise ValueError(f"init {config.init!r} must be 'params', 'ema' or 'state'")
    source = find_step(*split_step(config.init_from))
    refuse_another_model(run, source)
    write_origin(run, checkpoint=str(source))
    if config.init == "state":
        return restore_state(source, run.state_shape)
    return run.init_state(load_item(source, run.param_shapes, config.init))


def refuse_another_model(run: Run, source: Path) -> None:
    """Raises ValueError, with all of it, where a checkpoint is of another model or tokenizer than the run's."""
    workdir, config = source.parent.parent, run.config
    its, problems = saved_config(workdir / "config.json"), []
    if "head" in its:
        problems.append(
            f"it is a fine-tuned run with a head for {its.task.name}: name what it was tuned from, {its.init_from}"
        )
    if its.family != config.family:
        problems.append(
            f"its model is of the family {its.family}, and the config's is {config.family}"
        )
    problems += [
        f"model.{name} is {its.model[name]} there and {config.model[name]} here: set --config.model.{name}={its.model[name]}"
        for name in MODEL_SIZES
        if its.model[name] != config.model[name]
    ]
    ids = stored.read_manifest(source).get("tokenizer_sha256", run.tokenizer.sha256)
    if ids != run.tokenizer.sha256:
        problems.append(
            f"its tokenizer is another, so ids would mean other tokens: set --config.tokenizer.path={workdir / 'tokenizer'}"
        )
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"init_from={config.init_from} does not fit this run:{lines}")


def write_origin(run: Run, **found: Any) -> None:
    """origin.json: what `init_from` was when the run began, which a revision or a newest step does not say later."""
    if not processes.is_main():
        return
    content = {"init_from": run.config.init_from, "init": run.config.init, **found}
    text = json.dumps(content, indent=2) + "\n"
    write_text(run.workdir / "origin.json", text)


def trained_tokenizer(step_dir: Path) -> Any:
    """The tokenizer of a checkpoint's run.

    Raises:
      Damaged: if it is not what was saved, or not the one that the checkpoint was trained with.
    """
    folder = step_dir.parent.parent / "tokenizer"
    tokenizer = tokenizers.load_tokenizer(folder)
    trained_with = stored.read_manifest(step_dir).get("tokenizer_sha256")
    if trained_with and trained_with != tokenizer.sha256:
        raise Damaged(
            f"{step_dir} was trained with another tokenizer than {folder}: bring that folder back from a copy"
        )
    return tokenizer


@dataclass(frozen=True)
class Loaded:
    """A run's model as it is stored, with the head and the adapters that it has; to use one, see `jaxlm.api`."""

    config: ConfigDict
    workdir: Path
    tokenizer: Any
    mesh: jax.sharding.Mesh
    model: nn.Module
    params: PyTree
    step: int
    item: str  # 'params' or 'ema'


def load_checkpoint(path: str | Path, *, step: int | None = None, item: str = "") -> Loaded:
    """The model of a workdir (or of one of its checkpoint folders) on this machine's first device.

    Args:
      path: workdir, its `checkpoints` folder, or one step in it.
      step: which one; default the newest.
      item: 'params', 'ema', or '' for the averaged parameters where there are some.
    """
    step_dir = find_step(path, step)
    workdir = step_dir.parent.parent
    config = saved_config(workdir / "config.json")
    tokenizer = trained_tokenizer(step_dir)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    model = make_model(config, mesh)
    abstract = sharded_shapes(mesh, abstract_params(model, ONE_TOKEN))
    item = item or evaluated_item(step_dir)
    params = load_item(step_dir, abstract, item)
    return Loaded(config, workdir, tokenizer, mesh, model, params, int(step_dir.name), item)
