"""The files beside the weights: config, tokenizer, chat template, processor, custom code.

They are data: parsed as JSON where we must know something, copied byte for byte otherwise, never
run. Weights and weight indexes that lie among them are left out, for they are not this model's.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from streamconv.errors import BadInputError, StreamconvError, UnsafeInputError, UsageError
from streamconv.files.durable import hash_file
from streamconv.files.filesystems import real_path
from streamconv.files.inputs import cannot_read, check_regular
from streamconv.files.jsonfile import read_json
from streamconv.files.names import MANIFEST
from streamconv.ir.dtypes import BY_TORCH, DType
from streamconv.ir.planned import SideFile, TextFile
from streamconv.ir.source import Skipped
from streamconv.options import JobOptions, parse_override
from streamconv.planning import version_4
from streamconv.planning.custom_code import code_of
from streamconv.storage.address import place

_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".distcp",
    ".onnx",
}
# Whole models in torch's files, or parts of them.
_MODEL = re.compile(
    r"(pytorch_model|adapter_model)(_fsdp|-\d+-of-\d+)?\.bin|(lit_)?model\.(pt|pth|ckpt)"
    r"|consolidated\.\d+\.pth|.+\.ckpt",
    re.ASCII,
)
# What save_pretrained of models, tokenizers and processors writes, custom code included.
SIDE_NAMES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "*processor_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "custom_generate/*",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "*processing_*.py",
)
_ADAPTER = "adapter_config.json"
# The longest ones known list what is not quantized, or the names of 21,000 classes: a megabyte.
_MAX_CONFIG_BYTES = 4 << 20
# transformers 5 writes ``dtype``, 4 wrote ``torch_dtype``; both read both.
_DTYPE_KEYS = ("dtype", "torch_dtype")
_ROPE = "rope_parameters"


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the parsed config.json of ``folder``, None where there is none."""
    path = folder / "config.json"
    if not (path.exists() or path.is_symlink()):
        return None
    config = read_json(path, most_bytes=_MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise BadInputError("config.json holds no JSON object", where=str(path))
    if not isinstance(config.get("model_type", ""), str):
        raise BadInputError(
            "the model_type in config.json is not a string",
            where=str(path),
            found=repr(config["model_type"])[:80],
        )
    return config


def overridden(
    config: Mapping[str, Any] | None, overrides: Sequence[str]
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Return config.json with the values that the user puts into it, and what was changed.

    Raises :class:`UsageError` where there is nothing to put them into.
    """
    if not overrides:
        return config, []
    if config is None:
        raise UsageError(
            "--config is given, and there is no config.json to put it into",
            found=", ".join(overrides),
            hint="--hf-config DIR names a folder that has one",
        )
    changed = json.loads(json.dumps(config))
    told = []
    for text in overrides:
        keys, value = parse_override(text)
        keys = _as_version_5(changed, keys, text)
        part = changed
        for key in keys[:-1]:
            part = part.setdefault(key, {})
            if not isinstance(part, dict):
                raise UsageError(
                    f"config.json has no settings below {key!r}", found=f"--config {text}"
                )
        was = json.dumps(part[keys[-1]]) if keys[-1] in part else "nothing"
        part[keys[-1]] = value
        if _ROPE in keys[:-1]:
            _set_older(changed, keys, value)
        told.append(
            f"config.json: {'.'.join(keys)} is {json.dumps(value)}, as --config says (it was {was})"
        )
    return changed, told


def _set_older(config: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set what version 4 reads as well, where that is there."""
    part = config
    for key in keys[: keys.index(_ROPE)]:
        part = part[key]
    if keys[-1] in part:
        part[keys[-1]] = value


def _as_version_5(config: Mapping[str, Any], keys: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Return the keys by which transformers 5 finds a setting that version 4 kept one level higher.

    It reads the settings of the rotary embedding from ``rope_parameters`` where that is there, and
    passes over the old keys. Raises :class:`UsageError` where one old key stands for several new ones.
    """
    part: Any = config
    for key in keys[:-1]:
        part = part.get(key) if isinstance(part, dict) else None
    new = part.get(_ROPE) if isinstance(part, dict) else None
    if not isinstance(new, dict):
        return keys
    by_layer_type = [
        k for k, v in new.items() if isinstance(v, dict) and keys[-1] in {"rope_scaling", *v}
    ]
    where = ".".join((*keys[:-1], _ROPE))
    if keys[-1] == "rope_scaling" or by_layer_type:
        inner = f"{by_layer_type[0]}." if by_layer_type else ""
        raise UsageError(
            f"transformers 5 does not read {keys[-1]} where config.json has {_ROPE}",
            found=f"--config {text}",
            hint=f"name its settings one by one, such as {where}.{inner}rope_theta=1e6",
        )
    return (*keys[:-1], _ROPE, keys[-1]) if keys[-1] in new else keys


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


def list_side_files(folder: Path, *, root: Path, named: bool = False) -> Iterator[SideFile]:
    """Yield the files to copy, in order of their names.

    ``root`` is the checkpoint's folder, out of which no link may lead, unless the user has ``named``
    the folder: a snapshot in the Hub cache is made of links.
    """
    # A folder beside the weights (torch DCP) is a part of the checkpoint as well.
    within = real_path(folder.parent) / folder.name
    if folder.is_relative_to(root):
        within = real_path(root)
    if holds_weights(folder, root):
        within = real_path(folder)
    if folder.parent.name == "snapshots":  # of the Hub's cache: links into blobs/ beside it
        within = real_path(folder.parent.parent)
    for path in candidates(folder, root):
        name = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        try:
            leads_to = real_path(path)
        except RuntimeError as error:  # links in a circle
            raise cannot_read(OSError(errno.ELOOP, os.strerror(errno.ELOOP)), path) from error
        if not named and not leads_to.is_relative_to(within):
            raise UnsafeInputError(
                "a link leads out of the checkpoint",
                where=str(path),
                found=str(leads_to),
                hint="if you trust it, name a folder yourself: --hf-config DIR",
            )
        if path.is_dir():
            _refuse_folder(path, name)
            continue
        if _is_weights(path.name) or name.as_posix() == _ADAPTER:
            continue
        if name.as_posix() == MANIFEST:
            continue  # of the output that this folder is; ours will have that name
        # Absolute: a plan may be run from another working directory.
        where = str(path.absolute())
        try:
            status = path.stat()
        except FileNotFoundError as error:  # a link that leads nowhere
            raise cannot_read(error, path) from error
        check_regular(status.st_mode, path)
        yield SideFile(name.as_posix(), where, status.st_size, hash_file(path))


def _refuse_folder(path: Path, name: PurePath) -> None:
    """Raise :class:`BadInputError` for a folder that has the name of one of a model's files.

    What has no more than their extension is a folder like any other.
    """
    named = [n for n in SIDE_NAMES if not n.startswith("*.")]
    if name.suffix and any(fnmatch.fnmatchcase(name.as_posix(), known) for known in named):
        raise BadInputError(
            "a folder lies in the place of a model's file",
            where=str(path),
            hint="move it away, or name another folder: --hf-config DIR",
        )


def holds_weights(folder: Path, root: Path) -> bool:
    """Whether ``folder`` is the checkpoint's own or one above it, and not one of side files."""
    return real_path(root).is_relative_to(real_path(folder))


def candidates(folder: Path, root: Path) -> list[Path]:
    """Return what may be a side file, in order: among a trainer's files, what has a known name."""
    if not holds_weights(folder, root):
        return sorted(folder.rglob("*"))
    known = {p for name in SIDE_NAMES for p in folder.glob(name)}
    return sorted(known | code_of(folder, known).files)


def missing_code(side: Sequence[SideFile]) -> list[str]:
    """Return what the custom code among the side files asks for and does not find among them."""
    if not side:
        return []
    folder = place(side[0].path.removesuffix(side[0].name))
    return [
        f"custom code: {text}" for text in code_of(folder, [place(s.path) for s in side]).missing
    ]


def left_out(folder: Path | None, root: Path, sources: Collection[Path]) -> Iterator[Skipped]:
    """Yield what lies in ``folder`` and beside the sources and is not copied: weights above all.

    ``folder`` has the config, ``root`` is the checkpoint's folder; ``sources`` are the files that the
    output is made of.
    """
    for around in dict.fromkeys(p for p in (folder, root) if p is not None):
        of_weights = holds_weights(around, root)
        for path in sorted(around.iterdir() if of_weights else around.rglob("*")):
            inner = path.relative_to(around).as_posix()
            if path in sources:
                continue
            if path.is_file() and (_is_model if of_weights else _is_weights)(path.name):
                beside = "beside the config" if around == folder else "beside the checkpoint's"
                reason = f"weights {beside}; the output is made of others"
            elif of_weights:
                continue
            elif path.is_file() and inner == _ADAPTER:
                # With it transformers would look for an adapter, and find none.
                reason = "an adapter's config; the output is a whole model"
            elif path.is_dir() and path.is_symlink():
                reason = "a link to a folder"
            else:
                continue
            yield Skipped(f"{around.name}/{inner}", reason)


def _is_model(name: str) -> bool:
    """Whether a file among a trainer's is a model by its name, and no state of training."""
    return name.endswith((".safetensors", ".gguf")) or _MODEL.fullmatch(name) is not None


def _is_weights(name: str) -> bool:
    name = name.lower()
    return Path(name).suffix in _WEIGHT_SUFFIXES or name.endswith(
        (".safetensors.index.json", ".bin.index.json")
    )


def declared_dtype(config: Mapping[str, Any]) -> DType | None:
    """Return the dtype that config.json declares, at the top or in its text_config."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in _DTYPE_KEYS:
                value = part.get(key)
                if isinstance(value, str) and value.removeprefix("torch.") in BY_TORCH:
                    return BY_TORCH[value.removeprefix("torch.")]
    return None


def corrected_config(
    config: Mapping[str, Any],
    *,
    dtype: DType | None,
    untie: bool,
    tied: bool | None = None,
    architecture: str | None = None,
    alike: version_4.Alike | None = None,
    changes: Sequence[str] = (),
) -> tuple[TextFile | None, list[str]]:
    """Return config.json as it must be for these weights, and what was changed.

    None where it is right as it stands and can be copied byte for byte. ``dtype`` is the weights'
    floating dtype; ``untie`` says that both of two tied weights are there because they differ; ``tied``
    whether the model ties any that are not, None where no model tells;
    ``architecture`` is the class whose weights these are, where it is certain: verl keeps the base
    model's config for a critic; ``alike`` tells whether transformers, where it knows the model, reads
    the same from two configs; ``changes`` tell what of ``config`` is no longer as the file has it.
    """
    changed = json.loads(json.dumps(config))
    notices = list(changes)
    if architecture is not None and changed.get("architectures") != [architecture]:
        notices.append(
            f"config.json: architectures {changed.get('architectures')} became [{architecture!r}]"
        )
        changed["architectures"] = [architecture]
    if alike is not None:
        notices += version_4.say_again(changed, alike)
    parts = [("", changed)]
    parts += [
        (f"{key}.", changed[key])
        for key in ("text_config", "thinker_config")
        if isinstance(changed.get(key), dict)
    ]
    for where, part in parts:
        if dtype is not None:
            notices += _correct_dtype(part, where, dtype.torch)
        if untie and part.get("tie_word_embeddings", not where):
            part["tie_word_embeddings"] = False
            notices.append(f"config.json: {where}tie_word_embeddings became false")
    if tied is not None:
        notices += version_4.say_ties(changed, tied)
    if not notices:
        return None, []
    return _json_file("config.json", changed), notices


def _correct_dtype(part: dict[str, Any], where: str, dtype: str) -> list[str]:
    notices = []
    present = [k for k in _DTYPE_KEYS if part.get(k) is not None]
    if not present and not where:
        part["dtype"] = dtype
        notices.append(f"config.json: dtype set to {dtype}")
    for key in present:
        if part[key] != dtype:
            notices.append(f"config.json: {where}{key} {part[key]} became {dtype}")
            part[key] = dtype
    return notices


def corrected_tokenizer(side: Iterable[SideFile]) -> tuple[TextFile | None, list[str]]:
    """Return tokenizer_config.json as both versions of transformers read it, and what was changed.

    None where it is right as it stands, is not there, or is no JSON.
    """
    name = version_4.TOKENIZER_CONFIG
    path = next((place(s.path) for s in side if s.name == name), None)
    if path is None:
        return None, []
    try:
        said = read_json(path, most_bytes=_MAX_CONFIG_BYTES)
    except StreamconvError:
        return None, []
    changed, notices = version_4.tokenizer_config(said)
    return (_json_file(name, changed), notices) if notices else (None, [])


def _json_file(name: str, content: Any) -> TextFile:
    return TextFile(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
