"""Configs are data from strangers: what is built of them, what is refused, and that nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import BadInputError
from streamconv.ir.dtypes import BF16
from streamconv.planning.sidefiles import corrected_config
from streamconv.tracing.hf import build_meta
from streamconv.tracing.hf_build import resolve
from tests.hf_models import HEAD, LINEAR, TINY, dense, meta_of, sparse

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": None},
        {"model_type": ["qwen2"]},
        {"model_type": "no_such_type"},
        {"model_type": "../qwen2"},
        {"model_type": "os"},
        dense(architectures=["EvilForCausalLM"], auto_map={"AutoModel": "evil.Evil"}),
        {**dense(), "vision_config": {"backbone": "evil/repository"}},
        {**dense(), "vision_config": {"architecture": "hf-hub:evil/repository"}},
    ],
)
def test_what_the_library_does_not_have_is_none(config: dict[str, Any]) -> None:
    assert build_meta(config) is None


def test_custom_code_of_a_known_class_is_ignored() -> None:
    meta = meta_of(dense(auto_map={"AutoModelForCausalLM": "evil.Evil"}))
    assert meta.architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize("architectures", [None, [], "Qwen2ForCausalLM", [3], ["Qwen2Evil"]])
def test_a_class_that_the_library_lacks_is_stood_in_for(architectures: object) -> None:
    meta = meta_of(dense(architectures=architectures))
    assert meta.architecture == "Qwen2ForCausalLM"
    assert meta.certain == (architectures != ["Qwen2Evil"])


def test_quantization_and_attention_do_not_take_part() -> None:
    meta = meta_of(
        dense(
            quantization_config={"quant_method": "gptq", "bits": 4},
            attn_implementation="evil/kernel",
            _attn_implementation_internal="evil/kernel",
            _experts_implementation="evil/kernel",
            dtype="load",
            torch_dtype="save",
        )
    )
    assert meta.state_shapes == meta_of(dense()).state_shapes


@pytest.mark.parametrize(
    "name", ["Emu3ForCausalLM", "Emu3ForConditionalGeneration", "LlamaForCausalLM"]
)
def test_a_text_model_that_was_saved_alone_is_known_by_its_package(name: str) -> None:
    found = resolve({"model_type": "emu3_text_model", "architectures": [name]}, ())
    assert found == ((name, (name,)) if name.startswith("Emu3") else ("", ()))


def test_a_text_only_class_of_a_multimodal_type_takes_the_text_config() -> None:
    config = {"model_type": "qwen3_5", "text_config": TINY | HEAD | LINEAR}
    meta = meta_of({**config, "architectures": ["Qwen3_5ForCausalLM"]})
    assert meta.state_shapes["lm_head.weight"] == (64, 32)
    assert not any("visual" in name for name in meta.state_shapes)


@pytest.mark.parametrize("infinity", [{"__float__": "Infinity"}, float("inf")])
def test_numbers_that_json_lacks_are_read_as_transformers_writes_them(infinity: object) -> None:
    """transformers 5 tags them (Mamba-2 hybrids have such a limit); Python writes a bare word."""
    config = {"model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16}
    config |= {"state_size": 8, "n_groups": 1, "num_hidden_layers": 1, "vocab_size": 64}
    meta = meta_of({**config, "time_step_limit": [0.0, infinity]})
    assert meta.module.config.time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN"])
def test_config_json_keeps_such_numbers_as_they_stand(number: str) -> None:
    tagged, bare = {"__float__": number}, json.loads(number)
    config = dense(dtype="bfloat16", a=[0.0, tagged], text_config={"b": tagged, "c": bare})
    text, notices = corrected_config(config, dtype=BF16, untie=False, architecture="Other")
    assert len(notices) == 1
    assert text is not None
    assert text.content == json.dumps({**config, "architectures": ["Other"]}, indent=2) + "\n"
    assert f'"c": {number}\n' in text.content


def test_an_infinite_count_is_refused() -> None:
    with pytest.raises(BadInputError, match="num_hidden_layers is beyond any model"):
        build_meta(dense(num_hidden_layers={"__float__": "Infinity"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2_001},
        {"num_hidden_layers": -1e400},
        {"num_hidden_layers": "1000000000"},
        {"num_labels": 10**9},
        {"num_attention_heads": 10**9},
        {"num_hidden_layers": [2]},
        {"hidden_size": 10**30},
        {"hidden_size": -4},
        {"num_attention_heads": 0},
        {"vocab_size": None},
        {"layer_types": ["evil"]},
        {"rope_parameters": "evil"},
        {"id2label": {"x": 1}},
        {"__class__": "evil"},
        {"to_dict": 1, "get_text_config": 2, "sub_configs": 3},
    ],
)
def test_hostile_configs_are_refused_or_harmless(changes: dict[str, Any]) -> None:
    error: BadInputError | None = None
    try:
        build_meta(dense(**changes))
    except BadInputError as refused:
        error = refused
    assert error is None or len(str(error)) < 1500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is beyond any model"),
        ({"num_experts": 10**7}, "num_experts is beyond any model"),
        ({"num_labels": 10**7}, "num_labels is beyond any model"),
        ({"num_experts": 10**6, "num_hidden_layers": 3}, "more tensors than any has"),
        ({"num_hidden_layers": 100, "num_experts": 10_000}, "more tensors than any has"),
        ({"hidden_size": "evil"}, "cannot build Qwen3MoeForCausalLM"),
    ],
)
def test_configs_that_would_fill_the_memory_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        build_meta(sparse(**changes))


def test_nested_configs_are_bounded_too() -> None:
    with pytest.raises(BadInputError, match="depth is beyond any model"):
        build_meta({"model_type": "qwen3_vl", "vision_config": {"depth": 10**9}})
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"text_config": deep}
    with pytest.raises(BadInputError, match="nested too deeply"):
        build_meta({"model_type": "qwen3_vl", **deep})


AUDITED = """
import json, sys
from streamconv.tracing.hf import build_meta

seen = []
watched = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec"}

def audit(event, args):
    if event in watched or (event == "import" and "evil" in str(args[0])):
        seen.append(event)
    if event == "open" and "evil" in str(args[0]):
        seen.append(f"open {args[0]}")

sys.addaudithook(audit)
for config in json.load(sys.stdin):
    try:
        build_meta(config)
    except Exception as error:
        print(type(error).__name__, error, file=sys.stderr)
print(json.dumps(seen))
"""


def test_nothing_of_the_source_is_imported_opened_or_fetched(tmp_path: Path) -> None:
    evil = {
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil"),
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "experts_implementation": "evil/kernel",
        "use_kernels": True,
        "name_or_path": "evil",
        "_name_or_path": "evil",
        "quantization_config": {"quant_method": "evil", "modules_to_not_convert": ["evil"]},
        "use_pretrained_backbone": True,
    }
    multimodal = {
        "model_type": "llava",
        "text_config": TINY | evil | {"model_type": "llama"},
        "vision_config": evil | {"model_type": "evil"},
    }
    (tmp_path / "evil.py").write_text("raise SystemExit('evil ran')")
    configs = [
        dense(**evil),
        sparse(**evil),
        dense(**evil, architectures=["EvilForCausalLM"]),
        multimodal | evil,
        multimodal | {"vision_config": evil | {"model_type": "clip_vision_model"}},
        {"model_type": "detr", "backbone": "evil", "use_timm_backbone": False},
        {"model_type": "llava", "vision_config": {"model_type": "timm_wrapper", **evil}},
        {"model_type": "evil", **evil},
    ]
    done = subprocess.run(
        [sys.executable, "-c", AUDITED],
        input=json.dumps(configs),
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []
    assert "Traceback" not in done.stderr


MEASURED = """
import json, re, sys
from pathlib import Path
from streamconv.ir.dtypes import BF16
from streamconv.tracing.hf import build_meta

meta = build_meta(json.load(sys.stdin))
recipes, _ = meta.recipes({name: (shape, BF16) for name, shape in meta.state_shapes.items()})
# Not ru_maxrss: it begins with the peak of the process that forked this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps([len(recipes), int(peak[1])]))
"""


@pytest.mark.memory
def test_a_model_of_671_billion_parameters_is_described_in_little_memory() -> None:
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        input=json.dumps(config),
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    tensors, peak_kib = json.loads(done.stdout)
    assert tensors == 45_395
    assert peak_kib < 500 * 1024


@pytest.mark.parametrize(("intermediate", "square"), [(24, 0), (16, 1), (32, 1)])
def test_square_experts_that_transformers_transposes_by_shape(
    intermediate: int, square: int
) -> None:
    """Qwen3-VL-MoE's are stored transposed, which version 5 sees by their shape alone."""
    from tests.test_compat import MODELS

    settings = MODELS["qwen3_vl_moe"][1]
    text = settings["text_config"] | {"moe_intermediate_size": intermediate, "hidden_size": 32}
    model = build_meta({"model_type": "qwen3_vl_moe", **settings, "text_config": text})
    assert model is not None
    _, notices = model.recipes({n: (shape, BF16) for n, shape in model.state_shapes.items()})
    assert sum("are square" in n for n in notices) == square
