"""Custom code beside the rank files: what the model needs goes along, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import streamconv
from streamconv.errors import UnsafeInputError
from streamconv.planning.custom_code import Import, code_of, imports

FILES = {
    "config.json": json.dumps(
        {
            "model_type": "mine",
            "auto_map": {
                "AutoConfig": "configuration_mine.MineConfig",
                "AutoModel": "mine_model.Mine",
                "AutoModelForCausalLM": "someone/elsewhere--modeling_elsewhere.Model",
            },
        }
    ),
    "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["my_words.Words", None]}}),
    "configuration_mine.py": "x = 1\n",
    "mine_model.py": "from . import helpers\nfrom .parts.attention import A\nimport flat_helper, os\n",
    "helpers.py": "try: from .deeper import d\nexcept ImportError: d = None\n",
    "deeper.py": "def f():\n    from .helpers import helpers\n",
    "flat_helper.py": "import torch\n",
    "parts/__init__.py": "from .norms import *\n",
    "parts/attention.py": "from ..shared import (\n    a,\n    b as c,\n)\n",
    "parts/norms.py": "",
    "shared.py": "a = b = 'from .never import asked'\n",
    "my_words.py": "",
    # A trainer's own, which nothing of the model's asks for.
    "train.py": "from .unrelated import x\n",
    "unrelated.py": "",
    "parts/train.py": "",
}
OF_THE_MODEL = {n for n in FILES if n.endswith(".py")} - {
    "train.py",
    "unrelated.py",
    "parts/train.py",
}


@pytest.fixture
def source(tmp_path: Path, lone_rank_file: Path) -> Path:
    folder = tmp_path / "actor"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(lone_rank_file, folder)
    return folder


def plan(source: Path):
    return streamconv.plan(source, layout="memory").head


@pytest.mark.usefixtures("planned_here")
def test_what_the_configs_name_and_what_that_imports_is_copied(source):
    head = plan(source)
    assert {s.name for s in head.side if s.name.endswith(".py")} == OF_THE_MODEL
    assert [n for n in head.notices if "custom code" in n] == []


@pytest.mark.usefixtures("planned_here")
def test_what_is_missing_is_told(source):
    (source / "deeper.py").unlink()
    (source / "my_words.py").unlink()
    (source / "parts" / "attention.py").write_text("from ...above import x\nimport not_there\n")
    told = [n for n in plan(source).notices if "custom code" in n]
    assert told == [
        "custom code: tokenizer_config.json names my_words.py, which is not there",
        "custom code: helpers.py imports .deeper, which is not there",
        "custom code: parts/attention.py imports ...above, which is not there",
    ]


@pytest.mark.usefixtures("planned_here")
def test_a_helper_that_is_a_link_out_of_the_checkpoint_is_refused(source, tmp_path):
    (source / "deeper.py").unlink()
    (tmp_path / "secret.py").write_text("")
    (source / "deeper.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(UnsafeInputError, match="leads out"):
        plan(source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from .a import b, c as d", [Import(1, "a", ("b", "c"))]),
        ("from ... import b", [Import(3, "", ("b",))]),
        ("from ....a.b import *", [Import(4, "a.b", ("*",))]),
        ("import a.b as c, d", [Import(0, "a.b"), Import(0, "d")]),
        ("x = 1; import a", [Import(0, "a")]),
        ("if x: import a\nelse: from .b import c", [Import(0, "a"), Import(1, "b", ("c",))]),
        ("from .a import (  # why\n  b,\n  c,\n)", [Import(1, "a", ("b", "c"))]),
        ("from .a import \\\n  b", [Import(1, "a", ("b",))]),
        ("def f():\n  yield from x\n  raise E from e\n", []),
        ("'''\nimport a\n'''\ns = 'import b'\n# import c\n", []),
        ("s[1:2]\nd = {'import': 1}\nf = lambda: imported\n", []),
        (f"x = {'(' * 500}1{')' * 500}\nimport a", [Import(0, "a")]),
    ],
)
def test_imports_are_found_wherever_they_stand(text, expected, tmp_path):
    (tmp_path / "code.py").write_text(text)
    assert imports(tmp_path / "code.py") == expected


@pytest.mark.parametrize(
    "raw", [b"\0\0", b"\xff\xfe", b"x = (", b"if x:\n\ty\n  z\n", b"# coding: none\n", b"'''"]
)
def test_what_is_no_python_is_copied_and_told(raw, tmp_path):
    (tmp_path / "code.py").write_bytes(raw)
    found = code_of(tmp_path, [tmp_path / "code.py"])
    assert found.files == {tmp_path / "code.py"}
    assert all("cannot be determined" in text for text in found.missing)


def test_a_pipe_is_no_code(tmp_path):
    os.mkfifo(tmp_path / "modeling_x.py")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    found = code_of(tmp_path, sorted(tmp_path.iterdir()))
    assert found.files == set()
    assert "modeling_x.py, which is not there" in found.missing[0]


def test_a_model_with_helper_modules_loads(shared_checkpoints, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    out = tmp_path / "out"
    streamconv.convert(shared_checkpoints / "hf_cases/custom-code-flat/flat", out, sync=False)
    assert (out / "my_helpers.py").is_file()
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
