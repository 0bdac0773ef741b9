from dataclasses import replace

from sample_records import at_seed

from longreach.report.subjects.summaries import summaries, summary_grid


def test_summaries(empty, summary):
    results = empty.add(summary("bloom", 2048, 0.073), summary("bloom", 4096, 0.166), summary("t5", 4096, 0.15))
    assert summary_grid(results).rows[1] == (
        *("bloom", "128", "4,096", "16.6", "[14.6, 18.6]", "4.2", "[2.2, 6.2]", "8.3", "[6.3, 10.3]", "35", "12"),
    )
    finding = summaries(results)
    assert finding.sentence == (
        "bloom (trained at 128, reading 4,096 tokens) has the highest ROUGE-1 16.6 [14.6, 18.6];"
        " it cannot be told apart from t5 (trained at 128, reading 4,096 tokens)."
    )
    assert finding.details == (
        "Transcripts that did not fit and were cut: 12 of 35 at 2,048 tokens and 12 of 35 at 4,096 tokens."
    )
    other_tokenizer = replace(summary("gpt2", 4096, 0.1), truncated=14)
    assert "and 12-14 of 35 at 4,096 tokens." in summaries(results.add(other_tokenizer)).details
    alone = summaries(empty.add(summary("bloom", 2048, 0.073, half=None)))
    assert alone.sentence == "bloom (trained at 128, reading 2,048 tokens) has ROUGE-1 7.3."


def test_scores_of_seeds_are_averaged(empty, summary):
    results = empty.add(summary("bloom", 2048, 0.1), at_seed(summary("bloom", 2048, 0.2), 1))
    assert summary_grid(results).rows[0][3:5] == ("15.0", "[13.0, 17.0]")
    assert "ROUGE-1 15.0" in summaries(results).sentence
