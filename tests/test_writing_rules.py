"""docs/writing-rules.md does what it says; rules of other packages are found, or left out."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from graphopt.passes import rules as registry
from graphopt.report import Report
from graphopt.rules import RULES
from tests import graphs

PAGE = graphs.ROOT / "docs" / "writing-rules.md"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of the page: its language, the file it is written to, its text."""

    language: str
    file: str
    text: str


def blocks() -> list[Block]:
    return [Block(*match.groups()) for match in BLOCK.finditer(PAGE.read_text("utf-8"))]


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    """Rules registered by a test, and modules imported by it, are gone after it."""
    known, modules, path = dict(RULES), set(sys.modules), list(sys.path)
    registry.plugins.cache_clear()
    yield
    for name in set(RULES) - set(known):
        del RULES[name]
    for module in set(sys.modules) - modules:
        if module.startswith("acme"):
            del sys.modules[module]
    sys.path[:] = path
    registry.plugins.cache_clear()


def install(folder: Path, entries: str, name: str = "acme-rules") -> None:
    """A distribution with entry points of the group, as an installer leaves it."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{entries}\n")


def run(command: str, folder: Path) -> str:
    """A command in the folder, with the distributions in it installed."""
    words = command.split()
    assert words[0] == "graphopt"
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def execute(source: str, scope: dict[str, object]) -> str:
    """What a block of Python prints; names stay for the blocks after it."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(source, PAGE.name, "exec"), scope)
    return output.getvalue()


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    scope: dict[str, object] = {"__name__": "__main__"}
    printed = json = ""
    for block in blocks():
        if block.file:
            (tmp_path / block.file).write_text(block.text, "utf-8")
        if block.language == "python" and not block.file:
            printed = execute(block.text, scope)
        elif block.language == "text":
            assert plain(block.text) == plain(printed)
        elif block.language == "toml":
            stated = tomllib.loads(block.text)["project"]
            entries = stated["entry-points"][registry.ENTRY_POINTS]
            install(tmp_path, "\n".join(f"{k} = {v}" for k, v in entries.items()), stated["name"])
        elif block.language == "console":
            command, _, wanted = block.text.partition("\n")
            shown = run(command.removeprefix("$ "), tmp_path)
            if "--json" in command:
                json = shown
            else:
                assert plain(shown) == plain(wanted)
    steps = Report.model_validate_json(json).passes
    assert "fold-matmul-scale" in [change.rule for step in steps for change in step.changes]
    languages = [block.language for block in blocks()]
    assert [languages.count(kind) for kind in ("python", "text", "toml", "console")] == [5, 3, 1, 2]


# -- entry points ----------------------------------------------------------------------------------

RULE = '''
from graphopt.rules import Ops, Rewrite, Var, rule

def register():
    @rule("{name}", sample={{"x": (2, 3)}})
    def double_sigmoid(op: Ops, x: Var) -> Rewrite:
        """Sigmoid(x) => Sigmoid(x), for nothing."""
        yield op.Sigmoid(x)
        return x
{more}
'''


def module(folder: Path, file: str, more: str = "", name: str = "acme-rule") -> None:
    (folder / f"{file}.py").write_text(RULE.format(name=name, more=more), "utf-8")


def test_entry_point_callable(tmp_path: Path) -> None:
    module(tmp_path, "acme_callable")
    install(tmp_path, "acme = acme_callable:register")
    sys.path.insert(0, str(tmp_path))
    assert registry.plugins() == registry.Plugins(frozenset({"acme-rule"}), ())
    assert registry.family_of(registry.all_rules()["acme-rule"]) == "fusion"
    assert "acme-rule" in [rule.name for rule in registry.chosen("all", "fusion")]
    assert "acme-rule" not in [rule.name for rule in registry.chosen("all", "canonicalize")]


def test_entry_points_load_once(tmp_path: Path) -> None:
    module(tmp_path, "acme_once", more="register()")
    install(tmp_path, "acme = acme_once")
    sys.path.insert(0, str(tmp_path))
    assert registry.plugins() is registry.plugins()
    assert registry.plugins().rules == {"acme-rule"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("register(); raise RuntimeError('out of\\nmilk')", "out of milk"),
        ("import acme_that_is_not_there", "No module named 'acme_that_is_not_there'"),
        ("register(); register()", "rule 'acme-rule' is defined twice"),
        ("raise ZeroDivisionError", "ZeroDivisionError"),
    ],
)
def test_failing_entry_point_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: str, reason: str
) -> None:
    module(tmp_path, "acme_bad", more=more)
    module(tmp_path, "acme_good", more="register()", name="acme-other")
    install(tmp_path, "bad = acme_bad", "acme-bad")
    install(tmp_path, "good = acme_good", "acme-good")
    sys.path.insert(0, str(tmp_path))
    with caplog.at_level("WARNING", "graphopt"):
        found = registry.plugins()
    line = f"rules of acme-bad (acme_bad) are left out: {reason}"
    assert found == registry.Plugins(frozenset({"acme-other"}), (line,))
    assert caplog.messages == [line]
    assert "acme-rule" not in RULES


def test_rule_of_the_same_name_does_not_replace(tmp_path: Path) -> None:
    module(tmp_path, "acme_twin", more="register()", name="eliminate-identity")
    install(tmp_path, "acme = acme_twin")
    sys.path.insert(0, str(tmp_path))
    own = RULES["eliminate-identity"]
    (line,) = registry.plugins().failures
    assert line.endswith("rule 'eliminate-identity' is defined twice")
    assert RULES["eliminate-identity"] is own


def test_command_warns(tmp_path: Path) -> None:
    module(tmp_path, "acme_bad", more="raise RuntimeError('out of milk')")
    install(tmp_path, "acme = acme_bad")
    shown = " ".join(run("graphopt passes", tmp_path).split())
    assert "rules of acme-rules (acme_bad) are left out: out of milk" in shown
