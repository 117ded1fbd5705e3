"""The LoRA that 02_train builds by hand is PEFT's and the engine's, number by number."""
import json
from dataclasses import replace

import pytest
import torch

from conftest import ROOT
from dolly_lora.config import PRESETS
from dolly_lora.engine.packing import pack
from dolly_lora.engine.step import make_engine
from dolly_lora.models import TARGET_MODULES, add_lora, lora_parameter_count, tiny_model

RECIPE = replace(PRESETS["tiny"], lora_r=4, lora_alpha=8)
EXAMPLES = [dict(input_ids=list(range(3, 3 + n)), labels=[-100] * 4 + list(range(7, 3 + n)))
            for n in (9, 20, 14)]


def cell(start):
    """The cell of the chapter that begins so."""
    book = json.loads((ROOT / "nbs/02_train.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in book["cells"]]
    return next(s for s in sources if s.startswith(start))


@pytest.fixture()
def chapter():
    """What the chapter's own code leaves: the layer, and the toy it was put into."""
    names = dict(torch=torch, tiny_model=tiny_model, TARGET_MODULES=TARGET_MODULES,
                 lora_parameter_count=lora_parameter_count)
    exec(cell("class LoRALinear"), names)
    exec(cell("torch.manual_seed(0)\ntoy"), names)
    return names


def adapters(model, a, b):
    return [p for name, p in model.named_parameters() if name.endswith((a, b))]


@pytest.fixture()
def models(chapter):
    """By hand and by PEFT, with the same numbers, none of them zero, and without dropout."""
    by_hand = chapter["toy"].eval()
    by_peft = add_lora(tiny_model(), RECIPE).eval()
    ours = adapters(by_hand, ".A", ".B")
    theirs = adapters(by_peft, "lora_A.default.weight", "lora_B.default.weight")
    assert len(ours) == len(theirs) == 2 * 2 * 7
    for a, b in zip(ours, theirs):
        torch.nn.init.normal_(a, std=0.1)
        b.data.copy_(a.data)
    return by_hand, by_peft, ours, theirs


def padded(field, value):
    rows = [torch.tensor(example[field]) for example in EXAMPLES]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def batch():
    return dict(input_ids=padded("input_ids", 0), labels=padded("labels", -100))


def close(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_before_the_first_step_it_is_the_base(chapter):
    ids = batch()["input_ids"]
    assert torch.equal(chapter["toy"].eval()(ids).logits, tiny_model().eval()(ids).logits)


def test_only_the_adapters_are_trainable(chapter):
    trainable = [p for p in chapter["toy"].parameters() if p.requires_grad]
    toy = chapter["toy"]
    assert sum(p.numel() for p in trainable) == lora_parameter_count(toy.config, 4)


def test_peft_has_the_same_logits_and_gradients(models):
    by_hand, by_peft, ours, theirs = models
    a, b = by_hand(**batch()), by_peft(**batch())
    a.loss.backward()
    b.loss.backward()
    close([a.loss, a.logits], [b.loss, b.logits])
    assert all(p.grad.abs().max() > 0 for p in ours)
    close([p.grad for p in ours], [p.grad for p in theirs])


def test_the_engine_has_the_same_loss_and_gradients(models):
    by_hand, by_peft, ours, theirs = models
    out = by_hand(**batch())
    out.loss.backward()
    engine = make_engine(by_peft, RECIPE)
    row = pack(EXAMPLES)
    engine.flat.start()
    loss = engine.loss(row, (row.targets != -100).sum(), gradient=True)
    close([out.loss.detach()], [loss])
    close([p.grad for p in ours], [p.grad for p in theirs])


def test_dropout_is_on_the_input_of_the_correction_alone(chapter):
    linear = torch.nn.Linear(6, 5, bias=False).requires_grad_(False)
    layer = chapter["LoRALinear"](linear, r=2, alpha=8, dropout=0.5)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    close([layer(x)], [linear(x) + 4 * (dropped @ layer.A.T @ layer.B.T)])


def test_the_toy_learns(chapter):
    optimizer = torch.optim.AdamW(adapters(chapter["toy"], ".A", ".B"), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = chapter["toy"](**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
