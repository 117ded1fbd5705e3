"""The Triton kernels in Triton's interpreter, each in a process of its own: Triton must not
have been imported before."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT

RUN_CELLS = """
import json
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(open("02b_kernels.ipynb"))["cells"]:
    if cell["cell_type"] == "code": shell.run_cell("".join(cell["source"])).raise_error()
"""
INTERPRETED = """
import torch
from dataclasses import replace
from dolly_lora.engine import kernels
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.step import FusedLlama
from dolly_lora.trainer import collate
from toys import COVERED, TINY, adapted, random_model, some

examples, found = some(3, 40), []
for ops, budget in ((kernels.TRITON, 200), (kernels.TRITON, 40), (kernels.PLAIN, 200)):
    dropout = 0.0 if ops is kernels.PLAIN else DROPOUT
    model = adapted(random_model(COVERED["SHAPE"]), replace(TINY, lora_r=20, lora_dropout=dropout))
    engine = FusedLlama(model, MemoryPlan(True, True, budget), ops=ops)
    loss = sum(engine.loss(b, 40, 3, True) for b in collate(examples, budget)["rows"])
    found.append((loss, engine.flat.grad))
same = lambda a, b: all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b))
print(same(found[0], found[1]), same(found[0], found[2]))
"""


def run_python(code, folder, **env):
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    env = clean | dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", **env)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, env=env,
                          capture_output=True, text=True, timeout=300)
    return done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("shape, dropout, expected", [
    ("llama", 0.0, "True True"), ("llama", 0.3, "True False"), ("qwen2", 0.0, "True True"),
    ("qwen3", 0.0, "True True")])
def test_triton_kernels_make_the_same_step_in_the_interpreter(shape, dropout, expected):
    """Without dropout that of the formulas; with dropout the same however it is shared out."""
    code = INTERPRETED.replace("DROPOUT", str(dropout)).replace("SHAPE", shape)
    printed, all_of_it = run_python(code, "tests", TRITON_INTERPRET="1")
    assert printed.strip() == expected, all_of_it


def test_every_kernel_equals_its_formula_in_the_interpreter():
    """The cells of 02b_kernels."""
    printed, all_of_it = run_python(RUN_CELLS, "nbs", MPLBACKEND="agg")
    assert printed.count("Triton equals PyTorch") == 20, all_of_it
