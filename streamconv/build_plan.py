"""Puts a plan together: checkpoint, model and options in, plan lines out. Runs in the child."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from streamconv import planner
from streamconv.errors import BadInputError, UsageError
from streamconv.identity import job_identity
from streamconv.lowering import sources_of
from streamconv.options import JobOptions
from streamconv.plan import INDEX, PlanHead, PlanWriter, SideFile, TextFile, Totals
from streamconv.recipe import Recipe
from streamconv.sidefiles import (
    corrected_config,
    declared_dtype,
    left_out,
    list_side_files,
    read_config,
)
from streamconv.source import Checkpoint, GlobalTensor, Skipped

if TYPE_CHECKING:
    from streamconv.families.convert import Converted


def build_plan(checkpoint: Checkpoint, job: JobOptions, stream: IO[str]) -> None:
    """Write the plan of converting ``checkpoint`` to ``stream``.

    Raises :class:`BadInputError` for what is missing, contradictory or cannot be written.
    """
    notices = list(checkpoint.notices)
    folder, side = side_files(checkpoint.root, checkpoint.side_dir, job)
    config: Mapping[str, Any] | None = read_config(folder) if folder else None
    if config is None and checkpoint.naming == "hf":
        notices.append(
            "no config.json: names and shapes could not be checked, and the output has none "
            "(--hf-config DIR names a folder that has it)"
        )
    names = [*checkpoint.tensors, *checkpoint.undecided]
    _refuse_lora(names)
    changes: tuple[str, ...] = ()
    model: planner.Model | None
    left: tuple[Skipped, ...] = ()
    if checkpoint.naming == "mcore":
        tensors = dict(checkpoint.tensors)
        converted = _of_family(checkpoint, config, job)
        config, model, changes = converted.config, converted.model, converted.changes
        architecture = converted.architecture
        recipes, left = list(converted.recipes), converted.skipped
        notices += converted.notices
        if model is not None:
            notices += planner.check_recipes(recipes, model, job, converted.extras)
    else:
        _refuse_family(job)
        model = _model(config, names, notices)
        tensors = planner.decide_plain(checkpoint, model)
        tensors = {n: tensors[n] for n in names}
        recipes = _recipes(tensors, model, job, notices)
        architecture = model.architecture if model is not None and model.certain else None
    declared = declared_dtype(config) if config else None
    recipes = planner.with_dtypes(recipes, job, model, declared)
    ties = planner.decide_ties(recipes, model, tensors)
    notices += [
        f"--keep-dtype {pattern} matches no tensor"
        for pattern in job.keep_dtype
        if not any(fnmatch.fnmatchcase(r.name, pattern) for r in recipes)
    ]
    for alias, kept in ties.kept.items():
        notices.append(
            f"{alias} is tied to {kept} by the config but not known to equal it: both kept"
        )
    placed = planner.shard(recipes, ties, job.max_shard_bytes)

    texts = []
    if config is not None:
        text, told = corrected_config(
            config,
            dtype=planner.main_float_dtype(recipes),
            untie=bool(ties.kept),
            known=model is not None,
            architecture=architecture,
            changes=changes,
        )
        notices += told
        if text:
            texts.append(text)
    if len(placed) > 1:
        texts.append(TextFile(INDEX, planner.index_json(placed)))
    written = {t.name for t in texts}

    skipped = [
        *checkpoint.skipped,
        *left,
        *(left_out(folder) if folder else ()),
        *(Skipped(a, f"the same storage as {k}") for a, k in ties.dropped.items()),
        *(Skipped(a, f"tied: the same bytes as {k}") for a, k in ties.compared.items()),
        *planner.unused(tensors, recipes, {s.name for s in left}),
    ]
    totals = _totals(tensors, placed)
    if totals.unverifiable_bytes:
        notices.append(
            "the source files carry no checksums for some records: damage in them cannot be seen"
        )
    writer = PlanWriter(stream)
    writer.head(
        PlanHead(
            root=str(checkpoint.root.absolute()),
            job=job_identity(checkpoint.format, checkpoint.files, side, job),
            totals=totals,
            notices=tuple(notices),
            skipped=tuple(skipped),
            files=checkpoint.files,
            side=tuple(s for s in side if s.name not in written),
            texts=tuple(texts),
        )
    )
    planner.write_sections(writer, placed, tensors)
    writer.end()


# How PEFT names what it adds to a model (peft/tuners/lora/layer.py).
_LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")


def _refuse_lora(names: list[str]) -> None:
    adapters = [n for n in names if _LORA.search(n)]
    if adapters:
        raise BadInputError(
            "this is a LoRA checkpoint, and merging LoRA weights is not supported yet",
            where=adapters[0],
            found=f"{len(adapters)} adapter tensors among {len(names)}",
            hint="merge it with PEFT before saving; converting the base weights alone would give "
            "the model as it was before training",
        )


def _of_family(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, job: JobOptions
) -> Converted:
    from streamconv.families.convert import convert

    headers = {n: (t.shape, t.dtype) for n, t in checkpoint.tensors.items()}
    megatron = checkpoint.facts.get("megatron")
    return convert(headers, config, megatron if isinstance(megatron, Mapping) else {}, job)


def _refuse_family(job: JobOptions) -> None:
    if job.family is not None:
        raise UsageError(
            "--family is for Megatron checkpoints",
            found="a checkpoint whose tensors have HuggingFace's names",
        )


def side_files(
    root: Path, side_dir: Path | None, job: JobOptions
) -> tuple[Path | None, list[SideFile]]:
    """Return the folder with config and tokenizer, and the files to copy from it."""
    if job.hf_config is not None:
        if not job.hf_config.is_dir():
            raise UsageError("--hf-config names no folder", where=str(job.hf_config))
        return job.hf_config, list(list_side_files(job.hf_config, root=None))
    if side_dir is None:
        return None, []
    return side_dir, list(list_side_files(side_dir, root=root))


def _model(
    config: Mapping[str, Any] | None, names: list[str], notices: list[str]
) -> planner.Model | None:
    if config is None:
        return None
    from streamconv.tracing.hf import build_meta

    model = build_meta(config, names)
    if model is None:
        notices.append(
            f"transformers does not know the model type {config.get('model_type')!r}: converted by "
            "names alone, names and shapes are not checked"
        )
    return model


def _recipes(
    tensors: dict[str, GlobalTensor],
    model: planner.Model | None,
    job: JobOptions,
    notices: list[str],
) -> list[Recipe]:
    if not tensors:
        raise BadInputError("the checkpoint holds no tensor")
    if model is None:
        return [planner.identity_recipe(n, t) for n, t in tensors.items()]
    recipes, told = model.recipes({n: (t.shape, t.dtype) for n, t in tensors.items()}, job.layout)
    notices += told
    notices += planner.check_recipes(recipes, model, job)
    return list(recipes)


def _totals(
    tensors: dict[str, GlobalTensor],
    placed: list[tuple[Any, list[planner.Placed]]],
) -> Totals:
    used = {f for _, group in placed for p in group for f in sources_of(p.recipe.view)}
    written = [p for _, group in placed for p in group if p.same_as is None]
    unverifiable = sum(
        nbytes
        for f in used
        for nbytes, crc in zip(tensors[f].shards.nbytes, tensors[f].shards.crcs, strict=True)
        if not crc
    )
    return Totals(
        tensors=len(written),
        parameters=sum(math.prod(p.recipe.view.shape) for p in written),
        read_bytes=sum(tensors[f].nbytes for f in used),
        write_bytes=sum(output.nbytes for output, _ in placed),
        unverifiable_bytes=unverifiable,
        source_dtypes=planner.dtype_histogram((tensors[f].dtype, tensors[f].nbytes) for f in used),
        output_dtypes=planner.dtype_histogram((p.recipe.dtype, p.end - p.begin) for p in written),
    )
