import pytest
from sample_records import RESULTS

from longreach.verbs.report import ReportConfig, report

pytestmark = pytest.mark.usefixtures("unrendered")


def test_the_page_is_written_beside_the_results(tmp_path):
    RESULTS.write(tmp_path / "results.json")
    stages = []
    assert report(ReportConfig(tmp_path), lambda *stage: stages.append(stage)) == tmp_path / "report.html"
    assert {name for name, *_ in stages} == {"drawing the report"}
    assert "alibi" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert list((tmp_path / "figures").iterdir())


def test_a_folder_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.json: no such file"):
        report(ReportConfig(tmp_path), lambda *stage: None)
