"""The house: what each file imports, what is public, what importing costs, and the rules that classes keep."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import modula_agd
from modula_agd import Loss, Module, Norm, Space
from modula_agd.majorisation import Search

PACKAGE = Path(modula_agd.__file__).parent

# A file imports from higher rows alone. `verify` and `train` are optional extras, which see everything above and
# themselves, but not each other; the command finds them by name when it is asked to.
ROWS = (
    ("error", "state"),
    ("device", "many", "rescale"),
    ("polar",),
    ("norm", "row_signal"),
    ("space", "kernel_norm"),
    ("bound", "torch_module"),
    ("summary",),
    ("run",),
    ("network",),
    ("module",),
    ("layer", "loss"),
    ("dropout", "wiring"),
    ("atom", "attention", "bond", "convolution", "normalisation", "pooling", "position"),
    (
        "averaging",
        "balance",
        "compound",
        "curvature",
        "decay",
        "directions",
        "forecast",
        "majorisation",
        "sensitivity",
        "shards",
    ),
    ("convnet", "exchange", "held_out", "inspection", "move", "step_average", "stretch", "transformer"),
    ("derivation", "distributed"),
    ("directed",),
    ("method",),
    ("placement",),
    ("accumulation", "agd", "explanation", "holder", "memory"),
    ("bridge", "grouped"),
    ("lending",),
    ("optimizer",),
    ("command_line",),
    ("verify", "train", "__main__"),
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
EXTRAS = ("verify", "train")
PACKAGES = (*EXTRAS, "bridge")
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The file's name in the table: its stem, or the extra that it belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Parts of this package that the file imports, anywhere in it, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            base = node.module or ""
            own = [f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            names = own if base == "modula_agd" else [base]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name.split(".")[1], node.lineno) for name in names if name.startswith("modula_agd.")]
    return found


def test_every_file_has_a_row_and_every_row_has_its_files() -> None:
    assert {part(path) for path in FILES} - {"__init__"} == set(ROW)


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=part)
def test_a_file_imports_from_higher_rows_alone(path: Path) -> None:
    here = part(path)
    for name, line in imports(path):
        where = f"{path.name}:{line} imports {name}"
        # a name that is no file is one that __init__ exports, which only the extras may take from there
        assert name in ROW or here in EXTRAS, f"{where}, which is not in the table"
        assert ROW.get(name, -1) < ROW[here] or (name == here and here in PACKAGES), f"{where}, which is not above it"


def test_the_extras_are_not_imported_by_the_package_itself() -> None:
    assert not {name for name, _ in imports(PACKAGE / "__init__.py")} & set(EXTRAS)


def test_the_public_names_are_an_explicit_list() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    exported = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name, f"line {node.lineno} exports {alias.name} without `as {alias.name}`"
                exported.append(alias.name)
        else:
            assert isinstance(node, ast.Expr | ast.Assign), f"line {node.lineno} does something on import"
    assert len(exported) == len(set(exported))
    public = {name for name in vars(modula_agd) if not name.startswith("_")}
    submodules = {name for name in public if inspect.ismodule(getattr(modula_agd, name))}
    assert public - submodules == set(exported) - submodules


def test_a_public_name_is_defined_where_it_is_exported_from() -> None:
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                value = getattr(modula_agd, alias.name)
                defined_in = getattr(value, "__module__", node.module)
                assert defined_in in (node.module, "builtins"), f"{alias.name} comes from {defined_in}"


PUBLIC_CLASSES = {name: value for name, value in vars(modula_agd).items() if inspect.isclass(value)}


@pytest.mark.parametrize("kind", [Module, Norm, Space, Loss])
def test_a_public_class_is_abstract_or_a_final_frozen_dataclass(kind: type) -> None:
    found = {name: value for name, value in PUBLIC_CLASSES.items() if issubclass(value, kind)}
    finals = {name: value for name, value in found.items() if not inspect.isabstract(value)}
    assert len(finals) >= 4
    for name, value in finals.items():
        assert dataclasses.is_dataclass(value), name
        assert value.__dataclass_params__.frozen, name  # pyright: ignore[reportAttributeAccessIssue]
        assert not value.__subclasses__(), f"{name} has subclasses"


@pytest.mark.parametrize("search", [modula_agd.ClosedForm, modula_agd.ExactGrowth, modula_agd.Certified])
def test_a_search_is_a_final_frozen_dataclass(search: type) -> None:
    assert issubclass(search, Search)
    assert search.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert not search.__subclasses__()


@pytest.mark.parametrize(
    "final", [value for value in PUBLIC_CLASSES.values() if issubclass(value, Module) and not inspect.isabstract(value)]
)
def test_a_final_module_refuses_subclasses(final: type) -> None:
    with pytest.raises(TypeError, match="final"):
        type("Heir", (final,), {})


def test_the_core_raises_its_own_errors_and_asserts_nothing() -> None:
    for path in FILES:
        if part(path) in EXTRAS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno} asserts"
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                raised = node.exc.func.id
                # a TypeError answers a subclass of a final class; no user of a module sees it
                assert raised in {*dir(modula_agd), "TypeError"}, f"{path.name}:{node.lineno} raises {raised}"


def test_every_public_name_has_a_docstring() -> None:
    for name, value in vars(modula_agd).items():
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            assert inspect.getdoc(value), name
            assert not (value.__doc__ or "").startswith(f"{name}("), f"{name} has the docstring that dataclass makes"


def test_importing_is_silent_and_brings_no_extra() -> None:
    code = (
        "import sys, torch, einops, jaxtyping\n"
        "before = set(sys.modules)\n"
        "import modula_agd\n"
        "extras = {'matplotlib', 'datasets', 'sklearn', 'hypothesis', 'tqdm', 'PIL', 'pandas', 'safetensors', 'numpy'}\n"
        "print(sorted(extras & (set(sys.modules) - before)))\n"
        "print(sorted(name for name in sys.modules if name.startswith(('modula_agd.verify', 'modula_agd.train'))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[]", "[]", ""]
    assert done.stderr == ""


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
