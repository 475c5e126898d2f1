"""What a job can say is printed from the sections themselves: every key has its meaning, and none is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console, RenderableType

from pipeline.cli import cli
from pipeline.job import Job
from pipeline.job_sections import Section
from pipeline.registry import families, sources, statistics
from pipeline.report import dictionary
from pipeline.report.keys import Entry, Key, entries, explained

KNOWN = [(kind, one) for kind, listed in entries().items() for one in listed]


@pytest.mark.parametrize(("kind", "entry"), KNOWN, ids=lambda one: getattr(one, "name", one))
def test_every_key_is_explained(kind: str, entry: Entry) -> None:
    for key in entry.keys:
        is_a_section = kind == "sections" and key.name in [one.name for of, one in KNOWN if of == kind]
        assert key.meaning or is_a_section or f"`{key.name}`" in entry.meaning, f"{entry.name}: {key.name}"
        assert "typing" not in key.type
        assert "class" not in key.type


def test_all_that_a_job_can_name_is_there() -> None:
    named = {kind: [one.name for one in listed] for kind, listed in entries().items()}
    assert named["sources"] == list(sources())
    assert named["families"] == list(families())
    assert named["statistics"] == list(statistics())
    sections = {one.__name__ for one in Section.__subclasses__()}
    assert sections == {"Job", "Numerics", "Columns", "DataSpec", "ModelSpec", "SiteSelection", "Resources"}
    (job,) = (one for one in entries()["sections"] if one.name == "job")
    assert [key.name for key in job.keys] == list(Job.model_fields)


def shown(*arguments: Any) -> str:
    answer = CliRunner().invoke(cli, ["keys", *arguments], env={"COLUMNS": "120"})
    assert answer.exit_code == 0, answer.output
    return answer.output


def test_keys_are_shown_with_type_default_and_meaning() -> None:
    lines = [line.split() for line in shown("tabular").splitlines()]
    assert ["standardise", "true", "or", "false", "true"] in [line[:5] for line in lines]
    assert "[statistics.template]" in shown("template")
    assert "whitened_fan_in" in shown("template")
    assert "composition" in shown()


LONG = "Σ(z_p−z̄)(z_{p+1}−z̄′)/√(Σ(z_p−z̄)²Σ(z_{p+1}−z̄′)²)" * 3
COLUMN = {"column": "a", "type": "b", "unit": "1", "range": "any", "null": "", "source": ""}


@pytest.mark.parametrize(
    ("printed", "times"),
    [
        (dictionary.explained([COLUMN | {"meaning": "c", "formula": LONG}]), 1),
        (explained(Entry("a", "[a]", "b", (Key("key", LONG, LONG, LONG),))), 3),
    ],
    ids=["tables", "keys"],
)
def test_a_long_word_is_folded_and_not_cut(printed: RenderableType, times: int) -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(printed)
    said = captured.get()
    assert "…" not in said
    assert {one: said.count(one) for one in "Σ√²+"} == {one: times * LONG.count(one) for one in "Σ√²+"}


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    answer = CliRunner().invoke(cli, ["keys", "tabulr"])
    assert answer.exit_code == 2
    assert "there is nothing 'tabulr' in a job: did you mean 'tabular'? known: " in answer.output
