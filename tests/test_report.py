"""The report: written from what a run has, true to the judges, and deaf to what its texts say."""

import copy
import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from conftest import ROOT
from dolly_lora.config import MODEL_NAMES, PRESETS, DollyError, sample_path
from dolly_lora.files import write_json
from dolly_lora.results import Judgment, from_json
from dolly_lora.tables import cards_compared, judge_facts, measured_steps, official_prompts
from dolly_lora.tables import scaling_rows, writing_rows
from dolly_lora.verdicts import judge_slug
from dolly_lora.report import (
    collect,
    decide,
    describe,
    report_markdown,
    share_difference,
    template_share,
    write_report,
)

OPTIONAL = "metrics.json", "before_after.json", "data/tokens.json", "stages.json", "bench.jsonl"
HOSTILE = (
    """<img src=x onerror="window.owned=1">""",
    "</td></table><script>window.owned=1</script>",
    "$x$ or $$y^2$$ is the price <eos>",
    "[a](javascript:window.owned=1) `c` *b* _i_ | \\| ~~s~~ # h",
)


def pair(win_rate=60.0, low=55.0, high=65.0, lc=None):
    """The numbers of a pair of models, as a judge leaves them."""
    rates = dict(pairs=2, win_rate=win_rate)
    rates = dict(longer=rates, shorter=rates, equal=rates)
    return dict(
        win_rate=win_rate,
        low=low,
        high=high,
        standard_error=2.0,
        n_wins=2,
        n_wins_base=1,
        n_draws=1,
        n_total=4,
        discrete_win_rate=win_rate,
        avg_length=40,
        length_controlled_winrate=lc,
        lc_standard_error=None,
        lc_refused="" if lc else "no difficulties for this reference",
        consistency=dict(pairs=4, invalid=0, contradicted=10.0, first=50.0),
        length_effect=rates,
    )


def rating(average=5.0, interval=(4.5, 5.5)):
    return dict(
        turn1=average,
        turn2=average,
        average=average,
        category={"writing": average},
        n_rows=16,
        n_invalid=0,
        n_duplicates=0,
        interval=interval and list(interval),
    )


def judge(
    name="gpt-4-1106-preview",
    official=True,
    right=(95.0, 92.0, 98.0),
    tuned=None,
    base_rate=None,
    tuned_rate=None,
    **more,
):
    """What one judge leaves in metrics.json; `right` is how it did in its examination."""
    why = (
        {}
        if official
        else dict(alpaca="the judge is not gpt-4-1106-preview", mt_bench="the judge is not gpt-4")
    )
    check = dict(
        zip(("win_rate", "low", "high"), right),
        consistency=dict(pairs=4, invalid=0, contradicted=8.0, first=50.0),
    )
    return (
        dict(
            judge=name,
            origin=dict(endpoint="https://judge.example/v1"),
            answers="a" * 64,
            official=dict(alpaca=official, mt_bench=official),
            unofficial=why,
            check=check,
            alpaca={"tuned against base": tuned or pair()},
            mt_bench={
                "tiny-base": base_rate or rating(4.0, (3.8, 4.2)),
                "tiny-tuned": tuned_rate or rating(),
            },
        )
        | more
    )


def metrics(*judges, loss=(-0.2, -0.3, -0.1), categories=("open_qa",)):
    part = dict(
        loss=2.0,
        perplexity=7.4,
        tokens=100,
        answers=4,
        rouge_l=20.0,
        finished=50.0,
        mean_words=10.0,
        mean_reference_words=9.0,
    )
    bench = dict(
        source="sample",
        prompts=16,
        in_training=0,
        base=dict(finished=10.0, mean_words=60.0),
        tuned=dict(finished=90.0, mean_words=30.0),
    )
    return dict(
        test=dict(base=part, tuned=part | dict(loss=1.8)),
        alpaca_eval=bench,
        mt_bench=bench,
        difference=dict(zip(("difference", "low", "high"), loss)),
        by_category={c: dict(base=2.0, tuned=1.8, records=4) for c in categories},
        judgments={j["judge"]: j for j in judges},
    )


def history():
    summary = dict(
        steps=6,
        epochs=1.0,
        train_seconds=1.5,
        seconds_per_step=0.25,
        real_tokens=100,
        real_tokens_per_second=66.0,
        first_validation_loss=5.0,
        best_validation_loss=4.9,
        best_step=6,
        peak_memory_gib=0.5,
        trainable_parameters=4_884_480,
        resumed_from=None,
        engine="FusedLlama",
        memory="speed: activations are kept",
        token_budget=1024,
        graphs=0,
        graph_seconds=0.0,
        padding=2.0,
        optimizer="adamw_torch",
    )
    return dict(
        summary=summary,
        validation=[dict(step=6, epoch=1.0, eval_loss=4.9)],
        log=[dict(step=6, epoch=1.0, loss=4.9)],
        environment=dict(
            python="3.11",
            packages=dict(torch="2.11.0"),
            cpu_cores=2,
            gpu=None,
            commit="05fbd35b3ad78e76885099be8027671af43fec06 with changes",
        ),
    )


def make_run(folder, *judges, category="open_qa", text="Say hi", **more):
    """A run folder whose numbers mean nothing: every file, no figure."""
    import dataclasses

    tokens = dict(examples=10, cut=0, tokens_cut=0, dropped=0, tokens=100, response_tokens=50)
    cleaning = dict(
        read=20,
        empty_responses=0,
        exact_duplicates=0,
        normalised_duplicates=0,
        citation_marks=0,
        contexts_with_marks=0,
        kept=20,
    )
    write_json(folder / "recipe.json", dict(recipe=dataclasses.asdict(PRESETS["tiny"])))
    write_json(
        folder / "data/statistics.json",
        dict(
            source=text,
            cleaning=cleaning,
            splits=dict(train=16, val=2, test=2),
            categories={p: {category: 2} for p in ("train", "val", "test")},
        ),
    )
    write_json(
        folder / "data/tokens.json",
        dict(train=tokens, val=tokens, test=tokens, longest=300, median=100),
    )
    write_json(folder / "training_history.json", history())
    write_json(
        folder / "before_after.json",
        [
            dict(
                instruction=text,
                context=text,
                reference=text,
                before=text,
                before_finished=False,
                after=text,
                after_finished=True,
            )
        ],
    )
    write_json(
        folder / "metrics.json",
        metrics(*judges or (judge(),), **dict(categories=(category,)) | more),
    )
    write_json(folder / "stages.json", {"01_data": dict(seconds=60.0, parts=1, finished=True)})
    return folder


def section(r, title):
    """A section of the report in Markdown, its lines joined and its entities decoded."""
    text = report_markdown(r).split(f"\n## {title}\n")[1].split("\n## ")[0]
    text = re.sub(r"(?<![|\n])\n(?=[^|\n#])", " ", text)
    return html.unescape(text)


def discussion(folder, *judges, **more):
    """What improved, what got worse, what is open, and the whole discussion."""
    text = section(collect(make_run(folder, *judges, **more)), "Discussion")
    parts = {part.split("\n")[0].strip(): part for part in text.split("### ")}
    titles = "What improved", "What got worse", "What is open"
    return *(parts.get(title, "") for title in titles), text


# What is there, and what is not


@pytest.mark.parametrize(
    "name, notebook",
    [
        ("recipe.json", "01_data"),
        ("data/statistics.json", "01_data"),
        ("training_history.json", "02_train"),
    ],
)
def test_what_a_report_cannot_do_without_is_named_with_its_notebook(tmp_path, name, notebook):
    (make_run(tmp_path) / name).unlink()
    with pytest.raises(
        DollyError, match=rf"{re.escape(name)} is not there: the notebook {notebook} writes it"
    ) as e:
        write_report(tmp_path, tmp_path / "report")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "gone", [*((name,) for name in OPTIONAL), OPTIONAL], ids=lambda gone: "+".join(gone)
)
def test_what_later_stages_have_not_written_is_said_in_its_place(tmp_path, gone):
    make_run(tmp_path)
    for name in gone:
        (tmp_path / name).unlink(missing_ok=True)
    page = write_report(tmp_path, tmp_path / "report").read_text()
    named = {
        "metrics.json": "03_eval",
        "before_after.json": "02_train",
        "data/tokens.json": "01_data",
        "stages.json": "dolly-lora run",
    }
    for name in set(gone) & set(named):
        assert (
            f"<code>{name}</code> is not in this run" in page
            and f"<code>{named[name]}</code>" in page
        )
    assert "were not measured beside this run" in page
    for heading in (
        "Dataset",
        "Training results",
        "Evaluation results",
        "Judged by a model",
        "Hardware and run time",
        "Discussion",
    ):
        assert f">{heading}</h2>" in page
    results = json.loads((tmp_path / "report/results.json").read_text())
    keys = {
        "metrics.json": "evaluation",
        "before_after.json": "before_after",
        "data/tokens.json": "tokens",
        "stages.json": "stages",
    }
    missing = {keys[n] for n in gone if n in keys} | {"fp8"}  # a training that few make
    assert {k for k, v in results.items() if v is None} == missing


def test_metrics_of_a_judge_alone_or_of_no_judge(tmp_path):
    make_run(tmp_path)
    write_json(
        tmp_path / "metrics.json", {k: v for k, v in metrics().items() if k != "judgments"}
    )
    assert "No judge has read the answers" in report_markdown(collect(tmp_path))
    write_json(tmp_path / "metrics.json", dict(judgments={"gpt-4-1106-preview": judge()}))
    assert "win rates with their 95 % intervals" in report_markdown(collect(tmp_path))


def test_stages_that_did_not_finish_and_stages_in_parts(tmp_path):
    make_run(tmp_path)
    write_json(
        tmp_path / "stages.json",
        {
            "02_train": dict(seconds=120.0, parts=3, finished=True),
            "04_chat": dict(seconds=6.0, parts=1, finished=False),
            "05_report": dict(seconds=1.0, parts=1, finished=False),
        },
    )
    text = report_markdown(collect(tmp_path))
    assert (
        "2.0 min, in 3 parts |" in text
        and "0.1 min, did not finish |" in text
        and "stage 05" not in text
    )
    write_json(tmp_path / "stages.json", {"02_train": 120.0})  # before stages had parts
    assert "2.0 min |" in report_markdown(collect(tmp_path))


def test_files_of_an_older_version_and_damaged_ones_are_one_line(tmp_path):
    make_run(tmp_path)
    write_json(tmp_path / "metrics.json", metrics() | dict(judgments=judge()))
    text = section(collect(tmp_path), "Judged by a model")
    assert "The verdicts of 1 judge, gpt-4-1106-preview, were written by an older version" in text
    make_run(tmp_path)
    for bad in "{\n", "3\n", "{}\n{}\n[]\n", "\x00":
        (tmp_path / "bench.jsonl").write_text(bad)
        with pytest.raises(
            DollyError, match=f"bench.jsonl line {max(1, bad.count(chr(10)))}: no"
        ) as e:
            collect(tmp_path)
        assert "\n" not in str(e.value)


# Judges


def test_judges_stand_side_by_side_and_unofficial_ones_say_why(tmp_path):
    local = judge(
        "local tiny",
        official=False,
        right=(49.0, 45.0, 53.0),
        origin=dict(weights="c" * 64),
        tuned=pair(51.0, 49.0, 53.0),
    )
    text = section(
        collect(make_run(tmp_path, judge(tuned=pair(63.2, 60.0, 66.0, lc=58.1)), local)),
        "Judged by a model",
    )
    official, other = text.split("### local tiny")
    assert "not leaderboard numbers" not in official and "The judge is not" not in official
    assert (
        "The win rates are not AlpacaEval 2's: the judge is not gpt-4-1106-preview." in other
        and "The ratings are not MT-Bench's: the judge is not gpt-4." in other
    )
    assert (
        "| gpt-4-1106-preview, AlpacaEval 2 | tuned against base | 63.2 | 60.0 to 66.0 | 58.1 |"
        in text
    )
    assert (
        "| local tiny, AlpacaEval-style | tuned against base | 51.0 | 49.0 to 53.0 | – |" in text
    )
    assert (
        "| gpt-4-1106-preview, MT-Bench | tiny-tuned |" in text
        and "| local tiny, MT-Bench-style | tiny-tuned |" in text
    )
    assert (
        text.count("**Can it judge?**") == 2
        and "That cannot be told from guessing" in other
        and "It tells right from wrong" in official
    )
    assert "- no difficulties for this reference (local tiny)" in text
    for name in "gpt-4-1106-preview", "local tiny":
        for kind in "win_rates", "mtbench_radar", "mtbench_turns":
            assert f"(figures/{kind}_{judge_slug(name)}.svg)" in text


def test_one_official_benchmark_and_one_that_is_not(tmp_path):
    half = judge(
        "gpt-4",
        official=dict(alpaca=False, mt_bench=True),
        unofficial=dict(alpaca="12 of 805 instructions"),
    )
    half["official"] = dict(alpaca=False, mt_bench=True)
    text = section(collect(make_run(tmp_path, half)), "Judged by a model")
    assert "The win rates are not AlpacaEval 2's: 12 of 805 instructions." in text
    assert "Its ratings are MT-Bench's" in text and "not leaderboard numbers" not in text
    assert "| gpt-4, AlpacaEval-style |" in text and "| gpt-4, MT-Bench |" in text


def test_nothing_valid_is_a_dash(tmp_path):
    none = dict(
        turn1=None,
        turn2=None,
        average=None,
        category={},
        n_rows=16,
        n_invalid=16,
        n_duplicates=0,
        interval=None,
    )
    empty = pair(None, None, None)
    empty["consistency"] |= dict(contradicted=None, first=None, invalid=4)
    mute = judge(
        "mute",
        official=False,
        right=(None, None, None),
        tuned=empty,
        base_rate=none,
        tuned_rate=none,
    )
    mute["check"]["consistency"] |= dict(contradicted=None, first=None)
    run = make_run(tmp_path, mute)
    text = section(collect(run), "Judged by a model")
    assert (
        "| tiny-tuned | – | – | – | – | 16 | 16 |" in text
        and "| tuned against base | – | – | – | 4 | 4 |" in text
    )
    assert (
        "None of its verdicts in the examination could be read" in text and "None |" not in text
    )
    assert (
        "left out" in section(collect(run), "Discussion")
        and "<img alt=" in write_report(run, tmp_path / "report").read_text()
    )


def test_a_judge_added_later_has_its_figures_and_one_that_went_has_none(tmp_path):
    run, report = make_run(tmp_path / "run", judge("one")), tmp_path / "report"
    page = write_report(run, report).read_text()
    assert page.count("<img alt=") == 3
    names = lambda: {p.name for p in (report / "figures").iterdir()}
    first = names()
    assert first == {
        f"{kind}_one.{form}"
        for kind in ("win_rates", "mtbench_radar", "mtbench_turns")
        for form in ("svg", "png", "txt")
    }
    for form in "svg", "png", "txt":
        shutil.copy(
            report / f"figures/win_rates_one.{form}", report / f"figures/win_rates.{form}"
        )  # of an older version
    (report / "figures/mine.svg").write_text("a person's own")
    write_json(
        run / "metrics.json", metrics(judge("one", right=(55.5, 51.0, 60.0)), judge("two"))
    )
    page = write_report(run, report).read_text()
    assert page.count("<img alt=") == 6
    write_json(run / "metrics.json", metrics(judge("two")))
    write_report(run, report)
    assert names() == {name.replace("_one", "_two") for name in first} | {"mine.svg"}


def test_figures_are_drawn_from_the_numbers_that_the_tables_show(tmp_path):
    run = make_run(tmp_path, judge(tuned=pair(61.5, 55.0, 65.0)))
    write_report(run, tmp_path / "report")
    write_json(run / "metrics.json", metrics(judge(tuned=pair(23.4, 20.0, 30.0))))
    page = write_report(run, tmp_path / "report").read_text()
    alt = (
        tmp_path / f"report/figures/win_rates_{judge_slug('gpt-4-1106-preview')}.txt"
    ).read_text()
    assert "23.4" in alt and "61.5" not in alt and "61.5" not in page and "23.4" in page


# The discussion


@pytest.mark.parametrize(
    "low, high, place",
    [(55.0, 65.0, 0), (40.0, 48.0, 1), (48.0, 56.0, 2)],
    ids=["above", "below", "around"],
)
def test_a_win_rate_stands_where_its_interval_puts_it(tmp_path, low, high, place):
    parts = discussion(tmp_path, judge(tuned=pair((low + high) / 2, low, high)))
    assert ["mean probability" in part for part in parts[:3]] == [i == place for i in range(3)]
    assert f"{low:.1f} to {high:.1f}" in parts[place]


@pytest.mark.parametrize(
    "interval, place",
    [((4.5, 5.5), 0), ((2.0, 3.0), 1), ((4.1, 4.9), 2)],
    ids=["above", "below", "around"],
)
def test_a_rating_stands_where_its_interval_puts_it(tmp_path, interval, place):
    parts = discussion(
        tmp_path, judge(tuned_rate=rating(sum(interval) / 2, interval))
    )  # the base model's is 3.8 to 4.2
    assert [
        "4-1106-preview rates" in part or "preview's ratings" in part for part in parts[:3]
    ] == [i == place for i in range(3)]


@pytest.mark.parametrize(
    "loss, place, zero",
    [
        ((-0.2, -0.3, -0.1), 0, "fell by 0.200"),
        ((0.2, 0.1, 0.3), 1, "excludes zero"),
        ((-0.1, -0.3, 0.1), 2, "includes zero"),
    ],
    ids=["better", "worse", "open"],
)
def test_the_loss_stands_where_its_interval_puts_it(tmp_path, loss, place, zero):
    parts = discussion(tmp_path, loss=loss)
    assert ["loss on held-out" in p or "It changed by" in p for p in parts[:3]] == [
        i == place for i in range(3)
    ]
    assert zero in parts[place]


def test_a_judge_that_failed_its_examination_has_no_say(tmp_path):
    better, worse, undecided, text = discussion(
        tmp_path,
        judge(tuned=pair(60.0, 55.0, 65.0)),
        judge("coin", right=(49.0, 45.0, 53.0), tuned=pair(30.0, 25.0, 35.0)),
    )
    assert "gpt-4-1106-preview prefers" in better and "coin" not in better + worse + undecided
    assert "coin did not pass its examination, and its verdicts are left out" in text
    assert "gives the right answer a mean probability of 49 % (95 % interval 45 to 53)" in text
    assert "left out" not in discussion(tmp_path, judge())[3]


def test_numbers_are_missing_and_nothing_is_said_about_them(tmp_path):
    run = make_run(tmp_path, judge(tuned=pair(None, None, None), tuned_rate=rating(5.0, None)))
    text = section(collect(run), "Discussion")
    for words in "preview prefers", "preview rates", "it gives them":
        assert words not in text
    (run / "metrics.json").unlink()
    text = section(collect(run), "Discussion")
    assert "What improved" not in text and "metrics.json" in text and "### Limits" in text


def test_what_did_not_improve_enough_has_its_numbers(tmp_path):
    text = discussion(tmp_path, judge())[3]
    assert "to test prompts, 50 % still run into the limit" in text
    assert "to the AlpacaEval-style prompts, 10 % run into theirs" in text
    assert "no human has read them." in text
    text = discussion(tmp_path, judge(right=(60.0, 55.0, 65.0)))[3]
    assert "no human and no valid judge has read them." in text
    assert "where a coin gives 50 and 80 is asked" in text


def test_official_prompts_are_known_by_their_contents(tmp_path):
    run = make_run(tmp_path)
    assert official_prompts(run) == dict(alpaca=False, mt_bench=False)
    answers = run / "answers/alpaca_eval/tuned/model_outputs.json"
    write_json(answers, [dict(instruction=f"Question {i}", output="") for i in range(805)])
    assert not official_prompts(run)["alpaca"]
    r = collect(run) | dict(official_prompts=dict(alpaca=True, mt_bench=False))
    text = html.unescape(report_markdown(r))
    assert "AlpacaEval's 16 instructions (local copy; 0 of them" in text
    assert "16 MT-Bench-style prompts of the embedded sample (0 of them" in text


def test_a_second_judge_of_one_name_keeps_the_name_it_is_kept_by():
    known = from_json(Judgment, judge("local smollm2 (0123abcd)"))
    facts = judge_facts(known)
    assert facts["model"] == f"{MODEL_NAMES['smollm2']} (0123abcd)"
    assert facts["slug"] != judge_facts(replace(known, judge="local smollm2"))["slug"]


def test_the_factor_of_the_fastest_way_has_its_context(tmp_path):
    stock = dict(name="stock", base="toy", model="the toy", device="no card", tokens_per_step=9.0,
                 matrix_tflops=1.0, floor_s=0.1, s_per_step=4.0, tok_per_s=500.0, peak_gib=8.0,
                 model_flops_utilisation=0.5, full_recipe_min=7.5, gpu_s=dict(attention=1.0))
    rows = [stock] + [stock | dict(name=name, s_per_step=s, peak_gib=5.5)
                      for name, s in (("padding-free", 0.6), ("speed", 0.2), ("frugal", 0.4))]
    r = collect(make_run(tmp_path)) | dict(bench=rows)
    text = section(r, "Speed")
    assert "20.0 times as fast as “stock”, whose card does nothing but wait for 75 %" in text
    assert "Beside “padding-free” the factor is 3.0." in text
    assert "(“frugal”, 5.5 GiB) it is still 10.0 times as fast as “stock”." in text


def test_each_card_has_a_table_of_its_own(tmp_path):
    row = dict(name="speed", base="toy", model="the toy", device="card A", tokens_per_step=9.0,
               matrix_tflops=1.0, floor_s=0.1, s_per_step=0.2, tok_per_s=500.0, peak_gib=8.0,
               model_flops_utilisation=0.5, full_recipe_min=7.5)
    rows = [row, row | dict(name="frugal", s_per_step=0.4),
            row | dict(device="card B", s_per_step=0.3),
            row | dict(device="card B", name="fp8", s_per_step=0.1)]
    a, b = measured_steps(rows)
    assert (a["best"]["name"], a["speedup"], a["figure"]) == ("speed", 1.0, "ablation_toy")
    assert (b["best"]["name"], b["figure"]) == ("fp8", "ablation_toy_card_b")
    assert b["speedup"] == pytest.approx(3.0)


def test_a_training_in_fp8_beside_the_run_is_told(tmp_path):
    run = make_run(tmp_path)
    assert "8 bits" not in section(collect(run), "Speed")
    history = json.loads((run / "training_history.json").read_text())
    history["summary"]["best_validation_loss"] *= 1.002
    (run / "fp8").mkdir()
    (run / "fp8/training_history.json").write_text(json.dumps(history))
    assert "(+0.20 %)" in section(collect(run), "Speed")


# The optimizer


@pytest.mark.parametrize(
    "ran, gpu, said",
    [
        (
            "paged_adamw_8bit",
            dict(name="a card", memory_gib=80),
            "paged_adamw_8bit, the assignment's, paged 8-bit AdamW.",
        ),
        ("adamw_torch_fused", dict(name="a card", memory_gib=80), "exact in float32, 39 MB"),
        ("adamw_torch", None, "no GPU"),
        ("sgd", dict(name="a card", memory_gib=80), "the recipe of this run asks for it"),
    ],
)
def test_the_report_says_which_optimizer_ran_and_why(tmp_path, ran, gpu, said):
    make_run(tmp_path)
    trained = history()
    trained["summary"]["optimizer"], trained["environment"]["gpu"] = ran, gpu
    write_json(tmp_path / "training_history.json", trained)
    text = section(collect(tmp_path), "Implementation")
    assert said in text and ("--set optimizer=paged_adamw_8bit" in text) == (
        ran != "paged_adamw_8bit"
    )
    assert f"| optimizer | {ran}, peak" in text
    del trained["summary"]["optimizer"]  # a run of an older version
    write_json(tmp_path / "training_history.json", trained)
    assert ("fused" if gpu else "no GPU") in section(collect(tmp_path), "Implementation")


# Texts


class Page(HTMLParser):
    """Its visible text, its tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page_that_says(text, folder):
    """A report with this text wherever a run has one."""
    who = judge(
        text,
        origin=dict(endpoint=text),
        unofficial=dict(alpaca=text, mt_bench=text),
        official=False,
    )
    who |= dict(
        alpaca={text: pair() | dict(lc_refused=text), "tuned against base": pair()},
        mt_bench={f"{text}-base": rating(), f"{text}-tuned": rating()},
        unofficial=dict(alpaca=text, mt_bench=text),
    )
    run = make_run(folder, who, category=text, text=text)
    recipe, trained = json.loads((run / "recipe.json").read_text()), history()
    recipe["recipe"]["base"] = recipe["recipe"]["train_on"] = text
    trained["summary"] |= dict(optimizer=text, engine=text, memory=text)
    trained["environment"] |= dict(
        gpu=dict(name=text, memory_gib=1), commit=f"05fbd35b3ad7 {text}", packages={text: text}
    )
    row = dict(
        name=text,
        base=text,
        model=text,
        device=text,
        tokens_per_step=100.0,
        matrix_tflops=1.0,
        floor_s=0.1,
        s_per_step=0.2,
        tok_per_s=500.0,
        peak_gib=None,
        model_flops_utilisation=0.5,
        full_recipe_min=7.5,
        gpu_s={},
    )
    written = dict(
        name=text,
        model=text,
        device=text,
        slots=1,
        seconds=1.0,
        tok_per_s=1.0,
        peak_gib=None,
        prompts=1,
        new_tokens=1,
        floor_s=1.0,
    )
    write_json(run / "recipe.json", recipe)
    write_json(run / "training_history.json", trained)
    write_json(run / "stages.json", {text: dict(seconds=1.0, parts=1, finished=True)})
    (run / "bench.jsonl").write_text(
        json.dumps(row | dict(base="toy")) + "\n" + json.dumps(written) + "\n"
    )
    return Page(write_report(run, folder / "report").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return page_that_says("7 plain words", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_text_says_it_is_only_shown(plain, tmp_path, text):
    page = page_that_says(text, tmp_path)
    assert [tag for tag, _ in page.tags] == [
        tag for tag, _ in plain.tags
    ]  # no text has made one, or prevented one
    assert page.text.count(text) == plain.text.count("7 plain words") > 40
    for _, attrs in page.tags:
        assert set(attrs) <= {"lang", "charset", "name", "content", "href", "id", "alt", "src"}
        assert attrs.get("href", "#").startswith("#") and attrs.get(
            "src", "data:image/svg+xml;base64,"
        ).startswith("data:image/svg+xml;base64,")


def test_line_breaks_are_kept_and_a_br_that_was_written_is_a_text(tmp_path):
    html = write_report(
        make_run(tmp_path, text="one\ntwo <br> three\r\nfour"), tmp_path / "report"
    ).read_text()
    assert re.search(r"one<br ?/?>\s*two &lt;br&gt; three<br ?/?>\s*four", html)


# Decisions


@pytest.mark.parametrize(
    "low, high, more, verdict",
    [
        (-0.3, -0.1, dict(lower_is_better=True), "better"),
        (0.1, 0.3, dict(lower_is_better=True), "worse"),
        (-0.3, 0.1, dict(lower_is_better=True), "open"),
        (-0.3, -0.0004, dict(lower_is_better=True), "open"),  # shown as zero
        (55.0, 60.0, dict(no_change=50, digits=1), "better"),
        (50.04, 60.0, dict(no_change=50, digits=1), "open"),  # shown as 50.0
        (None, None, {}, "open"),
    ],
)
def test_an_interval_decides_as_it_is_shown(low, high, more, verdict):
    assert decide(low, high, **more) == verdict


def test_shares_have_intervals_even_at_their_ends():
    for before, after, answers in (0, 0, 1), (0, 100, 4), (100, 100, 800), (27, 76, 1485):
        difference, low, high = share_difference(before, after, answers)
        assert difference == after - before and low < high
    assert decide(*share_difference(50, 75, 8)[1:]) == "open"
    assert decide(*share_difference(50, 75, 80)[1:]) == "better"
    assert decide(*share_difference(40, 40, 1000)[1:]) == "open"


def test_equal_numbers_are_no_improvement(tmp_path):
    assert [describe(*x)["change"] for x in ((20, 20.04), (20, 20.06), (21, 20))] == [
        "stayed",
        "rose",
        "fell",
    ]
    better, worse, undecided, text = discussion(tmp_path)
    assert "ROUGE-L stayed at 20.0 %." in text and "stayed at 10 words" in text
    assert "ROUGE" not in better + worse and "Whether more answers come to an end" in undecided
    assert "Nothing that was measured" not in text


# The third contender and the seeds


@pytest.mark.parametrize(
    "chat, verdict, said",
    [
        (1.7, "template", "so what was learnt is the template"),
        (1.8, "template", "so what was learnt is the template"),
        (1.9, "both", "closes 50 % of the gap in loss"),
        (2.1, "answers", "so more was learnt than a template"),
    ],
)
def test_learning_a_template_is_told_from_learning_to_answer(tmp_path, chat, verdict, said):
    assert template_share(2.0, chat, 1.8)["verdict"] == verdict
    found = metrics(judge())
    found["test"]["chat_template"] = found["test"]["base"] | dict(loss=chat, finished=80.0)
    run = make_run(tmp_path)
    write_json(run / "metrics.json", found)
    text = report_markdown(collect(run))
    assert said in text.replace("\n", " ")
    assert "| base model | base model in its own chat template | tuned model |" in text
    assert "in its own template the base model ends 80 %" in text.replace("\n", " ")
    assert "a third contender" in text


def test_without_the_third_contender_the_report_says_what_it_cannot_tell(tmp_path):
    text = report_markdown(collect(make_run(tmp_path))).replace("\n", " ")
    assert (
        "It cannot tell the first from the second" in text and "own chat template |" not in text
    )


def seeds(base_is_outside=True):
    spread = dict(mean=1.81, low=1.79, high=1.83 if base_is_outside else 2.1)
    runs = [dict(seed=s, validation_loss=1.9, test_loss=1.8) for s in (42, 43, 44)]
    return dict(runs=runs, validation_loss=spread, test_loss=spread)


@pytest.mark.parametrize("outside", [True, False])
def test_seeds_have_a_table_an_interval_and_a_say(tmp_path, outside):
    run = make_run(tmp_path)
    write_json(run / "metrics.json", metrics(judge()) | dict(seeds=seeds(outside)))
    text = report_markdown(collect(run))
    assert "| 43 | 1.9000 | 1.8000 |" in text and "by Student's t" in text
    assert ("It was not the seed" in text) == outside
    assert ("It may have been the seed" in text) == (not outside)
    assert "Repeat with three seeds" not in text
    assert "Repeat with three seeds" in report_markdown(collect(make_run(tmp_path)))


# The published judges


@pytest.mark.parametrize(
    "official, asked",
    [
        (dict(alpaca=True, mt_bench=False), ["gpt-4"]),
        (dict(alpaca=False, mt_bench=True), ["gpt-4-1106-preview"]),
        (dict(alpaca=False, mt_bench=False), ["gpt-4-1106-preview", "gpt-4"]),
    ],
)
def test_each_benchmark_has_its_own_published_judge(tmp_path, official, asked):
    why = {kind: "another judge" for kind, fine in official.items() if not fine}
    run = make_run(tmp_path, judge() | dict(official=official, unofficial=why))
    text = report_markdown(collect(run))
    assert re.findall(r"`dolly-lora judge --judge ([^`]+)`", text) == asked
    assert ("not leaderboard numbers" in text) == (len(asked) == 2)


def test_with_both_published_judges_none_is_left_to_ask(tmp_path):
    one = judge() | dict(
        official=dict(alpaca=True, mt_bench=False), unofficial=dict(mt_bench="x")
    )
    other = judge("gpt-4") | dict(
        official=dict(alpaca=False, mt_bench=True), unofficial=dict(alpaca="x")
    )
    text = report_markdown(collect(make_run(tmp_path, one, other)))
    assert "`dolly-lora judge --judge" not in text and "leaderboard numbers" not in text


# The committed run


@pytest.fixture(scope="module")
def committed():
    path = ROOT / "report/results.json"
    if not path.exists():
        pytest.skip("no report is committed yet")
    return json.loads(path.read_text())


def test_the_committed_numbers_make_a_report_that_reads_well(committed):
    text = report_markdown(committed)
    tuned = committed["evaluation"]["test"]["tuned"]
    assert f"{tuned['loss']:.3f}" in text and "**People's answers became more likely.**" in text
    assert not re.search(r"None|nan|undefined|Markup|\{[{%]|[%}]\}", text)
    prose = [line.strip() for line in text.splitlines() if not re.match(r"[|!*>-]|#", line)]
    assert not [line for line in prose if re.search(r" [.,;]( |$)|\(\)|  ", line)]
    for title in "The question", "Dataset", "Evaluation results", "Discussion", "References":
        assert f"\n## {title}\n" in text


def test_a_run_before_seeds_contenders_and_later_fields_still_renders(committed):
    old = copy.deepcopy(committed)
    old["evaluation"].pop("seeds", None)
    old["evaluation"]["test"].pop("chat_template", None)
    for name in "seeds", "optimizer":
        old["recipe"].pop(name, None)
    old["training"]["summary"].pop("optimizer", None)
    for judgment in old["evaluation"]["judgments"].values():
        for result in judgment["alpaca"].values():
            result.pop("lc_refused", None)
    assert "## Discussion" in report_markdown(old)
    old["training"]["summary"].pop("padding")
    with pytest.raises(DollyError, match="another version of dolly_lora .*padding") as e:
        report_markdown(old)
    assert "\n" not in str(e.value)


def test_several_cards_stand_beside_one_and_not_among_the_ways(tmp_path):
    """A row of several cards belongs to the row of one right before it, and both to a table."""
    lines = [json.loads(line) for name in ("bench_h100.jsonl", "cards.jsonl")
             for line in sample_path(name).read_text().splitlines()]
    compared = cards_compared(lines)
    assert len(compared) == len(scaling_rows(lines)) >= 3
    for (alone, shared), row in zip(compared, scaling_rows(lines)):
        assert alone.get("gpus", 1) == 1 < shared["gpus"] == row[2]
        assert alone["device"] == shared["device"] == row[1]
        time = "seconds" if "new_tokens" in shared else "s_per_step"
        assert row[5] == f"{alone[time] / shared[time]:.2f}"
    ways = {steps["figure"]: [b["name"] for b in steps["measured"]]
            for steps in measured_steps(lines)}
    assert ways["ablation_random_7b"] == ["stock", "padding-free", "by hand", "weights kept",
                                          "speed", "frugal"]
    assert "ablation_random_7b_64" not in ways  # it has no other way
    assert scaling_rows(lines[:5]) == []
    other = compared[0][1] | dict(batch_size=99)  # nothing of the kind was measured on one card
    assert cards_compared([compared[0][0], other]) == []


def test_peers_and_several_cards_may_be_measured_by_one_command():
    row = dict(model="toy", base="toy", device="a card", tok_per_s=1.0, peak_gib=None,
               floor_s=0.1, slots=1, model_flops_utilisation=0.5, full_recipe_min=1.0)
    bench = [row | dict(name="stock", s_per_step=4.0), row | dict(name="speed", s_per_step=2.0),
             row | dict(name="speed", s_per_step=1.0, gpus=2)]
    steps, = measured_steps(bench)
    assert [b["name"] for b in steps["measured"]] == ["stock", "speed"] and steps["speedup"] == 2.0
    assert scaling_rows(bench[:0]) == [] and scaling_rows(
        [b | dict(batch_size=16) for b in bench])[0][5] == "2.00"
    made = dict(prompts=4, new_tokens=8, seconds=2.0)
    bench = [row | made | dict(name=name, gpus=gpus)
             for name, gpus in (("transformers", 1), ("dolly_lora", 1), ("dolly_lora", 2))]
    assert [r[0] for r in writing_rows(bench)] == ["transformers", "dolly_lora"]
    assert writing_rows(bench[1:]) == []
