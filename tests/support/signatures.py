"""Checks of the package's signatures at run time: each call's types and shapes, against its annotations.

These are the checks of jaxtyping's import hook, made of its scopes and of beartype. That hook makes two functions and a
signature each time that a nested function is defined, of which a model has a hundred in each trace, and binds the
arguments of every call: a tenth of the time of tests that run whole stages.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

from beartype.door import is_bearable
from jaxtyping import jaxtyped

NAME = "__checked__"
"""Name of the decorator in the modules that are checked."""


LEFT_OUT = frozenset({"ArrayTree", "Dataset", "Path", "nnx", "pa"})
"""Names in annotations that modules import for type checkers alone; the first is chex's, in optax's ``OptState``."""


class SignatureError(Exception):
    """An argument or a result is not as annotated. No code expects it, as some do a TypeError."""


class Signature(NamedTuple):
    """What the annotations of a function demand; parameters and results of any type are left out."""

    named: tuple[tuple[int, str, Any], ...]
    """Number of positional arguments before a parameter, its name and its type."""
    positional: int
    """Number of parameters before ``*args``."""
    more: Any
    """Type of each of ``*args``."""
    keywords: Any
    """Type of each of ``**kwargs``."""
    names: frozenset[str]
    """Names of all parameters."""
    result: Any


_signatures: dict[tuple[str, CodeType, str], Signature] = {}


def checked(target: Any) -> Any:
    """Return a function, or a dataclass, that raises SignatureError at arguments and results other than as annotated.

    Dimensions of one name are equal within a call. Defaults are not looked at, nor functions without annotations.
    """
    if inspect.isclass(target):
        if is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = checked(target.__init__)
        return target
    if not target.__annotations__:
        return target
    # A nested function is defined again and again: annotations of one place that read alike demand the same.
    key = target.__module__, target.__code__, repr(target.__annotations__)
    scope = jaxtyped("context")

    @wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if (signature := _signatures.get(key)) is None:
            # At the first call, when the module has defined all names.
            signature = _signatures[key] = _signature_of(target)
        with scope:
            for name, value, hint in _arguments(signature, args, kwargs):
                if not is_bearable(value, hint):
                    raise _error(target, f"the argument {name}", value, hint)
            result = target(*args, **kwargs)
            if signature.result is not Any and not is_bearable(result, signature.result):
                raise _error(target, "the result", result, signature.result)
        return result

    return call


def install(package: str) -> None:
    """Check the functions and dataclasses of all modules of a package that are imported from here on."""
    sys.meta_path.insert(0, _Finder(package))


def _signature_of(function: Callable[..., Any]) -> Signature:
    kind = inspect.Parameter
    parameters = inspect.signature(function).parameters
    hints = {name: _resolved(annotation, function) for name, annotation in function.__annotations__.items()}
    named = tuple(
        (sys.maxsize if parameter.kind is kind.KEYWORD_ONLY else place, name, hints[name])
        for place, (name, parameter) in enumerate(parameters.items())
        if parameter.kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD) and hints.get(name, Any) is not Any
    )
    rest = {parameter.kind: hints.get(name, Any) for name, parameter in parameters.items()}
    before = sum(p.kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) for p in parameters.values())
    more, keywords = rest.get(kind.VAR_POSITIONAL, Any), rest.get(kind.VAR_KEYWORD, Any)
    return Signature(named, before, more, keywords, frozenset(parameters), hints.get("return", Any))


def _resolved(annotation: Any, function: Any) -> Any:
    """Return an annotation without names in quotes; Any if it has one of ``LEFT_OUT`` that its module does not know."""
    stub = SimpleNamespace(__annotations__={"it": annotation})
    try:
        return get_type_hints(stub, function.__globals__, include_extras=True)["it"]
    except NameError as error:
        if error.name not in LEFT_OUT:
            raise
        return Any


def _arguments(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the value and the type of each argument that has a type."""
    for place, name, hint in signature.named:
        if place < len(args):
            yield name, args[place], hint
        elif name in kwargs:
            yield name, kwargs[name], hint
    if signature.more is not Any:
        yield from (("*", value, signature.more) for value in args[signature.positional :])
    if signature.keywords is not Any:
        others = kwargs.keys() - signature.names
        yield from ((name, kwargs[name], signature.keywords) for name in others)


def _error(function: Callable[..., Any], what: str, value: Any, hint: Any) -> SignatureError:
    text = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") and hasattr(value, "dtype") else repr(value)
    return SignatureError(f"{function.__module__}.{function.__qualname__}: {what} is {text[:500]}, not {hint}")


class _Decoration(ast.NodeTransformer):
    """Decorates functions first of all, when annotations are still theirs, and classes last, as dataclasses."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.append(ast.copy_location(ast.Name(NAME, ast.Load()), node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, ast.copy_location(ast.Name(NAME, ast.Load()), node))
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Not the compiled file that lies beside the source: that is without checks.
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        return super().source_to_code(_Decoration().visit(ast.parse(data)), path, _optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, NAME, checked)
        super().exec_module(module)


class _Finder:
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
