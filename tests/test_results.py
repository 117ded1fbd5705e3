"""Results as dataclasses: to JSON and back, older files, wrong files, intervals."""
import json

import pytest

from dolly_lora.config import DollyError
from dolly_lora.files import write_json
from dolly_lora.results import (
    AnswerLengths, BenchmarkAnswers, CategoryLoss, Consistency, Examination, from_json, full_run,
    Judgment, LengthEffect, LossDifference, Metrics, PairResult, Rating, read_metrics, seed_spread,
    SeedResult, SeedResults, stage_times, TestResult as Result, to_json, WinRate)

CONSISTENCY = Consistency(pairs=3, invalid=1, contradicted=None, first=50.0)
PAIR = PairResult(50.0, 40.0, 60.0, None, 1, 1, 1, 3, 50.0, 12, None, None, CONSISTENCY,
                  LengthEffect(WinRate(2, 75.0), WinRate(), WinRate(1, 0.0)), "not published")
JUDGMENT = Judgment(
    "local x", dict(weights="abc"), "0" * 64, dict(alpaca=False, mt_bench=True), dict(alpaca="why"),
    Examination(50.0, None, None, CONSISTENCY), {"tuned against base": PAIR},
    {"x-base": Rating(5.0, None, 5.0, dict(writing=None), 2, 1, 0, (4.0, 6.0))})
METRICS = Metrics(
    test=dict(base=Result(2.0, 7.4, 10, 1, 50.0, 20.0, 3.0, 4.0)),
    difference=LossDifference(-0.1, -0.2, 0.0), by_category=dict(a=CategoryLoss(2.0, 1.0, 3, 1.5)),
    seeds=SeedResults([SeedResult(42, 2.0, 2.1)], seed_spread([2.0]), seed_spread([2.1])),
    alpaca_eval=BenchmarkAnswers("sample", 16, 0, AnswerLengths(1.0, 2.0), AnswerLengths(3.0, 4.0)),
    judgments={"local x": JUDGMENT})


def test_everything_comes_back_from_json():
    assert from_json(Metrics, json.loads(json.dumps(to_json(METRICS)))) == METRICS


def test_the_committed_run_s_older_file_is_read():
    """It knows no seeds, no third contender; whole numbers stand where floats are meant."""
    metrics = from_json(Metrics, full_run()["evaluation"])
    assert metrics.test["tuned"].loss < metrics.test["base"].loss
    judgment = next(iter(metrics.judgments.values()))
    pair = judgment.alpaca["tuned against base"]
    effect = pair.length_effect
    assert effect.longer.pairs + effect.shorter.pairs + effect.equal.pairs == pair.n_total
    assert from_json(Metrics, json.loads(json.dumps(to_json(metrics)))) == metrics


def lost_keys(older, now, path=""):
    if not isinstance(older, dict): return []
    lost = [f"{path}/{key}" for key in older if key not in now]
    return lost + [p for key in older if key in now for p in lost_keys(older[key], now[key], key)]


def test_no_key_of_an_older_file_is_lost():
    older = full_run()["evaluation"]
    assert lost_keys(older, to_json(from_json(Metrics, older))) == []


@pytest.mark.parametrize("value", [
    [], 1, dict(test=1), dict(test=dict(base=1)), dict(test=dict(base=dict(loss=1.0))),
    dict(difference=dict(difference="a", low=0, high=0)), dict(judgments=[])])
def test_a_metrics_file_of_another_shape_is_one_line(tmp_path, value):
    write_json(tmp_path / "metrics.json", value)
    with pytest.raises(DollyError, match="by another version .* run the notebook 03_eval") as e:
        read_metrics(tmp_path)
    assert "\n" not in str(e.value)


def test_judges_of_an_older_shape_are_left_out(tmp_path):
    new = to_json(JUDGMENT)
    judgments = dict(old=dict(judge="old"), flat="text", new=new, lacking=dict(new, check=None))
    write_json(tmp_path / "metrics.json", dict(judgments=judgments))
    assert read_metrics(tmp_path).judgments == dict(new=JUDGMENT)
    assert read_metrics(tmp_path / "nowhere") == Metrics()


def test_the_interval_over_trainings_is_student_s():
    from scipy import stats
    values = [2.31, 2.29, 2.35]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    spread = seed_spread(values)
    assert (spread.low, spread.high) == pytest.approx((low, high))
    assert spread.mean == pytest.approx(sum(values) / 3)
    one = seed_spread([2.31])
    assert (one.mean, one.low, one.high) == (2.31, None, None)


def test_stage_times_are_measured_ones():
    rows = stage_times("02_train")
    assert rows and all(r["minutes"] >= 0 and r["machine"] and r["preset"] for r in rows)
    assert stage_times("no_stage") == [] and full_run("no such file") == {}
