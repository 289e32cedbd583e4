"""Inert stand-ins: what a pickle's globals become instead of the things they name.

A pickle is a little program: GLOBAL fetches an object by name, REDUCE and NEWOBJ call it, BUILD
sets its state. Here every fetched object is one of the classes below. Calling one only keeps the
arguments, building one only keeps the state.

Traps, all of them ways by which a pickle would change the reader itself rather than its own data:

* BUILD on a global (GLOBAL, then BUILD without an instance) sets attributes of the class: the metaclass
  refuses ``__setstate__``, ``__setattr__`` and ``__delattr__``.
* BUILD with slot state calls setattr on whatever has no ``__setstate__``: every class here has one.
* NEWOBJ wants a type, so what getattr returns must be a type too, hence classes and not functions.
* A key's ``__hash__`` and ``__eq__`` run while a dict is filled: stand-ins cannot be hashed.

And ways by which one pickle would be read in two ways, by torch and by us:

* A function is called at once, and a state is copied into its object: what the memo changes about their
  arguments afterwards changes nothing. So mutable arguments are copied here, too.
* NEWOBJ makes an object of a class, REDUCE calls a function: functions cannot be used as classes.
* BUILD on a tensor sets its data. No torch writes that.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar, NoReturn, Self, cast


class RefusedPickleError(Exception):
    """A pickle asks for something that data must not ask for; becomes UnsafeInputError."""


class Frozen(type):
    """Metaclass of all stand-ins: nothing about such a class can be changed once it is made."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise RefusedPickleError(f"an attempt to change {cls.path}")

    def __delattr__(cls, name: str) -> NoReturn:
        raise RefusedPickleError(f"an attempt to change {cls.path}")

    @property
    def __setstate__(cls) -> NoReturn:
        raise RefusedPickleError(f"an attempt to set the state of {cls.path} itself")

    path: str


class Inert(metaclass=Frozen):
    """A call or an object: ``args`` it was made with, ``state`` it was built with (None before)."""

    __slots__ = ("args", "state")
    path: ClassVar[str] = ""
    args: tuple[object, ...]
    state: object

    def __new__(cls, *args: object) -> Self:
        """Keep the arguments of the call."""
        self = _new(cls)
        self.args = args
        self.state = None
        return self

    def __setstate__(self, state: object) -> None:
        if self.state is not None:
            raise RefusedPickleError(f"a second state for one {self.path}")
        self.state = copied(state)

    __hash__ = None  # type: ignore[assignment]


_new = object.__new__


def copied(state: object) -> object:
    """Return a state as it is now: a dict, or (attributes, slots), either of which may be a dict."""
    if type(state) is dict:
        return {**state}
    if type(state) is tuple and len(state) == 2:
        first, second = state
        if type(first) is dict or type(second) is dict:
            return (
                {**first} if type(first) is dict else first,
                {**second} if type(second) is dict else second,
            )
    return state


class FrozenFunction(Frozen):
    """Metaclass of the stand-ins of functions: a call is what keeps the arguments."""

    def __call__(cls, *args: object) -> Inert:
        """Keep the arguments of the call."""
        self: Inert = _new(cls)  # type: ignore[arg-type]
        self.args = args
        self.state = None
        return self


class Function(Inert, metaclass=FrozenFunction):
    """A function: it is called, and what it returned is given no state."""

    __slots__ = ()

    def __new__(cls, *_: object) -> Self:
        """Refuse to make an object, as if it were a class."""
        raise RefusedPickleError(f"an object of {cls.path}, which is a function")

    def __setstate__(self, state: object) -> NoReturn:
        raise RefusedPickleError(f"a state for what {self.path} returned")


class FrozenRebuild(FrozenFunction):
    """Metaclass of a function whose last argument is a state that it sets."""

    def __call__(cls, *args: object) -> Inert:
        """Keep the arguments of the call, the state as it is now."""
        self: Inert = _new(cls)  # type: ignore[arg-type]
        self.args = (*args[:-1], copied(args[-1])) if args else args
        self.state = None
        return self


class Rebuild(Function, metaclass=FrozenRebuild):
    """A function that sets a state; see :class:`FrozenRebuild`."""

    __slots__ = ()


class Token(Inert):
    """A global that is only ever passed around: a dtype, a storage type, a class as an argument."""

    __slots__ = ()

    def __new__(cls, *_: object) -> Self:
        """Refuse the call."""
        raise RefusedPickleError(f"a call of {cls.path}")


class Kept(Inert):
    """Whatever a global outside the table names, where such are only reported.

    It may be a kind of dict, list or set, whose items are passed over, or a key of a dict: what a
    trainer keeps beside the weights is anybody's.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # by identity, as its equality is

    def __call__(self, *args: object) -> Kept:
        """Keep what a partial would have made likewise."""
        return type(self)(*args)

    def __setitem__(self, key: object, value: object) -> None:
        """Pass over an item of a dict."""

    def append(self, item: object) -> None:
        """Pass over an item of a list."""

    def extend(self, items: object) -> None:
        """Pass over items of a list."""

    def add(self, item: object) -> None:
        """Pass over an item of a set."""


class InertDict(dict[object, object], metaclass=Frozen):
    """``collections.OrderedDict``: a dict whose keys are str or int and occur once.

    ``attributes`` is what a BUILD set: torch's state dicts carry ``_metadata`` there.
    """

    __slots__ = ("attributes",)
    path: ClassVar[str] = "collections.OrderedDict"
    attributes: object

    def __init__(self) -> None:
        self.attributes = None

    def __setitem__(self, key: object, value: object) -> None:
        if type(key) is not str and type(key) is not int:
            raise RefusedPickleError(f"a dict key of type {type(key).__name__}")
        if key in self:
            raise RefusedPickleError(f"the dict key {str(key)[:80]!r} occurs twice")
        _set_item(self, key, value)

    def __setstate__(self, state: object) -> None:
        if self.attributes is not None:
            raise RefusedPickleError(f"a second state for one {self.path}")
        if type(state) is not dict or not all(type(k) is str for k in state):
            raise RefusedPickleError(f"a state of another form for {self.path}")
        if any(hasattr(OrderedDict, k) for k in state):
            raise RefusedPickleError(f"a state that hides methods of {self.path}")
        self.attributes = state.copy()

    __hash__ = None


_set_item = dict.__setitem__


class InertSize(tuple[int, ...], metaclass=Frozen):
    """``torch.Size``: a tuple; its elements are checked by whoever reads them."""

    __slots__ = ()
    path: ClassVar[str] = "torch.Size"

    def __setstate__(self, state: object) -> NoReturn:
        raise RefusedPickleError("a state for a torch.Size")

    __hash__ = None  # type: ignore[assignment]


StandIn = type[Inert] | type[InertDict] | type[InertSize]


def stand_in(path: str, base: type[Inert] = Inert) -> type[Inert]:
    """Return a new stand-in class for the global ``path`` (``module.name``)."""
    name = path.rpartition(".")[2]
    metaclass = cast("type[type]", type(base))
    return cast("type[Inert]", metaclass(name, (base,), {"__slots__": (), "path": path}))


class InertStorage:
    """A persistent id: the storage ``key`` of ``numel`` elements of ``kind``, saved from ``location``.

    Made by the reader and never by a pickle, but a pickle may try BUILD on it.
    """

    __slots__ = ("key", "kind", "location", "numel")
    key: str
    kind: Frozen
    location: str
    numel: int

    def __setstate__(self, state: object) -> NoReturn:
        raise RefusedPickleError("a state for a storage")

    __hash__ = None  # type: ignore[assignment]
