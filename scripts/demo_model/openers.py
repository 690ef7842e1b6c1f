"""The sentences that the demo model is judged by, and the rule that keeps them out of its data.

`TEST_OPENERS` were fixed before the first training run and are looked at only when a finished file
is scored. `DEV_OPENERS` choose between variants, sampling settings and data mixes. Neither may
appear in the training data, nor anything that says the same in nearly the same words.
"""

from __future__ import annotations

import re
from functools import lru_cache

TEST_OPENERS = (
    "Hi! How was your weekend?",
    "Hello! How are you today?",
    "Good morning! Did you sleep well?",
    "What kind of food do you like best?",
    "Have you seen any good films lately?",
    "Do you have any pets?",
    "What's the weather like where you are?",
    "What are you studying?",
    "Can you tell me a joke?",
    "What kind of music do you listen to?",
    "Do you play any sports?",
    "What do you do for a living?",
    "Where would you like to go on holiday?",
    "Do you prefer cats or dogs?",
    "What is your favourite season?",
    "I'm really tired today.",
    "Who are you?",
    "What are your plans for tonight?",
    "I just baked a chocolate cake!",
    "What book are you reading at the moment?",
)

DEV_OPENERS = (
    "Hey, how's it going?",
    "Good evening! How was your day?",
    "Did you do anything fun yesterday?",
    "What did you eat for lunch?",
    "What's your favourite movie?",
    "Do you like animals?",
    "Is it raining over there?",
    "How is school going?",
    "Do you know any funny stories?",
    "Can you play an instrument?",
    "Did you watch the football match?",
    "Do you like your job?",
    "Have you ever been to Italy?",
    "Do you like winter?",
    "I'm feeling a bit sad today.",
    "What is your name?",
    "What will you do tomorrow?",
    "I'm learning to cook.",
    "Do you like reading?",
    "Tea or coffee?",
)

NEAR_DUPLICATE_OVERLAP = (
    0.8  # share of words in common (Jaccard) from which two openers count as one
)
_GREETINGS = {
    "hi",
    "hello",
    "hey",
    "good",
    "morning",
    "evening",
    "afternoon",
    "there",
    "so",
    "well",
}
_SPELLINGS = {
    "favorite": "favourite",
    "film": "movie",
    "films": "movies",
    "whats": "what is",
    "hows": "how is",
    "im": "i am",
    "theres": "there is",
}


def normalise_words(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation, spelling variants or a greeting in front."""
    lowered = re.sub(r"[^a-z0-9 ]+", "", text.lower().replace("’", "'").replace("-", " "))
    words = " ".join(_SPELLINGS.get(word, word) for word in lowered.split()).split()
    start = 0
    while start < len(words) - 2 and words[start] in _GREETINGS:
        start += 1
    return tuple(words[start:])


_HELD_OUT = tuple(normalise_words(opener) for opener in TEST_OPENERS + DEV_OPENERS)


@lru_cache(maxsize=200_000)
def is_held_out(text: str) -> bool:
    """Whether `text` is, contains or nearly repeats one of the openers."""
    words = normalise_words(text)
    spaced = f" {' '.join(words)} "
    if any(f" {' '.join(opener)} " in spaced for opener in _HELD_OUT):
        return True
    if len(words) > 2 * max(map(len, _HELD_OUT)):
        return False
    return any(_overlap(set(words), set(opener)) >= NEAR_DUPLICATE_OVERLAP for opener in _HELD_OUT)


def _overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(1, len(one | other))
