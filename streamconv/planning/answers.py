"""What transformers was asked, and what it answered: remembered, so that it need not be loaded again.

An answer depends on the question, which holds the config, names, shapes and dtypes that it is about,
and on the code that answers: streamconv, transformers, torch, Python. Both are the key. Planning asks
the same questions whether the answers are known or not, so that the plan is the same byte for byte; a
question that was never asked before loads the model as ever.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from streamconv.files.cache import Cache
from streamconv.ir import recipejson
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import Recipe
from streamconv.ir.source import Checkpoint, Skipped
from streamconv.options import Layout
from streamconv.tracing.model import Headers, Loaded, Model

if TYPE_CHECKING:
    from streamconv.families.converted import Converted

T = TypeVar("T")

# What reading an answer raises that is not one of ours, or of another form.
_DAMAGES = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
# An entry that many options have added to is begun anew.
_MOST_ANSWERS = 2000


class Answers:
    """The answers about one checkpoint's model: from the cache where it has them, else asked for.

    ``before_loading`` is called before transformers is. Without a ``cache`` nothing is remembered.
    """

    def __init__(
        self, cache: Cache | None = None, before_loading: Callable[[], None] = lambda: None
    ) -> None:
        self._cache = cache
        self.before_loading = before_loading
        self.remembered = True
        """Whether the same could be planned again without asking, once this is closed."""
        self._subject: str | None = None
        self._key: str | None = None
        self._known: dict[str, Any] = {}
        self._code: list[Any] = []
        self._asked: dict[str, Any] = {}

    def about(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Answers:
        """Return the answers about another checkpoint's model: these, if the two look alike."""
        if _subject(checkpoint, config) == self._subject:
            return self
        made = Answers(self._cache, self.before_loading)
        made.open(checkpoint, config)
        return made

    def open(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> None:
        """Find what is known about the model of ``checkpoint``, which ``config`` describes."""
        self._subject = _subject(checkpoint, config)
        if self._cache is None or config is None:
            return
        self._key = _digest(code_digest(), self._subject)
        data = self._cache.get_or_claim(self._key)
        if data is None:
            return
        try:
            found = json.loads(data)
            if all(map(_is_unchanged, found["code"])):
                self._known = dict(found["answers"])
                self._code = found["code"]
        except _DAMAGES:
            return

    def close(self) -> None:
        """Remember what was asked for the first time."""
        self._remember()
        if self._cache is not None:
            self._cache.close()

    def _remember(self) -> None:
        if self._asked.keys() <= self._known.keys():
            return
        if self._cache is None or self._key is None:
            self.remembered = False
            return
        answers = self._known | self._asked
        if len(answers) > _MOST_ANSWERS:
            answers = self._asked
        found = {"code": _loaded_code(self._code), "answers": answers}
        self.remembered &= self._cache.put(
            self._key, json.dumps(found, separators=(",", ":")).encode()
        )

    def ask(
        self,
        question: Sequence[Any],
        answer: Callable[[], T],
        encode: Callable[[T], Any],
        decode: Callable[[Any], T],
    ) -> T:
        """Return the answer to a ``question``, which is plain data that names all it depends on.

        ``answer`` is for one that is not known. It is kept only if what ``encode`` makes of it
        becomes the same again.
        """
        key = self._key and _digest(question)
        for answers in (self._asked, self._known):
            if key in answers:
                self._asked[key] = answers[key]
                return decode(answers[key])
        self.before_loading()
        said = answer()
        kept = False
        if key:
            try:
                plain = json.loads(json.dumps(encode(said)))
                if kept := decode(plain) == said:
                    self._asked[key] = plain
            except _DAMAGES:
                pass  # not plain data: asked again next time
        self.remembered &= kept
        return said

    def asks_anew(self) -> None:
        """Say that transformers is asked, now and every time, about what is not remembered."""
        self.before_loading()
        self.remembered = False

    def model(
        self, config: Mapping[str, Any], names: Collection[str], layout: Layout
    ) -> Model | None:
        """Return the model that ``config`` describes, None where transformers has none."""

        def build() -> Model | None:
            from streamconv.tracing.hf import build_meta

            return build_meta(config, names, layout)

        question = ["model", config, [*names], layout]
        built = _Once(build)
        if not self.ask(question, lambda: built() is not None, _same, bool):
            return None
        return AskedModel(self, question, built)

    def converted(self, question: Sequence[Any], convert: Callable[[], Converted]) -> Converted:
        """Return what the rules of a family make of a checkpoint."""
        done = _Once(convert)

        def without_model() -> tuple[Converted, bool]:
            made = done()
            return replace(made, model=None), made.model is not None

        made, has_model = self.ask(question, without_model, _converted, _converted_of)
        model = AskedModel(self, question, lambda: done().model) if has_model else None
        return replace(made, model=model)


class _Once:
    """Makes a thing the first time that it is called for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __call__(self) -> Any:
        return self._made

    @cached_property
    def _made(self) -> Any:
        return self._make()


class AskedModel:
    """A model that answers from what it answered before, and is built where that is not enough.

    ``question`` is what it was the answer to; ``build`` returns it.
    """

    def __init__(
        self, answers: Answers, question: Sequence[Any], build: Callable[[], Model]
    ) -> None:
        self._answers = answers
        self._self = _digest(question)
        self._build = build

    def _ask(
        self,
        question: Sequence[Any],
        answer: Callable[[Model], T],
        encode: Callable[[T], Any] = lambda value: value,
        decode: Callable[[Any], T] = lambda value: value,
    ) -> T:
        return self._answers.ask(
            [self._self, *question], lambda: answer(self._build()), encode, decode
        )

    @cached_property
    def state_shapes(self) -> Mapping[str, Shape]:
        """Return the tensors of the state dict."""
        return self._ask(["state"], lambda m: dict(m.state_shapes), dict, _shapes)

    @cached_property
    def hub_shapes(self) -> Mapping[str, Shape]:
        """Return the tensors of a saved model."""
        return self._ask(["hub"], lambda m: dict(m.hub_shapes), dict, _shapes)

    @cached_property
    def tied(self) -> tuple[tuple[str, str], ...]:
        """Return (alias, kept) of tied weights, in Hub names."""
        return self._ask(["tied"], lambda m: m.tied, list, _pairs)

    @cached_property
    def architecture(self) -> str:
        """Return the name of the class."""
        return self._ask(["architecture"], lambda m: str(m.architecture))

    @cached_property
    def certain(self) -> bool:
        """Whether that is the class that config.json names."""
        return self._ask(["certain"], lambda m: bool(m.certain))

    @cached_property
    def optional(self) -> frozenset[str]:
        """Return the Hub names that a complete model may lack."""
        return self._ask(["optional"], lambda m: frozenset(m.optional), sorted, frozenset)

    def is_optional_unexpected(self, name: str) -> bool:
        """Whether the library ignores a tensor that it does not know."""
        return self._ask(["ignores", name], lambda m: bool(m.is_optional_unexpected(name)))

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is the model's, whatever release or layout names it so."""
        return self._ask(["has", name], lambda m: bool(m.has(name)))

    def load(self, tensors: Headers) -> Loaded:
        """Return what the library makes of files that hold ``tensors``."""
        question = ["load", headers_json(tensors)]
        return self._ask(question, lambda m: m.load(tensors), astuple, _loaded_of)

    def kept_fp32(self, names: Collection[str], target: DType) -> frozenset[str]:
        """Return the tensors that the library keeps in float32 when it loads as ``target``."""
        question = ["fp32", [*names], target.name]
        return self._ask(question, lambda m: m.kept_fp32(names, target), sorted, frozenset)

    def hold_fractions(self, names: Collection[str]) -> frozenset[str]:
        """Return the tensors of ``names`` that hold floating-point numbers in the model."""
        question = ["fractions", [*names]]
        return self._ask(question, lambda m: m.hold_fractions(names), sorted, frozenset)

    def hub_name(self, name: str) -> str | None:
        """Return what the Hub calls a tensor that keeps its elements in place; None for others."""
        return self._ask(["hub name", name], lambda m: m.hub_name(name))

    def holds_transposed(self, module: str) -> bool | None:
        """Whether a module's weight is (in, out); None where there is no such module."""
        return self._ask(["transposed", module], lambda m: m.holds_transposed(module))

    def reads_alike(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether the library reads all that ``one`` says from the config ``other``, too."""
        return self._ask(["alike", one, other], lambda m: bool(m.reads_alike(one, other)))

    def recipes(
        self, tensors: Headers, layout: Layout = "hub"
    ) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
        """Return the recipes of the output tensors, and notices."""
        question = ["recipes", headers_json(tensors), layout]
        return self._ask(question, lambda m: m.recipes(tensors, layout), _recipes, _recipes_of)


def _subject(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> str:
    """Return what stands for all that is said of a checkpoint's model: names, shapes, types, config."""
    undecided = [[n, u.pieces.shape, u.copies.shape] for n, u in checkpoint.undecided.items()]
    return _digest(headers_json(checkpoint.headers()), undecided, config)


def _digest(*parts: Any) -> str:
    """Return a digest of plain data; the order of keys counts. Raises ``TypeError`` for any other."""
    text = json.dumps(parts, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def headers_json(tensors: Headers) -> list[Any]:
    """Return names, shapes and element types as plain data."""
    return [[name, shape, dtype.name] for name, (shape, dtype) in tensors.items()]


def _same(value: T) -> T:
    return value


def _shapes(data: Mapping[str, list[int]]) -> dict[str, Shape]:
    return {name: tuple(shape) for name, shape in data.items()}


def _pairs(data: Iterable[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((one, other) for one, other in data)


def _loaded_of(data: list[Any]) -> Loaded:
    missing, unexpected, clashing, misshapen, failed = data
    return Loaded(
        tuple(missing),
        tuple(unexpected),
        _pairs(clashing),
        tuple((n, tuple(a), tuple(b)) for n, a, b in misshapen),
        _pairs(failed),
    )


def _recipes(said: tuple[tuple[Recipe, ...], tuple[str, ...]]) -> Any:
    recipes, notices = said
    return [list(map(recipejson.to_json, recipes)), notices]


def _recipes_of(data: Any) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    recipes, notices = data
    return tuple(map(recipejson.from_json, recipes)), tuple(notices)


def _converted(said: tuple[Converted, bool]) -> Any:
    made, has_model = said
    return [
        list(map(recipejson.to_json, made.recipes)),
        made.architecture,
        made.config,
        made.changes,
        [p.pattern for p in made.extras],
        made.notices,
        [[s.name, s.reason] for s in made.skipped],
        [p.pattern for p in made.untrained],
        has_model,
    ]


def _converted_of(data: Any) -> tuple[Converted, bool]:
    from streamconv.families.converted import Converted

    recipes, architecture, config, changes, extras, notices, skipped, *rest = data
    untrained, has_model = rest
    made = Converted(
        tuple(map(recipejson.from_json, recipes)),
        None,
        architecture,
        config,
        tuple(changes),
        tuple(map(re.compile, extras)),
        tuple(notices),
        tuple(Skipped(name, reason) for name, reason in skipped),
        tuple(map(re.compile, untrained)),
    )
    return made, bool(has_model)


# --- the code that answers ----------------------------------------------------------------------


def code_digest() -> str:
    """Return a digest of what answers: our own rules, and the packages that are installed.

    Every file of ours counts, and the name of every package, which holds its version.
    """
    digest = hashlib.sha256(sys.version.encode())
    ours = Path(__file__).resolve().parents[1]
    for path in sorted(ours.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(ours)} {len(data)} ".encode() + data)
    for folder in sys.path:
        try:
            names = sorted(p.name for p in Path(folder).iterdir() if _IS_PACKAGE.search(p.name))
        except OSError:
            continue
        digest.update(json.dumps(names).encode())
    for name in ("transformers", "torch"):
        spec = importlib.util.find_spec(name)
        digest.update(json.dumps(_stamp(spec.origin or "") if spec else None).encode())
    return digest.hexdigest()


_IS_PACKAGE = re.compile(r"\.(dist|egg)-info$|\.pth$|\.egg-link$")


def _loaded_code(before: Iterable[list[Any]]) -> list[list[Any]]:
    """Return the files of transformers that took part, each with what shows that it has changed.

    ``before`` are those that took part in earlier answers.
    """
    files = {path for path, *_ in before}
    for name, module in sys.modules.copy().items():
        if name.partition(".")[0] == "transformers":
            files.add(str(getattr(module, "__file__", None)))
    return [_stamp(path) for path in sorted(files)]


def _stamp(path: str) -> list[Any]:
    try:
        status = Path(path).stat()
    except OSError:
        return [path, 0, 0]
    return [path, status.st_size, status.st_mtime_ns]


def _is_unchanged(stamp: list[Any]) -> bool:
    return _stamp(stamp[0]) == stamp
