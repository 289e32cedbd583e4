"""An output folder against its own manifest: files, tensors, headers, index, config, nothing astray.

Every weight file is read once: its digest and those of its tensors are taken as the bytes pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from streamconv.errors import BadInputError, StreamconvError
from streamconv.files.inputs import readable
from streamconv.files.jsonfile import read_json
from streamconv.files.names import HF_QUANT_CONFIG, INDEX, MANIFEST, SINGLE
from streamconv.formats.safetensors_file import FileTensor, read_header, read_index
from streamconv.lora.names import canonical
from streamconv.lora.settings import OF_A_MODEL, PREFIX, WEIGHTS, base_of
from streamconv.output.former import NOT_OUTPUT
from streamconv.output.manifest import MAX_MANIFEST_BYTES, read_manifest
from streamconv.output.staging import staging_path
from streamconv.planning.sidefiles import read_config
from streamconv.quantization import scales
from streamconv.storage.address import Address
from streamconv.system.children import ask
from streamconv.units import counted
from streamconv.verification.report import Report

_STEP_BYTES = 1 << 20


def verify_output(folder: Path, *, base: Path | None = None) -> Report:
    """Check a folder against its own manifest; ``base`` is the model that an adapter belongs to.

    Raises :class:`BadInputError` where there is no manifest to check against.
    """
    manifest = manifest_of(folder)
    files: dict[str, dict[str, Any]] = {f["name"]: f for f in manifest["files"]}
    listed: dict[str, dict[str, Any]] = manifest["tensors"]
    report = Report()
    tensors: dict[str, FileTensor] = {}
    unreadable: set[str] = set()
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            report.problems.append(f"{name}: missing")
            unreadable.add(name)
            continue
        found: Mapping[str, FileTensor] = {}
        if path.suffix == ".safetensors":
            try:
                found = read_header(path)
            except StreamconvError as error:
                report.problems.append(f"{name}: {error.what} ({error.found})")
                unreadable.add(name)
        report.problems += [
            f"{t}: in {name} and in {tensors[t].path.name}" for t in found if t in tensors
        ]
        tensors |= found
        report.problems += _file_problems(path, name, entry, found, listed)
    report.checked.append(f"{counted(len(files), 'file')} against the manifest")
    report.problems += [f"{name}: not in the manifest" for name in _strays(folder, files)]
    _compare_headers(folder, tensors, listed, unreadable, report)
    report.checked.append(f"{counted(len(listed), 'tensor')} against the manifest")
    if not unreadable:
        # An adapter in a folder of its own does not belong to the model's index.
        own = {n: t for n, t in tensors.items() if t.path.parent == folder}
        _check_index(folder, own, report)
    _check_side_files(folder, manifest, report)
    if not unreadable:
        _check_adapter(tensors, report)
        _check_fit(folder, tensors, base, report)
        _check_quantization(folder, tensors, manifest["job"]["options"].get("quantize"), report)
    return report


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of an output; raises :class:`BadInputError` where it is none of ours."""
    manifest = read_manifest(folder)
    if manifest is None:
        if staging_path(folder).is_dir():
            raise BadInputError(
                "the conversion into this folder is not finished",
                where=str(folder),
                hint="wait for it, or run its command again: it goes on where it stopped",
            )
        raise BadInputError(
            f"no {MANIFEST} here: this folder was not made by streamconv"
            if folder.is_dir()
            else "there is no such folder",
            where=str(folder),
            hint="`streamconv diff A B` compares two model folders" if folder.is_dir() else None,
        )
    return manifest


def _strays(folder: Path, files: Collection[str]) -> Iterator[str]:
    """Yield what lies in the folder that no conversion put there: files, links, empty folders."""
    expected = {MANIFEST, *files}
    expected |= {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in expected or name.partition("/")[0] in NOT_OUTPUT:
            continue
        if path.is_symlink() or not path.is_dir():
            yield name
        elif not any(path.iterdir()):
            yield f"{name}/"


def _file_problems(
    path: Path,
    name: str,
    entry: Mapping[str, Any],
    tensors: Mapping[str, FileTensor],
    listed: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Read a file once; return what differs: the file, then the tensors in it."""
    whole = xxhash.xxh3_128()
    sha256 = hashlib.sha256() if "sha256" in entry else None
    differing: list[str] = []
    # A safetensors file is its header and then its tensors, without a gap.
    spans: list[tuple[FileTensor | None, int | None]] = [
        (None, min((t.begin for t in tensors.values()), default=0))
    ]
    spans += [(t, t.end) for t in tensors.values()]
    buffer = memoryview(bytearray(_STEP_BYTES))
    size = 0
    with readable(path), path.open("rb", buffering=0) as stream:
        for tensor, end in [*spans, (None, None)]:
            digest = xxhash.xxh3_128()
            while end is None or size < end:
                want = len(buffer) if end is None else min(len(buffer), end - size)
                got = stream.readinto(buffer[:want])
                if not got:
                    break
                size += got
                piece = buffer[:got]
                whole.update(piece)
                if sha256:
                    sha256.update(piece)
                if tensor is not None:
                    digest.update(piece)
            if tensor is not None:
                entry_digest = listed.get(tensor.name, {}).get("xxh3_128", digest.hexdigest())
                if digest.hexdigest() != entry_digest:
                    differing.append(tensor.name)
    problems = []
    if size != entry.get("nbytes"):
        problems.append(f"{name}: {size} bytes, the manifest says {entry.get('nbytes')}")
    elif whole.hexdigest() != entry["xxh3_128"]:
        what = (
            ""
            if not tensors
            else f" ({len(differing) or 'none'} of its {len(tensors)} tensors differ)"
        )
        problems.append(
            f"{name}: xxh3_128 {whole.hexdigest()}, the manifest says {entry['xxh3_128']}{what}"
        )
    elif sha256 and sha256.hexdigest() != entry["sha256"]:
        problems.append(f"{name}: sha256 {sha256.hexdigest()}, the manifest says {entry['sha256']}")
    return problems + [
        f"{t}: its bytes in {name} do not have the hash of the manifest" for t in differing
    ]


def _compare_headers(
    folder: Path,
    tensors: Mapping[str, FileTensor],
    listed: Mapping[str, Mapping[str, Any]],
    unreadable: set[str],
    report: Report,
) -> None:
    for name, entry in listed.items():
        tensor = tensors.get(name)
        if tensor is None:
            if entry["file"] not in unreadable:
                report.problems.append(f"{name}: in the manifest, in no file")
        elif (tensor.dtype.name, list(tensor.shape), _file(folder, tensor)) != (
            entry["dtype"],
            entry.get("shape"),
            entry["file"],
        ):
            report.problems.append(
                f"{name}: {tensor.dtype.name} {list(tensor.shape)} in {_file(folder, tensor)}, the "
                f"manifest says {entry['dtype']} {entry.get('shape')} in {entry['file']}"
            )
    report.problems += [
        f"{n}: in {_file(folder, t)}, not in the manifest"
        for n, t in tensors.items()
        if n not in listed
    ]


def _file(folder: Path, tensor: FileTensor) -> str:
    return tensor.path.relative_to(folder).as_posix()


def _check_index(folder: Path, tensors: Mapping[str, FileTensor], report: Report) -> None:
    path = folder / INDEX
    files = {t.path.name for t in tensors.values()}
    if not path.is_file():
        if len(files) > 1:
            report.problems.append(f"{INDEX}: missing, with {len(files)} weight files")
        return
    try:
        weight_map, total = read_index(path)
    except StreamconvError as error:
        report.problems.append(f"{INDEX}: cannot be read ({error.found or error.what})")
        return
    wrong = [
        n
        for n in weight_map.keys() | tensors.keys()
        if n not in tensors or weight_map.get(n) != tensors[n].path.name
    ]
    report.problems += [f"{INDEX}: {n} is not where it says" for n in sorted(wrong)]
    if total != sum(t.end - t.begin for t in tensors.values()):
        report.problems.append(f"{INDEX}: total_size {total} is not the sum of the tensors")
    if (folder / SINGLE).is_file() and files != {SINGLE}:
        report.problems.append(f"{INDEX}: beside {SINGLE}, which loaders take in its place")
    report.checked.append("the index against the files")


def _check_side_files(folder: Path, manifest: Mapping[str, Any], report: Report) -> None:
    """Config and tokenizer must be there where the source had them, and be readable."""
    side = [name for name, _ in manifest["job"]["side"]]
    files = [f["name"] for f in manifest["files"]]
    skipped = {name for name, _ in manifest["skipped"]}
    report.problems += [
        f"{name}: the source had it, the output does not"
        for name in side
        if name not in files
        and name not in skipped
        and not (folder / name).is_file()
        and not (WEIGHTS in files and name in OF_A_MODEL)
    ]
    for name in files:
        if name.endswith(".json") and name != INDEX and (folder / name).is_file():
            try:
                read_json(folder / name, most_bytes=MAX_MANIFEST_BYTES)
            except StreamconvError as error:
                report.problems.append(f"{name}: no valid JSON ({(error.found or '')[:100]})")
    if not {"config.json", WEIGHTS} & {*files}:
        report.checked.append("note: there is no config.json, so no loader knows what this is")
    report.checked.append(f"{counted(len(side), 'file')} of config, tokenizer and the like")


def _check_adapter(tensors: Mapping[str, FileTensor], report: Report) -> None:
    """An adapter's names must be those that PEFT looks for: it passes over others without a word."""
    names = [n for n, t in tensors.items() if t.path.name == WEIGHTS]
    for name in names:
        if not name.startswith(PREFIX) or canonical(name) != name.removeprefix(PREFIX):
            report.problems.append(f"{name}: PEFT does not load an adapter by this name")
        for one, other in (("A", "B"), ("B", "A")):
            pair = name.replace(f".lora_{one}.", f".lora_{other}.")
            if pair != name and name.endswith(".weight") and pair not in tensors:
                report.problems.append(f"{name}: its other factor is not there ({pair})")
    if names:
        report.checked.append(f"{len(names)} names of an adapter")


def _check_fit(
    folder: Path, tensors: Mapping[str, FileTensor], base: Path | None, report: Report
) -> None:
    """An adapter's modules and shapes must be the model's, where one is at hand."""
    places = {t.path.parent for t in tensors.values() if t.path.name == WEIGHTS}
    for place in places if report.passed else ():
        own = folder if (folder / "config.json").is_file() else None
        model = own or base_of(place, base)
        found: dict[str, Any] = {"architecture": None, "problem": None}
        remote = isinstance(place, Address) or isinstance(model, Address)
        if model is not None and not remote:
            found = ask(
                "streamconv.verification.adapter_child",
                {"task": "names", "src": str(place), "model": str(model)},
                doing="building the adapter's model",
            )
        if found["problem"]:
            report.problems.append(found["problem"])
        if found["architecture"]:
            report.checked.append(f"the adapter's modules against {found['architecture']}")
        else:
            why = "transformers does not know the model" if model else "--base DIR names the model"
            why = "transformers reads no object stores" if remote else why
            report.checked.append(f"note: the adapter's names were checked by form alone ({why})")


def _check_quantization(
    folder: Path, tensors: Mapping[str, FileTensor], rule: str | None, report: Report
) -> None:
    """Quantized weights need scales, and a config.json that says so; others one that does not.

    ``rule`` is what quantized them here: then the codes must be such as it makes. What a source holds
    is handed on as it is, and only told of.
    """
    own = {n: (t.shape, t.dtype) for n, t in tensors.items() if t.path.parent == folder}
    try:
        quantized = scales.find(own, {})
        config = read_config(folder)
        if config is not None:
            elsewhere = (folder / HF_QUANT_CONFIG).is_file()
            scales.check(config, quantized, elsewhere=elsewhere)
        if not quantized.scales and rule is None:
            return
        from streamconv.verification.codes import code_problems  # numpy's import is felt

        wrong = [f"{n}: {what}" for n, what in code_problems(tensors, quantized.scales, rule)]
        if rule is None:
            report.checked += [f"note: {text}, as in the source" for text in wrong]
        else:
            report.problems += wrong
            report.checked.append(
                f"the codes and scales of {len(quantized.weights)} weights ({rule})"
            )
    except StreamconvError as error:
        report.problems.append(f"{error.where or 'config.json'}: {error.what} ({error.found})")
