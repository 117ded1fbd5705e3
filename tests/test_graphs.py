"""Recorded steps without a card: a pretended one notes the work and does it again at replay."""
from dataclasses import replace
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.nn.functional as F

from dolly_lora.engine import decoder, graphs, reading
from dolly_lora.engine.graphs import GraphRecorder, StepGraphs
from dolly_lora.engine.kernels import PLAIN
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.packing import pack
from dolly_lora.engine.step import FusedLlama
from dolly_lora.models import load_tokenizer, tiny_model
from toys import TINY, adapted, some


class PretendedGraph:
    """Knows whether a capture was ended."""
    open = 0

    def capture_begin(self, pool):
        PretendedGraph.open += 1

    def capture_end(self):
        PretendedGraph.open -= 1


@pytest.fixture
def card(monkeypatch):
    """What the recorder asks of torch.cuda, in order."""
    calls = MagicMock()
    for name in ("graph_pool_handle", "Stream", "current_stream", "stream", "synchronize",
                 "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    PretendedGraph.open = 0
    return calls


@pytest.fixture
def replayed(card, monkeypatch):
    """Replaying does the recorded work again."""
    record = GraphRecorder.record

    def remember(recorder, work, warm_up=None):
        graph = record(recorder, work, warm_up)
        graph.replay = work
        return graph
    monkeypatch.setattr(GraphRecorder, "record", remember)


def test_the_warm_up_comes_first_and_idle_memory_is_given_back(card):
    recorder, order = GraphRecorder(), []
    card.empty_cache.side_effect = lambda: order.append("empty cache")
    recorder.record(lambda: order.append("work"), lambda: order.append("warm-up"))
    assert order == ["warm-up", "empty cache", "work"]
    assert PretendedGraph.open == 0 and recorder.seconds > 0


def test_an_exception_ends_the_capture_and_is_passed_on(card):
    def fail():
        assert PretendedGraph.open == 1
        raise torch.OutOfMemoryError("too much")
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        GraphRecorder().record(fail)
    assert PretendedGraph.open == 0


def within_bounds(q, k, v, batch):
    """Attention that reads the boundaries from memory, as the kernels do."""
    ends = batch.cu_seqlens[1:].long()
    example = torch.searchsorted(ends, torch.arange(len(q)), right=True)
    mask = (example[:, None] == example[None]).tril()
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_replayed_steps_are_the_steps(replayed, recompute):
    """Filled up, at fixed places, with the sum of their gradients; a warm-up teaches nothing."""
    plan = MemoryPlan(True, recompute, 600, examples=6, longest=150)
    steps = [pack(some(6, 120)), pack(some(3, 40, seed=1)), pack(some(6, 120, seed=2))]
    plain, recorded = (FusedLlama(adapted(tiny_model()), plan) for _ in range(2))
    recorded.graphs = StepGraphs(recorded)
    with patch("dolly_lora.engine.step.attend", within_bounds):
        for n, batch in enumerate(steps):
            loss = recorded.step(batch, 100 + n, 7)
            torch.testing.assert_close(loss, plain.step(batch, 100 + n, 7), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorded.flat.grad, plain.flat.grad, rtol=1e-4, atol=1e-5)
    lengths = {-(-len(b.input_ids) // 128) * 128 for b in steps} | {640}
    assert set(recorded.graphs.graphs) == lengths and recorded.graphs.seconds > 0


def test_a_step_outside_of_the_plan_is_not_replayed(replayed):
    engine = FusedLlama(adapted(tiny_model()), MemoryPlan(True, False, 600, examples=2))
    engine.graphs = StepGraphs(engine)
    engine.step(pack(some(3)), 100, 7)
    assert engine.graphs.graphs == {}


def test_a_recorded_decoder_answers_as_the_plain_one(replayed):
    """Prompts in batches of a fixed size, steps replayed: the tokens are the same."""
    model, tokenizer = tiny_model().eval(), load_tokenizer(TINY)
    prompts = [e["input_ids"] for e in some(5, 60)]

    def answers(ops):
        draws = [decoder.uniform_draws(str(i), 1, 12) for i in range(5)]
        with patch.object(reading, "operations", return_value=ops), torch.inference_mode():
            return dict(decoder.decode_all(model, tokenizer, prompts, [0, 0.8, 0, 0.8, 0], draws,
                                           12, 2, range(5)))
    card = replace(PLAIN, fused=True)    # the same formulas, recorded
    with patch.object(decoder, "_attend_cached_triton", decoder.attend_cached):
        assert answers(card) == answers(PLAIN)
    assert graphs.GraphRecorder is decoder.GraphRecorder
