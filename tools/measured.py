"""What was measured, written into nbs/index.ipynb between markers: no number there is typed.

It comes from report/results.json (the committed GPU run), report/demo.json (the demo whose
outputs the notebooks carry) and the figures' text alternatives.
"""
import html
import json
import re
import struct
from pathlib import Path

from dolly_lora.config import MODEL_NAMES
from dolly_lora.results import Examination, from_json
from dolly_lora.verdicts import passed

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
FIGURES = "training_curves", "ablation_random_7b"   # on the first screen


def read(name):
    """A file of the report; empty where it is not at hand."""
    path = ROOT / "report" / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def duration(seconds):
    """Seconds as people say them."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def shape(picture):
    """Width by height of a PNG file."""
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    return width / height


def figures():
    """The pictures of the first screen, side by side."""
    shapes = {name: shape(ROOT / "report" / "figures" / f"{name}.png") for name in FIGURES}
    pictures = []
    for name in FIGURES:
        alt = (ROOT / "report" / "figures" / f"{name}.txt").read_text(encoding="utf-8").strip()
        width = int(98 * shapes[name] / sum(shapes.values()))      # so both are equally high
        pictures.append(f'<img src="../report/figures/{name}.png" width="{width}%" '
                        f'alt="{html.escape(alt)}">')
    return "\n".join(pictures)


def run_row(run):
    """A whole run: where, what, how long."""
    environment = run["environment"]
    recipe = run["recipe"]
    summary = run["training"]["summary"]
    gpu = environment["gpu"]
    machine = f"one {gpu['name']}" if gpu else f"{environment['cpu_cores']} CPU cores, no GPU"
    total = sum(stage["seconds"] for stage in run["stages"].values())
    trainings = recipe.get("seeds", 1)
    what = f"`{recipe['preset']}`, all five notebooks"
    if trainings > 1:
        what += f", {trainings} trainings"
    memory = f"{summary['peak_memory_gib']:.1f} GiB" if gpu else "none"
    return machine, what, duration(total), duration(summary["train_seconds"]), memory


def bench_row(row):
    """The assignment's training, from a measured step of its shape."""
    what = f"`llama2`, `memory={row['name']}`: from a measured step, random weights"
    training = duration(60 * row["full_recipe_min"])
    return f"one {row['device']}", what, "not measured", training, f"{row['peak_gib']:.1f} GiB"


def seven_b(bench, name):
    """The measured row of a training step in LLaMA-2-7B's shape."""
    return next(r for r in bench
                if r["base"] == "random-7b" and r["name"] == name and "s_per_step" in r)


def costs():
    """The table of machines."""
    demo = read("demo.json")
    full = read("results.json")
    rows = [run_row(run) for run in (demo, full) if run]
    rows += [bench_row(seven_b(full["bench"], name)) for name in ("speed", "frugal")]
    rows.append(("Colab's free T4", "`llama2-t4`", *["not measured"] * 3))
    head = "machine", "what runs", "all of it", "one training", "GPU memory"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(low, high, digits=2):
    """A 95 % interval, in words."""
    return f"95 % interval {low:.{digits}f} to {high:.{digits}f}"


def examined(name, judgment):
    """A judge, and whether it passed its examination."""
    check = judgment["check"]
    if check["win_rate"] is None:
        return f"The judge `{name}` gave no valid verdict in its examination."
    found = (f"in its examination it gave the right answers {check['win_rate']:.1f} % "
             f"({between(check['low'], check['high'], 1)})")
    if passed(from_json(Examination, check)):
        return f"The judge `{name}` passed: {found}."
    return (f"The judge `{name}` did **not** pass: {found}, "
            "so its win rates say nothing about quality.")


def quality():
    """What training brought on the held-out records, and what the judge is worth."""
    run = read("results.json")
    found = run["evaluation"]
    base, tuned = found["test"]["base"], found["test"]["tuned"]
    change = found["difference"]
    model = MODEL_NAMES.get(run["recipe"]["base"], run["recipe"]["base"])
    sentences = [
        f"In the committed run ({model}), the loss on the held-out test records went from "
        f"**{base['loss']:.3f} to {tuned['loss']:.3f}** nats a token "
        f"(difference {change['difference']:.3f}, "
        f"{between(change['low'], change['high'], 3)}).",
        f"Of {tuned['answers']:,} answers, {base['finished']:.0f} % ended by themselves before "
        f"and {tuned['finished']:.0f} % after."]
    chat = found["test"].get("chat_template")
    if chat:
        sentences.insert(1, f"In its own chat template the base has {chat['loss']:.3f}.")
    seeds = found.get("seeds")
    if seeds and seeds["test_loss"]["low"] is not None:
        spread = seeds["test_loss"]
        sentences.append(
            f"Over {len(seeds['runs'])} trainings with different seeds the tuned loss is "
            f"{spread['mean']:.3f} on average ({between(spread['low'], spread['high'], 3)}).")
    sentences += [examined(name, judged) for name, judged in found["judgments"].items()]
    return " ".join(sentences)


def speed():
    """A step and the answers of a 7B model, in words."""
    bench = read("results.json")["bench"]
    names = "speed", "frugal", "stock", "padding-free"
    fast, frugal, stock, padding_free = (seven_b(bench, name) for name in names)
    seconds = stock["s_per_step"]
    waiting = 100 * (1 - sum(stock["gpu_s"].values()) / seconds)
    answers = {r["name"]: r for r in bench if "new_tokens" in r}
    ours = answers["dolly_lora"]
    theirs = answers["transformers"]
    return (
        f"On one {fast['device']}, a step of {fast['batch_size']} examples in LLaMA-2-7B's shape "
        f"took {fast['s_per_step']:.2f} s ({fast['peak_gib']:.0f} GiB), or "
        f"{frugal['s_per_step']:.2f} s in {frugal['peak_gib']:.1f} GiB with `memory=frugal`. "
        f"The libraries as documented took {seconds:.1f} s in the same run, and "
        f"{padding_free['s_per_step']:.2f} s without padding: our step is "
        f"{seconds / fast['s_per_step']:.1f} times as fast as the first and "
        f"{padding_free['s_per_step'] / fast['s_per_step']:.1f} times as fast as the second, "
        f"`frugal` {seconds / frugal['s_per_step']:.1f} times as fast as the first. "
        f"For {waiting:.0f} % of the libraries' {seconds:.1f} s the card only waits for work. "
        f"{ours['prompts']} answers of {ours['new_tokens']} tokens took {ours['seconds']:.1f} s, "
        f"{round(ours['tok_per_s'], -2):,.0f} tokens a second; `model.generate` with "
        f"{theirs['slots']} rows took {theirs['seconds']:.0f} s.{in_fp8()}")


def in_fp8():
    """What FP8 gains and costs, in words; empty without a measurement of both."""
    full = read("results.json")
    found = [r for r in full["bench"] if r["name"] == "fp8"]
    if not found or not full.get("fp8"):
        return ""
    exact = next(r for r in full["bench"] if r["name"] == "speed"
                 and all(r[key] == found[0][key] for key in ("base", "device")))
    loss, before = (run["best_validation_loss"] for run in (full["fp8"], full["training"]["summary"]))
    return (f" On one {exact['device']}, `precision=fp8` took {found[0]['s_per_step']:.2f} s a step, "
            f"{exact['s_per_step'] / found[0]['s_per_step']:.1f} times as fast as the exact "
            f"{exact['s_per_step']:.2f} s; the committed training, done again in FP8, ended with a "
            f"validation loss of {loss:.4f} instead of {before:.4f} "
            f"({100 * (loss / before - 1):+.2f} %).")


def fill(source):
    """A cell's text with what is between its markers made anew."""
    makers = dict(figures=figures, quality=quality, costs=costs, speed=speed)
    return re.sub(r"(<!-- measured: (\w+) -->\n).*?(\n<!-- /measured -->)",
                  lambda m: f"{m[1]}\n{makers[m[2]]()}\n{m[3]}", source, flags=re.S)


def main():
    notebook = json.loads(INDEX.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = fill("".join(cell["source"])).splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    INDEX.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
