"""An adapter on the modules of a trainer's own models becomes one on HuggingFace's.

torchtune and torchtitan hang ``lora_a`` and ``lora_b`` on the modules that they adapt, with the weights
beside them or alone; torchtune's DoRA has a ``magnitude``, too. litgpt keeps ``lora_A`` and ``lora_B``
alone, in ``lit_model.pth.lora``: those of ``attn.qkv`` are a pair for each of queries, keys and values
that is adapted, one below the other, and hyperparameters.yaml says which these are.
"""

from __future__ import annotations

from pathlib import Path

from streamconv.errors import BadInputError, listed
from streamconv.families.native.convert import Described
from streamconv.families.native.dialect import Dialect
from streamconv.formats.megatron.run_yaml import settings_below
from streamconv.ir.recipe import SourceRef, View
from streamconv.ir.source import Checkpoint, GlobalTensor
from streamconv.lora.adapters import Adapter, rank_of, refuse_more
from streamconv.lora.settings import LITGPT
from streamconv.lora.translation import Translation

_FUSED = ".attn.qkv"  # litgpt's
_GROUPED = ".attn.attn"
_SWITCHES = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}


def translated(
    adapter: Adapter, checkpoint: Checkpoint, dialect: Dialect, described: Described
) -> Adapter:
    """Return the adapter under the names of HuggingFace's modules.

    Raises :class:`BadInputError` for modules that no rule knows, whose rule does more than take rows,
    and for other tensors beside an adapter that was saved alone.
    """
    weights = sorted(f"{m}.weight" for m in adapter.targets)
    prefix = dialect.prefix(checkpoint.tensors)
    if prefix is None:
        prefix = dialect.prefix_of(weights) or ""
        others = [n for n in checkpoint.tensors if n not in adapter.tensors]
        if others:
            raise BadInputError(
                f"there are {len(others)} tensors beside the adapter, and no whole model",
                where=listed(others, 3),
                expected="an adapter alone, or with all of its base weights",
                hint="let the trainer merge the adapter into the model, and save that",
            )
    made = Translation(described.family, described.dims, dialect.name)
    for module, target in adapter.targets.items():
        refuse_more(target)
        weight = f"{module}.weight".removeprefix(prefix)
        a, b = (adapter.tensors[target.parts[p]] for p in ("lora_A", "lora_B"))
        if dialect.name == "litgpt" and module.endswith(_FUSED):
            _take_apart(made, weight, a, b, checkpoint.root)
        elif dialect.name == "litgpt" and module.endswith(_GROUPED):
            raise BadInputError(
                "an adapter of litgpt before 0.5.5, whose rows of queries, keys and values are mixed",
                where=a.fqn,
                hint="let that release merge it (litgpt merge_lora)",
            )
        else:
            rank_of(target, adapter)  # refuses factors that do not fit
            made.take(weight, a, b)
    made.finish()
    return Adapter(made.targets, {}, frozenset(), made.tensors)


def _take_apart(
    made: Translation, weight: str, a: GlobalTensor, b: GlobalTensor, folder: Path
) -> None:
    """Give queries, keys and values each their factors of litgpt's, and HuggingFace's rows."""
    modules = made.made_of(weight)
    if len(modules) != len(_SWITCHES):
        raise BadInputError(
            "litgpt adapts queries, keys and values each by itself, and they are one module in "
            "HuggingFace's model",
            where=a.fqn,
            found=", ".join(modules) or "no module that is known",
            hint="let litgpt merge it (litgpt merge_lora)",
        )
    told = settings_below(folder / LITGPT, (), frozenset(_SWITCHES.values()))
    of_one = (made.dims.heads, made.dims.groups, made.dims.groups)
    every = dict(zip(_SWITCHES, zip(modules, of_one, strict=True), strict=True))
    rank = b.shape[1] if len(b.shape) == 2 else 0
    number = a.shape[0] // rank if rank else 0
    # Without the settings, three of them are all there are.
    adapted = [k for k in _SWITCHES if told.get(_SWITCHES[k], number == len(_SWITCHES))]
    rows = [every[k][1] * made.dims.head_dim for k in adapted]
    if a.shape[0] != rank * len(adapted) or b.shape[0] != sum(rows):
        raise BadInputError(
            "cannot determine which of queries, keys and values this adapter is for",
            where=a.fqn,
            expected=f"lora_query, lora_key and lora_value in {LITGPT} beside it, and as many rows as "
            f"{', '.join(adapted) or 'those'} have",
            found=f"A {list(a.shape)}, B {list(b.shape)}",
        )
    start = 0
    for index, (kind, size) in enumerate(zip(adapted, rows, strict=True)):
        module = every[kind][0]
        made.adapt(
            module,
            _rows(made, a, index * rank, rank, module),
            _rows(made, b, start, size, module),
        )
        start += size


def _rows(
    made: Translation, tensor: GlobalTensor, first: int, size: int, module: str
) -> GlobalTensor:
    columns = tensor.shape[1]
    source = SourceRef(tensor.fqn, tensor.shape)
    view = View(source, (size, columns), (columns, 1), first * columns)
    return made.own(f"{tensor.fqn} of {module}", view, tensor)
