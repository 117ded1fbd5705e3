"""Which engine, which kernels and which attention are chosen, and the engine's small face."""
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, MistralConfig, Qwen2Config

import dolly_lora.engine
from dolly_lora.config import DollyError
from dolly_lora.engine import Engine, kernels, make_engine, packing
from dolly_lora.engine.blocks import fits_llama
from dolly_lora.engine.packing import PackedModel, pack
from dolly_lora.models import tiny_model
from toys import SHAPE, TINY, adapted, some


def made(config, **more):
    """A model of one layer with another architecture, and adapters."""
    shape = SHAPE | dict(num_hidden_layers=1, num_key_value_heads=2) | more
    return adapted(AutoModelForCausalLM.from_config(config(**shape)))


@pytest.mark.parametrize("capability, fast", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_fallbacks_choose_themselves(capability, fast):
    cuda = torch.device("cuda")
    with patch("torch.cuda.is_available", return_value=True), \
         patch("torch.cuda.get_device_capability", return_value=capability):
        assert packing.has_varlen(cuda, torch.bfloat16) is fast
        assert not packing.has_varlen(cuda, torch.float32)
        assert not packing.has_varlen("cpu", torch.bfloat16)
        chosen = kernels.TRITON if fast and kernels.triton else kernels.PLAIN
        assert kernels.operations(cuda) is chosen
        assert kernels.operations("cpu") is kernels.PLAIN
    assert kernels.operations("cpu") is kernels.PLAIN


def test_a_model_with_its_own_scale_of_the_scores():
    granite = made(GraniteConfig, attention_multiplier=0.7)
    ids = torch.tensor(some(1)[0]["input_ids"])
    expected = granite.eval()(input_ids=ids[None]).logits[0]
    ours = PackedModel(granite).logits(pack(some(1)))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_a_short_window_is_refused():
    mistral = PackedModel(made(MistralConfig, sliding_window=8))
    with pytest.raises(DollyError, match="window of 8"):
        mistral.loss(pack(some()), 1.0)


def test_other_architectures_get_the_plain_engine():
    qwen = made(Qwen2Config)
    assert not fits_llama(qwen) and fits_llama(adapted(tiny_model()))
    engine = make_engine(qwen, TINY)
    assert isinstance(engine, PackedModel)
    one = PackedModel(qwen).loss(pack(some()[:1]), 1.0)
    assert engine.loss(pack(some()), 1.0) > one > 0


def test_both_engines_are_engines():
    for model in (adapted(tiny_model()), made(Qwen2Config)):
        engine = make_engine(model, TINY)
        assert isinstance(engine, Engine)
        engine.flat.start()
        engine.step(pack(some()), 100, 1)
        assert engine.flat.grad.abs().sum() > 0    # where the optimizer looks for it
        assert engine.logits(pack(some(1))).shape[1] == 512


def test_the_face_is_small_and_loads_nothing_by_itself():
    assert dolly_lora.engine.__all__ == ["Decoder", "Engine", "make_engine"]
    assert {"Decoder", "Engine", "make_engine"} <= set(dir(dolly_lora.engine))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        dolly_lora.engine.nothing_of_the_kind
    code = "import sys, dolly_lora.engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
