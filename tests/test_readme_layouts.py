"""The tables of who leaves what are this list, and each row of it is a checkpoint that is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamconv.formats import find_model

PAGES = ("README.md", "docs/reference/layouts.md")
# Who, what lies there, how `inspect` calls it, and a checkpoint of it that tests convert.
ROWS = (
    (
        "verl with FSDP, SkyRL, EasyR1, rllm",
        "`actor/model_world_size_N_rank_R.pt`",
        "fsdp",
        "fsdp/verl-native-fsdp2",
    ),
    (
        "verl with VeOmni",
        "the same; experts cut among groups of ranks (`ep_fsdp`)",
        "fsdp",
        "layouts/verl_veomni_ep2/src",
    ),
    (
        "verl with Megatron, as it comes",
        "`actor/model/huggingface/`, up to 0.8 `actor/huggingface/`, a finished model",
        "huggingface",
        "layouts/verl_megatron_default/src/global_step_5",
    ),
    (
        "verl with Megatron's own checkpoints, Megatron-LM, Megatron-Bridge, slime, ms-swift",
        "`dist_ckpt/`, `iter_N/`",
        "torch_dist",
        "families/gemma2/mg/iter_0000000",
    ),
    (
        "verl 0.3 and 0.4 with Megatron, Megatron-LM's format torch",
        "`mp_rank_TT_PPP/`",
        "megatron_ranks",
        "megatron/qwen2_tp2pp2_tied/verl_ranks/global_step_1/actor",
    ),
    (
        "verl up to 0.7, LoRA with Megatron",
        "`adapter_checkpoint/mp_rank_*_adapter.pt`",
        "megatron_adapter",
        "megatron_cases/lora_bridge/verl_global_step_1/actor",
    ),
    (
        "transformers with `distributed_checkpoint=True`, NeMo Automodel, verl with it",
        "`shard-RRRRR-model-NNNNN-of-MMMMM.safetensors`; `consolidated/` where it is whole",
        "huggingface_pieces",
        "layouts/hf_writer_pieces_moe/src",
    ),
    (
        "HF Trainer, TRL, Axolotl, LLaMA-Factory on Accelerate with FSDP",
        "`pytorch_model_fsdp_0/`, a DCP folder; an adapter alone, too",
        "dcp",
        "layouts/accelerate_peft_fsdp/src",
    ),
    (
        "Accelerate with `use_dcp=False`",
        "`pytorch_model_fsdp_0_rankR.bin`",
        "fsdp",
        "layouts/accelerate_nodcp_fsdp1/src",
    ),
    (
        "Accelerate with FULL_STATE_DICT",
        "`pytorch_model_fsdp.bin`",
        "torch_file",
        "layouts/accelerate_full/src",
    ),
    (
        "HF Trainer, TRL, OpenRLHF, ms-swift with DeepSpeed",
        "`global_stepN/`, a folder with `latest`",
        "deepspeed",
        "deepspeed/hft_s3_qwen3_bf16_w2/global_step3",
    ),
    (
        "VeOmni, prime-rl, AReaL",
        "`global_step_N/`, `step_N/trainer/`, a DCP folder",
        "dcp",
        "layouts/areal_dcp/src",
    ),
    (
        "Composer, llm-foundry",
        "`epE-baB/`, a DCP folder",
        "dcp",
        "layouts/composer_sharded/src",
    ),
    (
        "Lightning and Fabric, sharded",
        "`X.ckpt/`, a DCP folder",
        "dcp",
        "layouts/lightning_fsdp_optimizer_0/src",
    ),
    ("Lightning, one file", "`X.ckpt`", "torch_file", "layouts/lightning_ckpt/src"),
    (
        "torchtitan, OLMo-core",
        "`step-N/`, a DCP folder of names of their own",
        "dcp",
        "layouts/torchtitan_030_llama3/src",
    ),
    (
        "torchtune",
        "`epoch_E/`, a DCP folder; `torchtune_model_0.pt`",
        "dcp",
        "layouts/torchtune_dcp/src/epoch_0",
    ),
    (
        "litgpt",
        "`lit_model.pth`, a file or a folder",
        "dcp",
        "layouts/litgpt_sharded/src",
    ),
    ("Meta", "`consolidated.NN.pth`", "meta", "layouts/meta_consolidated/src"),
    (
        "a finished model",
        "`model*.safetensors`",
        "huggingface",
        "layouts/hf_safetensors_sharded/src",
    ),
    (
        "an older finished model",
        "`pytorch_model*.bin`, torch's zips or its old format",
        "huggingface",
        "layouts/hf_bin_sharded_legacy/src",
    ),
    (
        "PEFT",
        "`adapter_model.safetensors` or `.bin`",
        "peft",
        "layouts/verl_megatron_lora/src/global_step_5/actor/model/huggingface/adapter",
    ),
)


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_have_these_rows(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text()
    table = text[text.index("| who saved it |") :].partition("\n\n")[0].splitlines()[2:]
    found = [tuple(re.split(r" \| ", line.strip("| "))) for line in table]
    assert found == [(who, what, name) for who, what, name, _ in ROWS]


@pytest.mark.parametrize(("who", "what", "name", "case"), ROWS, ids=[r[3] for r in ROWS])
def test_each_is_found(who: str, what: str, name: str, case: str, shared_checkpoints: Path) -> None:
    found = find_model(shared_checkpoints / case)
    assert (found.format, bool(found.identify())) == (name, True), (who, what)
