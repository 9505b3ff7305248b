"""``patchcert reproduce``: published beside measured, in the terminal and as pages; running what has no record."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from refusals import check_refused

from patchcert_cli import papers
from patchcert_cli.catalog import bundled


@pytest.fixture
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zoo of two models, without the results that rows of these tests ask for."""
    for name in ("cifar-bagcert-rf7", "imagenet-patchcleanser-efficientnet-lite0"):
        shutil.copytree(bundled.folder() / name, tmp_path / "zoo" / name)
        card = bundled.card(name)
        results = tuple(one for one in card.results if "condition" not in one.method)
        samples = tuple(one for one in card.samples if str(one.threat) == "patch:2%")
        named = {one.records for one in samples}
        files = {file: facts for file, facts in card.files.items() if not file.startswith("sample-") or file in named}
        changed = replace(card, results=results, samples=samples, files=files)
        (tmp_path / "zoo" / name / "README.md").write_text(changed.render())
    monkeypatch.setenv("PATCHCERT_ZOO", str(tmp_path / "zoo"))


def test_the_list_and_one_paper(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("reproduce")
    assert done.code == 0 and all(name in done.out for name in papers.names())
    assert [one["name"] for one in json.loads(patchcert("reproduce", "--json", "-").out)] == papers.names()
    done = patchcert("reproduce", "chiang-2020", "--table", "best")
    assert done.code == 0 and not done.err
    assert re.search(r"MNIST 5x5 .* 93\.81 / 61\.85 .* 94\.42 / 65\.13 .* 10000 .* \+0\.61 / \+3\.28 .* reached", done.out)
    assert "read: The README and the code" in done.out and "A compact network" in done.out
    value = json.loads(patchcert("reproduce", "chiang-2020", "--table", "best", "--json", "-").out)
    (table,) = value["papers"][0]["tables"]
    row = next(row for row in table["rows"] if row["name"] == "MNIST 5x5")
    assert row["measured"]["certified"] == 6513 and row["published"]["certified"] == 0.6185 and row["verdict"] == "reached"
    assert row["difference"] == {"clean": pytest.approx(0.0061), "certified": pytest.approx(0.0328)}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("chiang-2021", 3, "Did you mean chiang-2020"),
        ("nobody", 3, "Known: chiang-2020, levine-2020, metzen-2021, xiang-2022."),
        ("chiang-2020 --table worst", 3, "no table of chiang-2020 'worst'"),
        ("chiang-2020 xiang-2022 --table best", 2, "--table is of one paper"),
        ("--run", 2, "no paper is named"),
        ("chiang-2020 --limit 5", 2, "--limit says how rows are certified. hint: Add --run"),
        ("chiang-2020 --out /proc/nowhere/site", 7, "nothing can be"),
        ("chiang-2020 --run --data imagefolder:./val", 2, "none of them has to be run"),
        ("xiang-2022 --table imagenet-samples --run --data imagefolder:./none", 6, "'none'"),
        ("metzen-2021 --table conditions --run --limit 0", 2, "--limit 0 leaves no image"),
    ],
)
def test_bad_input_is_one_clear_line(patchcert, unmeasured, words: str, code: int, said: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("reproduce", *words.split())
    assert done.code == code
    first = done.err[done.err.index("error[") :].split("error[")[1]
    for part in said.split(" hint: "):
        assert part in first
    if code != 6:
        check_refused(done.err, code)


def test_a_run_without_images_says_which_flag_names_them(patchcert, unmeasured) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("reproduce", "xiang-2022", "--table", "imagenet-samples", "--run")
    assert done.code == 6 and "EfficientNet-Lite0, 2 %" in done.out  # what is on record is still shown
    assert "no images for its rows about ImageNet" in done.err and "--data imagefolder:" in done.err


def test_models_that_are_not_in_the_zoo_are_named(patchcert, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATCHCERT_ZOO", str(Path.cwd()))
    done = patchcert("reproduce", "chiang-2020", "--table", "best", "--run")
    assert done.code == 0 and "The zoo has no model mnist-ibp-p5-muon yet" in done.out and "nothing to run" in done.err


def test_rows_without_a_record_are_certified_and_resumed(patchcert, unmeasured) -> None:  # type: ignore[no-untyped-def]
    words = ("reproduce", "metzen-2021", "--table", "conditions", "--run", "--limit", "3", "--json", "-")
    done = patchcert(*words)
    assert done.code == 0, done.err
    table = json.loads(done.out)["papers"][0]["tables"][0]
    exact, second, third = (row["measured"] for row in table["rows"])
    assert exact["images"] == 10_000 and second["images"] == third["images"] == 3
    assert second["method"] == "condition 3.2" and second["certified"] >= third["certified"]
    assert second["about"] == "not all of cifar10 test" and Path(second["source"]).is_file()
    assert table["gaps"][0]["measured"] == (second["certified"] - third["certified"]) / 3
    before = Path(second["source"]).read_bytes()
    assert json.loads(patchcert(*words).out)["papers"][0]["tables"][0] == table and Path(second["source"]).read_bytes() == before


def test_a_folder_gets_pages_with_published_and_measured_points_in_one_chart(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("reproduce", "metzen-2021", "--table", "sizes", "--out", "site")
    names = ["metzen-2021.html", "metzen-2021.md", "metzen-2021-sizes.svg"]
    assert done.code == 0 and done.out.splitlines()[-3:] == [f"site/{name}" for name in names]
    page, text, svg = ((Path("site") / name).read_text() for name in names)
    bare = re.sub(r"<style>.*?</style>", "", page.removeprefix("<!DOCTYPE html>\n"), flags=re.DOTALL)
    tree = ElementTree.fromstring(re.sub(r"<(meta\b[^>]*)>", r"<\1/>", bare))
    drawn = {one.get("data-name") for one in tree.iter() if one.get("class") == "model"}
    models = {"cifar-bagcert-rf7", "cifar-smoothing-column"}
    assert drawn == models | {f"published, beside {name}" for name in models}
    assert (
        "77.80 / 34.07" in page
        and "86.00 / 60.00" in page
        and "<script" not in page
        and "http" not in bare.replace("http-equiv", "")
    )
    assert "![Patch sizes 1 to 10](metzen-2021-sizes.svg)" in text and "| BagCert, 5x5 | patch:5x5 |" in text
    assert svg.count("<path") > 20 and "patchcert reproduce" in svg
    assert patchcert("reproduce", "metzen-2021", "--table", "sizes", "--out", "site").code == 0  # its own files are replaced
    assert [(Path("site") / name).read_text() for name in names] == [page, text, svg]
    Path("site/metzen-2021.md").write_text("mine")
    done = patchcert("reproduce", "metzen-2021", "--table", "sizes", "--out", "site")
    check_refused(done.err, 2, "was not written by this command", "--force")
    assert Path("site/metzen-2021.md").read_text() == "mine"


def test_records_are_shown_without_torch() -> None:
    program = (
        "import sys; sys.argv = ['patchcert', 'reproduce', 'chiang-2020', '--table', 'rectangles', '-q']\n"
        "from patchcert_cli.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print({'torch', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
