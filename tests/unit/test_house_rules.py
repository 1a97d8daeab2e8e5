"""House rules that a reviewer would otherwise have to remember, checked in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "distvsd").rglob("*.py"))
TEXT = {".py", ".md", ".yaml", ".toml", ".sh", ".txt"}
FOLDERS = ("distvsd", "tests", "configs", "docs", "launch", "benchmarks")

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
# Draws from torch's global state depend on everything drawn before.
GLOBAL_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "rand_like", "randn_like"}
# Modules that turn bytes into objects, and so can run code.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...], *skip: str) -> Iterator[tuple[str, ast.AST]]:
    """(place, node) of every node of a kind in the package, without the files that end with one of `skip`."""
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name.endswith(skip):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield f"{name}:{getattr(node, 'lineno', 0)}", node


def refuse(places: list[str]) -> None:
    assert not places, "\n".join(places)


def test_sources_are_ascii() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in TEXT]
    assert len(files) > 100
    refuse([str(path.relative_to(ROOT)) for path in files if path.is_file() and not path.read_bytes().isascii()])


def test_no_file_is_too_long_to_be_read_in_one_go() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    refuse([f"{path.relative_to(ROOT)} has {n} lines" for path, n in lengths.items() if n > MAX_FILE_LINES])


def test_no_function_is_longer_than_a_screen() -> None:
    found = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    lengths = [(place, node.name, node.end_lineno - node.lineno + 1) for place, node in found]  # type: ignore[attr-defined]
    refuse([f"{place} {name} has {length} lines" for place, name, length in lengths if length > MAX_FUNCTION_LINES])


def test_no_class_is_made_with_more_than_six_positional_arguments() -> None:
    """With more, two swapped arguments of one type are easily missed, and the type checker accepts them."""
    classes = {node.name for _, node in nodes(ast.ClassDef)}  # type: ignore[attr-defined]
    wrong = []
    for place, node in nodes(ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]  # type: ignore[attr-defined]
        if name in classes and len(node.args) > 6:  # type: ignore[attr-defined]
            wrong.append(f"{place} {name}")
    refuse(wrong)


def test_the_kind_of_particle_is_asked_for_where_particles_are_made_and_nowhere_else() -> None:
    """Everywhere else the code uses a particle's own members."""
    wrong = [
        place for place, node in nodes(ast.Attribute, "run/parts.py") if ast.unparse(node).endswith("particles.kind")
    ]
    refuse([place for place in wrong if not place.startswith("distvsd/config/")])


def test_no_file_is_a_drawer_for_everything() -> None:
    refuse([str(path) for path in SOURCES if re.fullmatch(r"(.*_)?(utils?|helpers?|common|misc)", path.stem)])


def test_errors_are_caught_by_name() -> None:
    refuse([place for place, node in nodes(ast.ExceptHandler) if node.type is None])  # type: ignore[attr-defined]


def test_what_is_asserted_says_what_was_expected() -> None:
    refuse([place for place, node in nodes(ast.Assert) if node.msg is None])  # type: ignore[attr-defined]


@pytest.mark.guarantee("G32")
def test_nothing_that_is_read_can_run_code() -> None:
    """No pickle, no torch.load, no unsafe YAML, no eval anywhere in the package."""
    wrong = []
    for place, node in nodes((ast.Import, ast.ImportFrom)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]  # type: ignore[attr-defined]
        wrong += [f"{place} {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
    calls = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "eval", "exec"}
    wrong += [place for place, node in nodes(ast.Call) if ast.unparse(node.func) in calls]  # type: ignore[attr-defined]
    # Exempt: there multiprocessing sends objects between a test's own processes.
    refuse([place for place in wrong if not place.startswith("distvsd/testing/ranks.py")])


def test_only_the_keyed_streams_seed_anything() -> None:
    seeds = {"manual_seed", "manual_seed_all", "set_seed", "seed_all", "initial_seed"}
    refuse([place for place, node in nodes(ast.Attribute, "vsd/rng.py") if node.attr in seeds])  # type: ignore[attr-defined]


def test_nothing_is_drawn_from_global_random_state() -> None:
    wrong = []
    for place, node in nodes(ast.Call, "vsd/rng.py"):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name), keywords=keywords):
                if name in GLOBAL_DRAWS and not any(keyword.arg == "generator" for keyword in keywords):
                    wrong.append(f"{place} torch.{name} without a generator")
            case ast.Call(func=ast.Attribute(attr="uniform_" | "normal_" | "bernoulli_" | "random_" as name)):
                wrong.append(f"{place} {name}")
    imports = [(place, ast.unparse(node)) for place, node in nodes((ast.Import, ast.ImportFrom))]
    wrong += [place for place, text in imports if re.search(r"\b(import|from) (random|secrets)\b|numpy.random", text)]
    refuse(wrong)


def test_annotations_cost_nothing_when_a_module_loads() -> None:
    """Every file with a function or a class has `from __future__ import annotations`."""
    wrong = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
        futures = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
        if defines and not futures:
            wrong.append(str(path.relative_to(ROOT)))
    refuse(wrong)


def test_nothing_is_left_for_later() -> None:
    """No notes for later, and no NotImplementedError."""
    note = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
    lines = [(path, n, line) for path in SOURCES for n, line in enumerate(path.read_text().splitlines(), 1)]
    wrong = [f"{path.relative_to(ROOT)}:{n}" for path, n, line in lines if note.search(line)]
    wrong += [place for place, node in nodes(ast.Raise) if "NotImplementedError" in ast.unparse(node)]
    refuse(wrong)


def test_every_module_says_what_it_is() -> None:
    refuse([str(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))])
