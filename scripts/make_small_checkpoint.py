"""Make one small, real FSDP2 checkpoint to try streamconv on.

    python scripts/make_small_checkpoint.py --out /tmp/small
    streamconv convert /tmp/small/global_step_10/actor /tmp/small/converted

A randomly initialised Qwen2 of under a megabyte is sharded over real gloo ranks and saved as verl
saves an actor. No GPU, no download. What lies under OUT:

    global_step_10/actor/                  the checkpoint
    latest_checkpointed_iteration.txt      written last, as verl does
    truth/                                 the same model, saved before it was sharded: compare
                                           the converted folder with it
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

STEP = 10
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def small_model() -> Qwen2ForCausalLM:
    """The same weights in every process that calls it."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=509,  # prime: no number of ranks divides it
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).to(torch.bfloat16)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def save_rank(rank: int, world: int, store: str, actor: Path) -> None:
    """What each training process does: shard its copy of the model and save its pieces."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    model = small_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(model.state_dict(), actor / f"model_world_size_{world}_rank_{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--world", type=int, default=4, help="number of ranks (default: 4)")
    arguments = parser.parse_args()
    out, world = arguments.out, arguments.world
    actor = out / f"global_step_{STEP}" / "actor"
    if out.exists():
        parser.error(f"{out} exists: name a new folder")
    actor.mkdir(parents=True)

    torch.set_num_threads(1)
    model, tokenizer = small_model(), small_tokenizer()
    model.save_pretrained(out / "truth")
    for folder in (out / "truth", actor / "huggingface"):
        model.config.save_pretrained(folder)
        GenerationConfig(temperature=0.6, top_p=0.95, do_sample=True).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    # Forked, so that the ranks need not import torch again. No thread may run before a fork.
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        store = str(Path(scratch, "store"))
        ranks = [
            fork.Process(target=save_rank, args=(r, world, store, actor)) for r in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed: its traceback is above")
    fsdp_config = {"FSDP_version": 2, "world_size": world}
    (actor / "fsdp_config.json").write_text(json.dumps(fsdp_config, indent=4))
    (out / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    print(f"{world} rank files: {actor}\nwhat they should become: {out / 'truth'}")


if __name__ == "__main__":
    main()
