"""What a LoRA checkpoint becomes: a merged model, a PEFT folder, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streamconv.errors import BadInputError, UsageError
from streamconv.formats import peft_folder
from streamconv.formats.huggingface import base as base_model
from streamconv.formats.huggingface import weights
from streamconv.ir.planned import SideFile, TextFile
from streamconv.ir.recipe import Recipe
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped
from streamconv.lora import adapters, fit
from streamconv.lora import names as adapter_names
from streamconv.lora import settings as adapter_config
from streamconv.lora.adapters import Adapter
from streamconv.lora.settings import Settings
from streamconv.options import LoraOptions
from streamconv.tracing.model import Model

ADAPTER_FOLDER = "lora_adapter"
_PACKED = "the base as bitsandbytes packed it: --base has it as it was"
_BASE = "base weights (--lora merge or both gives the model)"


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """A checkpoint's base weights and its adapter, and what is to become of them.

    ``checkpoint`` holds the base weights under their own names, those of ``--base`` among them.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    settings: Settings
    merge: bool
    hand_on: bool
    diverged: Sequence[str]
    """Tensors of an adapter that is handed on which are not finite: a merge would refuse them."""
    base: Path | None = None
    called: Mapping[str, str] = field(default_factory=dict)
    """What the model calls the adapted weights, and those that were trained whole."""

    def fitted(self, model: Model | None) -> LoraPlan:
        """Return the plan with the adapter's names as the model has them; raises where it lacks them.

        The base weights of the checkpoint bear what wrappers put around names, too, so that a merge
        goes by the names that are there first.
        """
        called = fit.called(self.adapter, model)
        if model is not None and model.certain:
            fit.check(self.adapter, called, model, merged=not self.hand_on)
        elif model is None and not self.merge:
            fit.refuse_doubtful(self.adapter, self.checkpoint)
        return dataclasses.replace(self, called=called)

    @property
    def handed_on(self) -> Adapter:
        """Return the adapter under the names that the model has."""
        return fit.renamed(self.adapter, self.called)

    @property
    def folder(self) -> str:
        """Return where in the output the adapter goes, empty or ending in a slash."""
        return f"{ADAPTER_FOLDER}/" if self.merge else ""

    def with_tied(
        self, base: Mapping[str, GlobalTensor], model: Model | None
    ) -> dict[str, GlobalTensor]:
        """Return the base weights with those that are there by another name only, tied to them.

        An adapted one is no longer the other's equal, so the output holds both.
        """
        found = dict(base)
        if model is None:
            return found
        held = {model.hub_name(n) or n: n for n in base}
        for module in self.adapter.targets:
            weight = f"{module}.weight"
            name = model.hub_name(self.called.get(weight, weight))
            if name is None or name in held:
                continue
            for other in (n for pair in model.tied if name in pair for n in pair if n in held):
                tensor = base[held[other]]
                # A table of its own: the plan knows sources by their tables.
                table = dataclasses.replace(tensor.shards)
                found[name] = dataclasses.replace(tensor, fqn=name, shards=table)
        return found

    def in_pieces(
        self, recipes: list[Recipe], tensors: Mapping[str, GlobalTensor]
    ) -> tuple[list[Recipe], dict[str, GlobalTensor]]:
        """Return recipes and tensors in which the adapted weights are tensors of their own."""
        names = frozenset(f"{m}.weight" for m in self.adapter.targets)
        return adapters.in_pieces(recipes, tensors, names)

    def merged(
        self, recipes: list[Recipe], base: Mapping[str, GlobalTensor], model: Model | None
    ) -> list[Recipe]:
        """Return the recipes of the model with the adapter merged in."""

        def find(name: str) -> str | None:
            tried: list[str | None] = [name, self.called.get(name)]
            tried += [model.hub_name(n) for n in tried if n and model is not None]
            return next((n for n in tried if n in base), None)

        made = adapters.updates(
            self.adapter,
            self.settings,
            base,
            find,
            lambda m: self._turned(m, model),
            self.base,
        )
        return adapters.attach(recipes, made)

    def _turned(self, module: str, model: Model | None) -> bool | None:
        """Whether a module holds its weight as (in, out): as PEFT does, by the layer's class.

        None where neither the class nor the settings tell.
        """
        weight = f"{module}.weight"
        module = self.called.get(weight, weight).removesuffix(".weight")
        known = model.holds_transposed(module) if model is not None else None
        return (self.settings.fan_in_fan_out or None) if known is None else known

    def tensors(self, base: Mapping[str, GlobalTensor]) -> dict[str, GlobalTensor]:
        """Return ``base`` and the adapter's tensors, by FQN: all that the outputs draw from."""
        parts = [*self.adapter.tensors.values()]
        parts += self.adapter.saved.values() if self.hand_on else ()
        return {**base, **{t.fqn: t for t in parts}}

    def base_skipped(self) -> list[Skipped]:
        """Return the base weights as what is left out where the adapter alone is written."""
        below = {t.parts.get(adapters.BELOW) for t in self.adapter.targets.values()}
        return [
            Skipped(n, _BASE)
            for n, tensor in self.checkpoint.tensors.items()
            if n not in self.adapter.saved and tensor.fqn not in below
        ]

    def notices(self) -> list[str]:
        """Return what a user should know of the adapter."""
        s = self.settings
        ranks = sorted({adapters.rank_of(t, self.adapter) for t in self.adapter.targets.values()})
        what = f"LoRA of rank {', '.join(map(str, ranks))} on {len(self.adapter.targets)} modules"
        what += f", lora_alpha {s.alpha:g} ({s.origin})" if s.alpha is not None else ""
        done = {
            (True, False): "merged into the base weights",
            (False, True): "written as a PEFT adapter",
            (True, True): f"merged into the base weights, and written to {ADAPTER_FOLDER}/",
        }
        told = [f"{what}: {done[self.merge, self.hand_on]}"]
        heads = [] if self.merge else [*filter(_of_a_value_head, self.checkpoint.tensors)]
        if any(n not in self.adapter.saved for n in heads):
            told.append(
                f"the adapter's folder does not hold the value head ({heads[0]}), which a base model "
                "lacks, too: --lora merge or both keeps it"
            )
        if self.diverged:
            told.append(
                f"{len(self.diverged)} tensors of the adapter hold NaN or infinities, "
                f"{self.diverged[0]} among them: training diverged"
            )
        return told

    def config(self, model: Model | None) -> TextFile:
        """Return the adapter's config for PEFT."""
        known = list(model.state_shapes) if model is not None else []
        if model is None or not model.certain:
            known += self.checkpoint.tensors
        modules = {".".join(p[:k]) for p in (n.split(".") for n in known) for k in range(1, len(p))}
        adapter = self.handed_on
        ranks = {m: adapters.rank_of(t, adapter) for m, t in adapter.targets.items()}
        biases = any(p.endswith(".bias") for t in adapter.targets.values() for p in t.parts)
        linear = (m for m, t in adapter.targets.items() if not t.embedding)
        settings = dataclasses.replace(
            self.settings,
            fan_in_fan_out=any(self._turned(m, model) for m in linear),
            lora_bias=biases,
        )
        return adapter_config.config_file(
            self.folder + adapter_config.CONFIG, settings, ranks, modules, adapter.wrapped
        )

    @property
    def weights_name(self) -> str:
        """Return the output file of the adapter's tensors."""
        return self.folder + adapter_config.WEIGHTS

    def side(self, side: list[SideFile]) -> list[SideFile]:
        """Return the side files that belong to the output."""
        return side if self.merge else [s for s in side if s.name not in adapter_config.OF_A_MODEL]


Translate = Callable[[Adapter, Checkpoint], Adapter]


def plan_lora(
    checkpoint: Checkpoint, options: LoraOptions, translate: Translate | None = None
) -> LoraPlan | None:
    """Return what becomes of a checkpoint with an adapter; None where it has none.

    ``translate`` returns an adapter on Megatron's modules as one on HuggingFace's. Raises
    :class:`UsageError` for options that do not fit the checkpoint, :class:`BadInputError` for an
    adapter that is damaged, that contradicts its settings, or that changes nothing.
    """
    names = [*checkpoint.tensors, *checkpoint.undecided]
    tuner = adapter_names.other_tuner(names)
    if tuner is not None:
        kind, name = tuner
        raise BadInputError(
            f"this checkpoint holds an adapter of {kind}, which is not LoRA: leaving it out would give "
            "another model",
            where=name,
            expected="LoRA",
            hint="load it with PEFT, and merge it there (merge_and_unload) where PEFT can",
        )
    if not adapter_names.has_adapter(names):
        _refuse_options(checkpoint, options)
        return None
    found, adapter = adapters.separate(checkpoint)
    held = _with_weights(adapter, found)
    alone = not held or checkpoint.format == peft_folder.NAME
    if translate is not None:
        adapter = translate(adapter, checkpoint)
        if alone or options.mode == "adapter":
            found = _without_base(found, adapter)
    elif alone:
        adapter = adapters.with_trained(adapter, found.tensors)
    settings = adapters.settle(adapter_config.read_settings(checkpoint.root, options), adapter)
    if options.base is not None:
        packed = [] if alone else [m for m in held if _is_packed(found.tensors[_weight_of(m)])]
        if packed and len(packed) == len(held):
            found = _without_packed(found)
        elif not alone:
            raise UsageError(
                "--base is for a checkpoint without base weights; this one has them",
                where=str(checkpoint.root),
                found=_weight_of(held[0]),
            )
        settings.check_unchanged_base()
        found, adapter = _with_base(found, adapter, options.base)
    mode = options.mode
    if mode == "auto" and checkpoint.format == peft_folder.NAME and options.base is None:
        whole = weights.main_file(checkpoint.root)
        raise UsageError(
            "this is an adapter as PEFT saves it, and a model is made of it with its base model only",
            where=str(checkpoint.root),
            hint="name the folder of the model that it was trained on (--base DIR); --lora adapter "
            "writes the adapter again, checked"
            + (
                f". The whole model beside it ({whole.name}) is the source where the adapter's files "
                "are not in its folder"
                if whole is not None and whole.name not in peft_folder.WEIGHTS
                else ""
            ),
        )
    if mode == "auto":
        mode = "adapter" if alone and options.base is None else "merge"
    if mode != "merge":
        settings.check_biases()
        adapters.refuse_biases(adapter)
    if mode != "adapter" and alone and options.base is None:
        raise adapters.no_weight(next(iter(adapter.targets)))
    paths = [checkpoint.root / f.path for f in checkpoint.files]
    if not options.allow_zero and adapters.changes_nothing(adapter, paths):
        raise BadInputError(
            "the adapter changes nothing: every lora_B is zero, as before the first step of training",
            where=str(checkpoint.root),
            found=f"{len(adapter.targets)} adapted modules",
            hint="the checkpoint does not hold what was trained; --allow-zero-delta takes it as it is",
        )
    diverged = adapters.not_finite(adapter, paths) if mode == "adapter" else ()
    return LoraPlan(
        found, adapter, settings, mode != "adapter", mode != "merge", diverged, options.base
    )


def _with_weights(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """Return the adapted modules whose weights show that the base model is there, too.

    Embeddings do not where layers are adapted as well: PEFT saves those that it adapts, or that have
    grown, with its adapter.
    """
    layers = [m for m in adapter.targets if any(map(str.isdecimal, m.split(".")))]
    return [m for m in layers or adapter.targets if _weight_of(m) in checkpoint.tensors]


def _weight_of(module: str) -> str:
    """Return the weight that the adapter of a module, or of a part of it, belongs to."""
    return f"{adapter_names.fused(module)}.weight"


def _is_packed(weight: GlobalTensor) -> bool:
    """Whether bitsandbytes holds a weight: in one column, whatever shape the weight has."""
    return len(weight.shape) == 2 and weight.shape[1] == 1


def _without_packed(checkpoint: Checkpoint) -> Checkpoint:
    """Return a QLoRA checkpoint without the weights that bitsandbytes packed, nor their scales."""
    packed = {n for n, t in checkpoint.tensors.items() if n.endswith(".weight") and _is_packed(t)}
    left = {n for n in checkpoint.tensors if f"{n.rpartition('.weight.')[0]}.weight" in packed}
    return dataclasses.replace(
        checkpoint,
        tensors={n: t for n, t in checkpoint.tensors.items() if n not in packed | left},
        skipped=(*checkpoint.skipped, *(Skipped(n, _PACKED) for n in sorted(packed | left))),
    )


def _without_base(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return what of a checkpoint of Megatron's belongs to its adapter, under HuggingFace's names."""
    left = [n for n in checkpoint.tensors if n not in adapter.saved]
    return dataclasses.replace(
        checkpoint,
        tensors={n: adapters.named(n, t) for n, t in adapter.saved.items()},
        naming="hf",
        skipped=(*checkpoint.skipped, *(Skipped(n, _BASE) for n in left)),
    )


def idle_options(options: LoraOptions) -> list[str]:
    """Return notices of what is said about an adapter where there is none: of several models, one."""
    given = {
        "--lora-alpha": options.alpha is not None,
        "--lora-rank": options.rank is not None,
        "--lora-rslora": options.rslora,
        "--allow-zero-delta": options.allow_zero,
    }
    return [f"{n} is without effect: no adapter in this checkpoint" for n, g in given.items() if g]


def _of_a_value_head(name: str) -> bool:
    return not {"score", "v_head"}.isdisjoint(name.split("."))


def _refuse_options(checkpoint: Checkpoint, options: LoraOptions) -> None:
    # Parts that Megatron does not train may come from a base model, too.
    base = options.base is not None and checkpoint.naming != "mcore"
    if options.mode != "auto" or base:
        option = "--base" if options.mode == "auto" else "--lora"
        count = len(checkpoint.tensors) + len(checkpoint.undecided)
        raise UsageError(
            f"{option} is given, but this checkpoint has no adapter",
            where=str(checkpoint.root),
            expected="tensors of an adapter: lora_A and lora_B of the modules that it changes",
            found=f"{count} tensors of a model, such as {next(iter(checkpoint.tensors), 'none')}",
            hint=f"leave out {option} to convert the model as it is",
        )


def _with_base(checkpoint: Checkpoint, adapter: Adapter, base: Path) -> tuple[Checkpoint, Adapter]:
    files, tensors = base_model.read(base, len(checkpoint.files))
    # What was trained whole takes the place of the base's own, hence by the base's names.
    called = fit.called_in(adapter, tensors)
    adapter = fit.renamed(adapter, called)
    own = {
        called.get(n, n): adapters.named(called.get(n, n), t) for n, t in checkpoint.tensors.items()
    }
    found = dataclasses.replace(
        checkpoint,
        files=(*checkpoint.files, *files),
        tensors={**tensors, **own},
        side_dir=checkpoint.side_dir or base,
        skipped=(
            *checkpoint.skipped,
            *(
                Skipped(f"{base.name}/{n}", "trained again: the checkpoint's own is used")
                for n in tensors
                if n in adapter.saved
            ),
        ),
    )
    return found, adapter
