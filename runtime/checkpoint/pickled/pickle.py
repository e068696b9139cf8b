"""Read pickles as data: describe what one would build, without importing or calling anything that it names.

A pickle is a program for a stack machine. This machine has only the instructions that data needs, and where the real
one would call a class, it records the class and the arguments. Time and memory are bounded by the pickle's length.

There are two ways to read. `read_pickle` is for pickles whose every class is known, and refuses all other names.
`describe_pickle` is for what people save beside their tensors: any name becomes a placeholder, as inert as all others,
and whoever reads the description decides what it needs to understand.

This is written by hand because every alternative runs code: `pickle.load` may call anything, an `Unpickler` with a
`find_class` of its own still calls what it allows, and `torch.load(weights_only=True)` builds tensors and rejects the
classes of `.metadata` files.
"""

from __future__ import annotations

import pickletools
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from plans.errors import HeaderError

__all__ = ["Global", "PickledCall", "PickledDict", "describe_pickle", "is_dtype_name", "read_pickle"]

_GETATTR_NAMES = ("builtins.getattr", "__builtin__.getattr")
"""How early releases of Python 3.11, such as Debian 12's, pickle a member of an enumeration."""

_DTYPE = re.compile(r"torch\.[qub]*(int|float|bits|complex)\d\w*")
_CALLED = "what a call returned"
_MAX_INSTRUCTIONS = 2**22
"""How many instructions a described pickle may have; a state dict has some forty for each tensor."""


@dataclass(frozen=True, slots=True)
class Global:
    """Something that a pickle names, such as `torch.float32`."""

    name: str


@dataclass(slots=True, eq=False)
class PickledCall:
    """A call that a pickle would make.

    Args:
        callee: the name that is called.
        arguments: its arguments, mostly a tuple.
        state: the state that is set afterwards, None if none is.
        pairs: the keys and values that are then put into the result, None if there are none.
        values: the values that are appended or added to it, None if there are none.
    """

    callee: str
    arguments: object
    state: object = None
    pairs: list[tuple[object, object]] | None = None
    values: list[object] | None = None


@dataclass(slots=True, eq=False)
class PickledDict:
    """A dict as its pairs, so that no key needs to be hashed."""

    pairs: list[tuple[object, object]] = field(default_factory=list)


def is_dtype_name(name: str) -> bool:
    """Return whether torch would give the name to a dtype, whether or not any release has it; such names are data."""
    return _DTYPE.fullmatch(name) is not None


def read_pickle(content: bytes, allowed: Collection[str], where: str, enumerations: Collection[str] = ()) -> object:
    """Return what a pickle describes.

    Args:
        content: the pickle.
        allowed: the full names that it may contain, besides those of dtypes.
        where: what to call it in error messages.
        enumerations: the allowed names that are enumerations, whose members may be named.

    Raises:
        HeaderError: the pickle contains another name, uses an instruction that data does not need, or is malformed.
    """
    return _run(_Machine(where, _INSTRUCTIONS, allowed, enumerations), content)


def describe_pickle(content: bytes, where: str) -> object:
    """Return what a pickle describes, whatever it names. Dicts and lists with a class of their own are calls.

    Args:
        content: the pickle.
        where: what to call it in error messages.

    Raises:
        HeaderError: the pickle uses an instruction that state dicts do not need, has too many, or is malformed.
    """
    return _run(_Machine(where, _ALL_INSTRUCTIONS, limit=_MAX_INSTRUCTIONS), content)


def _run(machine: _Machine, content: bytes) -> object:
    where, count = machine.where, 0
    try:
        # Python warns of invalid escapes in a kind of text that is refused here anyway.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name not in machine.instructions:
                    raise _unsafe_pickle_error(where, f"uses the instruction {opcode.name}")
                if (count := count + 1) > machine.limit:
                    raise HeaderError(
                        f"{where}: over {machine.limit:,} instructions, more than any state dict needs",
                        hint="save the checkpoint again, in several files",
                        file=where,
                    )
                machine.instructions[opcode.name](machine, argument)
        (result,) = machine.stack
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HeaderError(f"{where}: not a whole pickle", hint="copy or save the file again", file=where) from error
    return result


_Instruction = Callable[["_Machine", object], None]


@dataclass
class _Machine:
    where: str
    instructions: Mapping[str, _Instruction]
    allowed: Collection[str] | None = None
    enumerations: Collection[str] = ()
    limit: int = sys.maxsize
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
        if self.allowed is not None and full not in self.allowed and not is_member and not is_dtype_name(full):
            raise _unsafe_pickle_error(self.where, f"names {full[:200]!r}")
        self.push(Global(full))

    def call(self) -> None:
        arguments, called = self.pop(), self.pop()
        if isinstance(called, Global) and called.name in _GETATTR_NAMES and self.allowed is not None:
            self.push(self.resolve_member(arguments))
        elif isinstance(called, Global):
            self.push(PickledCall(called.name, arguments))
        elif self.allowed is None and isinstance(called, PickledCall):
            # What another call returned, such as `operator.attrgetter("a")`, is called in its turn.
            self.push(PickledCall(_CALLED, (called, arguments)))
        else:
            raise TypeError

    def call_with_keywords(self) -> None:
        keywords, arguments = self.pop(), self.pop()
        self.push((arguments, keywords))
        self.call()

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
        if isinstance(target, PickledCall) and self.allowed is None:
            target.values = [] if target.values is None else target.values
            target.values += values
        elif isinstance(target, list):
            target += values
        else:
            raise TypeError

    def set_items(self, values: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, PickledCall) and self.allowed is None:
            target.pairs = [] if target.pairs is None else target.pairs
        elif not isinstance(target, PickledDict):
            raise TypeError
        pairs = target.pairs
        assert pairs is not None
        pairs += zip(values[::2], values[1::2], strict=True)

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def push_persistent_id(self) -> None:
        self.push(PickledCall("persistent", self.pop()))


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

_ALL_INSTRUCTIONS: Mapping[str, _Instruction] = {
    **_INSTRUCTIONS,
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _push),
    "EMPTY_SET": lambda machine, _: machine.push(PickledCall("builtins.set", ())),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.push(PickledCall("builtins.frozenset", (machine.pop_to_mark(),))),
    "NEWOBJ_EX": lambda machine, _: machine.call_with_keywords(),
}
"""The instructions for what Python writes beside tensors: bytes, sets, and classes made with keyword arguments."""
