"""Read pickles as data: describe what one would build, without importing or calling anything that it names.

A pickle is a program for a stack machine. This machine has only the instructions that data needs, and where the real
one would call a class, it records the class and the arguments. Time and memory are bounded by the pickle's length.

This is written by hand because every alternative runs code: `pickle.load` may call anything, an `Unpickler` with a
`find_class` of its own still calls what it allows, and `torch.load(weights_only=True)` builds tensors and rejects the
classes of `.metadata` files.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from plans.errors import HeaderError

__all__ = ["Global", "PickledCall", "PickledDict", "read_pickle"]

_GETATTR_NAMES = ("builtins.getattr", "__builtin__.getattr")
"""How early releases of Python 3.11, such as Debian 12's, pickle a member of an enumeration."""


@dataclass(frozen=True, slots=True)
class Global:
    """Something that a pickle names, such as `torch.float32`."""

    name: str


@dataclass(slots=True, eq=False)
class PickledCall:
    """A call that a pickle would make: the name that is called, its arguments, and the state set afterwards."""

    callee: str
    arguments: object
    state: object = None


@dataclass(slots=True, eq=False)
class PickledDict:
    """A dict as its pairs, so that no key needs to be hashed."""

    pairs: list[tuple[object, object]] = field(default_factory=list)


def read_pickle(content: bytes, allowed: Collection[str], where: str, enumerations: Collection[str] = ()) -> object:
    """Return what a pickle describes.

    Args:
        content: the pickle.
        allowed: the full names that it may contain.
        where: what to call it in error messages.
        enumerations: the allowed names that are enumerations, whose members may be named.

    Raises:
        HeaderError: the pickle contains another name, uses an instruction that data does not need, or is malformed.
    """
    machine = _Machine(allowed, where, enumerations)
    try:
        # Python warns of invalid escapes in a kind of text that is refused here anyway.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name not in _INSTRUCTIONS:
                    raise _unsafe_pickle_error(where, f"uses the instruction {opcode.name}")
                _INSTRUCTIONS[opcode.name](machine, argument)
        (result,) = machine.stack
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HeaderError(f"{where}: not a whole pickle", hint="copy or save the file again", file=where) from error
    return result


@dataclass
class _Machine:
    allowed: Collection[str]
    where: str
    enumerations: Collection[str]
    stack: list[object] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)

    def pop(self) -> object:
        return self.stack.pop()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[object]:
        """Pop everything above the last mark."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def pop_last(self, count: int) -> list[object]:
        """Pop the last few values."""
        values = self.stack[-count:]
        del self.stack[-count:]
        if len(values) < count:
            raise LookupError
        return values

    def push_global(self, module: object, name: object) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        is_member = full in _GETATTR_NAMES and self.enumerations
        if full not in self.allowed and not is_member:
            raise _unsafe_pickle_error(self.where, f"names {full[:200]!r}")
        self.push(Global(full))

    def call(self) -> None:
        arguments, called = self.pop(), self.pop()
        if not isinstance(called, Global):
            raise TypeError
        self.push(
            self.resolve_member(arguments) if called.name in _GETATTR_NAMES else PickledCall(called.name, arguments)
        )

    def resolve_member(self, arguments: object) -> PickledCall:
        """Return the call that creates an enumeration's member from its name."""
        match arguments:
            case (Global(owner), str(name)) if owner in self.enumerations:
                return PickledCall(owner, (name,))
        raise _unsafe_pickle_error(self.where, f"names {_GETATTR_NAMES[0]!r}")

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if not isinstance(made, PickledCall) or made.state is not None:
            raise TypeError
        made.state = state

    def extend(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target += values

    def set_items(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, PickledDict):
            raise TypeError
        target.pairs += zip(values[::2], values[1::2], strict=True)

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def push_persistent_id(self) -> None:
        self.push(PickledCall("persistent", self.pop()))


_Instruction = Callable[[_Machine, object], None]


def _unsafe_pickle_error(where: str, what: str) -> HeaderError:
    return HeaderError(
        f"{where}: {what}, which the metadata of tensors does not need",
        hint="do not load this file with torch either: it may run code; ask for the weights as safetensors",
        file=where,
    )


def _push(machine: _Machine, argument: object) -> None:
    machine.push(argument)


def _push_text(machine: _Machine, argument: object) -> None:
    # Half a surrogate pair, which a pickle may contain, must fail here and not when the name is written.
    machine.push(str(argument).encode().decode())


def _skip(machine: _Machine, argument: object) -> None:
    pass


def _put(machine: _Machine, argument: object) -> None:
    assert isinstance(argument, int)
    machine.memoize(argument)


def _get(machine: _Machine, argument: object) -> None:
    assert isinstance(argument, int)
    machine.push(machine.memo[argument])


_INSTRUCTIONS: Mapping[str, _Instruction] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _skip),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push_text),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "MEMOIZE": lambda machine, _: machine.memoize(None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop_last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop_last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop_last(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": lambda machine, _: machine.extend(machine.pop_last(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push(PickledDict()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine.push_global(*str(argument).split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_global(*machine.pop_last(2)),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.push_persistent_id(),
}
"""What each instruction does, by its name in `pickletools`."""
