"""The borders of docs and design: who may import whom, read from the sources themselves."""

import ast
from functools import cache
from pathlib import Path

import crosslayer

ROOT = Path(crosslayer.__file__).parent
DOORS = {"crosslayer", "crosslayer.__main__"}
"""What imports everything and is imported by nobody inside."""

FLOORS = (
    {"cli"},
    {"verbs"},
    {"options", "eleuther_options"},
    {"mesh_table"},
    {"model_options", "mesh_options"},
    {"report"},
    {"demo"},
    {"hallucination"},
    {"scaling"},
    {"workflow", "planning"},
    {"distributed"},
    {"evaluation", "answering"},
    {"attribution", "formats.circuit_tracer_graph"},
    {"replacement"},
    {"training"},
    {"activations"},
    {"formats"},
    {"coders"},
    {"models"},
    {"data"},
    {"zoo"},
    {f"distributed.{name}" for name in ("crew", "joining", "meeting", "mesh", "results")},
    {"wiring", "metrics", "files", "mapped", "memory", "variants", "team", "errors", "drawing", "processes"},
)
"""From top to bottom: a module imports from its own floor and from those below. A file of a package that stands
elsewhere than the package is named for itself."""


def name_of(path: Path) -> str:
    parts = ("crosslayer", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def imports(name: str, *, top_only: bool = False) -> set[str]:
    """Modules that a module names in its imports: `from a import b` is `a.b` where that is a module of ours."""
    path = SOURCES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in SOURCES else source for a in node.names}
    return found


def ours(name: str) -> set[str]:
    return {module for module in imports(name) if module.split(".")[0] == "crosslayer"}


@cache
def reached(name: str) -> set[str]:
    """All our modules that come with one, however indirectly, but for the doors."""
    found, left = set(), [name]
    while left:
        new = ours(left.pop()) - found - DOORS
        found |= new
        left += new
    return found


def inside(*packages: str) -> list[str]:
    return [n for n in SOURCES if any(f"{n}.".startswith(f"crosslayer.{package}.") for package in packages)]


def room(name: str) -> str:
    path = name.removeprefix("crosslayer.")
    return path if any(path in rooms for rooms in FLOORS) else path.split(".")[0]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_module_stands_on_a_floor():
    rooms = {room(name) for name in SOURCES.keys() - DOORS}
    assert rooms == set().union(*FLOORS)


def test_nobody_inside_goes_out_through_a_door():
    assert {name for name in SOURCES if ours(name) & DOORS} <= {"crosslayer.__main__"}


def test_imports_run_downhill():
    pairs = [(name, module) for name in SOURCES.keys() - DOORS for module in ours(name)]
    assert len(pairs) > 100
    assert [(name, module) for name, module in pairs if floor(module) < floor(name)] == []


def test_there_are_no_cycles():
    assert [name for name in SOURCES.keys() - DOORS if name in reached(name)] == []


def test_coders_metrics_and_wiring_know_no_language_model():
    for name in inside("coders", "metrics", "wiring"):
        for module in {name, *reached(name)}:
            assert "transformers" not in {m.split(".")[0] for m in imports(module)}, f"{name} through {module}"
            assert not module.startswith("crosslayer.models"), f"{name} reaches {module}"


def test_the_record_of_a_graph_and_its_reading_know_no_model_and_no_coder():
    for name in (
        *("graph", "paths", "supernodes", "networks", "summary", "figure", "tally"),
        *("aggregate", "contrast", "aggregate_figure", "aggregate_summary"),
    ):
        name = f"crosslayer.attribution.{name}"
        for module in {name, *reached(name)}:
            assert "transformers" not in {m.split(".")[0] for m in imports(module)}, f"{name} through {module}"
            assert not module.startswith(("crosslayer.models", "crosslayer.coders")), f"{name} reaches {module}"


def test_models_know_no_coder():
    for name in inside("models"):
        assert not [m for m in reached(name) if m.startswith(("crosslayer.coders", "crosslayer.training"))], name


def test_training_sees_activations_and_never_a_language_model():
    for name in inside("training"):
        for module in {name, *reached(name)}:
            assert "transformers" not in {m.split(".")[0] for m in imports(module)}, f"{name} through {module}"
            assert not module.startswith(("crosslayer.models", "crosslayer.replacement")), f"{name} reaches {module}"


def test_only_the_replacement_and_what_stands_on_it_know_models_and_coders():
    both = {"verbs", "planning", "report", "demo", "workflow", "evaluation", "attribution", "replacement"}
    both |= {"hallucination"}
    for name in SOURCES.keys() - DOORS:
        packages = {module.split(".")[1] for module in ours(name)}
        assert not {"models", "coders"} <= packages or name.split(".")[1] in both, name


def test_the_zoo_needs_nothing_above_it():
    for name in inside("zoo"):
        assert not [m for m in ours(name) if floor(m) < floor("crosslayer.zoo")], name


def test_imports_stand_at_the_top_of_their_file():
    for name in SOURCES:
        assert imports(name) == imports(name, top_only=True), name


def test_tables_alone_import_what_reads_them():
    heavy = {"datasets", "pyarrow", "pandas"}
    assert [name for name in SOURCES if {m.split(".")[0] for m in imports(name)} & heavy] == []
    assert 'import_module("datasets")' in SOURCES["crosslayer.data.tables"].read_text()


def test_nothing_is_ever_unpickled():
    for name, path in SOURCES.items():
        assert not {m.split(".")[0] for m in imports(name)} & {"pickle", "dill", "cloudpickle", "joblib", "marshal"}, (
            name
        )
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr == "load" and ast.unparse(called.value) == "torch":
                safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                assert safe, f"{name}: torch.load without weights_only=True"
            if isinstance(called, ast.Attribute) and ast.unparse(called.value) in ("np", "numpy"):
                assert not any(k.arg == "allow_pickle" for k in node.keywords), name
