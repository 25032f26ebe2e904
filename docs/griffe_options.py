"""For mkdocstrings: what decorators of the package do to signatures, which griffe does not see.

`rat_ext.search.options.shows_options` gives a function or class with ``**options`` a signature that
lists them, and puts their help in place of ``{options}`` in its docstring; the same is done here
from the source of `SearchOptions`. `rat_ext.metrics.bootstrap.metric` gives a metric the arguments
of the bootstrap; here they are those of `rat_ext.metrics.summary`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import griffe


class ShownOptions(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != "rat_ext":
            return
        options = pkg["search.options.SearchOptions"].attributes
        for target, without in _decorated(pkg):
            # name: Annotated[type, Option(default, help, ...)]
            shown = {
                name: option.annotation.slice.elements
                for name, option in options.items()
                if name not in without
            }
            function = target if target.is_function else target.members["__init__"]
            listed = [
                griffe.Parameter(
                    name,
                    annotation=kind,
                    kind=griffe.ParameterKind.keyword_only,
                    default=option.arguments[0],
                )
                for name, (kind, option) in shown.items()
            ]
            own = [p for p in function.parameters if p.kind is not griffe.ParameterKind.var_keyword]
            function.parameters = griffe.Parameters(*own, *listed)
            if target.docstring:
                lines = [f"    {name}: {_help(option)}" for name, (_, option) in shown.items()]
                text = target.docstring.value
                target.docstring.value = text.replace("    {options}", "\n".join(lines))
        boot = list(pkg["metrics.ranking.summary"].parameters)[2:]
        modules = pkg["metrics"].modules.values()
        for metric in (each for module in modules for each in module.functions.values()):
            if any(
                getattr(decorator.value, "name", None) == "metric"
                for decorator in metric.decorators
            ):
                metric.parameters = griffe.Parameters(*metric.parameters, *boot)
                metric.returns = "float | Estimate"


def _decorated(module: griffe.Module) -> Iterator[tuple[Any, list[str]]]:
    """What in the package is decorated with ``shows_options``, and its argument ``without``."""
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_module:
            yield from _decorated(member)
        for decorator in getattr(member, "decorators", []):
            if decorator.callable_path.endswith(".shows_options"):
                arguments = getattr(decorator.value, "arguments", [])
                yield member, [name for each in arguments for name in _value(each.value)]


def _help(option: griffe.ExprCall) -> str:
    return _value(option.arguments[1])


def _value(expression: griffe.Expr | str) -> Any:
    return ast.literal_eval(str(expression))
