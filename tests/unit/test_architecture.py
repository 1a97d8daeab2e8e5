"""Which room may import which, checked in the source; `docs/architecture.md` draws the table that is written here.

Lazy imports count like the others: the table is about dependence, not about the time of loading.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distvsd"

# Every room may import FOR_ALL. A name with a dot is that module of a room only.
FOR_ALL = {"errors", "faults", "config"}
INNER: dict[str, set[str]] = {
    "errors": set(),
    "faults": set(),
    "config": set(),
    "vsd": set(),
    "parallel": set(),
    "runtime": set(),
    "cameras": {"vsd"},
    "render": {"cameras", "vsd"},
    "networks": {"vsd"},
    "particles": {"render", "cameras", "vsd"},
    "prior": {"networks", "vsd"},
    "score": {"networks", "parallel", "vsd"},
    "checkpoint": {"parallel"},
    "shapes": {"cameras", "networks", "prior", "vsd"},
    "stages": {"checkpoint", "particles", "runtime"},
    "plan": {"config", "networks", "parallel.assign", "particles", "score", "vsd"},
}
OUTER: dict[str, set[str]] = {
    "run": set(INNER) | {"looking"},
    "looking": {
        *("cameras", "checkpoint", "config", "networks", "particles", "prior", "render", "run", "runtime", "shapes"),
        "vsd",
    },
    "doctor": {"networks"},
    "commands": set(INNER) | {"doctor", "looking", "run"},
    "arguments": {"config"},
    "cli_prior": {"arguments", "commands"},
    "cli": {
        "arguments",
        "cli_prior",
        "commands",
        "config",
        "plan.published",
        "runtime.launcher",
        "runtime.preempt",
        "runtime.streams",
    },
    "train": {"cli"},
    "__main__": {"cli"},
    "__init__": {"config", "particles.base", "prior.base", "run", "score.base"},
    "testing": set(INNER) | {"run"},
}

# Third-party packages and the modules that may name them; a prefix stands for a whole room. torch: see NO_TORCH.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "torch.distributed": ("parallel", "score.strategies"),
    "accelerate": ("parallel.world",),
    "diffusers": ("networks", "prior", "shapes", "testing.pipelines"),
    "transformers": ("networks", "shapes", "testing.pipelines"),
    "tokenizers": ("shapes", "testing.pipelines"),
    "deepspeed": ("score.strategies",),
    "peft": ("score",),
    "gsplat": ("render",),
    "nerfacc": ("render",),
    "nvdiffrast": ("render",),
    "drtk": ("render",),
    "tinycudann": ("render.tcnn",),
    "triton": ("render.kernels",),
    "safetensors": ("checkpoint", "networks", "shapes", "testing.pipelines"),
    "wandb": ("runtime.wandb_process",),
    "yaml": ("config",),
    "PIL": ("looking",),
    "imageio": ("looking",),
    "imageio_ffmpeg": ("looking",),
    "xatlas": ("looking.atlas",),
}
NO_TORCH = ("config", "errors", "cli", "cli_prior", "arguments", "commands", "train", "__main__", "__init__")
# Files that are made of a heavy package and load it; they are imported where they are used, like the package.
MADE_OF = {"render.kernels": "triton"}
# Packages that are slow to import or may be missing. torch and small packages may be imported with a module.
LAZY = {
    "accelerate",
    "deepspeed",
    "diffusers",
    "transformers",
    "tokenizers",
    "peft",
    "gsplat",
    "nerfacc",
    "nvdiffrast",
    "drtk",
    "tinycudann",
    "triton",
    "PIL",
    "imageio",
    "imageio_ffmpeg",
    "wandb",
    "xatlas",
}


@dataclass(frozen=True)
class Import:
    """`module` imports `target`: dotted names, those of the package without `distvsd.`.

    lazy: not run when the module is loaded. own: of the package. for_checkers: only a type checker reads it.
    """

    module: str
    target: str
    line: int
    lazy: bool
    own: bool
    for_checkers: bool = False

    @property
    def place(self) -> str:
        return f"distvsd/{self.module.replace('.', '/')}:{self.line}"

    @property
    def room(self) -> str:
        return self.module.partition(".")[0]


def imports_of(path: Path) -> Iterator[Import]:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    module = module.removesuffix(".__init__")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for block in late_blocks(tree) for node in ast.walk(block)}
    checked = {id(node) for block in late_blocks(tree) if isinstance(block, ast.If) for node in ast.walk(block)}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [name.name for name in names]
            case ast.ImportFrom(module=str(source), names=names, level=0):
                found = [f"{source}.{name.name}" for name in names]
            case ast.ImportFrom():
                raise AssertionError(f"{path}:{node.lineno}: relative import; name the module in full")
            case _:
                continue
        for name in found:
            own = name.split(".")[0] == "distvsd"
            target = name.removeprefix("distvsd.")
            yield Import(module, target, node.lineno, id(node) in inside, own, id(node) in checked)


def late_blocks(tree: ast.AST) -> Iterator[ast.AST]:
    """Blocks that do not run when the module is loaded: functions, and what only a type checker reads."""
    for node in ast.walk(tree):
        for_checkers = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_checkers or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


ALL = [found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_of(path)]
THIRD = [found for found in ALL if not found.own and found.target.split(".")[0] not in sys.stdlib_module_names]


def within(name: str, prefixes: tuple[str, ...] | set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_every_room_is_in_the_table() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")}
    found |= {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert found == INNER.keys() | OUTER.keys()


def test_rooms_import_only_what_the_table_allows() -> None:
    allowed = INNER | OUTER
    wrong = [
        f"{found.place} imports {found.target}"
        for found in ALL
        if found.own
        and not within(found.target, {found.room, "distvsd", "__version__"} | FOR_ALL | allowed[found.room])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_itself_has_no_way_back() -> None:
    """Inner rooms: no cycle, so that each can be read and tested without those that use it."""
    done: set[str] = set()
    while waiting := [room for room in INNER if room not in done]:
        ready = [room for room in waiting if {name.partition(".")[0] for name in INNER[room]} <= done]
        assert ready, f"{waiting} import each other"
        done.update(ready)
    assert not {name.partition(".")[0] for names in INNER.values() for name in names} & OUTER.keys()


def test_no_files_import_each_other_in_a_circle() -> None:
    """Lazy imports count. Imports that only a type checker reads do not, because the file runs without them."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in modules}
    needs: dict[str, set[str]] = {name: set() for name in modules}
    for found in ALL:
        if found.own and not found.for_checkers:
            target = found.target
            while target not in modules and "." in target:
                target = target.rpartition(".")[0]
            needs[found.module.removesuffix(".__init__")] |= {target} & modules
    for name in modules:
        needs[name].discard(name)
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    # A package's own __init__ gathers names of its files, so a circle through it is a circle of those files.
    assert not needs, "\n".join(
        f"{name} <- {', '.join(sorted(others & needs.keys()))}" for name, others in needs.items()
    )


def test_the_kind_of_particle_is_asked_for_in_at_most_two_files() -> None:
    """Elsewhere the code uses the particle's members, so a new kind needs only a new file."""
    asking = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if path.parent.name != "config"
        and isinstance(node, ast.Attribute)
        and ast.unparse(node).endswith("particles.kind")
    }
    assert len(asking) <= 2, sorted(asking)


def test_what_every_room_may_import_imports_no_room() -> None:
    own = [found for found in ALL if found.own and within(found.module, FOR_ALL)]
    assert not [found.place for found in own if not within(found.target, FOR_ALL)]


def test_third_party_packages_stay_in_their_rooms() -> None:
    wrong = []
    for found in THIRD:
        package = found.target.split(".")[0]
        if within(found.target, {"torch.distributed"}):
            legal = within(found.module, THIRD_PARTY["torch.distributed"])
        elif package == "torch":
            legal = not within(found.room, NO_TORCH)
        else:
            legal = within(found.module, THIRD_PARTY.get(package, ()))
        if not legal:
            wrong.append(f"{found.place} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_process_groups_are_not_reached_through_the_torch_module_either() -> None:
    """`torch.distributed.x` needs no import of its own, once anything has imported it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "parallel"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{found.place} imports {found.target} with the module"
        for found in THIRD
        if found.target.split(".")[0] in LAZY
        and not found.lazy
        and not any(within(found.module, {room}) and within(found.target, {heavy}) for room, heavy in MADE_OF.items())
    ]
    assert not wrong, "\n".join(wrong)


def test_files_that_are_made_of_a_heavy_package_are_imported_where_they_are_used() -> None:
    loading = {found.module for found in THIRD if not found.lazy and found.target.split(".")[0] in MADE_OF.values()}
    assert loading and all(within(module, set(MADE_OF)) for module in loading)
    wrong = [
        f"{found.place} imports {found.target} with the module"
        for found in ALL
        if found.own and not found.lazy and within(found.target, loading)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["distvsd", "distvsd.config", "distvsd.cli"])
def test_importing_it_is_fast_because_it_loads_no_torch(module: str) -> None:
    heavy = sorted(LAZY | {"torch", "numpy", "safetensors"})
    program = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_those_of_the_package() -> None:
    import distvsd

    for name in distvsd.__all__:
        assert callable(getattr(distvsd, name))
    with pytest.raises(AttributeError, match="has no attribute 'trian'; it has Config"):
        _ = distvsd.trian  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["import distvsd", "import distvsd.run.train", "from distvsd.run.train import train"])
def test_train_can_be_called_although_a_module_has_its_name(first: str) -> None:
    """In any order of imports, and repeatedly. Loading a submodule replaces the same name in its package."""
    program = f"{first}\nimport distvsd, inspect\nfor _ in 'ab': print(*inspect.signature(distvsd.train).parameters)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == ["config resume custom"] * 2


def test_the_reader_sees_what_is_imported_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above are worth nothing if the reader misses imports."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "vsd").mkdir()
    source = tmp_path / "vsd" / "rng.py"
    source.write_text(
        "import os.path, torch.distributed as dist\n"
        "from distvsd import cameras\n"
        "def f():\n    from peft import LoraConfig\n"
        "if True:\n    from distvsd.score.lora import LoraScore\n"
        "if TYPE_CHECKING:\n    import PIL\n"
    )
    assert [(found.target, found.lazy, found.own) for found in sorted(imports_of(source), key=lambda f: f.line)] == [
        ("os.path", False, False),
        ("torch.distributed", False, False),
        ("cameras", False, True),
        ("peft.LoraConfig", True, False),
        ("score.lora.LoraScore", False, True),
        ("PIL", True, False),
    ]
    source.write_text("from . import other\n")
    with pytest.raises(AssertionError, match="relative import"):
        list(imports_of(source))
