import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.measure.words import count_words

# The form of WikiText-103's files: words between spaces, a space at both ends of each line, lines that are empty.
WIKITEXT = " \n = Homarus gammarus = \n \n Homarus gammarus , known as the lobster . \n"


def test_wikitext_counts_one_end_for_every_line_the_empty_ones_too():
    # By hand: 4 words in the heading, 8 in the sentence, 4 ends of line.
    assert count_words(WIKITEXT) == 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("\n", 1),
        ("one", 1),
        ("one\n", 2),
        ("one two", 2),
        (" one\ttwo  three \n", 4),
        ("a\r\nb\r\n", 4),
        ("Ġ don't U.S. @-@\n", 5),
    ],
)
def test_words_and_ends_of_line(text, words):
    assert count_words(text) == words


def test_a_cut_in_mid_word_counts_one_more_and_any_other_cut_none():
    whole = count_words(WIKITEXT)
    for cut in range(len(WIKITEXT) + 1):
        in_word = 0 < cut < len(WIKITEXT) and not WIKITEXT[cut - 1].isspace() and not WIKITEXT[cut].isspace()
        assert count_words(WIKITEXT[:cut]) + count_words(WIKITEXT[cut:]) == whole + in_word


@given(st.lists(st.lists(st.text(alphabet="ab.,é中", min_size=1), max_size=4), max_size=6))
def test_lines_of_words(lines):
    text = "".join(f" {' '.join(line)} \n" for line in lines)
    assert count_words(text) == sum(len(line) for line in lines) + len(lines)
