from sample_records import at_seed

from longreach.report.subjects.context import context_figure, loss_by_context


def test_loss_falls_rises_or_is_level_by_the_intervals(empty, context):
    def curve(method, far, half=0.03):
        return [context(method, 512, 65, 128, 4.5, half=half), context(method, 512, 257, 512, far, half=half)]

    entries = curve("alibi", 4.4) + curve("t5", 4.45) + curve("rotary", 4.7) + curve("none", 1.0, half=None)
    finding = loss_by_context(empty.add(*entries), 128)
    assert finding.sentence == (
        "Past 128 tokens of context, loss falls further with alibi; is level within the intervals with t5;"
        " rises with rotary; cannot be judged with none."
    )
    assert "alibi 4.500 at 65-128 and 4.400 at 257-512" in finding.details
    assert "35 documents" in finding.certainty


def test_loss_is_judged_in_the_longest_windows_and_past_the_training_length_alone(empty, context):
    short = [context("alibi", 128, 1, 64, 5.0), context("alibi", 128, 65, 128, 4.0)]
    assert "nothing was measured" in loss_by_context(empty.add(*short), 128).sentence
    long = [context("alibi", 256, 65, 128, 4.5), context("alibi", 256, 129, 256, 4.4)]
    assert "4.500 at 65-128" in loss_by_context(empty.add(*short, *long), 128).details
    straddling = [context("alibi", 256, 1, 100, 4.5), context("alibi", 256, 101, 256, 4.4)]
    assert "nothing was measured" in loss_by_context(empty.add(*straddling), 128).sentence


def test_loss_is_drawn_at_the_middle_of_its_bin_with_its_band(empty, context):
    results = empty.add(
        context("alibi", 256, 1, 1, 7.0, half=0.5),
        context("alibi", 256, 64, 256, 4.0, half=0.1),
        context("alibi", 128, 1, 1, 7.2, half=0.5),
        context("alibi", 128, 2, 128, 5.0, half=0.5),
        context("learned", 128, 1, 1, 8.0, half=None),
    )
    (axes,) = context_figure(results).axes
    drawn = [list(map(list, line.get_data())) for line in axes.lines]
    assert [[1.0, 128.0], [7.0, 4.0]] in drawn
    assert [[1.0, 16.0], [7.2, 5.0]] in drawn
    assert len(axes.collections) == 1  # neither faint curves nor figures without an interval have a band
    assert [text.get_text() for text in axes.texts] == ["alibi", "learned (windows of 128)"]
    assert axes.get_yscale() == "linear"


def test_a_verdict_holds_for_every_seed_and_each_has_its_line(empty, context):
    def curve(method, seed, far):
        bins = [context(method, 512, 65, 128, 4.5), context(method, 512, 257, 512, far)]
        return [at_seed(entry, seed) for entry in bins]

    results = empty.add(*curve("alibi", 0, 4.3), *curve("alibi", 1, 4.2), *curve("t5", 0, 4.0), *curve("t5", 1, 4.6))
    finding = loss_by_context(results, 128)
    assert finding.sentence == (
        "Past 128 tokens of context, loss falls further with alibi; differs between seeds with t5."
    )
    assert "alibi 4.500 at 65-128 and 4.250 at 257-512" in finding.details
    assert "means over 2 seeds" in finding.certainty
    (axes,) = context_figure(results).axes
    assert [round(line.get_ydata()[-1], 9) for line in axes.lines if line.get_linewidth() < 1] == [4.3, 4.2, 4.0, 4.6]
