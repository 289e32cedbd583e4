"""Meta's ``consolidated.NN.pth``: real torch files, cut as fairscale's layers cut a model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import streamconv
from scripts.makers.native_inverse import TRAINERS, make
from scripts.makers.tiny_families import State, TinyModel
from scripts.outputs import differences, read_model
from streamconv.errors import BadInputError
from streamconv.formats import find_model, meta_ranks
from tests.stored import stored

_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_COLUMNS = ("wo", "w2")


@functools.cache
def model() -> tuple[TinyModel, State]:
    made = make("llama")
    # 60 words divide among the ranks.
    config = made.config | {"vocab_size": 60}
    state = {
        k: t[:60].clone() if k in ("model.embed_tokens.weight", "lm_head.weight") else t
        for k, t in made.state.items()
    }
    cut = TinyModel(made.name, config, state, made.tiny)
    return cut, TRAINERS["meta"].names(cut)


def write(
    folder: Path,
    ranks: int,
    *,
    embedding: int = 0,
    change: Callable[[int, State], None] = lambda *_: None,
) -> Path:
    """Write ``original/`` as Meta does; ``embedding`` is the axis along which that is cut."""
    made, tensors = model()
    folder = folder / "original"
    folder.mkdir()
    (folder.parent / "config.json").write_text(json.dumps(made.config))
    (folder / "params.json").write_text('{"dim": 48, "n_heads": 6, "n_kv_heads": 2}')
    for rank in range(ranks):
        part: State = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight").rpartition(".")[2]
            axis = {"tok_embeddings": embedding}.get(
                module, 0 if module in _ROWS else 1 if module in _COLUMNS else None
            )
            part[name] = tensor if axis is None else tensor.chunk(ranks, axis)[rank].clone()
        change(rank, part)
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    return folder


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(("ranks", "embedding"), [(1, 0), (2, 0), (2, 1)])
def test_the_ranks_are_joined(ranks: int, embedding: int, tmp_path: Path) -> None:
    made, tensors = model()
    folder = write(tmp_path, ranks, embedding=embedding)
    assert find_model(folder).format == "meta"
    checkpoint = meta_ranks.read(folder)
    found = stored(checkpoint)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    assert checkpoint.facts["ranks"] == ranks
    # Norms and frequencies, seven norms in three layers.
    assert checkpoint.facts["replicas_dropped"] == 8 * (ranks - 1)
    out = tmp_path / "out"
    streamconv.convert(folder, out, sync=False)
    converted = {name: (t.shape, t.data) for name, t in read_model(out).items()}
    assert converted == {
        name: (tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in made.state.items()
    }


def test_files_with_each_others_names_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    first, second = (folder / f"consolidated.{rank:02}.pth" for rank in range(2))
    kept = first.read_bytes()
    second.rename(first)
    second.write_bytes(kept)
    with pytest.raises(BadInputError, match="written by another rank than its name says"):
        meta_ranks.read(folder)


def test_files_of_the_old_format_are_joined(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    for file in folder.glob("*.pth"):
        state = torch.load(file)
        torch.save(state, file, _use_new_zipfile_serialization=False)
    _, tensors = model()
    found = stored(meta_ranks.read(folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(BadInputError, match="missing") as refused:
        meta_ranks.read(folder)
    assert refused.value.expected == "consolidated.00.pth"


@pytest.mark.usefixtures("planned_here")
def test_a_missing_last_rank_shows_against_the_config(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(BadInputError, match=r"contradict|shape"):
        streamconv.convert(folder, tmp_path / "out", sync=False)


def another_norm(rank: int, part: State) -> None:
    part["norm.weight"] = part["norm.weight"] + rank


def a_name_of_its_own(rank: int, part: State) -> None:
    part[f"strange_{rank}.weight"] = torch.zeros(2)


def an_unknown_name(_: int, part: State) -> None:
    part["layers.0.attention.gate.weight"] = torch.zeros(2)


def other_pieces(rank: int, part: State) -> None:
    part["output.weight"] = part["output.weight"][rank:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_norm, "hold different ones"),
        (a_name_of_its_own, "not in the files of all ranks"),
        (an_unknown_name, "cannot determine how the ranks cut this tensor"),
        (other_pieces, "not cut into equal pieces"),
    ],
)
def test_what_does_not_go_together_is_refused(
    change: Callable[[int, State], None], words: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, 2, change=change)
    with pytest.raises(BadInputError, match=words):
        meta_ranks.read(folder)


@pytest.mark.usefixtures("planned_here")
def test_the_shared_case(shared_checkpoints: Path, tmp_path: Path) -> None:
    root = shared_checkpoints / "layouts" / "meta_consolidated"
    streamconv.convert(root / "src", tmp_path / "out", sync=False)
    assert differences(read_model(tmp_path / "out"), read_model(root / "truth")) == []


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "pad_token_id": 0,
}


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            transformers.Llama4TextConfig(**_SIZES, num_local_experts=2),
            ("tok_embeddings.weight", "layers.0.feed_forward.experts.moe_w_in_eD_F"),
        ),
        (
            transformers.MllamaConfig(
                text_config={**_SIZES, "cross_attention_layers": []}, vision_config={}
            ),
            ("text_model.tok_embeddings.weight", "vision_model.class_embedding"),
        ),
    ],
    ids=["llama4", "mllama"],
)
def test_models_without_rules_are_refused(
    config: transformers.PreTrainedConfig, names: tuple[str, ...], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    torch.save({name: torch.zeros(60, 32) for name in names}, tmp_path / "consolidated.00.pth")
    with pytest.raises(BadInputError, match="no tensor of the checkpoint is one of") as error:
        streamconv.plan(tmp_path)
    assert "that there are no rules for" in str(error.value.found)
