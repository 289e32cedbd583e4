"""Configs of COUNT model types go from transformers 4.57 through 5 and streamconv back to 4.57.

Each model type's own config, and one for every key with another value: 4.57 saves it, the installed
release reads and saves it, streamconv adds what version 4 calls otherwise, and 4.57 must then read all
settings that it read first. The installed release must read from it what it read before. Left out are
the settings of ``generate``, and those of which version 5 keeps nothing at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts import releases
from scripts.campaigns.common import Figures, main
from streamconv.planning import version_4

# Version 5 takes what these say of ties as the scale of their logits, and saves that they are tied.
_ALWAYS_TIED = ("t5", "mt5", "umt5", "longt5", "pop2piano")
_COMPUTED = ("head_dim", "layer_types", "gnn_layers_types", "keypoint_encoder_sizes")
_READER = Path(__file__).with_name("config_reader.py")


def campaign(work: Path, count: int, seed: int) -> Figures:
    figures = Figures()
    packages = work.parent / "transformers-4"
    why_not = releases.install(packages)
    if why_not is not None:
        figures.breach(f"pip cannot install transformers 4: {why_not}")
        return figures

    def ask(task: str, lines: list[Any], *, older: bool) -> list[Any]:
        given, made = work / "given.jsonl", work / "made.jsonl"
        given.write_text("".join(json.dumps(line) + "\n" for line in lines))
        subprocess.run(
            [sys.executable, str(_READER), task, str(given), str(made)],
            env=releases.environment(packages if older else None),
            check=True,
            stderr=subprocess.DEVNULL,
        )
        return [json.loads(line) for line in made.read_text().splitlines()]

    saved = ask("resave", ask("cases", [[count, seed]], older=True), older=False)
    plain = {case["name"]: case["again"] for case in saved if " " not in case["name"]}
    figures.add("model types", len(plain))
    forth, back = [], []
    for case in saved:
        name, again = case["name"], case["again"]
        if " " in name and again == plain.get(name.split()[0]):
            figures.add("settings that version 5 drops")
            continue
        ours = json.loads(json.dumps(again))
        version_4.say_again(ours, _alike)
        if case["tied"] is not None:
            version_4.say_ties(ours, case["tied"])
        back.append({"name": name, "one": case["said"], "two": ours, "tied": case["tied"]})
        forth.append({"name": name, "one": again, "two": ours})
    for older, pairs in ((True, back), (False, forth)):
        version = "version 4" if older else "version 5"
        said = {pair["name"]: pair for pair in pairs} if older else {}
        for result in ask("compare", pairs, older=older):
            differing = [d for d in result["differing"] if _counts(d, said.get(result["name"]))]
            if not differing:
                figures.add(f"configs that {version} reads alike")
            elif differing == ["cannot be read"]:
                figures.add(f"that {version} refuses")
            else:
                figures.breach(f"{version}, {result['name']}: {'; '.join(differing)}")
    return figures


def _alike(*_: object) -> bool:
    return True  # whether version 5 reads the same is what is asked here


def _counts(differing: str, said: dict[str, Any] | None) -> bool:
    """Whether a setting that is read otherwise makes another model; ``said`` is for version 4 alone."""
    path = differing.partition(":")[0].split(".")
    if path[-1] in _COMPUTED:
        return "None became" not in differing  # from the other settings, by both versions
    if path[-1] == "rope_scaling" and differing.endswith(": None became {'rope_type': 'default'}"):
        return False  # which is what None means; some types do not start without it
    if path[-1] != "tie_word_embeddings":
        return True
    if said is None:
        return len(path) == 1  # version 5 goes by the config of the whole
    config = said["two"]
    # By default version 5 ties what 4 does not, and the other way round: its weights are the truth.
    if config.get("model_type") in _ALWAYS_TIED or differing.endswith(f"became {said['tied']}"):
        return False
    parts = [key for key, value in config.items() if isinstance(value, dict) and "config" in key]
    return path == ["text_config", path[-1]] if parts else len(path) == 1


if __name__ == "__main__":
    main(campaign, count=1000)
