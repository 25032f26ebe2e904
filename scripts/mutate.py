"""Changes the code in one small place after the other, and asks whether the tests notice.

    python scripts/mutate.py metrics --count 40             # 40 mutants of rat_ext/metrics/
    python scripts/mutate.py rule --count 20 --seed 1       # of the C++ rule: each is built anew
    python scripts/mutate.py rule --only plan.h:118         # those of one line

A mutant that makes a test fail is killed. One that survives shows a line that no test holds to what
it says, or a change that changes nothing: its diff is printed, to be judged. All happens in a copy
of the sources, which needs a built core in rat_ext/ to start with; the tests that run are the
fastest ones that are about the file (`TARGETS`).
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

RADIUS = ["tests/radius", "--ignore-glob=*/test_shards*"]
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "search": (
        ["rat_ext/search/bracket_search.py", "rat_ext/search/result.py"],
        [
            "tests/search",
            "tests/radius/test_radius.py",
            "tests/attacks/test_several.py",
            "tests/attacks/test_rays.py",
        ],
    ),
    "options": (
        ["rat_ext/search/options.py", "rat_ext/search/attack.py"],
        [*RADIUS, *(f"tests/attacks/test_{name}.py" for name in ("attack_options", "borrowed"))],
    ),
    "radius": (
        ["rat_ext/radius/robust_radius.py"],
        [*RADIUS, *(f"tests/attacks/test_{name}.py" for name in ("every_attack", "several"))],
    ),
    "reference": (
        ["rat_ext/reference.py"],
        [*RADIUS, "tests/attacks/test_pgd.py", "tests/training/test_loss.py"],
    ),
    "attacks": (
        [f"rat_ext/attacks/{name}.py" for name in ("rays", "pgd", "borrowed")],
        ["tests/attacks"],
    ),
    "shards": (
        ["rat_ext/radius/shard_run.py", "rat_ext/radius/shard_files.py"],
        ["tests/radius", "-k", "shards and not memory and not worker_does_not"],
    ),
    "metrics": (
        [f"rat_ext/metrics/{name}.py" for name in ("ranking", "levels", "calibration")],
        ["tests/test_metrics.py", "-k", "not classes and not importing and not as_often"],
    ),
    "threshold": (
        ["rat_ext/detector/threshold.py"],
        [
            f"tests/detector/test_{name}.py"
            for name in ("threshold", "anticipated_threshold", "detector")
        ],
    ),
    "loss": (
        ["rat_ext/training/loss.py"],
        ["tests/training/test_loss.py", "tests/training/test_loss_edges.py"],
    ),
    "rule": (
        [f"csrc/rule/{name}.h" for name in ("plan", "search", "estimate", "row_ops")],
        ["tests/core", "tests/search", "tests/radius/test_radius.py"],
    ),
}
"""By name: the files to change, and what pytest is given."""


@dataclass(frozen=True)
class Mutant:
    path: str
    begin: int
    """Where in the file, in bytes."""
    old: bytes
    new: bytes

    def line(self, source: bytes) -> int:
        return source[: self.begin].count(b"\n") + 1

    def applied(self, source: bytes) -> bytes:
        return source[: self.begin] + self.new + source[self.begin + len(self.old) :]


# --- Mutants of Python ----------------------------------------------------------------------------

FLIPS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"min": "max", "amin": "amax", "argmin": "argmax", "clamp_min": "clamp_max"}
NAMES |= {"clamp_min_": "clamp_max_", "minimum": "maximum", "ceil": "floor", "any": "all"}
NAMES |= {value: key for key, value in NAMES.items()}
MODULES = {"torch", "np", "math", "F", "core", "nn", "dist", "warnings"}


def python_mutants(path: str, source: bytes) -> Iterator[Mutant]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in code(ast.parse(source)):
        for old, new in changes(node):
            begin = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            text = ast.unparse(new)
            if isinstance(old, ast.expr) and not isinstance(new, ast.Constant | ast.Name):
                text = f"({text})"
            yield Mutant(path, begin, source[begin:end], text.encode())


def code(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """What is run: no types, decorators, or parts of formatted strings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases") or (
            name == "test" and isinstance(value, ast.Name) and value.id == "TYPE_CHECKING"
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                yield child
            yield from code(child)


def changes(node: ast.expr | ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST]]:
    """The node, or its condition, each with something that could stand in its place."""
    for new in others(node):
        yield node, new
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(
        node.test, ast.Compare | ast.BoolOp | ast.UnaryOp
    ):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)


def others(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """What could stand in this node's place."""

    def but(**fields: object) -> ast.AST:
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.Compare):
        for i, each in enumerate(node.ops):
            for flip in FLIPS[type(each)]:
                yield but(ops=[*node.ops[:i], flip(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield but(op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield but(op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in NAMES:
            yield but(func=ast.Attribute(node.func.value, NAMES[node.func.attr]))
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id in MODULES):
            yield node.func.value  # without the call
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield but(func=ast.Name(NAMES[node.func.id]))
    elif isinstance(node, ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


# --- Mutants of C++ -------------------------------------------------------------------------------

RULES = [
    (r" < ", " <= "),
    (r" < ", " > "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" > ", " < "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " / "),
    (r" / ", " * "),
    (r"&&", "||"),
    (r"\|\|", "&&"),
    (r"!(?=[a-z(])", ""),
    (r"\bT\(0\)", "T(1)"),
    (r"\bT\(1\)", "T(2)"),
    (r"\bT\(2\)", "T(1)"),
    (r"(?<== )(\d+);", r"\1 + 1;"),
    (r"(?<== )([\d.]+);", r"\1 - 1;"),
    (r"(?<== )([\d.]+);", r"\1 * 1.5;"),
    (r"\+= ", "-= "),
    (r"\blarger\((?=row|a|before)", "smaller("),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"\bMin\{\}", "Add{}"),
    (r"std::isfinite\((?=c\)|ratio)", "!std::isfinite("),
    (r"^ +(place|split|expand|narrow_bracket|planner\(\)\.\w+)\(.*\);$", ";"),
    (r"(?<=: )std::log\(b\) - std::log\(a\)", "std::log(b)"),
]
SMALLER = b"template <typename T>\nRAT_HD T smaller(T a, T b) {\n  return a < b ? a : b;\n}\n"


def cpp_mutants(path: str, source: bytes) -> Iterator[Mutant]:
    begin = 0
    for line in source.splitlines(keepends=True):
        text = line.split(b"//")[0].decode()
        if not text.startswith(("#", "template", "namespace")):
            for pattern, new in RULES:
                for match in re.finditer(pattern, text):
                    old = match[0]
                    yield Mutant(
                        path,
                        begin + len(text[: match.start()].encode()),
                        old.encode(),
                        match.expand(new).encode(),
                    )
        begin += len(line)


# --- Running them ---------------------------------------------------------------------------------


def preload() -> None:
    """Import once, before the forks, what takes long to import and is not mutated."""
    import hypothesis
    import pytest  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401
    from scipy import special  # noqa: F401
    from sklearn import metrics  # noqa: F401

    torch.set_num_threads(1)
    # A failure needs no smallest example, and every mutant is to see the same ones.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")


def passes(tree: Path, arguments: Sequence[str], seconds: float | None) -> tuple[bool, float]:
    """Whether the tests pass, and the CPU seconds that they took. At the limit they fail."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        if seconds is not None:
            limit = int(seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        import pytest

        fast = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-W", "ignore:Module already"]
        os._exit(int(pytest.main([*fast, *arguments])))
    status = os.waitpid(pid, 0)[1]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return status == 0, sum(after[:2]) - sum(before[:2])


def build(tree: Path) -> bool:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "RAT_EXT_CUDA": "0"},
        capture_output=True,
    )
    return done.returncode == 0


def diff(mutant: Mutant, source: bytes) -> str:
    lines = [text.decode().splitlines() for text in (source, mutant.applied(source))]
    changed = difflib.unified_diff(*lines, mutant.path, mutant.path, n=0, lineterm="")
    return "\n".join("    " + line for line in list(changed)[2:])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=int, default=20, help="how many of all mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--only", nargs="+", metavar="FILE:LINE", help="all those of these lines")
    options = parser.parse_args(arguments)
    paths, tests = TARGETS[options.target]
    sources = {path: (ROOT / path).read_bytes() for path in paths}
    mutants = []
    for path, source in sources.items():
        kind = python_mutants if path.endswith(".py") else cpp_mutants
        mutants += [each for each in kind(path, source) if each.applied(source) != source]
    of = len(mutants)
    if options.only:
        places = [f"{each.path}:{each.line(sources[each.path])}" for each in mutants]
        mutants = [
            each
            for each, place in zip(mutants, places, strict=True)
            if place.endswith(tuple(options.only))
        ]
    else:
        mutants = random.Random(options.seed).sample(mutants, min(options.count, of))

    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # one of the same second and size would be kept
    sys.dont_write_bytecode = True
    preload()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        leave = shutil.ignore_patterns(".*", "__pycache__", "build", "docs", "results")
        shutil.copytree(ROOT, tree, ignore=leave)
        fine, usual = passes(tree, tests, None)
        if not fine:
            sys.exit("the tests fail without a mutant, too")
        print(f"{of} mutants; the tests take {usual:.0f} s", flush=True)
        killed = 0
        for mutant in mutants:
            source = sources[mutant.path]
            changed = mutant.applied(source)
            if mutant.new == b"smaller(":
                head = changed.index(b"template")
                changed = changed[:head] + SMALLER + changed[head:]
            (tree / mutant.path).write_bytes(changed)
            compiled = mutant.path.endswith(".py") or build(tree)
            survived = compiled and passes(tree, tests, 3 * usual + 10)[0]
            killed += not survived
            word = "SURVIVED" if survived else "killed" if compiled else "does not compile"
            print(
                f"{word}: {mutant.path}:{mutant.line(source)}\n{diff(mutant, source)}", flush=True
            )
            (tree / mutant.path).write_bytes(source)
    print(f"{options.target}: {len(mutants)} mutants, {killed} killed, {len(mutants) - killed} not")


if __name__ == "__main__":
    main()
