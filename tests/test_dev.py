"""dev.py and the vendored JavaScript: they recover from what goes wrong, and say it in one line."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, module


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """dev.py at work in an empty project, its set-up commands noted instead of run."""
    dev = module("dev.py")
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    venv, build = tmp_path / ".venv", tmp_path / "_build"
    moved = dict(ROOT=tmp_path, VENV=venv, BUILD=build, BIN=venv / dev.BIN.name, HTML=build / "html")
    moved.update(STAMP=venv / "complete", LOG=build / "setup.log", calls=[])
    for name, value in moved.items():
        monkeypatch.setattr(dev, name, value, raising=False)
    monkeypatch.setattr(dev.subprocess, "call", lambda command, **_: pretend(dev, command))
    return dev


def pretend(dev, command) -> int:
    """Note a command; `venv` makes its Python, as the real one would."""
    dev.calls.append(" ".join(command))
    if "venv" in command:
        dev.BIN.mkdir(parents=True)
        (dev.BIN / ("python.exe" if sys.platform == "win32" else "python")).touch(0o755)
    return 0


def failing(dev, monkeypatch, text: str) -> None:
    """Let pip fail after printing `text`."""

    def call(command, stdout=None, **_):
        if "pip" in command:
            stdout.write(text.encode())
            return 1
        return pretend(dev, command)

    monkeypatch.setattr(dev.subprocess, "call", call)


def test_setup_runs_once(dev):
    assert dev.main(["setup"]) == 0
    first = len(dev.calls)
    assert first == 3
    assert dev.main(["setup"]) == 0
    assert len(dev.calls) == first


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock"])
def test_setup_is_redone_when_a_file_it_depends_on_changes(dev, name):
    dev.main(["setup"])
    (dev.ROOT / name).write_text("# new\n" + (dev.ROOT / name).read_text())
    assert not dev.is_current()
    dev.main(["setup"])
    assert dev.is_current()


def test_settings_of_tools_need_no_new_setup(dev):
    dev.main(["setup"])
    with (dev.ROOT / "pyproject.toml").open("a") as file:
        file.write("\n[tool.other]\nkey = 1\n")
    assert dev.is_current()


def test_setup_is_redone_when_its_python_is_gone(dev):
    dev.main(["setup"])
    for python in dev.BIN.iterdir():
        python.unlink()
    assert not dev.is_current()


def test_an_interrupted_setup_is_taken_up_by_the_next_call(dev, monkeypatch, capsys):
    def interrupted(command, **_):
        if "pip" in command:
            raise KeyboardInterrupt
        return pretend(dev, command)

    with monkeypatch.context() as patch:
        patch.setattr(dev.subprocess, "call", interrupted)
        assert dev.main(["test"]) == 130
    assert capsys.readouterr().err == "dev.py: interrupted; the next call takes up from here\n"
    (dev.VENV / "half").touch()
    assert not dev.is_current()
    assert dev.main(["setup"]) == 0
    assert dev.is_current()
    assert not (dev.VENV / "half").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Retrying after connection broken by 'NewConnectionError'", "cannot be reached: check the network"),
        ("OSError: [Errno 28] No space left on device", "the disk is full: free about 10 GB"),
        ("anything else", "its output says why"),
    ],
)
def test_a_failing_pip_is_one_line_with_its_reason_and_log(dev, monkeypatch, capsys, text, reason):
    failing(dev, monkeypatch, text)
    assert dev.main(["test"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert reason in message
    assert str(dev.LOG) in message
    assert text in dev.LOG.read_text()
    assert not dev.is_current()


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 1), (3, 13, 0)])
def test_another_python_is_named_with_what_to_do(dev, monkeypatch, version):
    found = rf"expected Python 3\.10 to 3\.12, found 3\.{version[1]}: "
    monkeypatch.setattr(dev.shutil, "which", {"python3.11": "somewhere"}.get)
    with pytest.raises(dev.SetupError, match=found + r"run `python3\.11 dev\.py"):
        dev.check_python(version)
    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    with pytest.raises(dev.SetupError, match=found + "install one of these"):
        dev.check_python(version)


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 9)])
def test_supported_pythons_pass(dev, version):
    assert dev.check_python(version) is None


def test_a_missing_ensurepip_is_named_and_nothing_is_removed(dev, monkeypatch, capsys):
    dev.VENV.mkdir()
    (dev.VENV / "old").touch()
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert dev.main(["setup"]) == 2
    assert "lacks its module ensurepip: on Debian, apt install python3-venv" in capsys.readouterr().err
    assert (dev.VENV / "old").exists()


def test_a_full_disk_is_one_line(dev, monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dev, "make_venv", full)
    assert dev.main(["setup"]) == 2
    assert "No space left on device: make room" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["book", "--all"], ["book", "--execute", "x"], ["serve", "http"], ["serve", "1", "2"]]
)
def test_wrong_arguments_are_named_before_any_setup(dev, capsys, argv):
    assert dev.main(argv) == 2
    assert f"found `{' '.join(argv)}`" in capsys.readouterr().err
    assert dev.calls == []


def test_arguments_of_test_reach_pytest_which_shares_the_cores(dev, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = []
    monkeypatch.setattr(dev, "tool", lambda *args, **env: given.append((args, env)) or 0)
    for cores, workers, threads in ((1, "1", "1"), (2, "2", "1"), (32, "4", "8")):
        monkeypatch.setattr(dev.os, "cpu_count", lambda cores=cores: cores)
        assert dev.main(["test", "-k", "merge"]) == 0
        words = ("python", "-m", "pytest", "-n", workers, "--dist", "loadfile", "--nbval", "-k", "merge")
        assert given[-1] == (words, {"OMP_NUM_THREADS": threads})
    assert dev.main(["test", "--quick", "-x"]) == 0
    assert given[-1][0][7:] == (*dev.QUICK, "-x")
    assert all((ROOT / name).exists() for name in dev.QUICK)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    dev.main(["test"])
    assert given[-1][1] == {"OMP_NUM_THREADS": "3"}


def test_book_shows_committed_outputs_unless_told_to_execute(dev, monkeypatch):
    modes = []
    monkeypatch.setattr(dev, "tool", lambda name, *args, **env: modes.extend(env.values()) or 0)
    assert dev.main(["book"]) == dev.main(["book", "--execute"]) == dev.main(["book", "--full"]) == 0
    assert modes == ["off", "force", "force", "full"]


def test_help_and_unknown_commands_show_the_commands(dev, capsys):
    assert dev.main(["--help"]) == 0
    assert dev.main(["bok"]) == 2
    assert capsys.readouterr().out.count("python3 dev.py book [--execute | --full]") == 2


def test_dev_py_has_no_syntax_newer_than_python_3_6():
    import ast

    ast.parse((ROOT / "dev.py").read_text(), feature_version=(3, 6))


# --- the pages' JavaScript


@pytest.fixture
def vendored(tmp_path, monkeypatch):
    """book/_ext/vendored.py at work in a project whose npm installs one small file of each kind."""
    vendored = module("book/_ext/vendored.py")
    (tmp_path / "package-lock.json").write_text("{}")
    monkeypatch.setattr(vendored, "ROOT", tmp_path)
    monkeypatch.setattr(vendored, "VENDOR", tmp_path / "book" / "_static" / "vendor")
    monkeypatch.setattr(vendored, "npm_ci", lambda: install(vendored))
    return vendored


def install(vendored) -> int:
    """What npm would do: every file that FILES asks for, each holding one byte."""
    for pattern in vendored.FILES:
        path = vendored.ROOT / "node_modules" / pattern.replace("*", "one")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return 0


def test_vendored_files_are_copied_once_per_lock(vendored, monkeypatch):
    assert vendored.main() == 0
    assert vendored.is_current()
    assert (vendored.VENDOR / "embed.js").exists()
    assert (vendored.VENDOR / "mathjax" / "tex-svg.js").exists()
    with monkeypatch.context() as patch:
        patch.setattr(vendored, "npm_ci", lambda: pytest.fail("npm was run again"))
        assert vendored.main() == 0
    (vendored.ROOT / "package-lock.json").write_text('{"new": 1}')
    assert not vendored.is_current()
    assert vendored.main() == 0
    assert vendored.is_current()


@pytest.mark.parametrize("given", ["configured", "environment", ""])
def test_launch_buttons_come_with_the_repositorys_address(given, vendored, monkeypatch):
    url = "https://github.com/x/y"
    monkeypatch.setenv("DSLIB_REPOSITORY", url if given == "environment" else "")
    options = {"repository_url": url if given == "configured" else ""}
    config = SimpleNamespace(nb_execution_mode="off", html_static_path=[], html_theme_options=options)
    vendored.configure(None, config)
    assert (config.html_theme_options.get("launch_buttons") is not None) == bool(given)
    assert config.html_theme_options["repository_url"] == (url if given else "")


def test_without_npm_the_build_goes_on_with_a_line(vendored, monkeypatch, capsys):
    monkeypatch.setattr(vendored, "npm_ci", lambda: 1)
    assert vendored.main() == 1
    assert "npm could not install package-lock.json" in capsys.readouterr().out
    assert not vendored.is_current()


def test_the_labs_files_are_made_once_and_never_by_halves(tmp_path, monkeypatch, capsys):
    lab = module("book/_ext/lab.py")
    monkeypatch.setattr(lab, "LAB", tmp_path / "lab")
    made = []
    monkeypatch.setattr(lab, "export_all", lambda folder: made.append((folder / "x.onnx").write_text("x")))
    assert lab.main() == lab.main() == 0
    assert made == [1]
    assert (tmp_path / "lab" / "x.onnx").exists()
    monkeypatch.setattr(lab, "wanted", lambda: "of other networks")
    monkeypatch.setattr(lab, "export_all", lambda folder: (folder / "y.onnx").write_text(1))
    assert lab.main() == 1
    assert "the browser lab's networks could not be exported" in capsys.readouterr().out
    assert not (tmp_path / "lab").exists()  # none is better than those of other networks


# --- the line a shell sees


def test_a_shell_gets_one_line_and_status_2():
    done = subprocess.run([sys.executable, ROOT / "dev.py", "serve", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "dev.py: expected `serve` or `serve PORT`, found `serve x`\n"
