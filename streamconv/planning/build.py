"""Puts a plan together: checkpoint, model and options in, plan lines out. Runs in the child."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from streamconv import formats
from streamconv.errors import BadInputError, SourceChangedError, UsageError, listed
from streamconv.files.durable import hash_file
from streamconv.files.jsonfile import read_json
from streamconv.files.names import INDEX, MANIFEST
from streamconv.files.namesakes import refuse_overlaps
from streamconv.ir.dtypes import F32, DType
from streamconv.ir.identity import JobIdentity, job_identity
from streamconv.ir.planned import OutputFile, PlanHead, SideFile, TextFile, Totals, WrittenFile
from streamconv.ir.planwriter import PlanWriter
from streamconv.ir.recipe import Recipe, Sum
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile
from streamconv.lora import adapters
from streamconv.lora import names as adapter_names
from streamconv.lora.adapters import Adapter
from streamconv.lora.plan import LoraPlan, Translate, adapter_inputs, idle_options, plan_lora
from streamconv.options import JobOptions, Layout
from streamconv.planning import averaging, checks, placing, strays, untrained
from streamconv.planning.answers import Answers, headers_json
from streamconv.planning.precision import chosen_weights
from streamconv.planning.sidefiles import (
    corrected_config,
    corrected_tokenizer,
    declared_dtype,
    left_out,
    list_side_files,
    missing_code,
    overridden,
    read_config,
)
from streamconv.quantization import decoding, encoding, scales
from streamconv.tracing.model import Model

if TYPE_CHECKING:
    from streamconv.families.converted import Converted
    from streamconv.families.native.dialect import Dialect


def build_plan(
    checkpoint: Checkpoint,
    job: JobOptions,
    stream: IO[str],
    asked: JobIdentity | None = None,
    answers: Answers | None = None,
    others: Sequence[Checkpoint] = (),
) -> None:
    """Write the plan of converting ``checkpoint`` to ``stream``.

    ``asked`` is the job that was asked for: what was read must be that one's source. ``answers`` are
    what is known about its model, ``others`` the checkpoints that it is averaged with.
    Raises :class:`BadInputError` for what is missing, contradictory or cannot be written.
    """
    answers = answers or Answers()
    checkpoint = _with_options(checkpoint, job)
    others = [_with_options(other, job) for other in others]
    notices = list(checkpoint.notices)
    folder, side = side_files(checkpoint.root, checkpoint.side_dir, job)
    notices += missing_code(side)
    inputs = formats.settings(checkpoint.root, checkpoint.format, job.model)
    inputs += adapter_inputs(checkpoint.root, job.lora)
    inputs += averaging.other_inputs(job, [(o.root, o.format, o.files) for o in others])
    at = averaging.places(job, [o.root for o in others])
    identity = job_identity(checkpoint.format, checkpoint.files, side, job, inputs, at)
    if asked not in (None, identity):
        raise SourceChangedError(
            "the checkpoint changed while it was planned",
            where=str(checkpoint.root),
            hint="run it again once nobody writes to it",
        )
    config, overrides = overridden(read_config(folder) if folder else None, job.config)
    _check_config(folder, side)
    answers.open(checkpoint, config)
    checkpoint, lora, made = _understood(checkpoint, config, job, notices, answers)
    made.config_changes = (*overrides, *made.config_changes)
    if lora is not None:
        side = lora.side(side)
    summed = None
    if job.average is not None:
        members = [_as_member(checkpoint, made, lora, job, notices)]
        for k, other in enumerate(others, 2):
            member, left = _member(k, other, config, job, notices, answers, made.model)
            members.append(member)
            made.skipped += left
        summed = averaging.summed(members, job.average, made.model)
        notices.append(averaging.told(members, job.average))
    if lora is not None and not lora.merge:
        made.skipped = lora.base_skipped()
    else:
        if summed is None:
            _refuse_unknown_names(checkpoint, made, job)
        _plan_model(made, lora, job, {s.name for s in side}, notices, summed)
        beside = folder if folder != job.lora.base else None
        made.skipped += left_out(
            beside, checkpoint.root, {checkpoint.root / f.path for f in checkpoint.files}
        )
    if lora is not None:
        _plan_adapter(made, lora, job, notices)
    tokenizer, told = corrected_tokenizer(side)
    made.texts += [tokenizer] if tokenizer else []
    notices += told
    recipes = [p.recipe for _, group in made.placed for p in group]
    notices += [
        f"--keep-dtype {pattern} matches no tensor"
        for pattern in job.keep_dtype
        if not any(fnmatch.fnmatchcase(r.name, pattern) for r in recipes)
    ]
    written = {t.name for t in made.texts}
    skipped = [*checkpoint.skipped, *made.skipped]
    totals = _totals(made.tensors, made.placed)
    if totals.unverifiable_bytes:
        notices.append(
            "the source files carry no checksums for some records: damage in them cannot be seen"
        )
    side = [s for s in side if s.name not in written | made.side_left_out]
    outputs = [output.name for output, _ in made.placed]
    refuse_overlaps([*outputs, *written, *(s.name for s in side), MANIFEST])
    writer = PlanWriter(stream)
    writer.head(
        PlanHead(
            root=str(checkpoint.root.absolute()),
            job=identity.to_json(),
            totals=totals,
            notices=tuple(notices),
            skipped=(*skipped, *checks.unused(made.tensors, recipes, {s.name for s in skipped})),
            files=made.files,
            side=tuple(side),
            written=tuple(WrittenFile(t.name, len(t.content.encode())) for t in made.texts),
        ),
        made.texts,
    )
    placing.write_sections(writer, made.placed, made.tensors)
    writer.end()
    answers.close()


def _with_options(checkpoint: Checkpoint, job: JobOptions) -> Checkpoint:
    """Return the checkpoint with the weights, and under the names, that the options ask for."""
    checkpoint = chosen_weights(checkpoint, job)
    if job.strip_prefix is not None:
        checkpoint = strays.stripped(checkpoint, job.strip_prefix)
    return checkpoint


def _understood(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers,
) -> tuple[Checkpoint, LoraPlan | None, _Output]:
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


def _member(
    number: int,
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    job: JobOptions,
    notices: list[str],
    answers: Answers,
    model: Model | None,
) -> tuple[averaging.Member, list[Skipped]]:
    """Return what would be written of checkpoint ``number`` of several, and what is left out of it.

    ``answers`` are what is known about number 1, and ``model`` is its model.
    """
    if job.hf_config is None:
        own = read_config(checkpoint.side_dir) if checkpoint.side_dir else None
        averaging.refuse_other_config(checkpoint.root, own, config, model)
    told = list(checkpoint.notices)
    own_answers = answers.about(checkpoint, config)
    checkpoint, lora, made = _understood(checkpoint, config, job, told, own_answers)
    member = _as_member(checkpoint, made, lora, job, told)
    if own_answers is not answers:
        own_answers.close()
        answers.remembered &= own_answers.remembered
    notices += [f"checkpoint {number}: {n}" for n in told if n not in notices]
    skipped = (*checkpoint.skipped, *made.skipped)
    return member, [Skipped(f"{number}:{s.name}", s.reason) for s in skipped]


def _as_member(
    checkpoint: Checkpoint,
    made: _Output,
    lora: LoraPlan | None,
    job: JobOptions,
    notices: list[str],
) -> averaging.Member:
    """Return what would be written of a checkpoint, to be averaged with others."""
    if lora is not None and not lora.merge:
        raise BadInputError(
            "an adapter without its base model cannot be averaged: a sum of products is not a product "
            "of sums",
            where=str(checkpoint.root),
            hint="--base DIR names the model that it is merged into before",
        )
    _refuse_unknown_names(checkpoint, made, job)
    recipes, quantized = _named(made, lora, job, notices)
    if quantized.weights:
        raise BadInputError(
            f"{len(quantized.weights)} weights are quantized: codes are not averaged",
            where=str(checkpoint.root),
            found=listed(quantized.weights),
            hint="--dequantize makes floats of them, and --quantize RULE codes of their average",
        )
    decoded: dict[str, DType] = {}
    if made.decoded is not None:
        named = declared_dtype(made.config) if made.config else None
        dtype = decoding.float_type(job.dtype, named)
        decoded = {r.name: dtype for r in recipes if made.decoded.takes_part(r)}
        recipes, made.tensors = made.decoded.resolved(recipes, made.tensors)
    if lora is not None:
        made.tensors = lora.tensors(made.tensors)
    return averaging.Member(
        checkpoint.root,
        recipes,
        made.tensors,
        made.files,
        checks.decide_ties(recipes, made.model, made.tensors),
        decoded,
    )


def _check_config(folder: Path | None, side: Iterable[SideFile]) -> None:
    """Raise :class:`SourceChangedError` where the config that was read is not that of the job."""
    for file in side:
        if folder and file.name == "config.json" and hash_file(folder / file.name) != file.xxh3:
            raise SourceChangedError("config.json changed while it was read", where=file.path)


@dataclass
class _Output:
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
) -> _Output:
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
        return _Output(
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
        notices.append(
            "no config.json: names and shapes could not be checked, and the output has none "
            "(--hf-config DIR names a folder that has it)"
        )
    chosen, model, prefix = one_model(checkpoint, config, job, notices, answers)
    tensors = checks.decide_plain(chosen, model)
    architecture = model.architecture if model is not None and model.certain else None
    tensors = {n: tensors[n] for n in (*chosen.tensors, *chosen.undecided)}
    left = chosen.skipped[len(checkpoint.skipped) :]
    return _Output(tensors, config, model, architecture, (), [], list(left), prefix=prefix)


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
) -> _Output:
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
    return _Output(
        tensors,
        found.config,
        found.model,
        found.architecture,
        found.changes,
        recipes,
        [*left, *found.skipped],
    )


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


def _named(
    made: _Output, lora: LoraPlan | None, job: JobOptions, notices: list[str]
) -> tuple[list[Recipe], scales.Quantized]:
    """Return the recipes of the model's tensors, merged with an adapter, and what is quantized."""
    model = made.model
    if job.value_head == "drop":
        _drop_value_head(made)
    if lora is not None:
        made.tensors = lora.with_tied(made.tensors, model)
    recipes = made.recipes or _recipes(made, job, notices)
    expected = checks.expected_shapes(model, job)
    recipes = scales.with_names_of_weights(recipes, expected)
    quantized = scales.find({r.name: (r.view.shape, r.dtype) for r in recipes}, expected)
    if model is not None and not made.recipes:
        named = [r for r in recipes if r.name not in quantized.scales]
        notices += checks.check_recipes(named, model, job)
    if lora is not None:
        if made.recipes:
            recipes, made.tensors = lora.in_pieces(recipes, made.tensors)
        recipes = lora.merged(recipes, made.tensors, model)
    return recipes, quantized


def _plan_model(
    made: _Output,
    lora: LoraPlan | None,
    job: JobOptions,
    side: Collection[str],
    notices: list[str],
    summed: averaging.Summed | None,
) -> None:
    """Add the model's files: the weights, merged where there is an adapter, index and config.

    ``summed`` are the weights where they are averages.
    """
    config, model = made.config, made.model
    if summed is None:
        recipes, quantized = _named(made, lora, job, notices)
    else:
        recipes, quantized = summed.recipes, scales.Quantized({}, {}, {})
        made.tensors, made.files, made.decoded = summed.tensors, summed.files, None
    declared = declared_dtype(config) if config else None
    encoded: frozenset[str] = frozenset()
    if job.quantize is not None:
        # Straight from what the source holds, whatever --dtype makes of the others.
        encoded = encoding.chosen_weights(recipes, job.quantize, job.keep_dtype)
        recipes = encoding.others_as(
            decoding.float_type(job.dtype, declared), recipes, encoded, made.decoded
        )
    fixed = {*quantized.weights, *quantized.scales, *encoded}
    recipes = checks.with_dtypes(recipes, job, model, declared, fixed=fixed)
    if summed is not None:
        recipes = summed.rounded(recipes, encoded)
    if made.decoded is not None:
        if quantized.weights:
            raise decoding.not_decoded(next(iter(quantized.weights)))
        recipes, made.tensors = made.decoded.resolved(recipes, made.tensors)
    if quantized.weights and job.dtype != "keep":
        notices.append(
            f"--dtype {job.dtype} does not touch {len(quantized.weights)} quantized weights and their "
            "scales: they are written as they are. --dequantize makes floats of them"
        )
    ties = summed.ties if summed is not None else checks.decide_ties(recipes, model, made.tensors)
    for alias, kept in ties.kept.items():
        notices.append(
            f"{alias} is tied to {kept} by the config but not known to equal it: both kept"
        )
    if model is not None and job.layout == "hub":
        left = {*ties.dropped, *ties.compared, *quantized.scales}
        written = [r for r in recipes if r.name not in left]
        checks.check_loads(written, model, sure=model.certain or bool(made.recipes))
    if job.quantize is not None:
        recipes = encoding.quantized(recipes, job.quantize, encoded)
    made.placed += placing.shard(recipes, ties, job.max_shard_bytes)
    made.skipped += [Skipped(a, f"the same storage as {k}") for a, k in ties.dropped.items()]
    made.skipped += [Skipped(a, f"tied: the same bytes as {k}") for a, k in ties.compared.items()]
    if config is not None:
        config = _quantization(made, config, quantized, job, side)
        if job.quantize is not None:
            config, told = encoding.described(config, recipes, job.quantize)
            made.config_changes += tuple(told)
        text, told = corrected_config(
            config,
            dtype=checks.main_float_dtype(recipes, quantized),
            untie=bool(ties.kept),
            tied=bool(model.tied) and not ties.kept if model is not None else None,
            alike=model.reads_alike if model is not None else None,
            architecture=made.architecture,
            changes=made.config_changes,
        )
        notices += told
        if text:
            made.texts.append(text)
    if len(made.placed) > 1:
        made.texts.append(TextFile(INDEX, placing.index_json(made.placed)))


def _quantization(
    made: _Output,
    config: Mapping[str, Any],
    quantized: scales.Quantized,
    job: JobOptions,
    side: Collection[str],
) -> Mapping[str, Any]:
    """Return a config that says of quantization what is true of the weights; so do the side files."""
    own_file = scales.HF_QUANT_CONFIG
    base = None
    if job.lora.base is not None and quantized.weights:
        base = read_config(job.lora.base)
        path = job.lora.base / own_file
        if path.is_file() and own_file not in side:
            text = json.dumps(read_json(path, most_bytes=1 << 24), indent=4, ensure_ascii=False)
            made.texts.append(TextFile(own_file, text + "\n"))
    elsewhere = own_file in side or bool(made.texts)
    config, told = scales.following(config, quantized, base=base, elsewhere=elsewhere)
    made.config_changes += tuple(told)
    if own_file in side and not quantized:
        made.side_left_out.add(own_file)
        made.skipped.append(Skipped(own_file, "the weights are not quantized"))
    return config


def _plan_adapter(made: _Output, lora: LoraPlan, job: JobOptions, notices: list[str]) -> None:
    """Add the adapter's files where they are asked for."""
    made.tensors = lora.tensors(made.tensors)
    notices += lora.notices()
    if lora.hand_on:
        declared = declared_dtype(made.config) if made.config else None
        recipes = checks.with_dtypes(adapters.recipes(lora.handed_on), job, None, declared)
        # Before the model: a folder is ready when its last file is there.
        made.placed.insert(0, placing.single_file(lora.weights_name, recipes))
        made.texts.append(lora.config(made.model))


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


def _refuse_unknown_names(checkpoint: Checkpoint, made: _Output, job: JobOptions) -> None:
    """Refuse names that no model on the Hub has, or may have, where there is no model to ask."""
    if made.model is not None or made.recipes or job.layout == "memory":
        return
    from streamconv.families import native
    from streamconv.tracing.hf_names import doubtful

    config = made.config
    trainers = checkpoint.naming == "trainer" or (config is None and native.find(made.tensors))
    strange = [*made.tensors] if trainers else doubtful(made.tensors)
    if not strange:
        return
    raise BadInputError(
        "the Hub's names of these tensors are not known: the names may be the trainer's",
        where=str(checkpoint.root),
        expected="in huggingface/ or beside the weights, config.json of a model that transformers has",
        found=f"{strange[0]}, and "
        + ("no config.json" if config is None else f"the model type {config.get('model_type')!r}"),
        hint="--hf-config DIR names a folder that has it, and the tokenizer; "
        "--layout memory writes the tensors under the names that they have",
    )


def _refuse_family(job: JobOptions) -> None:
    if job.family is not None:
        raise UsageError(
            "--family is for checkpoints with names of Megatron or of a trainer's own",
            found="a checkpoint whose tensors have HuggingFace's names",
        )


def side_files(
    root: Path, side_dir: Path | None, job: JobOptions
) -> tuple[Path | None, list[SideFile]]:
    """Return the folder with config and tokenizer, and the files to copy from it."""
    if job.hf_config is not None:
        if not job.hf_config.is_dir():
            raise UsageError("--hf-config names no folder", where=str(job.hf_config))
        named = list(list_side_files(job.hf_config, root=root, named=True))
        own = [] if side_dir is None else list_side_files(side_dir, root=root)
        if "config.json" in {s.name for s in own} - {s.name for s in named}:
            raise UsageError(
                "the folder that --hf-config names has no config.json, and the checkpoint has one",
                where=str(job.hf_config),
                found=", ".join(s.name for s in named[:8]) or "no file that belongs to a model",
                hint=f"leave out --hf-config to use {side_dir}, or name a model's folder",
            )
        return job.hf_config, named
    if side_dir is None and job.lora.base is not None:
        return job.lora.base, list(list_side_files(job.lora.base, root=root, named=True))
    if side_dir is None:
        return None, []
    return side_dir, list(list_side_files(side_dir, root=root))


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


def _recipes(made: _Output, job: JobOptions, notices: list[str]) -> list[Recipe]:
    tensors, model = made.tensors, made.model
    if not tensors:
        raise BadInputError("the checkpoint holds no tensor")
    if model is None:
        return [
            Recipe.identity(n.removeprefix(made.prefix), t.fqn, t.shape, t.dtype)
            for n, t in tensors.items()
        ]
    recipes, told = model.recipes({n: (t.shape, t.dtype) for n, t in tensors.items()}, job.layout)
    notices += told
    return list(recipes)


def _drop_value_head(made: _Output) -> None:
    """Leave out the head of trl's AutoModelForCausalLMWithValueHead, which other loaders refuse."""
    dropped = [n for n in made.tensors if "v_head" in n.split(".")]
    if not dropped:
        names = [*made.tensors, *(r.name for r in made.recipes)]
        score = any(n.split(".")[-2:-1] == ["score"] for n in names)
        raise UsageError(
            "--value-head drop is given, but this model has no v_head",
            found="a score head, without which the model does not load" if score else None,
        )
    for name in dropped:
        del made.tensors[name]
        made.skipped.append(Skipped(name, "--value-head drop"))


def _totals(
    tensors: dict[str, GlobalTensor],
    placed: list[tuple[Any, list[placing.Placed]]],
) -> Totals:
    # In an order that is always the same: a plan is the same to the byte whenever it is made.
    used = dict.fromkeys(f for _, group in placed for p in group for f in p.recipe.view.sources())
    written = [p for _, group in placed for p in group if p.same_as is None]
    # A record of a flat group holds many tensors, and counts once.
    unverifiable = {
        (r.file, r.start): r.nbytes
        for f in used
        if not all(tensors[f].shards.crcs)
        for r in tensors[f].shards
        if not r.crc32
    }
    return Totals(
        tensors=len(written),
        parameters=sum(math.prod(p.recipe.shape) for p in written),
        read_bytes=sum(tensors[f].nbytes for f in used),
        write_bytes=sum(output.nbytes for output, _ in placed),
        unverifiable_bytes=sum(unverifiable.values()),
        source_dtypes=checks.dtype_histogram((tensors[f].dtype, tensors[f].nbytes) for f in used),
        output_dtypes=checks.dtype_histogram((p.recipe.dtype, p.end - p.begin) for p in written),
        merged=sum(1 for p in written if p.recipe.view.products()),
        scaled=sum(1 for p in written if p.recipe.view.scales()),
        encoded=sum(1 for p in written if p.recipe.encode is not None),
        summed=sum(1 for p in written if isinstance(p.recipe.view.base, Sum)),
    )
