"""The environment that chat templates run in: Jinja's immutable sandbox, and a question to template_limits.py at each step.

The sandbox alone stops attribute tricks, not a loop without end or a text of terabytes. Every way to do something goes
through one of the hooks here: loop turns and `~` by the code generator, operators, calls, filters, tests and outputs.
Longer than most files, so that all the hooks can be checked against one another.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from markupsafe import Markup

from engine.text import template_limits as limits

__all__ = ["GuardedEnvironment", "TemplateNamespace"]

# Nobody's chat template uses these, and what they do with a hostile text cannot be bounded by its size.
LEFT_OUT_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
LEFT_OUT_GLOBALS = ("lipsum",)

# Filters that do not look into the items of what they get, so that its whole size need not be counted.
SHALLOW = frozenset({
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr",
    "reverse", "select", "selectattr", "slice", "tojson",
})
EAGER = frozenset({"join", "list", "sort", "sum", "unique", "groupby", "min", "max", "last"})      # run through a generator
COMPARISONS = {
    "eq": " == ", "ne": " != ", "gt": " > ", "gteq": " >= ", "lt": " < ", "lteq": " <= ", "in": " in ", "notin": " not in ",
}
NUMBER_ATTRIBUTES = frozenset({"bit_length", "imag", "is_integer", "real"})


class _Generator(CodeGenerator):
    """Jinja's compiler, with the hooks that its environment has no method for."""

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        if frame.loop_frame:
            self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:      # noqa: N802 -- Jinja's naming
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:    # noqa: N802
        self.write("(")
        self._comparable(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:    # noqa: N802
        self.write(COMPARISONS[node.op])
        self._comparable(node.expr, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:          # noqa: N802
        self.write("{")
        for pair in node.items:
            self._comparable(pair.key, frame)
            self.write(": ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("}")

    def _comparable(self, node: nodes.Expr, frame: Frame) -> None:
        if isinstance(node, nodes.Const):
            self.visit(node, frame)
            return
        self.write("environment.comparable(")
        self.visit(node, frame)
        self.write(")")


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """Set up like any Jinja environment; renders inside a limits.Budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%", "//"})

    def __init__(self, **options: Any) -> None:
        # Nothing is worked out while compiling, where no budget runs; a finalize with a context is never folded either.
        super().__init__(**options, optimized=False, finalize=_written)
        for name in LEFT_OUT_FILTERS:
            del self.filters[name]
        for name in LEFT_OUT_GLOBALS:
            del self.globals[name]
        self.filters.update({name: _guarded(name, filter_) for name, filter_ in self.filters.items()})
        self.tests.update({name: _comparing(cast(Any, test)) for name, test in self.tests.items()})
        self.tests |= {"divisibleby": _divisible, "odd": _odd, "even": _even}

    tick = staticmethod(limits.tick)

    def add_filter(self, name: str, filter_: Callable[..., Any]) -> None:
        self.filters[name] = _guarded(name, filter_)

    @staticmethod
    def comparable(value: Any) -> Any:
        """`value`, if comparing or hashing it ends soon: lists that share items can be small and yet take for ever."""
        if isinstance(value, list | tuple | dict):
            limits.measure(value)
        return value

    @staticmethod
    def concatenate(parts: tuple[Any, ...]) -> str:
        limits.tick()
        limits.fit(sum(limits.measure(part) for part in parts))
        return "".join(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits.check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.comparable(argument))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float):
            return attr in NUMBER_ATTRIBUTES
        if isinstance(obj, bytes):
            return attr == "decode"
        if isinstance(obj, str) and attr in ("translate", "maketrans", "encode"):       # some codecs take quadratic time
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:      # noqa: N805
        limits.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):
            args = _method_arguments(owner, getattr(__obj, "__name__", ""), args, kwargs)
        else:                                              # dict(), namespace(), raise_exception() and the like
            for value in (*args, *kwargs.values()):
                __self.comparable(value)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        text = getattr(value, "__self__", None)
        if not isinstance(text, str) or getattr(value, "__name__", "") not in ("format", "format_map"):
            return None
        if isinstance(text, Markup):
            raise SecurityError("format of a text that is marked safe is not supported")

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            return _Formatter(self).vformat(text, args, kwargs)

        return formatted


class TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` of a template; names with an underscore cannot be stored."""

    def __init__(*args: Any, **kwargs: Any) -> None:           # so that `namespace(self=...)` works
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:             # one that holds another twice, and so on, would write for ever
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    """str.format, with widths and the whole length bounded."""

    def __init__(self, environment: GuardedEnvironment) -> None:
        super().__init__(environment)
        self._size = 0

    def convert_field(self, value: Any, conversion: Any) -> Any:
        limits.measure(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        limits.tick()
        limits.check_spec(format_spec)
        text = super().format_field(value, format_spec)
        self._size += len(text)
        limits.fit(self._size)
        return text


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name!r} cannot be stored in a namespace: names must not begin with an underscore")


@jinja2.pass_context
def _written(_: Context, value: Any) -> Any:
    """Jinja calls this with all that is written."""
    limits.tick()
    limits.charge(len(value) if type(value) is str else limits.measure(value))
    return value


def _guarded(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    check, shallow, eager = limits.FILTER_CHECKS.get(name), name in SHALLOW, name in EAGER
    skipped = 1 if hasattr(filter_, "jinja_pass_arg") else 0   # the context, or the like, comes first
    bind = _binder(filter_)

    @wraps(filter_)                        # keeps the mark that says what it wants first
    def guarded(*args: Any, **kwargs: Any) -> Any:
        limits.tick()
        head, values = args[:skipped], list(args[skipped:])
        if eager and values and not isinstance(values[0], str | Mapping):
            values[0] = limits.bounded_list(values[0])
        if not shallow:
            for value in (*values, *kwargs.values()):
                limits.measure(value)
        if check is not None:
            bound, rest = bind(values, kwargs)
            check(*bound, **rest)
        return filter_(*head, *values, **kwargs)

    return guarded


def _binder(filter_: Callable[..., Any]) -> Callable[[list[Any], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function that puts a filter's arguments in the order of its signature, whether they were named or not."""
    plain = inspect.unwrap(filter_)        # Jinja wraps some so that they take a context that their signature lacks
    signature = inspect.signature(plain)
    context: tuple[Any, ...] = (None,) if hasattr(plain, "jinja_pass_arg") else ()

    def bind(values: list[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature.bind(*context, *values, **kwargs)
        bound.apply_defaults()
        return bound.args[len(context) :], bound.kwargs

    return bind


def _comparing(test: Callable[..., Any]) -> Callable[..., bool]:
    @wraps(test)
    def guarded(*args: Any) -> bool:
        limits.tick()
        for value in args:
            GuardedEnvironment.comparable(value)
        return bool(test(*args))

    return guarded


def _divisible(value: Any, number: Any) -> bool:
    limits.check_operands("%", value, number)
    return bool(value % number == 0)


def _method_arguments(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments for `owner.name(...)`, checked; a generator that is to be joined is run under the clock."""
    if name == "join" and len(args) == 1 and not isinstance(args[0], str):
        args = (limits.bounded_list(args[0]),)
    for value in args:
        limits.measure(value)
    if isinstance(owner, list | tuple):    # index and count compare
        limits.measure(owner)
    elif isinstance(owner, str) and name in limits.METHOD_CHECKS:
        limits.METHOD_CHECKS[name](owner, *args, **kwargs)
    return args


def _odd(value: Any) -> bool:
    return not _even(value)


def _even(value: Any) -> bool:
    if not isinstance(value, int | float):                 # `%` of a text is its formatting, and as large as it says
        raise SecurityError("odd and even are of numbers")
    return value % 2 == 0
