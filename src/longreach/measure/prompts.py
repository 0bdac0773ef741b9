"""The prompts of the retrieval tasks: their published formats, and random ones with any number of records.

- lines and topics: LongEval (Li et al., 2023, "How long can open-source LLMs truly promise on context length?").
- kv: "Lost in the middle" (Liu et al., 2023, arXiv 2307.03172).
- passkey: Mohtashami & Jaggi (2023, arXiv 2305.16300).
- retrieval: ours, for small models that were trained on such text; see `longreach.data.synthetic`.

The dialogues of random topics prompts are our own; those of LongEval were written by a language model.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from uuid import UUID

from longreach.data.synthetic import FILLER as RETRIEVAL_FILLER
from longreach.data.synthetic import QUESTION, WORDS, telling
from longreach.measure.subject import Unsupported


class TooFewNames(Unsupported):
    """More records were asked for than there are names to tell them apart."""

    def __init__(self, names: int):
        super().__init__(f"more than {names} records are needed and there are {names} names: give a shorter length")
        self.names = names
        """How many there are."""


@dataclass(frozen=True)
class Case:
    """One prompt with the answer that it asks for."""

    task: str
    """One of `retrieval.TASKS`."""
    prompt: str
    answer: str
    depth: float
    """Where in the prompt the answer stands: 0 at its start, 1 at its end."""


def lines_prompt(lines: Sequence[tuple[str, int]], key: str) -> str:
    """LongEval's lines: numbers under names, of which one is asked for."""
    record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in lines)
    return (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        f"<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n{record}\nNow the record is over. "
        f"Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
    )


def topics_prompt(dialogues: Sequence[str]) -> str:
    """LongEval's topics: conversations, of which the first one's topic is asked for."""
    return (
        f"Below is a record of our previous conversation on {len(dialogues)} different topics. You are the ASSISTANT, "
        "and I am the USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of "
        "<TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now "
        f"the record start. {''.join(dialogues)} Now the record ends. What is the first topic we discussed? Only give "
        "me the topic name. Do not summarize yourself."
    )


def kv_prompt(records: Sequence[tuple[str, str]], key: str) -> str:
    """Key-value retrieval of "Lost in the middle": a JSON object, of which one key's value is asked for."""
    data = ",\n ".join(f'"{name}": "{value}"' for name, value in records)
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{{{data}}}\n\nKey: "{key}"\nCorresponding value:'
    )


def passkey_prompt(passkey: int, before: str, after: str) -> str:
    """A number between two stretches of text that says nothing."""
    return (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        f"about the important information there.\n{before}\nThe pass key is {passkey}. Remember it. {passkey} is the "
        f"pass key.\n{after}\nWhat is the pass key? The pass key is"
    )


def random_lines(random: Random, num_records: int, depth: float) -> Case:
    """`num_records` lines under names of an adjective and a noun."""
    names = _shuffled(random, [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS], num_records)
    lines = [(name, random.randint(1, 50000)) for name in names]
    key, number = lines[_place(depth, num_records)]
    return Case("lines", lines_prompt(lines, key), str(number), depth)


def random_topics(random: Random, num_records: int, depth: float) -> Case:
    """`num_records` dialogues. The first one's topic is asked for, so `depth` must be 0."""
    topics = _shuffled(random, [f"the {aspect} of {noun}s" for aspect in ASPECTS for noun in NOUNS], num_records)
    prompt = topics_prompt([_dialogue(random, topic) for topic in topics])
    return Case("topics", prompt, _capitalized(topics[0]), depth)


def random_kv(random: Random, num_records: int, depth: float) -> Case:
    """`num_records` pairs of random UUIDs."""
    records = [(_random_uuid(random), _random_uuid(random)) for _ in range(num_records)]
    key, value = records[_place(depth, num_records)]
    return Case("kv", kv_prompt(records, key), value, depth)


def random_passkey(random: Random, num_records: int, depth: float) -> Case:
    """`num_records` sentences that say nothing."""
    passkey = random.randint(1, 50000)
    place = round(depth * num_records)
    before, after = (
        " ".join(itertools.islice(itertools.cycle(PASSKEY_FILLER), count)) for count in (place, num_records - place)
    )
    return Case("passkey", passkey_prompt(passkey, before, after), str(passkey), depth)


def random_retrieval(random: Random, num_records: int, depth: float) -> Case:
    """`num_records` sentences, one of which tells the word that is asked for."""
    word = random.choice(WORDS)
    sentences = random.choices(RETRIEVAL_FILLER, k=num_records - 1)
    sentences.insert(_place(depth, num_records), telling(word))
    return Case("retrieval", " ".join([*sentences, QUESTION]), word, depth)


def _place(depth: float, num_records: int) -> int:
    """Which of the records stands at a depth."""
    return round(depth * (num_records - 1))


def _shuffled(random: Random, pool: list[str], count: int) -> list[str]:
    """The first `count` in an order that does not depend on how many are asked for."""
    if count > len(pool):
        raise TooFewNames(len(pool))
    random.shuffle(pool)
    return pool[:count]


def _random_uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))


def _dialogue(random: Random, topic: str) -> str:
    """A conversation in plain sentences that say little, with LongEval's opening and end."""
    turns = [
        f"USER: I would like to discuss the topic of {topic}.",
        f"ASSISTANT: Gladly. What about {topic} would you like to begin with?",
    ]
    for question, answer in random.sample(EXCHANGES, 4):
        turns += [f"USER: {question}", f"ASSISTANT: {answer}"]
    turns.append(
        f"USER: Great, this is the end of our discussion on the topic {_capitalized(topic)}, "
        "let's talk about the next topic."
    )
    return " \n ".join(turns)


def _capitalized(topic: str) -> str:
    return topic[0].upper() + topic[1:]


PASSKEY_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""The text around a passkey."""

ADJECTIVES = tuple(
    str.split("""
    able agile amber ample ancient arid avid bald bitter blank bleak blue blunt bold brave brief bright brisk broad
    brown calm careful cheap clean clear clever cold cosy crisp curious curly dark dear deep dense dim dry dull dusty
    eager early easy empty even exact faint fair famous fast fierce fine firm flat fond formal fresh full gentle giant
    glad golden grand grave great green grey happy hard harsh heavy hollow honest huge humble icy idle keen kind large
    late lazy lean light little lively lonely long loud loyal lucky mellow merry mild modest narrow neat new nimble
    noble odd old orange pale patient plain polite proud pure quick quiet rapid rare red rich ripe robust rough round
    royal rusty sharp shiny shy silent silver simple slim slow small smooth soft solid sour spare steady steep stern
    sturdy subtle sunny sweet swift tall tame tender thick thin tidy tiny tough vast vivid warm wide wild wise young
    """)
)

NOUNS = tuple(
    str.split("""
    acorn actor anchor apple apron arrow artist badge banana basket beacon bean bell bird blanket boat bottle
    bridge brook bucket button cabin camel candle canoe carpet castle cellar chair chimney clock cloud coat coin comet
    cotton cousin cradle crane crown cushion desert diamond doctor donkey door dragon drum eagle engine farmer feather
    fern field finger flute forest fountain garden glacier globe hammer harbor harp hill hotel island jacket kettle
    kitchen ladder lantern lemon letter lion magnet map meadow melon mirror monkey mountain napkin needle oak ocean
    onion orchard otter owl paddle painter palace parrot pebble pencil pepper pigeon pillow pilot planet pocket pond
    prince pumpkin puzzle rabbit ribbon river rocket saddle sailor school sheet shell signal spider spoon station
    stove student table tailor temple tiger tower tractor tunnel turtle valley village violin wagon walnut whale
    willow window winter writer
    """)
)
"""Each has a plural in -s."""

ASPECTS = ("history", "future", "beauty", "science", "cost", "safety", "meaning", "popularity")

EXCHANGES = (
    (
        "Where would you begin if you knew nothing about it?",
        "I would begin with what can be seen and touched, then read one good introduction and write down every word "
        "that I did not understand. After that the harder books are no longer so hard.",
    ),
    (
        "What do people most often get wrong about it?",
        "They take the first thing that they heard for the whole of it. A second source nearly always changes the "
        "picture, and a third one shows what the first two had left out.",
    ),
    (
        "Has it changed much in the last hundred years?",
        "Yes, more than most of us notice. Tools became cheaper, news travels faster, and far more people can take "
        "part, but the questions that they ask have stayed much the same.",
    ),
    (
        "Is it the same in every country?",
        "No. Climate, law and habit each leave their mark, so that what is common in one place can look strange in "
        "another. Travellers wrote about such differences long before anyone counted them.",
    ),
    (
        "Who knows the most about it today?",
        "Some of the best work is done in small groups that hardly anybody has heard of. They meet once a year, "
        "compare their notes, and disagree politely about nearly everything.",
    ),
    (
        "How could I explain it to a child?",
        "Tell a short story in which somebody needs it, and stop as soon as the child asks a question. Children "
        "remember the answers to their own questions far better than those to ours.",
    ),
    (
        "Does it cost a lot of money to take part?",
        "It can, but it need not. Much can be borrowed, libraries are free, and those who have done it for years are "
        "usually glad to give away what they no longer use.",
    ),
    (
        "What would you measure first?",
        "Whatever is easiest to measure twice. If the two numbers differ, you have learned something about your "
        "method, and if they agree, you can go on to what is more difficult.",
    ),
    (
        "Can you recommend something to read?",
        "Look for a book that is older than you are and for one from this year. What both of them say is probably "
        "true, and where they differ you will find the interesting part.",
    ),
    (
        "What will be different in ten years?",
        "Nobody can say for certain. I would expect small steps rather than a revolution, and I would expect that "
        "some idea which is laughed at today will then be taken for granted.",
    ),
)
"""What the dialogues are made of: a question and its answer."""
