"""What the tests of training share: a short recipe, and comparing and interrupting its runs."""
from dataclasses import replace
from unittest.mock import patch

import torch

from dolly_lora.config import PRESETS
from dolly_lora.train import train
from dolly_lora.trainer import DollyTrainer

RECIPE = replace(PRESETS["tiny"], max_steps=12, eval_steps=4)

# the same in a process of its own: `python -c TRAIN FOLDER`
TRAIN = """
import sys
from dataclasses import replace
from dolly_lora.config import PRESETS
from dolly_lora.train import train
recipe = replace(PRESETS['tiny'], max_steps=12, eval_steps=4)
train(recipe, sys.argv[1], log=lambda line: print(line, flush=True))
"""


def quiet(line):
    """A log that nobody reads."""


class Stop(Exception):
    """Raised by a log: what a killed process leaves, without a process."""


def stop_at(step):
    """A log that ends training when this step is logged."""
    def log(line):
        if line.startswith(f"step {step:>5}/") and "validation" not in line:
            raise Stop
    return log


def curve(history):
    """Steps of the log, steps of the validations, and all the numbers of both."""
    log = [(r["step"], r["loss"], r["learning_rate"]) for r in history["log"]]
    validation = [(r["step"], r["eval_loss"]) for r in history["validation"]]
    numbers = [x for row in log + validation for x in row[1:]]
    return [r[0] for r in log], [r[0] for r in validation], torch.tensor(numbers)


def same(a, b):
    """Do two histories have the same curve, to the bit?"""
    a, b = curve(a), curve(b)
    return a[:2] == b[:2] and torch.equal(a[2], b[2])


def adapters(folder):
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def train_rising(*args, **kwargs):
    """Train with a validation loss that grows by one a step, so that the best is not the last."""
    real = DollyTrainer.evaluation_loop

    def rising(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.metrics["eval_loss"] += self.state.global_step
        return out
    with patch.object(DollyTrainer, "evaluation_loop", rising):
        return train(*args, **kwargs)
