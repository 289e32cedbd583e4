#!/usr/bin/env bash
# Makes a small real FSDP2 checkpoint, converts it and loads the result in transformers.
# Everything happens in .venv-try and in a temporary folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv-try
WORK=$(mktemp -d "${TMPDIR:-/tmp}/streamconv-try.XXXXXX")
trap 'rm -rf "$WORK"' EXIT

run() {
    echo
    echo "\$ $*"
    "$@"
}

if [ ! -x "$VENV/bin/python" ]; then
    echo "== making $VENV with $PYTHON"
    "$PYTHON" -m venv "$VENV"
fi
echo "== installing torch and streamconv into $VENV"
if ! "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
fi
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e .
PATH="$PWD/$VENV/bin:$PATH"

echo
echo "== a small model, sharded and saved with torch FSDP2 on 4 ranks (gloo, CPU)"
run python scripts/make_small_checkpoint.py --out "$WORK/run" --world 4
SRC=$WORK/run/global_step_10/actor
DST=$WORK/model
run ls -l "$SRC"

echo
echo "== converting it"
run streamconv plan "$SRC" "$DST"
run streamconv "$SRC" "$DST" --max-mem 1GB
run ls -l "$DST"

echo
echo "== the same command again has nothing to do"
run streamconv "$SRC" "$DST" --max-mem 1GB

echo
echo "== loading the result in transformers, and comparing it with the model before it was sharded"
python - "$DST" "$WORK/run/truth" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, truth = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    if info.get(kind):
        sys.exit(f"{kind}: {sorted(info[kind])}")
print(f"{type(model).__name__}: {model.num_parameters():,} parameters, nothing missing or unexpected")

expected = AutoModelForCausalLM.from_pretrained(truth).state_dict()
found = model.state_dict()
if found.keys() != expected.keys() or not all(torch.equal(found[k], expected[k]) for k in found):
    sys.exit("the weights differ from those before sharding")
print(f"{len(found)} tensors, every one equal to the model before it was sharded")

tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("hello world", return_tensors="pt").input_ids
with torch.no_grad():
    output = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
print("generated token ids:", output[0, prompt.shape[1] :].tolist())
PY
echo
echo "== it works"
