"""The runner of all experiments: rows once, one process a folder, errors and signals in one line."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compress, evaluate, flags, minilm, prune, runner, workdir
from experiments.claims import lenet
from experiments.quantization import training

REPOSITORY = Path(__file__).parent.parent


class Counting:
    """Rows of nothing but a number; ``stop`` says what happens at it."""

    keys = ("n",)

    def __init__(self, folder, numbers=3, stop=None):
        self.setting = {"config": {}}
        self.workdir, self.numbers, self.stop, self.made = Path(folder), numbers, stop or {}, []

    def todo(self):
        return ({"n": n} for n in range(self.numbers))

    def measure(self, rows, n):
        if n in self.stop:
            self.stop[n]()
        self.made.append(n)
        return {"square": n * n, "before": len(rows)}

    def line(self, row):
        return str(row["n"])

    def finish(self, rows):
        return " ".join(str(row["square"]) for row in rows), len(rows)


def raising(error):
    def stop():
        raise error

    return stop


def send(number):
    return lambda: os.kill(os.getpid(), number)


def numbers(folder):
    return [json.loads(line)["n"] for line in (folder / "results.jsonl").read_text().splitlines()]


class TestRows:
    def test_rows_are_made_once(self, tmp_path):
        assert runner.run(Counting(tmp_path)) == "0 1 4"
        again = Counting(tmp_path, 4)
        assert runner.run(again) == "0 1 4 9"
        assert again.made == [3]
        assert numbers(tmp_path) == [0, 1, 2, 3]

    def test_doubled_rows_count_once(self, tmp_path):
        """As two runs at once once wrote them: the first of each counts, so deviations over seeds stay right."""
        lines = [{"n": n, "square": n * n} for n in (0, 0, 1, 1)]
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        found = workdir.Rows(tmp_path / "results.jsonl", ("n",))
        assert [row["n"] for row in found] == [0, 1]
        assert runner.run(Counting(tmp_path)) == "0 1 4"

    def test_torn_last_line_is_dropped(self, tmp_path):
        path = tmp_path / "results.jsonl"
        path.write_text('{"n": 0}\n{"n": 1')
        found = workdir.Rows(path, ("n",))
        found.add({"n": 2})
        assert [row["n"] for row in workdir.Rows(path, ("n",))] == [0, 2]

    @pytest.mark.parametrize("line", ['{"n": 1', "[1]", '{"m": 1}', "3"])
    def test_damage_elsewhere_is_named(self, tmp_path, line):
        path = tmp_path / "results.jsonl"
        path.write_text(line + '\n{"n": 2}\n')
        with pytest.raises(ValueError, match=r"results.jsonl: line 1 is no JSON object with n"):
            workdir.Rows(path, ("n",))

    def test_a_full_disk_leaves_whole_rows(self, tmp_path, monkeypatch):
        """Half of a row is written, then the disk is full: the half is taken back."""
        found, write = workdir.Rows(tmp_path / "results.jsonl", ("n",)), os.write
        found.add({"n": 0})
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:4]))
        with pytest.raises(OSError, match="No space left"):
            found.add({"n": 1})
        monkeypatch.undo()
        assert numbers(tmp_path) == [0] and len(found) == 1


HOLD = """
import sys
from pathlib import Path
from experiments.workdir import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestTwoRunsInOneFolder:
    @pytest.fixture
    def other(self, tmp_path):
        """Another process with the lock of a folder."""
        program = [sys.executable, "-c", HOLD, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(program, cwd=REPOSITORY, text=True, **pipes) as process:
            assert process.stdout.readline() == "held\n"
            yield process
            process.kill()

    def test_the_second_is_refused(self, tmp_path, other, capsys):
        assert runner.main(lambda signals: Counting(tmp_path), overwrite=True) == 2
        complaint = capsys.readouterr().err
        assert f"in use by another run (process {other.pid})" in complaint and complaint.count("\n") == 1
        assert not (tmp_path / "results.jsonl").exists()

    def test_the_lock_of_a_dead_process_does_not_block(self, tmp_path, other):
        other.kill()
        other.wait()
        assert runner.run(Counting(tmp_path)) == "0 1 4"


class TestErrors:
    def test_a_full_disk_is_one_line_and_the_run_continues(self, tmp_path, capsys):
        full = OSError(errno.ENOSPC, "No space left on device", "models/x.jc")
        assert runner.main(lambda signals: Counting(tmp_path, stop={1: raising(full)})) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: [Errno 28] No space left") and complaint.count("\n") == 1
        assert numbers(tmp_path) == [0]
        assert runner.run(Counting(tmp_path)) == "0 1 4"

    def test_a_fault_of_the_code_keeps_its_traceback(self, tmp_path):
        with pytest.raises(ValueError, match="wrong"):
            runner.main(lambda signals: Counting(tmp_path, stop={1: raising(ValueError("wrong"))}))

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_is_one_line_and_the_run_continues(self, tmp_path, capsys, number, code):
        assert runner.main(lambda signals: Counting(tmp_path, stop={1: send(number)})) == code
        complaint = capsys.readouterr().err
        assert "to continue: python" in complaint and complaint.count("\n") == 1
        assert numbers(tmp_path) == [0]
        assert runner.run(Counting(tmp_path)) == "0 1 4"
        assert len(json.loads((tmp_path / "record.json").read_text())["runs"]) == 2

    def test_a_deferred_signal_waits_for_the_check_and_a_second_does_not(self):
        with runner.Signals() as signals:
            with pytest.raises(runner.Interrupted), signals.deferred():
                os.kill(os.getpid(), signal.SIGINT)
                seen = signals.received
                signals.check()
            assert seen == signal.SIGINT
            with pytest.raises(runner.Interrupted):
                os.kill(os.getpid(), signal.SIGINT)


COMMANDS = {
    "compress": (compress.main, []),
    "prune": (prune.main, []),
    "minilm": (minilm.main, ["--model_dir=nowhere", "--data_dir=nowhere"]),
    "training": (training.main, []),
    "lenet": (lenet.main, []),
    "evaluate": (evaluate.main, ["--model=nowhere.jc"]),
}


class TestFlags:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_help(self, name, capsys):
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[name][0](["--help"])
        assert stopped.value.code == 0
        assert "--data_dir" in capsys.readouterr().out

    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("wrong", ["--nosuch=1", "nosuch"])
    def test_unknown_flags(self, name, wrong, capsys):
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[name][0]([*COMMANDS[name][1], wrong])
        complaint = capsys.readouterr().err
        assert stopped.value.code == 2
        assert complaint.startswith("error: ") and "nosuch" in complaint and complaint.count("\n") == 1

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("--config.nosuch=1", "--config.nosuch: config has no field 'nosuch'; it has name, data"),
            ("--config.epochs.much=1", "config has no such field"),
            ("--config.epochs=many", "--config.epochs=many: expected a value such as 40.0"),
            ("--config.seeds=1.5", "--config.seeds=1.5: expected a value such as 3"),
            ("--config.seeds=", "expected a value such as 3"),
            ("--config.ways=int8", "expected a value such as int8,int4"),
            ("--config=nowhere.py", "--config=nowhere.py: no such file"),
            (f"--config={REPOSITORY / 'README.md'}", "SyntaxError"),
            (f"--config={REPOSITORY / 'tests/conftest.py'}", "has no function get_config()"),
        ],
    )
    def test_wrong_values(self, wrong, message, capsys):
        with pytest.raises(SystemExit) as stopped:
            compress.main([wrong])
        complaint = capsys.readouterr().err
        assert stopped.value.code == 2
        assert complaint.startswith("error: ") and message in complaint and complaint.count("\n") == 1

    def test_values(self):
        parser = flags.parser("", "")
        argv = ["--config.seeds=5", "--config.models=cnn,lenet5", "--config.only", "int8,svd", "--overwrite"]
        argv += ["--config.model_options.cnn.width=8", "--config.learning_rate=1e-3"]
        args, config = flags.parse(parser, compress.config_of, argv)
        assert args.overwrite
        assert (config.seeds, config.models, config.only) == (5, ("cnn", "lenet5"), "int8,svd")
        assert (config.model_options, config.learning_rate) == ({"cnn": {"width": 8}}, 1e-3)
        _, config = flags.parse(parser, prune.config_of, ["--config.ways=('random','RigL')", "--config.data=text"])
        assert config.ways == ("random", "RigL") and config.name == "text"

    @pytest.mark.parametrize("name", ["compress", "prune", "training", "lenet"])
    def test_unknown_folder_of_data(self, name, capsys, tmp_path):
        mnist = ["--tasks", "mnist"] if name == "training" else ["--config.data=mnist"]
        mnist = ["--data", "mnist"] if name == "lenet" else mnist
        assert COMMANDS[name][0]([*mnist, "--data_dir=nowhere", f"--workdir={tmp_path}/w"]) == 2
        complaint = capsys.readouterr().err
        assert "nowhere: no such folder" in complaint and complaint.count("\n") == 1
        assert not (tmp_path / "w").exists()

    def test_other_wrong_values(self, capsys):
        for main, argv in ((lenet.main, "--splits=0"), (training.main, "--seeds=x"), (training.main, "--tasks=x")):
            with pytest.raises(SystemExit) as stopped:
                main([argv])
            assert stopped.value.code == 2
            assert capsys.readouterr().err.count("\n") == 1
        assert training.main(["--only=nothing"]) == 2
        assert "no way has this in its name" in capsys.readouterr().err


def test_the_command_says_it_in_one_line_too():
    """In a process of its own, since a traceback may also come from how the module is run."""
    program = [sys.executable, "-m", "experiments.compress", "--config.nosuch=1"]
    ran = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1


def test_an_install_brings_the_library_alone():
    import tomllib

    found = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert found["include"] == ["jcompress*"]
