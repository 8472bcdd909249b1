"""Words for the counting and reversing tasks: a list of common English words, and made-up ones.

Owns the list and the makers of pseudo-words. Knows nothing of questions, of the held-out split or
of tokens. Everything here is lower case, a to z, `MIN_WORD_LEN` to `MAX_WORD_LEN` letters.
"""

from __future__ import annotations

import random

MIN_WORD_LEN = 3
MAX_WORD_LEN = 12

# Some have more letters than allowed; `common_words` leaves those out.
_WORD_TEXT = """
    strawberry raspberry blueberry blackberry cranberry cherry apple banana orange lemon mango
    papaya peach apricot avocado coconut pineapple tomato potato carrot onion garlic ginger pepper
    lettuce spinach broccoli cabbage celery pumpkin mushroom butter cheese yogurt coffee cookie
    chocolate vanilla cinnamon sugar honey bread noodle pasta pizza sandwich dinner breakfast
    kitchen bottle glass spoon knife plate table chair sofa window mirror carpet curtain pillow
    blanket bedroom bathroom garden balcony garage cellar attic ladder hammer needle scissors
    button zipper pocket jacket sweater trousers shoe sock mitten scarf umbrella dog cat horse cow
    sheep goat pig chicken duck goose turkey rabbit squirrel hedgehog badger otter beaver elephant
    giraffe hippopotamus rhinoceros crocodile alligator kangaroo koala panda tiger lion leopard
    cheetah monkey gorilla parrot penguin pelican flamingo sparrow eagle falcon butterfly
    dragonfly beetle spider mosquito grasshopper caterpillar salmon tuna shark whale dolphin
    octopus lobster turtle tortoise river lake ocean island beach desert forest jungle mountain
    valley canyon volcano glacier waterfall meadow prairie swamp cave cliff harbor village city
    street bridge tunnel castle palace temple church tower museum library theater cinema stadium
    hospital pharmacy school college university office factory market station airport airplane
    helicopter train tram bicycle motorcycle truck tractor ship ferry submarine rocket satellite
    planet comet galaxy universe gravity energy electron neutron proton molecule atom crystal
    diamond silver copper iron steel carbon oxygen hydrogen nitrogen mercury water fire earth wind
    rain snow storm thunder lightning tornado hurricane weather climate season spring summer
    autumn winter monday tuesday wednesday thursday friday saturday sunday january february march
    april june july august september october november december morning evening midnight minute
    second hour week month year century yesterday today tomorrow mother father sister brother
    daughter son uncle aunt cousin nephew niece grandmother grandfather baby child teacher student
    doctor nurse lawyer engineer scientist farmer baker butcher carpenter plumber painter singer
    dancer actor writer poet author editor reporter pilot sailor soldier captain president
    minister mayor king queen prince princess knight wizard dragon book letter word sentence
    paragraph chapter story novel poem dictionary encyclopedia newspaper magazine pencil paper
    eraser ruler computer keyboard monitor printer mouse network internet program algorithm
    function variable compiler database server client gateway protocol message packet stream
    buffer memory processor thread kernel token tensor matrix vector gradient model language
    mississippi tennessee massachusetts california colorado alaska hawaii oregon nevada arizona
    texas florida london paris berlin madrid rome vienna prague warsaw moscow tokyo beijing delhi
    cairo nairobi sydney canada mexico brazil argentina germany france spain italy greece turkey
    egypt india china japan russia happy sad angry hungry thirsty tired sleepy brave clever funny
    gentle kind lazy noisy quiet polite proud silly simple difficult easy heavy light strong weak
    quick slow fast early late young old new big small large tiny huge tall short long wide narrow
    deep shallow hot cold warm cool dry wet clean dirty beautiful wonderful terrible horrible
    excellent perfect possible impossible necessary successful address committee accommodate
    embarrass occurrence parallel bookkeeper balloon bubble puddle puzzle giggle wiggle settle
    kettle cattle rattle bottle ribbon rubber hobby lobby jelly belly penny funny level radar
    civic kayak rotor madam refer noon racecar stats one two three four five six seven eight nine
    ten eleven twelve twenty thirty hundred thousand million red blue green yellow purple brown
    black white gray pink violet indigo crimson scarlet turquoise run walk jump swim climb crawl
    dance sing laugh cry smile whisper shout listen watch read write draw paint build break repair
    open close start finish begin remember forget think believe understand explain question answer
    problem solution example exercise reason logic number addition difference total music guitar
    violin piano trumpet drum flute orchestra concert melody rhythm harmony festival football
    tennis hockey soccer baseball basketball volleyball running swimming marathon victory champion
    freedom justice courage wisdom knowledge patience honesty friendship happiness kindness
    imagination tree flower leaf root branch grass seed rose tulip daisy lily sunflower oak maple
    pine willow cactus head hair eye ear nose mouth tooth tongue neck shoulder elbow finger thumb
    knee ankle heart stomach
"""

_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "br",
    "cl",
    "cr",
    "dr",
    "fl",
    "gr",
    "pl",
    "pr",
    "sh",
    "sp",
    "st",
    "th",
    "tr",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ee", "oo", "ou", "ea"]
_CODAS = ["", "", "", "", "n", "r", "s", "t", "l", "m", "ll", "ss", "ck", "nd", "rt", "st"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def common_words() -> tuple[str, ...]:
    """Return the common words that have an allowed length, each once, in a fixed order."""
    return tuple(
        sorted({word for word in _WORD_TEXT.split() if MIN_WORD_LEN <= len(word) <= MAX_WORD_LEN})
    )


_COMMON = common_words()


def syllable_word(rng: random.Random) -> str:
    """Make a pronounceable pseudo-word."""
    word = ""
    wanted = rng.randint(MIN_WORD_LEN, MAX_WORD_LEN)
    while len(word) < wanted:
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    return word[:wanted]


def letters_word(rng: random.Random) -> str:
    """Make a word of random letters; half use a few letters only, so that letters repeat."""
    length = rng.randint(MIN_WORD_LEN, MAX_WORD_LEN)
    letters = _LETTERS if rng.random() < 0.5 else rng.sample(_LETTERS, rng.randint(2, 6))
    return "".join(rng.choice(letters) for _ in range(length))


def any_word(rng: random.Random) -> str:
    """Draw a common word (two in five), a syllable word (two in five) or random letters."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(_COMMON)
    return syllable_word(rng) if kind < 0.8 else letters_word(rng)
