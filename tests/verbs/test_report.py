from dataclasses import replace

import pytest
from refusals import refused
from sample_records import PROVENANCE, RESULTS, record

from longreach.results import Results
from longreach.verbs.report import ReportConfig, report

pytestmark = pytest.mark.usefixtures("unrendered")


def test_the_page_is_written_beside_the_results(tmp_path):
    RESULTS.write(tmp_path / "results.json")
    stages = []
    assert report(ReportConfig((tmp_path,)), lambda *stage: stages.append(stage)) == tmp_path / "report.html"
    assert {name for name, *_ in stages} == {"drawing the report"}
    assert "alibi" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert list((tmp_path / "figures").iterdir())


def test_a_folder_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.json: no such file"):
        report(ReportConfig((tmp_path,)), lambda *stage: None)


def test_several_folders_on_one_page(tmp_path):
    folders = tmp_path / "one", tmp_path / "other"
    for folder, method in zip(folders, ("alibi", "rotary"), strict=True):
        folder.mkdir()
        Results(provenance=PROVENANCE).add(record(method)).write(folder / "results.json")
    page = report(ReportConfig(folders, output=tmp_path / "page"), lambda *stage: None)
    assert page == tmp_path / "page" / "report.html"
    shown = page.read_text(encoding="utf-8")
    assert "alibi" in shown
    assert "rotary" in shown
    assert {path.name for path in folders[0].iterdir()} == {"results.json"}


def test_folders_that_do_not_compare_are_named(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        Results(provenance=replace(PROVENANCE, corpus_hash=name)).write(tmp_path / name / "results.json")
    folders = tmp_path / "one", tmp_path / "other"
    with pytest.raises(ValueError, match=f"corpus_hash is one in {folders[0]} and other in {folders[1]}"):
        report(ReportConfig(folders, output=tmp_path / "page"), lambda *stage: None)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "folders is empty"),
        (("a", "a"), "give each once"),
        (("a", "b"), "output is missing with 2 folders"),
    ],
)
def test_bad_arguments(folders, message):
    with pytest.raises(ValueError, match=message):
        ReportConfig(folders)


def test_a_folder_in_the_place_of_the_page_is_named(capfd, tmp_path):
    RESULTS.write(tmp_path / "results.json")
    (tmp_path / "report.html").mkdir()
    assert refused(capfd, "report", tmp_path) == f"longreach report: {tmp_path}/report.html: Is a directory; mend that"
    assert not list(tmp_path.glob(".*"))
