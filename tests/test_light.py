"""torch and transformers for asking about a model: less is loaded, and no answer is another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import models
from transformers.utils.import_utils import define_import_structure

from streamconv.tracing import light

MODELS = {
    "qwen3": "Qwen3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
ASK = """
import json, sys
if sys.argv[1] == "light":
    from streamconv.tracing import light
    light.load()
import transformers
from streamconv.tracing.hf import build_meta
said = []
for kind, architecture in json.loads(sys.argv[2]).items():
    config = transformers.AutoConfig.for_model(kind).to_dict()
    config = json.loads(json.dumps(config, default=str)) | {"architectures": [architecture]}
    m = build_meta(config, [], "hub")
    shapes = sorted(m.state_shapes.items()), sorted(m.hub_shapes.items())
    said.append([m.architecture, *shapes, sorted(m.tied), sorted(m.optional)])
heavy = {"torch._dynamo.eval_frame", "torch.distributed.tensor"}
print(json.dumps([said, sorted(heavy & sys.modules.keys())]))
"""
RUN = """
from streamconv.tracing import light
light.load()
import sys, torch, transformers
config = transformers.Qwen2Config(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=64)
tokens = torch.arange(8).reshape(2, 4)
padded = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
assert "torch._dynamo.eval_frame" not in sys.modules
out = transformers.Qwen2ForCausalLM(config)(tokens, attention_mask=padded).logits
assert out.isfinite().all()
with transformers.masking_utils.TransformGetItemToIndex():
    pass
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
import torch._dynamo.config, torch.distributed.tensor
assert not isinstance(torch._dynamo, light._Later)
"""


def ask(how: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, how, json.dumps(MODELS)],
        capture_output=True,
        text=True,
        check=True,
    )
    answer: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_less_is_loaded_and_no_answer_is_another() -> None:
    said, loaded = ask("light")
    assert loaded == []
    assert ask("as ever")[0] == said


def test_what_was_left_out_is_there_for_whoever_asks() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_models_that_are_known_are_those_that_a_search_finds() -> None:
    folder = Path(models.__file__).parent
    found = define_import_structure(str(folder / "__init__.py"))
    assert light.of_models(define_import_structure(str(folder), prefix="models")) == found
