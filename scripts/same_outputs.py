"""Do two trees of streamconv make the same of a fixed set of checkpoints?

    python -m scripts.same_outputs keep RESULT.json FOLDER... [--tree DIR] [--only TEXT]
    python -m scripts.same_outputs compare RESULT.json FOLDER... [--tree DIR] [--only TEXT]

``keep`` converts every checkpoint below the folders and those that the tests' makers make, each with a
command of its own, and writes down the exit code, what an error says first, the hashes of all files of
the output and the peak memory. ``compare`` does it again and names every difference. Refusals count
like conversions. ``--tree`` is the tree whose package is run (default: this one); so the outcome of
one commit is kept and that of another is compared. The exit code of ``compare`` is 1 where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts.check_answers import ANSWERS
from scripts.makers import fsdp, tiny
from scripts.measured import watched
from scripts.outputs import MANIFEST, contents

ROOT = Path(__file__).parents[1]
MAX_MEM = "600MB"
# How weights are called, whoever saved them, and the folders of single ranks.
WEIGHTS = ("*.pt", "*.pth", "*.bin", "*.ckpt", "*.distcp", "*.safetensors", ".metadata")
RANK_FOLDERS = "mp_rank_"
CONFIGS = (*ANSWERS, "hf_truth", "hfc", "base_hf", "hf_config_of_another_model")
NOT_SOURCES = (*CONFIGS, "truth", "truth_hf", "huggingface", "quantised_from")
# What differs from run to run, or from place to place.
VARYING = ("streamconv", "plan_digest")
VARYING_OF_JOB = ("given", "base", "digest", "inputs")
# A peak varies by this much from run to run.
PEAK_SHARE, PEAK_BYTES = 0.1, 16 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one conversion."""

    code: int
    error: str
    files: Mapping[str, str] = field(default_factory=dict)
    peak_bytes: int = 0


def differences(before: Outcome, now: Outcome) -> list[str]:
    """Return in words how two outcomes of one case differ."""
    found = []
    if before.code != now.code:
        found.append(f"exit code {now.code} in place of {before.code}: {now.error}")
    elif before.error != now.error:
        found.append(f"{now.error!r} in place of {before.error!r}")
    names = [*dict.fromkeys((*before.files, *now.files))]
    other = [name for name in names if before.files.get(name) != now.files.get(name)]
    if other:
        found.append(f"other files: {', '.join(other[:4])}")
    if now.peak_bytes > before.peak_bytes * (1 + PEAK_SHARE) + PEAK_BYTES:
        found.append(f"peak {now.peak_bytes / 1e6:.0f} MB after {before.peak_bytes / 1e6:.0f}")
    return found


def sources(root: Path) -> Iterator[Path]:
    """Yield the folders below ``root`` that weights lie in, those of rank folders once."""
    found = set()
    for folder in (root, *(p for p in root.rglob("*") if p.is_dir())):
        inside = folder.relative_to(root).parts
        if any(part in NOT_SOURCES for part in inside):
            continue
        if any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            found.add(folder.parent if folder.name.startswith(RANK_FOLDERS) else folder)
    yield from sorted(found)


def config_for(source: Path, root: Path) -> Path | None:
    """Return the answer or config that lies beside ``source`` or above it: its config is used."""
    for folder in (source, *source.parents):
        for name in CONFIGS:
            if (folder / name / "config.json").is_file():
                return folder / name
        if folder == root:
            return None
    return None


def converted(source: Path, config: Path | None, tree: Path) -> Outcome:
    """Convert ``source`` with the package of ``tree``, and return what came of it."""
    with tempfile.TemporaryDirectory(prefix="same-outputs-") as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-P", "-m", "streamconv", str(source), str(out)]
        command += ["--max-mem", MAX_MEM, "--no-sync", "--quiet"]
        if config is not None:
            command += ["--hf-config", str(config)]
        ran = watched(command, {"PYTHONPATH": str(tree)})
        said = [line for line in ran.err.splitlines() if line.startswith("error:")]
        error = said[0].replace(scratch, "") if said else ""
        return Outcome(ran.code, error, dict(_hashes(out)), ran.peak_bytes)


def _hashes(out: Path) -> Iterator[tuple[str, str]]:
    for name, data in contents(out).items() if out.is_dir() else ():
        stable = _stable(data) if name == MANIFEST else data
        yield name, hashlib.sha256(stable).hexdigest()


def _stable(manifest: bytes) -> bytes:
    """Return a manifest without what differs between two makings of one checkpoint.

    Places, times, digests of them, and sizes: torch pickles numbers that differ by the process.
    """
    kept = {k: v for k, v in json.loads(manifest).items() if k not in VARYING}
    job = {k: v for k, v in kept["job"].items() if k not in VARYING_OF_JOB}
    job["source"] = [file[0] for file in job["source"]]
    return json.dumps({**kept, "job": job}, sort_keys=True).encode()


def outcomes(folders: list[Path], tree: Path, only: str) -> dict[str, Outcome]:
    """Return what came of every checkpoint, by its name."""
    with (
        tempfile.TemporaryDirectory(prefix="same-outputs-made-") as name,
        ThreadPoolExecutor(2) as pool,
    ):
        made = Path(name)
        if recipes := [name for name in fsdp.RECIPES if only in name]:
            fsdp.make_all(made / "fsdp", recipes)
        for layout in tiny.LAYOUTS:
            tiny.make_tiny(made / "tiny" / layout, layout)
        running = {
            f"{root.name}/{source.relative_to(root)}": pool.submit(
                converted, source, config_for(source, root), tree
            )
            for root in (*folders, made / "fsdp", made / "tiny")
            for source in sources(root)
            if only in str(source)
        }
        found = {}
        for case, future in running.items():
            found[case] = future.result()
            print(f"{found[case].code} {case} {found[case].error}", file=sys.stderr, flush=True)
        return found


def main() -> int:
    """Keep or compare; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", choices=("keep", "compare"))
    parser.add_argument("result", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = outcomes([f.resolve() for f in options.folders], options.tree.resolve(), options.only)
    done = sum(o.code == 0 for o in found.values())
    if options.task == "keep":
        kept = {case: asdict(outcome) for case, outcome in found.items()}
        options.result.write_text(json.dumps(kept, indent=1, sort_keys=True))
        print(
            f"same_outputs: {len(found)} checkpoints, {done} converted, {len(found) - done} refused"
        )
        return 0
    before = {case: Outcome(**o) for case, o in json.loads(options.result.read_text()).items()}
    wrong = 0
    for case in sorted(found.keys() & before.keys()):
        for what in differences(before[case], found[case]):
            print(f"{case}: {what}")
            wrong += 1
    unlike = {c for c in before if options.only in c} ^ found.keys()
    for case in sorted(unlike):
        print(f"{case}: only in one of the two")
    print(
        f"same_outputs: {len(found)} checkpoints, {done} converted, {len(found) - done} refused, "
        f"{wrong + len(unlike)} differences"
    )
    return 1 if wrong or unlike else 0


if __name__ == "__main__":
    sys.exit(main())
