"""Who may import whom: the wings of `rlhf/` one way, no circle, and no script from below."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = {"sft_train", "reward_train", "ppo_train", "compare_outputs"}
BELOW = {  # the wings that a wing may import from, itself aside
    "runs": set(),
    "data": {"runs"},
    "engine": {"runs", "data"},
    "ppo": {"runs", "data", "engine"},
    "reports": {"runs", "data", "engine"},
}
COMMANDS = {"rlhf.chat", "rlhf.export"}  # run as modules, on top of all wings
# A dry run of a later script plans with the defaults of the earlier ones, and asks for them when it
# does.
LATE = {("ppo_train", "reward_train"), ("ppo_train", "sft_train"), ("reward_train", "sft_train")}


def name_of(path):
    """`rlhf/data/rows.py` -> "rlhf.data.rows"; a package has its folder's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("rlhf/**/*.py"),
        *ROOT.glob("feedback/*.py"),
    ]
}


def imports_of(module):
    """The modules of this project that a module imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return {name for name in found if name in FILES}


IMPORTS = {module: imports_of(module) for module in FILES}


def wing_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "rlhf" and len(parts) > 2 else None


def test_every_module_of_the_package_stands_in_a_wing():
    loose = {name for name in FILES if name.startswith("rlhf.") and wing_of(name) is None}
    assert loose == COMMANDS | {f"rlhf.{wing}" for wing in BELOW}
    assert {wing_of(name) for name in FILES if wing_of(name)} == {*BELOW}


@pytest.mark.parametrize("wing", BELOW)
def test_a_wing_imports_only_from_those_below_it(wing):
    allowed = BELOW[wing] | {wing}
    for module in FILES:
        if wing_of(module) == wing:
            upward = {name for name in IMPORTS[module] if wing_of(name) not in allowed}
            assert upward <= {"rlhf"}, f"{module} imports {upward}"


def test_no_circle():
    edges = {
        module: {other for other in others if (module, other) not in LATE}
        for module, others in IMPORTS.items()
    }
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_a_circle_is_found():
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_nothing_but_an_earlier_script_is_imported_from_a_script():
    for module, others in IMPORTS.items():
        assert {(module, other) for other in others & SCRIPTS} <= LATE, module


@pytest.mark.parametrize("wing", BELOW)
def test_the_docstring_of_a_wing_is_its_map_and_all_there_is(wing):
    package = ast.parse((ROOT / "rlhf" / wing / "__init__.py").read_text(encoding="utf-8"))
    assert len(package.body) == 1
    said = ast.get_docstring(package)
    modules = [name.split(".")[-1] for name in FILES if wing_of(name) == wing]
    missing = [name for name in modules if f"`{name}`" not in said]
    assert modules and not missing


def test_every_module_says_what_it_is():
    for name, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_imports_rlhf_before_any_library(script):
    """`rlhf` sets up libraries that read their settings when they are imported."""
    tree = ast.parse(FILES[script].read_text(encoding="utf-8"))
    roots = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            roots += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            roots.append(node.module)
    outside = [name for name in roots if name.split(".")[0] not in sys.stdlib_module_names]
    assert outside[0] == "rlhf"
