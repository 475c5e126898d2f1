"""Every benchmark says what it measures and how long that takes before it measures anything."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

COMMANDS = sorted(path for path in Path("benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--unheard-of", 2)])
def test_it_answers_at_once(
    path: Path, argument: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == code
    said = capsys.readouterr()
    if code == 0:
        assert "It takes" in said.out
        assert len(said.out.split()) > 30
    else:
        assert "--unheard-of" in said.err
