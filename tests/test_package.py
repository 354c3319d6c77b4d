"""The shape of the package: names, imports, and that README and examples run."""

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from sharded import equal, outputs, plain_model, train, whole_ema

import ema_optim

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torchao",
    "triton",
    "safetensors",
    "transformers",
    "lightning",
    "accelerate",
    "sklearn",
    "matplotlib",
)
README = (ROOT / "README.md").read_text()


def test_every_public_name_is_there_and_documented():
    for name in ema_optim.__all__:
        assert getattr(ema_optim, name).__doc__
    assert sorted(ema_optim.__all__) == ema_optim.__all__


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def heavy_after(statement):
    code = f"import sys; {statement}; print([n for n in {HEAVY} if n in sys.modules])"
    return run(code).stdout.strip()


def test_import_needs_torch_and_nothing_heavier():
    assert heavy_after("import ema_optim") == "[]"


def test_the_import_check_can_fail():
    assert heavy_after("import sklearn") == "['sklearn']"


def test_schedules_import_only_mathematics():
    tree = ast.parse((ROOT / "ema_optim" / "schedules.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names <= {"math", "collections.abc", "functools"}


# From the floor to the roof; a room may skip others. What is in none of them is a door.
FLOORS = [
    {"schedules", "_warnings", "_version", "_forwarding"},
    {"_arithmetic"},
    {"_engines"},
    {"_shadow"},
    {"_checkpoint", "_door"},
    {"optimizer", "model", "snapshots"},
    {"integrations", "_tools", "__init__"},
    {"__main__"},
]
LAZY = {("__init__", "integrations"), ("__init__", "_tools")}  # lazy names alone point upwards


def room_of(name):
    """The floor of a module of the package, by its first part."""
    return next(floor for floor, rooms in enumerate(FLOORS) if name in rooms)


def imports_of(path):
    """The first part of every module of the package that a file imports, also inside functions."""
    folder = path.relative_to(ROOT / "ema_optim").parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ([above[0]] if above else [name.split(".")[0] for name in names])


MODULES = sorted((ROOT / "ema_optim").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    name = path.relative_to(ROOT / "ema_optim").with_suffix("").parts[0]
    for other in imports_of(path):
        allowed = other == name or room_of(other) < room_of(name) or (name, other) in LAZY
        assert allowed, f"{path} imports {other}"


def assigned(path):
    """What is assigned to in a file, as it is written there."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            for target in targets:
                yield from map(ast.unparse, getattr(target, "elts", [target]))


# One object owns the state of an average: whoever else wrote to it would have to know all of it.
def test_nobody_outside_its_room_assigns_attributes_of_the_shadow_set():
    others = [path for path in MODULES if "_shadow" not in path.parts]
    writes = [(path.name, target) for path in others for target in assigned(path)]
    assert [w for w in writes if re.search(r"(\b_ema|\bshadow|\bslot)\.", w[1])] == []


def test_every_room_says_what_is_in_it():
    for room in (path for path in MODULES if path.name == "__init__.py"):
        assert ast.get_docstring(ast.parse(room.read_text())), room


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        self.extra = torch.nn.BatchNorm1d(4)

    def forward(self, batch):
        return self.head(self.extra(self.body(batch)))


def loop_names():
    def loss(model, batch):
        return model(batch).square().mean()

    def train_step(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss(model, batch).backward()
        optimizer.step()

    return {
        "model": Model(),
        "loader": [torch.randn(8, 4) for _ in range(3)],
        "loss": loss,
        "train_step": train_step,
        "evaluate": lambda model: model(torch.randn(8, 4)),
    }


def trainer_names():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    row = torch.arange(8)
    settings = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    model = transformers.LlamaForCausalLM(config)
    return {
        "Trainer": transformers.Trainer,
        "args": transformers.TrainingArguments("out", save_strategy="no", **settings),
        "model": model,
        "dataset": [{"input_ids": row, "labels": row}] * 8,
        "dataloader": [{"input_ids": row[None], "labels": row[None]}] * 3,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "evaluate": lambda model, data: model(**data[0]).loss.item(),
        "eval_dataset": [{"input_ids": row[None], "labels": row[None]}],
    }


def blocks_of(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
GUIDES = [page for page in PAGES if blocks_of(page)]
FIGURES = [*PAGES, ROOT / "tests" / "benchmarks" / "README.md"]


def is_for_ranks(block):
    return any(word in block for word in ("fully_shard", "dcp.", "full_tensor", "**rest"))


def is_for_engines(block):
    """Whether the tests of DeepSpeed run it."""
    return "EMAEngine" in block


def layered_model():
    model = plain_model()
    model.layers = [model[0], model[1]]
    return model


@on_ranks(2)
def test_guide_code_for_several_ranks_runs(world, tmp_path):
    os.chdir(tmp_path)
    names = {"Trainer": dict, "EMACallback": dict, "rest": {}}
    names |= {"model": layered_model(), "evaluate": outputs, "torch": torch}
    names["train"] = lambda model, optimizer: train(model, optimizer, range(3))
    for block in filter(is_for_ranks, blocks_of(ROOT / "examples" / "several_devices.md")):
        exec(compile(block, "several_devices.md", "exec"), names)
    expected = whole_ema(names["optimizer"], names["model"])
    torch.distributed.barrier()
    assert equal(torch.load("ema.pt"), expected)


def names_for(block, page, loop, trainer):
    """What a block of a page stands on: a loop's names, or, from the import on, a trainer's."""
    if page.name == "GUIDE.ru.md" or "EMACallback" in block or "TrainingArguments" in block:
        trainer.update({} if trainer else trainer_names())
        return trainer
    return loop


@pytest.mark.filterwarnings("ignore:the EMA (still holds|will still hold)")  # a short run
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # the Trainer's default
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")  # Lightning on its default logger
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_code_of_the_guides_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop, trainer = loop_names(), {}
    for block in blocks_of(page):
        if not is_for_ranks(block) and not is_for_engines(block):
            exec(compile(block, page.name, "exec"), names_for(block, page, loop, trainer))


EXAMPLES = {
    f"{path.stem}:{test.name}": test
    for path in MODULES
    if ">>>" in path.read_text()
    for test in doctest.DocTestFinder(exclude_empty=True).find(
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    )
    if test.examples and test.filename == str(path)
}


@pytest.mark.filterwarnings("ignore:the EMA (still holds|will still hold)")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name):
    names = vars(ema_optim) | loop_names() | {"torch": torch}
    for example in EXAMPLES[name].examples:
        exec(compile(example.source, name, "exec"), names)


def test_the_guides_are_more_than_a_few_blocks():
    assert sum(len(blocks_of(page)) for page in GUIDES) >= 25


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) <= 12_000


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_one_command_writes_the_api_reference(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is of the docs extra")
    guide = (ROOT / "tests" / "README.md").read_text()
    command = re.search(r"`python -m (pdoc [^`]*)`", guide).group(1).split()
    subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, check=True, capture_output=True)
    pages = {path.name: path.read_text() for path in (tmp_path / "api").rglob("*.html")}
    assert "EMAOptimizer.swap_ema_weights" in pages["ema_optim.html"]
    assert "EMACallback.on_train_begin" in pages["transformers.html"]
    assert "Door.apply_ema" in pages["_door.html"]
    assert "export_ema" in pages["export.html"]
    assert "EMASnapshots.synthesize" in pages["snapshots.html"]
    assert "EMAVerbs.apply_ema" in pages["_verbs.html"]


OUTPUTS = sorted((ROOT / "examples" / "output").glob("*.txt"))
GAIN = re.compile(r"[-+]\d+\.\d\d(?:\d\d)? ± \d+\.\d\d(?:\d\d)?")


def test_measured_gains_of_the_guides_are_in_the_raw_output():
    folder = ROOT / "tests" / "benchmarks" / "output"
    raw = "".join(path.read_text() for path in [*OUTPUTS, *folder.iterdir()])
    printed = " ".join(page.read_text() for page in FIGURES)
    gains = GAIN.findall(printed.replace("\n", " "))
    assert len(gains) > 15
    assert [gain for gain in gains if gain not in raw.replace("  ", " ")] == []


def test_measured_numbers_of_the_guides_are_in_the_raw_output():
    raw = "".join(path.read_text() for path in OUTPUTS)
    for page in PAGES:
        numbers = re.findall(r"\b\d\d\.\d\d %|\b[1-9]\.\d{4}\b", page.read_text())
        assert [number for number in numbers if number not in raw] == [], page.name


def test_gains_of_the_raw_output_are_in_the_guides():
    printed = " ".join(page.read_text() for page in FIGURES).replace("\n", " ")
    for output in OUTPUTS:
        gains = [gain for gain in GAIN.findall(output.read_text()) if gain[1:5] != "0.00"]
        assert [gain for gain in gains if gain.lstrip("+") not in printed] == [], output.name


def test_measured_cells_of_the_benchmarks_are_in_the_raw_output():
    folder = ROOT / "tests" / "benchmarks" / "output"
    raw = "".join(path.read_text() for path in folder.iterdir())
    cells = re.findall(r"\+?[\d.]+(?: %)? \[[+\d.]+\]", FIGURES[-1].read_text())
    assert len(cells) > 150
    assert [cell for cell in cells if cell not in raw] == []


def anchors_of(text):
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", FIGURES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_guides_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link


def example(tmp_path, name, *arguments, warnings="error"):
    command = [sys.executable, "-W", warnings, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_quickstart_prints_its_table_and_draws_its_picture(tmp_path, schedule):
    picture = tmp_path / "picture.png"
    options = ["--seeds", "2", "--steps", "60", "--output", str(picture), "--schedule", schedule]
    printed = example(tmp_path, "quickstart.py", *options)
    assert "EMA weights" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_notebook_is_the_run_of_the_quickstart(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is of the test extra")
    nbformat = pytest.importorskip("nbformat")
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    text = (ROOT / "examples" / "quickstart.ipynb").read_text()
    text = text.replace("--seeds=20", "--seeds=2").replace("--steps=1000", "--steps=60")
    book = nbformat.reads(text, as_version=4)
    run = nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": tmp_path}})
    run.execute()
    outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
    printed = "".join(out.text for out in outputs if out.get("name") == "stdout")
    assert printed in example(tmp_path, "quickstart.py", "--seeds", "2", "--steps", "60")
    assert any("image/png" in out.get("data", {}) for out in outputs)


def test_resume_example_is_bit_equal(tmp_path):
    assert "equal" in example(tmp_path, "resume.py", "--steps", "60")


def test_batchnorm_example_runs(tmp_path):
    assert "EMA" in example(tmp_path, "batchnorm.py", "--seeds", "2", "--steps", "60")


def test_the_window_is_chosen_after_the_training(tmp_path):
    short = ["--seeds", "1", "--steps", "40", "--points", "3"]
    printed = example(tmp_path, "choose_window.py", *short)
    assert printed.count("told error") == 2
    assert (tmp_path / "choose_window.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("hf_trainer.py", ["--steps", "20"], "bit-equal"),
        ("lora.py", ["--steps", "20"], "adapter"),
        ("lightning_digits.py", ["--epochs", "2"], "EMA weights"),
    ],
)
def test_trainer_examples_run_and_draw(tmp_path, name, arguments, expected):
    printed = example(tmp_path, name, *arguments, warnings="default")
    assert expected in printed
    assert "False" not in printed
    assert (tmp_path / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
