"""Papers as data: what may be published, and that every measured number follows from records."""

from __future__ import annotations

import gzip
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from patchcert_cli import papers, schema
from patchcert_cli.cards import weights_sha256
from patchcert_cli.catalog import bundled
from patchcert_cli.cli import main
from patchcert_cli.errors import ClaimError, IntegrityError, UnknownName
from patchcert_cli.papers import fill, times, trained
from patchcert_cli.papers.paper import Paper
from patchcert_cli.reporting import papers as texts
from patchcert_cli.threats import parse_threat

ROOT = Path(__file__).parents[2]
# Typed a second time from the notes on the papers: README of the code, abstract, slides, leaderboard. Nothing else is published.
CHIANG = {(0.9855, 0.9151), (0.9381, 0.6185), (0.972, 0.907), (0.9464, 0.756)}
CHIANG |= {(0.665, 0.5302), (0.478, 0.303), (0.4982, 0.327), (0.4434, 0.2821)}
COLUMN = (0.838, 0.576)
PUBLISHED = {
    "chiang-2020": CHIANG,
    "levine-2020": {COLUMN, (0.444, 0.14)},
    "metzen-2021": {COLUMN, (0.86, 0.6), (0.453, 0.227), (0.473, 0.224), (0.479, 0.201)},
    "xiang-2022": {(0.839, 0.621), (0.838, 0.616), (0.837, 0.598), (0.836, 0.594), (0.833, 0.561), (0.816, 0.53), (0.794, 0.538)},
}
SECONDS = {
    "RF 5": 39.0,
    "RF 7": 40.6,
    "RF 7, alike": 40.6,
    "RF 9": 43.2,
    "RF 11": 45.9,
    "RF 13": 48.5,
    "Column smoothing": 28.0,
}
SECONDS |= {"Block smoothing": 788.0}
SECONDS |= {
    f"RF 7, {more}": 40.6
    for more in ("wider, two looks", "framed", "768 channels, two looks, a frame", "framed, balanced", "framed, taught")
}


@pytest.fixture(scope="module")
def filled() -> dict[str, fill.FilledPaper]:
    return {name: fill.fill(papers.load(name)) for name in papers.names()}


def rows(paper: fill.FilledPaper) -> list[fill.FilledRow]:
    return [row for table in paper.tables for row in table.rows]


def test_four_papers_with_no_published_number_that_was_not_read() -> None:
    assert papers.names() == sorted(PUBLISHED)
    for name, known in PUBLISHED.items():
        given = [row.published for table in papers.load(name).tables for row in table.rows if row.published]
        assert {(one.clean, one.certified) for one in given} - {(None, None)} == known
    by_field = papers.load("metzen-2021").table("receptive-fields").rows
    assert {row.name: row.published.seconds for row in by_field if row.published and row.published.parameters} == SECONDS


def test_every_measured_number_follows_from_the_records(filled: dict[str, fill.FilledPaper]) -> None:
    """Counted here from the compressed lines, without the code that the papers are filled with."""
    contents: dict[str, list[dict]] = {}  # type: ignore[type-arg]
    checked = 0
    for one in (row for paper in filled.values() for row in rows(paper) if row.measured):
        assert one.measured is not None
        if one.row.counted or one.without_zoo:
            continue
        source = one.measured.source
        assert source.startswith(f"zoo/{one.row.model}/")
        if source not in contents:
            contents[source] = [json.loads(line) for line in gzip.decompress((ROOT / source).read_bytes()).splitlines()]
        head, *records = contents[source]
        (at,) = [
            at
            for at, claim in enumerate(head["claims"])
            if parse_threat(claim["threat"]) == one.row.threat and claim["method"] == one.measured.method
        ]
        right = [record for record in records if record["prediction"] == record["label"]]
        certified = sum(record["certified"][at] for record in right)
        assert (one.measured.images, one.measured.clean, one.measured.certified) == (len(records), len(right), certified)
        check_interval(certified, len(records), one.measured.certified_interval)
        checked += 1
    assert checked > 80


def test_rows_without_a_model_of_the_zoo_follow_from_verdicts(filled: dict[str, fill.FilledPaper]) -> None:
    """Counted here from the characters of the file, without the code that reads it."""
    kept = json.loads((ROOT / "patchcert_cli/papers/trained.json").read_text())["rows"]
    entries = {(one["command"], parse_threat(one["threat"])): one for one in kept}
    assert len(entries) == len(kept)
    used = set()
    for one in (row for paper in filled.values() for row in rows(paper) if row.without_zoo):
        entry = entries[one.row.command, one.row.threat]
        used.add((one.row.command, one.row.threat))
        measured, verdicts = one.measured, entry["verdicts"]
        assert measured is not None and entry["dataset"] == one.row.dataset
        assert (measured.images, measured.certified) == (len(verdicts), verdicts.count("2"))
        assert measured.clean == len(verdicts) - verdicts.count("0")
        assert len(verdicts) == (entry["limit"] or 10_000) and bool(measured.about) == bool(entry["limit"])
        check_interval(measured.certified, measured.images, measured.certified_interval)
    assert used == set(entries), "trained.json has rows that no paper shows"


def test_a_row_without_a_model_is_measured_once_its_command_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "FILE", tmp_path / "trained.json")
    paper = papers.load("levine-2020")
    (row,) = [row for row in paper.table("bands").rows if row.name == "Row, band 4"]

    def shown() -> fill.FilledRow:
        (one,) = [one for one in fill.fill(paper, table="bands").tables[0].rows if one.row == row]
        return one

    assert shown().measured is None and not shown().can_run and shown().command == row.command
    entry = {
        "command": row.command,
        "threat": "patch:5x5",
        "dataset": "cifar10",
        "method": "additive",
        "arithmetic": "exact",
        "model_sha256": "0" * 64,
        "network": "ResNet",
        "trained": {"date": "2026-01-01", "seconds": 90, "device": "cpu", "threads": 1, "torch": "2.6", "patchcert": "0.1.0"},
        "limit": 5,
        "seed": 0,
        "verdicts": "01212",
    }
    trained.write([schema.read(trained.TrainedRow, {**entry, "threat": "patch:4x4"})], trained.FILE)
    assert shown().measured is None  # another threat
    trained.write([*trained.read(trained.FILE), schema.read(trained.TrainedRow, entry)], trained.FILE)
    one = shown()
    assert one.measured is not None and (one.measured.images, one.measured.clean, one.measured.certified) == (5, 4, 2)
    assert "--limit 5" in one.measured.about and one.network == "ResNet" and one.verdict is fill.Verdict.NOTHING_PUBLISHED
    for damage in ({"verdicts": "013"}, {"verdicts": ""}, {"arithmetic": "sure"}, {"model_sha256": "x"}):
        trained.FILE.write_text(json.dumps({"rows": [{**entry, **damage}]}))
        with pytest.raises(IntegrityError, match=next(iter(damage))):
            fill.fill(paper, table="bands")


def check_interval(count: int, images: int, ends: tuple[float, float]) -> None:
    """Assert that both binomial tails are 2.5 %."""
    low, high = ends

    def at_least(k: int, p: float) -> float:
        logs = math.log(p), math.log1p(-p)
        head = math.lgamma(images + 1)
        terms = (
            head - math.lgamma(i + 1) - math.lgamma(images - i + 1) + i * logs[0] + (images - i) * logs[1]
            for i in range(k, images + 1)
        )
        return math.fsum(math.exp(term) for term in terms if term > -700)

    assert (low == 0 and count == 0) or at_least(count, low) == pytest.approx(0.025, abs=1e-6)
    assert (high == 1 and count == images) or 1 - at_least(count + 1, high) == pytest.approx(0.025, abs=1e-6)


def test_what_a_benchmark_counted_is_in_its_file(filled: dict[str, fill.FilledPaper]) -> None:
    """If this fails after a new run of benchmarks/trade.py, type the new counts into patchcert_cli/papers/xiang-2022.yaml."""
    lines = json.loads((ROOT / "docs/trade.json").read_text())["rows"]
    counted = [one for one in rows(filled["xiang-2022"]) if one.row.counted]
    assert len(counted) > 10
    for one in counted:
        row, found = one.row, one.row.counted
        assert found is not None and found.file == "docs/trade.json"
        masks = {"covers": [str(row.threat)], "per_axis": row.masks} | ({"shape": row.mask_shape} if row.mask_shape else {})
        (line,) = [
            line for line in lines if (line["model"], line["threat"]) == (row.model, str(row.threat)) and line["masks"] == masks
        ]
        names = ("images", "clean", "certified", "model_sha256")
        assert [getattr(found, name) for name in names] == [line[name] for name in names]
        if one.measured is not None:  # with these weights
            assert line["arithmetic"] == one.measured.arithmetic and one.measured.about
            check_interval(found.certified, found.images, one.measured.certified_interval)


def test_what_withstood_attacks_is_in_its_file(filled: dict[str, fill.FilledPaper]) -> None:
    kept = json.loads((ROOT / "docs/empirical.json").read_text())
    (table,) = [one for one in filled["chiang-2020"].tables if not one.table.guarantee.proves]
    assert len(table.rows) == 4
    for one in table.rows:
        row, found = one.row, one.row.counted
        assert found is not None and found.file == "docs/empirical.json" and not one.can_run
        of_data = kept[row.dataset]
        assert (row.model, found.model_sha256) == (of_data["network"], of_data["model_sha256"])
        outcomes = [line["lgs" if "gradients" in row.name else "watermark"] for line in of_data["images"]]
        right = [line for line in outcomes if line["right"]]
        assert (found.images, found.clean) == (len(outcomes), len(right))
        assert found.certified == sum(line["by"] is None for line in right)


def test_counts_about_other_weights_are_not_shown() -> None:
    paper = papers.load("xiang-2022")
    table = paper.table("cifar-strips")
    row = table.rows[0]
    assert row.counted is not None
    other = replace(row, counted=replace(row.counted, model_sha256="0" * 64))
    (one,) = fill.fill(replace(paper, tables=(replace(table, rows=(other,)),))).tables[0].rows
    assert one.measured is None and "other weights" in one.why and one.can_run


def test_every_row_is_measured_or_has_a_command_that_exists(filled: dict[str, fill.FilledPaper]) -> None:
    tool = typer.main.get_command(main.app)
    for one in (row for paper in filled.values() for row in rows(paper)):
        assert one.measured is not None or one.verdict is fill.Verdict.NOT_MEASURED
        first, *words = shlex.split(one.command)
        if first == "python":
            assert (ROOT / words[0]).is_file()
            continue
        assert first == "patchcert", one.command
        with tool.make_context("patchcert", list(words), resilient_parsing=True) as context:
            leaf = tool.get_command(context, words[0])  # type: ignore[attr-defined]
            leaf.make_context(words[0], words[1:], parent=context).close()


def test_a_row_says_what_its_command_would_certify() -> None:
    (row,) = [row for row in papers.load("metzen-2021").table("conditions").rows if row.name == "Condition 3.3"]
    assert fill.command_for(row, None) == "patchcert certify cifar-bagcert-rf7 --patch 5 --condition 3.3"
    (row,) = [row for row in papers.load("xiang-2022").table("imagenet-samples").rows if row.name.endswith(" 1 %")]
    name = "imagenet-patchcleanser-efficientnet-lite0"
    assert fill.command_for(row, None) == f"patchcert certify {name} --patch 1% --masks 3 --data imagefolder:./val"


def row_of(filled: dict[str, fill.FilledPaper], paper: str, table: str, name: str) -> fill.FilledRow:
    (found,) = [row for one in filled[paper].tables if one.table.id == table for row in one.rows if row.row.name == name]
    return found


def test_verdicts(filled: dict[str, fill.FilledPaper]) -> None:
    reached = row_of(filled, "chiang-2020", "best", "MNIST 5x5")
    assert reached.verdict is fill.Verdict.REACHED and texts.difference(reached) == "+0.61 / +3.28"
    below = row_of(filled, "chiang-2020", "best", "CIFAR-10 5x5")
    assert below.verdict is fill.Verdict.BELOW and "compact" in below.why
    assert reached.measured is not None and reached.row.published is not None

    def judged(clean: float | None, certified: float | None) -> fill.Verdict:
        published = replace(reached.row.published, clean=clean, certified=certified)  # type: ignore[type-var]
        return replace(reached, row=replace(reached.row, published=published)).verdict

    exact = reached.measured.certified / 10_000
    assert judged(0.9442, exact) is judged(None, exact) is fill.Verdict.REACHED
    assert judged(0.9443, exact) is fill.Verdict.CLEAN_BELOW
    assert judged(0.9442, exact + 0.0001) is judged(None, reached.measured.certified_interval[1]) is fill.Verdict.CLOSE
    assert judged(0.9442, reached.measured.certified_interval[1] + 0.0001) is fill.Verdict.BELOW
    assert judged(0.9442, None) is judged(None, None) is fill.Verdict.NOTHING_PUBLISHED
    assert replace(reached, measured=None).verdict is fill.Verdict.NOT_MEASURED


def test_a_model_has_the_same_published_numbers_in_every_table_of_metzen() -> None:
    found: dict[tuple[object, ...], set[object]] = {}
    for row in (row for table in papers.load("metzen-2021").tables for row in table.rows if row.model and not row.method):
        if not row.differs.startswith("Not of the paper"):
            found.setdefault((row.model, row.threat), set()).add(row.published and (row.published.clean, row.published.certified))
    assert all(len(numbers) == 1 for numbers in found.values()), found


def test_a_table_that_is_not_of_the_paper_says_only_that(filled: dict[str, fill.FilledPaper]) -> None:
    said = texts.markdown(filled["xiang-2022"], {})
    assert "In the paper: not known. Not of" not in said and "Not of the paper. Clean is" in said
    samples = next(table for table in filled["xiang-2022"].tables if table.table.id == "imagenet-samples")
    assert texts.heading(samples).endswith("(not of the paper)")
    assert texts.heading(filled["xiang-2022"].tables[0]).endswith("(in the paper: not known)")


def test_unknown_cells_stay_unknown(filled: dict[str, fill.FilledPaper]) -> None:
    table = next(one for one in filled["metzen-2021"].tables if one.table.id == "receptive-fields")
    cells = {row.row.name: texts.cells(row, table) for row in table.rows}
    assert cells["RF 9"]["published"] == "not known" and cells["RF 9"]["published network"] == "57M parameters"
    assert cells["RF 7"]["published"] == "86.00 / 60.00" and cells["RF 7, framed"]["published seconds"] == "40.6"
    ratios = {name: row["published seconds / RF 7, alike"] for name, row in cells.items()}
    assert ratios["RF 5"] == "0.96" and ratios["RF 7"] == "1.00" and ratios["Block smoothing"] == "19.41"
    table = next(one for one in filled["chiang-2020"].tables if one.table.id == "best")
    cells = {row.row.name: texts.cells(row, table) for row in table.rows}
    assert cells["MNIST 5x5"]["published training"] == "not known" and cells["MNIST 4 pixels"]["training"].startswith(
        "31 min, cpu"
    )
    assert cells["MNIST 5x5"]["training"] == "14 min, cpu, 1 thread, after mnist-ibp-p5"  # which took 65 minutes
    assert texts.pair(None, 0.5) == "not known / 50.00"


def test_a_sample_is_shown_with_its_images_in_the_same_line(filled: dict[str, fill.FilledPaper]) -> None:
    table = next(one for one in filled["xiang-2022"].tables if one.table.id == "imagenet-samples")
    (cells,) = [texts.cells(row, table) for row in table.rows if row.row.name.endswith(" 2 %")]
    assert cells["images"].startswith("150, one training image of each of 150 classes") and cells["measured"] == "83.33 / 21.33"


def test_rows_that_the_paper_cannot_have_are_called_so(filled: dict[str, fill.FilledPaper]) -> None:
    for name, table, row in (
        ("xiang-2022", "imagenet-samples", 0),
        ("xiang-2022", "cifar-strips", 0),
        ("metzen-2021", "margins", -1),
    ):
        (found,) = [one for one in filled[name].tables if one.table.id == table]
        assert found.rows[row].verdict is fill.Verdict.NOT_OF_THE_PAPER
        assert texts.cells(found.rows[row], found)["published"] == texts.NONE
    assert row_of(filled, "metzen-2021", "receptive-fields", "RF 9").verdict is fill.Verdict.NOTHING_PUBLISHED


def test_the_docs_quote_the_ratios_of_times_that_are_on_record(filled: dict[str, fill.FilledPaper]) -> None:
    (table,) = [one for one in filled["metzen-2021"].tables if one.table.id == "receptive-fields"]
    found = {row.row.name: texts.cells(row, table) for row in table.rows}
    ratio = {name: cells["seconds / RF 7, alike"] for name, cells in found.items()}
    published = {name: cells["published seconds / RF 7, alike"] for name, cells in found.items()}
    said = " ".join((ROOT / "docs/methods/evidence.md").read_text().split())
    fields = [ratio[f"RF {rf}"] for rf in (5, 9, 11, 13)]
    assert (
        f"{', '.join(fields[:3])} and {fields[3]} for fields 5, 9, 11 and 13, {ratio['Column smoothing']} for columns"
        f" (published {published['Column smoothing']}) and {ratio['Block smoothing']} for blocks"
        f" (published {published['Block smoothing']})"
    ) in said
    alike = [float(ratio[f"RF 7, {name}"]) for name in ("alike", "framed", "framed, balanced", "framed, taught")]
    assert 1.05 < max(alike) / min(alike) <= 1.1, (
        "one size and the same work: docs and paper say that they differ by up to a tenth"
    )


def test_attacks_share_no_table_with_certificates() -> None:
    for name in papers.names():
        for table in papers.load(name).tables:
            assert table.guarantee.proves or not any(row.model and not row.counted for row in table.rows)
    (attacked,) = fill.fill(papers.load("chiang-2020"), table="attacked-defenses").tables
    assert not attacked.table.guarantee.proves
    for row in attacked.rows:
        assert not {"measured", "certified"} & set(texts.cells(row, attacked))
        assert texts.cells(row, attacked)["arithmetic"] == "no certificate"
    for plain_row in attacked.to_dict()["rows"]:
        assert "certified" not in plain_row["measured"] and plain_row["measured"]["withstood"] < 10


def test_a_record_that_contradicts_its_card_is_refused(tmp_path: Path) -> None:
    source, place = bundled.folder() / "mnist-ibp-p5-linear", tmp_path / "zoo" / "mnist-ibp-p5-linear"
    shutil.copytree(source, place)
    paper = papers.load("chiang-2020")
    table = paper.table("other-proofs")
    only = replace(table, rows=tuple(row for row in table.rows if row.model == "mnist-ibp-p5-linear"))
    alone = replace(paper, tables=(only,))
    (before,) = fill.fill(alone, zoo=tmp_path / "zoo").tables[0].rows
    assert before.measured is not None and before.measured.certified == 6570
    packed = place / "records.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()).decode()
    packed.write_bytes(gzip.compress(text.replace("[true,true]", "[true,false]", 1).encode()))
    with pytest.raises(ClaimError, match="but its records have"):
        fill.fill(alone, zoo=tmp_path / "zoo")


def test_times_are_of_the_weights_here_and_shown_as_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = papers.load("metzen-2021")
    alone = replace(paper, tables=(paper.table("receptive-fields"),))
    (table,) = fill.fill(alone).tables
    by_name = {one.row.name: one for one in table.rows}
    first, other, unit = by_name["RF 5"], by_name["RF 9"], by_name["RF 7, alike"]
    assert first.card is not None and other.card is not None and unit.without_zoo is not None
    made = [
        times.TimedRow(first.row.model, first.row.threat, 500, 9.0, weights_sha256(first.card.files)),
        times.TimedRow(other.row.model, other.row.threat, 500, 10.0, "0" * 64),
        times.TimedRow(unit.row.command, unit.row.threat, 500, 10.0, unit.without_zoo.model_sha256),
    ]
    times.write("a machine", made, tmp_path / "times.json")
    monkeypatch.setattr(times, "FILE", tmp_path / "times.json")
    assert (first.seconds, other.seconds) == (180.0, None), "other weights were timed for the second"
    cell = texts.cells(first, table)
    assert cell["seconds of one core"] == "180" and cell["published seconds / RF 7, alike"] == "0.96"
    assert cell["seconds / RF 7, alike"] == "0.90"
    assert first.to_dict()["seconds"] == 180.0
    monkeypatch.setattr(times, "FILE", ROOT / "patchcert_cli/papers/times.json")
    measured = [one for one in table.rows if one.row.model or one.without_zoo]
    assert len(measured) == len(table.rows)
    assert all(one.seconds is not None for one in measured), "python benchmarks/times.py measures them again"
    monkeypatch.setattr(times, "FILE", tmp_path / "times.json")
    (tmp_path / "times.json").write_text('{"rows": [{"of": ""}]}')
    with pytest.raises(IntegrityError, match="has no rows of papers.*benchmarks/times.py"):
        times.read()


def test_a_wrong_file_lists_every_problem() -> None:
    text = (ROOT / "patchcert_cli/papers/levine-2020.yaml").read_text()
    wrong = text.replace("certified: 0.576", "certified: 57.6", 1).replace('threat: "patch:2x12"', 'threat: "patch:x"')
    wrong = wrong.replace("kind: figure", "kind: drawing").replace("venue: NeurIPS 2020", "year: 2020")
    with pytest.raises(IntegrityError) as refused:
        Paper.from_text(wrong, "levine.yaml")
    other = (ROOT / "patchcert_cli/papers/metzen-2021.yaml").read_text().replace("seconds_of: RF 7", "seconds_of: RF 1")
    with pytest.raises(IntegrityError, match="seconds_of: there is no row RF 1, alike with published seconds"):
        Paper.from_text(other, "metzen.yaml")
    for part in (
        "certified is 57.6, not a fraction in [0, 1]",
        "invalid patch 'x'",
        "'drawing'",
        "year is not a known",
        "venue is missing",
    ):
        assert part in refused.value.message
    for text, part in (("[1]", "no table of names"), ("a: [", "is not a paper")):
        with pytest.raises(IntegrityError, match=re.escape(part)):
            Paper.from_text(text, "x.yaml")
    with pytest.raises(UnknownName, match="no table of levine-2020 'rows'"):
        papers.load("levine-2020").table("rows")


def test_a_gap_is_that_of_equal_samples(filled: dict[str, fill.FilledPaper]) -> None:
    (table,) = fill.fill(papers.load("metzen-2021"), table="conditions").tables
    (gap,) = table.table.gaps
    assert texts.points(table.gap(gap)) == "+5.28" and "not measured" not in texts.gap(gap, table)
    open_ = replace(table, rows=(table.rows[0], replace(table.rows[1], measured=None), table.rows[2]))
    assert open_.gap(gap) is None and texts.gap(gap, open_).endswith("slides), not measured.")
    exact = table.rows[0].measured
    assert exact is not None
    less = replace(exact, certified=exact.certified - 300)
    third = [replace(row, measured=one) for row, one in zip(table.rows[1:], (exact, less), strict=True)]
    assert texts.points(replace(table, rows=(table.rows[0], *third)).gap(gap)) == "+3.00"
    fewer = [third[0], replace(third[1], measured=replace(less, images=5000))]
    assert replace(table, rows=(table.rows[0], *fewer)).gap(gap) is None
