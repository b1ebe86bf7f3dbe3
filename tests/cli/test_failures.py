"""Exit statuses, the one line on stderr, and signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from sfumato.core.errors import InputError

from .conftest import environment


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["smple"], "smple"),
        (["sample", "--steps", "many", "x"], "--steps"),
        (["sample", "--steps", "0", "x"], "--steps"),
        (["sample", "--nonsense"], "--nonsense"),
        (["sample", "noto", "-m", "nowhere"], "no model 'nowhere'"),
        (["sample", "noto", "-m", "styled", "--out", "x.jpg"], ".png"),
        (["sample", "noto", "-m", "styled", "--solver", "dppm"], "did you mean 'ddpm'"),
        (["sample", "noto", "-m", "styled", "--solver", "ddim(eta=maybe)"], "ddim"),
        (["sample", "noto", "-m", "styled", "--grid", "karas"], "karras"),
        (["sample", "apple", "-m", "styled"], "vendor = 'apple'"),
        (["sample", "noto", "-m", "styled", "--cond", "vendor"], "NAME=VALUE"),
        (["sample", "noto", "-m", "styled", "--cond", "mood=sad"], "mood"),
        (["sample", "noto", "-m", "styled", "-n", "5000"], "shards"),
        (["sample", "--replay", "nothing.png"], "no picture"),
        (["sample", "noto", "-m", "styled", "--guidance", "nan"], "a finite scale"),
        (["sample", "noto", "-m", "styled", "--guidance", "-inf"], "a finite scale"),
        (["sample", "noto", "-m", "styled", "--guidance", "nan", "--out", "shards/"], "a finite scale"),
        (["edit", "nothing.png", "--prompt", "x"], "'nothing.png' does not exist"),
        (["edit", ".", "--prompt", "x"], "'.' is a directory"),
        (["invert", "."], "'.' is a directory"),
        (["directions", "styled", "--from", "digits:train"], "--from and --to"),
        (["train", "--data", "digits", "--out", "r", "--set", "network.width=-8"], "network.width=-8"),
        (["train", "--out", "r"], "--data"),
        (["train", "--data", "digits", "--out", "r", "--set", "stepps=3"], "no setting 'stepps'"),
        (["train", "--data", "digits", "--out", "r", "--set", "steps=few"], "whole number"),
        (["train", "--data", "digits", "--out", "r", "--set", "steps"], "key=value"),
        (["train", "--data", "digits", "--out", "r", "--set", "objective=score"], "eps, x0, v, flow"),
        (["train", "--data", "digits", "--out", "r", "--set", "lr=-1"], "lr"),
        (["train", "--data", "nowhere", "--out", "r"], "no folder and no data set"),
        (["train", "--out", "r", "--resume"], "no training"),
        (["evaluate", "nowhere", "--reference", "digits:test"], "no model"),
        (["evaluate", "styled", "--reference", "nowhere"], "no folder and no data set"),
        (["papers", "--family", "cooking"], "cooking"),
        (["reproduce"], "SLUG"),
        (["reproduce", "dpm-solver-ppp"], "dpm-solver-pp"),
        (["cite", "nobody"], "nobody"),
        (["data", "nothing"], "nothing"),
        (["data", "digits", "--out", "d", "--split", "dev"], "train, test"),
        (["zoo", "make", "nothing", "--out", "d"], "nothing"),
        (["zoo", "card", "nothing"], "no model"),
        (["demo", "-m", "nothing"], "no model"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run, models, args, says):
    args = [str(models / a) if a in ("styled", "worded") else a for a in args]
    found = run(*args)
    assert (found.status, found.stdout) == (2, "")
    assert found.stderr.startswith("sfumato: ") and found.stderr.count("\n") == 1
    assert says in found.stderr


WRITING = (
    ["sample", "noto", "-m", "styled", "--out", "kept/out.png"],
    ["sample", "noto", "-m", "styled", "--out", "kept/set/"],
    ["edit", "picture.png", "--prompt", "x", "-m", "styled", "--out", "kept/out.png"],
    ["invert", "picture.png", "-m", "styled", "--out", "kept/out.png"],
    ["directions", "styled", "--from", "digits:train", "--to", "digits:test", "--out", "kept/out.safetensors"],
    ["train", "--data", "digits", "--out", "kept"],
    ["distill", "styled", "--out", "kept"],
    ["tune", "styled", "--out", "kept/card.json"],
    ["compare", "styled", "--out", "kept/out.png"],
    ["evaluate", "styled", "--reference", "digits:test", "--out", "kept/out.md"],
    ["reproduce", "dpm-solver-pp", "--out", "kept"],
    ["zoo", "make", "digits", "--out", "kept"],
    ["export", "styled", "--to", "safetensors", "--out", "kept/model"],
    ["data", "digits", "--out", "kept/digits"],
    ["demo", "-m", "styled", "--out", "kept"],
)


@pytest.mark.parametrize("args", WRITING, ids=lambda args: f"{args[0]} {args[-1]}")
def test_a_place_that_cannot_be_written_is_refused_before_any_work(run, models, tmp_path, monkeypatch, args):
    def worked(*_, **__):
        raise AssertionError("the work was done before the place was looked at")

    for part in ("core.solver.trajectory", "training.Trainer.fit", "recipes._base.Recipe.run", "zoo.making.make"):
        monkeypatch.setattr(f"sfumato.{part}", worked)
    monkeypatch.setattr("sfumato.pipeline.trajectory", worked)
    (tmp_path / "kept").write_text("kept")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    found = run(*(str(models / a) if a == "styled" else a for a in args))
    assert found.status == 2 and "kept is a file" in found.stderr, found.stderr
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    from sfumato.cli import _places

    def refused(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(InputError, match="cannot be written: .* says 'Permission denied'"):
        _places.file(tmp_path / "new" / "out.png", ".png", what="a picture")
    assert not (tmp_path / "new").exists()


def test_refused_prompts_leave_no_begun_folder(run, models):
    assert run("sample", "apple", "-m", models / "styled", "-n", 3, "--out", "set/").status == 2
    run("sample", "noto", "-m", models / "styled", "-n", 3, "--steps", 1, "--out", "set/").fine()


def test_a_defect_is_status_3_and_debugging_shows_where(run, monkeypatch):
    def broken():
        raise AssertionError("two\nlines")

    monkeypatch.setattr("sfumato.recipes.papers", broken)
    found = run("papers")
    assert found.status == 3 and "a defect of sfumato: AssertionError: two lines" in found.stderr
    assert "Traceback" in subprocess_of("sample", "-m", "nowhere", SFUMATO_DEBUG="1").stderr
    assert "Traceback" not in subprocess_of("sample", "-m", "nowhere").stderr


def subprocess_of(*args: str, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sfumato", *args]
    return subprocess.run(command, env={**environment(), **more}, capture_output=True, text=True, check=False)


def test_help_and_version_need_no_torch():
    code = "import sys, sfumato.cli; from typer.testing import CliRunner as R; r = R().invoke(sfumato.cli.app, ['--help']);"
    code += "print(r.exit_code, 'reproduce' in r.stdout, sorted({'torch', 'numpy', 'PIL', 'rich.progress'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0 True []"


def test_the_bare_command_is_help_and_version_is_the_packages(run):
    import sfumato

    assert run().status == 0 and "sample" in run().stdout
    assert run("--version").stdout == f"sfumato {sfumato.__version__}\n"


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m sfumato papers | head -n 1; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1] == "0" and found.stderr == ""


def test_a_reader_that_left_before_the_first_word_is_no_error():
    for args in (["papers", "--json"], ["papers"], ["--version"]):
        command = [sys.executable, "-m", "sfumato", *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=environment(), **pipes) as process:
            process.stdout.close()
            assert (process.stderr.read(), process.wait()) == (b"", 0), args


def test_an_error_of_a_worker_is_the_users_as_in_one_process():
    from sfumato.cli._launch import launched

    for processes in (1, 2):
        with pytest.raises(InputError, match="^four is too many$"):
            launched(refuse, processes, 4)


def refuse(n):
    raise InputError("four is too many")


def wait_for(path, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


SMALL = [
    "size=8",
    "network.width=8",
    "network.multipliers=[1]",
    "network.blocks=1",
    "network.attention=true",
    "batch=8",
]


OPTIONS = ["train", "--data", "digits", *(word for item in SMALL for word in ("--set", item))]
SCHEDULE = ["--set", "save_every=1000", "--set", "log_every=5"]


def interrupted(tmp_path, start, number):
    """The folder of a training that a signal ended."""
    process = start(*OPTIONS, *SCHEDULE, "--out", "cut", "--set", "steps=100000")
    wait_for(tmp_path / "cut" / "metrics.jsonl", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    assert not [p for p in (tmp_path / "cut").rglob("*") if p.suffix in (".part", ".tmp")]
    return tmp_path / "cut"


def test_a_terminated_training_saves(tmp_path, start):
    interrupted(tmp_path, start, signal.SIGTERM)


def test_an_interrupted_training_saves_and_goes_on_bit_for_bit(tmp_path, start, run):
    from sfumato.training import checkpoint

    at = checkpoint.read(interrupted(tmp_path, start, signal.SIGINT) / "checkpoint.safetensors")["it"]
    run("train", "--out", "cut", "--resume", "--set", f"steps={at + 3}").fine()
    run(*OPTIONS, *SCHEDULE, "--out", "whole", "--set", f"steps={at + 3}").fine()
    weights = [(tmp_path / name / "pipeline" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


def test_interrupted_shards_go_on_and_come_out_the_same(tmp_path, start, run, models):
    command = ["sample", "noto", "-m", models / "styled", "-n", 8 * 1024, "--steps", 1]
    process = start(*command, "--out", "cut/")
    wait_for(tmp_path / "cut" / ".work" / "00000" / "index.json", process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and not (tmp_path / "cut" / "index.json").exists()
    assert run(*command, "--out", "cut/").status == 0
    assert run(*command, "--out", "whole/").status == 0
    names = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert names == [*(f"{i:05d}.safetensors" for i in range(8)), "index.json"]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert run("sample", "fluent", *command[2:], "--out", "cut/").status == 2
