"""Puts a plan together: checkpoint, model and options in, plan lines out. Runs in the child."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from streamconv.errors import BadInputError, SourceChangedError, UsageError, listed
from streamconv.files.durable import hash_file
from streamconv.files.jsonfile import read_json
from streamconv.files.names import HF_QUANT_CONFIG, INDEX, MANIFEST
from streamconv.files.namesakes import refuse_overlaps
from streamconv.ir.dtypes import DType
from streamconv.ir.identity import JobIdentity
from streamconv.ir.planned import PlanHead, SideFile, TextFile, Totals, WrittenFile
from streamconv.ir.planwriter import PlanWriter
from streamconv.ir.recipe import Recipe, Sum
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped
from streamconv.lora import adapters
from streamconv.lora.plan import LoraPlan
from streamconv.options import JobOptions
from streamconv.planning import averaging, checks, placing, version_4
from streamconv.planning.answers import Answers
from streamconv.planning.inputs import Contents, identity_of
from streamconv.planning.sidefiles import (
    corrected_config,
    corrected_tokenizer,
    declared_dtype,
    left_out,
    missing_code,
    overridden,
    read_config,
    side_files,
)
from streamconv.planning.understanding import Output, understood, with_options
from streamconv.quantization import decoding, encoding, scales
from streamconv.tracing.model import Model


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
    checkpoint = with_options(checkpoint, job)
    others = [with_options(other, job) for other in others]
    notices = list(checkpoint.notices)
    folder, side = side_files(checkpoint.root, checkpoint.side_dir, job)
    notices += missing_code(side)
    source, *averaged = [Contents(c.root, c.format, c.files) for c in (checkpoint, *others)]
    identity = identity_of(source, side, job, averaged)
    if asked not in (None, identity):
        raise SourceChangedError(
            "the checkpoint changed while it was planned",
            where=str(checkpoint.root),
            hint="run it again once nobody writes to it",
        )
    config, overrides = overridden(read_config(folder) if folder else None, job.config)
    _check_config(folder, side)
    answers.open(checkpoint, config)
    checkpoint, lora, made = understood(checkpoint, config, job, notices, answers)
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
    checkpoint, lora, made = understood(checkpoint, config, job, told, own_answers)
    member = _as_member(checkpoint, made, lora, job, told)
    if own_answers is not answers:
        own_answers.close()
        answers.remembered &= own_answers.remembered
    notices += [f"checkpoint {number}: {n}" for n in told if n not in notices]
    skipped = (*checkpoint.skipped, *made.skipped)
    return member, [Skipped(f"{number}:{s.name}", s.reason) for s in skipped]


def _as_member(
    checkpoint: Checkpoint,
    made: Output,
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


def _named(
    made: Output, lora: LoraPlan | None, job: JobOptions, notices: list[str]
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
    checks.check_kinds(recipes, model)
    if model is not None and not made.recipes:
        named = [r for r in recipes if r.name not in quantized.scales]
        notices += checks.check_recipes(named, model, job)
    if lora is not None:
        if made.recipes:
            recipes, made.tensors = lora.in_pieces(recipes, made.tensors)
        recipes = lora.merged(recipes, made.tensors, model)
    return recipes, quantized


def _plan_model(
    made: Output,
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
        tied = bool(model.tied) and not ties.kept if model is not None else None
        text, told = corrected_config(
            config,
            dtype=checks.main_float_dtype(recipes, quantized),
            untie=bool(ties.kept),
            tied=tied,
            alike=model.reads_alike if model is not None else None,
            architecture=made.architecture,
            changes=made.config_changes,
        )
        notices += told
        said = tied if ties.kept else config.get("tie_word_embeddings", tied)
        notices += version_4.unlike(config, made.architecture, said)
        if text:
            made.texts.append(text)
    if len(made.placed) > 1:
        made.texts.append(TextFile(INDEX, placing.index_json(made.placed)))


def _quantization(
    made: Output,
    config: Mapping[str, Any],
    quantized: scales.Quantized,
    job: JobOptions,
    side: Collection[str],
) -> Mapping[str, Any]:
    """Return a config that says of quantization what is true of the weights; so do the side files."""
    own_file = HF_QUANT_CONFIG
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


def _plan_adapter(made: Output, lora: LoraPlan, job: JobOptions, notices: list[str]) -> None:
    """Add the adapter's files where they are asked for."""
    made.tensors = lora.tensors(made.tensors)
    notices += lora.notices()
    if lora.hand_on:
        declared = declared_dtype(made.config) if made.config else None
        recipes = checks.with_dtypes(adapters.recipes(lora.handed_on), job, None, declared)
        # Before the model: a folder is ready when its last file is there.
        made.placed.insert(0, placing.single_file(lora.weights_name, recipes))
        made.texts.append(lora.config(made.model))


def _refuse_unknown_names(checkpoint: Checkpoint, made: Output, job: JobOptions) -> None:
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


def _recipes(made: Output, job: JobOptions, notices: list[str]) -> list[Recipe]:
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


def _drop_value_head(made: Output) -> None:
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
