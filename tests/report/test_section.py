from longreach.report.section import Finding, Section


def test_certainties_are_said_once():
    findings = (Finding("a", certainty="x"), Finding("b"), Finding("c", certainty="y"), Finding("d", certainty="x"))
    assert Section("title", findings).certainties == ("x", "y")
