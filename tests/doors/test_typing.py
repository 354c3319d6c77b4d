"""The package as a type checker sees it in a user's script."""

import subprocess
import sys
from pathlib import Path

import pytest

import ema_optim

SETTINGS = """[mypy]
strict = True
[mypy-transformers.*,accelerate.*,lightning.*,pytorch_lightning.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-safetensors.*,tqdm.*,numpy.*]
ignore_missing_imports = True
"""
RIGHT = """
import torch
from ema_optim import EMACallback, EMAOptimizer, EMAWarning, EMAWeights, export_ema

model = torch.nn.Linear(2, 2)
EMAAdamW = EMAOptimizer.for_class(torch.optim.AdamW, decay=0.999)
optimizer: EMAOptimizer = EMAAdamW(model.parameters(), lr=1e-3)
other: torch.optim.Optimizer = EMAAdamW([{"params": model.parameters(), "lr": 1e-3}])
cls: type[torch.optim.Optimizer] = EMAAdamW
callback: EMACallback = EMACallback(0.999, evaluate_with="both")
weights: EMAWeights = EMAWeights("auto", optimizers=[0])
callback.apply_ema(model)
weights.load_ema_state(callback.get_ema_state())
"""
WRONG = {
    "from ema_optim import Typo": "has no attribute",
    "import ema_optim; ema_optim.typo": "has no attribute",
    "from ema_optim import EMACallback; EMACallback(nonsense=3)": "Unexpected keyword argument",
    "from ema_optim import EMAWeights; EMAWeights(update_every='a')": "incompatible type",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What mypy says of the scripts, all in one run."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "mypy.ini").write_text(SETTINGS)
    for index, script in enumerate([RIGHT, *WRONG]):
        (folder / f"script_{index}.py").write_text(script + "\n")
    cache = Path(__file__).parent.parent / ".mypy_cache"  # torch alone takes a minute
    command = [sys.executable, "-m", "mypy", "--cache-dir", cache, "--config-file", "mypy.ini", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_what_the_documentation_shows_type_checks(checked):
    assert "script_1.py" in checked, checked
    assert "script_0.py" not in checked, checked


@pytest.mark.parametrize(("script", "message"), WRONG.items())
def test_a_mistake_is_found(checked, script, message):
    index = 1 + list(WRONG).index(script)
    found = [line for line in checked.splitlines() if line.startswith(f"script_{index}.py")]
    assert any(message in line for line in found), checked


@pytest.mark.parametrize("name", ["EMACallback", "EMAWeights", "export_ema"])
def test_lazy_names_are_there_for_completion(name):
    assert name in dir(ema_optim)
    assert getattr(ema_optim, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Typo'"):
        ema_optim.Typo  # noqa: B018
