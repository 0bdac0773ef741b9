import collections
import json
import lzma
import re
import sys
from functools import partial

import pytest
from tiny_subjects import decoder_subject, tokenizer

from longreach.measure.generation import stream_tokens
from longreach.measure.subject import Unsupported
from longreach.measure.summaries import MeetingCase, WordsOfAnyScript, measure_summaries, prompt_tokens, read_meetings
from longreach.results import Model

TRANSCRIPT = "Ann: the sum of 1 and 2\n  is 3 , I {vocalsound} guess .\nBob:\tit is 7 .\n" * 4
CASE = MeetingCase("m.jsonl:1", TRANSCRIPT, "What is the sum?", "The sum is 3.")

MEETING = {
    "general_query_list": [{"query": "Summarize the whole meeting", "answer": "They add."}],
    "specific_query_list": [
        {"query": "What did Ann say?", "answer": "1 and 2.", "relevant_text_span": [["0", "1"]]},
        {"query": "What did Bob say?", "answer": "3."},
    ],
    "meeting_transcripts": [{"speaker": "Ann", "content": "1 and 2"}, {"speaker": "Bob", "content": "3 , I guess"}],
}


def written(folder, *meetings, name="meetings.jsonl"):
    path = folder / name
    text = "".join(json.dumps(meeting) + "\n" for meeting in meetings).encode()
    path.write_bytes(lzma.compress(text) if name.endswith(".xz") else text)
    return path


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize("name", ["meetings.jsonl", "meetings.jsonl.xz"])
def test_each_query_of_each_meeting_is_a_case(tmp_path, name):
    other = {
        "general_query_list": [],
        "specific_query_list": MEETING["general_query_list"],
        "transcript_text": "Cy: no",
    }
    cases = read_meetings(written(tmp_path, MEETING, other, name=name))
    assert [(case.query, case.summary) for case in cases] == [
        ("Summarize the whole meeting", "They add."),
        ("What did Ann say?", "1 and 2."),
        ("What did Bob say?", "3."),
        ("Summarize the whole meeting", "They add."),
    ]
    assert [case.transcript for case in cases] == ["Ann: 1 and 2\nBob: 3 , I guess"] * 3 + ["Cy: no"]
    assert cases[2].name == f"{tmp_path / name}:1, specific_query_list[1]"


def test_the_text_of_a_transcript_goes_before_its_turns(tmp_path):
    cases = read_meetings(written(tmp_path, MEETING | {"transcript_text": "as it was cleaned"}))
    assert {case.transcript for case in cases} == {"as it was cleaned"}


@pytest.mark.parametrize(
    ("meeting", "message"),
    [
        (without(MEETING, "meeting_transcripts"), ":2 has neither field 'transcript_text' nor 'meeting_transcripts'"),
        (without(MEETING, "specific_query_list"), ":2 has no field 'specific_query_list'; its fields are 'general_"),
        (MEETING | {"general_query_list": {}}, ":2, field 'general_query_list' is no list of objects"),
        (MEETING | {"general_query_list": ["q"]}, ":2, field 'general_query_list' is no list of objects"),
        (
            MEETING | {"general_query_list": [{"query": "q"}]},
            ":2, general_query_list[0] has no field 'answer'; its fields are 'query'",
        ),
        (
            MEETING | {"general_query_list": [{"query": 3, "answer": "a"}]},
            ":2, general_query_list[0], field 'query' holds int, not text",
        ),
        (
            MEETING | {"meeting_transcripts": [{"speaker": "Ann"}]},
            ":2, meeting_transcripts[0] has no field 'content'; its fields are 'speaker'",
        ),
        (MEETING | {"transcript_text": None}, ":2, field 'transcript_text' holds NoneType, not text"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path, meeting, message):
    path = written(tmp_path, MEETING, meeting)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        read_meetings(path)


def test_a_file_without_queries_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no query: give a"):
        read_meetings(written(tmp_path))


def test_the_prompt_is_the_transcript_and_then_the_query():
    tokens, cut = prompt_tokens(tokenizer(), CASE, 10_000)
    assert tokenizer().decode(tokens) == f"{TRANSCRIPT}\n\nQuery: What is the sum?\nSummary:"
    assert not cut


def test_the_transcript_is_cut_at_its_end_and_no_more_than_needed():
    whole = len(prompt_tokens(tokenizer(), CASE, 10_000)[0])
    words = [TRANSCRIPT[: word.end()] for word in re.finditer(r"\S+", TRANSCRIPT)]
    lengths = [len(tokenizer().encode(f"{text}\n\nQuery: What is the sum?\nSummary:")) for text in words]
    for budget in range(lengths[0], whole):
        tokens, cut = prompt_tokens(tokenizer(), CASE, budget)
        assert cut
        kept = tokenizer().decode(tokens).removesuffix("\n\nQuery: What is the sum?\nSummary:")
        # By hand: of all beginnings that end with a word, the longest that fits.
        assert kept == [text for text, length in zip(words, lengths, strict=True) if length <= budget][-1]
        assert len(tokens) <= budget
    assert prompt_tokens(tokenizer(), CASE, whole)[1] is False
    with pytest.raises(
        Unsupported,
        match=rf"m.jsonl:1: .* more than the {lengths[0] - 1} tokens .* longer length or a smaller summary_tokens",
    ):
        prompt_tokens(tokenizer(), CASE, lengths[0] - 1)


def overlap(reference, summary, order):
    """ROUGE-N's F-measure, from its definition."""
    grams = [
        collections.Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
        for words in (reference, summary)
    ]
    common = sum((grams[0] & grams[1]).values())
    return 2 * common / (grams[0].total() + grams[1].total()) if common else 0.0


def subsequence(reference, summary):
    """ROUGE-L's F-measure, from its definition."""

    def longest(one, two):
        if not one or not two:
            return 0
        if one[-1] == two[-1]:
            return 1 + longest(one[:-1], two[:-1])
        return max(longest(one[:-1], two), longest(one, two[:-1]))

    return 2 * longest(reference, summary) / (len(reference) + len(summary))


# Words of at most three letters have no suffix for the stemmer, so that it has no part in these.
PAIRS = [
    ("the sum of 1 and 2 is 3", "1 and 2 is the sum"),
    ("Ann, Bob; Ann!", "ann and bob and ann"),
    ("no one was", "yes"),
    ("a b c d", "d c b a"),
    ("one two one two", "one two one"),
]


def measured(pairs, summaries=None, *, valid_length=400, max_new_tokens=60, **options):
    answers = iter(summaries or [summary for _, summary in pairs])
    return measure_summaries(
        lambda prompt, limit: tokenizer().encode(next(answers))[:limit],
        tokenizer(),
        [MeetingCase(str(n), TRANSCRIPT, "q", reference) for n, (reference, _) in enumerate(pairs)],
        model=Model("alibi", 16, seed=0),
        valid_length=valid_length,
        max_new_tokens=max_new_tokens,
        **options,
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_rouge_of_one_case_is_what_its_definition_gives(pair):
    record = measured([pair])
    reference, summary = (re.findall("[a-z0-9]+", text.lower()) for text in pair)
    assert record.rouge1 == pytest.approx(overlap(reference, summary, 1))
    assert record.rouge2 == pytest.approx(overlap(reference, summary, 2))
    assert record.rougeL == pytest.approx(subsequence(reference, summary))
    assert (record.cases, record.truncated) == (1, 0)
    ends = [
        (getattr(record, f"{kind}_low"), getattr(record, f"{kind}_high")) for kind in ("rouge1", "rouge2", "rougeL")
    ]
    assert ends == [(None, None)] * 3  # there is nothing to resample


def test_words_are_compared_by_their_stems():
    assert measured([("meetings were discussed", "meeting were discussing")]).rouge1 == 1


def test_cases_are_averaged_with_an_interval():
    record = measured(PAIRS)
    singles = [measured([pair]) for pair in PAIRS]
    for kind in ("rouge1", "rouge2", "rougeL"):
        values = [getattr(single, kind) for single in singles]
        low, high = getattr(record, f"{kind}_low"), getattr(record, f"{kind}_high")
        assert getattr(record, kind) == pytest.approx(sum(values) / len(values))
        assert min(values) <= low < getattr(record, kind) < high <= max(values)
    again = measured(PAIRS)
    assert (again.rouge1_low, again.rouge1_high) == (record.rouge1_low, record.rouge1_high)


def test_cases_that_agree_leave_no_doubt():
    record = measured([PAIRS[0]] * 8)
    assert record.rouge1_low == pytest.approx(record.rouge1)
    assert record.rouge1_high == pytest.approx(record.rouge1)


def test_prompt_and_summary_fit_the_length_together():
    asked, done = [], []

    def generate(prompt, limit):
        asked.append((len(prompt), limit))
        return tokenizer().encode("the sum")

    short = MeetingCase("short", "Ann: 3", "q", "the sum")
    record = measure_summaries(
        generate,
        tokenizer(),
        [CASE, short, CASE],
        model=Model("alibi", 16, seed=0),
        valid_length=100,
        max_new_tokens=20,
        on_case=done.append,
    )
    assert all(tokens + limit <= 100 and limit == 20 for tokens, limit in asked)
    assert asked[0][0] > 70
    assert record.truncated == 2
    assert done == [1, 2, 3]


def test_a_model_summarizes_through_greedy_generation():
    subject = decoder_subject()
    record = measure_summaries(
        partial(stream_tokens, subject),
        subject.tokenizer,
        [CASE],
        model=subject.identity,
        valid_length=64,
        max_new_tokens=8,
    )
    assert (record.valid_length, record.cases, record.truncated) == (64, 1, 1)
    assert 0 <= record.rougeL <= 1
    assert record.seconds > 0


def test_without_rouge_score_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"qmsum needs rouge-score: pip install 'longreach\[eval\]'"):
        measured(PAIRS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The meetings' 2nd_part: don\u2019t run, running!", None),  # as rouge-score has them
        ("Совещание прошло хорошо.", ["совещание", "прошло", "хорошо"]),
        ("会议很好。OK 3", ["会", "议", "很", "好", "ok", "3"]),
        ("बैठक अच्छी रही", ["बैठक", "अच्छी", "रही"]),
        ("الاجتماع، كان", ["الاجتماع", "كان"]),
        ("ประชุม", list("ประชุม")),
        ("회의는 좋았다", ["회의는", "좋았다"]),
        ("cafe\u0301 Été", ["café", "été"]),
    ],
)
def test_words_of_any_script(text, words):
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=True).tokenize(text) if words is None else words
    assert WordsOfAnyScript().tokenize(text) == words
    assert RougeScorer(["rougeL"], tokenizer=WordsOfAnyScript()).score(text, text)["rougeL"].fmeasure == 1.0
