"""Who may import whom: the table of docs/architecture.md, read from the syntax tree of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a package may import: `always` anywhere, `inside` only inside functions."""

    always: frozenset[str]
    inside: frozenset[str]


def row(always: str, inside: str) -> Row:
    return Row(always=frozenset(always.split()), inside=frozenset(inside.split()))


TABLE = {
    "sparse_core": row(
        "torch numpy", "numba triton scipy networkx safetensors transformers sentence_transformers"
    ),
    "sims": row("numpy mujoco gymnasium mink", "triton metaworld libero"),
    "dataengine": row(
        "sparse_core torch numpy pyarrow av cv2 safetensors tqdm", "gsplat ray scipy viser rerun triton numba"
    ),
    "enerverse": row(
        "dataengine sparse_core torch numpy diffusers accelerate safetensors av tqdm tyro",
        "transformers sentence_transformers ray viser rerun scipy networkx cv2",
    ),
}
# The programs put the parts together; everything else in enerverse gets an environment as an argument.
PROGRAMS = ("enerverse.cli", "enerverse.recipes")
ENVIRONMENTS = {"sims", "gymnasium"}
# A file named after a backend is the code for it, and is itself imported inside functions only.
BACKENDS = {
    "numba": {"numba", "llvmlite"},
    "simd": {"numba", "llvmlite"},
    "triton": {"triton"},
    "gsplat": {"gsplat"},
}
IMPLEMENTATIONS = {"reference", "numba", "triton", "gsplat"}
PRIMITIVES = tuple(f"sparse_core.{name}" for name in ("attention", "weights", "activations", "codes"))


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name: `module` asks for the dotted `target`, at a line, inside a function or not."""

    module: str
    target: str
    line: int
    inside: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def read_imports(source: str, module: str, package: str) -> list[Import]:
    """Return the imports of a module; what only a type checker sees is left out."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for target in targets(child):
                line = getattr(child, "lineno", 0)
                yield Import(module=module, target=target, line=line, inside=inside)
            if not is_typing_block(child):
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if not isinstance(node, ast.ImportFrom):
            return []
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]

    return list(walk(ast.parse(source), False))


def all_imports() -> list[Import]:
    found = []
    for package in TABLE:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = module_name(path)
            parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
            found += read_imports(path.read_text(encoding="utf-8"), module, parent)
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def table_problem(found: Import) -> str | None:
    package, root = found.module.split(".")[0], found.target.split(".")[0]
    if root == package or root in sys.stdlib_module_names:
        return None
    if root in ENVIRONMENTS and within(found.module, *PROGRAMS):
        return None
    allowed = TABLE[package].always | BACKENDS.get(found.module.rpartition(".")[2], set())
    if root in allowed or (found.inside and root in TABLE[package].inside):
        return None
    where = "inside functions only" if root in TABLE[package].inside else "never"
    return f"{found}; {package} may import {root} {where}"


def backend_problem(found: Import) -> str | None:
    """The file of a backend pulls the backend in: only functions and other such files import it."""
    own = found.target.split(".")[0] in TABLE
    named = next((part for part in found.target.split(".")[1:] if part in BACKENDS), None)
    if not own or named is None or found.inside or found.module.rpartition(".")[2] in BACKENDS:
        return None
    return f"{found}; import the {named} code inside the function that runs it"


def layer_problem(found: Import) -> str | None:
    """Inside sparse_core: kernels <- attention, weights, activations, codes <- methods, at any depth."""
    if within(found.module, "sparse_core.kernels") and within(
        found.target, *PRIMITIVES, "sparse_core.methods"
    ):
        return f"{found}; a kernel builds on no layer above it"
    if within(found.module, *PRIMITIVES) and within(found.target, "sparse_core.methods"):
        return f"{found}; a primitive never imports a method"
    return None


def method_problem(found: Import) -> str | None:
    """A method, sparse_core.methods.<family>.<name> and whatever files it has, never imports another one."""
    names = [name.split(".") for name in (found.module, found.target)]
    both = all(name[:2] == ["sparse_core", "methods"] and len(name) >= 4 for name in names)
    return (
        f"{found}; a method never imports another method" if both and names[0][:4] != names[1][:4] else None
    )


def sibling_problem(found: Import) -> str | None:
    """The implementations of one operation, files side by side, never import each other."""
    folder, _, name = found.module.rpartition(".")
    others = [f"{folder}.{other}" for other in IMPLEMENTATIONS - {name}] if name in IMPLEMENTATIONS else []
    return f"{found}; an implementation never imports its sibling" if within(found.target, *others) else None


RULES = [table_problem, backend_problem, layer_problem, method_problem, sibling_problem]


@pytest.mark.parametrize("rule", RULES)
def test_every_import_keeps_the_table(rule) -> None:
    problems = [problem for found in all_imports() if (problem := rule(found))]
    assert not problems, "\n".join(["see the table in docs/architecture.md", *problems])


@pytest.mark.parametrize(
    ("module", "source", "rule", "ending"),
    [
        ("sims.env", "import torch", table_problem, "sims may import torch never"),
        ("sims.env", "def f():\n import torch.nn", table_problem, "sims may import torch never"),
        (
            "sparse_core.codes.sdr",
            "import scipy",
            table_problem,
            "sparse_core may import scipy inside functions only",
        ),
        ("sparse_core.codes.sdr", "def f():\n import scipy.sparse", table_problem, None),
        ("sparse_core.kernels.spmm.numba", "import numba", table_problem, None),
        ("sparse_core.kernels.spmm", "import numba", table_problem, "numba inside functions only"),
        (
            "sparse_core.kernels.spmm",
            "from .numba import run",
            backend_problem,
            "inside the function that runs it",
        ),
        ("sparse_core.kernels.spmm", "def f():\n from . import triton", backend_problem, None),
        ("sparse_core.kernels.spmm.numba", "from sparse_core.kernels import simd", backend_problem, None),
        ("sparse_core.kernels.spmm.numba", "from . import reference", sibling_problem, "imports its sibling"),
        (
            "sparse_core.kernels.spmm",
            "from sparse_core.weights import masks",
            layer_problem,
            "no layer above it",
        ),
        (
            "sparse_core.weights.masks",
            "import sparse_core.methods.x.y",
            layer_problem,
            "never imports a method",
        ),
        (
            "sparse_core.methods.attention.hip",
            "def f():\n from sparse_core.methods.attention.sea import Sea",
            method_problem,
            "a method never imports another method",
        ),
        ("enerverse.train.loop", "def f():\n import sims", table_problem, "enerverse may import sims never"),
        ("enerverse.cli.record", "import sims", table_problem, None),
        ("dataengine.fit", "from enerverse.model import UNet", table_problem, "enerverse never"),
        ("dataengine.fit", "if TYPE_CHECKING:\n import enerverse", table_problem, None),
        (
            "dataengine.fit",
            "try:\n import ray\nexcept ImportError:\n ray = None",
            table_problem,
            "functions only",
        ),
    ],
)
def test_rules_see_what_they_forbid(module: str, source: str, rule, ending: str | None) -> None:
    # here `sparse_core.kernels.spmm` stands for the __init__ of its folder
    package = module if module.endswith("spmm") else module.rpartition(".")[0]
    problems = [problem for found in read_imports(source, module, package) if (problem := rule(found))]
    if ending is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert problems[0].endswith(ending)


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("sparse_core", "triton numba gsplat mujoco diffusers scipy networkx"),
        ("sims", "torch diffusers"),
        ("dataengine", "gsplat ray diffusers mujoco"),
        ("enerverse", "mujoco gsplat transformers"),
    ],
)
def test_import_stays_light(package: str, absent: str) -> None:
    code = f"import sys, {package}; print(*(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"`import {package}` pulls these in"
