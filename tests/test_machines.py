"""The README's commands for two machines, on one: two launchers that meet on the loopback."""
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch

from conftest import ROOT
from dolly_lora.config import DollyError
from dolly_lora.data import prepare_data
from dolly_lora.processes import end_workers
from dolly_lora.runs import start_run
from dolly_lora.train import train
from dolly_lora.trainer import check_start
from toys import EPOCH, assert_same, quiet

# several processes on the CPU; on cards they are measured by `dolly-lora bench --gpus`
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="wants no card, or several")

README = (ROOT / "README.md").read_text()


def free_port():
    """A port that nobody has, below those that the system gives away."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port


def machines_yaml():
    """The README's configuration, with an address, a port and a number of processes for here."""
    text = re.search(r"```yaml\n(.*?)```", README, re.S)[1]
    here = dict(num_processes=2, main_process_ip="127.0.0.1", main_process_port=free_port())
    for key, value in here.items():
        text, found = re.subn(rf"(?m)^{key}: \S+", f"{key}: {value}", text)
        assert found == 1
    return text


def commands():
    """The README's command for each machine, with the settings exported before it."""
    text = README.replace("\\\n", " ")
    found = re.findall(r"export (\w+)=(\w+)\naccelerate launch (.*)", text)
    assert len(found) == 2
    return [({name: value}, shlex.split(rest)) for name, value, rest in found]


def launch(machine, folder, said):
    """Start a machine's launcher; it and its workers write to the pipe `said`."""
    env, args = commands()[machine]
    assert args[args.index("--machine_rank") + 1] == str(machine)
    args = [{"machines.yaml": folder.parent / "machines.yaml", "runs/llama2": folder}.get(a, a)
            for a in args]
    # on one machine both would take 127.0.0.1 for their own address, and open the port
    args = ["--rdzv_conf", f"is_host={1 - machine}", *args]
    return subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", *args],
                            stdout=said, stderr=said, start_new_session=True,
                            env=os.environ | env | {"OMP_NUM_THREADS": "1"})


def end(launchers):
    for launcher in launchers:
        if launcher.poll() is None:
            end_workers(launcher)


def test_two_machines_train_as_one_process_though_a_worker_is_killed(tmp_path):
    alone, folder = tmp_path / "one" / "run", tmp_path / "two" / "run"
    train(EPOCH, alone, log=quiet)
    start_run(EPOCH, folder)
    prepare_data(EPOCH, folder)
    (folder.parent / "machines.yaml").write_text(machines_yaml())

    hear, say = os.pipe()
    launchers = [launch(machine, folder, say) for machine in (0, 1)]
    os.close(say)
    too_late = threading.Timer(300, end, [launchers])
    too_late.start()
    family, lines = [], []
    try:
        with open(hear) as said:
            for line in said:  # ends when nobody is left who could write
                lines.append(line)
                if line.startswith("step     0/"):
                    for launcher in launchers:
                        family += psutil.Process(launcher.pid).children(recursive=True)
                    assert len(family) == 2
                if line.startswith("step     5/") and family[1].is_running():
                    family[1].kill()
        status = [launcher.wait(10) for launcher in launchers]
    finally:
        too_late.cancel()
        end(launchers)

    said = "".join(lines)
    assert status == [0, 0], said
    assert lines.count("resuming from checkpoint-4\n") == 1, said
    assert len([line for line in lines if line.startswith("step     5/10  loss")]) == 2
    assert_same(folder, alone)


def test_processes_that_would_begin_at_other_steps_are_told(tmp_path, monkeypatch):
    two = SimpleNamespace(args=SimpleNamespace(world_size=2, output_dir=tmp_path, device="cpu"))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda step: step.add_(4))  # the other's
    check_start(two, tmp_path / "checkpoint-4")
    for checkpoint in None, tmp_path / "checkpoint-8":
        with pytest.raises(DollyError, match="must be the same folder on all machines") as e:
            check_start(two, checkpoint)
        assert "\n" not in str(e.value)
    one = SimpleNamespace(args=SimpleNamespace(world_size=1, device="cpu"))
    check_start(one, tmp_path / "checkpoint-8")
