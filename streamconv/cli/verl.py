"""``streamconv verl merge|test``: verl's own command line (``python -m verl.model_merger``).

The same options with the same outcome, so that a script changes one word. Each command says which of
streamconv's own it stands for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from streamconv.cli.command import Command, Group
from streamconv.cli.output import say, say_json, tell
from streamconv.errors import StreamconvError, UsageError, shown
from streamconv.files.inputs import local_path
from streamconv.units import counted

app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="verl's own command line: `python -m verl.model_merger` becomes `streamconv verl`.",
)

Backend = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="fsdp or megatron; the files decide.")
]
LocalDir = Annotated[
    Path,
    typer.Option(
        "--local_dir", "--local-dir", parser=local_path, metavar="DIR", help="The checkpoint."
    ),
]
HfModelPath = Annotated[
    Path | None,
    typer.Option(
        "--hf_model_path",
        "--hf-model-path",
        parser=local_path,
        metavar="DIR",
        help="Config and tokenizer, for checkpoints of old releases that lack them.",
    ),
]
TieWordEmbedding = Annotated[
    bool, typer.Option("--tie-word-embedding", help="Not needed: the config and the bytes decide.")
]
IsValueModel = Annotated[
    bool, typer.Option("--is-value-model", help="Not needed: the names of the tensors tell.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Without effect: no code of a model is ever run."),
]
UseCpuInitialization = Annotated[
    bool, typer.Option("--use_cpu_initialization", help="Not needed: there is no GPU in it.")
]
MaxMem = Annotated[
    str | None, typer.Option("--max-mem", metavar="SIZE", help="As for `streamconv convert`.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command(cls=Command)
def merge(
    context: typer.Context,
    backend: Backend,
    local_dir: LocalDir,
    target_dir: Annotated[
        Path,
        typer.Option(
            "--target_dir",
            "--target-dir",
            parser=local_path,
            metavar="DIR",
            help="The output folder.",
        ),
    ] = Path("tmp"),
    hf_upload_path: Annotated[
        str | None,
        typer.Option("--hf_upload_path", "--hf-upload-path", metavar="REPO", help="Upload there."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    hf_model_path: HfModelPath = None,
    tie_word_embedding: TieWordEmbedding = False,
    is_value_model: IsValueModel = False,
    trust_remote_code: TrustRemoteCode = False,
    use_cpu_initialization: UseCpuInitialization = False,
    max_mem: MaxMem = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Not needed: as verl does, an older output is replaced."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a checkpoint into a bfloat16 HuggingFace folder, as `verl.model_merger merge` does."""
    from streamconv.cli.conversion import convert

    _check_backend(backend)
    command = ["streamconv", "convert", str(local_dir), str(target_dir), "--dtype", "bfloat16"]
    command += ["--hf-config", str(hf_model_path)] if hf_model_path else []
    command += ["--hf-upload-path", hf_upload_path] if hf_upload_path else []
    command += ["--private"] if private else []
    command += ["--max-mem", max_mem] if max_mem else []
    command += ["--overwrite"]  # verl writes into a folder that is there, too
    if not (json or quiet):
        tell(f"this is: {shown(shlex.join(command))}")
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "hf_config": hf_model_path,
        "max_mem": max_mem,
        "model": None,
        "overwrite": True,
    }
    with _advice(context, command):
        convert(
            local_dir,
            target_dir,
            options,
            json=json,
            quiet=quiet,
            upload_to=hf_upload_path,
            private=private,
        )


@contextmanager
def _advice(context: typer.Context, command: list[str]) -> Iterator[None]:
    """Give advice that can be followed: options that verl's words lack belong to another command."""
    try:
        yield
    except StreamconvError as error:
        known = {name for p in context.command.params for name in p.opts}
        named = re.findall(r"--[a-z][a-z_-]*", error.hint or "")
        if any(name not in known for name in named):
            error.hint = (
                f"{error.hint}; an option of the command that this is: {shlex.join(command)}"
            )
        raise


@app.command("test", cls=Command)
def compare(
    backend: Backend,
    local_dir: LocalDir,
    test_hf_dir: Annotated[
        Path,
        typer.Option(
            "--test_hf_dir",
            "--test-hf-dir",
            parser=local_path,
            metavar="DIR",
            help="The model to compare.",
        ),
    ],
    hf_model_path: HfModelPath = None,
    tie_word_embedding: TieWordEmbedding = False,
    is_value_model: IsValueModel = False,
    trust_remote_code: TrustRemoteCode = False,
    use_cpu_initialization: UseCpuInitialization = False,
    json: Json = False,
) -> None:
    """Compare a checkpoint, as bfloat16, with a HuggingFace folder: `verl.model_merger test`."""
    from streamconv.conversion.comparison import compare_with_model

    _check_backend(backend)
    found = compare_with_model(local_dir, test_hf_dir, hf_config=hf_model_path)
    if json:
        say_json(found, indent=2)
    else:
        for problem in found["problems"]:
            say(f"problem  {shown(problem)}")
        say(
            f"{counted(found['tensors'], 'tensor')} compared, "
            f"{counted(len(found['problems']), 'problem')}"
        )
    if found["problems"]:
        raise typer.Exit(5)


def _check_backend(backend: str) -> None:
    if backend not in ("fsdp", "megatron"):
        raise UsageError(
            f"unknown backend: {backend!r}", expected="fsdp or megatron, as verl has them"
        )
