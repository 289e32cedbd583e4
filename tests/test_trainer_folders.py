"""The folders that trainers leave, as they lie: from the run, the step or the weights to the model.

Names of files and of tensors are those of the trainers' own code; what is in them, torch has written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

import streamconv
from scripts.makers import layouts
from scripts.makers.dcp import save_alone
from scripts.makers.ranks import write_ranks
from scripts.outputs import differences, read_model
from streamconv import formats


@dataclass
class Run:
    """A run at ``top``, into which a trainer saves ``model``."""

    top: Path
    model: transformers.PreTrainedModel

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()

    def dcp(self, folder: str, prefix: str = "", optimizer: str = "optimizer.state.{}") -> None:
        """Save the weights below ``prefix``, and moments of an optimizer beside them."""
        held = {prefix + n: t for n, t in self.state.items()}
        for name, tensor in self.state.items():
            held[optimizer.format(name) + ".exp_avg"] = tensor.float()
            held[optimizer.format(name) + ".step"] = torch.tensor(10.0)
        (self.top / folder).parent.mkdir(parents=True, exist_ok=True)
        save_alone(self.top / folder, held)

    def optimizer(self, folder: str) -> Path:
        return save_alone(self.top / folder, {"optimizer.state.x.exp_avg": torch.ones(3)})

    def config(self, folder: str) -> None:
        self.model.config.save_pretrained(self.top / folder)

    def finished(self, folder: str) -> None:
        self.model.save_pretrained(self.top / folder)

    def pieces(self, folder: str) -> None:
        layouts.pieces(self.top / folder, self.state, world=2)

    def ranks(self, folder: str) -> None:
        (self.top / folder).mkdir(parents=True)
        write_ranks(self.top / folder, self.state, world=2)
        for rank in range(2):
            self.file(f"{folder}/optim_world_size_2_rank_{rank}.pt")
            self.file(f"{folder}/extra_state_world_size_2_rank_{rank}.pt")
        self.file(f"{folder}/fsdp_config.json", '{"FSDP_version": 2, "world_size": 2}')
        self.config(f"{folder}/huggingface")

    def file(self, path: str, text: str | None = None) -> None:
        (self.top / path).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            torch.save({"step": 10}, self.top / path)
        else:
            (self.top / path).write_text(text)


def verl(run: Run) -> Iterator[str]:
    run.ranks("global_step_10/actor")
    run.file("global_step_10/data.pt")
    run.file("latest_checkpointed_iteration.txt", "10")
    yield from (".", "global_step_10", "global_step_10/actor")


def verl_megatron_until_0_8(run: Run) -> Iterator[str]:
    run.finished("global_step_10/actor/huggingface")
    run.optimizer("global_step_10/actor/dist_ckpt")
    sign = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    run.file("global_step_10/actor/dist_ckpt/metadata.json", sign)
    yield from (".", "global_step_10", "global_step_10/actor")


def skyrl(run: Run) -> Iterator[str]:
    run.ranks("global_step_10/policy")
    run.file("trainer_state.pt")
    run.file("latest_ckpt_global_step.txt", "10")
    yield from (".", "global_step_10")


def accelerate(run: Run) -> Iterator[str]:
    run.dcp("checkpoint-10/pytorch_model_fsdp_0", "model.")
    run.optimizer("checkpoint-10/optimizer_0")
    for name in ("scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        run.file(f"checkpoint-10/{name}")
    run.file("checkpoint-10/trainer_state.json", "{}")
    yield from (".", "checkpoint-10", "checkpoint-10/pytorch_model_fsdp_0")


def llama_factory(run: Run) -> Iterator[str]:
    run.dcp("checkpoint-10/model")
    run.optimizer("checkpoint-10/optimizer")
    run.config("checkpoint-10/hf_model")
    run.file("checkpoint-10/metadata.json", "{}")
    run.file("checkpoint-10/CHECKPOINT_COMPLETE", "")
    yield from (".", "checkpoint-10", "checkpoint-10/model")


def nemo_rl(run: Run) -> Iterator[str]:
    run.dcp("step_10/policy/weights")
    run.optimizer("step_10/policy/optimizer")
    run.file("step_10/policy/tokenizer/tokenizer_config.json", "{}")
    run.file("step_10/config.yaml", "policy:\n  model_name: x\n")
    yield from (".", "step_10", "step_10/policy", "step_10/policy/weights")


def nemo_automodel(run: Run) -> Iterator[str]:
    run.pieces("epoch_0_step_10/model")
    run.config("epoch_0_step_10/model/.hf_metadata")
    run.optimizer("epoch_0_step_10/optim")
    yield from (".", "epoch_0_step_10", "epoch_0_step_10/model")


def nemo_automodel_torch_save(run: Run) -> Iterator[str]:
    run.dcp("epoch_0_step_10/model")
    run.config("epoch_0_step_10/model/.hf_metadata")
    run.optimizer("epoch_0_step_10/optim")
    yield from (".", "epoch_0_step_10")


def prime_rl(run: Run) -> Iterator[str]:
    run.dcp("checkpoints/step_10/trainer", "app.model.", "app.optimizers.state.{}")
    run.file("checkpoints/step_10/STABLE", "")
    yield from ("checkpoints", "checkpoints/step_10", "checkpoints/step_10/trainer")


def prime_rl_weights(run: Run) -> Iterator[str]:
    run.finished("weights/step_10")
    run.file("weights/step_10/STABLE", "")
    yield from ("weights", "weights/step_10")


def veomni(run: Run) -> Iterator[str]:
    run.dcp("global_step_10", "model.")
    run.file("global_step_10/extra_state/extra_state_rank_0.pt")
    run.finished("global_step_10/hf_ckpt")
    yield from (".", "global_step_10")


def areal(run: Run) -> Iterator[str]:
    run.dcp("epoch0epochstep9globalstep10", "dcp.model.", "dcp.optim.state.{}")
    run.config("epoch0epochstep9globalstep10")
    yield from (".", "epoch0epochstep9globalstep10")


def composer(run: Run) -> Iterator[str]:
    run.dcp("ep0-ba10", "state.model.model.model.", "state.optimizers.AdamW.state.model.{}")
    yield from (".", "ep0-ba10")


def lightning_fsdp(run: Run) -> Iterator[str]:
    run.dcp("epoch=0-step=10.ckpt", "model.llm.", "optimizer_0.state.llm.{}")
    run.file("epoch=0-step=10.ckpt/meta.pt")
    yield from (".", "epoch=0-step=10.ckpt")


def lightning_model_parallel(run: Run) -> Iterator[str]:
    run.dcp("epoch=0-step=10.ckpt", "state_dict.net.", "optimizer_0.state.net.{}")
    run.file("epoch=0-step=10.ckpt/meta.pt")
    yield from (".", "epoch=0-step=10.ckpt")


def torchtitan_last_save_in_hf(run: Run) -> Iterator[str]:
    run.finished("step-10")
    run.pieces("step-10/sharded")
    yield from (".", "step-10")


def slime_fsdp(run: Run) -> Iterator[str]:
    run.dcp("iter_0000010/model", "model_state.model.", "optim_state.optim.state.{}")
    run.optimizer("iter_0000010/optimizer")
    run.file("latest_checkpointed_iteration.txt", "10")
    yield from (".", "iter_0000010", "iter_0000010/model")


def numbered(run: Run) -> Iterator[str]:
    """Keep models in a list, as pipelines of torchtitan's kind do."""
    run.dcp("step-10", "models.0.", "optimizers.0.state.{}")
    yield from (".", "step-10")


TRAINERS: tuple[Callable[[Run], Iterator[str]], ...] = (
    verl,
    verl_megatron_until_0_8,
    skyrl,
    accelerate,
    llama_factory,
    nemo_rl,
    nemo_automodel,
    nemo_automodel_torch_save,
    prime_rl,
    prime_rl_weights,
    veomni,
    areal,
    composer,
    lightning_fsdp,
    lightning_model_parallel,
    torchtitan_last_save_in_hf,
    slime_fsdp,
    numbered,
)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda f: f.__name__)
def test_each_place_is_the_model(trainer: Callable[[Run], Iterator[str]], tmp_path: Path) -> None:
    model = layouts.tiny_llama()
    model.save_pretrained(tmp_path / "truth")
    model.config.save_pretrained(tmp_path / "config")
    run = Run(tmp_path / "run", model)
    run.top.mkdir()
    places = [*trainer(run)]
    options = {} if any(run.top.rglob("config.json")) else {"hf_config": tmp_path / "config"}
    found = [formats.find_model(run.top / place) for place in places]
    assert len({(f.root, f.kind, f.side_dir) for f in found}) == 1
    streamconv.convert(run.top / places[0], tmp_path / "out", sync=False, **options)
    assert not differences(read_model(tmp_path / "out"), read_model(tmp_path / "truth"))
