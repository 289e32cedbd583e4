"""What a batch is told to do: one model for the command line and for ``jobs.toml``.

Keys are the options of the command line without the dashes in front. Unknown ones are refused: a
typing error must not become a conversion with other options::

    max-mem = "64GB"
    jobs = 2
    watch = "10m"

    [[run]]
    root = "/runs/qwen-grpo"
    output = "/models/qwen-grpo"
    model = "actor"
    every = 100
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from streamconv.batch.discover import Candidate
from streamconv.batch.schedule import Schedule, parse_schedule
from streamconv.batch.selection import Filter, Steps, namer, parse_steps
from streamconv.batch.state import status_path
from streamconv.conversion.parts import Share
from streamconv.errors import BadInputError, UsageError
from streamconv.files.filesystems import real_path
from streamconv.files.inputs import local_path
from streamconv.nodes.tasks import cluster_address
from streamconv.options import (
    SHORT_DTYPES,
    DTypeChoice,
    JobKeywords,
    JobOptions,
    Layout,
    LoraMode,
    Masters,
    Quantization,
    ValueHead,
    job_options,
    parse_override,
)
from streamconv.storage.address import Address, place
from streamconv.units import parse_duration, parse_size


def _parsed_by(parse: Callable[[str], object]) -> AfterValidator:
    """Check a text or a path with one of our own parsers, and keep it as it is."""

    def check(text: str) -> str:
        try:
            parse(text)
        except UsageError as error:
            raise ValueError(str(error).replace("\n ", ";")) from None
        return text

    return AfterValidator(check)


def _no_flag(value: object) -> object:
    """Refuse true as a number: ``keep-last = true`` would keep a single output."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _no_nul(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path cannot hold a NUL character")
    return path


_HERE = Path()


def _address(path: Path) -> Path:
    """Return an address where a path begins as one; what others are relative to is not known yet."""
    found = place(path)
    return found if isinstance(found, Address) else path


_DType = Annotated[DTypeChoice, BeforeValidator(lambda v: SHORT_DTYPES.get(v, v))]
_Count = Annotated[int, Field(gt=0), BeforeValidator(_no_flag)]
_Path = Annotated[Path, AfterValidator(_no_nul), _parsed_by(local_path)]
_Place = Annotated[Path, AfterValidator(_no_nul), _parsed_by(place), AfterValidator(_address)]
_Size = Annotated[str, _parsed_by(parse_size)]
_Memory = Annotated[str, _parsed_by(lambda text: parse_size(text, whole_bytes=1 << 40))]
_Duration = Annotated[str, _parsed_by(parse_duration)]
_When = Annotated[str, _parsed_by(parse_schedule)]
_StepRanges = Annotated[str, _parsed_by(parse_steps)]
_Template = Annotated[str, _parsed_by(lambda text: namer(text, None))]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )


class RunSettings(_Strict):
    """One run: where its checkpoints are, which are wanted, how they are converted and kept."""

    root: _Place
    output: _Place
    name: _Template | None = None
    model: str | None = None
    every: _Count | None = None
    steps: _StepRanges | None = None
    last: _Count | None = None
    settle: _Duration = "5m"
    pin: bool = False
    verify: bool = False
    keep_last: _Count | None = None
    keep_every: _Count | None = None
    delete_sources: bool = False
    layout: Layout = "hub"
    dtype: _DType = "keep"
    keep_dtype: tuple[str, ...] = ()
    max_shard_size: _Size = "5GB"
    strict: bool = False
    hf_config: _Path | None = None
    family: str | None = None
    lora: LoraMode = "auto"
    base: _Path | None = None
    lora_alpha: Annotated[float, Field(gt=0), BeforeValidator(_no_flag)] | None = None
    lora_rank: _Count | None = None
    lora_rslora: bool = False
    allow_zero_delta: bool = False
    value_head: ValueHead = "keep"
    masters: Masters = "yes"
    config: tuple[Annotated[str, _parsed_by(parse_override)], ...] = ()
    strip_prefix: str | None = None
    keep_buffers: bool = False
    dequantize: bool = False
    quantize: Quantization | None = None
    overwrite: bool = False

    @property
    def settle_seconds(self) -> float:
        """Return for how long a checkpoint must lie still."""
        return parse_duration(self.settle)

    @property
    def filter(self) -> Filter:
        """Return which checkpoints are wanted."""
        steps: Steps | None = parse_steps(self.steps) if self.steps else None
        return Filter(self.model, self.every, steps, self.last)

    def job_options(self, candidate: Candidate) -> JobOptions:
        """Return what decides an output: its source is one model by its name, or holds that."""
        names = JobKeywords.__annotations__.keys() - {"model", "average"}
        within = None if candidate.is_called(self.model) else self.model
        return job_options(model=within, **{name: getattr(self, name) for name in names})


class BatchSettings(_Strict):
    """A batch: the runs, and what they share, the memory budget above all."""

    run: tuple[RunSettings, ...] = Field(min_length=1)
    max_mem: _Memory | None = None
    part: Annotated[str, _parsed_by(lambda text: Share.parse(text, {}))] | None = None
    nodes: Annotated[str, _parsed_by(cluster_address)] | None = None
    jobs: _Count = 1
    retries: Annotated[int, Field(ge=0), BeforeValidator(_no_flag)] = 3
    watch: _When | None = None
    apply: bool = False
    on_done: str | None = None
    on_error: str | None = None
    hook_limit: _Duration = "1h"
    prometheus: _Path | None = None
    report: _Path | None = None
    no_sync: bool = False
    direct: bool = False
    no_source_crc: bool = False
    checksum: Annotated[str, Field(pattern="^sha256$")] | None = None
    io_threads: _Count = 1
    no_cache: bool = False

    @property
    def share(self) -> Share | None:
        """Return this batch's part of the conversions, where others do the rest."""
        return Share.parse(self.part, {}) if self.part else None

    @property
    def schedule(self) -> Schedule | None:
        """Return when rounds follow one another, None for a single one."""
        return parse_schedule(self.watch) if self.watch else None


SHARED = frozenset(BatchSettings.model_fields) - {"run"}
"""What runs share: what may be said beside a job file, which says the rest."""


def of_one_run(root: Path, output: Path, options: Mapping[str, Any]) -> BatchSettings:
    """Return the settings for one run, with ``options`` of either kind; raises as :func:`settings`."""
    shared = {k: v for k, v in options.items() if k in SHARED}
    run = {k: v for k, v in options.items() if k not in SHARED}
    return settings({**shared, "run": [{**run, "root": root, "output": output}]})


def settings(
    data: Mapping[str, Any], *, where: str | None = None, base: Path = _HERE
) -> BatchSettings:
    """Return validated settings; raises :class:`UsageError` that names every bad key.

    The paths of runs are relative to ``base``.
    """
    if isinstance(data.get("run"), Mapping):
        raise UsageError(
            "[run] is a single table: a batch has a list of runs",
            where=where,
            found="[run]",
            expected="[[run]], in two brackets, once for each run",
        )
    try:
        made = BatchSettings.model_validate(data)
    except pydantic.ValidationError as error:
        raise _told(error, where) from None
    made = made.model_copy(update={"run": tuple(_anchored(run, base) for run in made.run)})
    _refuse_overlap(made, where)
    return made


def load(path: Path, given: Mapping[str, Any]) -> BatchSettings:
    """Return the settings of a job file; ``given`` are options that override its top level.

    Paths are relative to the file's folder.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError("not a TOML file", where=str(path), found=str(error)) from error
    except OSError as error:
        raise BadInputError(
            f"the job file cannot be read: {error.strerror}", where=str(path)
        ) from error
    base = path.absolute().parent
    made = settings({**data, **given}, where=str(path), base=base)
    return made.model_copy(
        update={
            key: place(base / value)
            for key in ("prometheus", "report")
            if key not in given and (value := getattr(made, key)) is not None
        }
    )


def _anchored(run: RunSettings, base: Path) -> RunSettings:
    return run.model_copy(
        update={
            k: place(base / v) for k, v in run if isinstance(v, Path) and not isinstance(v, Address)
        }
    )


def _refuse_overlap(made: BatchSettings, where: str | None) -> None:
    """Two runs in one output folder would mistake each other's outputs for their own."""
    outputs: list[Path] = []
    for run in made.run:
        _refuse_in_stores(run, where)
        output, root = real_path(run.output), real_path(run.root)
        if output in outputs:
            raise UsageError(
                "two runs have the same output folder",
                where=where,
                found=str(run.output),
                hint="give each a folder of its own",
            )
        if any(output in other.parents or other in output.parents for other in outputs):
            raise UsageError(
                "the output folder of one run lies in that of another",
                where=where,
                found=str(run.output),
                hint="give each a folder of its own, side by side",
            )
        if output == root:
            raise UsageError("the output folder is the run itself", where=str(run.output))
        if output in root.parents:
            raise UsageError(
                "the output folder contains the run",
                where=str(run.output),
                found=str(run.root),
                hint="outputs would lie among the checkpoints: choose a folder beside it, or in it",
            )
        outputs.append(output)
    own = [real_path(p) for p in (made.report, made.prometheus) if p is not None]
    own += [status_path(output) for output in outputs]
    twice = next((p for p in own if own.count(p) > 1), None)
    if twice is not None:
        raise UsageError("two files of the batch would be one", where=str(twice))


def _refuse_in_stores(run: RunSettings, where: str | None) -> None:
    """Refuse what links, renames and deletes folders, where there are none."""
    remote = [p for p in (run.root, run.output) if isinstance(p, Address)]
    asked = {
        "pin": run.pin
        and "a store has no links; what is read there is of one version, or an error",
        "delete-sources": run.delete_sources and "a bucket's lifecycle rules delete what is old",
        "keep-last": run.keep_last and "outputs in a store are deleted by its lifecycle rules",
        "keep-every": run.keep_every and "outputs in a store are deleted by its lifecycle rules",
    }
    of_source = {"pin", "delete-sources"}
    for name, why in asked.items():
        side = run.root if name in of_source else run.output
        if why and side in remote:
            raise UsageError(
                f"--{name} is for folders of a file system: {why}",
                where=where or str(side),
                found=str(side),
                hint=f"leave out --{name}",
            )


def _told(error: pydantic.ValidationError, where: str | None) -> UsageError:
    errors = error.errors()
    # pydantic counts only the runs that are good; that one of them is not is said already.
    told = [e for e in errors if e["type"] != "too_short"] or errors
    problems = [_problem(e["type"], [str(p) for p in e["loc"]], e["msg"]) for e in told]
    what = "unknown settings" if all("unknown key" in p for p in problems) else "bad settings"
    return UsageError(f"{what} for a batch", where=where, found="; ".join(problems))


def _problem(kind: str, loc: list[str], message: str) -> str:
    key, in_run = loc[-1], len(loc) > 1 and loc[0] == "run"
    # As people count: the first [[run]] is run 1.
    of = f"run {int(loc[1]) + 1}: " if in_run else ""
    place = ".".join(loc[2:] if in_run else loc)
    if kind == "missing":
        return f"{of}{place} is missing"
    if kind != "extra_forbidden":
        return f"{of}{place}: {_in_our_words(kind, message)}"
    here, other = (RunSettings, BatchSettings) if in_run else (BatchSettings, RunSettings)
    known, elsewhere = _keys(here), _keys(other)
    wanted = key.replace("_", "-")
    if wanted in elsewhere:
        return (
            f"{of}unknown key {place} here: it belongs {'at the top' if in_run else 'into [[run]]'}"
        )
    near = difflib.get_close_matches(wanted, known, 1) or difflib.get_close_matches(
        wanted, elsewhere, 1
    )
    nearest = near[0] if near else None
    return f"{of}unknown key {place}" + (f": did you mean {nearest}?" if nearest else "")


_EXPECTED = {
    "int": "expected a whole number",
    "float": "expected a number",
    "bool": "expected true or false",
    "string": "expected a text in quotes",
    "path": "expected a path in quotes",
    "tuple": "expected a list in brackets",
    "model": "expected a table of settings",
}


def _in_our_words(kind: str, message: str) -> str:
    """Return what pydantic says of a value as we would say it."""
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    if kind == "literal_error":
        return message.replace("Input should be ", "expected ")
    if kind == "too_short":
        return "expected one run at least, each as a [[run]]"
    if kind in ("greater_than", "greater_than_equal"):
        return message.replace("Input should be ", "expected a number ")
    return _EXPECTED.get(kind.partition("_")[0], message.replace("Input should be", "expected"))


def _keys(model: type[BaseModel]) -> list[str]:
    return [f.alias or name for name, f in model.model_fields.items()]
