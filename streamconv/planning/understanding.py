"""What a checkpoint holds: whose names, which model, and what its tensors make. Runs in the child."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamconv.errors import BadInputError, UsageError
from streamconv.ir.dtypes import F32
from streamconv.ir.planned import OutputFile, TextFile
from streamconv.ir.recipe import Recipe
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile
from streamconv.lora import names as adapter_names
from streamconv.lora.adapters import Adapter
from streamconv.lora.plan import LoraPlan, Translate, idle_options, plan_lora
from streamconv.options import NO_CONFIG, JobOptions, Layout
from streamconv.planning import checks, placing, strays, untrained
from streamconv.planning.answers import Answers, headers_json
from streamconv.planning.precision import chosen_weights
from streamconv.planning.sidefiles import (
    declared_dtype,
    read_config,
)
from streamconv.quantization import decoding
from streamconv.tracing.model import Model

if TYPE_CHECKING:
    from streamconv.families.converted import Converted
    from streamconv.families.native.dialect import Dialect


@dataclass
class Output:
    """What goes into the output: first what it is made of, then what is made of that.

    ``recipes`` are the model's. ``skipped`` are sources that are left out. ``prefix`` is what the names
    begin with, of a model among several. ``files`` are sources beside the checkpoint's.
    """

    tensors: dict[str, GlobalTensor]
    config: Mapping[str, Any] | None
    model: Model | None
    architecture: str | None
    config_changes: tuple[str, ...]
    recipes: list[Recipe]
    skipped: list[Skipped] = field(default_factory=list)
    prefix: str = ""
    files: tuple[SourceFile, ...] = ()
    placed: list[tuple[OutputFile, list[placing.Placed]]] = field(default_factory=list)
    texts: list[TextFile] = field(default_factory=list)
    side_left_out: set[str] = field(default_factory=set)
    decoded: decoding.Decoded | None = None


def with_options(checkpoint: Checkpoint, job: JobOptions) -> Checkpoint:
    """Return the checkpoint with the weights, and under the names, that the options ask for."""
    checkpoint = chosen_weights(checkpoint, job)
    if job.strip_prefix is not None:
        checkpoint = strays.stripped(checkpoint, job.strip_prefix)
    return checkpoint


def understood(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers,
) -> tuple[Checkpoint, LoraPlan | None, Output]:
    """Return the checkpoint that is there, its adapter, and what its tensors make."""
    translate = _translation(checkpoint, config, job, notices, answers)
    lora = plan_lora(checkpoint, job.lora, translate)
    if lora is not None:
        checkpoint = lora.checkpoint
    else:
        notices += idle_options(job.lora)
    decoded = _decoded(checkpoint, config, job, notices)
    if decoded is not None:
        checkpoint = decoded.checkpoint
        if lora is not None:
            lora = dataclasses.replace(lora, checkpoint=checkpoint)
    # An adapter's names were a family's, and are the Hub's now.
    done = (
        lora is not None
        and translate is not None
        and checkpoint.naming != "mcore"
        and _dialect(checkpoint, config, job) is None
    )
    as_named = dataclasses.replace(job, family=None) if done else job
    made = _sources(checkpoint, config, as_named, notices, answers)
    if checkpoint.unproved and not (made.model is not None and made.model.certain):
        raise BadInputError(
            checkpoint.unproved,
            where=str(checkpoint.root),
            hint="--hf-config DIR names a folder that has it",
        )
    made.files = (*checkpoint.files, *made.files)
    made.decoded = decoded
    if lora is not None:
        lora = lora.fitted(made.model)
    return checkpoint, lora, made


def _decoded(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, job: JobOptions, notices: list[str]
) -> decoding.Decoded | None:
    """Return the checkpoint with floats in the place of quantized weights, where that is asked for."""
    if not job.dequantize and job.quantize is None:
        return None
    base = read_config(job.lora.base) if job.lora.base is not None else None
    # Its own may say how large blocks are where that of all, or of the first of several, does not.
    own = read_config(checkpoint.side_dir) if checkpoint.side_dir is not None else None
    configs = [c for c in (base, config, own) if c is not None]
    declared = declared_dtype(config) if config else None
    dtype = decoding.float_type(job.dtype, declared)
    # What is quantized again, or averaged, is not rounded on the way.
    between = F32 if job.quantize is not None or job.average is not None else dtype
    decoded = decoding.decode(checkpoint, configs, between)
    if decoded is None and not job.dequantize:
        return None
    if decoded is None:
        notices.append("--dequantize is without effect: no weight is quantized")
    else:
        notices.append(decoded.notice(F32 if job.quantize is not None else dtype))
    return decoded


def _sources(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers,
) -> Output:
    if checkpoint.naming == "mcore":
        from streamconv.families.converted import left_out as parts_left_out

        found = _of_family(checkpoint, config, job, answers)
        notices += [n for n in found.notices if n not in notices]
        filled = untrained.fill(checkpoint, parts_left_out(found), job.lora.base)
        if filled.recipes:
            notices.append(
                f"{len(filled.recipes)} tensors of parts that Megatron did not train are those of "
                f"{job.lora.base}"
            )
        recipes = [*found.recipes, *filled.recipes]
        if found.model is not None:
            notices += checks.check_recipes(recipes, found.model, job, found.extras)
        if not filled.recipes:
            untrained.refuse_idle(checkpoint, job.lora.base)
        return Output(
            {**checkpoint.tensors, **{t.fqn: t for t in filled.tensors}},
            found.config,
            found.model,
            found.architecture,
            found.changes,
            recipes,
            files=filled.files,
        )
    dialect = _dialect(checkpoint, config, job)
    if dialect is not None:
        return _of_dialect(checkpoint, dialect, config, job, notices, answers)
    _refuse_family(job)
    if config is None:
        notices.append(NO_CONFIG)
    chosen, model, prefix = one_model(checkpoint, config, job, notices, answers)
    tensors = checks.decide_plain(chosen, model)
    architecture = model.architecture if model is not None and model.certain else None
    tensors = {n: tensors[n] for n in (*chosen.tensors, *chosen.undecided)}
    left = chosen.skipped[len(checkpoint.skipped) :]
    return Output(tensors, config, model, architecture, (), [], list(left), prefix=prefix)


def one_model(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers | None = None,
) -> tuple[Checkpoint, Model | None, str]:
    """Return the checkpoint with one model in it, that model, and what its names begin with.

    The user may have named it among several (:mod:`streamconv.planning.strays`); a folder of
    that name was found before.
    """
    answers = answers or Answers()
    names = [*checkpoint.tensors, *checkpoint.undecided]
    model = _model(config, names, job.layout, notices, answers)
    wanted = job.model if job.model != checkpoint.root.absolute().name else None
    chosen, prefix = strays.choose(
        checkpoint,
        model.has if model is not None else None,
        wanted,
        keep_buffers=job.keep_buffers,
    )
    if model is not None and chosen is not checkpoint:
        # Heads of the others must not betray a critic.
        model = _model(config, [*chosen.tensors, *chosen.undecided], job.layout, [], answers)
    return chosen, model, prefix


def _model(
    config: Mapping[str, Any] | None,
    names: list[str],
    layout: Layout,
    notices: list[str],
    answers: Answers,
) -> Model | None:
    if config is None:
        return None
    model = answers.model(config, names, layout)
    if model is None:
        notices.append(
            f"transformers does not know the model type {config.get('model_type')!r}: converted by "
            "names alone, names and shapes are not checked"
        )
    return model


def _dialect(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, job: JobOptions
) -> Dialect | None:
    """Return whose names these are, where they are a trainer's own and are to become the Hub's."""
    if checkpoint.naming == "mcore":
        return None
    from streamconv.families import native

    names = [*checkpoint.tensors, *checkpoint.undecided]
    dialect = native.find(names) or native.of_layers(adapter_names.weights(names))
    # Models whose code is not transformers' may have such names on the Hub.
    if dialect is None or (checkpoint.naming == "hf" and not dialect.knows(config)):
        return None
    if job.layout == "hub":
        return dialect
    if config is not None:
        raise UsageError(
            "--layout memory is for checkpoints of transformers models",
            found=f"{dialect.name}'s names, which are not a state dict's of the model in config.json",
            hint="leave it out: the tensors become those of the Hub. Without any config.json they are "
            "written under the names that they have",
        )
    return None


def _of_dialect(
    checkpoint: Checkpoint,
    dialect: Dialect,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers,
) -> Output:
    from streamconv.families.native.beside import said_of_run

    wanted = job.model if job.model != checkpoint.root.absolute().name else None
    chosen, _ = strays.choose(checkpoint, dialect.has, wanted, keep_buffers=job.keep_buffers)
    tensors = checks.decide_plain(chosen, None)
    headers = {n: (t.shape, t.dtype) for n, t in tensors.items()}
    run, options = said_of_run(checkpoint.root), _for_family(job)

    def convert() -> Converted:
        from streamconv.families.native import convert

        return convert.convert(dialect, headers, config, run, options)

    found = answers.converted(
        [dialect.name, headers_json(headers), config, run, options.to_json()], convert
    )
    recipes = list(found.recipes)
    notices += [n for n in found.notices if n not in notices]
    if found.model is not None:
        notices += checks.check_recipes(recipes, found.model, job, found.extras)
    left = chosen.skipped[len(checkpoint.skipped) :]
    return Output(
        tensors,
        found.config,
        found.model,
        found.architecture,
        found.changes,
        recipes,
        [*left, *found.skipped],
    )


def _of_family(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, job: JobOptions, answers: Answers
) -> Converted:
    headers, options = checkpoint.headers(), _for_family(job)
    said = checkpoint.facts.get("megatron")
    megatron = said if isinstance(said, Mapping) else {}

    def convert() -> Converted:
        from streamconv.families.convert import convert

        return convert(headers, config, megatron, options)

    facts = dict(megatron)
    return answers.converted(
        ["mcore", headers_json(headers), config, facts, options.to_json()], convert
    )


def _for_family(job: JobOptions) -> JobOptions:
    """Return those options that the rules of a family may depend on."""
    return JobOptions(family=job.family, layout=job.layout)


def _refuse_family(job: JobOptions) -> None:
    if job.family is not None:
        raise UsageError(
            "--family is for checkpoints with names of Megatron or of a trainer's own",
            found="a checkpoint whose tensors have HuggingFace's names",
        )


def _translation(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers,
) -> Translate | None:
    """Return what makes an adapter on HuggingFace's modules of one on a trainer's own."""
    dialect = _dialect(checkpoint, config, job)
    if dialect is not None:
        return functools.partial(_of_native, dialect, config, job, notices, answers)
    if checkpoint.naming != "mcore":
        return None

    def translate(adapter: Adapter, source: Checkpoint) -> Adapter:
        answers.asks_anew()
        from streamconv.families.convert import check_run, describe
        from streamconv.lora import megatron

        run = source.facts.get("megatron")
        weights = megatron.weights(adapter)
        facts = run if isinstance(run, Mapping) else {}
        described = describe(config, facts, job, weights, source.tensors)
        told = [*described.notices, *check_run(described, weights)]
        # A merge into the checkpoint's own weights tells the same again.
        notices.extend(n for n in told if n not in notices)
        return megatron.translated(adapter, source, described)

    return translate


def _of_native(
    dialect: Dialect,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers,
    adapter: Adapter,
    source: Checkpoint,
) -> Adapter:
    """Return an adapter on HuggingFace's modules of one on those of ``dialect``."""
    answers.asks_anew()
    from streamconv.families.native.beside import said_of_run
    from streamconv.families.native.convert import describe, untold_heads
    from streamconv.lora import native

    described = describe(dialect, config, said_of_run(source.root), _for_family(job))
    told = [*described.notices, *untold_heads(described)]
    notices.extend(n for n in told if n not in notices)
    return native.translated(adapter, source, dialect, described)
